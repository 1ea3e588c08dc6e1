"""A step like the last one is made in one call, and any change between two steps is seen."""

from __future__ import annotations

import copy
import gc
import math
import operator
import weakref
from collections import UserDict, defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from kit import (
    make_params,
    needs_kernel,
    needs_watch,
    prepare_anew,
    rates_given,
    set_grads,
    spoil,
    step,
    step_as_prepared,
    stepper_of,
    steps,
)
from snapshots import params_of
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils._python_dispatch import TorchDispatchMode

import fusedlr
from fusedlr.backends import compiled

SHAPES = ((3, 5), (7,), (0,), (2, 2, 2), (1,))
SCHEDULE = fusedlr.cosine(warmup_steps=3, total_steps=20)
MOMENTS = ("exp_avg", "exp_avg_sq")
WATCHED = compiled.host is not None
Optimizer = fusedlr.FusedAdamW


def make(backend: str, **options: Any) -> Optimizer:
    """`auto` is the C++ kernel, or the reference where that is not built."""
    params = make_params((torch.float32,), SHAPES)
    groups = [{"params": params[:3]}, {"params": params[3:], "weight_decay": 0.0}]
    settings = {"lr": 0.1, "schedule": SCHEDULE, "max_grad_norm": 1.0, **options}
    return Optimizer(groups, backend=backend, **settings)


def made(**options: Any) -> Optimizer:
    """An optimizer after three steps, the last of which were like the one before."""
    optimizer = make("auto", **options)
    steps(optimizer, 0, 3)
    return optimizer


def entry(optimizer: Optimizer, i: int = 0) -> dict[str, Any]:
    return optimizer.state[params_of(optimizer)[i]]


def change_data(
    p: torch.nn.Parameter, change: Callable[[Tensor], Tensor], grad: Callable[[Tensor], Tensor] = lambda x: x
) -> None:
    """Change what is in a parameter and in its gradient; torch refuses a gradient that does not fit."""
    old, p.grad = p.grad, None
    p.data = change(p.data)
    p.grad = grad(old)


def another() -> torch.nn.Parameter:
    p = torch.nn.Parameter(torch.ones(4))
    p.grad = torch.ones(4)
    return p


def like(p: torch.nn.Parameter) -> torch.nn.Parameter:
    other = torch.nn.Parameter(p.data)
    other.grad = p.grad
    return other


def replace_first(optimizer: Optimizer, p: torch.nn.Parameter) -> None:
    optimizer.param_groups[0]["params"][0] = p


def negative_view(x: Tensor) -> Tensor:
    return torch.complex(torch.zeros_like(x), x).conj().imag


def drop_gradients(group: dict[str, Any]) -> None:
    for p in group["params"]:
        p.grad = None


def one_step_of(optimizer: Optimizer) -> Optimizer:
    step(optimizer, 5)
    return optimizer


def look_without_the_last_group(optimizer: Optimizer) -> None:
    group = optimizer.param_groups.pop()
    optimizer.scheduler.step()
    optimizer.param_groups.append(group)
    optimizer.scheduler.step()


