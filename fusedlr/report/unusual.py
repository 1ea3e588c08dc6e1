"""What is unusual in a run, in words. A function looks for one thing and yields a sentence for each case."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np

from fusedlr.report.layers import Place, median, movement, places
from fusedlr.report.runs import Run
from fusedlr.schedule.describe import warmup_steps

# rates are kept in fp32, and kernels are within 64 ulp or 5e-7 of the peak of the fp64 definition
RATE_ERROR, PEAK_ERROR = 1e-5, 1e-6
# a share or a trend of fewer updates says little
FEW = 20
# of the updates: a limit above the usual norm clips a few in a hundred
CLIPS = 0.9
# of the steps: a loss scaler that tries a higher scale skips one step in 2,000
SKIPS = 0.01
# skipped one after the other: as many as the optimizer warns of
IN_A_ROW = 10
# standard deviations of Mann and Kendall's sum: one chance in 700 without a trend
TREND = 3.0
# a norm that falls by less than a tenth between two windows may as well be flat
FALL = 0.9
# times the norm at the beginning: noise of batches does not make it in the median of a fifth of the run
GROWTH = 3.0
# updates in which a run without warm-up is at its most fragile, and what its norm rises to in them, times the
# first norm: 7 to 44 in the demo's quick model without one, up to 3 with one or at lower rates (2026-11)
FIRST, JUMP = 10, 5.0
# Of itself a matrix moves in an update by about its rate over the size of its elements. A of LoRA begins with
# 1/sqrt(3 n), n its inputs: 2 % at a rate of 2e-4 and 4,096 inputs. In the demo's quick model runs that learn
# stay below 8 % after a warm-up, and those that the rate ruins are above 10 % in 16 updates or more (2026-11)
STRIDE, STEADY = 0.1, 0.05
# Iglewicz and Hoaglin (1993): a modified z-score above 3.5 is an outlier. Layers whose ratios are all alike
# would have outliers that nobody can see, so three times the ratio of the others is asked for too
OUTLIER, FACTOR = 3.5, 3.0
# layers: the median of fewer is moved by the one that is looked at
SIBLINGS = 5
# cases of one kind that are named; the others are counted
NAMED = 4


def unusual(run: Run) -> list[str]:
    """A sentence for everything that this file looks for and finds."""
    looks = (_rates, _limits, _first, _strides, _warmups, _growth, _skips, _applied, _still, _layers)
    return [words for look in looks for words in look(run)]


def _of(run: Run, scope: int) -> str:
    label = run.scope_label(scope)
    return f" of {label}" if label else ""


def _rates(run: Run) -> Iterator[str]:
    """Rates that are not those of the schedule."""
    used, groups = run.recording["lr"].astype(np.float64), run.recording["groups"]
    peaks = np.array([group.peak for group in groups])
    # the rate of a skipped step was not used
    used = np.where(run.skipped[:, run.scope_of_group], np.nan, used)
    with np.errstate(invalid="ignore"):
        off = np.abs(used - run.planned) > RATE_ERROR * run.planned + PEAK_ERROR * peaks
    cases: dict[bytes, list[int]] = {}
    for column in np.flatnonzero(off.any(0)).tolist():
        cases.setdefault(off[:, column].tobytes(), []).append(column)
    for columns in cases.values():
        column = columns[0]
        row = int(off[:, column].argmax())
        names = ", ".join(groups[i].name for i in columns)
        yield (
            f"the rate of {names} was not the planned one in {off[:, column].sum():,} of {len(off):,} steps, "
            f"first in step {run.steps[row]:,}: {used[row, column]:.3g} where the schedule gives "
            f"{run.planned[row, column]:.3g}"
        )


def _limits(run: Run) -> Iterator[str]:
    """A limit that clips nearly every update."""
    coef, limits = run.recording.by_scope("coef"), run.recording.by_scope("limit")
    for scope in range(coef.shape[1]):
        made = run.made[:, scope]
        norms, clipped = run.norm[made, scope], coef[made, scope] < 1
        if len(norms) >= FEW and clipped.mean() >= CLIPS:
            yield (
                f"the limit{_of(run, scope)} clips nearly every update, {clipped.sum():,} of {len(norms):,}: "
                f"it is {np.median(limits[made, scope]):.3g}, and the median norm {np.median(norms):.3g}. "
                f"A limit of {np.quantile(norms, 0.95):.3g} would clip the highest twentieth alone"
            )


def _first(run: Run) -> Iterator[str]:
    """A norm that jumps in the first updates of a run that has hardly a warm-up."""
    for scope in range(run.norm.shape[1]):
        columns, warmup = _scheduled(run, scope)
        if not columns or warmup >= FIRST:
            continue
        k, norm, made = run.recording["k"][:, columns[0]], run.norm[:, scope], run.made[:, scope]
        begin = np.flatnonzero(made & (k == 0))
        rows = np.flatnonzero(made & (k > 0) & (k <= FIRST))
        if not len(begin) or not len(rows):
            continue
        first, row = norm[begin[0]], rows[norm[rows].argmax()]
        if norm[row] > JUMP * first:
            has = f"a warm-up of {warmup:,}" if warmup else "no warm-up"
            yield (
                f"the norm{_of(run, scope)} jumps in the first updates, from {first:.3g} to {norm[row]:.3g} "
                f"in step {run.steps[row]:,}, and the schedule has {has}: with a longer one the moments "
                "settle before the rate is high"
            )


def _scheduled(run: Run, scope: int) -> tuple[list[int], int]:
    """The columns of the scope's groups that have a schedule, and their longest warm-up in updates."""
    groups = run.recording["groups"]
    columns = [i for i, of in enumerate(run.scope_of_group) if of == scope and groups[i].schedule is not None]
    return columns, max((warmup_steps(groups[i].schedule) for i in columns), default=0)


