"""A norm that is handed out is true, and the next step takes it over only while it is."""

from __future__ import annotations

import math
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from kit import needs_watch
from torch import Tensor

import fusedlr

SETTINGS: list[dict[str, Any]] = [
    {},
    {"max_grad_norm": 0.5},
    {"nonfinite": "skip"},
    {"groups": "independent"},
    {"groups": "independent", "max_grad_norm": 0.5},
]


def make(count: int = 2, device: str = "cpu", **options: Any) -> Any:
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(3 + i, 2, device=device)) for i in range(count)]
    groups = [{"params": [p]} for p in params]
    schedule = fusedlr.linear(warmup_steps=2, total_steps=20)
    return fusedlr.FusedAdamW(groups, lr=0.1, **{"schedule": schedule, **options})


def params_of(optimizer: Any) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def set_gradients(optimizer: Any, seed: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in params_of(optimizer):
        p.grad = (torch.randn(p.shape, generator=generator) * scale).to(p.device)


def expected(optimizer: Any) -> Tensor:
    norms = torch.stack([p.grad.double().norm() for p in params_of(optimizer)])
    return norms if optimizer.groups == "independent" else norms.norm()


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_it_is_the_norm_of_what_is_there_and_changes_no_step(device, backend, options):
    asked, plain = (make(device=device, backend=backend, **options) for _ in range(2))
    for step in range(5):
        for optimizer in (asked, plain):
            set_gradients(optimizer, step)
        torch.testing.assert_close(asked.grad_norm().double(), expected(asked), rtol=1e-6, atol=0)
        # one that is told twice is told anew
        set_gradients(asked, step + 100)
        torch.testing.assert_close(asked.grad_norm().double(), expected(asked), rtol=1e-6, atol=0)
        set_gradients(asked, step)
        asked.grad_norm()
        for optimizer in (asked, plain):
            optimizer.step()
        for p, q in zip(params_of(asked), params_of(plain), strict=True):
            assert torch.equal(p, q)
        for name, value in asked.metrics().items():
            torch.testing.assert_close(value, plain.metrics()[name], rtol=0, atol=0, equal_nan=True)


def test_every_scope_is_measured_whether_its_step_needs_a_norm_or_not():
    dtypes = (torch.float32, torch.float32, torch.float64, torch.float64)
    of_group = [[torch.nn.Parameter(torch.ones(3, dtype=dtype)) for dtype in dtypes] for _ in range(2)]
    groups = [{"params": of_group[0], "max_grad_norm": 1.0}, {"params": of_group[1]}]
    optimizer = fusedlr.FusedAdamW(groups, lr=0.1, groups="independent")
    for i, p in enumerate(params_of(optimizer)):
        p.grad = None if i % 4 == 0 else torch.full_like(p, i)
    norms = [math.sqrt(3 * sum(i * i for i in of)) for of in ((1, 2, 3), (5, 6, 7))]
    assert optimizer.grad_norm().tolist() == pytest.approx(norms, rel=1e-6)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("options", SETTINGS[:2], ids=str)
def test_to_ask_is_no_step_however_many_threads_make_one(backend, device, options, threads):
    """So many elements that several threads share them."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        optimizer = make(device=device, backend=backend, **options)
        p = torch.nn.Parameter(torch.ones(150_000, device=device))
        optimizer.add_param_group({"params": [p]})
        for step in range(2):
            set_gradients(optimizer, step)
            optimizer.grad_norm()
            # state is made by the first to ask, and counts are left alone
            assert optimizer.metrics()["step"].tolist() == [step] * 3
            assert {entry["step"].item() for entry in optimizer.state.values()} == {step}
            optimizer.step()
    finally:
        torch.set_num_threads(before)


def test_the_number_that_was_handed_out_stays():
    optimizer = make(max_grad_norm=1.0)
    set_gradients(optimizer, 0)
    norm = optimizer.grad_norm()
    before = norm.item()
    set_gradients(optimizer, 1, scale=10)
    optimizer.step()
    optimizer.grad_norm()
    assert norm.item() == before != optimizer.metrics()["grad_norm"].item()


@needs_watch
def test_the_step_takes_it_over(monkeypatch):
    optimizer = make(3, max_grad_norm=1.0)
    set_gradients(optimizer, 0)
    params_of(optimizer)[2].grad = None
    norm = optimizer.grad_norm()
    # an option that the norm does not depend on
    optimizer.param_groups[0]["weight_decay"] = 0.5
    # a write that torch does not count, which a norm computed in the step would see
    optimizer.param_groups[0]["params"][0].grad.data.mul_(100)
    optimizer.step()
    assert optimizer.metrics()["grad_norm"] == norm
    # once
    optimizer.step()
    assert optimizer.metrics()["grad_norm"] > 10 * norm


@needs_watch
def test_a_norm_that_cannot_be_remembered_leaves_none_to_take_over():
    optimizer = make(max_grad_norm=1.0)
    set_gradients(optimizer, 0)
    p = params_of(optimizer)[0]
    first, norm = p.grad, optimizer.grad_norm()
    with torch.inference_mode():
        unversioned = first * 100
    p.grad = unversioned
    assert optimizer.grad_norm() > 10 * norm
    p.grad = first
    optimizer.step()
    assert optimizer.metrics()["grad_norm"] == norm


class InterruptedGradient(Tensor):
    """A gradient during whose next look-up of its version the user interrupts."""

    interrupted = False

    @property
    def _version(self) -> int:  # type: ignore[override]
        if InterruptedGradient.interrupted:
            InterruptedGradient.interrupted = False
            raise KeyboardInterrupt
        return 0


@needs_watch
def test_an_interrupt_while_a_norm_is_remembered_or_taken_over_is_passed_on():
    optimizer = make(max_grad_norm=1.0)
    set_gradients(optimizer, 0)
    p = params_of(optimizer)[0]
    p.grad = p.grad.as_subclass(InterruptedGradient)
    InterruptedGradient.interrupted = True
    with pytest.raises(KeyboardInterrupt):
        optimizer.grad_norm()
    optimizer.grad_norm()
    InterruptedGradient.interrupted = True
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()


def write_in_place(p: Tensor) -> None:
    p.grad.mul_(3)


def replace(p: Tensor) -> None:
    p.grad = p.grad * 3


def other_memory(p: Tensor) -> None:
    p.grad.data = p.grad.detach() * 3


def gone(p: Tensor) -> None:
    p.grad = None


@pytest.mark.parametrize("change", [write_in_place, replace, other_memory, gone])
def test_a_gradient_that_changes_in_between_is_measured_again(backend, device, change):
    asked, plain = (make(backend=backend, device=device, max_grad_norm=0.5) for _ in range(2))
    for step in range(3):
        for optimizer in (asked, plain):
            set_gradients(optimizer, step)
        asked.grad_norm()
        for optimizer in (asked, plain):
            change(params_of(optimizer)[1])
            optimizer.step()
        for p, q in zip(params_of(asked), params_of(plain), strict=True):
            assert torch.equal(p, q)
        assert torch.equal(asked.metrics()["grad_norm"], plain.metrics()["grad_norm"])


def test_another_tensor_at_the_same_address_is_another_gradient():
    """As an allocator does it: the block that was freed last goes to the next who asks for as much."""
    asked, plain = (make(count=1, max_grad_norm=0.5) for _ in range(2))
    memory = np.full((3, 2), 1.0, dtype=np.float32)
    for optimizer in (asked, plain):
        (p,) = params_of(optimizer)
        memory[:] = 1.0
        p.grad = torch.from_numpy(memory)
        if optimizer is asked:
            optimizer.grad_norm()
        before = p.grad.data_ptr(), p.grad._version
        p.grad = None
        memory[:] = 5.0
        p.grad = torch.from_numpy(memory)
        assert before == (p.grad.data_ptr(), p.grad._version)
        optimizer.step()
    assert torch.equal(asked.metrics()["grad_norm"], plain.metrics()["grad_norm"])


def assign_limit(optimizer: Any) -> None:
    optimizer.max_grad_norm = 0.1


def assign_rate(optimizer: Any) -> None:
    optimizer.param_groups[0]["weight_decay"] = 0.5


def add_group(optimizer: Any) -> None:
    p = torch.nn.Parameter(torch.ones(2))
    p.grad = torch.full((2,), 5.0)
    optimizer.add_param_group({"params": [p]})


def load(optimizer: Any) -> None:
    optimizer.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("change", [assign_limit, assign_rate, add_group, load])
@pytest.mark.parametrize("options", SETTINGS[:2], ids=str)
def test_an_optimizer_that_changes_in_between_steps_as_if_nobody_had_asked(options, change):
    asked, plain = (make(**options) for _ in range(2))
    for step in range(3):
        for optimizer in (asked, plain):
            set_gradients(optimizer, step)
        asked.grad_norm()
        for optimizer in (asked, plain):
            if step == 1:
                change(optimizer)
            optimizer.step()
        for p, q in zip(params_of(asked), params_of(plain), strict=True):
            assert torch.equal(p, q)


def test_a_skip_is_decided_by_it_as_by_the_steps_own():
    optimizer = make(max_grad_norm=1.0)
    set_gradients(optimizer, 0)
    params_of(optimizer)[0].grad[0, 0] = torch.inf
    before = [p.detach().clone() for p in params_of(optimizer)]
    assert optimizer.grad_norm() == torch.inf
    optimizer.step()
    assert optimizer.last_metrics()["skipped"] == 1
    assert all(map(torch.equal, params_of(optimizer), before))


@pytest.mark.parametrize("scale", [8.0, torch.tensor(8.0), torch.tensor([8.0])], ids=repr)
def test_scaled_gradients_are_measured_as_unscaled(scale):
    optimizer = make(max_grad_norm=1.0)
    set_gradients(optimizer, 0)
    norm = expected(optimizer)
    set_gradients(optimizer, 0, scale=8.0)
    torch.testing.assert_close(optimizer.grad_norm(scale).double(), norm, rtol=1e-6, atol=0)


def test_a_norm_of_scaled_gradients_is_not_taken_over():
    optimizer = make(max_grad_norm=1.0)
    set_gradients(optimizer, 0)
    optimizer.grad_norm(8.0)
    optimizer.step()
    torch.testing.assert_close(optimizer.metrics()["grad_norm"].double(), expected(optimizer))


@pytest.mark.parametrize("signal", ["grad_scale", "found_inf"])
def test_a_step_with_one_signal_of_a_scaler_measures_for_itself(signal):
    optimizer = make(max_grad_norm=1.0)
    set_gradients(optimizer, 0, scale=8.0)
    optimizer.grad_norm()
    if signal == "grad_scale":
        optimizer.grad_scale = torch.tensor(8.0)
    else:
        # as torch's `unscale_`, which does not count as a write
        for p in params_of(optimizer):
            p.grad.data.div_(8.0)
        optimizer.found_inf = torch.tensor(0.0)
    optimizer.step()
    set_gradients(optimizer, 0)
    norm = optimizer.metrics()["grad_norm"].double()
    torch.testing.assert_close(norm, expected(optimizer), rtol=1e-6, atol=0)


@pytest.mark.parametrize("amp_scaling", [True, False])
@pytest.mark.parametrize("unscaled_first", [True, False])
def test_a_scaler_that_unscales_after_the_norm_is_followed(amp_scaling, unscaled_first):
    """torch's `unscale_` writes to gradients and does not count it as a write."""

    def run(ask: bool) -> Any:
        optimizer = make(max_grad_norm=0.5, amp_scaling=amp_scaling)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for step in range(3):
            loss = sum((p * (step + 1 + i)).sum() for i, p in enumerate(params_of(optimizer)))
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            if ask:
                optimizer.grad_norm()
            if unscaled_first:
                scaler.unscale_(optimizer)
                if ask:
                    torch.testing.assert_close(
                        optimizer.grad_norm().double(), expected(optimizer), rtol=1e-6, atol=0
                    )
            scaler.step(optimizer)
            scaler.update()
        return optimizer

    for p, q in zip(params_of(run(True)), params_of(run(False)), strict=True):
        assert torch.equal(p, q)


def test_gradients_are_still_freed_by_zero_grad():
    optimizer = make(max_grad_norm=1.0)
    set_gradients(optimizer, 0)
    optimizer.grad_norm()
    held = weakref.ref(params_of(optimizer)[0].grad)
    # not the optimizer's own, which could tell it
    for p in params_of(optimizer):
        p.grad = None
    assert held() is None


def test_no_parameter_counts_as_written():
    optimizer = make(max_grad_norm=1.0)
    # elements in another order than the gradient's, which are stepped on copies
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.randn(4, 3).t())]})
    set_gradients(optimizer, 0)
    before = [(p._version, p.detach().clone()) for p in params_of(optimizer)]
    optimizer.grad_norm()
    assert all(
        p._version == v and torch.equal(p, x) for p, (v, x) in zip(params_of(optimizer), before, strict=True)
    )
    assert optimizer.metrics()["step"].tolist() == [0, 0, 0]


