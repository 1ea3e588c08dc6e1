"""Schedules that get another length, and the numbers that a length or a share may be."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import fusedlr

PEAK = 1e-2


LONGER: list[tuple[Callable[..., fusedlr.Schedule], dict[str, Any]]] = [
    (fusedlr.constant_with_warmup, {"warmup_steps": 0.1}),
    (fusedlr.linear, {"warmup_steps": 0.1, "min_lr_ratio": 0.2}),
    (fusedlr.cosine, {"warmup_steps": 4, "min_lr": 1e-4}),
    (fusedlr.cosine_with_restarts, {"num_cycles": 3, "cycle_mult": 2.0}),
    (fusedlr.polynomial, {"power": 2.0}),
    (fusedlr.inverse_sqrt, {"warmup_steps": 4}),
    (fusedlr.cosine_with_min_lr, {"min_lr_ratio": 0.1}),
    (fusedlr.cosine_warmup_with_min_lr, {"warmup_steps": 4, "min_lr_ratio": 0.1}),
    (fusedlr.warmup_stable_decay, {"warmup_steps": 4, "decay_steps": 10}),
]


@pytest.mark.parametrize(("build", "options"), LONGER, ids=[build.__name__ for build, _ in LONGER])
def test_with_total_steps_is_the_constructor_called_again(build, options):
    shorter, longer = (build(total_steps=total, **options) for total in (40, 100))
    assert shorter.with_total_steps(100) == longer != shorter
    assert repr(shorter.with_total_steps(100)) == repr(longer)
    assert shorter.resolve(PEAK).with_total_steps(100) == longer.resolve(PEAK)
    assert pickle.loads(pickle.dumps(shorter)).with_total_steps(100) == longer


def test_the_stable_phase_takes_what_is_added():
    given = fusedlr.warmup_stable_decay(warmup_steps=2, decay_steps=3, stable_steps=5)
    assert given.with_total_steps(20) == fusedlr.warmup_stable_decay(
        warmup_steps=2, decay_steps=3, total_steps=20
    )


def test_a_schedule_from_a_file_has_no_rule():
    read = fusedlr.Schedule.from_numbers(fusedlr.cosine(5, 30).to_numbers())
    with pytest.raises(ValueError, match="there is no rule by which"):
        read.with_total_steps(60)


@pytest.mark.parametrize("share", (0.1, np.float32(0.1), np.float64(0.1)), ids=type)
def test_any_kind_of_number_is_a_share(share):
    assert fusedlr.linear(share, 1000).phases[0].end in (100, 101)