def _strides(run: Run) -> Iterator[str]:
    """Matrices that move by much of themselves in many updates, which those of a run that learns do not."""
    found, ends = places(run.recording["names"]), run.recording["names"]
    chosen = [i for i, place in enumerate(found) if place.matrix.startswith("A")]
    # without LoRA all matrices begin with their full size
    what = "A matrices" if chosen else "weights"
    chosen = chosen or [i for i, place in enumerate(found) if not place.matrix and ends[i].endswith("weight")]
    moved = median(movement(run.recording)[:, chosen], 1)
    much = moved > STRIDE
    if much.sum() >= FEW / 2:
        row = int(np.nanargmax(moved))
        yield (
            f"the {what} move by more than {STRIDE:.0%} of themselves in {much.sum():,} updates, most in "
            f"step {run.steps[row]:,}, by {moved[row]:.0%}: the rate is too high. With "
            f"{STEADY / moved[row]:.2g} times the rate that would be {STEADY:.0%}"
        )


def _warmups(run: Run) -> Iterator[str]:
    """A warm-up that ends while the norm still falls."""
    if any(_strides(run)):
        # the norm falls because the rate has done its harm
        return
    seen = set()
    for column, group in enumerate(run.recording["groups"]):
        warmup = 0 if group.schedule is None else warmup_steps(group.schedule)
        scope = run.scope_of_group[column]
        if warmup == 0 or (scope, warmup) in seen:
            continue
        seen.add((scope, warmup))
        k, norm = run.recording["k"][:, column], run.norm[:, scope]

        def between(low: float, high: float, k: Any = k, norm: Any = norm, scope: int = scope) -> Any:
            return norm[run.made[:, scope] & (k >= low) & (k < high)]

        before, late, after = (
            between(warmup / 2, warmup),
            between(3 * warmup / 4, warmup),
            between(warmup, 3 * warmup / 2),
        )
        if min(len(before), len(after)) < FEW / 2 or trend(before) > -TREND:
            continue
        if np.median(after) < FALL * np.median(late):
            yield (
                f"the warm-up ends while the norm{_of(run, scope)} still falls: it is {np.median(late):.3g} "
                f"before update {warmup:,}, where the warm-up ends, and {np.median(after):.3g} in the "
                f"{len(after):,} updates after it. A longer warm-up meets the peak with a settled norm"
            )


