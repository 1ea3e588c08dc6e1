"""State dicts that do not fit are refused in words before anything changes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kit import make_params, scheduled, steps
from snapshots import unchanged
from torch import nn

import fusedlr

# the second tensor of the second group
LAST = 3
LOADED = "parameter 1 of group 1.*: its loaded"

# what is done to the state dict, and what is said about it
REFUSED: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "fewer groups": (
        lambda state: state["param_groups"].pop(),
        "the loaded state dict has 1 parameter groups, this optimizer has 2",
    ),
    "more groups": (
        lambda state: state["param_groups"].append(copy.deepcopy(state["param_groups"][0])),
        "the loaded state dict has 3 parameter groups, this optimizer has 2",
    ),
    "fewer parameters": (
        lambda state: state["param_groups"][1]["params"].pop(),
        "group 1 of the loaded state dict has 1 parameters, this optimizer's has 2",
    ),
    "no state": (lambda state: state.pop("state"), r"has no 'state', only \['param_groups'\]"),
    "no groups": (lambda state: state.pop("param_groups"), r"has no 'param_groups', only \['state'\]"),
    "no params": (lambda state: state["param_groups"][1].pop("params"), "group 1 .* has no 'params'"),
    "no lr": (lambda state: state["param_groups"][1].pop("lr"), "group 1 .* has no 'lr'"),
    "a schedule of three numbers": (
        lambda state: state["param_groups"][1].update(schedule=[1, 2, 3]),
        "not a schedule in numbers",
    ),
    "a count in words": (
        lambda state: state["param_groups"][1].update(k="three"),
        "group 1 of the loaded state dict has k='three', expected an integer",
    ),
    "ids of nothing": (
        lambda state: state.update(state={f"p{i}": entry for i, entry in state["state"].items()}),
        r"params=\[\[0, 1\], \[2, 3\]\] of the loaded state dict name none of the entries of its state",
    ),
    "no step": (lambda state: state["state"][LAST].pop("step"), f"{LOADED} state has no step"),
    "no moments": (
        lambda state: [state["state"][LAST].pop(key) for key in ("exp_avg", "exp_avg_sq")],
        f"{LOADED} state has no exp_avg, exp_avg_sq, only step",
    ),
    "another optimizer": (
        lambda state: state["state"].update({LAST: {"momentum_buffer": torch.zeros(2)}}),
        f"{LOADED} state has no step, exp_avg, exp_avg_sq, only momentum_buffer",
    ),
}

# an entry of the state, its new value, and what is said about it
REFUSED_ENTRIES = [
    ("exp_avg_sq", torch.zeros(2, 1), r"has shape \(2, 1\), the parameter has \(2,\)"),
    ("exp_avg_sq", torch.zeros(2, device="meta"), "is torch.float32 on meta, expected numbers"),
    ("exp_avg_sq", torch.zeros(2, dtype=torch.complex64), "is torch.complex64 on cpu, expected numbers"),
    ("exp_avg", [0.0, 0.0], "is a list, expected a tensor"),
    ("step", torch.zeros(2), r"has shape \(2,\), expected one element"),
    ("step", "three", "is 'three', expected a number"),
]
for key, value, message in REFUSED_ENTRIES:
    REFUSED[f"{key}={value!r}"] = (
        lambda state, key=key, value=value: state["state"][LAST].update({key: value}),
        f"{LOADED} {key} {message}",
    )


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("running", [False, True])
def test_a_state_that_does_not_fit_is_refused_before_anything_changes(name, running):
    spoil, message = REFUSED[name]

    def build() -> fusedlr.FusedAdamW:
        params = make_params(shapes=((3,), (4, 3), (5,), (2,)))
        return scheduled([{"params": params[:2]}, {"params": params[2:]}])

    source = build()
    steps(source, 0, 3)
    state = copy.deepcopy(source.state_dict())
    spoil(state)
    optimizer = build()
    if running:
        steps(optimizer, 5, 7)
    with unchanged(optimizer), pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)
    steps(optimizer, 7, 8)


def test_a_refusal_calls_a_named_parameter_by_its_name():
    source = scheduled([("a.weight", nn.Parameter(torch.ones(3)))])
    steps(source, 0, 1)
    optimizer = scheduled([("a.weight", nn.Parameter(torch.ones(2)))])
    with pytest.raises(ValueError, match=r"parameter 'a.weight': its loaded exp_avg has shape \(3,\)"):
        optimizer.load_state_dict(source.state_dict())