# what changes between two steps
CHANGES: dict[str, Callable[[Optimizer], Any]] = {
    "parameter moved": lambda o: change_data(params_of(o)[0], torch.clone),
    "parameter transposed in place": lambda o: change_data(params_of(o)[3], lambda x: x.transpose(0, 2)),
    "parameter of another dtype": lambda o: change_data(params_of(o)[0], Tensor.double, Tensor.double),
    "parameter negative view": lambda o: change_data(params_of(o)[0], lambda x: torch._neg_view(x.clone())),
    "parameter frozen": lambda o: params_of(o)[0].requires_grad_(False),
    "parameter added to the list": lambda o: o.param_groups[0]["params"].append(another()),
    "parameter removed from the list": lambda o: operator.delitem(o.param_groups[0]["params"], 0),
    "parameter replaced by one in its memory": lambda o: replace_first(o, like(params_of(o)[0])),
    "parameters in a tuple": lambda o: o.param_groups[0].update(params=tuple(o.param_groups[0]["params"])),
    "parameter in two groups": lambda o: o.param_groups[1]["params"].append(params_of(o)[0]),
    "gradient missing": lambda o: setattr(params_of(o)[1], "grad", None),
    "gradient transposed": lambda o: setattr(
        params_of(o)[0], "grad", torch.linspace(-1, 1, 15).view(5, 3).t()
    ),
    "gradient expanded": lambda o: setattr(params_of(o)[0], "grad", torch.full((1, 1), 0.5).expand(3, 5)),
    "gradients negative views": lambda o: [setattr(p, "grad", negative_view(p.grad)) for p in params_of(o)],
    "gradient not finite": lambda o: spoil(o, math.nan),
    "gradients of a group missing": lambda o: drop_gradients(o.param_groups[1]),
    "moment replaced": lambda o: entry(o).update(exp_avg=torch.full((3, 5), 0.25)),
    "moment moved": lambda o: setattr(entry(o)["exp_avg_sq"], "data", torch.full((3, 5), 0.25)),
    "moment in 16 bits": lambda o: entry(o).update(exp_avg_sq=entry(o)["exp_avg_sq"].half()),
    # in the memory that it had
    "moment in whole numbers": lambda o: entry(o).update(
        exp_avg=entry(o)["exp_avg"].view(torch.int32).fill_(1)
    ),
    "moment in half of its memory": lambda o: entry(o, 1).update(
        exp_avg=entry(o, 1)["exp_avg"].view(torch.half)[:7].fill_(0.25)
    ),
    "moments in fp64": lambda o: entry(o).update({key: entry(o)[key].double() for key in MOMENTS}),
    "step replaced": lambda o: entry(o).update(step=torch.tensor(7.0)),
    "step replaced by a number": lambda o: entry(o).update(step=7),
    "step of a frozen parameter replaced by a number": lambda o: (
        params_of(o)[0].requires_grad_(False),
        setattr(params_of(o)[0], "grad", None),
        entry(o).update(step=7),
    ),
    "step moved": lambda o: setattr(entry(o)["step"], "data", torch.tensor(3.0)),
    "step swapped": lambda o: torch.utils.swap_tensors(entry(o)["step"], torch.tensor(100.0)),
    "all of another size": lambda o: (
        change_data(params_of(o)[0], lambda x: x[:2], lambda x: x[:2]),
        entry(o).update({key: entry(o)[key][:2] for key in MOMENTS}),
    ),
    "all but one number gone": lambda o: (
        change_data(params_of(o)[1], lambda x: x[0], lambda x: x[0]),
        entry(o, 1).update({key: entry(o, 1)[key][0] for key in MOMENTS}),
    ),
    "state of one deleted": lambda o: operator.delitem(o.state, params_of(o)[1]),
    "state of one under another key": lambda o: operator.setitem(o.state, "other", o.state.popitem()[1]),
    "state cleared": lambda o: o.state.clear(),
    "state loaded": lambda o: o.load_state_dict(one_step_of(make(o.backend)).state_dict()),
    "rate assigned": lambda o: operator.setitem(o.param_groups[0], "lr", 0.03),
    "rate assigned as numpy's": lambda o: operator.setitem(o.param_groups[0], "lr", np.float32(0.03)),
    "rate assigned as numpy's integer": lambda o: operator.setitem(o.param_groups[1], "lr", np.int64(1)),
    "rate updated": lambda o: operator.ior(o.param_groups[1], {"lr": 0.03}),
    "decay assigned": lambda o: operator.setitem(o.param_groups[0], "weight_decay", 0.5),
    "largest moment kept": lambda o: operator.setitem(o.param_groups[0], "amsgrad", True),
    "betas assigned": lambda o: operator.setitem(o.param_groups[0], "betas", (0.5, 0.9)),
    "peak assigned": lambda o: operator.setitem(o.param_groups[0], "initial_lr", 1.0),
    "schedule popped": lambda o: o.param_groups[0].pop("schedule"),
    "schedule assigned": lambda o: operator.setitem(
        o.param_groups[0], "schedule", fusedlr.linear(total_steps=9)
    ),
    "schedule moved": lambda o: o.scheduler.load_state_dict({"last_epoch": 11}),
    "clipping changed": lambda o: setattr(o, "max_grad_norm", 0.01),
    "clipping off": lambda o: setattr(o, "max_grad_norm", None),
    "scaled": lambda o: vars(o).update(grad_scale=torch.tensor(4.0), found_inf=torch.tensor(0.0)),
    "overflown": lambda o: vars(o).update(grad_scale=torch.tensor(4.0), found_inf=torch.tensor(1.0)),
    "group added": lambda o: o.add_param_group({"params": [another()]}),
    "group removed": lambda o: o.param_groups.pop(),
    "group added and removed": lambda o: (
        o.add_param_group({"params": [torch.nn.Parameter(torch.ones(4))]}),
        o.param_groups.pop(),
    ),
    "group away for a look": lambda o: look_without_the_last_group(o),
    "groups in a tuple": lambda o: setattr(o, "param_groups", tuple(o.param_groups)),
    "groups replaced by dicts": lambda o: setattr(o, "param_groups", [dict(g) for g in o.param_groups]),
    "groups replaced after a step without gradients": lambda o: (
        drop_gradients(o.param_groups[1]),
        o.step(),
        setattr(o, "param_groups", [dict(g) for g in o.param_groups]),
    ),
}


