"""A step as a CUDA graph, and what one step queues on the GPU, counted in a profiler's trace."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from . import syncs
from .measure import Step, timer

# allocations, compilation and cuBLAS's choices are made before a capture
_WARM_UP = 3


def capture(step: Step, device: torch.device) -> Step:
    """A function that replays `step` as a graph; on the CPU `step` itself, after the same warm-up.

    Gradients must be there, and stay where they are.
    """
    if device.type != "cuda":
        for _ in range(_WARM_UP):
            step()
        return step
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UP):
            step()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def replay_ms(step: Step, device: torch.device, repeats: int) -> float:
    """Time of a replay on the device: `repeats` in a row are queued faster than they run, or nearly so."""
    replay = capture(step, device)
    measure = timer(device)
    measure(replay, 1)
    return min(measure(replay, repeats).ms for _ in range(3))


def counts(step: Callable[[], Any], device: torch.device, steps: int) -> dict[str, float]:
    """Kernels, copies and fills per step; all 0 on the CPU, whose work is no launch."""
    activities = ("CPU", "CUDA") if device.type == "cuda" else ("CPU",)
    found = classify(syncs.profile(step, steps, activities))
    return {kind: number / steps for kind, number in found.items()}


# what the profiler calls work on the device that is no kernel
_COPIES = {
    "Memcpy HtoD": "copies to the device",
    "Memcpy DtoH": "copies to the host",
    "Memcpy DtoD": "copies on the device",
    "Memset": "fills",
}


def classify(events: Iterable[tuple[str, bool]]) -> dict[str, int]:
    """How many events are what: kernels, copies and fills on the device, launches as the host made them."""
    events = list(events)
    found = {"kernels": 0, "launches": 0, **dict.fromkeys(_COPIES.values(), 0)}
    # a named range of the host is shown on the device too
    ranges = {name for name, on_device in events if not on_device}
    for name, on_device in events:
        kind = next((kind for start, kind in _COPIES.items() if name.startswith(start)), None)
        if kind is not None:
            found[kind] += 1
        elif not on_device:
            found["launches"] += "LaunchKernel" in name
        elif name not in ranges:
            found["kernels"] += 1
    return found
