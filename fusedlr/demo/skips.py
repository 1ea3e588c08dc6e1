"""What one overflow does to a schedule, in PyTorch's recipe for loss scaling: stock parts, and fusedlr.

The scaler leaves out the optimizer's step, and nobody tells the scheduler. A tiny model, no time at all.
"""

from dataclasses import dataclass
from typing import Any

from fusedlr.console import aligned

# long enough to see the shift in a picture, short enough that one update more or less matters
ATTEMPTS, OVERFLOW = 20, 8  # steps, and which of them, counted from 0, gets an infinite gradient
WARMUP, PEAK = 4, 1e-3


@dataclass
class Side:
    """Where an optimizer and its schedule are after the run."""

    updates: int  # that the optimizer has made
    schedule: int  # updates that the schedule believes have been made
    rates: list[float]  # of the updates made, in order


@dataclass
class Skip:
    """The same run with both, and the rates that the schedule was meant to give."""

    stock: Side
    fusedlr: Side
    meant: list[float]


def demonstrate(device: str) -> Skip:
    """Run both, with one forced overflow."""
    import fusedlr

    schedule = fusedlr.cosine(warmup_steps=WARMUP, total_steps=ATTEMPTS)
    meant = [schedule.lr_at(k, PEAK) for k in range(ATTEMPTS - 1)]
    return Skip(_stock(device), _fusedlr(schedule, device), meant)


def _stock(device):
    import torch
    from transformers import get_cosine_schedule_with_warmup

    model = _model(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK, fused=True)
    scheduler = get_cosine_schedule_with_warmup(optimizer, WARMUP, ATTEMPTS)
    scaler = torch.amp.GradScaler(device)
    rates = []
    for attempt in range(ATTEMPTS):
        _backward(model, scaler, attempt)
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        rate = optimizer.param_groups[0]["lr"]
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
        optimizer.zero_grad()
        if attempt != OVERFLOW:
            rates.append(float(rate))
    return Side(_updates(optimizer), scheduler.last_epoch, rates)


def _fusedlr(schedule, device):
    import torch

    import fusedlr

    model = _model(device)
    optimizer = fusedlr.FusedAdamW(model.parameters(), lr=PEAK, schedule=schedule, max_grad_norm=1.0)
    scaler = torch.amp.GradScaler(device)
    rates = []
    for attempt in range(ATTEMPTS):
        _backward(model, scaler, attempt)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if attempt != OVERFLOW:
            rates.append(float(optimizer.metrics()["lr"].flatten()[0]))
    # the state is read from the device, where the schedule's counter is
    return Side(_updates(optimizer), optimizer.scheduler.state_dict()["k"][0], rates)


def _model(device):
    import torch

    # a stream of random numbers of its own: the runs that are compared draw what they did without this one
    with torch.random.fork_rng(devices=[device] if device == "cuda" else []):
        torch.manual_seed(0)
        return torch.nn.Linear(4, 1).to(device)


def _backward(model: Any, scaler: Any, attempt: int) -> None:
    import torch

    loss = model(torch.ones(2, 4, device=scaler._device)).square().mean()
    scaler.scale(loss).backward()
    if attempt == OVERFLOW:
        model.weight.grad[0, 0] = float("inf")


def _updates(optimizer: Any) -> int:
    return int(next(iter(optimizer.state.values()))["step"])


def table(skip: Skip) -> str:
    """The comparison in words and columns."""
    sides = (skip.fusedlr, skip.stock)
    wrong = [
        sum(abs(rate - meant) > 1e-6 * PEAK for rate, meant in zip(side.rates, skip.meant, strict=True))
        for side in sides
    ]
    rows = [
        ("", "fusedlr", "stock"),
        ("updates the optimizer made", *(str(side.updates) for side in sides)),
        ("updates its schedule counted", *(str(side.schedule) for side in sides)),
        ("updates at another rate than meant", *map(str, wrong)),
    ]
    return "\n".join(
        [
            f"one overflow in {ATTEMPTS} steps under a GradScaler, which leaves out the optimizer's step:",
            *aligned(rows),
        ]
    )
