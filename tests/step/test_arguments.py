"""Wrong arguments are named with their value, for the optimizer, a group and a running group."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from kit import PEAK, assert_same, make, make_params, make_stock, scheduled, step, steps
from snapshots import bits, params_of, snapshot, unchanged

import fusedlr

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
    a, b, *_ = make_params()
    with pytest.raises(error, match=re.escape(message)):
        make([{"params": [a]}, {"params": [b], **options}])
    optimizer = scheduled([a])
    steps(optimizer, 0, 2)
    with unchanged(optimizer), pytest.raises(error, match=re.escape(message)):
        optimizer.add_param_group({"params": [b], **options})
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
    step(optimizer)
    assert optimizer.metrics()["coef"] < 1e-2
    optimizer.max_grad_norm = None
    assert optimizer.nonfinite == "propagate"
    step(optimizer)
    assert optimizer.metrics()["coef"] == 1


def test_infinite_clipping_measures_only():
    """As accelerate and the Trainer call `clip_grad_norm_` to learn the norm."""
    ours, stock = make(max_grad_norm=math.inf), make_stock()
    for optimizer in (ours, stock):
        steps(optimizer, 0, 2)
    norm = torch.nn.utils.get_total_norm([p.grad for p in params_of(ours)])
    torch.testing.assert_close(ours.metrics()["grad_norm"], norm)
    assert_same(ours, stock)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("eps", "x", "group 1: eps='x' must be a number >= 0"),
        ("eps", -1.0, "group 1: eps=-1.0 must be a number >= 0"),
        ("weight_decay", "x", "group 1: weight_decay='x' must be a number >= 0"),
        ("weight_decay", math.nan, "group 1: weight_decay=nan must be a number >= 0"),
        ("lr", torch.ones(2), "group 1: lr has shape (2,), a tensor lr must have one element"),
        ("max_grad_norm", -1.0, "group 1: max_grad_norm=-1.0 must be a number above 0"),
        ("betas", (0.9, 1.0), "group 1: betas[1]=1.0 must be in [0, 1)"),
        ("betas", (0.9, "x"), "group 1: betas=(0.9, 'x') must be two numbers"),
        ("betas", (0.9,), "betas=(0.9,) must be two numbers"),
    ],
)
def test_nonsense_in_a_running_group_changes_nothing(key, value, message):
    first, second, *_ = make_params()
    optimizer = make([{"params": [first]}, {"params": [second]}])
    step(optimizer)
    before = snapshot(optimizer)
    optimizer.param_groups[1][key] = value
    with pytest.raises(ValueError, match=re.escape(message)):
        optimizer.step()
    optimizer.param_groups[1][key] = optimizer.defaults.get(key)
    assert snapshot(optimizer) == before
