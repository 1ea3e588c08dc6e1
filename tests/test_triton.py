"""The Triton step in the interpreter against the reference: chunks, buckets, groups, launches and uploads."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import relative_difference
from tolerances import TRITON_STEP
from torch import Tensor, nn
from triton_spelling import load
from wrong import triton_steps as wrong

import fusedlr
from fusedlr import backends, gpu, staging
from fusedlr.tables import CHUNK, GROUP_INTS

pytestmark = pytest.mark.interpreter

SCHEDULE = fusedlr.cosine(warmup_steps=2, total_steps=12, min_lr_ratio=0.1)
MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


def params(*shapes: Any, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def train(
    backend: str,
    make: Callable[[], list[dict[str, Any]]],
    steps: int = 3,
    before: Callable[[Any, int], None] = lambda optimizer, k: None,
    **options: Any,
) -> fusedlr.FusedAdamW:
    """Some steps on made-up gradients; `before` sees the optimizer with its gradients before each."""
    settings = {"lr": 0.01, "schedule": SCHEDULE, "max_grad_norm": 1.0, **options}
    optimizer = fusedlr.FusedAdamW(make(), backend=backend, **settings)
    generator = torch.Generator().manual_seed(1)
    for k in range(steps):
        for p in all_params(optimizer):
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        before(optimizer, k)
        optimizer.step()
    return optimizer


def all_params(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def compare(ours: fusedlr.FusedAdamW, theirs: fusedlr.FusedAdamW) -> None:
    """Everything that a step leaves behind: counts exactly, numbers to the rounding of fp32."""
    assert difference(ours, theirs) <= TRITON_STEP
    assert counts(ours) == counts(theirs)


def counts(optimizer: fusedlr.FusedAdamW) -> list[Any]:
    steps = [optimizer.state[p]["step"].item() for p in all_params(optimizer) if optimizer.state.get(p)]
    in_row = optimizer._counters.skips_in_row.tolist()
    return [steps, optimizer.metrics()["step"].tolist(), optimizer.metrics()["skipped"].tolist(), in_row]


def difference(ours: fusedlr.FusedAdamW, theirs: fusedlr.FusedAdamW) -> float:
    """Largest relative difference of parameters, moments and of what the step says it used."""
    pairs = [(all_params(ours), all_params(theirs))]
    for key in MOMENTS:
        pairs.append(tuple([s[key] for s in o.state.values() if key in s] for o in (ours, theirs)))
    for key in ("lr", "grad_norm", "coef"):
        a, b = (o.metrics()[key].double().reshape(-1) for o in (ours, theirs))
        if not torch.equal(a.isnan(), b.isnan()):
            return math.inf
        pairs.append((list(a.nan_to_num(7).split(1)), list(b.nan_to_num(7).split(1))))
    return max(relative_difference(a, b) for a, b in pairs)


def both(make: Callable[[], list[dict[str, Any]]], **options: Any) -> fusedlr.FusedAdamW:
    ours = train("triton", make, **options)
    assert ours.backend == "triton"
    compare(ours, train("reference", make, **options))
    return ours


# --- tensors


@pytest.mark.parametrize("clip", (None, 1.0))
def test_chunks_and_tiles_end_anywhere(clip: float | None) -> None:
    sizes = (1, 3, 255, 256, 257, 1023, 1024, 1025, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 1300, 0, ())
    both(lambda: [{"params": params(*sizes)}], steps=2, max_grad_norm=clip)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("state_dtype", (None, "param"))
def test_16_bits_round_as_the_reference(dtype: torch.dtype, state_dtype: str | None) -> None:
    def make() -> list[dict[str, Any]]:
        return [{"params": params(5, 1500, dtype=dtype)}]

    runs = [train(backend, make, state_dtype=state_dtype, eps=1e-4) for backend in ("triton", "reference")]
    assert counts(runs[0]) == counts(runs[1])
    for a, b in zip(all_params(runs[0]), all_params(runs[1]), strict=True):
        # the last bit may go the other way where fp32 is a tie but for its own last bit
        apart = (a.view(torch.int16).int() - b.view(torch.int16).int()).abs()
        assert apart.max() <= 1 and (apart > 0).float().mean() < 0.01


@pytest.mark.parametrize("which", ("param", "grad", "exp_avg", "exp_avg_sq", "nothing"))
def test_any_address_may_be_off_16_bytes(which: str) -> None:
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

    both(make, before=before)


@pytest.mark.parametrize("amsgrad", (False, True))
@pytest.mark.parametrize("maximize", (False, True))
def test_mixed_dtypes_share_one_norm(amsgrad: bool, maximize: bool) -> None:
    def make() -> list[dict[str, Any]]:
        return [
            {"params": [*params(700), *params(1100, dtype=torch.float16)], "maximize": maximize},
            {"params": params(30, seed=2), "amsgrad": amsgrad, "betas": (0.5, 0.7), "lr": 0.03},
        ]

    runs = [train(backend, make) for backend in ("triton", "reference")]
    assert counts(runs[0]) == counts(runs[1])
    for key in ("lr", "grad_norm", "coef"):
        a, b = (run.metrics()[key].double() for run in runs)
        assert torch.allclose(a, b, rtol=TRITON_STEP, atol=0)
    for a, b in zip(all_params(runs[0]), all_params(runs[1]), strict=True):
        assert relative_difference([a], [b]) <= (TRITON_STEP if a.dtype == torch.float32 else 1e-3)


def test_tensors_without_gradient_are_left_alone() -> None:
    def before(optimizer: Any, k: int) -> None:
        for i, p in enumerate(all_params(optimizer)):
            if (i + k) % 3 == 0:
                p.grad = None

    both(lambda: [{"params": params(5, 9)}, {"params": params(4, seed=2)}], steps=4, before=before)


def test_more_empty_tensors_than_the_last_program_has_lanes() -> None:
    ours = both(lambda: [{"params": params(*[0] * 600, 3)}], steps=2, max_grad_norm=None)
    assert {s["step"].item() for s in ours.state.values()} == {2.0}


# --- groups


def test_more_groups_than_the_last_program_has_lanes() -> None:
    both(lambda: [{"params": params(2)}, *({"params": []} for _ in range(512))], steps=1, max_grad_norm=None)


def test_no_gradient_at_all_counts_a_joint_step_and_no_independent_one() -> None:
    def before(optimizer: Any, k: int) -> None:
        for p in all_params(optimizer):
            p.grad = None if k else p.grad

    def make() -> list[dict[str, Any]]:
        return [{"params": params(4)}, {"params": params(3, seed=2), "lr": 0.1}]

    assert both(make, before=before).metrics()["step"].tolist() == [3, 3]
    assert both(make, before=before, groups="independent").metrics()["step"].tolist() == [1, 1]


def test_independent_groups_have_their_own_norm_and_limit() -> None:
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

    ours = both(make, before=before, groups="independent")
    assert ours.metrics()["step"].tolist() == [3, 2, 3, 0]


@pytest.mark.parametrize("scale", (None, 2.0**16))
def test_skips(scale: float | None) -> None:
    def before(optimizer: Any, k: int) -> None:
        if scale is not None:
            for p in all_params(optimizer):
                p.grad *= scale
            optimizer.grad_scale = torch.tensor(scale)
            optimizer.found_inf = torch.tensor([0.0, math.nan, 0.0, 2.0][k])
        elif k in (1, 3):
            all_params(optimizer)[0].grad[0] = math.nan

    ours = both(lambda: [{"params": params(4, 3)}], steps=4, before=before)
    assert ours.metrics()["skipped"] == 2


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_a_rate_that_is_a_tensor(dtype: torch.dtype) -> None:
    rate = torch.tensor(0.5, dtype=dtype)

    def before(optimizer: Any, k: int) -> None:
        # in place, as torch's capturable schedulers do
        rate.fill_(0.5 / (k + 1))

    both(lambda: [{"params": params(4)}], before=before, schedule=None, lr=rate)


# --- nothing is stale


def test_every_change_of_a_hyperparameter_counts_at_the_next_step() -> None:
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

    both(lambda: [{"params": params(6)}], before=before, steps=10)


def test_tensors_that_move_are_followed() -> None:
    def before(optimizer: Any, k: int) -> None:
        for p in all_params(optimizer):
            p.data = p.data.clone()
            if k == 1:
                optimizer.state[p]["exp_avg"] = optimizer.state[p]["exp_avg"].clone()

    both(lambda: [{"params": params(6, (3, 4))}], before=before)


def test_a_transposed_parameter_is_updated_in_place() -> None:
    def make() -> list[dict[str, Any]]:
        (p,) = params((6, 4))
        return [{"params": [nn.Parameter(p.detach().t())]}]

    both(make)


def test_fp64_runs_through_the_reference() -> None:
    def make() -> list[dict[str, Any]]:
        return [{"params": [*params(6, dtype=torch.float64), *params(5)]}]

    ours, theirs = (train(backend, make) for backend in ("triton", "reference"))
    assert all(map(torch.equal, all_params(ours), all_params(theirs)))
    # what the step used is kept in fp32 here
    assert difference(ours, theirs) <= 2**-24


# --- launches and uploads


def count_calls(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[Any]:
    calls: list[Any] = []
    original = getattr(owner, name)

    def counted(*args: Any) -> Any:
        calls.append(args)
        return original(*args)

    monkeypatch.setattr(owner, name, counted)
    return calls


@pytest.mark.parametrize("clip", (None, 1.0))
@pytest.mark.parametrize("tensors", (1, 40))
def test_one_launch_without_clipping_and_two_with(
    clip: float | None, tensors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = count_calls(monkeypatch, gpu.Launcher, "_launch")
    train("triton", lambda: [{"params": params(*[2] * tensors)}, {"params": []}], steps=1, max_grad_norm=clip)
    assert len(calls) == (1 if clip is None else 2)


def test_one_launch_per_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count_calls(monkeypatch, gpu.Launcher, "_launch")
    train("triton", lambda: [{"params": [*params(2), *params(3, dtype=torch.bfloat16)]}], steps=1)
    assert len(calls) == 4


def test_what_stays_is_not_uploaded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = train("triton", lambda: [{"params": params(4, 5)}], steps=2)
    calls = count_calls(monkeypatch, staging.Table, "_upload")
    for _ in range(2):
        optimizer.step()
    assert not calls
    for p in all_params(optimizer):
        p.grad = p.grad.clone()
    optimizer.step()
    # the gradients' addresses alone
    assert len(calls) == 1
    optimizer.param_groups[0]["weight_decay"] = 0.3
    optimizer.step()
    assert len(calls) == 2


def test_no_argument_but_a_type_is_compiled_in() -> None:
    from fusedlr import _triton

    for kernel in (_triton.norm_kernel, _triton.step_kernel):
        annotations = kernel.fn.__annotations__
        runtime = [name for name in kernel.arg_names if name not in annotations]
        assert set(annotations) <= {"PARAMS", "MOMENTS", "AMSGRAD"}
        for option in ("do_not_specialize", "do_not_specialize_on_alignment"):
            assert set(kernel.kwargs[option]) == set(runtime)


def test_what_a_step_used_is_in_fp32() -> None:
    optimizer = train("triton", lambda: [{"params": params(4)}])
    assert {optimizer.metrics()[key].dtype for key in ("lr", "grad_norm", "coef")} == {torch.float32}


def test_a_launch_that_fails_leaves_no_tickets_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = train("triton", lambda: [{"params": [*params(2), *params(3, dtype=torch.bfloat16)]}], steps=1)
    launch, calls = gpu.Launcher._launch, []

    def failing(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 4:
            raise RuntimeError("the device is lost")
        launch(*args)

    monkeypatch.setattr(gpu.Launcher, "_launch", failing)
    with pytest.raises(RuntimeError, match="the device is lost"):
        optimizer.step()
    assert optimizer.metrics()["step"].tolist() == [1]
    optimizer.step()
    assert optimizer.metrics()["step"].tolist() == [2]
    assert {s["step"].item() for s in optimizer.state.values()} == {2.0}


# --- who can run it


def test_the_interpreter_runs_on_the_cpu_alone() -> None:
    assert backends.reasons([torch.device("cpu")])["triton"] is None
    assert "TRITON_INTERPRET is set" in (gpu.why_not([torch.device("cuda")]) or "")
    assert "does not run on meta" in (gpu.why_not([torch.device("meta")]) or "")
    assert "several devices" in (gpu.why_not([torch.device("cpu"), torch.device("meta")]) or "")


# --- mistakes


def rejected() -> bool:
    """Whether a run of the kernels in use leaves the reference."""
    for options in wrong.RUNS:
        ours, theirs = (train(backend, wrong.make, **options) for backend in ("triton", "reference"))
        if counts(ours) != counts(theirs) or not difference(ours, theirs) <= wrong.MARGIN:
            return True
    return False


@pytest.mark.parametrize("edit", wrong.EDITS)
def test_the_suite_rejects_wrong_steps(edit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fusedlr import _triton

    copy = load(_triton, tmp_path, wrong.EDITS[edit])
    monkeypatch.setattr(gpu, "_kernels", lambda: copy)
    assert rejected(), "the suite does not see this mistake"


def test_the_suite_accepts_the_right_step() -> None:
    assert not rejected()


_SUM_ALONE = """

