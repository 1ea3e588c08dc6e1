"""One inventory from start to result: build every provider, let the gate judge, time who passes."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from . import measure, parity
from .measure import Spread
from .providers import BASELINE, Provider, Stepper
from .shapes import Inventory

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_BANDWIDTH = "bandwidth"  # among the steppers of a run, the operation that gives it


@dataclass(frozen=True)
class Timing:
    """How an inventory is timed."""

    device: torch.device
    dtype: str = "float32"
    clip: bool = True
    rounds: int | None = None
    seconds: float = 2.0


@dataclass
class Row:
    """What was measured of one provider."""

    provider: str
    ms: Spread
    host_ms: Spread
    # the baseline's time over this one's, within each round: above 1 is faster
    ratio: Spread
    gb_per_s: float
    # of what an operation in place reached
    bandwidth_share: float
    bytes_per_parameter: float  # moved by an ideal step
    state_bytes: int
    distance: float  # of a weight from the fp64 oracle, largest


@dataclass
class Result:
    """What was measured of one inventory."""

    inventory: str
    label: str
    tensors: int
    parameters: int
    dtype: str
    clip: bool
    rounds: int
    bound: float  # of `distance`
    bandwidth_gb_per_s: Spread
    rows: list[Row] = field(default_factory=list)
    rejected: dict[str, str] = field(default_factory=dict)  # provider -> why it was not timed


def needed_bytes(inventory: Inventory, providers: int, dtype: str) -> int:
    """Memory that `run` takes at most, on the device.

    Per parameter: of every provider parameter, gradient and two moments in fp32; what one provider keeps of
    the fp32 values of 16-bit parameters; weights and directions of the start; the oracle's four numbers in
    fp64, or later its result and what the bandwidth is measured on.
    """
    width = DTYPES[dtype].itemsize
    rest = 4 if width == 2 else 0
    return inventory.parameters * (providers * (2 * width + 8) + rest + width + 8 + 32)


def run(
    inventory: Inventory,
    providers: Sequence[Provider],
    timing: Timing,
    note: Callable[[str], None] = lambda text: None,
) -> Result:
    """Gate and time `providers`, of which one is the baseline; `note` hears what is going on."""
    # an optimizer and its scheduler hold each other: the memory of the last inventory is still taken
    gc.collect()
    note("oracle")
    dtype = DTYPES[timing.dtype]
    bound = parity.bound(inventory, dtype)
    begin = parity.start(inventory, dtype, timing.device)
    expected = parity.oracle(begin, timing.clip)
    steppers: dict[str, Stepper] = {}
    distances, rejected = {}, {}
    for provider in providers:
        note(f"gate {provider.name}")
        try:
            stepper = provider.build(begin.parameters(), timing.clip)
            away = parity.gate(stepper, begin, expected)
        except Exception as error:
            # one that breaks must not take the others' results with it
            rejected[provider.name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
            continue
        distances[provider.name] = away
        # not `away > bound`, which lets nan pass
        if away <= bound:
            steppers[provider.name] = stepper
        else:
            rejected[provider.name] = parity.misfit(away, bound)
    del expected, begin
    result = Result(
        inventory.name,
        inventory.label,
        inventory.tensors,
        inventory.parameters,
        timing.dtype,
        timing.clip,
        0,
        bound,
        Spread(0.0, 0.0, 0.0),
        rejected=rejected,
    )
    if BASELINE in steppers:
        _time(result, steppers, distances, timing, note)
    return result


def _time(
    result: Result,
    steppers: dict[str, Stepper],
    distances: dict[str, float],
    timing: Timing,
    note: Callable[[str], None],
) -> None:
    moved = {name: stepper.bytes_per_step(timing.clip) for name, stepper in steppers.items()}
    steps = {name: stepper.step for name, stepper in steppers.items()}
    steps[_BANDWIDTH] = measure.in_place_pass(moved[BASELINE], timing.device)
    samples = measure.interleave(steps, timing.device, timing.rounds, timing.seconds, note)
    result.rounds = len(samples[BASELINE])
    result.bandwidth_gb_per_s = Spread.of(moved[BASELINE] / sample.ms / 1e6 for sample in samples[_BANDWIDTH])
    for name, stepper in steppers.items():
        ms = Spread.of(sample.ms for sample in samples[name])
        rate = moved[name] / ms.median / 1e6
        result.rows.append(
            Row(
                name,
                ms,
                Spread.of(sample.host_ms for sample in samples[name]),
                measure.ratio(samples[BASELINE], samples[name]),
                rate,
                rate / result.bandwidth_gb_per_s.median,
                moved[name] / result.parameters,
                stepper.state_bytes(),
                distances[name],
            )
        )
