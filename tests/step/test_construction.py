"""An optimizer is made from what torch takes, in torch's order, and refuses what torch refuses."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kit import assert_same, make, make_params, make_stock, scheduled, steps
from snapshots import bits, params_of, unchanged
from torch import nn
from torch.optim import Optimizer

import fusedlr


def message_of(call: Callable[[], Any]) -> str:
    """Type and text of what a call raises."""
    with pytest.raises(Exception) as caught:
        call()
    return f"{caught.type.__name__}: {caught.value}"


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
    assert_same(ours, stock)


def groups_of(params: list[nn.Parameter]) -> list[dict[str, Any]]:
    return [{"params": params[0], "lr": 0.3}, {"params": iter(params[1:]), "weight_decay": 0.4}]


@pytest.mark.parametrize(
    "give",
    [
        list,
        tuple,
        iter,
        lambda params: (p for p in params),
        lambda params: list(zip("abcd", params, strict=True)),
        lambda params: zip("abcd", params, strict=True),
        groups_of,
        lambda params: iter(groups_of(params)),
        lambda params: [{"params": []}, {"params": params}],
        lambda params: [{"params": zip("abcd", params, strict=True), "lr": 0.3}],
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
    assert_same(ours, stock)


def test_the_callers_group_is_copied():
    group = {"params": make_params()}
    scheduled([group])
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
    optimizer = scheduled()
    steps(optimizer, 0, 2)
    with unchanged(optimizer), pytest.raises((TypeError, ValueError, KeyError)):
        optimizer.add_param_group(WRONG_GROUPS[name]())
    steps(optimizer, 2, 3)


def test_parameters_of_the_first_group_cannot_come_again():
    params = make_params()
    optimizer = make(params)
    with pytest.raises(ValueError, match="some parameters appear in more than one parameter group"):
        optimizer.add_param_group({"params": params[:1]})
    assert len(optimizer.param_groups) == 1


def test_a_parameter_given_twice_is_refused():
    a, b, *_ = make_params()
    with pytest.raises(
        ValueError, match=re.escape("params[2] is the same tensor as params[0]: it would be updated twice")
    ):
        make([a, b, a])
    with pytest.raises(ValueError, match=re.escape("params[1] ('tied') is the same tensor as params[0]")):
        make([("weight", a), ("tied", a)])


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


def test_optimizers_may_be_built_on_the_meta_device():
    """Models are made there and filled in later; nothing is touched before the first step."""
    with torch.device("meta"):
        model = nn.Linear(3, 2)
    optimizer = scheduled(model.parameters())
    assert repr(optimizer)
    assert optimizer.state_dict()["state"] == {}
    optimizer.step()
    for p in params_of(optimizer):
        p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match=r"parameter 0 of group 0.*meta"):
        optimizer.step()
