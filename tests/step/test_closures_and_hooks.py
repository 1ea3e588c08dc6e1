"""`step` and `zero_grad` as torch's: closures, hooks, the profiler, metrics, torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kit import PEAK, SCHEDULE, assert_same, make, make_stock, scheduled, set_grads, step, steps
from snapshots import bits, changes, params_of, snapshot, unchanged
from torch import nn
from torch.optim import Optimizer
from torch.optim import optimizer as torch_optimizer

import fusedlr


def test_a_step_returns_what_its_closure_returns():
    optimizer = make()
    assert optimizer.step() is None
    loss = torch.tensor(3.0)
    assert optimizer.step(lambda: loss) is loss
    assert optimizer.step(closure=lambda: 5) == 5
    assert optimizer.step(closure=None) is None


def test_a_closure_makes_the_gradients_of_its_own_step():
    ours, stock = make(), make_stock()
    for optimizer in (ours, stock):

        def closure(optimizer: Optimizer = optimizer) -> torch.Tensor:
            assert torch.is_grad_enabled()
            optimizer.zero_grad()
            loss = sum((p**2).sum() for p in params_of(optimizer))
            loss.backward()
            return loss

        losses = []
        with torch.no_grad():
            for _ in range(4):
                losses.append(float(optimizer.step(closure)))
        assert losses == sorted(losses, reverse=True)
    assert_same(ours, stock)


def test_a_closure_that_raises_leaves_everything():
    optimizer = scheduled()
    steps(optimizer, 0, 2)

    def closure() -> None:
        raise RuntimeError("from the closure")

    with unchanged(optimizer), pytest.raises(RuntimeError, match="from the closure"):
        optimizer.step(closure)


def test_a_closure_may_write_the_rate_of_its_own_step():
    optimizer = make()

    def closure() -> None:
        set_grads(optimizer)
        optimizer.param_groups[0]["lr"] = 0.0

    before = [bits(p) for p in params_of(optimizer)]
    optimizer.step(closure)
    assert [bits(p) for p in params_of(optimizer)] == before


def test_hooks_run_in_torchs_order_each_once():
    seen: dict[type, list[Any]] = {}
    for optimizer in (make(), make_stock()):
        names: list[Any] = []
        seen[type(optimizer)] = names

        def note(
            name: str, optimizer: Optimizer = optimizer, names: list[Any] = names
        ) -> Callable[..., None]:
            def hook(self: Any, args: Any, kwargs: Any) -> None:
                assert self is optimizer
                names.append((name, len(args), sorted(kwargs), bits(params_of(self)[0])))

            return hook

        handles = [
            torch_optimizer.register_optimizer_step_pre_hook(note("global pre")),
            torch_optimizer.register_optimizer_step_post_hook(note("global post")),
            optimizer.register_step_pre_hook(note("pre")),
            optimizer.register_step_post_hook(note("post")),
            optimizer.register_step_pre_hook(note("pre 2")),
        ]
        step(optimizer)
        optimizer.step(lambda names=names: names.append(("closure", 0, [])))
        for handle in handles:
            handle.remove()
        optimizer.step()
    ours, stock = seen.values()
    assert [entry[:3] for entry in ours] == [entry[:3] for entry in stock]
    assert [entry[0] for entry in ours[:5]] == ["global pre", "pre", "pre 2", "post", "global post"]
    # pre-hooks see the weights before the step, post-hooks those after it
    assert ours[2][3] != ours[3][3] == ours[4][3]
    order = ["global pre", "pre", "pre 2", "closure", "post", "global post"]
    assert [entry[0] for entry in ours[5:]] == order


def test_a_hook_may_change_the_arguments():
    optimizer = make()
    calls: list[str] = []
    optimizer.register_step_pre_hook(
        lambda self, args, kwargs: ((self, lambda: calls.append("mine") or 7.0), kwargs)
    )
    assert optimizer.step(lambda: calls.append("the caller's")) == 7.0
    assert optimizer.step() == 7.0
    assert calls == ["mine", "mine"]


def test_a_hook_may_move_the_closure_into_keywords():
    optimizer = make()
    calls: list[str] = []
    optimizer.register_step_pre_hook(
        lambda self, args, kwargs: (args[:1], {"closure": lambda: calls.append("mine")})
    )
    optimizer.step()
    assert calls == ["mine"]


def test_a_hook_that_returns_something_else_is_refused():
    optimizer = make()
    set_grads(optimizer)
    optimizer.register_step_pre_hook(lambda self, args, kwargs: 5)
    with unchanged(optimizer), pytest.raises(RuntimeError, match=r"must return None or .*, got 5|but got 5"):
        optimizer.step()


def test_a_hook_may_change_gradients_and_rates():
    ours, stock = make(), make_stock()
    for optimizer in (ours, stock):

        def hook(self: Optimizer, args: Any, kwargs: Any) -> None:
            for p in params_of(self):
                p.grad.mul_(0.5)
            self.param_groups[0]["lr"] *= 0.5

        optimizer.register_step_pre_hook(hook)
        steps(optimizer, 0, 3)
    assert_same(ours, stock)


def test_the_profiler_finds_the_step():
    optimizer = make()
    set_grads(optimizer)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step()
        optimizer.step()
    (event,) = [event for event in profile.key_averages() if event.key == "Optimizer.step#FusedAdamW.step"]
    assert event.count == 2


def test_a_step_without_any_gradient_is_counted_and_changes_nothing():
    optimizer = scheduled(max_grad_norm=1.0)
    before = snapshot(optimizer, lr=False)
    optimizer.step()
    assert changes(before, snapshot(optimizer, lr=False)) == ["k"]
    assert optimizer.metrics()["grad_norm"] == 0
    assert optimizer.metrics()["coef"] == 1


def test_metrics_are_copies():
    optimizer = scheduled(max_grad_norm=1.0)
    steps(optimizer, 0, 1)
    before = snapshot(optimizer)
    kept = optimizer.metrics()
    plain = optimizer.last_metrics()
    told = {"scopes": (None,), "nonfinite_tensor": None, "nonfinite_step": None}
    assert plain == {**{key: value.tolist() for key, value in kept.items()}, **told}
    for value in kept.values():
        value.add_(1)
    plain["lr"].append(1.0)
    assert not changes(before, snapshot(optimizer))
    now = {key: value.tolist() for key, value in optimizer.metrics().items()}
    assert optimizer.last_metrics() == {**now, **told}


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_is_torchs(set_to_none):
    for optimizer in (make(), make_stock()):
        a, b, *_ = params_of(optimizer)
        a.grad = torch.ones_like(a)
        kept = a.grad
        optimizer.zero_grad(set_to_none=set_to_none)
        assert b.grad is None
        assert a.grad is (None if set_to_none else kept)
        assert kept.sum() == (12 if set_to_none else 0)
        assert not kept.requires_grad


def test_zero_grad_sets_to_none_by_default():
    optimizer = make()
    set_grads(optimizer)
    optimizer.zero_grad()
    assert all(p.grad is None for p in params_of(optimizer))


def test_zero_grad_detaches_a_gradient_with_a_history():
    for optimizer in (make(), make_stock()):
        p = params_of(optimizer)[0]
        (p**3).sum().backward(create_graph=True)
        assert p.grad.grad_fn is not None
        optimizer.zero_grad(set_to_none=False)
        assert p.grad.grad_fn is None
        assert not p.grad.requires_grad
        assert p.grad.sum() == 0


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_takes_sparse_gradients(set_to_none):
    optimizer = make()
    p = params_of(optimizer)[0]
    p.grad = torch.ones_like(p).to_sparse()
    params_of(optimizer)[1].grad = torch.ones(5, dtype=torch.float64)
    optimizer.zero_grad(set_to_none=set_to_none)
    assert p.grad is None if set_to_none else p.grad.to_dense().sum() == 0


def test_a_whole_training_loop_compiles():
    """A graph break at the step, and the same numbers."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    twin = nn.Linear(3, 2)
    twin.load_state_dict(model.state_dict())
    ours = fusedlr.FusedAdamW(model.parameters(), lr=PEAK, schedule=SCHEDULE, max_grad_norm=1.0)
    plain = fusedlr.FusedAdamW(twin.parameters(), lr=PEAK, schedule=SCHEDULE, max_grad_norm=1.0)
    data = torch.randn(6, 4, 3)

    def body(model: nn.Module, optimizer: Optimizer, x: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(x).square().sum()
        loss.backward()
        optimizer.step()
        optimizer.scheduler.step()
        return loss.detach()

    compiled = torch.compile(body, backend="aot_eager")
    for x in data:
        torch.testing.assert_close(compiled(model, ours, x), body(twin, plain, x))
    assert ours.metrics()["step"].tolist() == [6]
    torch.testing.assert_close(model.weight, twin.weight)
    torch._dynamo.reset()
