"""Schedules that are changed while they run: which groups are meant, and what each of them gets.

`FusedAdamW.cooldown`, `rewarm` and `cancel_cooldown` call it; nothing here changes a group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from fusedlr import arguments
from fusedlr.groups import chosen_scopes, has_schedule, scope_keys, scopes_of
from fusedlr.schedule import Schedule

# the schedule of a group and its next update -> what becomes of the schedule
Change = Callable[[Schedule, int], Schedule]


def chosen(groups: Sequence[Any], only: Any, *, joint: bool) -> list[int]:
    """The indices of the groups that are meant: those with a schedule, or all of the scopes in `only`.

    Raises:
        ValueError: `only` names a scope that there is not or is a tensor, a group that is meant has no
            schedule, or there is none.
    """
    if only is None:
        found = [i for i, group in enumerate(groups) if has_schedule(group)]
        if not found:
            raise ValueError("no group has a schedule that could be changed: pass schedule= to the optimizer")
        return found
    if isinstance(only, Tensor):
        raise ValueError("only takes the names of scopes here, not a tensor: it would have to be waited for")
    keys, scopes = scope_keys(groups, joint=joint), scopes_of(groups, joint=joint)
    names = {key for key, one in zip(scopes, chosen_scopes(only, scopes), strict=True) if one}
    found = [i for i, key in enumerate(keys) if key in names]
    for i in found:
        if not has_schedule(groups[i]):
            raise ValueError(f"group {i}, of scope {keys[i]!r}, has no schedule that could be changed")
    return found


def level(groups: Sequence[Any], indices: Sequence[int], peak: Any) -> float:
    """`peak` as a ratio of the peak of the first of these groups; None is that peak itself.

    Raises:
        ValueError: it is no rate, or the first peak is 0, which no factor makes another.
    """
    if peak is None:
        return 1.0
    rate = arguments.non_negative("peak", peak)
    first = groups[indices[0]]["initial_lr"] if indices else 1.0
    if first == 0:
        raise ValueError(
            f"peak={rate:g} cannot be a multiple of the peak of group {indices[0]}, the first, which is 0"
        )
    return rate / first


def changed(
    groups: Sequence[Any], indices: Sequence[int], k: Sequence[int], change: Change
) -> dict[int, Schedule]:
    """The index of each of these groups -> its new schedule; groups that shared one share the new one."""
    made: dict[tuple[int, int], Schedule] = {}
    new = {}
    for i in indices:
        schedule = groups[i]["schedule"]
        key = id(schedule), k[i]
        if key not in made:
            made[key] = change(schedule, k[i])
        new[i] = made[key]
    return new
