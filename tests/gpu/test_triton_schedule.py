"""Triton's schedule against the fp64 definition at every step, in the interpreter; wrong ones are seen."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from schedule import schedule_parity
from schedule.schedule_zoo import PEAK, ZOO
from wrong import triton_schedules as wrong

from gpu.triton_spelling import Spelling

pytestmark = pytest.mark.interpreter


@pytest.fixture(scope="module")
def spelling(tmp_path_factory: pytest.TempPathFactory) -> Spelling:
    return Spelling(tmp_path_factory.mktemp("spelling"))


@pytest.mark.parametrize("name", ZOO)
def test_every_step_is_within_the_bounds(name: str, spelling: Spelling) -> None:
    schedule_parity.check(spelling.lr_at, ZOO[name])


@pytest.mark.parametrize("name", ("cosine", "by hand", "restarts, cycle_mult", "table"))
def test_one_step_finds_its_phase(name: str, spelling: Spelling) -> None:
    schedule = ZOO[name]
    edges = {edge + d for p in schedule.phases for edge in (p.begin, p.end) for d in (-1, 0, 1)}
    k = np.array(sorted(edges | {-(10**12), 10**12}))
    assert np.array_equal(spelling.lr_at_one(schedule, k, PEAK), spelling.lr_at(schedule, k, PEAK))


@pytest.mark.parametrize("edit", wrong.EDITS)
def test_harness_rejects(edit: str, tmp_path: Path) -> None:
    spelling = Spelling(tmp_path, wrong.EDITS[edit])
    seen = (any(schedule_parity.differences(spelling.lr_at, ZOO[name])) for name in wrong.SHOWN_BY[edit])
    assert any(seen), "the harness does not see this mistake"
