"""What parameters may do while they are trained: freeze, move, change their dtype or strides, be replaced."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from kit import (
    PEAK,
    assert_same,
    is_allocated,
    make,
    make_params,
    make_stock,
    prepare_anew,
    scheduled,
    set_grads,
    step,
    steps,
    uploaded_tables,
)
from snapshots import bits, params_of, unchanged
from torch import nn
from torch.utils._pytree import tree_map

import fusedlr
from fusedlr.counts import UpdateCounts


def test_frozen_parameters_cost_nothing():
    a, b, *_ = make_params()
    b.requires_grad_(False)
    four_bit = nn.Parameter(torch.ones(6, dtype=torch.int8), requires_grad=False)
    optimizer = scheduled([a, b, four_bit], max_grad_norm=1.0)
    steps(optimizer, 0, 3)
    before = bits([b, four_bit])
    assert list(optimizer.state) == [a]
    state = optimizer.state_dict()
    assert list(state["state"]) == [0]
    assert state["param_groups"][0]["params"] == [0, 1, 2]
    optimizer.load_state_dict(state)
    steps(optimizer, 3, 4)
    assert bits([b, four_bit]) == before


@pytest.mark.parametrize("steps_before", (0, 1))
def test_a_frozen_parameter_with_a_gradient_is_updated(steps_before):
    """As in torch: master copies are such, and adapters that are switched off between backward and step."""
    ours, stock = make(max_grad_norm=1e9), make_stock()
    for optimizer in (ours, stock):
        steps(optimizer, 0, steps_before)
        set_grads(optimizer, 1)
        for p in params_of(optimizer)[:2]:
            p.requires_grad_(False)
        optimizer.step()
    assert_same(ours, stock)
    norm = torch.stack([p.grad.norm() for p in params_of(ours)]).norm()
    torch.testing.assert_close(ours.metrics()["grad_norm"], norm)


def test_a_frozen_parameter_may_lie_anywhere():
    frozen = nn.Parameter(torch.ones(2, device="meta"), requires_grad=False)
    optimizer = make([nn.Parameter(torch.ones(2)), frozen])
    assert optimizer.backend == make().backend
    frozen.grad = torch.ones(2, device="meta")
    with pytest.raises(RuntimeError, match="meta device"):
        optimizer.step()


def test_whether_a_step_would_make_tensors():
    """A CUDA graph must not be captured then."""
    a, b, *_ = make_params()
    b.requires_grad_(False)
    optimizer = make([a, b])
    groups, state = optimizer.param_groups, optimizer.state
    assert not is_allocated(optimizer)
    set_grads(optimizer, 0)
    optimizer.step()
    assert is_allocated(optimizer)
    # gets its first gradient
    b.grad = torch.ones_like(b)
    assert not is_allocated(optimizer)
    optimizer.step()
    assert is_allocated(optimizer)
    b.grad = None
    assert is_allocated(optimizer)
    for change in (
        lambda: groups[0].update(amsgrad=True),
        lambda: state[a].update(step=torch.tensor(3.0)),
        lambda: setattr(state[a]["step"], "data", torch.tensor(3.0)),
        lambda: state.pop(a),
        lambda: groups[0]["params"].pop(),
        lambda: state[a].update(exp_avg=state[a]["exp_avg"].float()),
        lambda: groups[0]["params"].append(nn.Parameter(torch.ones(2))),
    ):
        change()
        assert not is_allocated(optimizer)
        set_grads(optimizer, 1)
        optimizer.step()
        assert is_allocated(optimizer)


def test_a_step_that_would_make_tensors_is_not_captured(monkeypatch):
    optimizer = make()
    set_grads(optimizer)
    monkeypatch.setattr(optimizer._planner, "is_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="make one step outside the CUDA graph before capturing it"):
        optimizer.step()
    assert not optimizer.state


def test_a_step_that_makes_none_is_captured_though_it_is_prepared_anew(monkeypatch):
    optimizer = make()
    step(optimizer)
    prepare_anew(optimizer)
    monkeypatch.setattr(optimizer._planner, "is_capturing", lambda: True)
    optimizer.step()
    assert optimizer.metrics()["step"].tolist() == [2]


def test_update_counts_are_where_their_parameters_are():
    p, q = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2, device="meta"))
    updates, state = UpdateCounts(), {x: {"step": torch.tensor(3.0)} for x in (p, q)}
    updates.place([p, q], state)
    assert [state[x]["step"].device.type for x in (p, q)] == ["cpu", "meta"]
    assert updates.has_all([p, q], state)
    torch.utils.swap_tensors(p, nn.Parameter(torch.ones(2, device="meta")))
    assert not updates.has_all([p, q], state)
    updates.place([p, q], state)
    assert [state[x]["step"].device.type for x in (p, q)] == ["meta", "meta"]


def test_nothing_to_train_at_all_is_a_step():
    optimizer = scheduled([nn.Parameter(torch.ones(2, dtype=torch.int8), requires_grad=False)])
    optimizer.step()
    assert optimizer.metrics()["step"].tolist() == [1]
    assert optimizer.state_dict()["state"] == {}


def test_a_parameter_may_be_frozen_and_thawed():
    ours, stock = make(), make_stock()
    for optimizer in (ours, stock):
        b = params_of(optimizer)[1]
        steps(optimizer, 0, 2)
        b.requires_grad_(False)
        b.grad = None
        steps(optimizer, 2, 4)
        b.requires_grad_(True)
        steps(optimizer, 4, 6)
        assert optimizer.state[b]["step"] == 4
    assert_same(ours, stock)


def test_a_parameter_may_be_thawed_late():
    ours, stock = make(), make_stock()
    for optimizer in (ours, stock):
        a = params_of(optimizer)[0]
        a.requires_grad_(False)
        steps(optimizer, 0, 2)
        assert a not in optimizer.state
        a.requires_grad_(True)
        steps(optimizer, 2, 4)
    assert_same(ours, stock)


def test_data_may_change_its_dtype_under_the_optimizer():
    """TRL casts adapters to bf16 after the optimizer was built."""
    optimizer = make(make_params((torch.float32,)))
    steps(optimizer, 0, 2)
    for p in params_of(optimizer):
        p.grad = None
        p.data = p.data.to(torch.bfloat16)
    steps(optimizer, 2, 4)
    for p in params_of(optimizer):
        assert p.dtype == torch.bfloat16
        assert optimizer.state[p]["exp_avg"].dtype == torch.float32
        assert optimizer.state[p]["step"] == 4


def test_data_of_another_shape_is_refused():
    p = make_params()[0]
    optimizer = make([p])
    steps(optimizer, 0, 1)
    p.grad = None
    p.data = torch.ones(7, dtype=torch.float64)
    set_grads(optimizer)
    message = r"parameter 0 of group 0, shape \(7,\): its exp_avg has shape \(4, 3\)"
    with unchanged(optimizer), pytest.raises(RuntimeError, match=message):
        optimizer.step()


def test_parameters_may_be_replaced_in_a_group():
    """accelerate and peft exchange parameters in place."""
    ours, stock = make(), make_stock()
    for optimizer in (ours, stock):
        steps(optimizer, 0, 2)
        optimizer.param_groups[0]["params"] = make_params()
        steps(optimizer, 2, 4)
        optimizer.param_groups[0]["params"][0] = nn.Parameter(torch.ones(2, dtype=torch.float64))
        steps(optimizer, 4, 6)
    assert_same(ours, stock)


def transposed(x: torch.Tensor) -> torch.Tensor:
    if x.dim() == 2:
        return x.t().contiguous().t()
    return x.repeat_interleave(2)[::2] if x.dim() else x


@pytest.mark.parametrize("which", ["params", "grads", "both"])
@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
def test_strides_do_not_matter(which, max_grad_norm):
    ours, stock = make(max_grad_norm=max_grad_norm), make_stock()
    if which != "grads":
        for p in params_of(ours):
            p.data = transposed(p.data)
    for k in range(3):
        set_grads(ours, k)
        set_grads(stock, k)
        if which != "params":
            for p in params_of(ours):
                p.grad = transposed(p.grad)
        if max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(params_of(stock), max_grad_norm)
        ours.step()
        stock.step()
    assert_same(ours, stock)
    if which != "grads":
        assert not params_of(ours)[0].is_contiguous()
    # gradients are only read
    assert all(p.grad.abs().sum() > 0 for p in params_of(ours) if p.numel())


class Elsewhere(torch.Tensor):
    """A tensor whose numbers are in another one."""

    def __new__(cls, held: torch.Tensor) -> Any:
        x = torch.Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype)
        x.held = held
        return x

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        unwrap = lambda x: x.held if isinstance(x, Elsewhere) else x  # noqa: E731
        return func(*tree_map(unwrap, args), **tree_map(unwrap, kwargs or {}))


def test_a_gradient_without_memory_of_its_own_is_read_by_torch():
    ours, stock = make(), make_stock()
    for k in range(2):
        set_grads(ours, k)
        set_grads(stock, k)
        for p in params_of(ours):
            p.grad = Elsewhere(p.grad)
        ours.step()
        stock.step()
    assert_same(ours, stock)


def test_an_expanded_gradient_is_read_as_it_is():
    ours, stock = make(), make_stock()
    for optimizer in (ours, stock):
        # one number for all elements, as `sum().backward()` makes it
        sum(p.sum() for p in params_of(optimizer)).backward()
        for p in params_of(optimizer):
            p.grad = torch.full((), 0.5, dtype=p.dtype).expand(p.shape)
        optimizer.step()
    assert_same(ours, stock)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (1, 1)])
@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
def test_small_shapes(shape, max_grad_norm):
    def build() -> list[nn.Parameter]:
        return [nn.Parameter(torch.full(shape, 0.5, dtype=torch.float64))]

    ours, stock = make(build(), max_grad_norm=max_grad_norm), make_stock(build())
    for k in range(3):
        set_grads(ours, k)
        set_grads(stock, k)
        if max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(params_of(stock), max_grad_norm)
        ours.step()
        stock.step()
    assert_same(ours, stock)
    assert ours.state[params_of(ours)[0]]["step"] == 3


def test_a_square_that_overflows_does_not_stop_a_parameter():
    ours, stock = (build(make_params((torch.float32,))) for build in (make, make_stock))
    for optimizer in (ours, stock):
        for p in params_of(optimizer):
            p.grad = torch.full_like(p, 3e19)
        optimizer.step()
    assert all(map(torch.allclose, params_of(ours), params_of(stock)))


def test_a_default_device_is_not_that_of_the_counters():
    params = make_params()
    with torch.device("meta"):
        optimizer = scheduled(params)
        optimizer.step()
        state_dict = optimizer.state_dict()
        optimizer.load_state_dict(state_dict)
    assert optimizer.last_metrics()["step"] == [1]


def test_moments_follow_a_model_made_fp64():
    model = torch.nn.Linear(3, 1)
    optimizer = fusedlr.FusedAdamW(model.parameters(), lr=0.1)
    for dtype in (torch.float32, torch.float64):
        model.to(dtype)
        model(torch.ones(2, 3, dtype=dtype)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert {state["exp_avg"].dtype for state in optimizer.state.values()} == {torch.float64}


def test_a_table_is_uploaded_once_and_old_ones_are_let_go():
    optimizer = make(schedule=fusedlr.constant())
    set_grads(optimizer)
    for i in range(200):
        optimizer.param_groups[0]["schedule"] = fusedlr.table([1.0, 1.0 / (i + 1)])
        optimizer.step()
        optimizer.step()
    assert uploaded_tables(optimizer) <= 64
    assert math.isclose(optimizer.last_metrics()["lr"][0], PEAK / 200)