def test_a_gradient_whose_writes_are_not_counted_is_measured_by_the_step():
    asked, plain = make(max_grad_norm=1.0), make(max_grad_norm=1.0)
    for step in range(2):
        for optimizer in (asked, plain):
            with torch.inference_mode():
                set_gradients(optimizer, step)
        asked.grad_norm()
        for optimizer in (asked, plain):
            with torch.inference_mode():
                params_of(optimizer)[0].grad.mul_(5)
            optimizer.step()
        assert all(map(torch.equal, params_of(asked), params_of(plain)))


def test_a_rate_of_zero_given_by_another_scheduler_still_counts_as_given():
    optimizer = make()
    before = [p.detach().clone() for p in params_of(optimizer)]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    set_gradients(optimizer, 0)
    optimizer.grad_norm()
    # what a step on its own schedule would change
    optimizer.scheduler.load_state_dict({"last_epoch": 5})
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.grad_norm()
    with pytest.warns(UserWarning, match="lr=0 was assigned to group 0"):
        optimizer.step()
    assert all(map(torch.equal, params_of(optimizer), before))


def test_it_is_measured_where_a_step_would_only_allocate():
    optimizer = make()
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    set_gradients(optimizer, 0, scale=0.0)
    assert optimizer.grad_norm() == 0


