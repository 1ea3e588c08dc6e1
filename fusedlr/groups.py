"""A param group: its scope, schedule, peak and rate, who wrote the rate last, and what a step needs of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from types import NoneType
from typing import Any

import torch
from torch import Tensor

from fusedlr import arguments
from fusedlr.guard import ZClip, fixed_part
from fusedlr.guard import max_grad_norm as checked_limit
from fusedlr.reference import GroupStep, Scope
from fusedlr.schedule import Schedule, check_schedule
from fusedlr.warn import warn


@dataclass
class Notes:
    """What was written to an optimizer's groups from outside.

    Attributes:
        lr_assigned: ids of the groups whose lr was assigned since the last step.
        lr_written_back: ids of the groups whose lr was assigned the very number that it shows.
        others_assigned: whether anything but an lr was assigned since the last step.
        changed: whether the options of a step have to be taken anew.
    """

    lr_assigned: set[int] = field(default_factory=set)
    lr_written_back: set[int] = field(default_factory=set)
    others_assigned: bool = False
    changed: bool = True

    def clear(self, kept: Collection[int] = ()) -> None:
        """Begin the next step; `kept`: ids of the groups whose assigned lr is still to be used."""
        if self.lr_assigned:
            self.lr_assigned.intersection_update(kept)
        self.lr_written_back.clear()
        self.others_assigned = False


# What a group has beside AdamW's keys. Tools save, copy and compare the items of a group, so these are not
# among them. `initial_lr` is the peak of a group with a schedule, `model_names` are names for parameters that
# torch has none of.
OWN_KEYS = ("schedule", "initial_lr", "max_grad_norm", "nonfinite", "scope", "model_names")
# what the groups of a scope share
_OF_SCOPE = ("max_grad_norm", "nonfinite")
# nor are counts, which are kept for all groups together
_NO_ITEMS = (*OWN_KEYS, "k", "k_at_step")
# the counter of a group that no optimizer counts for
_UNCOUNTED = (lambda: None), 0


class ParamGroup(dict[str, Any]):
    """A param group whose items are AdamW's, and which has a scope, a schedule, a peak and a limit of its own
    beside them.

    These are read and assigned like items, but are none: `keys`, `items`, copies and files do not show them.
    An assignment from outside is noted in the optimizer's `notes`; a copy or a pickle of a group is a plain
    dict.

    Attributes:
        own: what the group has under `OWN_KEYS`.
        shown_lr: the rate that the optimizer shows in `lr`, to write which back assigns nothing; None once
            another rate than its own has been used.
        counts: the counters of a group that was taken out of `param_groups`, which it goes on with when it is
            put back; None while it is there.
        norms: what it then has of its scope's norms, `columns.NORMS`.
        shown: the step whose rate it then shows; None as `counts`.
        counter: what gives the `Counts` whose `k` of which index it shows as `group["k"]`, None once they
            are gone.
    """

    __slots__ = ("_notes", "counter", "counts", "norms", "own", "shown", "shown_lr")

    def __init__(self, group: dict[str, Any], notes: Notes, own: dict[str, Any] | None = None) -> None:
        super().__init__({key: value for key, value in group.items() if key not in _NO_ITEMS})
        self._notes = notes
        self.own = {key: group[key] for key in OWN_KEYS if key in group} if own is None else own
        if own is None and self.own.get("schedule") is None and "initial_lr" in self.own:
            # a torch scheduler's, which belongs among the items
            dict.__setitem__(self, "initial_lr", self.own.pop("initial_lr"))
        self.shown_lr: float | None = None
        self.counts: Tensor | None = None
        self.norms: Tensor | None = None
        self.shown: int | None = None
        self.counter: tuple[Callable[[], Any], int] = _UNCOUNTED
        # an id may have been that of a group that is gone
        notes.lr_assigned.discard(id(self))

    def belongs_to(self, notes: Notes) -> bool:
        """Whether assignments to this group are noted there."""
        return self._notes is notes

    def __getitem__(self, key: str) -> Any:
        if key in self.own:
            return self.own[key]
        if key == "k":
            if self.counts is not None:
                return int(self.counts[0])
            if (counts := self._counts()) is not None:
                return counts[0].k[counts[1]]
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        return key in self.own or (key == "k" and self._is_counted()) or super().__contains__(key)

    def get(self, key: str, default: Any = None) -> Any:
        """As of dict."""
        return self[key] if key in self else default  # noqa: SIM401

    def __setitem__(self, key: str, value: Any) -> None:
        if key == "lr":
            super().__setitem__(key, value)
            notes = self._notes
            # a number that is given to a group without a schedule is read at every step
            notes.changed = notes.changed or has_schedule(self) or isinstance(value, Tensor)
            if type(value) is float and value == self.shown_lr:
                notes.lr_assigned.discard(id(self))
                notes.lr_written_back.add(id(self))
            else:
                notes.lr_assigned.add(id(self))
            return
        self._notes.others_assigned = True
        if key == "k":
            self._go_to(value)
            return
        if key in self and type(value) in _PLAIN and type(self[key]) is type(value) and self[key] == value:
            return
        self._notes.changed = True
        if key in self.own or (key in OWN_KEYS and key != "initial_lr"):
            self.own[key] = value
        else:
            super().__setitem__(key, value)

    def setdefault(self, key: str, default: Any = None) -> Any:
        """As of dict; setting a missing `lr` is an assignment."""
        if key not in self:
            self[key] = default
        return self[key]

    def update(self, *args: Any, **kwargs: Any) -> None:
        """As of dict; an `lr` among the items is an assignment."""
        for key, value in dict(*args, **kwargs).items():
            self[key] = value

    def __ior__(self, other: Any) -> ParamGroup:  # type: ignore[override,misc]
        self.update(other)
        return self

    def __delitem__(self, key: str) -> None:
        self._notes.changed = True
        if key in self.own:
            del self.own[key]
        else:
            super().__delitem__(key)

    def pop(self, key: str, *default: Any) -> Any:
        """As of dict."""
        self._notes.changed = True
        return self.own.pop(key) if key in self.own else super().pop(key, *default)

    def popitem(self) -> tuple[str, Any]:
        """As of dict."""
        self._notes.changed = True
        return super().popitem()

    def clear(self) -> None:
        """As of dict; what is not among the items goes too."""
        self._notes.changed = True
        self.own.clear()
        super().clear()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return dict, (dict(self),)

    def show(self, lr: float) -> None:
        """Put the optimizer's own rate into `lr`."""
        dict.__setitem__(self, "lr", lr)
        self.shown_lr = lr
        if self._notes.lr_assigned:
            self._notes.lr_assigned.discard(id(self))

    def set_quietly(self, key: str, value: Any) -> None:
        """Set a value as the optimizer itself does: not an assignment from outside."""
        if key in OWN_KEYS:
            self.own[key] = value
        else:
            dict.__setitem__(self, key, value)

    def _counts(self) -> tuple[Any, int] | None:
        counts = self.counter[0]()
        return None if counts is None else (counts, self.counter[1])

    def _is_counted(self) -> bool:
        return self.counts is not None or self._counts() is not None

    def _go_to(self, k: Any) -> None:
        whole, counts = arguments.count("k", k), self._counts()
        if self.counts is not None:
            self.counts[0] = whole
            if has_schedule(self):
                self.show(self["schedule"].lr_at(whole, self["initial_lr"]))
            return
        if counts is None:
            raise KeyError("k")
        counts[0].go_to_one(self, counts[1], whole)


