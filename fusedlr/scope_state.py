"""One scope of an optimizer by itself: its state as a file of AdamW's form, put back in or begun anew.

What is put in is written over the tensors that are there, so that no address changes and captured CUDA graphs
go on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fusedlr import arguments, checkpoint
from fusedlr.checkpoint import Loaded
from fusedlr.columns import STATE
from fusedlr.groups import ParamGroup, ScopeKey, check_rates, has_schedule
from fusedlr.guard import to_numbers
from fusedlr.kept import Kept
from fusedlr.peft_names import adapter_of, without_adapter
from fusedlr.reference import Scope, local
from fusedlr.schedule import Schedule, check_schedule
from fusedlr.step import State


def saved(
    key: ScopeKey,
    groups: Sequence[ParamGroup],
    state: State,
    k: list[int],
    skipped: list[int],
    norms: list[list[float]],
    scope: Scope,
) -> dict[str, Any]:
    """The state dict of these groups alone, in copies; `k`, `skipped` and `norms` are theirs."""
    params = [p for group in groups for p in group["params"]]
    ids = {p: i for i, p in enumerate(params)}
    file: dict[str, Any] = {
        "state": {ids[p]: {name: _copy(x) for name, x in state[p].items()} for p in params if state.get(p)},
        "param_groups": [],
    }
    for group in groups:
        plain = {name: _copy(value) for name, value in group.items()}
        if (names := _names(key, group)) is not None:
            plain["param_names"] = names
        file["param_groups"].append({**plain, "params": [ids[p] for p in group["params"]]})
    own = checkpoint.own_state(list(groups), state, k, skipped, norms, joint=key is None)
    for of_group in own["groups"]:
        # another slot has another name, and another optimizer may have other limits
        of_group.pop("scope", None)
        of_group.pop("zclip", None)
        of_group.update(to_numbers(scope.max_grad_norm if scope.zclip is None else scope.zclip))
        of_group["nonfinite"] = "skip" if scope.skip_nonfinite else "propagate"
    checkpoint.complete(file, list(groups), own)
    return file


def _copy(x: Any) -> Any:
    return x.detach().clone() if isinstance(x, Tensor) else x


def _names(key: ScopeKey, group: Mapping[str, Any]) -> list[str] | None:
    """The names of a group's parameters, free of the scope's own name; None where they have none."""
    names = group.get("param_names")
    if names is None:
        return None
    return [without_adapter(name, key) for name in names]


def read(key: ScopeKey, groups: Sequence[ParamGroup], state_dict: Any) -> Loaded:
    """Check the file of one scope against these groups; nothing is changed.

    Parameters that have names here and there are matched by them, others by their places.

    Raises:
        ValueError: an entry of the file does not fit or is out of range; the message names it.
    """
    if isinstance(state_dict, Mapping) and isinstance(state_dict.get("param_groups"), (list, tuple)):
        file_groups = state_dict["param_groups"]
        if len(file_groups) == len(groups):
            pairs = enumerate(zip(groups, file_groups, strict=True))
            ordered = [_in_our_order(i, key, mine, theirs) for i, (mine, theirs) in pairs]
            state_dict = {**state_dict, "param_groups": ordered}
        own = state_dict.get(checkpoint.OWN_KEY)
        if isinstance(own, Mapping) and isinstance(own.get("groups"), (list, tuple)):
            # a file that was not made by `saved` says which scope it was
            free = [_without_scope(group) for group in own["groups"]]
            state_dict = {**state_dict, checkpoint.OWN_KEY: {**own, "groups": free}}
    return checkpoint.read(list(groups), state_dict, joint=key is None)


def _without_scope(own: Any) -> Any:
    return {key: x for key, x in own.items() if key != "scope"} if isinstance(own, Mapping) else own


def _in_our_order(i: int, key: ScopeKey, mine: ParamGroup, theirs: Any) -> Any:
    """A file's group with its parameters in the order of ours, by their names."""
    ours = _names(key, mine)
    names = theirs.get("param_names") if isinstance(theirs, Mapping) else None
    params = theirs.get("params") if isinstance(theirs, Mapping) else None
    if ours is None or not isinstance(names, (list, tuple)) or not isinstance(params, (list, tuple)):
        return theirs
    if not len(names) == len(params) == len(ours) or not all(isinstance(name, str) for name in names):
        # which is refused in words by the check of every file
        return theirs
    place: dict[str, Any] = {}
    for name, saved_id in zip(names, params, strict=True):
        # a file that was not made by `saved` has the name that the adapter had there
        for spelling in (name, without_adapter(name, key), without_adapter(name, adapter_of(name))):
            place[spelling] = saved_id
    missing = next((name for name in ours if name not in place), None)
    if missing is not None:
        raise ValueError(
            f"group {i} of the loaded state dict has no parameter {missing!r}, which the scope's has"
        )
    return {**theirs, "params": [place[name] for name in ours], "param_names": list(mine["param_names"])}


def put(loaded: Loaded, groups: Sequence[ParamGroup], state: State, kept: Kept) -> None:
    """Give these groups the options, moments and counts of tensors that were loaded; not their `k`."""
    params = [p for group in groups for p in group["params"]]
    clear([p for p in params if p not in loaded.entries], state)
    put_state = checkpoint.apply_state(loaded, state, kept)
    state.update((p, put_state[p]) for p in loaded.entries)
    for group, new, own in zip(groups, loaded.groups, loaded.own, strict=True):
        for name, value in new.items():
            group.set_quietly(name, value)
        if has_schedule(group) and own.get("schedule", group["schedule"]) is None:
            # the file's run had a rate of its own
            group.own.pop("schedule"), group.own.pop("initial_lr")
        elif own.get("schedule") is not None:
            group.set_quietly("schedule", own["schedule"])


@torch.no_grad()
def clear(params: Sequence[Tensor], state: State) -> None:
    """Make the state of these parameters what it is before their first update, in place."""
    for p in params:
        for name, x in (state.get(p) or {}).items():
            if name in STATE or name == "step":
                local(x).zero_()


def check_reset(
    groups: Sequence[ParamGroup], lr: Any, schedule: Schedule | None
) -> tuple[list[Any], Schedule | None]:
    """The peaks that a reset gives these groups, and the schedule with its levels relative to the first.

    Raises:
        ValueError, TypeError: an argument is not what a constructor accepts, or the first peak is 0, which no
            factor makes `lr`.
    """
    peaks = [group["initial_lr"] if has_schedule(group) else group["lr"] for group in groups]
    if lr is not None:
        check_rates(*peaks, lr)
        lr = arguments.non_negative("lr", lr)
        if peaks[0] == 0:
            raise ValueError(f"lr={lr:g} cannot scale the peaks of this scope: that of its first group is 0")
        peaks = [lr * (peak / peaks[0]) for peak in peaks]
    if schedule is not None:
        check_schedule(schedule)
        check_rates(*peaks)
        schedule = schedule.resolve(peaks[0])
    return peaks, schedule


def begin_anew(groups: Sequence[ParamGroup], peaks: Sequence[Any], schedule: Schedule | None) -> None:
    """Give groups these peaks, and this schedule if there is one; their rates are shown later."""
    for group, peak in zip(groups, peaks, strict=True):
        if schedule is not None or has_schedule(group):
            # a cooldown was of the run that ends here
            group.set_quietly("schedule", schedule or group["schedule"].original)
        group.set_quietly("initial_lr" if has_schedule(group) else "lr", peak)
