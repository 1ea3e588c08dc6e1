"""state_dict and load_state_dict, ours and torch AdamW's: a file is checked in full before anything changes.

Called by `FusedAdamW` and its scheduler's view. Unlike torch's own loader this one never narrows a moment to
the parameter's dtype, copies into the tensors that are there, and carries the schedule over. What a file says
of schedules lies under one key beside AdamW's, `OWN_KEY`, which other optimizers ignore.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from fusedlr import arguments, recorder
from fusedlr.columns import NORMS, STATE
from fusedlr.groups import (
    OWN_KEYS,
    check_of_scope,
    has_schedule,
    parameter_name,
    scope_keys,
    shared_options,
)
from fusedlr.guard import from_numbers, to_numbers
from fusedlr.kept import MOMENTS, Kept
from fusedlr.reference import is_fake, is_sharded
from fusedlr.schedule import Schedule
from fusedlr.sharded import whole_to_part
from fusedlr.step import State
from fusedlr.tensors import spread_misfit
from fusedlr.warn import warn

Groups = list[dict[str, Any]]
_T = TypeVar("_T")

# where a state dict has what AdamW's does not
OWN_KEY = "fusedlr"
# 1 kept schedule, k and k_at_step as keys of the groups
FORMAT = 2
# step counts are float32, as torch's: the largest that is one more than another
_MAX_STEP = 2**24
_MAX_K = 2**62
_STATE_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class IncompatibleKeys(NamedTuple):
    """What `load_state_dict(strict=False)` did not load.

    Attributes:
        missing_keys: names of parameters that the file has no fitting state for.
        unexpected_keys: names in the file that no parameter has taken.
    """

    missing_keys: list[str]
    unexpected_keys: list[str]


@dataclass
class Loaded:
    """What is to be put into an optimizer, checked."""

    groups: Groups
    k: list[int]
    skipped: list[int] | None = None
    # per group the rows `NORMS`
    norms: list[list[float]] | None = None
    # what `recorder.saved` returned
    record: dict[str, Any] | None = None
    # what the file says under `OWN_KEY` of every group
    own: Groups = field(default_factory=list)
    entries: dict[Tensor, dict[str, Any]] = field(default_factory=dict)
    # entries of the file that belong to no parameter
    others: dict[Any, Any] = field(default_factory=dict)
    disagreements: list[str] = field(default_factory=list)


def own_state(
    groups: Groups,
    state: State,
    k: list[int],
    skipped: list[int],
    norms: list[list[float]],
    *,
    joint: bool,
) -> dict[str, Any]:
    """What a file has of ours: schedules in plain numbers, peaks, scopes, limits, how far every group is."""
    latest = max_steps(groups, state, joint=joint)
    own = []
    for i, group in enumerate(groups):
        schedule = group.get("schedule")
        own.append(
            {
                "schedule": None if schedule is None else schedule.to_numbers(),
                "peak": None if schedule is None else float(group["initial_lr"]),
                "k": k[i],
                "k_at_step": latest[i],
                "skipped": skipped[i],
            }
        )
        own[-1].update((key, group[key]) for key in ("nonfinite", "scope") if key in group)
        if "max_grad_norm" in group:
            own[-1].update(to_numbers(group["max_grad_norm"]))
        # how many norms a ZClip has seen
        if norms[i][0] > 0:
            own[-1]["norms"] = list(norms[i])
    return {"format": FORMAT, "groups": own}


def complete(state_dict: dict[str, Any], groups: Groups, own: dict[str, Any]) -> None:
    """Turn torch's state dict of the groups into what a file and stock AdamW can hold."""
    for saved, group in zip(state_dict["param_groups"], groups, strict=True):
        # a file of torch's may have it, and it would not load into stock AdamW on the CPU
        saved["capturable"] = False
        # stock AdamW then keeps its step counts on the device
        if any(p.device.type == "cuda" for p in group["params"]):
            saved["fused"] = True
    state_dict[OWN_KEY] = own


