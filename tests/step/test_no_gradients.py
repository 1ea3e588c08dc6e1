"""A step that updates nothing, because no parameter has a gradient, says so once."""

from __future__ import annotations

import copy

import pytest
import torch
from kit import make, make_params, recorded, scheduled, set_grads, silent, step
from snapshots import unchanged
from torch import nn

import fusedlr

NOTHING = "this step updates nothing, as no parameter of the optimizer has a gradient"


def test_an_optimizer_of_other_parameters_than_the_loss_depends_on_is_told_of_once():
    model = nn.Linear(3, 1)
    # as a model is moved or wrapped after its optimizer is built
    optimizer = fusedlr.FusedAdamW(copy.deepcopy(model).parameters(), lr=0.1)
    with recorded() as caught:
        for _ in range(3):
            model(torch.ones(2, 3)).sum().backward()
            optimizer.step()
    assert [w for w in caught if NOTHING in str(w.message)] == caught
    assert len(caught) == 1
    assert "call backward() first, and build the optimizer from the parameters" in str(caught[0].message)
    assert caught[0].filename == __file__


def test_an_optimizer_without_trainable_parameters_is_told_of():
    optimizer = make([p.requires_grad_(False) for p in make_params()])
    with pytest.warns(UserWarning, match=f"{NOTHING}: none of them requires one, so the model's trainable"):
        optimizer.step()


@pytest.mark.parametrize("groups", ["joint", "independent"])
def test_one_gradient_is_enough(groups):
    a, b, *_ = make_params()
    optimizer = scheduled([{"params": [a]}, {"params": [b]}], groups=groups)
    with silent():
        step(optimizer, 0, missing=lambda k, i: i == 0)
        step(optimizer, 1, missing=lambda k, i: i == 1)


@pytest.mark.parametrize("schedule", [None, fusedlr.constant()], ids=str)
def test_a_group_whose_parameters_are_exchanged_is_told_of_if_it_has_a_schedule(schedule):
    """As by DeepSpeed's ZeRO stage 3, which makes one step per part of a group."""
    optimizer = make(make_params(shapes=((2,),)), schedule=schedule)
    step(optimizer)
    with recorded() as caught:
        for _ in range(2):
            optimizer.param_groups[0]["params"] = make_params(shapes=((2,),))
            step(optimizer)
    told = [
        "group 0 holds none of the parameters that it had in the last step" in str(w.message) for w in caught
    ]
    assert told == ([] if schedule is None else [True])


def test_an_optimizer_without_parameters_has_none_to_tell_of():
    optimizer = make(make_params())
    optimizer.param_groups[0]["params"].clear()
    with silent():
        optimizer.step()


def test_a_warning_that_is_an_error_leaves_everything_as_it_was():
    optimizer = scheduled()
    with unchanged(optimizer), silent(), pytest.raises(UserWarning, match=NOTHING):
        optimizer.step()
    set_grads(optimizer)
    with silent():
        optimizer.step()
    assert optimizer.metrics()["step"].tolist() == [1]
