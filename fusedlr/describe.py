"""A schedule in words: what its first, peak and last update get, and whether the usual advice holds."""

from __future__ import annotations

from fusedlr.schedule import Schedule

# warm-up shares that fine-tuning guides agree on
_USUAL_WARMUP = (0.05, 0.10)
# a last update below this share of the peak hardly moves the weights
_TINY_END = 0.01


def _share(x: float) -> str:
    return f"{100 * x:.3g} %"


def _step(k: int) -> str:
    return f"{k:,}"


def warmup_steps(schedule: Schedule) -> int:
    """Updates before the peak is first reached while the schedule rises from its first value."""
    first = schedule.phases[0]
    rises = not isinstance(first.to, float) or first.to > first.from_  # type: ignore[operator]
    if first.shape in ("constant", "table") or not rises:
        return 0
    return schedule.phases[1].begin if len(schedule.phases) > 1 else first.end


def describe(schedule: Schedule, peak: float | None = None) -> str:
    """See `Schedule.describe`."""
    total = schedule.total_steps
    # without a peak an absolute level cannot be compared with it
    known = schedule.resolve(peak) if peak is not None else schedule
    unit = peak if peak is not None else 1.0

    def rate(k: int) -> str:
        ratio = known.lr_at(k)
        return (
            f"{ratio * unit:.4g} ({_share(ratio)} of the peak)"
            if peak is not None
            else f"{_share(ratio)} of the peak"
        )

    lines = [f"{schedule!r}" + (f", peak {peak:g}" if peak is not None else "")]
    lines.append(f"first update (k = 0): {rate(0)}")
    warmup = warmup_steps(schedule)
    last = total - 1 if total else None
    horizon = min(total or warmup + 1, 100_000)
    top = max(range(horizon), key=known.lr_at)
    lines.append(f"highest update (k = {_step(top)}): {rate(top)}")
    if last is not None:
        lines.append(
            f"last update (k = {_step(last)}): {rate(last)}; from k = {_step(total)} on: {rate(total)}"
        )
    else:
        lines.append("no end: it is defined for any number of updates")
    low, high = _USUAL_WARMUP
    if warmup == 0:
        lines.append("no warm-up: the first update already gets the full first value")
    elif total is None:
        lines.append(f"warm-up: {_step(warmup)} updates")
    else:
        share = warmup / total
        usual = (
            f"{_step(round(low * total))} to {_step(round(high * total))} updates ({low:.0%} to {high:.0%})"
        )
        where = "within" if low <= share <= high else "shorter than" if share < low else "longer than"
        lines.append(
            f"warm-up: {_step(warmup)} updates, {_share(share)} of the run; {where} the usual {usual}"
        )
        if warmup >= total:
            lines.append("the warm-up is as long as the run: the peak is never reached")
    if last is not None and known.lr_at(last) < _TINY_END * max(known.lr_at(top), 1e-300):
        lines.append(
            "the end point is the sensitive part: the last update gets less than 1 % of the peak; "
            "for a short run consider min_lr or min_lr_ratio"
        )
    elif last is not None:
        lines.append("the end point is the sensitive part: compare end values before comparing shapes")
    return "\n".join(lines)
