"""Time on the host for a step on many tiny tensors, for each way in which the step can be driven.

The arithmetic of 448 tensors of 32 elements takes microseconds: what is timed is everything around it. Every
step sees new gradients, as backward gives them. Each way has passed the fp64 gate of bench/parity.py first.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

import fusedlr

from . import measure, parity
from .measure import Sample, Spread
from .providers import (
    BASELINE,
    MAX_NORM,
    MIN_LR_RATIO,
    OPTIONS,
    PROVIDERS,
    TOTAL_STEPS,
    WARMUP_STEPS,
    Stepper,
    warmup_cosine,
)
from .shapes import Inventory, even

TENSORS, ELEMENTS, SCOPES = 448, 32, 8
INVENTORY: Inventory = even(TENSORS, TENSORS * ELEMENTS)
PLAIN = "plain"
SCALE = 1024.0  # of the loss, a power of 2, so that scaling and unscaling round nothing

Params = list[torch.nn.Parameter]


@dataclass
class Driven:
    """An optimizer and how it is driven: `before` is the caller's work, `step` is what is timed."""

    params: Params
    optimizer: Any
    step: Callable[[], Any]
    before: Callable[[], Any] = lambda: None


@dataclass(frozen=True)
class Way:
    """A way to drive a step."""

    build: Callable[[Params], Driven]
    # sets of tensors that are normed and clipped by themselves
    scopes: int = 1


@dataclass
class Row:
    """What was measured of one way."""

    way: str
    ms: Spread
    # this one's time over the plain step's, within each round: below 1 is faster
    times_plain: Spread
    # stock's time over this one's, within each round: above 1 is faster
    ratio: Spread
    distance: float  # of a weight from the fp64 oracle, largest


@dataclass
class Result:
    """What was measured of all ways."""

    tensors: int
    elements: int  # of each tensor
    rounds: int
    bound: float  # of `distance`
    rows: list[Row] = field(default_factory=list)
    rejected: dict[str, str] = field(default_factory=dict)  # way -> why it was not timed


def rate(step: int) -> float:
    """The rate that an outside schedule gives: that of the gate, and after its end another in every step.

    A rate that is the same as before could be taken as not given at all.
    """
    factor = warmup_cosine(step, WARMUP_STEPS, TOTAL_STEPS, MIN_LR_RATIO)
    return OPTIONS["lr"] * factor * (0.5 if step > TOTAL_STEPS and step % 2 else 1.0)


def _schedule() -> fusedlr.Schedule:
    return fusedlr.cosine(WARMUP_STEPS, TOTAL_STEPS, min_lr_ratio=MIN_LR_RATIO)


def _stock(params: Params) -> Driven:
    stepper = PROVIDERS[BASELINE].build(params, True)
    return Driven(params, stepper.optimizer, stepper.step)


def _plain(params: Params) -> Driven:
    optimizer = fusedlr.FusedAdamW(params, **OPTIONS, schedule=_schedule(), max_grad_norm=MAX_NORM)
    return Driven(params, optimizer, optimizer.step)


def _scaler(params: Params) -> Driven:
    """As `GradScaler.step` drives an optimizer that unscales by itself: two new tensors in every step."""
    driven = _plain(params)
    device = params[0].device

    def before() -> None:
        torch._foreach_mul_([p.grad for p in params], SCALE)
        driven.optimizer.grad_scale = torch.full((), SCALE, device=device)
        driven.optimizer.found_inf = torch.zeros((), device=device)

    driven.before = before
    return driven


def _tensor_lr(params: Params) -> Driven:
    """The rate is a tensor that its owner rewrites in place before every step."""
    lr = torch.tensor(0.0, device=params[0].device)
    optimizer = fusedlr.FusedAdamW(params, **OPTIONS | {"lr": lr}, max_grad_norm=MAX_NORM)
    made = 0

    def before() -> None:
        nonlocal made
        lr.fill_(rate(made))
        made += 1

    return Driven(params, optimizer, optimizer.step, before)


