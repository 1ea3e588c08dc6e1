"""`Schedule.describe` says what `lr_at` does, and when the usual advice does not hold."""

from __future__ import annotations

import re

import pytest

import fusedlr
from schedule.schedule_zoo import PEAK, ZOO


def number(text: str) -> int:
    return int(text.replace(",", ""))


@pytest.mark.parametrize("name", ZOO)
def test_numbers_are_those_of_lr_at(name: str) -> None:
    schedule = ZOO[name]
    text = schedule.describe(PEAK)
    assert text.startswith(f"{schedule!r}, peak 0.0003\n")
    # each match is a label, a step, a rate and its share of the peak
    found = re.findall(
        r"(first|highest|last|past)[^\n;]*? \(k = ([\d,]+)\): (\S+) \((\S+) % of the peak\)", text
    )
    steps = {what: number(k) for what, k, _, _ in found}
    for _, k, rate, share in found:
        lr = schedule.lr_at(number(k), PEAK)
        assert float(rate) == pytest.approx(lr, rel=1e-3)
        assert float(share) == pytest.approx(100 * lr / PEAK, rel=1e-2)
    assert steps["first"] == 0
    total = schedule.total_steps
    if total is None:
        assert set(steps) == {"first", "highest"}
        assert "no end" in text
    else:
        assert (steps["last"], steps["past"]) == (total - 1, total)
        if total <= 5000:
            rates = [schedule.lr_at(k, PEAK) for k in range(total)]
            assert steps["highest"] == rates.index(max(rates))
        tiny = schedule.lr_at(total - 1, PEAK) < 0.01 * schedule.lr_at(steps["highest"], PEAK)
        assert ("less than 1 % of the peak; for a short run consider min_lr" in text) == tiny
        assert "the end point is the sensitive part" in text


@pytest.mark.parametrize(
    ("warmup", "where"), [(180, "shorter than"), (200, "within"), (400, "within"), (420, "longer than")]
)
def test_usual_warmup(warmup: int, where: str) -> None:
    text = fusedlr.cosine(warmup, 4000).describe()
    share = f"{100 * warmup / 4000:.3g}"
    assert (
        f"warm-up: {warmup} updates, {share} % of the run; {where} the usual 200 to 400 updates (5% to 10%)"
        in text
    )


@pytest.mark.parametrize(
    ("schedule", "warmup"),
    [
        (fusedlr.constant(), None),
        (fusedlr.linear(0, 100), None),
        # these fall from the first update on, to an absolute floor
        (fusedlr.cosine(0, 100, min_lr=1e-5), None),
        (fusedlr.polynomial(0, 100), None),
        (fusedlr.linear(10, 100, warmup_from=1.0), None),
        (fusedlr.linear(0.05, 100), 5),
        (fusedlr.polynomial(10, 100), 10),
        (fusedlr.inverse_sqrt(10), 10),
        (fusedlr.constant_with_warmup(30), 30),
        (fusedlr.cosine_warmup_with_min_lr(12, 100, min_lr_ratio=0.1), 12),
        (fusedlr.cosine_with_restarts(12, 100, num_cycles=3, cycle_mult=2.0), 12),
        (fusedlr.warmup_stable_decay(8, 10, 100, warmup_type="1-sqrt"), 8),
        (fusedlr.linear(120, 100), 120),
        # a table shows its warm-up only by its values
        (fusedlr.table(fusedlr.cosine(9, 100).lr_at, 100), 9),
        (fusedlr.table([0.5, 0.1, 1.0]), None),
        (fusedlr.table([0.5]), None),
    ],
    ids=repr,
)
def test_warmup(schedule: fusedlr.Schedule, warmup: int | None) -> None:
    text = schedule.describe()
    found = re.search(r"^warm-up: ([\d,]+) updates", text, re.MULTILINE)
    assert (number(found[1]) if found else None) == warmup
    assert ("no warm-up" in text) == (warmup is None)


def test_peak_never_reached() -> None:
    remark = "the warm-up is as long as the run: the peak is never reached"
    assert remark in fusedlr.linear(100, 100).describe()
    assert remark in fusedlr.linear(120, 100).describe()
    assert remark not in fusedlr.linear(99, 100).describe()
    # this schedule is one step ahead: its last update gets the peak
    assert remark not in fusedlr.cosine_warmup_with_min_lr(100, 100, min_lr_ratio=0.1).describe()


def test_absolute_floor_without_a_peak() -> None:
    text = fusedlr.linear(10, 100, min_lr=1e-5).describe()
    assert "last update (k = 99): on the way to min_lr=1e-05, an absolute rate" in text
    # the last rate is not known without a peak, so there is no remark on it
    assert "sensitive" not in text
    assert "highest update (k = 10): 100 % of the peak" in text

    # a floor of 2 may be below the peak as long as no peak is given
    assert "min_lr=2, an absolute rate" in fusedlr.linear(10, 100, min_lr=2).describe()


def test_peak_below_the_floor() -> None:
    with pytest.raises(ValueError, match="min_lr=1e-05 is above the peak lr=1e-06"):
        fusedlr.linear(10, 100, min_lr=1e-5).describe(1e-6)


def test_whole_text() -> None:
    assert fusedlr.cosine(200, 4000, min_lr_ratio=0.1).describe(2e-4) == (
        "cosine(warmup_steps=200, total_steps=4000, min_lr_ratio=0.1), peak 0.0002\n"
        "first update (k = 0): 0 (0 % of the peak)\n"
        "highest update (k = 200): 0.0002 (100 % of the peak)\n"
        "last update (k = 3,999): 2e-05 (10 % of the peak); past it (k = 4,000): 2e-05 (10 % of the peak)\n"
        "warm-up: 200 updates, 5 % of the run; within the usual 200 to 400 updates (5% to 10%)\n"
        "the end point is the sensitive part: compare end values before comparing shapes"
    )