# types whose values can be compared, to tell an assignment that changes nothing
_PLAIN = (float, int, bool, NoneType)


@dataclass(frozen=True)
class Options:
    """What the step takes from all groups, until one of them notes a change.

    Attributes:
        groups: every group in order.
        scopes: every scope, in the order of `scopes_of`.
        overruled: indices of groups whose own schedule gives way to an assigned lr in the next step.
        kept: whether the options hold until a change is noted; a tensor or a list can be changed in place.
    """

    groups: list[GroupStep]
    scopes: list[Scope]
    overruled: list[int]
    kept: bool

    @staticmethod
    def of(
        groups: Sequence[dict[str, Any]],
        notes: Notes,
        *,
        joint: bool,
        max_grad_norm: float | ZClip | None,
        nonfinite: str | None,
    ) -> Options:
        """The options as they stand in the groups now.

        Raises:
            ValueError, TypeError: an option is not what the constructor accepts; nothing has been changed
            then.
        """
        for i, group in enumerate(groups):
            _check(i, group, joint=joint)
        overruled = [
            i for i, group in enumerate(groups) if has_schedule(group) and id(group) in notes.lr_assigned
        ]
        keys = scope_keys(groups, joint=joint)
        index = {key: i for i, key in enumerate(scopes_of(groups, joint=joint))}
        return Options(
            groups=[
                _group_step(group, index[key], driven=has_schedule(group) and i not in overruled)
                for i, (group, key) in enumerate(zip(groups, keys, strict=True))
            ],
            scopes=[_scope(key, groups, keys, max_grad_norm, nonfinite) for key in index],
            overruled=overruled,
            kept=all(map(_is_plain, groups)),
        )


