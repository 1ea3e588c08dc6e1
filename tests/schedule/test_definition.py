"""The fp64 definition against transformers' values and against 40 digits."""

from __future__ import annotations

import json
import math
from typing import Any

import mpmath
import numpy as np
import pytest
import tolerances
import torch
from golden import make

import fusedlr
from fusedlr import Phase
from schedule import schedule_parity
from schedule.schedule_zoo import PEAK, ZOO

GOLDEN = json.loads(make.FILE.read_text())["schedules"]


def golden_id(row: dict[str, Any]) -> str:
    return f"{row['name']}-{row['num_warmup_steps']}-{row['num_training_steps']}-{row['arguments']}"


@pytest.mark.parametrize("row", GOLDEN, ids=golden_id)
def test_golden(row: dict[str, Any]) -> None:
    schedule = fusedlr.from_hf(
        row["name"], row["num_warmup_steps"], row["num_training_steps"], row["lr"], **row["arguments"]
    )
    for k, value in zip(row["steps"], row["values"], strict=True):
        difference = schedule.lr_at(k, row["lr"]) / row["lr"] - float.fromhex(value)
        assert abs(difference) <= tolerances.SCHEDULE_HF, (k, difference)


def test_golden_file_is_what_transformers_says() -> None:
    pytest.importorskip("transformers")
    made = make.make()["schedules"]
    assert len(made) == len(GOLDEN)
    for new, old in zip(made, GOLDEN, strict=True):
        assert {**new, "values": None} == {**old, "values": None}
        now, then = ([float.fromhex(value) for value in row["values"]] for row in (new, old))
        # another libm may round a cosine differently
        assert now == pytest.approx(then, rel=1e-15, abs=1e-16)


def exact(phase: Phase, k: int, table: tuple[float, ...]) -> mpmath.mpf:
    """The textbook formula of a phase in 40 digits."""
    n = phase.end - phase.origin
    e = min(max(k, phase.begin), phase.end) - phase.origin
    q, c = mpmath.mpf(e) / n, mpmath.mpf(phase.shape_param)
    if phase.shape == "table":
        return mpmath.mpf(table[int(phase.shape_param) + e]) * phase.to
    w0 = {
        "constant": lambda: mpmath.mpf(1),
        "linear": lambda: 1 - q,
        "cosine": lambda: (1 + mpmath.cos(2 * mpmath.pi * c * q)) / 2,
        "restarts": lambda: (1 + mpmath.cos(mpmath.pi * (int(c) * e % n) / n)) / 2,
        "polynomial": lambda: (1 - q) ** c,
        "inverse_sqrt": lambda: 1 / mpmath.sqrt(1 + e / c),
        "1-sqrt": lambda: 1 - mpmath.sqrt(q),
        "1-sqrt-rise": lambda: mpmath.sqrt(1 - q),
    }[phase.shape]()
    return phase.from_ * w0 + phase.to * (1 - w0)


@pytest.mark.parametrize("name", ZOO)
def test_definition_keeps_its_digits(name: str) -> None:
    schedule = ZOO[name].resolve(PEAK)
    steps = schedule_parity.steps(schedule)
    steps = steps[:: max(1, len(steps) // 150)].tolist()
    with mpmath.workdps(40):
        for k in steps:
            phase = [p for i, p in enumerate(schedule.phases) if i == 0 or p.begin <= k][-1]
            want = exact(phase, k, schedule.table)
            got = schedule.lr_at(k)
            if phase.shape == "cosine" and 2 * phase.shape_param % 1:
                allowed = tolerances.SCHEDULE_UNEVEN_FP64
            else:
                allowed = tolerances.SCHEDULE_ULPS[phase.shape] * math.ulp(want)
            assert abs(got - want) <= allowed, (k, got, float(want))
            # where the formula is 0, lr_at is exactly 0; in 40 digits a 0 is anything below 1e-38
            assert (got == 0) == (abs(want) < 1e-38), (k, got, float(want))


def test_first_update_and_edges_of_warmup() -> None:
    schedule = fusedlr.linear(warmup_steps=4, total_steps=8)
    assert [schedule.lr_at(k) for k in range(9)] == [0, 0.25, 0.5, 0.75, 1, 0.75, 0.5, 0.25, 0]
    assert fusedlr.linear(total_steps=4).lr_at(0) == 1
    assert fusedlr.linear(4, 8, warmup_from=0.5).lr_at(0) == 0.5


@pytest.mark.parametrize("warmup", [5, 8])
@pytest.mark.parametrize("build", [fusedlr.linear, fusedlr.cosine, fusedlr.cosine_with_restarts])
def test_warmup_as_long_as_the_run(build: Any, warmup: int) -> None:
    schedule = build(warmup_steps=warmup, total_steps=5, min_lr_ratio=0.25)
    assert [schedule.lr_at(k) for k in range(5)] == [k / warmup for k in range(5)]
    assert schedule.lr_at(warmup) == schedule.lr_at(10**9) == 0.25


@pytest.mark.parametrize("name", ZOO)
def test_defined_for_every_integer(name: str) -> None:
    schedule = ZOO[name]
    first, end = schedule.phases[0].begin, schedule.phases[-1].end
    assert schedule.lr_at(-(10**9)) == schedule.lr_at(first - 1) == schedule.lr_at(first)
    assert schedule.lr_at(end) == schedule.lr_at(end + 1) == schedule.lr_at(2**60)


def test_past_the_end_the_last_value_holds() -> None:
    # transformers' cosine climbs again and its polynomial divides by zero at k = T = W
    assert fusedlr.cosine(10, 100).lr_at(150) == 0
    assert fusedlr.polynomial(5, 5, lr_end=0.25).lr_at(5) == 0.25
    assert fusedlr.cosine(10, 100, num_cycles=1).lr_at(150) == 1


def test_step_and_peak_come_in_any_number_type() -> None:
    schedule = fusedlr.cosine(10, 100)
    want = schedule.lr_at(7, 0.25)
    for k in (7.0, np.int32(7), np.int64(7), torch.tensor(7)):
        assert schedule.lr_at(k, 0.25) == want
    for peak in (np.float32(0.25), torch.tensor(0.25)):
        assert schedule.lr_at(7, peak) == want


def test_restarts_with_cycle_mult() -> None:
    schedule = fusedlr.cosine_with_restarts(10, 80, num_cycles=3, cycle_mult=2.0)
    # 70 updates in the ratio 1:2:4
    assert [p.begin for p in schedule.phases] == [0, 10, 20, 40, 80]
    assert [schedule.lr_at(k) for k in (10, 20, 40, 80)] == [1, 1, 1, 0]
    assert schedule.lr_at(30) == pytest.approx(0.5, abs=1e-15)
    # lengths beyond the range of floats get the same message, not an OverflowError
    with pytest.raises(ValueError, match=r"num_cycles=9 with cycle_mult=1e\+300 leaves a cycle without"):
        fusedlr.cosine_with_restarts(total_steps=1000, num_cycles=9, cycle_mult=1e300)


def test_stable_steps_win_and_say_so() -> None:
    with pytest.warns(
        UserWarning, match="make 30 updates, not total_steps=100: stable_steps is used"
    ) as caught:
        schedule = fusedlr.warmup_stable_decay(10, 10, 100, stable_steps=10)
    # the warning points at the caller
    assert caught[0].filename == __file__
    assert schedule.total_steps == 100
    assert [schedule.lr_at(k) for k in (19, 30, 99)] == [1, 0, 0]
