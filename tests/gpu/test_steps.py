"""The step of the GPU backends against the reference: chunks, buckets, groups, launches and uploads.

The kernels' PTX runs on the CPU, on the machine of ptx/; `make ptx` looks at what threads do to each other.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import relative_difference
from ptx import driver
from tolerances import GPU_STEP
from torch import Tensor, nn

import fusedlr
from fusedlr.backends.gpu.tables import Table
from fusedlr.columns import CHUNK
from gpu.steps import (
    all_params,
    both,
    count_calls,
    counts,
    difference,
    launched,
    params,
    train,
)

# tensors


@pytest.mark.parametrize("clip", (None, 1.0))
def test_chunks_and_tiles_end_anywhere(gpu_backend: str, clip: float | None) -> None:
    sizes = (1, 3, 255, 256, 257, 1023, 1024, 1025, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 1300, 0, ())
    both(gpu_backend, lambda: [{"params": params(*sizes)}], steps=2, max_grad_norm=clip)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("state_dtype", (None, "param"))
def test_16_bits_round_as_the_reference(
    gpu_backend: str, dtype: torch.dtype, state_dtype: str | None
) -> None:
    def make() -> list[dict[str, Any]]:
        return [{"params": params(5, 1500, dtype=dtype)}]

    runs = [train(backend, make, state_dtype=state_dtype, eps=1e-4) for backend in (gpu_backend, "reference")]
    assert counts(runs[0]) == counts(runs[1])
    for a, b in zip(all_params(runs[0]), all_params(runs[1]), strict=True):
        # the last bit may go the other way where fp32 is a tie but for its own last bit
        apart = (a.view(torch.int16).int() - b.view(torch.int16).int()).abs()
        assert apart.max() <= 1 and (apart > 0).float().mean() < 0.01


@pytest.mark.parametrize("which", ("param", "grad", "exp_avg", "exp_avg_sq", "nothing"))
def test_any_address_may_be_off_16_bytes(gpu_backend: str, which: str) -> None:
    def off(x: Tensor) -> Tensor:
        return torch.empty(x.numel() + 1)[1:].view(x.shape).copy_(x)

    def before(optimizer: Any, k: int) -> None:
        for p in all_params(optimizer):
            if which == "grad":
                p.grad = off(p.grad)
            elif k and which.startswith("exp"):
                optimizer.state[p][which] = off(optimizer.state[p][which])

    def make() -> list[dict[str, Any]]:
        (p,) = params(2 * CHUNK)
        return [{"params": [nn.Parameter(off(p.detach())) if which == "param" else p]}]

    both(gpu_backend, make, before=before)


@pytest.mark.parametrize("amsgrad", (False, True))
@pytest.mark.parametrize("maximize", (False, True))
def test_mixed_dtypes_share_one_norm(gpu_backend: str, amsgrad: bool, maximize: bool) -> None:
    def make() -> list[dict[str, Any]]:
        return [
            {"params": [*params(700), *params(1100, dtype=torch.float16)], "maximize": maximize},
            {"params": params(30, seed=2), "amsgrad": amsgrad, "betas": (0.5, 0.7), "lr": 0.03},
        ]

    runs = [train(backend, make) for backend in (gpu_backend, "reference")]
    assert counts(runs[0]) == counts(runs[1])
    for key in ("lr", "grad_norm", "coef"):
        a, b = (run.metrics()[key].double() for run in runs)
        assert torch.allclose(a, b, rtol=GPU_STEP, atol=0)
    for a, b in zip(all_params(runs[0]), all_params(runs[1]), strict=True):
        assert relative_difference([a], [b]) <= (GPU_STEP if a.dtype == torch.float32 else 1e-3)


def test_tensors_without_gradient_are_left_alone(gpu_backend: str) -> None:
    def before(optimizer: Any, k: int) -> None:
        for i, p in enumerate(all_params(optimizer)):
            if (i + k) % 3 == 0:
                p.grad = None

    both(
        gpu_backend, lambda: [{"params": params(5, 9)}, {"params": params(4, seed=2)}], steps=4, before=before
    )


def test_more_empty_tensors_than_the_last_program_has_lanes(gpu_backend: str) -> None:
    ours = both(gpu_backend, lambda: [{"params": params(*[0] * 600, 3)}], steps=2, max_grad_norm=None)
    assert {s["step"].item() for s in ours.state.values()} == {2.0}


# groups


def test_more_groups_than_the_last_program_has_lanes(gpu_backend: str) -> None:
    both(
        gpu_backend,
        lambda: [{"params": params(2)}, *({"params": []} for _ in range(512))],
        steps=1,
        max_grad_norm=None,
    )


def test_no_gradient_at_all_counts_a_joint_step_and_no_independent_one(gpu_backend: str) -> None:
    def before(optimizer: Any, k: int) -> None:
        for p in all_params(optimizer):
            p.grad = None if k else p.grad

    def make() -> list[dict[str, Any]]:
        return [{"params": params(4)}, {"params": params(3, seed=2), "lr": 0.1}]

    assert both(gpu_backend, make, before=before).metrics()["step"].tolist() == [3, 3]
    assert both(gpu_backend, make, before=before, groups="independent").metrics()["step"].tolist() == [1, 1]


def test_independent_groups_have_their_own_norm_and_limit(gpu_backend: str) -> None:
    def before(optimizer: Any, k: int) -> None:
        if k == 1:
            all_params(optimizer)[2].grad[1] = math.inf

    def make() -> list[dict[str, Any]]:
        return [
            {"params": params(4, CHUNK + 5)},
            {"params": params(3, seed=2), "max_grad_norm": 0.1},
            {"params": params(3, seed=3), "max_grad_norm": None, "schedule": fusedlr.linear(total_steps=9)},
            {"params": []},
        ]

    ours = both(gpu_backend, make, before=before, groups="independent")
    assert ours.metrics()["step"].tolist() == [3, 2, 3, 0]


@pytest.mark.parametrize("scale", (None, 2.0**16))
def test_skips(gpu_backend: str, scale: float | None) -> None:
    def before(optimizer: Any, k: int) -> None:
        if scale is not None:
            for p in all_params(optimizer):
                p.grad *= scale
            optimizer.grad_scale = torch.tensor(scale)
            optimizer.found_inf = torch.tensor([0.0, math.nan, 0.0, 2.0][k])
        elif k in (1, 3):
            all_params(optimizer)[0].grad[0] = math.nan

    ours = both(gpu_backend, lambda: [{"params": params(4, 3)}], steps=4, before=before)
    assert ours.metrics()["skipped"] == 2


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_a_rate_that_is_a_tensor(gpu_backend: str, dtype: torch.dtype) -> None:
    rate = torch.tensor(0.5, dtype=dtype)

    def before(optimizer: Any, k: int) -> None:
        # in place, as torch's capturable schedulers do
        rate.fill_(0.5 / (k + 1))

    both(gpu_backend, lambda: [{"params": params(4)}], before=before, schedule=None, lr=rate)


# nothing is stale


def test_every_change_of_a_hyperparameter_counts_at_the_next_step(gpu_backend: str) -> None:
    def before(optimizer: Any, k: int) -> None:
        group = optimizer.param_groups[0]
        changes: list[Callable[[], Any]] = [
            lambda: None,
            lambda: group.update(betas=(0.3, 0.4)),
            lambda: group.update(eps=0.1),
            lambda: group.update(weight_decay=0.5),
            lambda: group.update(initial_lr=0.07),
            lambda: group.update(maximize=True),
            lambda: group.update(schedule=fusedlr.linear(total_steps=50)),
            lambda: setattr(optimizer, "max_grad_norm", 0.01),
            lambda: setattr(optimizer, "max_grad_norm", None),
            lambda: group.update(lr=0.2),
        ]
        changes[k]()

    both(gpu_backend, lambda: [{"params": params(6)}], before=before, steps=10)


def test_tensors_that_move_are_followed(gpu_backend: str) -> None:
    def before(optimizer: Any, k: int) -> None:
        for p in all_params(optimizer):
            p.data = p.data.clone()
            if k == 1:
                optimizer.state[p]["exp_avg"] = optimizer.state[p]["exp_avg"].clone()

    both(gpu_backend, lambda: [{"params": params(6, (3, 4))}], before=before)


def test_a_transposed_parameter_is_updated_in_place(gpu_backend: str) -> None:
    def make() -> list[dict[str, Any]]:
        (p,) = params((6, 4))
        return [{"params": [nn.Parameter(p.detach().t())]}]

    both(gpu_backend, make)


def test_fp64_runs_through_the_reference(gpu_backend: str) -> None:
    def make() -> list[dict[str, Any]]:
        return [{"params": [*params(6, dtype=torch.float64), *params(5)]}]

    ours, theirs = (train(backend, make) for backend in (gpu_backend, "reference"))
    assert all(map(torch.equal, all_params(ours), all_params(theirs)))
    # what the step used is kept in fp32 here
    assert difference(ours, theirs) <= 2**-24


# launches and uploads


@pytest.mark.parametrize("clip", (None, 1.0))
@pytest.mark.parametrize("tensors", (1, 40))
def test_one_launch_without_clipping_and_two_with(gpu_backend: str, clip: float | None, tensors: int) -> None:
    before = launched()
    train(
        gpu_backend, lambda: [{"params": params(*[2] * tensors)}, {"params": []}], steps=1, max_grad_norm=clip
    )
    assert launched() - before == (1 if clip is None else 2)


def test_one_launch_per_bucket(gpu_backend: str) -> None:
    before = launched()
    train(gpu_backend, lambda: [{"params": [*params(2), *params(3, dtype=torch.bfloat16)]}], steps=1)
    assert launched() - before == 4


def test_what_stays_is_not_uploaded_again(gpu_backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = train(gpu_backend, lambda: [{"params": params(4, 5)}], steps=2)
    calls = count_calls(monkeypatch, Table, "_upload")
    for _ in range(2):
        optimizer.step()
    assert not calls
    for p in all_params(optimizer):
        p.grad = p.grad.clone()
    optimizer.step()
    # the gradients' addresses alone, if a launch does not carry them
    addresses = 0 if gpu_backend == "cuda" else 1
    assert len(calls) == addresses
    optimizer.param_groups[0]["weight_decay"] = 0.3
    optimizer.step()
    assert len(calls) == addresses + 1


def test_what_a_step_used_is_in_fp32(gpu_backend: str) -> None:
    optimizer = train(gpu_backend, lambda: [{"params": params(4)}])
    assert {optimizer.metrics()[key].dtype for key in ("lr", "grad_norm", "coef")} == {torch.float32}


def test_a_launch_that_fails_leaves_no_tickets_behind(gpu_backend: str) -> None:
    optimizer = train(
        gpu_backend, lambda: [{"params": [*params(2), *params(3, dtype=torch.bfloat16)]}], steps=1
    )
    # two norms, one of the two updates
    driver.installed().machine.fail_after(3)
    with pytest.raises(RuntimeError, match="this launch is to fail"):
        optimizer.step()
    assert optimizer.metrics()["step"].tolist() == [1]
    assert optimizer._counts.counters.graphs.tickets.tolist() == [0, 0]
    optimizer.step()
    assert optimizer.metrics()["step"].tolist() == [2]
    assert {s["step"].item() for s in optimizer.state.values()} == {2.0}