def _given_lr(params: Params) -> Driven:
    """The rate is a float that an outside scheduler assigns before every step; that is timed too."""
    optimizer = fusedlr.FusedAdamW(params, **OPTIONS, max_grad_norm=MAX_NORM)
    made = 0

    def step() -> None:
        nonlocal made
        optimizer.param_groups[0]["lr"] = rate(made)
        made += 1
        optimizer.step()

    return Driven(params, optimizer, step)


def _scopes(params: Params) -> Driven:
    groups = [{"params": part} for part in parity.parts(params, SCOPES)]
    optimizer = fusedlr.FusedAdamW(
        groups, **OPTIONS, schedule=_schedule(), max_grad_norm=MAX_NORM, groups="independent"
    )
    return Driven(params, optimizer, optimizer.step)


# as rows of the table
WAYS: dict[str, Way] = {
    f"stock {BASELINE}": Way(_stock),
    PLAIN: Way(_plain),
    "GradScaler's signals": Way(_scaler),
    "tensor lr": Way(_tensor_lr),
    "float lr given": Way(_given_lr),
    f"{SCOPES} scopes": Way(_scopes, SCOPES),
}


def run(
    device: torch.device,
    rounds: int | None,
    seconds: float,
    ways: Mapping[str, Way] = WAYS,
    note: Callable[[str], None] = lambda text: None,
) -> Result:
    """Gate and time `ways`, of which the first is stock's; `note` hears what is going on."""
    begin = parity.start(INVENTORY, torch.float32, device)
    result = Result(TENSORS, ELEMENTS, 0, parity.bound(INVENTORY, torch.float32))
    passed: dict[str, Driven] = {}
    distances: dict[str, float] = {}
    for name, way in ways.items():
        note(f"gate {name}")
        driven = way.build(begin.parameters())
        expected = parity.oracle(begin, True, way.scopes)
        distances[name] = away = parity.gate(_stepper(driven), begin, expected)
        # not `away > bound`, which lets nan pass
        if away <= result.bound:
            passed[name] = driven
        else:
            result.rejected[name] = parity.misfit(away, result.bound)
    stock = next(iter(ways))
    if stock in passed and PLAIN in passed:
        gradients = [grad.clone() for grad in begin.gradients(0)]
        steps = {name: Timed(driven, gradients, device) for name, driven in passed.items()}
        samples = measure.interleave(steps, device, rounds, seconds, note, time_step_alone)
        result.rounds = len(samples[stock])
        for name, found in samples.items():
            result.rows.append(
                Row(
                    name,
                    Spread.of(sample.host_ms for sample in found),
                    measure.ratio(found, samples[PLAIN]),
                    measure.ratio(samples[stock], found),
                    distances[name],
                )
            )
    return result


def _stepper(driven: Driven) -> Stepper:
    """For the gate, which knows one call per step."""

    def step() -> None:
        driven.before()
        driven.step()

    return Stepper(driven.params, driven.optimizer, step)


@dataclass
class Timed:
    """A step with all that precedes it; the clock runs during the step alone."""

    driven: Driven
    gradients: list[torch.Tensor]
    device: torch.device

    def prepare(self) -> None:
        """New gradients, in new memory: each is made while the one that it replaces is still there."""
        for p, grad in zip(self.driven.params, self.gradients, strict=True):
            p.grad = grad.clone()
        self.driven.before()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def __call__(self) -> None:
        self.prepare()
        self.driven.step()


def time_step_alone(timed: Timed, repeats: int) -> Sample:
    """Time per step until the host is free again, without what precedes the step.

    The median of the repeats: where another program takes the core, its time slice is many steps long.
    """
    seconds = []
    for _ in range(repeats):
        timed.prepare()
        begin = time.perf_counter()
        timed.driven.step()
        seconds.append(time.perf_counter() - begin)
    ms = 1e3 * statistics.median(seconds)
    return Sample(ms, ms)
