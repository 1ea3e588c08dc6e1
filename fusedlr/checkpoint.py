"""Loading an optimizer state dict, ours or torch AdamW's: checked in full before anything changes.

Called by `FusedAdamW`. Unlike torch's own loader it never narrows a moment to the parameter's dtype, copies
into the tensors that are there, and carries the schedule over.
"""

from __future__ import annotations

import copy
import math
from itertools import chain, pairwise
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from fusedlr.columns import STATE
from fusedlr.groups import parameter_name, set_quietly
from fusedlr.schedule import Schedule
from fusedlr.step import State, dtype_of_state
from fusedlr.warn import warn

Groups = list[dict[str, Any]]

# what a group with a schedule carries beside AdamW's keys
SCHEDULE_KEYS = ("schedule", "k", "k_at_step")


def check(ours: Groups, state_dict: dict[str, Any]) -> dict[Any, Tensor]:
    """Map the file's parameter ids to this optimizer's parameters.

    Raises:
        ValueError: groups or states that do not fit; says which.
    """
    for key in ("state", "param_groups"):
        if key not in state_dict:
            raise ValueError(f"the loaded state dict has no {key!r}, only {sorted(map(str, state_dict))}")
    theirs = state_dict["param_groups"]
    if len(ours) != len(theirs):
        raise ValueError(
            f"the loaded state dict has {len(theirs)} parameter groups, this optimizer has {len(ours)}"
        )
    for i, (mine, saved) in enumerate(zip(ours, theirs, strict=True)):
        for key in ("params", "lr"):
            if key not in saved:
                raise ValueError(f"group {i} of the loaded state dict has no {key!r}")
        for key in ("k", "k_at_step"):
            if not isinstance(saved.get(key, 0), int):
                raise ValueError(
                    f"group {i} of the loaded state dict has {key}={saved[key]!r}, expected an integer"
                )
        if len(mine["params"]) != len(saved["params"]):
            raise ValueError(
                f"group {i} of the loaded state dict has {len(saved['params'])} parameters, "
                f"this optimizer's has {len(mine['params'])}"
            )
    ids = chain.from_iterable(group["params"] for group in theirs)
    params = chain.from_iterable(group["params"] for group in ours)
    by_id = dict(zip(ids, params, strict=True))
    for i, (mine, saved) in enumerate(zip(ours, theirs, strict=True)):
        for p, saved_id in zip(mine["params"], saved["params"], strict=True):
            reason = _misfit(p, state_dict["state"].get(saved_id))
            if reason:
                raise ValueError(f"{parameter_name(mine, i, p)}: {reason}")
    return by_id


def _misfit(p: Tensor, entry: dict[str, Any] | None) -> str | None:
    if not entry:
        return None
    missing = [key for key in ("step", "exp_avg", "exp_avg_sq") if key not in entry]
    if missing:
        return f"its loaded state has no {', '.join(missing)}, only {', '.join(map(str, entry))}"
    for key in STATE:
        if key in entry and not isinstance(entry[key], Tensor):
            return f"its loaded {key} is a {type(entry[key]).__name__}, expected a tensor"
        if key in entry and (entry[key].device.type == "meta" or not entry[key].is_floating_point()):
            return f"its loaded {key} is {entry[key].dtype} on {entry[key].device}, expected numbers"
        if key in entry and entry[key].shape != p.shape:
            return f"its loaded {key} has shape {tuple(entry[key].shape)}, the parameter has {tuple(p.shape)}"
    step = entry["step"]
    if isinstance(step, Tensor) and step.numel() != 1:
        return f"its loaded step has shape {tuple(step.shape)}, expected one element"
    if not isinstance(step, (Tensor, Real)):
        return f"its loaded step is {step!r}, expected a number"
    return None


