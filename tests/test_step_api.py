"""`step`, `zero_grad` and the constructor as torch's, what parameters may do meanwhile, and every refusal."""

from __future__ import annotations

import gc
import math
import re
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from snapshots import bits, changes, params_of, snapshot
from torch import nn
from torch.optim import Optimizer
from torch.optim import optimizer as torch_optimizer

import fusedlr

PEAK = 0.05
SCHEDULE = fusedlr.linear(warmup_steps=2, total_steps=9, min_lr_ratio=0.1)


def make_params(dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in ((4, 3), (5,))]


def make(params: Any = None, **options: Any) -> fusedlr.FusedAdamW:
    return fusedlr.FusedAdamW(make_params() if params is None else params, **{"lr": PEAK, **options})


def make_stock(params: Any = None, **options: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(make_params() if params is None else params, **{"lr": PEAK, **options})


def set_grads(optimizer: Optimizer, k: int = 0) -> None:
    generator = torch.Generator().manual_seed(100 + k)
    for p in params_of(optimizer):
        if p.requires_grad:
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)


def steps(optimizer: Optimizer, begin: int, end: int) -> None:
    for k in range(begin, end):
        set_grads(optimizer, k)
        optimizer.step()


def assert_same_weights(ours: Optimizer, stock: Optimizer) -> None:
    for p, q in zip(params_of(ours), params_of(stock), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


def message_of(call: Callable[[], Any]) -> str:
    """Type and text of what a call raises."""
    with pytest.raises(Exception) as caught:
        call()
    return f"{caught.type.__name__}: {caught.value}"


# --- an optimizer of torch


def test_it_is_a_torch_optimizer():
    ours, stock = make(), make_stock()
    assert isinstance(ours, Optimizer)
    assert ours.defaults == stock.defaults
    assert ours.param_groups[0].keys() == stock.param_groups[0].keys()
    assert list(ours.param_groups[0]) == list(stock.param_groups[0])
    assert isinstance(ours.param_groups[0], dict)
    assert not ours.state
    # the listing of the groups is torch's
    listing = repr(stock).removeprefix("AdamW ").strip("()")
    assert listing in repr(ours)
    assert repr(ours).startswith("FusedAdamW (")
    assert "backend=" in repr(ours)


def test_torchs_arguments_come_in_torchs_order():
    ours = fusedlr.FusedAdamW(make_params(), 0.1, (0.5, 0.6), 1e-3, 0.7, True)
    stock = torch.optim.AdamW(make_params(), 0.1, (0.5, 0.6), 1e-3, 0.7, True)
    assert ours.defaults == stock.defaults
    for optimizer in (ours, stock):
        steps(optimizer, 0, 3)
    assert_same_weights(ours, stock)


def groups_of(params: list[nn.Parameter]) -> list[dict[str, Any]]:
    return [{"params": params[0], "lr": 0.3}, {"params": iter(params[1:]), "weight_decay": 0.4}]


@pytest.mark.parametrize(
    "give",
    [
        list,
        tuple,
        iter,
        lambda params: (p for p in params),
        lambda params: list(zip("ab", params, strict=True)),
        lambda params: zip("ab", params, strict=True),
        groups_of,
        lambda params: iter(groups_of(params)),
        lambda params: [{"params": []}, {"params": params}],
        lambda params: [{"params": zip("ab", params, strict=True), "lr": 0.3}],
    ],
    ids=[
        "list",
        "tuple",
        "iterator",
        "generator",
        "named",
        "named iterator",
        "groups",
        "groups iterator",
        "empty",
        "named group",
    ],
)
def test_parameters_may_come_as_torch_takes_them(give):
    ours, stock = make(give(make_params())), make_stock(give(make_params()))
    assert [{k: v for k, v in g.items() if k != "params"} for g in ours.param_groups] == [
        {k: v for k, v in g.items() if k != "params"} for g in stock.param_groups
    ]
    for optimizer in (ours, stock):
        steps(optimizer, 0, 3)
    assert_same_weights(ours, stock)


def test_the_callers_group_is_copied():
    group = {"params": make_params()}
    make([group], schedule=SCHEDULE)
    assert group.keys() == {"params"}


def set_of_params() -> set:
    return set(make_params())


WRONG_PARAMS: dict[str, Callable[[], Any]] = {
    "empty": list,
    "empty iterator": lambda: iter(()),
    "a tensor": lambda: make_params()[0],
    "no tensors": lambda: [1.0, 2.0],
    "a group of a set": lambda: [{"params": set_of_params()}],
    "not a leaf": lambda: [make_params()[0] * 2],
    "a group without parameters": lambda: [{"lr": 0.1}],
    "in two groups": lambda: (lambda p: [{"params": p}, {"params": p[:1]}])(make_params()),
    "some names": lambda: [("a", make_params()[0]), make_params()[1]],
    "names in one group": lambda: [{"params": [("a", make_params()[0])]}, {"params": make_params()}],
    "a group that is a list": lambda: [{"params": make_params()}, make_params()],
}


@pytest.mark.parametrize("name", WRONG_PARAMS)
def test_what_torch_refuses_is_refused_as_by_torch(name):
    ours = message_of(lambda: make(WRONG_PARAMS[name]()))
    stock = message_of(lambda: make_stock(WRONG_PARAMS[name]()))
    # torch writes the class, we its name
    assert ours.replace("but got", "got") == re.sub(r"<class '(\w+)'>", r"\1", stock).replace(
        "but got", "got"
    )


WRONG_GROUPS: dict[str, Callable[[], Any]] = {
    "a tensor that is no leaf": lambda: {"params": make_params()[0] * 2},
    "no tensors": lambda: {"params": [1.0, 2.0]},
    "a set": lambda: {"params": set_of_params()},
    "without parameters": lambda: {"lr": 0.1},
    "some names": lambda: {"params": [("a", make_params()[0]), make_params()[1]]},
    "names": lambda: {"params": [("a", make_params()[0])]},
    "a list": make_params,
}


@pytest.mark.parametrize("name", WRONG_GROUPS)
def test_a_group_that_is_refused_is_not_added(name):
    optimizer = make(schedule=SCHEDULE)
    steps(optimizer, 0, 2)
    before = snapshot(optimizer)
    with pytest.raises((TypeError, ValueError, KeyError)):
        optimizer.add_param_group(WRONG_GROUPS[name]())
    assert not changes(before, snapshot(optimizer))
    steps(optimizer, 2, 3)


def test_parameters_of_the_first_group_cannot_come_again():
    params = make_params()
    optimizer = make(params)
    with pytest.raises(ValueError, match="some parameters appear in more than one parameter group"):
        optimizer.add_param_group({"params": params[:1]})
    assert len(optimizer.param_groups) == 1


# --- step


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
    assert_same_weights(ours, stock)


def test_a_closure_that_raises_leaves_everything():
    optimizer = make(schedule=SCHEDULE)
    steps(optimizer, 0, 2)
    before = snapshot(optimizer)

    def closure() -> None:
        raise RuntimeError("from the closure")

    with pytest.raises(RuntimeError, match="from the closure"):
        optimizer.step(closure)
    assert not changes(before, snapshot(optimizer))


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
        set_grads(optimizer)
        optimizer.step()
        optimizer.step(lambda: None)
        for handle in handles:
            handle.remove()
        optimizer.step()
    ours, stock = seen.values()
    assert [entry[:3] for entry in ours] == [entry[:3] for entry in stock]
    assert [entry[0] for entry in ours[:5]] == ["global pre", "pre", "pre 2", "post", "global post"]
    # pre-hooks see the weights before the step, post-hooks those after it
    assert ours[2][3] != ours[3][3] == ours[4][3]
    assert len(ours) == 10


def test_a_hook_may_change_the_arguments():
    optimizer = make()
    calls: list[str] = []
    optimizer.register_step_pre_hook(
        lambda self, args, kwargs: ((self, lambda: calls.append("mine")), kwargs)
    )
    optimizer.step(lambda: calls.append("the caller's"))
    optimizer.step()
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
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=r"must return None or .*, got 5|but got 5"):
        optimizer.step()
    assert not changes(before, snapshot(optimizer))