def run(backend: str, name: str, *, anew: bool, **options: Any) -> Optimizer:
    optimizer = make(backend, **options)
    for k in range(8):
        set_grads(optimizer, k)
        if k == 4:
            CHANGES[name](optimizer)
        if anew:
            prepare_anew(optimizer)
        optimizer.step()
        for signal in ("grad_scale", "found_inf"):
            optimizer.__dict__.pop(signal, None)
    return optimizer


@pytest.mark.filterwarnings("ignore:.*assigned to group", "ignore:the loaded schedule")
@pytest.mark.parametrize("groups", ("joint", "independent"))
@pytest.mark.parametrize("name", CHANGES)
def test_a_change_between_steps_is_seen(name, groups):
    ours = run("auto", name, anew=False, groups=groups)
    theirs = run("reference", name, anew=True, groups=groups)
    for a, b in zip(params_of(ours), params_of(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        assert (ours.state.get(a) is None) == (theirs.state.get(b) is None)
        for key in ours.state.get(a) or ():
            torch.testing.assert_close(ours.state[a][key], theirs.state[b][key], rtol=1e-5, atol=1e-6)
    for key, value in ours.metrics().items():
        torch.testing.assert_close(value, theirs.metrics()[key], rtol=1e-6, atol=0, equal_nan=True)
    assert [g["lr"] for g in ours.param_groups] == pytest.approx([g["lr"] for g in theirs.param_groups])


@needs_watch
@pytest.mark.parametrize(
    "options", ({}, {"schedule": None}, {"groups": "independent"}, {"max_grad_norm": None})
)
def test_a_step_like_the_last_is_one_call(options):
    optimizer = make("auto", **options)
    for k in range(3):
        set_grads(optimizer, k)
        assert step_as_prepared(optimizer) == (k > 0)
    assert optimizer.metrics()["step"].tolist() == [3, 3]


def test_a_foreign_scheduler_does_not_slow_it_down():
    optimizer, twin = make("auto", schedule=None), make("reference", schedule=None)
    schedulers = [LambdaLR(o, lambda k: 1 / (1 + k)) for o in (optimizer, twin)]
    for k in range(4):
        for o, scheduler in zip((optimizer, twin), schedulers, strict=True):
            set_grads(o, k)
            if k == 3 and o is optimizer:
                assert step_as_prepared(o) == WATCHED
            else:
                o.step()
            scheduler.step()
    for a, b in zip(params_of(optimizer), params_of(twin), strict=True):
        torch.testing.assert_close(a, b)


def test_the_rate_shown_is_the_definition_s():
    optimizer = make("auto")
    for k in range(25):
        step(optimizer, k)
        assert optimizer.param_groups[0]["lr"] == SCHEDULE.lr_at(k, 0.1)
        assert not rates_given(optimizer)


@pytest.mark.parametrize("name", ("eps", "weight_decay", "betas"))
def test_a_hyperparameter_changed_in_place_is_read_again(name):
    value = torch.tensor(0.5)
    given = (value, 0.9) if name == "betas" else value
    optimizer, twin = (make(backend) for backend in ("auto", "reference"))
    for o in (optimizer, twin):
        o.param_groups[0][name] = given
    for k in range(5):
        if k == 3:
            value.fill_(0.25)
        for o in (optimizer, twin):
            if o is twin:
                prepare_anew(o)
            step(o, k)
    for a, b in zip(params_of(optimizer), params_of(twin), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_negative_gradient_that_autograd_leaves_is_seen():
    start = torch.tensor(1.5)
    params = [torch.nn.Parameter(start.clone()) for _ in range(2)]
    optimizers = fusedlr.FusedAdamW(params[:1], lr=0.1, backend="auto"), torch.optim.AdamW(params[1:], lr=0.1)
    for k in range(5):
        for p, o in zip(params, optimizers, strict=True):
            o.zero_grad()
            z = torch.complex(torch.zeros_like(p), p).conj()
            (p.square() if k < 3 else (z * (1 + 2j)).abs()).backward()
            o.step()
    torch.testing.assert_close(*params)


def imaginary(x: Tensor) -> Tensor:
    return torch.complex(torch.zeros_like(x), x).imag


# gradients that look alike, but for the sign in which their numbers are kept
@pytest.mark.parametrize(
    ("shape", "before", "after"),
    (
        ((4,), imaginary, negative_view),
        ((1,), torch.clone, lambda x: negative_view(x[0]).unsqueeze(0)),
    ),
    ids=("every other number", "one number"),
)
def test_a_gradient_kept_in_the_other_sign_is_seen(shape, before, after):
    params = [torch.nn.Parameter(torch.ones(shape)) for _ in range(2)]
    optimizers = [
        fusedlr.FusedAdamW([p], lr=0.1, backend=b) for p, b in zip(params, ("auto", "reference"), strict=True)
    ]
    for view in (before, before, before, after):
        for p, optimizer in zip(params, optimizers, strict=True):
            p.grad = view(torch.linspace(1, 2, p.numel()))
            optimizer.step()
    torch.testing.assert_close(*params)


@needs_watch
def test_a_gradient_that_comes_back_needs_no_other_plan():
    optimizer = made()
    prepare_anew(optimizer)
    step(optimizer, 3, missing=lambda k, i: i == 1)
    set_grads(optimizer, 4)
    assert step_as_prepared(optimizer)


def test_a_cycle_through_a_parameter_is_collected():
    optimizer = made()
    params_of(optimizer)[0].owner = optimizer  # type: ignore[attr-defined]
    optimizer.param_groups[0]["owner"] = optimizer
    held = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert held() is None


@pytest.mark.parametrize("what", ("the parameter", "its gradient"))
def test_memory_that_has_been_freed_is_refused(what):
    optimizer = made()
    p = params_of(optimizer)[0]
    (p if what == "the parameter" else p.grad).untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=f"memory of {what} has been freed"):
        optimizer.step()


@pytest.mark.parametrize("name", ("params", "lr"))
def test_a_group_without_what_a_step_needs_raises(name):
    optimizer = made(schedule=None)
    del optimizer.param_groups[1][name]
    with pytest.raises(KeyError, match=name):
        optimizer.step()


def test_a_rate_that_no_double_can_hold_raises():
    optimizer = made(schedule=None)
    optimizer.param_groups[0]["lr"] = 10**400
    with pytest.raises(ValueError, match="lr="):
        optimizer.step()


def test_state_that_is_no_dict_raises():
    optimizer = made()
    optimizer.state[params_of(optimizer)[0]] = [1]  # type: ignore[assignment]
    with pytest.raises(RuntimeError, match="its state is a list, expected a dict"):
        optimizer.step()


def test_state_whose_entries_another_mapping_makes_is_refused_in_words():
    optimizer = make("auto")
    optimizer.state = defaultdict(UserDict)  # type: ignore[assignment]
    step(optimizer)
    with pytest.raises(RuntimeError, match="its state is a UserDict, expected a dict"):
        step(optimizer)


class InterruptedParameter(torch.nn.Parameter):
    """A parameter during whose next look-up of its gradient the user interrupts."""

    interrupted = False

    @property
    def grad(self) -> Tensor | None:  # type: ignore[override]
        if InterruptedParameter.interrupted:
            InterruptedParameter.interrupted = False
            raise KeyboardInterrupt
        return super().grad

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        Tensor.grad.__set__(self, value)  # type: ignore[attr-defined]


@needs_watch
def test_an_interrupt_while_the_watch_looks_is_passed_on():
    p = InterruptedParameter(torch.ones(3))
    optimizer = Optimizer([p], lr=0.1, backend="auto")
    p.grad = torch.ones(3)
    optimizer.step()
    InterruptedParameter.interrupted = True
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    assert step_as_prepared(optimizer)


@needs_watch
@pytest.mark.parametrize("made_before_it", (True, False))
def test_after_an_interrupt_the_step_on_show_is_the_one_that_was_made(made_before_it, monkeypatch):
    optimizer, twin = made(), made()
    stepper = stepper_of(optimizer)
    whole = stepper.step

    def interrupted(signals: Any) -> Any:
        if made_before_it:
            whole(signals)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(stepper, "step", interrupted)
        optimizer.scheduler.step(), twin.scheduler.step()
        step(optimizer, 3)
    if made_before_it:
        step(twin, 3)
    for name in ("k", "lr"):
        assert [group[name] for group in optimizer.param_groups] == [
            group[name] for group in twin.param_groups
        ]
    step(optimizer, 4), step(twin, 4)
    assert all(map(torch.equal, params_of(optimizer), params_of(twin)))


@pytest.mark.parametrize("watched", (pytest.param(True, marks=needs_watch), False))
@pytest.mark.parametrize("copied", (True, False))
def test_autograd_is_told_of_parameters_that_are_written_alone(watched, copied, monkeypatch):
    optimizer = made(groups="independent")
    params = params_of(optimizer)
    if copied:
        # on copies, in the memory order of the gradient
        for i in (0, 3):
            params[i].data = params[i].data.mT.contiguous().mT
        optimizer.step()
    if not watched:
        monkeypatch.setattr(compiled, "host", None)
        prepare_anew(optimizer)
    params[0].grad = None
    for only, expected in ((None, [False, *[True] * 4]), ([1], [False] * 3 + [True] * 2)):
        before = [p._version for p in params]
        assert step_as_prepared(optimizer, only=only) == watched
        assert [p._version > version for p, version in zip(params, before, strict=True)] == expected


@needs_kernel
@needs_watch
@pytest.mark.parametrize("name", ("grad", *MOMENTS))
def test_a_tensor_that_goes_during_a_step_is_kept_until_its_end(name, monkeypatch):
    """As where another thread lets go of it: the compiled stages have its address."""
    optimizer = made()
    stepper, p = stepper_of(optimizer), params_of(optimizer)[0]
    whole = stepper.step
    held = weakref.ref(p.grad if name == "grad" else entry(optimizer)[name])

    def without_it(signals: Any) -> Any:
        if name == "grad":
            p.grad = None
        else:
            del entry(optimizer)[name]
        assert held() is not None
        return whole(signals)

    monkeypatch.setattr(stepper, "step", without_it)
    assert step_as_prepared(optimizer)
    assert held() is None


def test_without_the_compiled_watch_every_step_is_prepared_anew(monkeypatch):
    optimizer, plain = make("auto"), make("auto")
    steps(optimizer, 0, 3)
    monkeypatch.setattr(compiled, "host", None)
    for k in range(3):
        set_grads(plain, k)
        assert not step_as_prepared(plain)
    assert all(map(torch.equal, params_of(optimizer), params_of(plain)))


class AnotherTensor(Tensor):
    """A tensor that may compute in another way."""


@pytest.mark.parametrize("name", ("grad", *MOMENTS))
def test_a_tensor_of_another_type_is_seen_even_in_the_same_memory(name):
    optimizer = made()
    p = params_of(optimizer)[0]
    if name == "grad":
        p.grad = p.grad.as_subclass(AnotherTensor)
    else:
        entry(optimizer)[name] = entry(optimizer)[name].as_subclass(AnotherTensor)
    assert not step_as_prepared(optimizer)


def test_a_step_without_groups_does_nothing():
    optimizer = made()
    optimizer.param_groups.clear()
    optimizer.step()
    # the joint scope is there, and has the norm of nothing
    assert optimizer.scopes == (None,) and optimizer.grad_norm() == 0
    copy.deepcopy(optimizer).step()


class Nothing(TorchDispatchMode):
    """No operator may be called but the one that compares dtypes."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.promote_types.default:
            return func(*args)
        raise AssertionError(f"{func} was called")


@needs_kernel
def test_no_operator_is_called_and_nothing_allocated():
    optimizer = make("auto")
    set_grads(optimizer, 0)
    optimizer.step()
    with Nothing():
        for _ in range(3):
            optimizer.step()
        # whatever it is that is looked at again, no tensor is made or copied for it
        prepare_anew(optimizer)
        optimizer.step()
    assert optimizer.metrics()["step"].tolist() == [5, 5]


@needs_kernel
@pytest.mark.parametrize(
    ("shape", "strides", "strides_of_gradient"),
    [
        ((2, 3), (1, 2), (1, 2)),
        # nobody steps along a dimension of size 1
        ((1, 5), (5, 1), (1, 1)),
        ((2, 1, 3), (1, 7, 2), (1, 7, 2)),
    ],
)
def test_nothing_is_copied_where_elements_lie_in_one_order(shape, strides, strides_of_gradient):
    p = torch.nn.Parameter(torch.empty_strided(shape, strides).fill_(1))
    p.grad = torch.empty_strided(shape, strides_of_gradient).fill_(1)
    optimizer = Optimizer([p], lr=0.5)
    optimizer.step()
    with Nothing():
        optimizer.step()
    assert not p.isnan().any() and p.unique().numel() == 1 and p.max() < 1


def test_what_lies_between_elements_is_left_alone():
    optimizer, plain = (Optimizer([torch.nn.Parameter(torch.ones(3))], lr=0.5) for _ in range(2))
    for o in (optimizer, plain):
        step(o, 0)
    (p,) = params_of(optimizer)
    between = [torch.full((6,), 7.0) for _ in range(4)]
    for base, x in zip(between, (p, p.grad, *(entry(optimizer)[name] for name in MOMENTS)), strict=True):
        base[::2] = x.detach()
    p.data, p.grad, *moments = (base[::2] for base in between)
    entry(optimizer).update(zip(MOMENTS, moments, strict=True))
    optimizer.step(), plain.step()
    assert torch.equal(p, params_of(plain)[0])
    assert all((base[1::2] == 7).all() for base in between)


@pytest.mark.parametrize("steps_before", (0, 2))
def test_a_stale_backward_raises(steps_before):
    """A step writes in place, and autograd knows."""
    optimizer = make("auto")
    steps(optimizer, 0, steps_before)
    p = params_of(optimizer)[0]
    loss = (p * p).sum()
    set_grads(optimizer, 2)
    assert step_as_prepared(optimizer) == (WATCHED and steps_before > 0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_gradients_are_let_go_of():
    optimizer = made()
    held = weakref.ref(params_of(optimizer)[0].grad)
    optimizer.zero_grad()
    assert held() is None


def test_moments_that_are_offloaded_are_let_go_of():
    optimizer = make("auto")
    steps(optimizer, 0, 2)
    held = weakref.ref(entry(optimizer)["exp_avg"])
    entry(optimizer)["exp_avg"] = entry(optimizer)["exp_avg"].clone()
    assert held() is None
    set_grads(optimizer, 2)
    assert not step_as_prepared(optimizer)


def test_a_copy_goes_its_own_way():
    optimizer = make("auto")
    steps(optimizer, 0, 2)
    twin = copy.deepcopy(optimizer)
    before = [p.detach().clone() for p in params_of(twin)]
    set_grads(optimizer, 2)
    optimizer.step()
    assert all(map(torch.equal, before, params_of(twin)))