# what a scope is called: its name, None for that of all groups without a name where these are joint, else the
# index of its only group
ScopeKey = str | int | None


def scope_keys(groups: Sequence[Any], *, joint: bool) -> list[ScopeKey]:
    """Per group what its scope is called; `joint`: whether groups without a name share one."""
    names = [group.get("scope") for group in groups]
    return [(None if joint else i) if name is None else name for i, name in enumerate(names)]


def scopes_of(groups: Sequence[Any], *, joint: bool) -> tuple[ScopeKey, ...]:
    """What the scopes of these groups are called, in the order of their first groups."""
    # the joint scope is there without groups, too
    return tuple(dict.fromkeys(scope_keys(groups, joint=joint))) or ((None,) if joint else ())


def index_of_scope(name: str, key: Any, scopes: Sequence[ScopeKey]) -> int:
    """The place of a scope that an argument of this name asks for.

    Raises:
        ValueError: there is no such scope.
    """
    # not 1 for True
    found = next((i for i, scope in enumerate(scopes) if type(scope) is type(key) and scope == key), None)
    if found is not None:
        return found
    close = (
        get_close_matches(key, [s for s in scopes if isinstance(s, str)], 1) if isinstance(key, str) else []
    )
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise ValueError(
        f"{name}={arguments.shown(key)} is no scope of this optimizer, which has "
        f"{', '.join(map(repr, scopes)) or 'none'}{hint}"
    )


def chosen_scopes(only: Any, scopes: Sequence[ScopeKey]) -> Tensor | tuple[bool, ...]:
    """Per scope whether `only` names it; a tensor says so itself, on its device.

    Raises:
        ValueError: it names a scope that there is not, or the tensor does not have one bool per scope.
        TypeError: it is neither names nor a tensor.
    """
    if isinstance(only, Tensor):
        if only.dtype != torch.bool or tuple(only.shape) != (len(scopes),):
            raise ValueError(
                f"only is a tensor of {only.dtype} and shape {tuple(only.shape)}, expected torch.bool and "
                f"{(len(scopes),)}: one per scope"
            )
        return only
    if isinstance(only, str):
        only = (only,)
    if not isinstance(only, (list, tuple, set, frozenset)):
        raise TypeError(f"only={arguments.shown(only)} must be scopes or a tensor of one bool per scope")
    found = {index_of_scope("only", key, scopes) for key in only}
    return tuple(i in found for i in range(len(scopes)))


def _scope(
    key: ScopeKey,
    groups: Sequence[Any],
    keys: Sequence[ScopeKey],
    max_grad_norm: float | ZClip | None,
    nonfinite: str | None,
) -> Scope:
    """What a step needs of a scope: its groups' own options, or else the optimizer's."""
    own = shared_options(key, [group for group, of in zip(groups, keys, strict=True) if of == key])
    max_grad_norm = own.get("max_grad_norm", max_grad_norm)
    nonfinite = own.get("nonfinite", nonfinite)
    skips = skips_nonfinite(nonfinite, max_grad_norm)
    normed = skips or max_grad_norm is not None
    joint = key is None
    zclip = max_grad_norm if isinstance(max_grad_norm, ZClip) else None
    by_own_norm = normed and not joint
    return Scope(fixed_part(max_grad_norm), skips, always=joint, by_own_norm=by_own_norm, zclip=zclip)


def shared_options(key: ScopeKey, groups: Sequence[Any]) -> dict[str, Any]:
    """What the groups of one scope say of it.

    Raises:
        ValueError: they say different things.
    """
    own: dict[str, Any] = {}
    for group in groups:
        for option in _OF_SCOPE:
            if option in group and own.setdefault(option, group[option]) != group[option]:
                raise ValueError(
                    f"scope {key!r} has {option}={own[option]!r} in one group and {group[option]!r} in "
                    "another: its groups are normed and clipped together"
                )
    return own


def has_schedule(group: dict[str, Any]) -> bool:
    """Whether the group has a schedule of its own."""
    return group.get("schedule") is not None


def skips_nonfinite(nonfinite: str | None, max_grad_norm: float | ZClip | None) -> bool:
    """Whether a scope skips steps whose norm is not finite; by default where it clips."""
    return (nonfinite or ("skip" if max_grad_norm is not None else "propagate")) == "skip"


def _is_plain(group: dict[str, Any]) -> bool:
    """Whether no hyperparameter can be changed in place, as a list or a tensor can: nothing would note it."""
    values = (group["eps"], group["weight_decay"], group.get("max_grad_norm", 0.0), *group["betas"])
    return type(group["betas"]) is tuple and all(type(x) in (float, int, NoneType, ZClip) for x in values)


