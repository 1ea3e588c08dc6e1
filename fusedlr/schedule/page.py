"""What the page docs/explore.md shows: from the text of its address to numbers and words, as plain data.

The page runs it in the browser, so it needs neither torch nor numpy; `fusedlr plot --web` writes the address.
"""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any
from urllib.parse import parse_qsl, urlencode

from fusedlr import arguments
from fusedlr.schedule import curves, readings, spec
from fusedlr.schedule.changes import FALLS
from fusedlr.schedule.constructors import CONSTRUCTORS, WARMUP_TYPES, total_steps
from fusedlr.schedule.describe import highest, share_text, warmup_steps
from fusedlr.schedule.schedule import Schedule
from fusedlr.schedule.snippets import snippets

# each has a colour
MOST = len(curves.COLOURS)
# the run of the README
PEAK = 2e-4
FIRST = f"cosine(warmup_steps=200, total_steps={spec.TOTAL_STEPS})"
UPDATES = f"1, 200, {spec.TOTAL_STEPS}"
# the arguments of `fusedlr.total_steps` and what the page begins with
RUN = {"examples": "10000", "batch_size": "4", "accumulation": "8", "epochs": "3", "world_size": "1"}


@dataclass(frozen=True)
class Slider:
    """The range of a slider; an end may be the `total_steps` of the schedule or the `peak`.

    Attributes:
        low: the least value.
        high: the largest.
        step: between two positions; with `log` the exponent of 10 moves by it.
        log: whether equal ways are equal factors.
    """

    low: float
    high: float | str
    step: float
    log: bool = False


_RATIO = Slider(0, 1, 0.01)
_STEPS = Slider(0, "total_steps", 1)
SLIDERS = {
    "peak": Slider(1e-6, 1e-1, 0.02, log=True),
    "total_steps": Slider(10, 100_000, 0.02, log=True),
    "warmup_steps": _STEPS,
    "decay_steps": _STEPS,
    "stable_steps": _STEPS,
    "timescale": Slider(1, "total_steps", 1),
    "min_lr_ratio": _RATIO,
    "min_lr": Slider(0, "peak", 0.01),
    "lr_end": Slider(0, "peak", 0.01),
    "warmup_from": _RATIO,
    "warmup_lr_rate": _RATIO,
    "num_cycles": Slider(0.5, 10, 0.5),
    "cycle_mult": Slider(0.5, 4, 0.1),
    "power": Slider(0.1, 6, 0.1),
}
_CHOICES: dict[str, Iterable[str]] = {"warmup_type": WARMUP_TYPES, "decay_type": FALLS}


@dataclass(frozen=True)
class Address:
    """What the page is asked to show, as texts: they may be wrong, and the page says how.

    Attributes:
        schedules: calls of constructors, as `spec` reads them.
        peak: peak learning rate.
        updates: steps to tell the rates of, with commas between them.
        readings: names of `readings.READINGS` to draw.
        run: what `total_steps` is computed from.
        unknown: parts that mean nothing.
    """

    schedules: tuple[str, ...] = (FIRST,)
    peak: str = f"{PEAK:g}"
    updates: str = UPDATES
    readings: tuple[str, ...] = ()
    run: tuple[tuple[str, str], ...] = tuple(RUN.items())
    unknown: tuple[str, ...] = ()

    @staticmethod
    def parse(fragment: str) -> Address:
        """The address of a page from what stands behind its `#`.

        >>> Address.parse("#schedule=linear(10,+100)&peak=1e-3").schedules
        ('linear(10, 100)',)
        """
        pairs = parse_qsl(fragment.removeprefix("#"), keep_blank_values=True)
        last = dict(pairs)
        known = {"schedule", "peak", "updates", "reading", *RUN}
        standard = Address()
        return Address(
            tuple(value for name, value in pairs if name == "schedule") or standard.schedules,
            last.get("peak", standard.peak),
            last.get("updates", standard.updates),
            tuple(dict.fromkeys(value for name, value in pairs if name == "reading")),
            tuple((name, last.get(name, value)) for name, value in RUN.items()),
            tuple(name for name in last if name not in known),
        )

    def fragment(self) -> str:
        """What stands behind the `#`; what the page begins with is left out.

        >>> Address(("linear(10, 100)",)).fragment()
        'schedule=linear(10,+100)&peak=0.0002'
        """
        pairs = [("schedule", text) for text in self.schedules]
        pairs += [("updates", self.updates)] if self.updates != UPDATES else []
        pairs += [("reading", name) for name in self.readings]
        pairs += [(name, text) for name, text in self.run if text != RUN[name]]
        # the peak comes last: programs that recognize links in a text leave out a bracket at the end of one
        return urlencode([*pairs, ("peak", self.peak)], safe="(),=[]")