def test_a_hook_may_change_gradients_and_rates():
    ours, stock = make(schedule=None), make_stock()
    for optimizer in (ours, stock):

        def hook(self: Optimizer, args: Any, kwargs: Any) -> None:
            for p in params_of(self):
                p.grad.mul_(0.5)
            self.param_groups[0]["lr"] *= 0.5

        optimizer.register_step_pre_hook(hook)
        steps(optimizer, 0, 3)
    assert_same_weights(ours, stock)


def test_the_profiler_finds_the_step():
    optimizer = make()
    set_grads(optimizer)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step()
        optimizer.step()
    (event,) = [event for event in profile.key_averages() if event.key == "Optimizer.step#FusedAdamW.step"]
    assert event.count == 2


def test_a_step_without_any_gradient_is_counted_and_changes_nothing():
    optimizer = make(schedule=SCHEDULE, max_grad_norm=1.0)
    before = snapshot(optimizer, lr=False)
    optimizer.step()
    assert changes(before, snapshot(optimizer, lr=False)) == ["k"]
    assert optimizer.metrics()["grad_norm"] == 0
    assert optimizer.metrics()["coef"] == 1


def test_metrics_are_copies():
    optimizer = make(schedule=SCHEDULE, max_grad_norm=1.0)
    steps(optimizer, 0, 1)
    before = snapshot(optimizer)
    kept = optimizer.metrics()
    plain = optimizer.last_metrics()
    assert plain == {key: value.tolist() for key, value in kept.items()}
    for value in kept.values():
        value.add_(1)
    plain["lr"].append(1.0)
    assert not changes(before, snapshot(optimizer))
    assert optimizer.last_metrics() == {key: value.tolist() for key, value in optimizer.metrics().items()}