@triton.jit
def sum_alone(ints, norms, groups):
    finish_norms(ints, norms, groups)
"""


def sums_are_right(folder: Path, edit: tuple[str, str] | None = None) -> bool:
    """Whether the norm's last program adds up the slots of every scope, and no others."""
    from fusedlr import _triton

    copy = load(_triton, folder, edit, _SUM_ALONE)
    sizes = (0, 1, 1023, 1024, 1025, 5000)
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    ints = torch.zeros(len(sizes), len(GROUP_INTS), dtype=torch.int64)
    ints[:, GROUP_INTS.index("first_slot")] = torch.tensor([0, *ends[:-1]])
    ints[:, GROUP_INTS.index("last_slot")] = torch.tensor(ends)
    norms = torch.cat([torch.zeros(len(sizes)), torch.rand(ends[-1] + 1)])
    want = [
        norms[len(sizes) :][end - size : end].double().sum().sqrt()
        for size, end in zip(sizes, ends, strict=True)
    ]
    copy.sum_alone[(1,)](ints, norms, len(sizes))
    return torch.allclose(norms[: len(sizes)].double(), torch.stack(want), rtol=1e-6, atol=0)


def test_the_norm_adds_up_every_slot_of_its_scope(tmp_path: Path) -> None:
    assert sums_are_right(tmp_path)


@pytest.mark.parametrize("edit", wrong.SUM_EDITS)
def test_a_wrong_sum_is_seen(edit: str, tmp_path: Path) -> None:
    assert not sums_are_right(tmp_path, wrong.SUM_EDITS[edit])