def read(groups: Groups, state_dict: Any, *, joint: bool, other_own: Any = None) -> Loaded:
    """Check a whole file against an optimizer's groups; nothing is changed.

    `other_own`: what a scheduler's state that was loaded before has under `OWN_KEY`, for files without it.

    Raises:
        ValueError: an entry of the file does not fit or is out of range; the message names it.
    """
    saved = _check_containers(state_dict, len(groups))
    for i, (mine, theirs) in enumerate(zip(groups, saved, strict=True)):
        if len(mine["params"]) != len(theirs["params"]):
            raise ValueError(
                f"group {i} of the loaded state dict has {len(theirs['params'])} parameters, "
                f"this optimizer's has {len(mine['params'])}"
            )
        _check_group(i, mine, theirs)
    own = _own_of(state_dict, saved, other_own)
    check_scopes(groups, own)
    entries, by_id = {}, {}
    for i, (mine, theirs) in enumerate(zip(groups, saved, strict=True)):
        for p, saved_id in zip(mine["params"], theirs["params"], strict=True):
            by_id[saved_id] = p
            if saved_id not in state_dict["state"]:
                continue
            entry, name = state_dict["state"][saved_id], parameter_name(mine, i, p)
            reason = _misfit(p, entry)
            if reason:
                raise ValueError(f"{name}: {reason}")
            entries[p] = _own_entry(name, entry)
    others = {key: entry for key, entry in state_dict["state"].items() if key not in by_id}
    if others and by_id and not entries:
        ids = arguments.shown([list(theirs["params"]) for theirs in saved])
        raise ValueError(f"params={ids} of the loaded state dict name none of the entries of its state")
    latest = max_steps(groups, entries, joint=joint)
    loaded = Loaded(
        groups=[
            _loaded_group(i, *each, joint=joint)
            for i, each in enumerate(zip(groups, saved, own, strict=True))
        ],
        k=[_continued(o, t) for o, t in zip(own, latest, strict=True)],
        skipped=[o.get("skipped", 0) for o in own],
        norms=[o.get("norms", [0.0] * len(NORMS)) for o in own],
        record=_record_of(state_dict, groups),
        own=own,
        entries=entries,
        others={key: _copied(f"entry {key!r} of the loaded state", entry) for key, entry in others.items()},
    )
    for key in set(scope_keys(groups, joint=joint)):
        shared_options(key, [group for group in loaded.groups if group.get("scope") == key])
    loaded.disagreements = _disagreements(groups, loaded.groups, own)
    return loaded


def read_matching(
    groups: Groups, state_dict: Any, k: list[int], *, joint: bool
) -> tuple[Loaded, IncompatibleKeys]:
    """Find state for this optimizer's parameters by name; groups keep their options.

    Adapters may call their parameters alike. So the scope has to be the same, too, but for a name that is
    there once and here once.

    Raises:
        ValueError: the file is malformed, or parameters here or there have no names.
    """
    saved = _check_containers(state_dict)
    own = _own_of(state_dict, saved, None)
    # scope and name -> group and id
    there: dict[tuple[Any, str], tuple[int, Any]] = {}
    for i, theirs in enumerate(saved):
        where = f"group {i} of the loaded state dict"
        _check_names(where, theirs)
        for name, saved_id in zip(_names(where, theirs), theirs["params"], strict=True):
            there[own[i].get("scope"), name] = i, saved_id
    ours = [_names(f"group {i} of this optimizer", mine) for i, mine in enumerate(groups)]
    here = {(mine.get("scope"), name) for mine, names in zip(groups, ours, strict=True) for name in names}
    alike_there, alike_here = (Counter(name for _, name in found) for found in (there, here))
    place_of = {name: place for (_, name), place in there.items() if alike_there[name] == 1}
    counted = {key: entry for key, entry in state_dict["state"].items() if _has_step(entry)}
    scoped = [{**group, "scope": o.get("scope")} for group, o in zip(saved, own, strict=True)]
    latest = max_steps(scoped, counted, joint=joint)
    loaded, missing, used = Loaded(groups, list(k)), [], set()
    steps: list[int | None] = []
    for i, mine in enumerate(groups):
        reached = []
        for p, name in zip(mine["params"], ours[i], strict=True):
            place = there.get((mine.get("scope"), name))
            if place is None and alike_here[name] == 1:
                place = place_of.get(name)
            entry = None if place is None else state_dict["state"].get(place[1])
            if place is None or _misfit(p, entry) or not entry:
                missing.append(name)
                continue
            group, saved_id = place
            used.add(saved_id)
            loaded.entries[p] = _own_entry(parameter_name(mine, i, p), entry)
            reached.append(_continued(own[group], latest[group]))
        steps.append(max(reached, default=None))
    # a group of which nothing was found goes on with the others of its scope, or else where it is
    keys = scope_keys(groups, joint=joint)
    for i, step in enumerate(steps):
        of_scope = [x for x, key in zip(steps, keys, strict=True) if key == keys[i] and x is not None]
        loaded.k[i] = next(x for x in (step, max(of_scope, default=None), k[i]) if x is not None)
    return loaded, IncompatibleKeys(missing, [name for (_, name), (_, at) in there.items() if at not in used])


