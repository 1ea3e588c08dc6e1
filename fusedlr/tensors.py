"""Whether a step can use a gradient or an entry of the state, and if not, why: the words of its errors."""

from __future__ import annotations

from numbers import Real
from typing import Any

import torch
from torch import Tensor

from fusedlr.columns import STATE
from fusedlr.reference import is_sharded, local

# what a moment may be put in as; whole numbers are turned into floating point
_MOMENTS = (
    *(torch.float32, torch.bfloat16, torch.float16, torch.float64),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)

SHARDED = (
    "a parameter sharded by FullyShardedDataParallel has no gradient norm here: shard with fully_shard "
    "(FSDP2), whose parameters do, or clip with FSDP's clip_grad_norm_, and pass max_grad_norm=None and "
    "nonfinite='propagate'"
)


def gradient_misfit(p: Tensor, normed: bool) -> str | None:
    """Why the gradient of `p` cannot update it, or be part of a norm if it is `normed`."""
    grad = p.grad
    assert grad is not None
    # set by FSDP on what it shards: every rank would clip and skip by its own part
    if normed and getattr(p, "_fsdp_flattened", False):
        return SHARDED
    for x, what in ((p, "a parameter"), (grad, "a gradient")):
        if x.is_complex():
            return f"{what} that is complex is not supported"
    reason = spread_misfit("gradient", grad, p)
    if reason:
        return reason
    if grad.layout != torch.strided:
        return f"a gradient of layout {grad.layout} is not supported: gradients must be dense"
    if grad.dtype != p.dtype:
        return f"its gradient is {grad.dtype} but the parameter is {p.dtype}"
    if grad.device != p.device:
        return f"its gradient is on {grad.device} but the parameter is on {p.device}"
    if grad.shape != p.shape:
        return f"its gradient has shape {tuple(grad.shape)} but the parameter has {tuple(p.shape)}"
    if not p.is_floating_point():
        return f"a parameter of dtype {p.dtype} cannot be optimized"
    if p.device.type == "meta":
        return "a parameter on the meta device has no numbers to update"
    for x, what in ((p, "the parameter"), (grad, "its gradient")):
        # FSDP leaves parameters whose storage has been freed
        if _is_freed(local(x)):
            return f"the memory of {what} has been freed"
    if _share_memory(local(p)):
        return f"a parameter whose elements share memory, stride {p.stride()}, cannot be updated in place"
    return None


def state_misfit(p: Tensor, entry: dict[str, Any] | None) -> str | None:
    """Why this state does not belong to this parameter."""
    if entry is not None and not isinstance(entry, dict):
        return f"its state is a {type(entry).__name__}, expected a dict"
    for key in STATE:
        if not entry or key not in entry:
            continue
        value = entry[key]
        if not isinstance(value, Tensor):
            return f"its {key} is a {type(value).__name__}, expected a tensor"
        if value.shape != p.shape:
            return f"its {key} has shape {tuple(value.shape)} but the parameter has {tuple(p.shape)}"
        if value.device != p.device:
            return f"its {key} is on {value.device} but the parameter is on {p.device}"
        if value.layout != torch.strided:
            return f"its {key} is of layout {value.layout}, expected a dense tensor"
        if value.dtype not in _MOMENTS:
            return f"its {key} is {value.dtype}, expected a floating point number of 16 bits or more"
        reason = spread_misfit(key, value, p)
        if reason:
            return reason
        if _share_memory(local(value)):
            return f"its {key} has elements that share memory, stride {value.stride()}"
        if _is_freed(local(value)):
            return f"the memory of its {key} has been freed"
    step = entry.get("step", 0) if entry else 0
    if isinstance(step, Tensor) and step.numel() != 1:
        return f"its step has shape {tuple(step.shape)}, expected one element"
    if not isinstance(step, (Tensor, Real)):
        return f"its step is {step!r}, expected a number"
    return None


def spread_misfit(what: str, x: Tensor, p: Tensor) -> str | None:
    """Why a tensor is not spread over processes as its parameter is."""
    for tensor, name in ((p, "the parameter"), (x, f"its {what}")):
        if any(place.is_partial() for place in getattr(tensor, "placements", ())):
            return f"{name} is {_placements(tensor)}, a sum that is still to be made: redistribute it first"
    spread = [(t.device_mesh, t.placements) if is_sharded(t) else None for t in (p, x)]  # type: ignore[attr-defined]
    if spread[0] == spread[1]:
        return None
    can = is_sharded(x) and is_sharded(p) and x.device_mesh == p.device_mesh  # type: ignore[attr-defined]
    advice = ": redistribute it first" if can else ""
    return f"its {what} is {_placements(x)}, but the parameter is {_placements(p)}{advice}"


def _placements(x: Tensor) -> str:
    if not is_sharded(x):
        return "a plain tensor"
    return f"{x.placements} on {x.device_mesh}"  # type: ignore[attr-defined]


def _share_memory(x: Tensor) -> bool:
    """Whether elements of a tensor lie in one place, so that it cannot be updated."""
    return any(stride == 0 and size > 1 for stride, size in zip(x.stride(), x.shape, strict=True))


def _is_freed(x: Tensor) -> bool:
    return bool(type(x) in (Tensor, torch.nn.Parameter) and x.numel() and not x.data_ptr())
