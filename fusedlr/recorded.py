"""`Recording`: what the steps of a run used and did, as arrays of numpy, and as a file.

`FusedAdamW.record()` makes one, and `fusedlr report` reads it. Needs numpy, which torch does not
install, and no torch: a recording can be looked at where nothing is trained.
"""

from __future__ import annotations

import json
import math
import os
import struct
import tokenize
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusedlr import arguments
from fusedlr.files import replacing
from fusedlr.schedule import Schedule, check_schedule

# of the file; raised whenever an older fusedlr would misread it
FORMAT = 1
# what the second axis of every array counts; None where there is no second axis
_AXES = {
    "step": None,
    "k": "groups",
    "lr": "groups",
    "grad_norm": "scopes",
    "coef": "scopes",
    "limit": "scopes",
    "skipped": "scopes",
    "tensor_grad_norm": "names",
    "tensor_update_ratio": "names",
}
# numpy's letters for the kind of a type; every other array holds floats
_KINDS = {"step": "iu", "k": "iu", "skipped": "b"}
# the member of the file that says what the arrays are of, in JSON
_ABOUT = "about"
# what a hostile file makes zipfile, numpy and json raise
_DAMAGE = (
    # seeking to where no file begins
    OSError,
    ValueError,
    TypeError,
    KeyError,
    EOFError,
    OverflowError,
    SyntaxError,
    MemoryError,
    RecursionError,
    NotImplementedError,
    struct.error,
    tokenize.TokenError,
    zipfile.BadZipFile,
)


@dataclass(frozen=True)
class RecordedGroup:
    """What a recording knows of a param group.

    Attributes:
        name: the group's `name`, or words for its place.
        peak: its peak learning rate, `initial_lr`.
        schedule: its schedule, absolute levels resolved, or None if its rates were given by hand.
        scope: the scope that it belongs to, one of the recording's `scopes`.

    Raises:
        ValueError: the name is no text that can be printed, or the peak no rate.
        TypeError: `schedule` is not a `Schedule`.
    """

    name: str
    peak: float
    schedule: Schedule | None = None
    scope: str | int | None = None

    def __post_init__(self) -> None:
        """Check name, peak and schedule; the recording checks the scope."""
        _check_name("name", self.name)
        object.__setattr__(self, "peak", arguments.non_negative("peak", self.peak))
        check_schedule(self.schedule)