# --- zero_grad


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_is_torchs(set_to_none):
    for optimizer in (make(), make_stock()):
        a, b = params_of(optimizer)
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


# --- parameters that are frozen, move, or have odd shapes


def test_frozen_parameters_cost_nothing():
    a, b = make_params()
    b.requires_grad_(False)
    four_bit = nn.Parameter(torch.ones(6, dtype=torch.int8), requires_grad=False)
    optimizer = make([a, b, four_bit], schedule=SCHEDULE, max_grad_norm=1.0)
    steps(optimizer, 0, 3)
    before = bits([b, four_bit])
    assert list(optimizer.state) == [a]
    state = optimizer.state_dict()
    assert list(state["state"]) == [0]
    assert state["param_groups"][0]["params"] == [0, 1, 2]
    optimizer.load_state_dict(state)
    steps(optimizer, 3, 4)
    assert bits([b, four_bit]) == before


def test_a_frozen_parameter_stays_even_with_an_old_gradient():
    """Unlike in torch, whose AdamW goes by the gradient alone."""
    ours, stock = make(max_grad_norm=1e-3), make_stock()
    for optimizer in (ours, stock):
        steps(optimizer, 0, 1)
        a, b = params_of(optimizer)
        before = bits(b), bits(dict(optimizer.state[b]))
        b.requires_grad_(False)
        a.grad.zero_()
        optimizer.step()
        stays = optimizer is ours
        assert ((bits(b), bits(dict(optimizer.state[b]))) == before) == stays
    # nor does it count in the norm
    assert ours.metrics()["grad_norm"] == 0


def test_nothing_to_train_at_all_is_a_step():
    optimizer = make([nn.Parameter(torch.ones(2, dtype=torch.int8), requires_grad=False)], schedule=SCHEDULE)
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
    assert_same_weights(ours, stock)


def test_a_parameter_may_be_thawed_late():
    ours, stock = make(), make_stock()
    for optimizer in (ours, stock):
        a = params_of(optimizer)[0]
        a.requires_grad_(False)
        steps(optimizer, 0, 2)
        assert a not in optimizer.state
        a.requires_grad_(True)
        steps(optimizer, 2, 4)
    assert_same_weights(ours, stock)


def test_data_may_be_moved_under_the_optimizer():
    ours, stock = make(), make_stock()
    for optimizer in (ours, stock):
        steps(optimizer, 0, 2)
        for p in params_of(optimizer):
            p.data = p.data.clone() * 2
        steps(optimizer, 2, 4)
    assert_same_weights(ours, stock)


