"""Wrong arguments are named with their value, for the optimizer, a group and a running group."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from kit import PEAK, assert_same, make, make_params, make_stock, scheduled, step, steps
from snapshots import bits, params_of, snapshot, unchanged

import fusedlr

HUGE = 10**400

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"lr": -0.1}, "lr=-0.1 must be a number >= 0"),
    ({"lr": math.nan}, "lr=nan must be a number >= 0"),
    ({"lr": "0.1"}, "lr='0.1' must be a number >= 0"),
    ({"lr": None}, "lr=None must be a number >= 0"),
    ({"lr": torch.tensor(-0.1)}, "lr=tensor(-0.1000) must be a number >= 0"),
    ({"lr": torch.tensor([0.1, 0.2])}, "lr has shape (2,), a tensor lr must have one element"),
    ({"eps": -1e-8}, "eps=-1e-08 must be a number >= 0"),
    ({"eps": math.nan}, "eps=nan must be a number >= 0"),
    ({"weight_decay": -1}, "weight_decay=-1 must be a number >= 0"),
    ({"weight_decay": "a lot"}, "weight_decay='a lot' must be a number >= 0"),
    ({"betas": (1.0, 0.9)}, "betas[0]=1.0 must be in [0, 1)"),
    ({"betas": (0.9, -0.1)}, "betas[1]=-0.1 must be in [0, 1)"),
    ({"betas": (0.9, math.nan)}, "betas[1]=nan must be in [0, 1)"),
    ({"betas": 0.9}, "betas=0.9 must be two numbers"),
    ({"betas": (0.9, 0.95, 0.99)}, "betas=(0.9, 0.95, 0.99) must be two numbers"),
    ({"betas": (0.9, None)}, "betas=(0.9, None) must be two numbers"),
    ({"betas": {0.99, 0.9}}, "must be two numbers"),
    ({"betas": ("0.9", "0.99")}, "betas=('0.9', '0.99') must be two numbers"),
    ({"betas": "99"}, "betas='99' must be two numbers"),
    ({"betas": {0.9: 1, 0.99: 2}}, "betas={0.9: 1, 0.99: 2} must be two numbers"),
    ({"betas": (True, 0.9)}, "betas=(True, 0.9) must be two numbers"),
    ({"betas": (0.9, 1 + 0j)}, "must be two numbers"),
    ({"betas": (torch.ones(2) / 2, 0.9)}, "must be two numbers"),
    ({"betas": (torch.tensor(1.5), 0.9)}, "betas[0]=tensor(1.5000) must be in [0, 1)"),
    ({"betas": (0.9, torch.tensor(math.nan))}, "betas[1]=tensor(nan) must be in [0, 1)"),
    ({"lr": True}, "lr=True must be a number >= 0"),
    ({"lr": HUGE}, "is too large"),
    ({"lr": math.inf}, "lr=inf must be finite"),
    ({"lr": torch.tensor(0.1 + 0j)}, "lr=tensor(0.1000+0.j) is not a number"),
    ({"lr": torch.tensor(True)}, "lr=tensor(True) is not a number"),
    ({"lr": torch.tensor(0.1, device="meta")}, "lr=tensor(..., device='meta', size=()) is not a number"),
    ({"lr": 0.1 + 0j}, "lr=(0.1+0j) must be a number >= 0"),
    ({"eps": "1e-8"}, "eps='1e-8' must be a number >= 0"),
    ({"eps": True}, "eps=True must be a number >= 0"),
    ({"eps": torch.ones(2)}, "eps has shape (2,), a tensor eps must have one element"),
    ({"weight_decay": False}, "weight_decay=False must be a number >= 0"),
    ({"weight_decay": math.inf}, "weight_decay=inf must be finite"),
    ({"maximize": "no"}, "maximize='no' must be True or False"),
    ({"maximize": 2}, "maximize=2 must be True or False"),
    ({"amsgrad": "no"}, "amsgrad='no' must be True or False"),
    ({"amsgrad": None}, "amsgrad=None must be True or False"),
]

WRONG_SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"max_grad_norm": 0}, "max_grad_norm=0 must be a number above 0, or None for no clipping"),
    ({"max_grad_norm": -1.0}, "max_grad_norm=-1.0 must be a number above 0"),
    ({"max_grad_norm": math.nan}, "max_grad_norm=nan must be a number above 0"),
    ({"max_grad_norm": "1"}, "max_grad_norm='1' must be a number above 0"),
    ({"max_grad_norm": True}, "max_grad_norm=True must be a number above 0"),
    ({"schedule": "cosine"}, "schedule='cosine' is not a fusedlr.Schedule: build one with"),
    ({"schedule": lambda k: 1.0}, "is not a fusedlr.Schedule"),
    ({"schedule": fusedlr.cosine}, "is not a fusedlr.Schedule"),
    ({"nonfinite": "ignore"}, "nonfinite='ignore' is unknown, expected one of"),
    ({"groups": "all"}, "groups='all' is unknown, expected one of 'joint', 'independent'"),
    ({"state_dtype": torch.bfloat16}, "state_dtype=torch.bfloat16 is unknown, expected one of"),
    ({"backend": "opencl"}, "backend='opencl' is unknown, expected one of auto"),
    ({"differentiable": True}, "differentiable=True is not supported: the step writes in place"),
    ({"schedule": fusedlr.linear(total_steps=5, min_lr=1.0)}, "min_lr=1.0 is above the peak lr=0.05"),
    ({"max_grad_norm": HUGE}, "is too large"),
    ({"max_grad_norm": np.bool_(True)}, "must be a number above 0"),
    ({"max_grad_norm": torch.tensor(1.0)}, "max_grad_norm=tensor(1.) must be a number above 0"),
    ({"amp_scaling": "no"}, "amp_scaling='no' must be True or False"),
    ({"differentiable": "no"}, "differentiable='no' must be True or False"),
    ({"nonfinite": torch.ones(2)}, "nonfinite=tensor([1., 1.]) is unknown"),
    ({"groups": ["joint"]}, "groups=['joint'] is unknown"),
    ({"backend": ["cpu"]}, "backend=['cpu'] is unknown"),
]


def name_of(case: Any) -> str | None:
    if not isinstance(case, dict):
        return None
    # a function by its name: its repr has an address, another one in every process
    named = {key: getattr(value, "__name__", repr(value)) for key, value in case.items()}
    return " ".join(f"{key}={value}"[:40] for key, value in named.items())


def refusal(options: dict[str, Any], message: str) -> Any:
    """The error for one wrong option, which its message names."""
    (name,) = options
    # where the message here leaves out its beginning, that names the option
    before = "" if "=" in message or message.startswith(name) else f"{name}.*"
    error = TypeError if "fusedlr.Schedule" in message else ValueError
    return pytest.raises(error, match=before + re.escape(message))


@pytest.mark.parametrize(("options", "message"), [*WRONG, *WRONG_SETTINGS], ids=name_of)
def test_wrong_arguments_are_named_with_their_value(options, message):
    params = make_params()
    for p in params:
        p.grad = torch.ones_like(p)
    before = bits([*params, *(p.grad for p in params)])
    with refusal(options, message):
        fusedlr.FusedAdamW(params, **{"lr": PEAK, **options})
    assert bits([*params, *(p.grad for p in params)]) == before


WRONG_IN_A_GROUP = [
    *WRONG,
    *(case for case in WRONG_SETTINGS if "schedule" in case[0]),
    ({"max_grad_norm": 1.0}, "max_grad_norm=1.0 in a group needs groups='independent'"),
]


@pytest.mark.parametrize(("options", "message"), WRONG_IN_A_GROUP, ids=name_of)
def test_wrong_options_of_a_group_are_refused_too(options, message):
    a, b, *_ = make_params()
    with refusal(options, message):
        make([{"params": [a]}, {"params": [b], **options}])
    optimizer = scheduled([a])
    steps(optimizer, 0, 2)
    with unchanged(optimizer), refusal(options, message):
        optimizer.add_param_group({"params": [b], **options})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [case for case in WRONG_SETTINGS if "max_grad_norm" in case[0]],
    ids=name_of,
)
def test_wrong_clipping_of_an_independent_group_is_refused(options, message):
    with refusal(options, message):
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
