"""Does a step make the host wait for the GPU, or copy anything to the host? Two checks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

import torch

# CUDA runtime and driver calls, as the profiler names them, that wait for the device
_WAITS = ("Synchronize", "cudaMemcpy", "cuMemcpy")
# of those, the ones that only queue work
_QUEUED = ("Async",)
# copies to the host, and what `.item()` and its relatives come down to on any device
_READS = ("Memcpy DtoH", "aten::_local_scalar_dense")


def forbidden(names: Iterable[str]) -> Counter[str]:
    """Profiler events that a step must not cause: waits, blocking copies, and copies to the host."""
    found: Counter[str] = Counter()
    for name in names:
        waits = any(wait in name for wait in _WAITS) and not any(queued in name for queued in _QUEUED)
        if waits or name.startswith(_READS):
            found[name] += 1
    return found


def debug_mode_error(step: Callable[[], None], steps: int) -> str | None:
    """What torch reports as a synchronizing operation during `steps` steps, or None."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(steps):
            step()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return None


def trace(step: Callable[[], None], steps: int, activities: Iterable[str] = ("CPU", "CUDA")) -> Counter[str]:
    """How often every profiler event occurs in `steps` steps; the last wait, for the profiler, is outside."""
    names: Counter[str] = Counter(name for name, _ in profile(step, steps, activities))
    if "CUDA" in activities and names["cudaDeviceSynchronize"]:
        # the profiler itself synchronizes when it stops; that call is not the step's
        names["cudaDeviceSynchronize"] -= 1
    return +names


def profile(step: Callable[[], None], steps: int, activities: Iterable[str]) -> list[tuple[str, bool]]:
    """The profiler's events in `steps` steps: name, and whether it is the device's."""
    wanted = [getattr(torch.profiler.ProfilerActivity, name) for name in activities]
    with torch.profiler.profile(activities=wanted) as profiler:
        for _ in range(steps):
            step()
    cpu = torch.autograd.DeviceType.CPU
    return [(event.name, event.device_type != cpu) for event in profiler.events()]
