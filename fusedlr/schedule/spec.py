"""Schedules from text, as the command line takes them: `cosine` or `cosine(200, 4000).cooldown(2500, 500)`.

The text is parsed, never run: a name of ours or of transformers, and literal values. `fusedlr plot` and the
page docs/explore.md call it.
"""

from __future__ import annotations

import ast
import difflib
import functools
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fusedlr.schedule.changes import KINDS
from fusedlr.schedule.constructors import CONSTRUCTORS
from fusedlr.schedule.convert import TRANSFORMERS
from fusedlr.schedule.schedule import Schedule

# transformers' keywords that all of its schedules share; those of single ones are in `TRANSFORMERS`
_SHARED = {"num_warmup_steps": "warmup_steps", "num_training_steps": "total_steps"}
NAMES = sorted(CONSTRUCTORS)

# the length of the run in the README
TOTAL_STEPS = 4000
WARMUP = 0.05  # of the run, the least that fine-tuning guides agree on
DECAY = 0.1  # of the run, for schedules whose decay has a length of its own
FLOOR = 0.1  # of the peak, where a floor must be given


class SpecError(ValueError):
    """A text that is no schedule; the message says why, in one line."""


def split(text: str) -> list[str]:
    """The specs in `text`, which commas outside brackets separate.

    >>> split("cosine, linear(10, 100),constant")
    ['cosine', 'linear(10, 100)', 'constant']
    """
    parts, depth = [""], 0
    for character in text:
        depth += (character in "([") - (character in ")]")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts]


@dataclass(frozen=True)
class Spec:
    """A constructor and the arguments that a text gives it, under our names.

    Attributes:
        text: what was parsed, for messages.
        name: the constructor.
        given: the arguments.
        changes: names of methods that change the schedule, with their arguments, in the order of the calls.
    """

    text: str
    name: str
    given: Mapping[str, Any]
    changes: tuple[tuple[str, Mapping[str, Any]], ...] = ()

    @property
    def takes(self) -> list[str]:
        """Every argument the constructor has."""
        return list(_parameters(self.name))

    def build(self, defaults: Mapping[str, Any] | None = None) -> Schedule:
        """The schedule, with `defaults` for arguments it takes and the text does not give.

        Raises:
            SpecError: the constructor refuses its arguments.
        """
        try:
            schedule = CONSTRUCTORS[self.name](**self.filled(defaults or {}).given)
            for name, given in self.changes:
                schedule = getattr(schedule, name)(**given)
            return schedule
        # a literal may be of any type, so constructors raise more than ValueError
        except (TypeError, ValueError, OverflowError) as error:
            raise SpecError(f"{self.text}: {error}") from None

    def filled(self, defaults: Mapping[str, Any]) -> Spec:
        """The same with `defaults` for arguments it takes and does not give; its text names every argument.

        >>> parse("linear(10)").filled({"total_steps": 100}).text
        'linear(warmup_steps=10, total_steps=100)'
        """
        every = {**defaults, **self.given}
        given = {name: every[name] for name in self.takes if name in every}
        calls = [(self.name, given), *self.changes]
        text = ".".join(f"{name}({', '.join(f'{key}={x!r}' for key, x in of.items())})" for name, of in calls)
        return Spec(text, self.name, given, self.changes)