@needs_watch
def test_to_ask_again_takes_no_options_anew(monkeypatch):
    optimizer = make(max_grad_norm=1.0)
    set_gradients(optimizer, 0)
    optimizer.step()

    def refuse(*options):
        raise AssertionError("options were taken anew")

    monkeypatch.setattr(optimizer._planner.plan.stepper, "assign", refuse)
    torch.testing.assert_close(optimizer.grad_norm().double(), expected(optimizer))


def test_without_gradients_it_is_zero():
    optimizer = make()
    assert optimizer.grad_norm() == 0
    optimizer.step()


@pytest.mark.parametrize("options", SETTINGS[:2], ids=str)
def test_a_gradient_that_cannot_be_used_is_named(options):
    optimizer = make(**options)
    set_gradients(optimizer, 0)
    params_of(optimizer)[1].grad = torch.ones(params_of(optimizer)[1].shape).to_sparse()
    with pytest.raises(RuntimeError, match=r"parameter 0 of group 1.*gradients must be dense"):
        optimizer.grad_norm()
    set_gradients(optimizer, 0)
    assert optimizer.grad_norm() > 0


@pytest.mark.parametrize("stepped", [True, False])
def test_a_shard_has_no_norm_even_where_the_step_needs_none(stepped):
    optimizer = make()
    set_gradients(optimizer, 0)
    params_of(optimizer)[1]._fsdp_flattened = True
    if stepped:
        optimizer.step()
    with pytest.raises(RuntimeError, match=r"parameter 0 of group 1.*clip with FSDP's clip_grad_norm_"):
        optimizer.grad_norm()
    optimizer.step()


def test_a_scale_of_many_elements_is_refused():
    with pytest.raises(ValueError, match=r"grad_scale has shape \(2,\), expected one element"):
        make().grad_norm(torch.ones(2))


def test_it_is_not_captured(monkeypatch):
    optimizer = make()
    monkeypatch.setattr(optimizer._planner, "is_capturing", lambda: True)
    with pytest.raises(RuntimeError, match=r"grad_norm\(\) cannot be captured in a CUDA graph"):
        optimizer.grad_norm()


@needs_watch
def test_a_captured_step_measures_for_itself(monkeypatch):
    optimizer = make(max_grad_norm=1.0)
    set_gradients(optimizer, 0)
    optimizer.step()
    norm = optimizer.grad_norm()
    # a step that took it over would not see this
    params_of(optimizer)[0].grad.data.mul_(100)
    monkeypatch.setattr(optimizer._planner, "is_capturing", lambda: True)
    optimizer.step()
    assert optimizer.metrics()["grad_norm"] > 10 * norm
