"""A checkpoint of another schedule, peak or length is reported in words."""

from __future__ import annotations

from typing import Any

import pytest
from kit import SCHEDULE, make, make_params, scheduled, silent, steps, through_a_file, two_groups
from snapshots import unchanged

import fusedlr


def other_total(schedule: fusedlr.Schedule | None = SCHEDULE, **options: Any) -> dict[str, Any]:
    source = make(schedule=schedule, **options)
    steps(source, 0, 1)
    return source.state_dict()


@pytest.mark.parametrize(
    ("saved", "here", "message"),
    [
        (
            {"schedule": fusedlr.linear(warmup_steps=3, total_steps=20, min_lr_ratio=0.1)},
            {},
            "group 0: the checkpoint's run has 20 updates, this one 12; this optimizer's schedule is used",
        ),
        (
            {"lr": 0.3},
            {},
            "group 0: the peak is 0.3 in the checkpoint and 0.05 here; the checkpoint's is used",
        ),
        (
            {"schedule": fusedlr.linear(warmup_steps=4, total_steps=12, min_lr_ratio=0.1)},
            {},
            "group 0: at k = 1 the checkpoint's schedule gives 0.25 of the peak, this one 0.3333",
        ),
        (
            {"schedule": fusedlr.cosine(warmup_steps=3, total_steps=12, min_lr_ratio=0.1)},
            {},
            "the checkpoint's schedule gives .* of the peak, this one",
        ),
        (
            {"schedule": fusedlr.cosine(0, 12, min_lr_ratio=1.0)},
            {"schedule": fusedlr.linear(0, 12, min_lr_ratio=1.0)},
            "group 0: the checkpoint's schedule is spelled differently; this optimizer's schedule is used",
        ),
        ({}, {"schedule": None}, "group 0: the checkpoint was made with a schedule, this optimizer has none"),
    ],
)
def test_a_disagreement_is_reported_in_words(saved, here, message):
    state = through_a_file(other_total(**saved))
    optimizer = scheduled(**here)
    with pytest.warns(UserWarning, match=message) as caught:
        optimizer.load_state_dict(state)
    assert len(caught) == 1
    assert caught[0].filename == __file__


def test_every_group_that_disagrees_is_named_in_one_warning():
    source = two_groups()
    source.param_groups[1]["initial_lr"] = 0.4
    state = source.state_dict()
    state["fusedlr"]["groups"][0]["peak"] = 0.6
    with pytest.warns(UserWarning, match=r"group 0: the peak is 0.6 .*; group 1: the peak is 0.4 ") as caught:
        two_groups().load_state_dict(state)
    assert len(caught) == 1


def test_a_scope_that_is_none_here_is_reported():
    def build(**options: Any) -> fusedlr.FusedAdamW:
        return scheduled([{"params": make_params(), **options}])

    state = build(scope="one", max_grad_norm=2.0).state_dict()
    with pytest.warns(UserWarning, match="group 0: its scope is 'one' in the checkpoint, here it has none"):
        build().load_state_dict(state)
    optimizer = build(scope="one")
    with silent():
        optimizer.load_state_dict(state)
    # what is said of a scope goes with it
    assert optimizer.param_groups[0]["max_grad_norm"] == 2.0


@pytest.mark.parametrize("schedule", [SCHEDULE, None, fusedlr.linear(total_steps=10, min_lr=1e-3)], ids=str)
def test_agreement_says_nothing(schedule):
    state = through_a_file(other_total(schedule=schedule))
    with silent():
        make(schedule=schedule).load_state_dict(state)


def test_a_disagreement_made_an_error_changes_nothing():
    state = other_total(lr=0.3)
    optimizer = scheduled()
    steps(optimizer, 0, 2)
    with unchanged(optimizer), silent(), pytest.raises(UserWarning, match="the peak is"):
        optimizer.load_state_dict(state)