class Recording(Mapping[str, Any]):
    """What the recorded steps used and did: `recording["lr"]` and so on, oldest step first.

    | key | shape | |
    |---|---|---|
    | `names` | tuple of tensors | the parameters' names |
    | `groups` | tuple of groups | a `RecordedGroup` for each param group |
    | `scopes` | tuple of scopes | `optimizer.scopes`: names, None for the joint one, or a group's index |
    | `step` | (steps,) | number of the `step()` call, skipped ones included |
    | `k` | (steps, groups) | the group's update, from 0, that the rate was made for; -1 if it took no part |
    | `lr` | (steps, groups) | learning rate; NaN where the group took no part |
    | `grad_norm` | (steps,) or (steps, scopes) | norm of the unscaled gradients; NaN where none was needed |
    | `coef` | the same | what clipping multiplied the gradients by |
    | `limit` | the same | the norm that was clipped to; inf or NaN where there was none |
    | `skipped` | the same | whether the step was left out, as a gradient was inf or nan |
    | `tensor_grad_norm` | (steps, tensors) | norm of a tensor's gradient, unscaled, before clipping |
    | `tensor_update_ratio` | (steps, tensors) | norm of its change over its norm before; 0 in skipped steps |

    Both are NaN where a tensor had no gradient, and a ratio is inf where the tensor was 0 before, as matrices
    B of LoRA are in their first update. Without `names` the arrays of tensors have no columns. Arrays of
    scopes have one axis where there is one scope, as in `last_metrics()`; two axes are taken there too.

    Args:
        arrays: what the table calls arrays, under the same keys.
        groups: the tuple of the table, as are the next two.
        names: see `groups`.
        scopes: see `groups`.

    Raises:
        ValueError: an array is missing, has another shape or type, steps are not in order, a name is given
            twice or cannot be printed, or a group names a scope that is not there; names the argument.
        ImportError: numpy is missing.

    >>> import numpy as np, fusedlr
    >>> schedule = fusedlr.linear(warmup_steps=0, total_steps=2)
    >>> one = np.ones(2)
    >>> recording = Recording(
    ...     {
    ...         **{"step": np.arange(2), "k": np.array([[0], [1]]), "lr": np.array([[1e-3], [5e-4]])},
    ...         **{"grad_norm": one, "coef": one, "limit": one, "skipped": one > 1},
    ...         **{"tensor_grad_norm": np.ones((2, 0)), "tensor_update_ratio": np.ones((2, 0))},
    ...     },
    ...     groups=[RecordedGroup("all", peak=1e-3, schedule=schedule)],
    ... )
    >>> recording.planned().tolist()
    [[0.001], [0.0005]]
    """

    def __init__(
        self,
        arrays: Mapping[str, Any],
        *,
        groups: Sequence[RecordedGroup],
        names: Sequence[str] = (),
        scopes: Sequence[str | int | None] = (None,),
    ) -> None:
        self._values: dict[str, Any] = {
            "names": tuple(arguments.ordered("names", names)),
            "groups": tuple(arguments.ordered("groups", groups)),
            "scopes": tuple(arguments.ordered("scopes", scopes)),
        }
        self._check_columns()
        missing, unknown = _AXES.keys() - arrays.keys(), arrays.keys() - _AXES.keys()
        if missing:
            raise ValueError(f"arrays lacks {min(missing)!r}")
        if unknown:
            raise ValueError(f"arrays has an unknown {min(unknown)!r}")
        np = _numpy()
        for name, axis in _AXES.items():
            array = np.asarray(arrays[name])
            if array.dtype.kind not in _KINDS.get(name, "f"):
                raise ValueError(f"{name} has values of type {array.dtype}")
            self._values[name] = array
            self._check_shape(name, axis)
        step = self._values["step"]
        if (step[1:] <= step[:-1]).any() or (step < 0).any():
            raise ValueError(f"step={arguments.shown(step)} must count up from 0 or more")

    def _check_columns(self) -> None:
        """Names, groups and scopes are what they should be."""
        for i, name in enumerate(self["names"]):
            _check_name(f"names[{i}]", name)
        names, scopes = set(self["names"]), self["scopes"]
        if len(names) < len(self["names"]):
            twice, _ = Counter(self["names"]).most_common(1)[0]
            raise ValueError(f"names has {twice!r} twice")
        for i, scope in enumerate(scopes):
            if isinstance(scope, str):
                _check_name(f"scopes[{i}]", scope)
            elif scope is not None:
                arguments.count(f"scopes[{i}]", scope)
        known = set(scopes)
        if len(known) < len(scopes):
            raise ValueError(f"scopes={arguments.shown(scopes)} has one of them twice")
        for i, group in enumerate(self["groups"]):
            if not isinstance(group, RecordedGroup):
                raise ValueError(f"groups[{i}]={arguments.shown(group)} is not a RecordedGroup")
            if group.scope not in known:
                raise ValueError(f"groups[{i}] is in scope {group.scope!r}, and scopes={scopes}")
        # and each of these is in a scope
        if not self["groups"]:
            raise ValueError("groups needs at least one")

    def _check_shape(self, name: str, axis: str | None) -> None:
        shape = self._values[name].shape
        # `step` comes first, and says how many there are
        steps = self._values["step"].shape[:1]
        columns = () if axis is None else (len(self._values[axis]),)
        expected = [(*steps, *columns)]
        if axis == "scopes" and columns == (1,):
            expected.append(steps)
        if shape not in expected or len(steps) != 1:
            wanted = f"(steps, {axis})" if axis else "(steps,)"
            raise ValueError(f"{name} has shape {shape}, expected {wanted}, which is {expected[0]}")

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    # two recordings are one only if they are the same object: arrays have no truth of their own
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __repr__(self) -> str:
        step = self["step"]
        where = f", from {step[0]} to {step[-1]}" if len(step) else ""
        return f"<Recording of {len(step)} steps{where}, {len(self['names'])} tensors>"

    def by_scope(self, name: str) -> Any:
        """An array of scopes as (steps, scopes), also where the joint scope is the only one."""
        return self[name].reshape(len(self["step"]), len(self["scopes"]))

    def planned(self) -> Any:
        """The rate that each group's schedule gives for its `k`: (steps, groups); NaN where there is none."""
        rates = _numpy().full(self["lr"].shape, math.nan)
        for column, group in enumerate(self["groups"]):
            if group.schedule is not None:
                for row, k in enumerate(self["k"][:, column].tolist()):
                    if k >= 0:
                        rates[row, column] = group.schedule.lr_at(k, group.peak)
        return rates

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one file, `.npz` by custom, which appears whole or not at all.

        `numpy.load(path)` reads its arrays too; nothing in it is pickled.

        Raises:
            OSError: the file cannot be written.
            ValueError: a schedule has a level that has not been resolved.
        """
        np = _numpy()
        about = {
            "format": FORMAT,
            "names": self["names"],
            "scopes": self["scopes"],
            "groups": [
                {
                    "name": group.name,
                    "peak": group.peak,
                    "schedule": group.schedule and group.schedule.to_numbers(),
                    "scope": group.scope,
                }
                for group in self["groups"]
            ],
        }
        text = np.frombuffer(json.dumps(about).encode(), np.uint8)
        with replacing(Path(path)) as file:
            np.savez(file, **{_ABOUT: text, **{name: self[name] for name in _AXES}})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Recording:
        """The recording that `save` wrote. Everything in the file is checked: it may be a stranger's.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is no such file, is damaged, or was written by a newer fusedlr.
            ImportError: numpy is missing.
        """
        _numpy()
        with open(path, "rb") as file:
            try:
                with zipfile.ZipFile(file) as archive:
                    about = _about(archive)
                    return cls(
                        {name: _array(archive, name) for name in _AXES},
                        names=_listed(about, "names"),
                        scopes=_listed(about, "scopes"),
                        groups=[_group(one) for one in _listed(about, "groups")],
                    )
            except _DAMAGE as error:
                raise ValueError(f"{path} is no recording that can be read: {error}") from error


def _numpy() -> Any:
    try:
        import numpy
    except ImportError:
        raise ImportError("a recording needs numpy: pip install numpy") from None
    return numpy


def _check_name(what: str, name: Any) -> None:
    """A name is text without control characters: terminals would obey them."""
    if not isinstance(name, str) or not name.isprintable():
        raise ValueError(f"{what}={arguments.shown(name)} is not a text that can be printed")


def _about(archive: zipfile.ZipFile) -> dict[str, Any]:
    """What the file says of its arrays; the format is looked at before anything else is."""
    about = json.loads(_array(archive, _ABOUT).tobytes())
    if not isinstance(about, dict):
        raise ValueError(f"about={arguments.shown(about)} is not a JSON object")
    if arguments.count("format", about.get("format"), 1) > FORMAT:
        raise ValueError(
            f"its format is {about['format']}, and this fusedlr reads up to {FORMAT}: install a newer one"
        )
    return about


def _listed(about: dict[str, Any], key: str) -> list[Any]:
    value = about.get(key)
    if not isinstance(value, list):
        raise ValueError(f"{key}={arguments.shown(value)} is not a list")
    return value


def _group(one: Any) -> RecordedGroup:
    if not isinstance(one, dict) or one.keys() != {"name", "peak", "schedule", "scope"}:
        raise ValueError(f"{arguments.shown(one)} is not a group")
    numbers = one["schedule"]
    return RecordedGroup(**{**one, "schedule": None if numbers is None else Schedule.from_numbers(numbers)})


def _array(archive: zipfile.ZipFile, name: str) -> Any:
    """One array of the file, and never more memory than the file is long."""
    np = _numpy()
    try:
        info = archive.getinfo(f"{name}.npy")
    except KeyError:
        raise ValueError(f"it has no {name}") from None
    # bit 0 says that it is encrypted; `save` does neither
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
        raise ValueError(f"{name} is compressed or encrypted")
    with archive.open(info) as member:
        if np.lib.format.read_magic(member) != (1, 0):
            raise ValueError(f"{name} is in a form that is not read here")
        shape, in_columns, dtype = np.lib.format.read_array_header_1_0(member)
        data = member.read()
    # an array of objects would be unpickled
    if dtype.hasobject or len(data) != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name} holds {len(data)} bytes, not an array of {dtype} and shape {shape}")
    array = np.frombuffer(data, dtype).reshape(shape, order="F" if in_columns else "C")
    return array.astype(dtype.newbyteorder("="), copy=False)


__all__ = ["FORMAT", "RecordedGroup", "Recording"]