def apply_state(loaded: Loaded, ours: State, kept: Kept) -> dict[Any, Any]:
    """A new `state` mapping; tensors that fit are kept and filled, so that captured addresses stay valid."""
    # torch keeps entries that belong to no parameter
    state = dict(loaded.others)
    current = {p: ours.get(p) or {} for p in loaded.entries}
    live = {id(value) for entry in current.values() for value in entry.values()}
    for p, entry in loaded.entries.items():
        for key, value in entry.items():
            # a tensor in use for another parameter would be overwritten before it is read
            if id(value) in live and value is not current[p].get(key) and isinstance(value, Tensor):
                entry[key] = value.clone()
    for p, entry in loaded.entries.items():
        state[p] = {
            key: _loaded_value(p, key, value, current[p].get(key), kept)
            for key, value in entry.items()
            if key in MOMENTS or key not in STATE or _is_of(p, key, value, kept)
        }
    return state


def max_steps(groups: Groups, state: Mapping[Any, Any], *, joint: bool) -> list[int]:
    """Per group the largest `step` of the tensors of its scope; 0 without state."""
    largest = []
    for group in groups:
        steps = [state[p]["step"] for p in group["params"] if state.get(p) and "step" in state[p]]
        steps = [step for step in steps if not is_fake(step)]
        largest.append(int(max(_numbers(steps), default=0)))
    keys = scope_keys(groups, joint=joint)
    of_scope = dict.fromkeys(keys, 0)
    for key, steps_made in zip(keys, largest, strict=True):
        of_scope[key] = max(of_scope[key], steps_made)
    return [of_scope[key] for key in keys]


def _numbers(steps: Sequence[Any]) -> list[float]:
    """Step counts as plain numbers; one wait per device, not one per tensor."""
    on_device = [step.detach().reshape(()).double() for step in steps if isinstance(step, Tensor)]
    numbers = [float(step) for step in steps if not isinstance(step, Tensor)]
    for device in {step.device for step in on_device}:
        numbers += torch.stack([step for step in on_device if step.device == device]).tolist()
    return numbers


def _check_containers(state_dict: Any, groups: int | None = None) -> Groups:
    """The file's groups, as many as asked for, if it is made of the containers of a state dict."""
    if not isinstance(state_dict, Mapping):
        raise ValueError(f"the loaded state dict is a {type(state_dict).__name__}, expected a dict")
    for key, kind in (("state", Mapping), ("param_groups", (list, tuple))):
        if key not in state_dict:
            keys = sorted(map(str, set(state_dict) - {OWN_KEY}))
            raise ValueError(f"the loaded state dict has no {key!r}, only {keys}")
        if not isinstance(state_dict[key], kind):
            given = type(state_dict[key]).__name__
            raise ValueError(f"{key!r} of the loaded state dict is a {given}, expected a dict or list")
    if groups is not None and len(state_dict["param_groups"]) != groups:
        there = len(state_dict["param_groups"])
        raise ValueError(f"the loaded state dict has {there} parameter groups, this optimizer has {groups}")
    seen = set()
    for i, group in enumerate(state_dict["param_groups"]):
        if not isinstance(group, Mapping):
            raise ValueError(
                f"group {i} of the loaded state dict is a {type(group).__name__}, expected a dict"
            )
        for key in ("params", "lr"):
            if key not in group:
                raise ValueError(f"group {i} of the loaded state dict has no {key!r}")
        params = group["params"]
        where = f"group {i} of the loaded state dict has params={arguments.shown(params)}"
        if not isinstance(params, (list, tuple)) or not all(map(_is_hashable, params)):
            raise ValueError(f"{where}, expected a list of ids")
        for saved_id in params:
            if saved_id in seen:
                raise ValueError(f"{where}: {saved_id!r} is twice")
            seen.add(saved_id)
    return [dict(group) for group in state_dict["param_groups"]]


def _is_hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


