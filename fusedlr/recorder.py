"""Makes a `Recording` of what a ring has, by the names of tensors, groups and scopes; and rings in files."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import chain, count
from typing import Any

import torch
from torch import Tensor

from fusedlr import arguments
from fusedlr.columns import RECORDED, SUMS
from fusedlr.groups import has_schedule, name_of, scope_keys, scopes_of
from fusedlr.record import MOST, Ring
from fusedlr.recorded import RecordedGroup, Recording
from fusedlr.reference import is_fake
from fusedlr.sharded import Layout

# of a file
_MOST_STEPS = 2**51


def read(ring: Ring, groups: Sequence[Any], layout: Layout | None, *, joint: bool) -> Recording:
    """What the steps of a ring used and did (waits for the device; with a layout, all processes call it).

    Raises:
        ImportError: numpy is missing.
        RuntimeError: there are no groups.
    """
    ints, used, sums = in_order(ring)
    keys, scopes = scope_keys(groups, joint=joint), scopes_of(groups, joint=joint)
    if not groups:
        raise RuntimeError("there is no recording of an optimizer without groups")
    by_row = dict(zip(RECORDED, used.unbind(1), strict=True))
    # a scope's numbers are those of any of its groups that took part in the step
    first = torch.stack([_first_of(ints, [key == of for of in keys]) for key in scopes], dim=1)
    of_scopes = {name: by_row[name].gather(1, first) for name in ("grad_norm", "coef", "limit", "skip")}
    if len(scopes) == 1:
        of_scopes = {name: x.reshape(-1) for name, x in of_scopes.items()}
    skipped = of_scopes.pop("skip") == 1
    names, sums = _whole(names_of(ring.params, groups), _counted(sums, ring.params, layout), layout)
    by_sum = dict(zip(SUMS, torch.where(sums < 0, math.nan, sums).unbind(1), strict=True))
    change = by_sum["change"]
    arrays = {
        "step": ints[:, 0],
        "k": ints[:, 1:],
        "lr": by_row["lr"],
        **of_scopes,
        "skipped": skipped,
        "tensor_grad_norm": by_sum["grad"].sqrt(),
        # also where what was 0 stays 0
        "tensor_update_ratio": torch.where(change == 0, 0.0, (change / by_sum["before"]).sqrt()),
    }
    return Recording(
        {name: x.numpy() for name, x in arrays.items()},
        groups=[_group(i, group, key) for i, (group, key) in enumerate(zip(groups, keys, strict=True))],
        names=names,
        scopes=[_printable(key) for key in scopes],
    )


def _first_of(ints: Tensor, chosen: list[bool]) -> Tensor:
    """Per step the first of the chosen groups that took part, or of all chosen if none did."""
    of_scope = torch.tensor(chosen)
    took_part = (ints[:, 1:] >= 0) & of_scope
    return torch.where(took_part.any(1, keepdim=True), took_part, of_scope).int().argmax(1)


def _printable(key: Any) -> Any:
    """The key of a scope, or a name, as a terminal can show it."""
    return key if not isinstance(key, str) or key.isprintable() else repr(key)


def in_order(ring: Ring) -> tuple[Tensor, Tensor, Tensor]:
    """The rows of the steps that there are, oldest first, on the host; floats in fp64."""
    ints = ring.ints.cpu()
    steps = ints[:, 0]
    order = torch.argsort(steps)[int((steps < 0).sum()) :]
    return ints[order], ring.used.cpu().double()[order], ring.sums.cpu().double()[order]


def names_of(params: Sequence[Tensor], groups: Sequence[Any]) -> list[str]:
    """What the parameters are called; adapters may call theirs alike."""
    names = {
        id(p): (name_of(group, i, j), i)
        for i, group in enumerate(groups)
        for j, p in enumerate(group["params"])
    }
    found = [names.get(id(p), (f"parameter {column} of the past", -1)) for column, p in enumerate(params)]
    found = [(_printable(name), i) for name, i in found]
    alike = Counter(name for name, _ in found)
    unique: dict[str, None] = {}
    for name, i in found:
        of_group = name if alike[name] == 1 else f"{name} (group {i})"
        numbered = (f"{name} (group {i}, {n})" for n in count(2))
        unique[next(x for x in chain((of_group,), numbered) if x not in unique)] = None
    return list(unique)


def _group(index: int, group: Any, scope: Any) -> RecordedGroup:
    name = str(group.get("name", f"group {index}"))
    schedule = group["schedule"] if has_schedule(group) else None
    peak = group["initial_lr"] if schedule is not None else group["lr"]
    return RecordedGroup(_printable(name), float(peak), schedule, _printable(scope))


def _counted(sums: Tensor, params: Sequence[Tensor], layout: Layout | None) -> Tensor:
    """The sums, 0 where other processes count: of replicas one counts. Missing ones stay -1."""
    if layout is None:
        return sums
    counts = torch.tensor([layout.counts(p) for p in params], dtype=torch.bool)
    return torch.where(counts | (sums < 0), sums, 0.0)


def _whole(names: list[str], sums: Tensor, layout: Layout | None) -> tuple[list[str], Tensor]:
    """Names and sums of all processes, whose parts of a tensor are added."""
    if layout is None:
        return names, sums
    all_names, columns = [], []
    parts = layout.gather((names, sums))
    for part, processes in enumerate(parts):
        total: dict[str, Tensor] = {}
        for theirs, own in processes:
            for name, x in zip(theirs, own.unbind(2), strict=True):
                total[name] = x if name not in total else _add(total[name], x)
        for name, x in total.items():
            all_names.append(name if name not in all_names else f"{name} (part {part})")
            columns.append(x)
    return all_names, torch.stack(columns, dim=2) if columns else sums


def _add(a: Tensor, b: Tensor) -> Tensor:
    """The sum of two parts; of one that is missing the other."""
    both = torch.where(a < 0, b, a + b)
    return torch.where(b < 0, a, both)


def saved(ring: Ring, params: Sequence[Tensor], layout: Layout | None) -> dict[str, Any] | None:
    """What a file has of a ring: tensors on the host, and plain numbers. None where there are no values.

    `params`: all of the optimizer, in the order of its groups, whose places a file knows.
    """
    if is_fake(ring.steps):
        return None
    place = {id(p): i for i, p in enumerate(params)}
    here = [column for column, p in enumerate(ring.params) if id(p) in place]
    ints, used, sums = in_order(ring)
    return {
        "steps": int(ring.steps),
        "ints": ints,
        "used": used,
        "sums": sums[:, :, here],
        "params": [place[id(ring.params[column])] for column in here],
        "process": _process(layout),
    }


def checked(saved: Any, groups: int, params: int) -> dict[str, Any]:
    """What a file has of a ring, held to what `saved` writes for so many groups and parameters.

    Raises:
        ValueError: it is something else.
    """
    if not isinstance(saved, Mapping):
        raise ValueError(f"record={arguments.shown(saved)} of the loaded state dict is not a dict")
    found: dict[str, Any] = {
        name: saved.get(name) for name in ("steps", "ints", "used", "sums", "params", "process")
    }
    # one more is counted by every step
    arguments.count("steps of the loaded record", found["steps"], at_most=_MOST_STEPS)
    process = found["process"]
    if process is not None and not (isinstance(process, list) and list(map(type, process)) == [int, int]):
        raise ValueError(f"process={arguments.shown(process)} of the loaded record is no rank and size")
    places = found["params"]
    plain = isinstance(places, (list, tuple)) and all(type(i) is int and 0 <= i < params for i in places)
    if not plain or len(set(places)) < len(places):
        raise ValueError(f"params={arguments.shown(places)} of the loaded record name no parameters")
    ints = found["ints"]
    rows = len(ints) if _is_plain(ints) and ints.ndim == 2 else 0
    if rows > min(found["steps"], MOST):
        raise ValueError(f"ints of the loaded record has {rows} rows, and steps={found['steps']}")
    shapes = {
        "ints": (rows, 1 + groups),
        "used": (rows, len(RECORDED), groups),
        "sums": (rows, len(SUMS), len(places)),
    }
    for name, shape in shapes.items():
        x = found[name]
        dtype = torch.int64 if name == "ints" else torch.float64
        if not _is_plain(x) or x.shape != shape or x.dtype != dtype:
            raise ValueError(f"{name} of the loaded record is no {dtype} tensor of shape {shape}")
        found[name] = x.detach().cpu()
    steps = found["ints"][:, 0]
    rises = bool((steps[1:] > steps[:-1]).all())
    if rows and not (rises and int(steps[0]) >= 0 and int(steps[-1]) < found["steps"]):
        raise ValueError(f"ints of the loaded record do not count up to steps={found['steps']}")
    return found


def _is_plain(x: Any) -> bool:
    """Whether it is a tensor whose values are in memory."""
    return isinstance(x, Tensor) and not x.is_nested and not x.is_meta and x.layout == torch.strided


def restore(
    ring: Ring, saved: dict[str, Any] | None, params: Sequence[Tensor], layout: Layout | None
) -> Ring:
    """A ring that goes on where a file was; None of a file begins the recording anew. Memory is kept.

    Sums of another process's parts of the tensors are left out.
    """
    ring.ints.fill_(-1)
    ring.used.fill_(math.nan)
    ring.sums.fill_(-1)
    if saved is None:
        return ring
    ring = ring.of_params([params[i] for i in saved["params"]])
    ring.steps.fill_(saved["steps"])
    steps, last = saved["ints"][:, 0], ring.record.last
    kept = steps >= saved["steps"] - last
    at = (steps[kept] % last).to(ring.ints.device)
    ring.ints[at] = saved["ints"][kept].to(ring.ints.device)
    ring.used[at] = saved["used"][kept].to(ring.used)
    if ring.record.tensors and saved["process"] == _process(layout):
        ring.sums[at] = saved["sums"][kept].to(ring.sums)
    return ring


def _process(layout: Layout | None) -> list[int] | None:
    """Whose parts of the tensors are recorded here, and of how many processes; None where they are whole."""
    distributed = torch.distributed
    return None if layout is None else [distributed.get_rank(), distributed.get_world_size()]


__all__ = ["checked", "in_order", "names_of", "read", "restore", "saved"]
