"""The gate before the timing: every provider's first steps must give the numbers of an fp64 oracle.

All start from the same weights and see the same gradients, which change their direction, and their size
across the clipping threshold: AdamW does not notice a size that stays.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .providers import (
    MIN_LR_RATIO,
    OPTIONS,
    TOTAL_STEPS,
    WARMUP_STEPS,
    Stepper,
    warmup_cosine,
    with_scheduler,
)
from .shapes import Inventory

# norm of all gradients in each step, in units of the clipping threshold; the first step's rate is 0
NORMS = (4.0, 0.25, 2.0, 8.0, 0.5)


@dataclass
class Start:
    """Weights in [-1, 1), and two directions of which each step's gradients are mixed."""

    inventory: Inventory
    dtype: torch.dtype
    weights: list[Tensor]
    directions: tuple[list[Tensor], list[Tensor]]  # fp32

    def parameters(self, dtype: torch.dtype | None = None) -> list[torch.nn.Parameter]:
        """Fresh parameters at the start, in their own memory."""
        return [torch.nn.Parameter(w.to(dtype or self.dtype, copy=True)) for w in self.weights]

    def gradients(self, step: int) -> Iterator[Tensor]:
        """The gradients of a step, in the parameters' dtype and in new memory, as backward gives them."""
        norm = NORMS[step] / math.sqrt(self.inventory.parameters)
        a, b = norm * math.cos(step), norm * math.sin(step)
        for x, y in zip(*self.directions, strict=True):
            yield (x * a).add_(y, alpha=b).to(self.dtype)


def start(inventory: Inventory, dtype: torch.dtype, device: torch.device) -> Start:
    """Drawn on the CPU with a fixed seed: the same on every device."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(inventory.parameters, generator=generator).mul_(2).sub_(1)
    direction = torch.randn(inventory.parameters, generator=generator)

    def cut(flat: Tensor) -> list[Tensor]:
        pieces = flat.split(inventory.sizes)
        return [piece.view(shape) for piece, shape in zip(pieces, inventory.shapes, strict=True)]

    directions = direction.to(device), direction.flip(0).to(device)
    return Start(inventory, dtype, cut(weights.to(device, dtype)), (cut(directions[0]), cut(directions[1])))


def advance(stepper: Stepper, begin: Start) -> None:
    """Make the steps of the gate; afterwards the last gradients stay, for the timing."""
    for k in range(len(NORMS)):
        for p, grad in zip(stepper.params, begin.gradients(k), strict=True):
            p.grad = grad.to(p.dtype)
        stepper.step()


def parts(params: list[torch.nn.Parameter], scopes: int) -> list[list[torch.nn.Parameter]]:
    """`params` in `scopes` runs of equal length."""
    size, rest = divmod(len(params), scopes)
    assert not rest
    return [params[i * size : (i + 1) * size] for i in range(scopes)]


def oracle(begin: Start, clip: bool, scopes: int = 1) -> Tensor:
    """The weights after the steps by torch's for-loop in fp64, flat.

    Each of the `scopes` has an optimizer of its own, so that it is normed and clipped by itself.
    """
    params = begin.parameters(torch.float64)
    alone = [
        with_scheduler(part, torch.optim.AdamW(part, foreach=False, fused=False, **OPTIONS), clip)
        for part in parts(params, scopes)
    ]

    def step() -> None:
        for stepper in alone:
            stepper.step()

    advance(Stepper(params, None, step), begin)
    return torch.cat([p.detach().view(-1) for p in params])


def gate(stepper: Stepper, begin: Start, expected: Tensor) -> float:
    """Make the steps; the largest difference of a weight from the oracle's, nan if any is not a number."""
    advance(stepper, begin)
    pieces = expected.split([p.numel() for p in stepper.params])
    gaps = [
        (p.detach().view(-1).double() - piece).abs().max()
        for p, piece in zip(stepper.params, pieces, strict=True)
    ]
    # torch's max, unlike Python's, never passes over a nan
    return torch.stack(gaps).max().item()


def misfit(away: float, allowed: float) -> str:
    """Why a provider `away` from the oracle is not timed."""
    return f"{away:.2g} from the fp64 oracle, where rounding allows {allowed:.2g}"


def bound(inventory: Inventory, dtype: torch.dtype) -> float:
    r"""How far rounding alone can carry a weight from the oracle.

    With s and u the unit roundoffs of the stored dtype and of fp32, in step t from 1 at rate lr:

    - the weight, at most 1 + sum(lr), is stored once and decayed by a rounded product: 2 s;
    - of the update lr * m / sqrt(v), where abs(m) <= max(abs(g)) <= sqrt(t * v) up to the betas: m and v were
      stored t times, v under a root: 1.5 t s. A gradient clipped in place and a norm kept in the stored
      dtype: 4 s. Arithmetic on lr (8 by the contract of schedules), m (6), v (8, halved), root, eps,
      division, product and both corrections (6): 24 u. A power in fp32 loses digits in 1 - b2**t: 1.5 / (1 -
      b2**t) u;
    - a sum of n squares in fp32, in at least 8 lanes, rounds n / 8 times: the norm errs by sqrt(n / 8) / 2 u
      if roundings go either way.
    """
    stored = torch.finfo(dtype).eps / 2
    u = torch.finfo(torch.float32).eps / 2
    norm = math.sqrt(max(inventory.sizes) / 8) / 2
    total, size = 0.0, 1.0
    for t in range(1, len(NORMS) + 1):
        lr = OPTIONS["lr"] * warmup_cosine(t - 1, WARMUP_STEPS, TOTAL_STEPS, MIN_LR_RATIO)
        corrected = 1.5 / (1 - OPTIONS["betas"][1] ** t)
        size += lr
        total += 2 * stored * size + lr * math.sqrt(t) * (
            (1.5 * t + 4) * stored + (24 + corrected + norm) * u
        )
    return total