def _check(index: int, group: dict[str, Any], *, joint: bool) -> None:
    """Hold values that were assigned to a group to what the constructor accepts."""
    where = f"group {index}"
    try:
        arguments.hyperparameters(group)
        check_of_scope(group, joint=joint)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def check_of_scope(group: Mapping[str, Any], *, joint: bool) -> None:
    """A group's scope and what it says of it are what the constructor accepts, else ValueError.

    `joint`: whether groups without a scope of their own share one norm.
    """
    checked_limit(group.get("max_grad_norm"))
    arguments.choice("nonfinite", group.get("nonfinite"), (None, "skip", "propagate"))
    name = group.get("scope")
    if name is not None and (not isinstance(name, str) or not name):
        raise ValueError(f"scope={arguments.shown(name)} must be a name, a string that is not empty")
    for option in _OF_SCOPE if joint and name is None else ():
        if option in group:
            raise ValueError(
                f"{option}={group[option]!r} in a group needs groups='independent' or a scope of the "
                "group's own: joint groups share one norm"
            )


def _group_step(group: dict[str, Any], scope: int, *, driven: bool) -> GroupStep:
    lr = group["lr"]
    return GroupStep(
        schedule=group["schedule"] if driven else None,
        lr=lr if isinstance(lr, Tensor) and not driven else None,
        peak=float(group["initial_lr"]) if driven else math.nan,
        betas=arguments.betas(group["betas"]),
        eps=float(group["eps"]),
        weight_decay=float(group["weight_decay"]),
        maximize=group["maximize"],
        scope=scope,
    )


def parameter_name(group: dict[str, Any], group_index: int, p: Tensor) -> str:
    """How an error calls a parameter: by its name if it has one, else by its place."""
    position = next(i for i, other in enumerate(group["params"]) if other is p)
    name = name_of(group, group_index, position)
    return f"parameter {name!r}" if _names_of(group) else f"{name}, shape {tuple(p.shape)}"


def name_of(group: dict[str, Any], group_index: int, position: int) -> str:
    """What metrics and recordings call a parameter: its name, or else its place."""
    names = _names_of(group)
    return str(names[position]) if names else f"parameter {position} of group {group_index}"


def _names_of(group: dict[str, Any]) -> Sequence[Any]:
    """The names of all parameters of a group: torch's, or else those of the model; none where one lacks its
    own.
    """
    found = (group.get(key) or () for key in ("param_names", "model_names"))
    return next((names for names in found if len(names) == len(group["params"])), ())


def give_names(groups: Sequence[Any], named: Iterable[tuple[str, Any]]) -> None:
    """Have metrics and recordings call parameters as their model does, where torch has no names for them.

    torch's `param_names` would be among the items of a group: files would have them, and no group without
    names could be added.
    """
    names = {id(p): name for name, p in named}
    for group in groups:
        if all(id(p) in names for p in group["params"]):
            group.set_quietly("model_names", [names[id(p)] for p in group["params"]])


def give_schedule(group: dict[str, Any], default: Schedule | None, default_lr: Any) -> None:
    """Give a new group its schedule, or `default`, its peak and its first rate.

    Raises:
        TypeError: the schedule is not a `Schedule`.
        ValueError: a rate is a tensor, which a schedule cannot drive.
    """
    schedule = group.get("schedule", default)
    if isinstance(schedule, (list, tuple)):
        schedule = Schedule.from_numbers(schedule)
    check_schedule(schedule)
    if schedule is None:
        return
    lr = group.get("lr", default_lr)
    peak = group.get("initial_lr", lr)
    check_rates(lr, default_lr, peak)
    # one factor for all groups, as transformers: absolute levels are relative to the optimizer's own lr
    group["schedule"] = schedule.resolve(default_lr)
    group["initial_lr"] = float(peak)
    group["lr"] = group["schedule"].lr_at(0, group["initial_lr"])