@dataclass(frozen=True)
class Defaults:
    """What a schedule gets where its text does not say; None is the usual value for the run of the README.

    Attributes:
        warmup_steps: updates of warm-up, or below 1 a share of the run.
        total_steps: updates in the run.
        decay_steps: updates of a decay that has a length of its own.
        min_lr_ratio: floor as a ratio of the peak; None is 0 where no floor must be given.
    """

    warmup_steps: float | None = None
    total_steps: int | None = None
    decay_steps: int | None = None
    min_lr_ratio: float | None = None

    def of(self, one: Spec) -> dict[str, Any]:
        """The arguments that `one` gets beside its own."""
        total = self.total_steps or TOTAL_STEPS
        warmup = WARMUP if self.warmup_steps is None else self.warmup_steps
        values: dict[str, Any] = {
            "warmup_steps": int(warmup) if float(warmup).is_integer() else warmup,
            "total_steps": total,
            "decay_steps": self.decay_steps or max(1, round(DECAY * total)),
        }
        if "min_lr" in one.given:
            # min_lr excludes min_lr_ratio
            pass
        elif self.min_lr_ratio is not None:
            values["min_lr_ratio"] = self.min_lr_ratio
        elif one.name in ("cosine_with_min_lr", "cosine_warmup_with_min_lr"):
            values["min_lr_ratio"] = FLOOR
        if "stable_steps" in one.given and self.total_steps is None:
            # the length of the run follows from its phases, so a share of warm-up is resolved here
            del values["total_steps"]
            values["warmup_steps"] = math.ceil(total * warmup) if warmup < 1 else int(warmup)
        if one.name == "table":
            # a table's values say how long the run is
            del values["total_steps"]
        return values


def parse(text: str) -> Spec:
    """What `text` says, checked as far as that goes without a value.

    Raises:
        SpecError: the text is no schedule's name or call.

    >>> parse("linear(10, num_training_steps=100)").build()
    linear(warmup_steps=10, total_steps=100)
    """
    try:
        node = ast.parse(text.strip(), mode="eval").body
    # MemoryError and RecursionError are the parser's limits on size and nesting
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise SpecError(f"{text!r} is not a name or name(argument=value, ...)") from None
    changes: list[tuple[str, Mapping[str, Any]]] = []
    while isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in KINDS:
        changes.insert(0, _change(node, node.func.attr, text))
        node = node.func.value
    call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
    if not isinstance(call.func, ast.Name):
        raise SpecError(f"{text!r} is not a name or name(argument=value, ...)")
    name = call.func.id
    if name not in NAMES:
        raise SpecError(f"{name!r} is no schedule: {_hint(name, NAMES)}")
    pairs = [(_translated(name, keyword.arg, text), keyword.value) for keyword in call.keywords]
    given = _bound(inspect.signature(CONSTRUCTORS[name]).bind_partial, call, pairs, text)
    return Spec(text, name, given, tuple(changes))


def _change(call: ast.Call, name: str, text: str) -> tuple[str, Mapping[str, Any]]:
    """The method of a schedule that a text calls, and the arguments."""
    # None stands for the schedule, which is not built yet
    bind = functools.partial(inspect.signature(getattr(Schedule, name)).bind, None)
    given = _bound(bind, call, [(keyword.arg or "**", keyword.value) for keyword in call.keywords], text)
    return name, {key: value for key, value in given.items() if key != "self"}


def _bound(
    bind: Callable[..., inspect.BoundArguments],
    call: ast.Call,
    pairs: list[tuple[str, ast.expr]],
    text: str,
) -> Mapping[str, Any]:
    """The arguments of a call by their names."""
    args = [_literal(value, text) for value in call.args]
    kwargs = {key: _literal(value, text) for key, value in pairs}
    if len(kwargs) < len(pairs):
        raise SpecError(f"{text}: an argument is given twice")
    try:
        return bind(*args, **kwargs).arguments
    except TypeError as error:
        raise SpecError(f"{text}: {error}") from None


def _literal(node: ast.expr, text: str) -> Any:
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        raise SpecError(f"{text}: {ast.unparse(node)} is not a plain value") from None


def _parameters(name: str) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(CONSTRUCTORS[name]).parameters


def _translated(name: str, key: str | None, text: str) -> str:
    """Our name of an argument, which may be given by transformers' name."""
    if key is None:
        raise SpecError(f"{text}: ** has no place here")
    parameters = _parameters(name)
    if key in parameters:
        return key
    renamed = TRANSFORMERS[name][1] if name in TRANSFORMERS else {}
    ours = {**_SHARED, **renamed}.get(key)
    if ours is None or ours not in parameters:
        raise SpecError(f"{name} has no argument {key!r}: {_hint(key, list(parameters) or ['none'])}")
    return ours


def _hint(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(known)}"