def test_data_may_change_its_dtype_under_the_optimizer():
    """TRL casts adapters to bf16 after the optimizer was built."""
    optimizer = make(make_params(torch.float32))
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
    before = snapshot(optimizer)
    with pytest.raises(
        RuntimeError, match=r"parameter 0 of group 0, shape \(7,\): its exp_avg has shape \(4, 3\)"
    ):
        optimizer.step()
    assert not changes(before, snapshot(optimizer))


def test_parameters_may_be_replaced_in_a_group():
    """accelerate and peft exchange parameters in place."""
    ours, stock = make(), make_stock()
    for optimizer in (ours, stock):
        steps(optimizer, 0, 2)
        optimizer.param_groups[0]["params"] = make_params()
        steps(optimizer, 2, 4)
        optimizer.param_groups[0]["params"][0] = nn.Parameter(torch.ones(2, dtype=torch.float64))
        steps(optimizer, 4, 6)
    assert_same_weights(ours, stock)


def transposed(x: torch.Tensor) -> torch.Tensor:
    return x.t().contiguous().t() if x.dim() == 2 else x.repeat_interleave(2)[::2]


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
    assert_same_weights(ours, stock)
    if which != "grads":
        assert not params_of(ours)[0].is_contiguous()
    # gradients are only read
    assert all(p.grad.abs().sum() > 0 for p in params_of(ours))


def test_an_expanded_gradient_is_read_as_it_is():
    ours, stock = make(), make_stock()
    for optimizer in (ours, stock):
        # one number for all elements, as `sum().backward()` makes it
        sum(p.sum() for p in params_of(optimizer)).backward()
        for p in params_of(optimizer):
            p.grad = torch.full((), 0.5, dtype=p.dtype).expand(p.shape)
        optimizer.step()
    assert_same_weights(ours, stock)


def test_an_expanded_parameter_is_refused_before_anything_changes():
    """Its elements share memory: an update in place would be applied several times or not at all."""
    good, expanded = make_params()[0], nn.Parameter(torch.ones(1, dtype=torch.float64).expand(5))
    optimizer = make([good, expanded])
    set_grads(optimizer)
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=r"parameter 1 of group 0, shape \(5,\): .*(share|overlap)"):
        optimizer.step()
    assert not changes(before, snapshot(optimizer))


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
    assert_same_weights(ours, stock)
    assert ours.state[params_of(ours)[0]]["step"] == 3


def test_a_stale_backward_is_noticed():
    """The step writes in place, and autograd knows."""
    optimizer = make()
    p = params_of(optimizer)[0]
    loss = (p**2).sum()
    set_grads(optimizer)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_optimizers_may_be_built_on_the_meta_device():
    """Models are made there and filled in later; nothing is touched before the first step."""
    with torch.device("meta"):
        model = nn.Linear(3, 2)
    optimizer = make(model.parameters(), schedule=SCHEDULE)
    assert repr(optimizer)
    assert optimizer.state_dict()["state"] == {}
    optimizer.step()
    for p in params_of(optimizer):
        p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match=r"parameter 0 of group 0.*meta"):
        optimizer.step()


def test_the_step_may_be_called_in_inference_code():
    ours, stock = make(), make_stock()
    for optimizer in (ours, stock):
        set_grads(optimizer)
        with torch.no_grad():
            optimizer.step()
    assert_same_weights(ours, stock)


def test_a_dropped_group_of_parameters_is_not_kept_alive():
    optimizer = make()
    steps(optimizer, 0, 2)
    gone = weakref.ref(optimizer.param_groups[0]["params"][0])
    del optimizer.state[gone()]
    optimizer.param_groups[0]["params"] = optimizer.param_groups[0]["params"][1:]
    steps(optimizer, 2, 3)
    gc.collect()
    assert gone() is None


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


# --- refusals of gradients


def sparse(p: nn.Parameter) -> None:
    p.grad = torch.ones_like(p).to_sparse()


def other_dtype(p: nn.Parameter) -> None:
    p.grad = torch.ones_like(p)
    p.data = p.data.to(torch.bfloat16)


def other_shape(p: nn.Parameter) -> None:
    p.grad = torch.ones_like(p)
    p.data = p.data.reshape(-1)[:5]


REFUSED_GRADS = [
    (sparse, "a gradient of layout torch.sparse_coo is not supported: gradients must be dense"),
    (other_dtype, "its gradient is torch.float64 but the parameter is torch.bfloat16"),
    (other_shape, r"its gradient has shape \(4, 3\) but the parameter has \(5,\)"),
]