def form() -> dict[str, Any]:
    """What the page needs to know before anything is asked: constructors, arguments, sliders, colours."""
    return {
        "constructors": {name: _constructor(name, build) for name, build in CONSTRUCTORS.items()},
        "sliders": {name: asdict(slider) for name, slider in SLIDERS.items()},
        "readings": {name: f"{one.name} ({one.used_by})" for name, one in readings.READINGS.items()},
        "run": _documented(total_steps),
        "colours": curves.COLOURS,
        "most": MOST,
    }


def _constructor(name: str, build: Callable[..., Schedule]) -> dict[str, Any]:
    doc = inspect.getdoc(build) or ""
    said = _documented(build)
    fields = []
    for argument, parameter in inspect.signature(build).parameters.items():
        default = parameter.default
        fields.append(
            {
                "name": argument,
                "help": said.get(argument, ""),
                "default": "" if default in (None, inspect.Parameter.empty) else repr(default),
                "choices": {value: repr(value) for value in _CHOICES.get(argument, ())},
            }
        )
    return {
        "summary": doc.partition("\n\n")[0].replace("\n", " "),
        "fields": fields,
        "start": _literals(_standard(spec.parse(name)).given),
    }


def _standard(one: spec.Spec) -> spec.Spec:
    """A constructor without arguments gets those that `fusedlr plot` gives it."""
    if one.given:
        return one
    return one.filled({**spec.Defaults().of(one), "fn": [1.0, 0.5, 0.25]})


def _literals(given: Mapping[str, Any]) -> dict[str, str]:
    return {name: repr(value) for name, value in given.items()}


def _documented(function: Callable[..., Any]) -> dict[str, str]:
    """Arguments and what the docstring says of them."""
    block = re.search(r"^Args:\n((?: {4}.*\n|\n)+)", (inspect.getdoc(function) or "") + "\n", re.M)
    lines = re.findall(r"^ {4}(\w+): (.*(?:\n {8,}.*)*)", block[1] if block else "", re.M)
    return {name: re.sub(r"\s+", " ", text) for name, text in lines}


def show(fragment: str) -> dict[str, Any]:
    """Everything that the page shows for an address; what is wrong with a part of it is among it, in words.

    Args:
        fragment: what stands behind the `#` of the address.
    """
    address = Address.parse(fragment)
    problems = {name: f"the address has a part {name!r} that means nothing" for name in address.unknown}
    peak = _tried(problems, "peak", lambda: arguments.positive("peak", _number(address.peak)))
    asked = _tried(problems, "updates", lambda: _steps(address.updates)) or []
    if len(address.schedules) > MOST:
        problems["schedules"] = f"{len(address.schedules)} schedules are more than the {MOST} that are drawn"
    # words and shares are told without a peak too; an absolute floor is then compared with the usual one
    used = PEAK if peak is None else peak
    shown = [_Shown(text, used) for text in address.schedules[:MOST]]
    chosen = [readings.READINGS[name] for name in address.readings if name in readings.READINGS]
    return {
        "fragment": address.fragment(),
        "problems": problems,
        "peak": used,
        "fields": {"peak": address.peak, "updates": address.updates, **dict(address.run)},
        "readings": list(address.readings),
        "total_steps": _tried(problems, "run", lambda: _total_steps(address.run)),
        "schedules": [one.data() for one in shown],
        "rows": _rows(shown, asked),
        **_curves(shown, chosen, used),
    }


def _tried(problems: dict[str, str], name: str, compute: Callable[[], Any]) -> Any:
    """The value, or None and a problem under that name."""
    try:
        return compute()
    except (TypeError, ValueError, OverflowError) as error:
        problems[name] = str(error)
        return None


