"""Every check of a value that a user passed; each error names the argument and shows the value.

Nothing of the package is imported here, and no torch: a tensor is known by its method `numel`. Whether
something is a `Schedule` is checked by `fusedlr.schedule.check_schedule`.
"""

from __future__ import annotations

import argparse
import math
import operator
from collections.abc import Callable, Iterable
from numbers import Real
from typing import Any, TypeVar

_T = TypeVar("_T")


def integer(name: str, value: Any) -> int:
    """A whole number of any type but bool, else ValueError.

    >>> integer("k", 3.0)
    3
    """
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool):
        raise ValueError(f"{name}={value!r} is not an integer")
    try:
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{name}={value!r} is not an integer") from None


def count(name: str, value: Any, at_least: int = 0) -> int:
    """A whole number of at least `at_least`, else ValueError."""
    whole = integer(name, value)
    if whole < at_least:
        raise ValueError(f"{name}={value!r} must be at least {at_least}")
    return whole


def non_negative(name: str, value: Any) -> float:
    """A finite number >= 0 of any type that `float` takes, else ValueError; bools and texts are refused."""
    if isinstance(value, (bool, str)):
        raise ValueError(f"{name}={value!r} is not a number")
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name}={value!r} is not a number") from None
    if not (math.isfinite(number) and number >= 0):
        raise ValueError(f"{name}={value!r} must be a finite number >= 0")
    return number


def positive(name: str, value: Any) -> float:
    """A finite number above 0, else ValueError."""
    number = non_negative(name, value)
    if number == 0:
        raise ValueError(f"{name}={value!r} must be above 0")
    return number


def ratio(name: str, value: Any) -> float:
    """A number in [0, 1], else ValueError."""
    number = non_negative(name, value)
    if number > 1:
        raise ValueError(f"{name}={value!r} must be a ratio in [0, 1]")
    return number


def plain_number(name: str, value: Any, *, above_zero: bool = False) -> None:
    """A finite number of a type that is a number, >= 0 or above 0, else ValueError; tensors are refused."""
    fits = isinstance(value, Real) and math.isfinite(value)
    if not (fits and (float(value) > 0 if above_zero else float(value) >= 0)):
        raise ValueError(f"{name}={value!r} must be a finite number {'above' if above_zero else '>='} 0")


def choice(name: str, value: _T, choices: Iterable[_T], show: Callable[[Any], str] = repr) -> _T:
    """One of `choices`, else ValueError, which lists them as `show` writes them."""
    choices = tuple(choices)
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown, expected one of {', '.join(map(show, choices))}")
    return value


def number(
    kind: type, low: float, high: float = math.inf, above: bool = False
) -> Callable[[str], int | float]:
    """An argparse type: a finite `kind` from `low` (exclusive if `above`) to `high`.

    >>> number(int, 1)("3")
    3
    """

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            noun = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {noun}") from None
        if not math.isfinite(value) or value < low or value > high or (above and value == low):
            limit = f"above {low}" if above else f"at least {low}"
            raise argparse.ArgumentTypeError(f"{text} is out of range: must be {limit} and at most {high:g}")
        return value

    return parse


def total_steps(value: Any) -> int | None:
    """The number of updates in the run, or None, else ValueError."""
    return None if value is None else count("total_steps", value, at_least=1)


def required_total_steps(caller: str, value: Any) -> int:
    """The number of updates in the run, else ValueError; `caller` is what cannot do without."""
    if value is None:
        raise ValueError(f"{caller} needs total_steps, the number of updates in the run")
    return count("total_steps", value, at_least=1)


def warmup_steps(value: Any, total_steps: int | None) -> int:
    """Updates of warm-up, else ValueError; below 1 a share of the run, rounded up as the HF Trainer does.

    >>> warmup_steps(0.03, 110)
    4
    """
    # True is not below 1, so a bool is refused by `count`
    if isinstance(value, Real) and 0 < float(value) < 1:
        if total_steps is None:
            raise ValueError(f"warmup_steps={value!r} is a ratio and needs total_steps")
        return math.ceil(total_steps * float(value))
    return count("warmup_steps", value)


def max_grad_norm(value: Any) -> float | None:
    """None or a float above 0 (inf measures the norm and never clips), else ValueError."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, Real) or not float(value) > 0:
        raise ValueError(f"max_grad_norm={value!r} must be a number above 0, or None for no clipping")
    return float(value)


def betas(value: Any) -> tuple[float, float]:
    """Two floats, else ValueError."""
    try:
        b1, b2 = (float(b) for b in value)
    except (TypeError, ValueError):
        raise ValueError(f"betas={value!r} must be two numbers") from None
    return b1, b2


def hyperparameters(group: dict[str, Any]) -> None:
    """`lr`, `eps`, `weight_decay` and `betas` of a param group are in range, else ValueError."""
    lr = group["lr"]
    if _is_tensor(lr) and lr.numel() != 1:
        raise ValueError(f"lr has shape {tuple(lr.shape)}, a tensor lr must have one element")
    for name in ("lr", "eps", "weight_decay"):
        value = group[name]
        if not ((isinstance(value, Real) or _is_tensor(value)) and float(value) >= 0):
            raise ValueError(f"{name}={value!r} must be a number >= 0")
    for i, b in enumerate(betas(group["betas"])):
        if not 0 <= b < 1:
            raise ValueError(f"betas[{i}]={b!r} must be in [0, 1)")


def duplicates(params: list[Any]) -> None:
    """No parameter, named or not, is in the list twice, else ValueError."""
    seen: dict[int, int] = {}
    for i, item in enumerate(params):
        p = item[1] if isinstance(item, tuple) else item
        if id(p) in seen:
            name = f" ({item[0]!r})" if isinstance(item, tuple) else ""
            raise ValueError(
                f"params[{i}]{name} is the same tensor as params[{seen[id(p)]}]: it would be updated twice"
            )
        seen[id(p)] = i


def one_element(name: str, value: Any) -> Any:
    """What a `GradScaler` leaves on the optimizer: None, a number, or a tensor of one element."""
    if _is_tensor(value) and value.numel() != 1:
        raise ValueError(f"{name} has shape {tuple(value.shape)}, expected one element")
    return value


def _is_tensor(value: Any) -> bool:
    return hasattr(value, "numel")