@pytest.mark.parametrize(("spoil", "message"), REFUSED_GRADS, ids=[f.__name__ for f, _ in REFUSED_GRADS])
@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("named", [True, False])
def test_a_gradient_that_cannot_be_used_is_refused_before_anything_changes(spoil, message, fresh, named):
    good, bad = make_params()[1], make_params()[0]
    params = [("good", good), ("layer.bad", bad)] if named else [good, bad]
    optimizer = make(params, schedule=SCHEDULE, max_grad_norm=1.0)
    if not fresh:
        steps(optimizer, 0, 2)
    set_grads(optimizer)
    bad.grad = None
    spoil(bad)
    before = snapshot(optimizer)
    name = "parameter 'layer.bad'" if named else r"parameter 1 of group 0, shape \(.*\)"
    with pytest.raises(RuntimeError, match=f"{name}: {message}"):
        optimizer.step()
    assert not changes(before, snapshot(optimizer))


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (lambda: torch.ones(3, dtype=torch.complex64), "a parameter that is complex is not supported"),
        (lambda: torch.ones(3, device="meta"), "meta"),
    ],
    ids=["complex", "meta"],
)
def test_a_parameter_that_cannot_be_trained_is_refused_when_it_has_a_gradient(tensor, message):
    good, bad = make_params()[0], nn.Parameter(tensor())
    optimizer = make([good, bad])
    good.grad, bad.grad = torch.ones_like(good), torch.ones_like(bad)
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=f"parameter 1 of group 0, .*: .*{message}"):
        optimizer.step()
    assert not changes(before, snapshot(optimizer))


@pytest.fixture
def one_process():
    distributed = pytest.importorskip("torch.distributed")
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_sharded_parameters_are_refused_when_they_have_a_gradient():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (1,))
    good = make_params()[0]
    sharded = nn.Parameter(distribute_tensor(torch.ones(4), mesh, [Shard(0)]))
    optimizer = make([("good", good), ("sharded", sharded)], schedule=SCHEDULE)
    assert repr(optimizer)
    good.grad = torch.ones_like(good)
    optimizer.step()
    sharded.grad = torch.ones_like(sharded)
    before = bits(good), bits(sharded.to_local()), bits(optimizer.metrics()["step"])
    with pytest.raises(
        RuntimeError, match="parameter 'sharded': a parameter that is a DTensor is not supported"
    ):
        optimizer.step()
    assert (bits(good), bits(sharded.to_local()), bits(optimizer.metrics()["step"])) == before


# --- refusals of arguments

WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"lr": -0.1}, ValueError, "lr=-0.1 must be a number >= 0"),
    ({"lr": math.nan}, ValueError, "lr=nan must be a number >= 0"),
    ({"lr": "0.1"}, ValueError, "lr='0.1' must be a number >= 0"),
    ({"lr": None}, ValueError, "lr=None must be a number >= 0"),
    ({"lr": torch.tensor(-0.1)}, ValueError, "lr=tensor(-0.1000) must be a number >= 0"),
    ({"lr": torch.tensor([0.1, 0.2])}, ValueError, "lr has shape (2,), a tensor lr must have one element"),
    ({"eps": -1e-8}, ValueError, "eps=-1e-08 must be a number >= 0"),
    ({"eps": math.nan}, ValueError, "eps=nan must be a number >= 0"),
    ({"weight_decay": -1}, ValueError, "weight_decay=-1 must be a number >= 0"),
    ({"weight_decay": "a lot"}, ValueError, "weight_decay='a lot' must be a number >= 0"),
    ({"betas": (1.0, 0.9)}, ValueError, "betas[0]=1.0 must be in [0, 1)"),
    ({"betas": (0.9, -0.1)}, ValueError, "betas[1]=-0.1 must be in [0, 1)"),
    ({"betas": (0.9, math.nan)}, ValueError, "betas[1]=nan must be in [0, 1)"),
    ({"betas": 0.9}, ValueError, "betas=0.9 must be two numbers"),
    ({"betas": (0.9, 0.95, 0.99)}, ValueError, "betas=(0.9, 0.95, 0.99) must be two numbers"),
    ({"betas": (0.9, None)}, ValueError, "betas=(0.9, None) must be two numbers"),
]