def _number(text: str) -> Any:
    """A number if the text is one, else the text, for the check that refuses it to show."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def _steps(text: str) -> list[int]:
    return [arguments.integer("k", _number(part)) for part in re.split(r"[,;\s]+", text) if part]


def _total_steps(run: Iterable[tuple[str, str]]) -> int:
    return total_steps(**{name: _number(text) for name, text in run})


class _Shown:
    """One schedule of the page: its call, and what it builds or the message that says why it does not."""

    def __init__(self, text: str, peak: float) -> None:
        self.text, self.peak = text, peak
        self.one: spec.Spec | None = None
        # as its call says, and with its absolute levels as shares of the peak
        self.built: Schedule | None = None
        self.schedule: Schedule | None = None
        self.problem = ""
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            try:
                self.one = _standard(spec.parse(text))
                # a resolved schedule gives the same rates as one that resolves itself at every update
                self.built = self.one.build()
                self.schedule = self.built.resolve(peak)
            except ValueError as error:
                self.problem = str(error)
        self.warned = [str(warning.message) for warning in warned]

    def rate(self, k: int) -> str:
        assert self.schedule is not None
        text = f"{self.schedule.lr_at(k, self.peak):.6g} ({share_text(self.schedule.lr_at(k))})"
        total = self.schedule.total_steps
        return f"{text}, past the end" if total is not None and k >= total else text

    def data(self) -> dict[str, Any]:
        data: dict[str, Any] = {
            "text": self.text if self.one is None else self.one.text,
            "name": "" if self.one is None else self.one.name,
            "given": _literals({} if self.one is None else self.one.given),
            "problem": self.problem,
            "words": [],
        }
        if self.one is None or self.built is None or self.schedule is None:
            return data
        total = self.schedule.total_steps
        return data | {
            "words": [*self.warned, *self.built.describe(self.peak).splitlines()],
            "readings": {
                name: one.consequence(self.schedule) if readings.applies(self.schedule) else ""
                for name, one in readings.READINGS.items()
            },
            "warmup_steps": warmup_steps(self.schedule),
            "total_steps": total,
            "half": _of_length(self.built, total // 2 if total else None),
            "double": _of_length(self.built, 2 * total if total else None),
            "snippets": snippets(self.one, self.built, self.peak),
        }


def _of_length(schedule: Schedule, total: int | None) -> str:
    """The call that gives the same schedule over another run; empty where there is none."""
    try:
        return "" if total is None else repr(schedule.with_total_steps(total))
    except ValueError:
        return ""


def _rows(shown: list[_Shown], asked: list[int]) -> list[dict[str, Any]]:
    """The table: first, highest, last and other updates, a cell for every schedule."""

    def row(label: str, cell: Callable[[_Shown, Schedule], str]) -> dict[str, Any]:
        return {"label": label, "cells": [cell(s, s.schedule) if s.schedule else "–" for s in shown]}

    def top(s: _Shown, schedule: Schedule) -> str:
        k = highest(schedule)
        return f"{s.rate(k)} at k = {k}"

    def last(s: _Shown, schedule: Schedule) -> str:
        total = schedule.total_steps
        return "no end" if total is None else f"{s.rate(total - 1)} at k = {total - 1}"

    def warmup(s: _Shown, schedule: Schedule) -> str:
        steps, total = warmup_steps(schedule), schedule.total_steps
        share = "" if total is None else f", {share_text(steps / total)} of the run"
        return f"{steps} updates{share}"

    def at(k: int) -> Callable[[_Shown, Schedule], str]:
        return lambda s, _: s.rate(k)

    return [
        row("first update, k = 0", at(0)),
        row("highest update", top),
        row("last update", last),
        row("warm-up", warmup),
        *(row(f"update k = {k}", at(k)) for k in asked),
    ]


def _curves(shown: list[_Shown], chosen: list[readings.Reading], peak: float) -> dict[str, Any]:
    """Steps, and for every curve its rates at all of them."""
    good = {i: s.schedule for i, s in enumerate(shown) if s.schedule is not None}
    if not good:
        return {"steps": [], "curves": []}
    total = curves.length({str(i): schedule for i, schedule in good.items()})
    steps = sorted({k for schedule in good.values() for k in curves.steps(schedule, total)})
    drawn = []
    for i, schedule in good.items():
        rates = [schedule.lr_at(k, peak) for k in steps]
        drawn.append({"schedule": i, "label": shown[i].data()["text"], "dashed": False, "rates": rates})
        for reading in chosen:
            if readings.applies(schedule):
                ratio = reading.of(schedule)
                rates = [peak * ratio(k) for k in steps]
                drawn.append({"schedule": i, "label": reading.name, "dashed": True, "rates": rates})
    return {"steps": steps, "curves": drawn}
