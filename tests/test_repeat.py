"""Steps that repeat the last one in one compiled call: that they do, and that anything else stops them."""

from __future__ import annotations

import copy
import gc
import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR
from torch.utils._python_dispatch import TorchDispatchMode

import fusedlr
from fusedlr import compiled

pytestmark = pytest.mark.skipif(compiled.cpu is None, reason=str(compiled.error))

SHAPES = ((3, 5), (7,), (0,), (2, 2, 2), (1,))
SCHEDULE = fusedlr.cosine(warmup_steps=3, total_steps=20)
Optimizer = fusedlr.FusedAdamW


def make(backend: str, **options: Any) -> Optimizer:
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    options = {"schedule": SCHEDULE, "max_grad_norm": 1.0, **options}
    groups = [{"params": params[:3]}, {"params": params[3:], "weight_decay": 0.0}]
    return Optimizer(groups, lr=0.1, backend=backend, **options)


def params_of(optimizer: Optimizer) -> list[torch.nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def set_grads(optimizer: Optimizer, k: int) -> None:
    generator = torch.Generator().manual_seed(100 + k)
    for p in params_of(optimizer):
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def repeats(optimizer: Optimizer) -> bool:
    """Whether the step to come is made in one call; makes it if so."""
    return optimizer._repeat()


def entry(optimizer: Optimizer, i: int = 0) -> dict[str, Any]:
    return optimizer.state[params_of(optimizer)[i]]


# what changes between two steps -> how

CHANGES: dict[str, Callable[[Optimizer], Any]] = {}


def change(function: Callable[[Optimizer], Any]) -> Callable[[Optimizer], Any]:
    CHANGES[function.__name__] = function
    return function


@change
def parameter_moved(o: Optimizer) -> None:
    p = params_of(o)[0]
    p.data = p.data.clone()


@change
def parameter_transposed_in_place(o: Optimizer) -> None:
    p = params_of(o)[3]
    grad = p.grad
    p.grad = None
    p.data = p.data.transpose(0, 2)
    p.grad = grad


@change
def parameter_of_another_dtype(o: Optimizer) -> None:
    p = params_of(o)[0]
    grad = p.grad
    p.grad = None
    p.data = p.data.double()
    p.grad = grad.double()


@change
def gradient_missing(o: Optimizer) -> None:
    params_of(o)[1].grad = None


@change
def gradient_transposed(o: Optimizer) -> None:
    p = params_of(o)[0]
    p.grad = torch.randn(5, 3, generator=torch.Generator().manual_seed(3)).t()


@change
def gradient_expanded(o: Optimizer) -> None:
    p = params_of(o)[0]
    p.grad = torch.full((1, 1), 0.5).expand(3, 5)


@change
def frozen(o: Optimizer) -> None:
    params_of(o)[0].requires_grad_(False)


@change
def parameter_added_to_the_list(o: Optimizer) -> None:
    p = torch.nn.Parameter(torch.ones(4))
    p.grad = torch.ones(4)
    o.param_groups[0]["params"].append(p)


@change
def parameter_removed_from_the_list(o: Optimizer) -> None:
    del o.param_groups[0]["params"][0]


@change
def moment_replaced(o: Optimizer) -> None:
    entry(o)["exp_avg"] = torch.full((3, 5), 0.25)


@change
def moment_moved(o: Optimizer) -> None:
    entry(o)["exp_avg_sq"].data = torch.full((3, 5), 0.25)


@change
def step_replaced(o: Optimizer) -> None:
    entry(o)["step"] = torch.tensor(7.0)


@change
def step_replaced_by_a_number(o: Optimizer) -> None:
    entry(o)["step"] = 7


@change
def step_moved(o: Optimizer) -> None:
    entry(o)["step"].data = torch.tensor(3.0)


@change
def step_swapped(o: Optimizer) -> None:
    torch.utils.swap_tensors(entry(o)["step"], torch.tensor(100.0))


@change
def gradient_negative_view(o: Optimizer) -> None:
    for p in params_of(o):
        p.grad = torch.complex(torch.zeros_like(p.grad), p.grad).conj().imag


@change
def parameter_negative_view(o: Optimizer) -> None:
    p = params_of(o)[0]
    p.data = torch._neg_view(p.data.clone())


@change
def group_added_and_removed(o: Optimizer) -> None:
    p = torch.nn.Parameter(torch.ones(4))
    o.add_param_group({"params": [p]})
    o.param_groups.pop()


@change
def group_away_for_a_look(o: Optimizer) -> None:
    group = o.param_groups.pop()
    o.scheduler.step()
    o.param_groups.append(group)
    o.scheduler.step()


@change
def idle_group(o: Optimizer) -> None:
    for p in o.param_groups[1]["params"]:
        p.grad = None


@change
def groups_of_another_kind(o: Optimizer) -> None:
    for p in o.param_groups[1]["params"]:
        p.grad = None
    o.step()
    o.param_groups = [dict(group) for group in o.param_groups]


@change
def state_of_one_deleted(o: Optimizer) -> None:
    del o.state[params_of(o)[1]]


@change
def state_cleared(o: Optimizer) -> None:
    o.state.clear()


@change
def state_loaded(o: Optimizer) -> None:
    other = make(o.backend)
    set_grads(other, 5)
    other.step()
    o.load_state_dict(other.state_dict())


@change
def rate_assigned(o: Optimizer) -> None:
    o.param_groups[0]["lr"] = 0.03


@change
def rate_updated(o: Optimizer) -> None:
    o.param_groups[1] |= {"lr": 0.03}


@change
def decay_assigned(o: Optimizer) -> None:
    o.param_groups[0]["weight_decay"] = 0.5


@change
def betas_assigned(o: Optimizer) -> None:
    o.param_groups[0]["betas"] = (0.5, 0.9)


@change
def peak_assigned(o: Optimizer) -> None:
    o.param_groups[0]["initial_lr"] = 1.0


@change
def schedule_popped(o: Optimizer) -> None:
    o.param_groups[0].pop("schedule")


@change
def schedule_assigned(o: Optimizer) -> None:
    o.param_groups[0]["schedule"] = fusedlr.linear(total_steps=9)


@change
def clipping_changed(o: Optimizer) -> None:
    o.max_grad_norm = 0.01


@change
def clipping_off(o: Optimizer) -> None:
    o.max_grad_norm = None


@change
def group_added(o: Optimizer) -> None:
    p = torch.nn.Parameter(torch.ones(4))
    p.grad = torch.ones(4)
    o.add_param_group({"params": [p]})


@change
def group_removed(o: Optimizer) -> None:
    o.param_groups.pop()


@change
def groups_replaced_by_dicts(o: Optimizer) -> None:
    o.param_groups = [dict(group) for group in o.param_groups]


@change
def schedule_moved(o: Optimizer) -> None:
    o.scheduler.load_state_dict({"last_epoch": 11})


@change
def scaled(o: Optimizer) -> None:
    o.grad_scale, o.found_inf = torch.tensor(4.0), torch.tensor(0.0)


@change
def overflown(o: Optimizer) -> None:
    o.grad_scale, o.found_inf = torch.tensor(4.0), torch.tensor(1.0)


@change
def not_finite(o: Optimizer) -> None:
    params_of(o)[0].grad[0, 0] = math.nan


def run(backend: str, name: str, *, anew: bool, **options: Any) -> Optimizer:
    optimizer = make(backend, **options)
    for k in range(8):
        set_grads(optimizer, k)
        if k == 4:
            CHANGES[name](optimizer)
        if anew:
            optimizer._prepared = None
        optimizer.step()
        for signal in ("grad_scale", "found_inf"):
            optimizer.__dict__.pop(signal, None)
    return optimizer


@pytest.mark.filterwarnings("ignore:.*assigned to group", "ignore:the loaded schedule")
@pytest.mark.parametrize("groups", ("joint", "independent"))
@pytest.mark.parametrize("name", CHANGES)
def test_a_change_between_steps_is_seen(name: str, groups: str) -> None:
    ours = run("cpu", name, anew=False, groups=groups)
    theirs = run("reference", name, anew=True, groups=groups)
    for a, b in zip(params_of(ours), params_of(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        assert (ours.state.get(a) is None) == (theirs.state.get(b) is None)
        for key in ours.state.get(a) or ():
            torch.testing.assert_close(ours.state[a][key], theirs.state[b][key], rtol=1e-5, atol=1e-6)
    for key, value in ours.metrics().items():
        torch.testing.assert_close(value, theirs.metrics()[key], rtol=1e-6, atol=0, equal_nan=True)
    assert [g["lr"] for g in ours.param_groups] == pytest.approx([g["lr"] for g in theirs.param_groups])


@pytest.mark.parametrize(
    "options", ({}, {"schedule": None}, {"groups": "independent"}, {"max_grad_norm": None})
)
def test_a_step_like_the_last_is_one_call(options: dict[str, Any]) -> None:
    optimizer = make("cpu", **options)
    for k in range(3):
        set_grads(optimizer, k)
        assert repeats(optimizer) == (k > 0)
        if k == 0:
            optimizer.step()
    assert optimizer.metrics()["step"].tolist() == [3, 3]


def test_a_foreign_scheduler_does_not_slow_it_down() -> None:
    optimizer, twin = make("cpu", schedule=None), make("reference", schedule=None)
    schedulers = [LambdaLR(o, lambda k: 1 / (1 + k)) for o in (optimizer, twin)]
    for k in range(4):
        for o, scheduler in zip((optimizer, twin), schedulers, strict=True):
            set_grads(o, k)
            if k == 3 and o is optimizer:
                assert repeats(o)
            else:
                o.step()
            scheduler.step()
    for a, b in zip(params_of(optimizer), params_of(twin), strict=True):
        torch.testing.assert_close(a, b)


def test_the_rate_shown_is_the_definition_s() -> None:
    optimizer = make("cpu")
    for k in range(25):
        set_grads(optimizer, k)
        optimizer.step()
        assert optimizer.param_groups[0]["lr"] == SCHEDULE.lr_at(k, 0.1)
        assert not optimizer._notes.writes


@pytest.mark.parametrize("name", ("eps", "weight_decay", "betas"))
def test_a_hyperparameter_changed_in_place_is_read_again(name: str) -> None:
    value = torch.tensor(0.5)
    given = (value, 0.9) if name == "betas" else value
    optimizer, twin = (make(backend) for backend in ("cpu", "reference"))
    for o in (optimizer, twin):
        o.param_groups[0][name] = given
    for k in range(5):
        if k == 3:
            value.fill_(0.25)
        for o in (optimizer, twin):
            set_grads(o, k)
            o._prepared = None if o is twin else o._prepared
            o.step()
    for a, b in zip(params_of(optimizer), params_of(twin), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_negative_gradient_that_autograd_leaves_is_seen() -> None:
    start = torch.tensor(1.5)
    params = [torch.nn.Parameter(start.clone()) for _ in range(2)]
    optimizers = fusedlr.FusedAdamW(params[:1], lr=0.1, backend="cpu"), torch.optim.AdamW(params[1:], lr=0.1)
    for k in range(5):
        for p, o in zip(params, optimizers, strict=True):
            o.zero_grad()
            z = torch.complex(torch.zeros_like(p), p).conj()
            (p.square() if k < 3 else (z * (1 + 2j)).abs()).backward()
            o.step()
    torch.testing.assert_close(*params)


def test_a_cycle_through_a_parameter_is_collected() -> None:
    optimizer = make("cpu")
    for k in range(3):
        set_grads(optimizer, k)
        optimizer.step()
    params_of(optimizer)[0].owner = optimizer  # type: ignore[attr-defined]
    optimizer.param_groups[0]["owner"] = optimizer
    held = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert held() is None


def test_memory_that_has_been_freed_is_refused() -> None:
    optimizer = make("cpu")
    for k in range(3):
        set_grads(optimizer, k)
        optimizer.step()
    params_of(optimizer)[0].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="memory of the parameter has been freed"):
        optimizer.step()


def test_a_step_without_groups_does_nothing() -> None:
    optimizer = make("cpu")
    for k in range(3):
        set_grads(optimizer, k)
        optimizer.step()
    optimizer.param_groups.clear()
    optimizer.step()


def test_no_operator_is_called_and_nothing_allocated() -> None:
    class Nothing(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            raise AssertionError(f"{func} was called")

    optimizer = make("cpu")
    set_grads(optimizer, 0)
    optimizer.step()
    with Nothing():
        for _ in range(3):
            optimizer.step()
    assert optimizer.metrics()["step"].tolist() == [4, 4]


def test_a_stale_backward_raises_after_a_repeated_step() -> None:
    optimizer = make("cpu")
    for k in range(2):
        set_grads(optimizer, k)
        optimizer.step()
    p = params_of(optimizer)[0]
    loss = (p * p).sum()
    moment = entry(optimizer)["exp_avg"]
    held = (moment * p).sum()
    set_grads(optimizer, 2)
    assert repeats(optimizer)
    for stale in (loss, held):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            stale.backward()


def test_gradients_are_let_go_of() -> None:
    optimizer = make("cpu")
    for k in range(3):
        set_grads(optimizer, k)
        optimizer.step()
    held = weakref.ref(params_of(optimizer)[0].grad)
    optimizer.zero_grad()
    assert held() is None


def test_moments_that_are_offloaded_are_let_go_of() -> None:
    optimizer = make("cpu")
    for k in range(2):
        set_grads(optimizer, k)
        optimizer.step()
    held = weakref.ref(entry(optimizer)["exp_avg"])
    entry(optimizer)["exp_avg"] = entry(optimizer)["exp_avg"].clone()
    assert held() is None
    set_grads(optimizer, 2)
    assert not repeats(optimizer)


def test_a_copy_goes_its_own_way() -> None:
    optimizer = make("cpu")
    for k in range(2):
        set_grads(optimizer, k)
        optimizer.step()
    twin = copy.deepcopy(optimizer)
    before = [p.detach().clone() for p in params_of(twin)]
    set_grads(optimizer, 2)
    optimizer.step()
    assert all(map(torch.equal, before, params_of(twin)))