WRONG_SETTINGS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"max_grad_norm": 0}, ValueError, "max_grad_norm=0 must be a number above 0, or None for no clipping"),
    ({"max_grad_norm": -1.0}, ValueError, "max_grad_norm=-1.0 must be a number above 0"),
    ({"max_grad_norm": math.nan}, ValueError, "max_grad_norm=nan must be a number above 0"),
    ({"max_grad_norm": "1"}, ValueError, "max_grad_norm='1' must be a number above 0"),
    ({"max_grad_norm": True}, ValueError, "max_grad_norm=True must be a number above 0"),
    ({"schedule": "cosine"}, TypeError, "schedule='cosine' is not a fusedlr.Schedule: build one with"),
    ({"schedule": lambda k: 1.0}, TypeError, "is not a fusedlr.Schedule"),
    ({"schedule": fusedlr.cosine}, TypeError, "is not a fusedlr.Schedule"),
    ({"nonfinite": "ignore"}, ValueError, "nonfinite='ignore' is unknown, expected one of"),
    ({"groups": "all"}, ValueError, "groups='all' is unknown, expected one of 'joint', 'independent'"),
    ({"state_dtype": torch.bfloat16}, ValueError, "state_dtype=torch.bfloat16 is unknown, expected one of"),
    ({"backend": "opencl"}, ValueError, "backend='opencl' is unknown, expected one of auto"),
    ({"differentiable": True}, ValueError, "differentiable=True is not supported: the step writes in place"),
    (
        {"schedule": fusedlr.linear(total_steps=5, min_lr=1.0)},
        ValueError,
        "min_lr=1.0 is above the peak lr=0.05",
    ),
]


def name_of(case: Any) -> str | None:
    if not isinstance(case, dict):
        return None
    # a function by its name: its repr has an address, another one in every process
    named = {key: getattr(value, "__name__", repr(value)) for key, value in case.items()}
    return " ".join(f"{key}={value}"[:40] for key, value in named.items())


@pytest.mark.parametrize(("options", "error", "message"), [*WRONG, *WRONG_SETTINGS], ids=name_of)
def test_wrong_arguments_are_named_with_their_value(options, error, message):
    params = make_params()
    for p in params:
        p.grad = torch.ones_like(p)
    before = bits([*params, *(p.grad for p in params)])
    with pytest.raises(error, match=re.escape(message)):
        fusedlr.FusedAdamW(params, **{"lr": PEAK, **options})
    assert bits([*params, *(p.grad for p in params)]) == before


WRONG_IN_A_GROUP = [
    *WRONG,
    *(case for case in WRONG_SETTINGS if "schedule" in case[0]),
    ({"max_grad_norm": 1.0}, ValueError, "max_grad_norm=1.0 in a group needs groups='independent'"),
]