def checked_group(
    param_group: Any,
    defaults: dict[str, Any],
    schedule: Schedule | None,
    others: Sequence[Any],
    *,
    joint: bool,
) -> dict[str, Any]:
    """A copy of a group that is to be added, with plain values, its schedule, peak and first rate.

    Args:
        param_group: what the caller passed.
        defaults: the optimizer's, for what the group does not say.
        schedule: that of a group that has none of its own.
        others: the groups that there are.
        joint: whether groups without a scope of their own share one norm.

    Raises:
        TypeError: it is no dict, or its schedule no `Schedule`.
        ValueError: an option is out of range, or not that of other groups of the scope, or parameters are
            duplicate.
    """
    if not isinstance(param_group, dict):
        raise TypeError(f"param_group must be a dict, got {type(param_group).__name__}")
    group = {**param_group, **getattr(param_group, "own", {})}
    arguments.choice("join", group.get("join", False), (True, False))
    if isinstance(group.get("params"), Iterable) and not isinstance(group["params"], (Tensor, set)):
        group["params"] = list(group["params"])
        arguments.duplicates(group["params"])
    checked = arguments.hyperparameters({**defaults, **group})
    group.update((name, value) for name, value in checked.items() if name in group)
    check_of_scope(group, joint=joint)
    if group.get("scope") is None:
        group.pop("scope", None)
    if "max_grad_norm" in group:
        group["max_grad_norm"] = checked_limit(group["max_grad_norm"])
    if "scope" in group:
        others = [other for other in others if other.get("scope") == group["scope"]]
        shared_options(group["scope"], [*others, group])
    give_schedule(group, schedule, defaults["lr"])
    return group


def begin(groups: Sequence[Any], schedule: Schedule, default_lr: Any) -> None:
    """Give every group this schedule; its peak is its `initial_lr`, or else its `lr`.

    Raises:
        TypeError: it is no `Schedule`.
        ValueError: a rate is a tensor, or an absolute level is above `default_lr`. Nothing has been changed
            then.
    """
    # None, which is allowed where a schedule is optional, is no schedule here
    check_schedule(schedule if schedule is not None else "None")
    peaks = [group.get("initial_lr", group["lr"]) for group in groups]
    check_rates(*peaks, default_lr)
    resolved = schedule.resolve(default_lr)
    for group, peak in zip(groups, peaks, strict=True):
        group.set_quietly("schedule", resolved)
        group.set_quietly("initial_lr", float(peak))


def lengthen(groups: Sequence[Any], default: Schedule | None, total_steps: int) -> Schedule | None:
    """Give every schedule of the groups more steps; returns that of groups that are added later.

    Raises:
        ValueError: no group has a schedule, one has no rule for more steps, or it is longer already. Nothing
            has been changed then.
    """
    own = [group["schedule"] for group in groups if has_schedule(group)]
    if not own:
        raise ValueError("no group has a schedule that could be extended")
    total_steps = arguments.required_total_steps("extend_schedule", total_steps)
    now = max(schedule.total_steps or 0 for schedule in own)
    if total_steps < now:
        raise ValueError(f"total_steps={total_steps} is less than the schedule's {now}")
    longer = iter([schedule.with_total_steps(total_steps) for schedule in own])
    default = None if default is None else default.with_total_steps(total_steps)
    for group in groups:
        if has_schedule(group):
            group.set_quietly("schedule", next(longer))
    return default


def check_rates(*rates: Any) -> None:
    """No rate that a schedule is to drive is a tensor, else ValueError."""
    for lr in rates:
        if isinstance(lr, Tensor):
            raise ValueError(f"lr={lr!r} is a tensor, which a schedule cannot drive: pass a float")


def warn_absolute(groups: Sequence[dict[str, Any]], schedule: Schedule | None, default_lr: Any) -> None:
    """Warn of an absolute floor, which is relative to `default_lr`, where no group has that rate."""
    if schedule is None or schedule.resolve(default_lr) is schedule:
        return
    peaks = [group["initial_lr"] for group in groups if has_schedule(group)]
    if default_lr not in peaks:
        warn(
            f"{schedule!r} names a learning rate, which is taken relative to lr={default_lr:g}, but the "
            f"groups' peaks are {', '.join(f'{peak:g}' for peak in peaks)}: pass lr= to the optimizer too"
        )


def warn_assigned(index: int, group: dict[str, Any], k: int) -> bool:
    """Warn of an assigned lr that is not what the group's own schedule gives at step `k`; whether it did."""
    lr, peak = group["lr"], group["initial_lr"]
    asked = group["schedule"].lr_at(k, peak)
    # another formula for the same rate rounds differently; a tensor is not read, that would wait for it
    if not isinstance(lr, Tensor) and math.isclose(lr, asked, rel_tol=1e-6, abs_tol=1e-9 * peak):
        return False
    value = "a tensor" if isinstance(lr, Tensor) else f"{lr:g}"
    warn(
        f"lr={value} was assigned to group {index} from outside and is used for this step, where the "
        f"optimizer's own schedule gives {asked:g}: another scheduler is at work. Remove it, or pass "
        "schedule=None"
    )
    return True
