"""Every check of a value that a user passed; each error names the argument and shows the value.

Nothing of the package is imported here, and no torch: a tensor is known by its method `numel`. Whether
something is a `Schedule` is checked by `fusedlr.schedule.check_schedule`.
"""

from __future__ import annotations

import argparse
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from numbers import Real
from typing import Any, TypeVar

_T = TypeVar("_T")


# The most steps that an argument may count. Sums of two, and the end of a schedule that has none, are still
# exact in fp64.
MOST_STEPS = 2**52

# An error shows this much of a value: it is there to be found, not to fill the screen
_MOST_SHOWN = 200


def shown(value: Any) -> str:
    """A value as an error shows it, however long it is.

    >>> len(shown(list(range(10**6))))
    200
    """
    try:
        text = repr(value)
    # Python refuses to write out an integer of more than 4,300 digits
    except ValueError:
        return f"<an integer of {value.bit_length()} bits>"
    return text if len(text) <= _MOST_SHOWN else f"{text[: _MOST_SHOWN - 2]}.."


def real(name: str, value: Any) -> float:
    """A number of any type that `float` takes, tensors of one element included, else ValueError.

    Texts and bools are refused, those of numpy and torch too: no argument is meant to be one of these.
    """
    # numpy and torch name the type of a value `dtype`
    is_bool = isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool")
    if is_bool or isinstance(value, (str, bytes, bytearray)) or _is_complex(value):
        raise ValueError(f"{name}={shown(value)} is not a number")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name}={shown(value)} is too large") from None
    # RuntimeError: a tensor of several elements, or without values as on the meta device
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{name}={shown(value)} is not a number") from None


def integer(name: str, value: Any) -> int:
    """A whole number of any type but bool, else ValueError.

    >>> integer("k", 3.0)
    3
    """
    try:
        number = real(name, value)
    except ValueError:
        # an integer may be too large for a float
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError(f"{name}={shown(value)} is not an integer") from None
        return value
    try:
        # exact where a float of the same number is not
        return operator.index(value)
    except TypeError:
        if not number.is_integer():
            raise ValueError(f"{name}={shown(value)} is not an integer") from None
        return int(number)


def count(name: str, value: Any, at_least: int = 0, at_most: int = MOST_STEPS) -> int:
    """A whole number from `at_least` to `at_most`, else ValueError."""
    whole = integer(name, value)
    if whole < at_least:
        raise ValueError(f"{name}={shown(value)} must be at least {at_least}")
    if whole > at_most:
        raise ValueError(f"{name}={shown(value)} must be at most {at_most}")
    return whole


def non_negative(name: str, value: Any) -> float:
    """A finite number >= 0 of any type that `real` takes, else ValueError."""
    number = real(name, value)
    if not (math.isfinite(number) and number >= 0):
        raise ValueError(f"{name}={shown(value)} must be a finite number >= 0")
    return number


def positive(name: str, value: Any) -> float:
    """A finite number above 0, else ValueError."""
    number = non_negative(name, value)
    if number == 0:
        raise ValueError(f"{name}={shown(value)} must be above 0")
    return number


def ratio(name: str, value: Any) -> float:
    """A number in [0, 1], else ValueError."""
    number = non_negative(name, value)
    if number > 1:
        raise ValueError(f"{name}={shown(value)} must be a ratio in [0, 1]")
    return number


def plain_number(name: str, value: Any, *, above_zero: bool = False) -> None:
    """A finite number of a type that is a number, >= 0 or above 0, else ValueError; tensors are refused."""
    number = real(name, value) if _is_plain(value) else math.nan
    if not (math.isfinite(number) and (number > 0 if above_zero else number >= 0)):
        limit = "above" if above_zero else ">="
        raise ValueError(f"{name}={shown(value)} must be a finite number {limit} 0")


def flag(name: str, value: Any) -> bool:
    """True or False, of numpy too, or 1 or 0; else ValueError: a text such as `"no"` is true to Python."""
    is_bool = isinstance(value, (bool, int)) or str(getattr(value, "dtype", "")) == "bool"
    if not is_bool or value not in (0, 1):
        raise ValueError(f"{name}={shown(value)} must be True or False")
    return bool(value)