@pytest.mark.parametrize(("options", "error", "message"), WRONG_IN_A_GROUP, ids=name_of)
def test_wrong_options_of_a_group_are_refused_too(options, error, message):
    a, b = make_params()
    with pytest.raises(error, match=re.escape(message)):
        make([{"params": [a]}, {"params": [b], **options}])
    optimizer = make([a], schedule=SCHEDULE)
    steps(optimizer, 0, 2)
    before = snapshot(optimizer)
    with pytest.raises(error, match=re.escape(message)):
        optimizer.add_param_group({"params": [b], **options})
    assert not changes(before, snapshot(optimizer))
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [case for case in WRONG_SETTINGS if "max_grad_norm" in case[0]],
    ids=name_of,
)
def test_wrong_clipping_of_an_independent_group_is_refused(options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        make([{"params": make_params(), **options}], groups="independent")


@pytest.mark.parametrize("value", [0, -1.0, math.nan, "1"])
def test_clipping_may_be_changed_but_not_to_nonsense(value):
    optimizer = make(max_grad_norm=1.0)
    with pytest.raises(ValueError, match=re.escape(f"max_grad_norm={value!r} must be a number above 0")):
        optimizer.max_grad_norm = value
    assert optimizer.max_grad_norm == 1.0
    optimizer.max_grad_norm = 1e-3
    set_grads(optimizer)
    optimizer.step()
    assert optimizer.metrics()["coef"] < 1e-2
    optimizer.max_grad_norm = None
    assert optimizer.nonfinite == "propagate"
    set_grads(optimizer)
    optimizer.step()
    assert optimizer.metrics()["coef"] == 1


def test_a_parameter_given_twice_is_refused():
    a, b = make_params()
    with pytest.raises(
        ValueError, match=re.escape("params[2] is the same tensor as params[0]: it would be updated twice")
    ):
        make([a, b, a])
    with pytest.raises(ValueError, match=re.escape("params[1] ('tied') is the same tensor as params[0]")):
        make([("weight", a), ("tied", a)])


def test_infinite_clipping_measures_only():
    """As accelerate and the Trainer call `clip_grad_norm_` to learn the norm."""
    ours, stock = make(max_grad_norm=math.inf), make_stock()
    for optimizer in (ours, stock):
        steps(optimizer, 0, 2)
    norm = torch.nn.utils.get_total_norm([p.grad for p in params_of(ours)])
    torch.testing.assert_close(ours.metrics()["grad_norm"], norm)
    assert_same_weights(ours, stock)


# --- backends


def cannot_run() -> list[str]:
    from fusedlr import backends

    return [name for name, why in backends.reasons([torch.device("cpu")]).items() if why is not None]


@pytest.mark.parametrize("name", cannot_run())
def test_a_backend_asked_for_that_cannot_run_says_why(name, monkeypatch):
    from fusedlr import backends

    why = backends.reasons([torch.device("cpu")])[name]
    with pytest.raises(RuntimeError, match=re.escape(f"backend={name!r} cannot run here: {why}")):
        make(backend=name)
    monkeypatch.setenv("FUSEDLR_BACKEND", name)
    with pytest.raises(RuntimeError, match=re.escape(f"FUSEDLR_BACKEND={name!r} cannot run here: {why}")):
        make()


def test_the_environment_overrides_the_backend(monkeypatch, recwarn):
    monkeypatch.setenv("FUSEDLR_BACKEND", "reference")
    optimizer = make()
    assert optimizer.backend == "reference"
    assert "backend=reference" in repr(optimizer)
    steps(optimizer, 0, 1)
    # it was asked for: that it is slow is no surprise
    assert not [w for w in recwarn if issubclass(w.category, fusedlr.FallbackWarning)]


def test_an_unknown_backend_in_the_environment_is_named(monkeypatch):
    monkeypatch.setenv("FUSEDLR_BACKEND", "opencl")
    with pytest.raises(ValueError, match="FUSEDLR_BACKEND='opencl' is unknown, expected one of auto"):
        make()


def test_a_backend_that_stops_running_changes_nothing(monkeypatch):
    optimizer = make(schedule=SCHEDULE)
    steps(optimizer, 0, 2)
    set_grads(optimizer)
    before = snapshot(optimizer)
    monkeypatch.setenv("FUSEDLR_BACKEND", "opencl")
    # a step like the last one runs where that did
    optimizer.param_groups[0]["foreach"] = None
    with pytest.raises(ValueError, match="opencl"):
        optimizer.step()
    monkeypatch.undo()
    assert not changes(before, snapshot(optimizer))


def test_falling_back_is_said_once_with_the_reasons(monkeypatch):
    from fusedlr import compiled

    # as on a machine without a compiler
    monkeypatch.setattr(compiled, "cpu", None)
    monkeypatch.setattr(compiled, "error", "the C++ kernel was not built")
    optimizer = make()
    assert optimizer.backend == "reference"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        steps(optimizer, 0, 3)
    (warning,) = [w for w in caught if issubclass(w.category, fusedlr.FallbackWarning)]
    assert all(f"{name}: " in str(warning.message) for name in cannot_run())
    assert warning.filename == __file__


@pytest.mark.parametrize(
    "options",
    [{"foreach": True}, {"fused": True}, {"capturable": True}, {"foreach": False, "fused": False}],
    ids=str,
)
def test_torchs_switches_are_accepted_without_effect(options):
    ours, plain = make(**options), make()
    for optimizer in (ours, plain):
        steps(optimizer, 0, 3)
    assert [bits(p) for p in params_of(ours)] == [bits(p) for p in params_of(plain)]