def _check_group(i: int, mine: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Hold a file's group to what the constructor accepts; its numbers become plain."""
    where = f"group {i} of the loaded state dict"
    try:
        checked = arguments.hyperparameters({**mine, **theirs})
        theirs.update((name, value) for name, value in checked.items() if name in theirs)
        if "max_lr" in theirs:
            arguments.non_negative("max_lr", theirs["max_lr"])
        arguments.max_grad_norm(theirs.get("max_grad_norm"))
        if arguments.flag("differentiable", theirs.get("differentiable", False)):
            raise ValueError("differentiable=True is not supported: the step writes in place")
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    _check_names(where, theirs)


def _check_names(where: str, theirs: dict[str, Any]) -> None:
    names = theirs.get("param_names")
    if names is None:
        return
    fits = isinstance(names, (list, tuple)) and len(names) == len(theirs["params"])
    if not fits or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{where}: param_names={arguments.shown(names)} must be a name per parameter")


def read_own(own: Any, groups: Sequence[Any]) -> list[dict[str, Any]] | None:
    """What a file says of its groups under `OWN_KEY`, checked; None if it says nothing.

    Raises:
        ValueError: it is malformed, or of a newer version.
    """
    if own is None:
        return None
    if not isinstance(own, Mapping):
        raise ValueError(f"{OWN_KEY} of the loaded state is a {type(own).__name__}, expected a dict")
    written = own.get("format")
    if type(written) is not int or written < 1:
        raise ValueError(f"{OWN_KEY} of the loaded state has format={written!r}, expected an integer")
    if written > FORMAT:
        raise ValueError(
            f"the loaded state was written by a newer fusedlr: its format is {written}, this one reads up to "
            f"{FORMAT}"
        )
    if not isinstance(own.get("groups"), (list, tuple)):
        raise ValueError(
            f"{OWN_KEY} of the loaded state has groups={arguments.shown(own.get('groups'))}, expected a list"
        )
    if len(own["groups"]) != len(groups):
        raise ValueError(
            f"{OWN_KEY} of the loaded state has {len(own['groups'])} groups, expected {len(groups)}"
        )
    return [_checked_own(i, group) for i, group in enumerate(own["groups"])]


def check_scopes(groups: Sequence[Any], own: Sequence[dict[str, Any]]) -> None:
    """What a file says of its groups is of the same scopes in the same order, else ValueError."""
    for i, (mine, theirs) in enumerate(zip(groups, own, strict=True)):
        here, there = mine.get("scope"), theirs.get("scope")
        if here is not None and there is not None and here != there:
            raise ValueError(
                f"group {i} of the loaded state dict is of scope {there!r}, this optimizer's is of {here!r}: "
                "add the groups in the order of the file, or load one scope by load_scope_state_dict"
            )


def _own_of(state_dict: Any, groups: Groups, other_own: Any) -> list[dict[str, Any]]:
    """What a file says of its groups, or else a scheduler's state, or else the groups of a file of old."""
    of_groups = _own_of_groups(groups)
    return read_own(state_dict.get(OWN_KEY), groups) or read_own(other_own, groups) or of_groups


def _record_of(state_dict: Any, groups: Groups) -> dict[str, Any] | None:
    """What a file has of recorded steps."""
    own = state_dict.get(OWN_KEY)
    saved = own.get("record") if isinstance(own, Mapping) else None
    if saved is None:
        return None
    return recorder.checked(saved, len(groups), sum(len(group["params"]) for group in groups))


def _own_of_groups(groups: Groups) -> list[dict[str, Any]]:
    """The same of a file of the first format, or of torch's, which calls a peak `initial_lr` or `max_lr`."""
    found = []
    for i, group in enumerate(groups):
        own = {key: group[key] for key in ("schedule", "k", "k_at_step") if key in group}
        found.append(_checked_own(i, {**own, "peak": group.get("max_lr", group.get("initial_lr"))}))
    return found


def _checked_own(i: int, own: Any) -> dict[str, Any]:
    where = f"group {i} of the loaded state dict"
    if not isinstance(own, Mapping):
        raise ValueError(f"{where} is a {type(own).__name__}, expected a dict")
    checked = dict(own)
    for name in ("k", "k_at_step", "skipped"):
        value = own.get(name, 0)
        if type(value) is not int or not 0 <= value <= _MAX_K:
            raise ValueError(
                f"{where} has {name}={arguments.shown(value)}, expected an integer from 0 to {_MAX_K}"
            )
    if "norms" in own:
        _check_norms(where, own["norms"])
    try:
        if own.get("peak") is not None:
            checked["peak"] = arguments.non_negative("peak", own["peak"])
        check_of_scope(own, joint=False)
        # a zclip stands beside the norm that caps it
        if "max_grad_norm" in own:
            checked["max_grad_norm"] = from_numbers(own)
        schedule = own.get("schedule")
        if schedule is not None and not isinstance(schedule, Schedule):
            checked["schedule"] = Schedule.from_numbers(schedule)
    except ValueError as error:
        raise ValueError(f"{where} has a schedule or peak that cannot be used: {error}") from None
    return checked


def _check_norms(where: str, norms: Any) -> None:
    """Hold the norms that a `ZClip` has seen, as a file has them, to what steps can make of them."""
    plain = isinstance(norms, (list, tuple)) and len(norms) == len(NORMS)
    plain = plain and all(type(x) in (int, float) and math.isfinite(x) for x in norms)
    if plain:
        seen, mean, mean_rest, variance, variance_rest = norms
        plain = 0 <= seen <= arguments.MOST_STEPS and seen == int(seen)
        # a rest is less than the last digit of its number in fp32, which is not below 0
        plain = plain and abs(mean_rest) <= 2**-23 * mean and abs(variance_rest) <= 2**-23 * variance
    if not plain:
        raise ValueError(
            f"{where} has norms={arguments.shown(norms)}, expected {len(NORMS)} numbers: {', '.join(NORMS)}"
        )


def _continued(own: dict[str, Any], t: int) -> int:
    """The step a group's schedule continues at: what was saved, plus the updates made elsewhere since."""
    if "k" not in own or "k_at_step" not in own:
        return t
    # below 0 only if the states that were counted are not in the file
    return max(own["k"] + t - own["k_at_step"], 0)


def _own_entry(where: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    """The state of a parameter, with copies of what no step knows; tensors of ours are copied later."""
    return {
        key: value if key in STATE or key == "step" else _copied(f"{where}: its loaded {key}", value)
        for key, value in entry.items()
    }


def _copied(where: str, value: Any) -> Any:
    """A copy of what only other optimizers know; it is made before anything changes, because it may fail."""
    try:
        return copy.deepcopy(value)
    except Exception as error:
        raise ValueError(f"{where} cannot be copied: {error}") from error


def _loaded_group(
    i: int, mine: Any, theirs: dict[str, Any], own: dict[str, Any], *, joint: bool
) -> dict[str, Any]:
    """A group with the file's hyperparameters, this optimizer's parameters and this optimizer's schedule."""
    group: dict[str, Any] = {
        key: _copied(f"group {i} of the loaded state dict: {key}", value)
        for key, value in theirs.items()
        if key not in ("params", "schedule")
    }
    # a file of torch's Adam says False; torch's AdamW sets it too
    group["decoupled_weight_decay"] = True
    group.setdefault("betas", mine["betas"])
    group["params"] = mine["params"]
    if "param_names" in mine:
        group.setdefault("param_names", mine["param_names"])
    for key in OWN_KEYS:
        if key in mine and (key != "initial_lr" or has_schedule(mine)):
            group.setdefault(key, mine[key])
    if has_schedule(mine) and own.get("schedule") is not None:
        # a cooldown belongs to the run, the schedule that it changes to the constructor
        group["schedule"] = mine["schedule"].with_changes(own["schedule"].changes)
    for key in ("max_grad_norm", "nonfinite"):
        if key in own:
            group[key] = own[key]
        if joint and "scope" not in mine:
            # joint groups share the optimizer's own
            group.pop(key, None)
    # without a schedule, a scheduler that is made later finds the peak where torch's leave it
    if own.get("peak") is not None:
        group["initial_lr"] = own["peak"]
    return group


def _misfit(p: Tensor, entry: Any) -> str | None:
    """Why this entry of a file is no state of this parameter."""
    if not isinstance(entry, Mapping):
        return f"its loaded state is a {type(entry).__name__}, expected a dict"
    if not entry:
        return None
    missing = [key for key in ("step", "exp_avg", "exp_avg_sq") if key not in entry]
    if missing:
        return f"its loaded state has no {', '.join(missing)}, only {', '.join(map(str, entry))}"
    for key in STATE:
        value = entry.get(key)
        if key not in entry:
            continue
        if not isinstance(value, Tensor):
            return f"its loaded {key} is a {type(value).__name__}, expected a tensor"
        numbers = _STATE_DTYPES if key in MOMENTS else (*_STATE_DTYPES, torch.int16)
        if value.device.type == "meta" or value.dtype not in numbers:
            return f"its loaded {key} is {value.dtype} on {value.device}, expected numbers"
        if value.layout != torch.strided:
            return f"its loaded {key} is of layout {value.layout}, expected a dense tensor"
        if value.shape != p.shape:
            return f"its loaded {key} has shape {tuple(value.shape)}, the parameter has {tuple(p.shape)}"
        # of a whole tensor every process takes its part
        reason = spread_misfit(f"loaded {key}", value, p) if is_sharded(value) else None
        if reason:
            return reason
    return _step_misfit(entry["step"])


def _has_step(entry: Any) -> bool:
    return isinstance(entry, Mapping) and "step" in entry and _step_misfit(entry["step"]) is None


def _step_misfit(step: Any) -> str | None:
    if is_fake(step):
        return None
    if isinstance(step, Tensor) and step.numel() != 1:
        return f"its loaded step has shape {tuple(step.shape)}, expected one element"
    if isinstance(step, Tensor) and step.layout != torch.strided:
        return f"its loaded step is of layout {step.layout}, expected a dense tensor"
    try:
        # waits once per tensor where they lie on a GPU
        value = arguments.real("step", step)
    except ValueError:
        return f"its loaded step is {arguments.shown(step)}, expected a number"
    if not (0 <= value <= _MAX_STEP and value == int(value)):
        return f"its loaded step is {step!r}, expected a whole number from 0 to {_MAX_STEP}"
    return None


def _is_of(p: Tensor, key: str, value: Tensor, kept: Kept) -> bool:
    """Whether what a file has of an fp32 value can be used: stock AdamW casts what it does not know."""
    return (
        kept.master_weights
        and STATE[key].of == str(p.dtype).removeprefix("torch.")
        and kept.fits(key, value, p)
    )


def _loaded_value(p: Tensor, key: str, value: Any, old: Any, kept: Kept) -> Any:
    if key == "step":
        # neither in a default dtype nor on a default device that the caller may have set
        given = value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float32, device="cpu")
        new, dtype = given.reshape(()), torch.float32
    elif key in STATE:
        new, dtype = whole_to_part(value, p), torch.promote_types(value.dtype, kept.dtype(key, p))
    else:
        return value
    fits = (
        isinstance(old, Tensor) and old.shape == new.shape and old.dtype == dtype and old.device == p.device
    )
    target = old if fits else torch.empty_like(new, dtype=dtype, device=p.device)
    with torch.no_grad():
        target.copy_(new)
    return target


def _names(where: str, group: dict[str, Any]) -> list[str]:
    names = group.get("param_names")
    if names is None or len(names) != len(group["params"]):
        raise ValueError(
            f"strict=False finds parameters by name, and {where} has no param_names: build both optimizers "
            "from model.named_parameters()"
        )
    return list(names)


def _disagreements(groups: Groups, loaded: Groups, own: list[dict[str, Any]]) -> list[str]:
    """In words, where the file's schedule or peak is not this optimizer's."""
    lines = []
    for i, (mine, new, theirs) in enumerate(zip(groups, loaded, own, strict=True)):
        schedule, written = mine.get("schedule"), theirs.get("schedule")
        if theirs.get("scope") is not None and mine.get("scope") is None:
            lines.append(f"group {i}: its scope is {theirs['scope']!r} in the checkpoint, here it has none")
        if schedule is None:
            if written is not None:
                lines.append(f"group {i}: the checkpoint was made with a schedule, this optimizer has none")
            continue
        if written is not None and written.original != schedule.original:
            difference = _difference(written.original, schedule.original)
            lines.append(f"group {i}: {difference}; this optimizer's schedule is used")
        if new["initial_lr"] != mine["initial_lr"]:
            lines.append(
                f"group {i}: the peak is {new['initial_lr']:g} in the checkpoint and {mine['initial_lr']:g} "
                "here; the checkpoint's is used"
            )
    return lines


def read_steps(state_dict: Any, groups: Sequence[Any]) -> list[int]:
    """Per group the step that a scheduler's state, of ours or of torch's, continues at.

    Raises:
        ValueError: an entry is malformed; the message names it.
    """
    if not isinstance(state_dict, Mapping):
        raise ValueError(f"the scheduler's state is a {type(state_dict).__name__}, expected a dict")
    for name in ("base_lrs", "_last_lr"):
        _per_group(name, state_dict.get(name, ()), arguments.non_negative)
    epoch = _step("last_epoch", state_dict.get("last_epoch"))
    if "k" not in state_dict:
        return [epoch] * len(groups)
    k = _per_group("k", state_dict["k"], _step)
    if len(k) != len(groups):
        raise ValueError(f"k={k} in the scheduler's state has {len(k)} groups, expected {len(groups)}")
    steps = [step + epoch - _step("k_at_epoch", state_dict.get("k_at_epoch")) for step in k]
    if not all(0 <= step <= _MAX_K for step in steps):
        raise ValueError(
            f"last_epoch={epoch} in the scheduler's state leads to steps that no run has: {steps}"
        )
    return steps


def _step(name: str, value: Any) -> int:
    where = f"{name}={arguments.shown(value)} in the scheduler's state"
    try:
        step = arguments.integer(name, value)
    except ValueError:
        raise ValueError(f"{where} is not an integer") from None
    if not 0 <= step <= _MAX_K:
        raise ValueError(f"{where} is {'negative' if step < 0 else f'above {_MAX_K}'}")
    return step


def _per_group(name: str, values: Any, check: Callable[[str, Any], _T]) -> list[_T]:
    if not isinstance(values, (list, tuple)):
        raise ValueError(f"{name}={arguments.shown(values)} in the scheduler's state must be a list")
    return [check(f"{name}[{i}]", value) for i, value in enumerate(values)]


def scheduler_disagreements(groups: Groups, state_dict: dict[str, Any], steps: list[int]) -> list[str]:
    """In words, where the rate in the state of a torch scheduler is not that of the schedules at these steps.

    A state of our own has `k`; its schedule is in the optimizer's file.
    """
    rates, peaks = state_dict.get("_last_lr"), state_dict.get("base_lrs")
    if "k" in state_dict or not isinstance(rates, (list, tuple)) or len(rates) != len(groups):
        return []
    lines = []
    for i, (group, rate, step) in enumerate(zip(groups, rates, steps, strict=True)):
        schedule = group.get("schedule")
        if schedule is None:
            continue
        # relative to what its scheduler calls the base, which for some is not the peak
        base = peaks[i] if isinstance(peaks, (list, tuple)) and len(peaks) == len(groups) else 0
        theirs = [float(rate) / float(x) for x in (base, group["initial_lr"]) if x > 0]
        here = schedule.lr_at(step)
        if theirs and not any(_alike(x, here) for x in theirs):
            lines.append(
                f"group {i}: at k = {step} the checkpoint's scheduler gives {theirs[0]:.4g} of the peak, "
                f"this optimizer's schedule {here:.4g}; this optimizer's is used"
            )
    return lines


def report(lines: list[str]) -> None:
    """Warn of disagreements, if there are any."""
    if lines:
        warn("the loaded schedule is not the one asked for: " + "; ".join(lines))


def _difference(written: Schedule, schedule: Schedule) -> str:
    if written.total_steps != schedule.total_steps:
        return f"the checkpoint's run has {written.total_steps} updates, this one {schedule.total_steps}"
    probed = _probe(written, schedule)
    k = next((k for k in probed if not _alike(written.lr_at(k), schedule.lr_at(k))), None)
    if k is None:
        return "the checkpoint's schedule is spelled differently"
    return (
        f"at k = {k} the checkpoint's schedule gives {written.lr_at(k):.4g} of the peak, "
        f"this one {schedule.lr_at(k):.4g}"
    )


def _alike(a: float, b: float) -> bool:
    """Whether two shares of a peak are of one schedule."""
    # two spellings of a schedule differ by 1e-12 of the peak, a run one update longer by 1 in its length
    return math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-11)


def _probe(*schedules: Schedule) -> list[int]:
    edges = {edge for s in schedules for phase in s.phases for edge in (phase.begin, phase.end)}
    ordered = sorted(edges)
    middles = [(a + b) // 2 for a, b in pairwise(ordered)]
    return sorted({*ordered, *middles, *(edge + 1 for edge in ordered)})
