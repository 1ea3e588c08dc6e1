"""What `TrainingArguments(optim_args=...)` asks of `FusedAdamW`, as arguments of its constructor."""

from __future__ import annotations

from typing import Any

from fusedlr import arguments
from fusedlr.guard import ZClip
from fusedlr.record import Record

_TRUTH = {"true": True, "false": False}
# names with these beginnings are ours; transformers leaves others to other optimizers
_OURS = ("master_weights", "record", "zclip")
# name behind "zclip_" -> how its text is read
_ZCLIP = {"alpha": float, "warmup_steps": int, "max_norm": float, "action": str}


def constructor_arguments(optim_args: str | None) -> dict[str, Any]:
    """`master_weights`, `record` and `max_grad_norm`, each where the text asks for it.

    `record=1024` (steps) or `record=true`, with `record_tensors=false` for a record without tensors;
    `zclip=2.5` (its `z_thresh`) or `zclip=true`, with `zclip_alpha`, `zclip_warmup_steps`, `zclip_max_norm`
    and `zclip_action`; `false` is as if the name were not there.

    Raises:
        ValueError: a value is none that the name can have, or a name is not known or given twice; names both.

    >>> constructor_arguments("record=64, zclip=3, zclip_action=skip")["record"]
    Record(last=64, tensors=True)
    """
    options = [option.partition("=") for option in (optim_args or "").replace(" ", "").split(",")]
    names = [name for name, _, _ in options if name.startswith(_OURS)]
    asked = {name: value for name, _, value in options if name in names}
    known = {*_OURS, "record_tensors", *(f"zclip_{name}" for name in _ZCLIP)}
    found: dict[str, Any] = {}
    try:
        for name in asked.keys() - known:
            raise ValueError(f"{name} is none of {', '.join(sorted(known))}")
        for name in asked:
            if names.count(name) > 1:
                raise ValueError(f"{name} is given twice")
        if "master_weights" in asked:
            found["master_weights"] = _truth("master_weights", asked)
        if _is_on("record", asked):
            last = {} if _is_truth(asked["record"]) else {"last": _number("record", asked, int)}
            tensors = {"tensors": _truth("record_tensors", asked)} if "record_tensors" in asked else {}
            found["record"] = Record(**last, **tensors)
        if _is_on("zclip", asked):
            given = {} if _is_truth(asked["zclip"]) else {"z_thresh": _number("zclip", asked, float)}
            for name, kind in _ZCLIP.items():
                if f"zclip_{name}" in asked:
                    given[name] = _number(f"zclip_{name}", asked, kind)
            found["max_grad_norm"] = ZClip(**given)
    except ValueError as error:
        raise ValueError(f"optim_args={arguments.shown(optim_args)}: {error}") from None
    return found


def _is_truth(value: str) -> bool:
    return value.lower() in _TRUTH


def _truth(name: str, asked: dict[str, str]) -> bool:
    if not _is_truth(asked[name]):
        raise ValueError(f"{name} is neither true nor false")
    return _TRUTH[asked[name].lower()]


def _is_on(name: str, asked: dict[str, str]) -> bool:
    """Whether it is asked for; what belongs to it is refused where it is not."""
    if name in asked and asked[name].lower() != "false":
        return True
    for other in asked:
        if other.startswith(f"{name}_"):
            raise ValueError(f"{other} is given without {name}")
    return False


def _number(name: str, asked: dict[str, str], kind: Any) -> Any:
    try:
        return kind(asked[name])
    except ValueError:
        number = "whole number" if kind is int else "number"
        raise ValueError(f"{name}={asked[name]} cannot be read as a {number}") from None


__all__ = ["constructor_arguments"]