def load_state(
    ours: State, saved: dict[Any, Any], by_id: dict[Any, Tensor], state_dtype: str | None
) -> dict[Any, Any]:
    """A new `state` mapping; tensors that fit are kept and filled, so that captured addresses stay valid."""
    # torch keeps entries that belong to no parameter
    state = {key: copy.deepcopy(entry) for key, entry in saved.items() if key not in by_id}
    entries = {p: dict(saved[saved_id]) for saved_id, p in by_id.items() if saved_id in saved}
    current = {p: ours.get(p) or {} for p in entries}
    live = {id(value) for entry in current.values() for value in entry.values()}
    for p, entry in entries.items():
        for key, value in entry.items():
            # a tensor in use for another parameter would be overwritten before it is read
            if id(value) in live and value is not current[p].get(key) and isinstance(value, Tensor):
                entry[key] = value.clone()
    for p, entry in entries.items():
        old = current[p]
        dtype = dtype_of_state(p, state_dtype)
        state[p] = {key: _load_value(p, key, value, old.get(key), dtype) for key, value in entry.items()}
    return state


def _load_value(p: Tensor, key: str, value: Any, old: Any, kept: torch.dtype) -> Any:
    if key == "step":
        # not on a default device the caller may have set
        value = value if isinstance(value, Tensor) else torch.tensor(float(value), device="cpu")
        new = value.reshape(())
        dtype = torch.float32
    elif key in STATE:
        new = value
        dtype = torch.promote_types(value.dtype, kept)
    else:
        return copy.deepcopy(value)
    fits = (
        isinstance(old, Tensor) and old.shape == new.shape and old.dtype == dtype and old.device == p.device
    )
    target = old if fits else torch.empty_like(new, dtype=dtype, device=p.device)
    with torch.no_grad():
        target.copy_(new)
    return target


def load_groups(ours: Groups, saved: Groups, *, joint: bool) -> Groups:
    """Groups with the file's hyperparameters, this optimizer's parameters and this optimizer's schedules."""
    groups = []
    for mine, theirs in zip(ours, saved, strict=True):
        group: dict[str, Any] = {
            key: copy.deepcopy(value)
            for key, value in theirs.items()
            if key not in ("params", *SCHEDULE_KEYS)
        }
        group["betas"] = tuple(group["betas"] if "betas" in group else mine["betas"])
        group["params"] = mine["params"]
        if "param_names" in mine:
            group.setdefault("param_names", mine["param_names"])
        if "schedule" in mine:
            group["schedule"] = mine["schedule"]
        if "max_grad_norm" in mine:
            group.setdefault("max_grad_norm", mine["max_grad_norm"])
        if joint:
            # joint groups share the optimizer's own
            group.pop("max_grad_norm", None)
        if isinstance(mine.get("schedule"), Schedule):
            group["initial_lr"] = _peak(mine, theirs)
        groups.append(group)
    return groups


def _peak(mine: dict[str, Any], theirs: dict[str, Any]) -> float:
    """The peak in the file, which torch's OneCycleLR calls `max_lr`; ours where the file names none."""
    return float(theirs.get("max_lr", theirs.get("initial_lr", mine["initial_lr"])))


def load_k(state_dict: dict[str, Any], *, joint: bool) -> list[int]:
    """The step every group's schedule continues at: what was saved, plus the updates made elsewhere since."""
    groups = state_dict["param_groups"]
    latest = max_steps(groups, state_dict["state"], joint=joint)
    return [
        # below 0 only if the states that were counted are not in the file
        max(group["k"] + t - group["k_at_step"], 0) if "k" in group and "k_at_step" in group else t
        for group, t in zip(groups, latest, strict=True)
    ]


def note_counts(groups: Groups, state: State, k: list[int], *, joint: bool) -> None:
    """Let every group with a schedule hold its `k`, and the `t` that it belongs to."""
    for group, updates, t in zip(groups, k, max_steps(groups, state, joint=joint), strict=True):
        if group.get("schedule") is not None:
            set_quietly(group, "k", updates)
            set_quietly(group, "k_at_step", t)


def in_plain_numbers(packed: Groups, groups: Groups) -> None:
    """Turn the groups of a state dict into what a file and stock AdamW can hold."""
    for saved, group in zip(packed, groups, strict=True):
        if isinstance(saved.get("schedule"), Schedule):
            saved["schedule"] = saved["schedule"].to_numbers()
        # a file of torch's may have it, and it would not load into stock AdamW on the CPU
        saved["capturable"] = False
        # stock AdamW then keeps its step counts on the device
        if any(p.device.type == "cuda" for p in group["params"]):
            saved["fused"] = True