def trend(values: Any) -> float:
    """The sum of Mann and Kendall over its standard deviation: far below 0 where the values fall.

    Takes at most 400 of them, evenly spaced, as every pair is compared.

    >>> trend(np.arange(10.0)) > 3 > -3 > trend(-np.arange(10.0))
    True
    """
    values = values[:: -(-len(values) // 400)]
    n = len(values)
    pairs = np.sign(values[None, :] - values[:, None])
    return float(np.triu(pairs).sum() / np.sqrt(n * (n - 1) * (2 * n + 5) / 18))


def _growth(run: Run) -> Iterator[str]:
    """A norm that grows after the warm-up."""
    for scope in range(run.norm.shape[1]):
        columns = [i for i, of in enumerate(run.scope_of_group) if of == scope]
        warmup = _scheduled(run, scope)[1]
        risen = (run.recording["k"][:, columns] >= warmup).all(1)
        norms = run.norm[run.made[:, scope] & risen, scope]
        fifth = len(norms) // 5
        if fifth < FEW / 2:
            continue
        first, last = np.median(norms[:fifth]), np.median(norms[-fifth:])
        if last > GROWTH * first:
            yield (
                f"the norm{_of(run, scope)} has grown from {first:.3g} to {last:.3g} since the warm-up: "
                "with a rate that is too high it often does"
            )


def _skips(run: Run) -> Iterator[str]:
    """Many skipped steps, and the tensors that had the gradients that were not finite."""
    for scope in range(run.skipped.shape[1]):
        skipped = run.skipped[:, scope]
        row, longest, first = 0, 0, 0
        for i, one in enumerate(skipped.tolist()):
            row = row + 1 if one else 0
            if row > longest:
                longest, first = row, i - row + 1
        many = skipped.sum() >= FEW / 2 and skipped.mean() > SKIPS
        if not many and longest < IN_A_ROW:
            continue
        words = (
            f"{skipped.sum():,} of {len(skipped):,} steps{_of(run, scope)} were skipped, "
            f"{longest:,} of them in a row from step {run.steps[first]:,}"
        )
        bad = ~np.isfinite(run.recording["tensor_grad_norm"][skipped])
        # a tensor that was not there in any step is NaN in all of them
        bad &= np.isfinite(run.recording["tensor_grad_norm"]).any(0)
        if bad.any():
            tensor, times = Counter(np.nonzero(bad)[1].tolist()).most_common(1)[0]
            words += f"; the gradient of {run.names[tensor]} was not finite in {times:,} of these"
        yield words


def _applied(run: Run) -> Iterator[str]:
    """Gradients that were not finite and were applied."""
    for scope in range(run.norm.shape[1]):
        if not np.isfinite(run.norm[:, scope]).any():
            continue
        # NaN is also the norm of a scope that took no part, and then it has no rate
        columns = [i for i, of in enumerate(run.scope_of_group) if of == scope]
        took_part = np.isfinite(run.recording["lr"][:, columns]).any(1)
        bad = ~np.isfinite(run.norm[:, scope]) & ~run.skipped[:, scope] & took_part
        if bad.any():
            yield (
                f"the norm{_of(run, scope)} was not finite in {bad.sum():,} steps that were made, first "
                f"in step {run.steps[np.argmax(bad)]:,}: parameters are inf or nan since"
            )


def _still(run: Run) -> Iterator[str]:
    """Tensors that never move although others do."""
    moves = run.recording["tensor_update_ratio"] > 0
    if moves.any(1).sum() < 3 or moves.any(0).all():
        return
    still = [run.names[i] for i in np.flatnonzero(~moves.any(0))]
    yield f"{len(still):,} of {moves.shape[1]:,} tensors never moved: {_named(still)}"


def _layers(run: Run) -> Iterator[str]:
    """Layers whose tensors move far more or far less of themselves than those at the same place in others."""
    if not run.recording["names"]:
        return
    size = median(movement(run.recording), 0)
    siblings: dict[tuple[str, str, str], list[int]] = {}
    found = places(run.recording["names"])
    for i, place in enumerate(found):
        if place.numbered and np.isfinite(size[i]):
            siblings.setdefault(place.kind, []).append(i)
    # how many times as much as its siblings each outlier moves, by layer and matrix
    far: dict[str, list[tuple[float, Place]]] = {}
    for tensors in siblings.values():
        if len(tensors) < SIBLINGS:
            continue
        logs = np.log(size[tensors])
        from_middle = logs - np.median(logs)
        # 0.6745 makes the median of distances a standard deviation where they are normal
        score = 0.6745 * np.abs(from_middle) / max(np.median(np.abs(from_middle)), 1e-12)
        for i in np.flatnonzero((score > OUTLIER) & (np.abs(from_middle) > np.log(FACTOR))).tolist():
            place = found[tensors[i]]
            far.setdefault(place.row, []).append((float(np.exp(from_middle[i])), place))
    rows = sorted(far, key=lambda row: -max(abs(np.log(factor)) for factor, _ in far[row]))
    for row in rows[:NAMED]:
        factors = [factor for factor, _ in far[row]]
        factor = max(factors, key=lambda one: abs(np.log(one)))
        times = f"{factor:.3g} times as much" if factor > 1 else f"1/{1 / factor:.3g} as much"
        modules = _named(list(dict.fromkeys(place.module for _, place in far[row] if place.module)))
        yield (
            f"{row} is far from the other layers: it moves up to {times} of itself in an update as they do"
            + (f" ({modules})" if modules else "")
        )
    if len(rows) > NAMED:
        yield f"{len(rows) - NAMED:,} more layers are far from the others: {_named(rows[NAMED:])}"


def _named(names: list[str]) -> str:
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more:,} more" if more > 0 else "")