def ordered(name: str, values: Any, complaint: str = "is not a sequence") -> Iterator[Any]:
    """The values one after the other, else ValueError; a set or a dict is in no order that means anything."""
    try:
        if not isinstance(values, (str, bytes, Mapping, Set)):
            return iter(values)
    # raised by a tensor without dimensions too
    except TypeError:
        pass
    raise ValueError(f"{name}={shown(values)} {complaint}")


def choice(name: str, value: _T, choices: Iterable[_T], show: Callable[[Any], str] = repr) -> _T:
    """One of `choices`, else ValueError, which lists them as `show` writes them."""
    choices = tuple(choices)
    # only values of a choice's type are compared: a tensor compares element by element
    if not any(isinstance(value, type(one)) and value == one for one in choices):
        raise ValueError(f"{name}={shown(value)} is unknown, expected one of {', '.join(map(show, choices))}")
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
    # `count` refuses what is no number
    if _is_plain(value) and 0 < real("warmup_steps", value) < 1:
        if total_steps is None:
            raise ValueError(f"warmup_steps={shown(value)} is a ratio and needs total_steps")
        return math.ceil(total_steps * float(value))
    return count("warmup_steps", value)


def max_grad_norm(value: Any) -> float | None:
    """None or a float above 0 (inf measures the norm and never clips), else ValueError."""
    if value is None:
        return None
    # a tensor would be read once, and not followed
    number = real("max_grad_norm", value) if _is_plain(value) else math.nan
    if not number > 0:
        raise ValueError(f"max_grad_norm={shown(value)} must be a number above 0, or None for no clipping")
    return number


def betas(value: Any) -> tuple[float, float]:
    """Two numbers in [0, 1) as floats, else ValueError."""
    b1, b2 = kept_betas(value)
    return float(b1), float(b2)


def kept_betas(value: Any) -> tuple[Any, Any]:
    """Two numbers in [0, 1) as a param group keeps them: tensors as they are, to be read at every step."""
    pair = tuple(ordered("betas", value, "must be two numbers"))
    if len(pair) != 2:
        raise ValueError(f"betas={shown(value)} must be two numbers")
    for i, b in enumerate(pair):
        try:
            inside = 0 <= real(f"betas[{i}]", b) < 1
        except ValueError:
            raise ValueError(f"betas={shown(value)} must be two numbers") from None
        if not inside:
            raise ValueError(f"betas[{i}]={shown(b)} must be in [0, 1)")
    return _kept(pair[0]), _kept(pair[1])


def hyperparameters(group: Mapping[str, Any]) -> dict[str, Any]:
    """AdamW's options of a param group as it keeps them, and its peak where it has one; else ValueError.

    Numbers become Python's own, so that a checkpoint holds nothing else; tensors, which steps read, stay.
    """
    checked: dict[str, Any] = {}
    for name in ("lr", "initial_lr", "eps", "weight_decay"):
        if name not in group:
            continue
        value = group[name]
        if _is_tensor(value) and value.numel() != 1:
            raise ValueError(f"{name} has shape {tuple(value.shape)}, a tensor {name} must have one element")
        number = real(name, value) if _is_plain(value) or _is_tensor(value) else math.nan
        if not number >= 0:
            raise ValueError(f"{name}={shown(value)} must be a number >= 0")
        if math.isinf(number):
            raise ValueError(f"{name}={shown(value)} must be finite")
        checked[name] = _kept(value)
    if "betas" in group:
        checked["betas"] = kept_betas(group["betas"])
    checked.update((name, flag(name, group[name])) for name in ("amsgrad", "maximize") if name in group)
    return checked


def duplicates(params: list[Any]) -> None:
    """No parameter, named or not, is in the list twice, else ValueError."""
    seen: dict[int, int] = {}
    for i, item in enumerate(params):
        if isinstance(item, tuple) and len(item) != 2:
            raise ValueError(f"params[{i}]={shown(item)} is not a pair of a name and a parameter")
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


def _is_plain(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_complex(value: Any) -> bool:
    # float() takes a complex tensor whose imaginary part is 0, and numpy's numbers with a warning
    return isinstance(value, complex) or "complex" in str(getattr(value, "dtype", ""))


def _kept(value: Any) -> Any:
    return value if _is_tensor(value) or type(value) in (int, float) else float(value)