def max_steps(groups: Groups, state: dict[Any, Any], *, joint: bool) -> list[int]:
    """Per group the largest `step` of its tensors, of all tensors when `joint`; 0 without state."""
    largest = []
    for group in groups:
        steps = [state[p]["step"] for p in group["params"] if state.get(p) and "step" in state[p]]
        on_device = [step.reshape(()).float() for step in steps if isinstance(step, Tensor)]
        numbers = [float(step) for step in steps if not isinstance(step, Tensor)]
        # one stack per device, so that a group costs one wait and not one per tensor
        for device in {step.device for step in on_device}:
            numbers.append(torch.stack([step for step in on_device if step.device == device]).max().item())
        largest.append(int(max(numbers, default=0)))
    return [max(largest, default=0)] * len(groups) if joint else largest


def report_disagreement(ours: Groups, saved: Groups) -> None:
    """Warn, in words, where the file's schedule or peak is not this optimizer's."""
    lines = []
    for i, (mine, theirs) in enumerate(zip(ours, saved, strict=True)):
        schedule = mine.get("schedule")
        written = theirs.get("schedule")
        if written is not None and not isinstance(written, Schedule):
            written = Schedule.from_numbers(written)
        if schedule is None:
            if written is not None:
                lines.append(f"group {i}: the checkpoint was made with a schedule, this optimizer has none")
            continue
        if written is not None and written != schedule:
            lines.append(f"group {i}: {_difference(written, schedule)}; this optimizer's schedule is used")
        peak = _peak(mine, theirs)
        if peak != mine["initial_lr"]:
            lines.append(
                f"group {i}: the peak is {peak:g} in the checkpoint and {mine['initial_lr']:g} here; "
                "the checkpoint's is used"
            )
    _warn_of(lines)


def report_lambda_lr(groups: Groups, state_dict: dict[str, Any], epoch: int) -> None:
    """Warn, in words, where the rate in a LambdaLR's state is not what this optimizer's schedule gives there.

    A state of our own has `k`; its schedule is in the optimizer's file.
    """
    rates, peaks = state_dict.get("_last_lr"), state_dict.get("base_lrs")
    if "lr_lambdas" not in state_dict or "k" in state_dict or not rates or not peaks:
        return
    lines = []
    for i, (group, rate, peak) in enumerate(zip(groups, rates, peaks, strict=False)):
        schedule = group.get("schedule")
        if schedule is None or not peak > 0:
            continue
        theirs, here = float(rate) / float(peak), schedule.lr_at(epoch)
        # two spellings of a schedule differ by 1e-12 of the peak, a run one update longer by 1 in its length
        if not math.isclose(theirs, here, rel_tol=1e-9, abs_tol=1e-11):
            lines.append(
                f"group {i}: at k = {epoch} the checkpoint's scheduler gives {theirs:.4g} of the peak, this "
                f"optimizer's schedule {here:.4g}; this optimizer's is used"
            )
    _warn_of(lines)


def _warn_of(lines: list[str]) -> None:
    if lines:
        warn("the loaded schedule is not the one asked for: " + "; ".join(lines))


def _difference(written: Schedule, schedule: Schedule) -> str:
    if written.total_steps != schedule.total_steps:
        return f"the checkpoint's run has {written.total_steps} updates, this one {schedule.total_steps}"
    k = next((k for k in _probe(written, schedule) if written.lr_at(k) != schedule.lr_at(k)), None)
    if k is None:
        return "the checkpoint's schedule is spelled differently"
    return (
        f"at k = {k} the checkpoint's schedule gives {written.lr_at(k):.4g} of the peak, "
        f"this one {schedule.lr_at(k):.4g}"
    )


def _probe(*schedules: Schedule) -> list[int]:
    edges = {edge for s in schedules for phase in s.phases for edge in (phase.begin, phase.end)}
    ordered = sorted(edges)
    middles = [(a + b) // 2 for a, b in pairwise(ordered)]
    return sorted({*ordered, *middles, *(edge + 1 for edge in ordered)})
