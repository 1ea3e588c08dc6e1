"""The meaning of a step, in plain PyTorch: the oracle that every backend is compared with, and the fallback.

Any device, any float dtype, no host sync: rate, norm, skip and counters are device tensors and `torch.where`,
so the step can be captured in a CUDA graph; a captured step keeps the hyperparameters it was captured with.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fusedlr.schedule import Schedule, evaluate

# of a row, and of AdamW's state under the same names; the last only with amsgrad
MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
# what torch.nn.utils.clip_grad_norm_ adds to the norm before it divides
_CLIP_EPS = 1e-6
# uploaded tables kept per optimizer, far more than there are groups with a table of their own
_MAX_TABLES = 64


def scalar_dtype(device: torch.device) -> torch.dtype:
    """Precision of per-step scalars: fp64 on every device that has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def move(x: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """`x` on a device and in a dtype; queued behind the device's work, waited for where the CPU reads it."""
    return x.to(device, dtype or x.dtype, non_blocking=device.type != "cpu")


@dataclass
class Row:
    """One tensor of the step; all but `step` have the parameter's shape."""

    param: Tensor
    grad: Tensor
    exp_avg: Tensor  # m
    exp_avg_sq: Tensor  # v
    max_exp_avg_sq: Tensor | None  # only with amsgrad
    step: Tensor  # t_i, updates applied to this tensor; 0-dim float32

    def written(self) -> list[Tensor]:
        """The tensors that a step writes."""
        tensors = (self.param, self.exp_avg, self.exp_avg_sq, self.max_exp_avg_sq, self.step)
        return [x for x in tensors if x is not None]


@dataclass(frozen=True)
class GroupStep:
    """What the step needs of one param group."""

    index: int
    rows: Sequence[Row]
    lr: Schedule | float | Tensor  # a schedule is evaluated on the device, at k
    peak: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    amsgrad: bool
    maximize: bool
    max_grad_norm: float | None
    skip_nonfinite: bool  # skip a step whose gradient norm is not finite
    advance: bool = True  # whether k counts this step


@dataclass(frozen=True)
class Signals:
    """What a GradScaler leaves on the optimizer for one step; None where it left nothing."""

    grad_scale: Tensor | float | None = None
    found_inf: Tensor | float | None = None


class TensorMath:
    """The names that `schedule.phase_weights` takes its arithmetic from, on 0-dim tensors of one device."""

    sin, cos, sqrt = staticmethod(torch.sin), staticmethod(torch.cos), staticmethod(torch.sqrt)
    clamp = staticmethod(torch.clamp)

    def __init__(self, device: torch.device) -> None:
        self.device, self.dtype = device, scalar_dtype(device)
        # id of a table -> the table, so that the id stays its own, and its tensor
        self._tables: dict[int, tuple[Sequence[float], Tensor]] = {}

    def scalar(self, x: Any) -> Tensor:
        """`x`, a number or a tensor of one element, as a 0-dim tensor; a number never makes the host wait."""
        if isinstance(x, Tensor):
            return move(x.detach().reshape(()), self.device, self.dtype)
        return torch.full((), float(x), dtype=self.dtype, device=self.device)

    def real(self, x: Tensor) -> Tensor:
        """An integer tensor in the scalars' dtype."""
        return x.to(self.dtype)

    def where(self, condition: Tensor, a: Any, b: Any) -> Tensor:
        """`a` or `b`, tensors or numbers."""
        # a level that does not depend on the step is a number
        a, b = (x if isinstance(x, Tensor) else self.scalar(x) for x in (a, b))
        return torch.where(condition, a, b)

    def take(self, values: Sequence[float], index: Tensor) -> Tensor:
        """`values[index]`; the values are uploaded once."""
        if id(values) not in self._tables:
            # one table is in use per group; an assigned schedule leaves its old one behind
            if len(self._tables) >= _MAX_TABLES:
                self._tables.clear()
            tensor = torch.tensor(values, dtype=self.dtype, device="cpu")
            if self.device.type == "cuda":
                tensor = tensor.pin_memory()
            self._tables[id(values)] = values, move(tensor, self.device)
        _, tensor = self._tables[id(values)]
        return tensor.index_select(0, index.reshape(-1)).reshape(index.shape)


@dataclass
class Counters:
    """Per-group counters and what the last step used, on one device.

    Attributes:
        counts: int64 of shape (4, groups). Its rows are `k` (updates made: drives the schedule), `skipped`
            (steps), `skips_in_row` (steps skipped since the last update) and `stale` (replays of a captured
            step that found other tensors than it was captured with, and did nothing).
        used: of shape (3, groups). Its rows are `lr`, `grad_norm` (nan where none was needed) and `coef` (of
            clipping, 1 where nothing was clipped).
    """

    counts: Tensor
    used: Tensor
    math: TensorMath = field(repr=False)

    def __post_init__(self) -> None:
        """Name the rows."""
        self.k, self.skipped, self.skips_in_row, self.stale = self.counts.unbind()
        self.use(self.used)

    def use(self, used: Tensor) -> None:
        """Keep what a step used in another tensor of this shape."""
        self.used = used
        self.lr, self.grad_norm, self.coef = used.unbind()

    def use_fp32(self) -> None:
        """Keep what a step used in fp32, for kernels that have no fp64."""
        if self.used.dtype != torch.float32:
            self.use(self.used.float())

    @staticmethod
    def zeros(groups: int, device: torch.device) -> Counters:
        """Counters of an optimizer that has made no step."""
        counts = torch.zeros((4, groups), dtype=torch.int64, device=device)
        counters = Counters(
            counts, torch.zeros((3, groups), dtype=scalar_dtype(device), device=device), TensorMath(device)
        )
        counters.grad_norm.fill_(math.nan)
        counters.coef.fill_(1)
        return counters


@torch.no_grad()
def step_(groups: Sequence[GroupStep], counters: Counters, signals: Signals, *, joint: bool) -> None:
    """Make one optimizer step, in place.

    Backends have the same signature. One that has them at hand returns, per group, `k`, `skips_in_row` and
    the rate used, in plain numbers; None is for the host to find out.

    Args:
        groups: every param group in order, with the rows that have a gradient.
        counters: of all groups; `k`, `skipped` and the values used are updated.
        signals: the scaler's `grad_scale` and `found_inf`; any `found_inf` but 0, nan included, skips.
        joint: one norm, one decision to skip and one advance over all groups, else one per group.
    """
    for scope in [groups] if joint else [[group] for group in groups if group.rows]:
        _scope_step_(scope, counters, signals)


def _scope_step_(scope: Sequence[GroupStep], counters: Counters, signals: Signals) -> None:
    """One step of the groups that are clipped and skipped together."""
    xp = counters.math
    max_grad_norm, skip_nonfinite = scope[0].max_grad_norm, scope[0].skip_nonfinite
    skip = torch.zeros((), dtype=torch.bool, device=xp.device)
    if signals.found_inf is not None:
        skip = xp.scalar(signals.found_inf) != 0
    # what multiplies every gradient; None rather than 1, so that untouched gradients cost nothing
    factor = None
    if signals.grad_scale is not None:
        factor = 1 / xp.scalar(signals.grad_scale)
    norm, coef = xp.scalar(math.nan), xp.scalar(1)
    if max_grad_norm is not None or skip_nonfinite:
        norm = grad_norm([row.grad for group in scope for row in group.rows], factor, xp)
    if skip_nonfinite:
        skip = skip | ~torch.isfinite(norm)
    if max_grad_norm is not None:
        coef = (max_grad_norm / (norm + _CLIP_EPS)).clamp(max=1)
        factor = coef if factor is None else factor * coef

    for group in scope:
        i = group.index
        lr = (
            xp.scalar(group.lr)
            if not isinstance(group.lr, Schedule)
            else (group.peak * xp.scalar(evaluate(group.lr.phases, counters.k[i], group.lr.table, xp)))
        )
        for row in group.rows:
            adamw_(row, group, lr, factor, skip)
        counters.lr[i], counters.grad_norm[i], counters.coef[i] = lr, norm, coef
        counters.k[i] += ~skip if group.advance else 0
        counters.skipped[i] += skip
        counters.skips_in_row[i] = (counters.skips_in_row[i] + 1) * skip


def grad_norm(grads: Sequence[Tensor], factor: Tensor | None, xp: TensorMath) -> Tensor:
    """L2 norm of `factor * grads` over all tensors: squares and sums in fp32, in fp64 for fp64 gradients."""
    total = xp.scalar(0)
    for grad in grads:
        g = _compute(grad)
        if factor is not None:
            g = g * move(factor, g.device, g.dtype)
        total = total + xp.scalar(g.square().sum())
    return total.sqrt()


def adamw_(row: Row, group: GroupStep, lr: Tensor, factor: Tensor | None, skip: Tensor) -> None:
    """AdamW on one tensor (Loshchilov and Hutter 2019, arXiv:1711.05101), or nothing where `skip`.

    Arithmetic is in fp32, in fp64 for fp64 parameters; scalars are made in fp64 and rounded once. Every
    operation rounds correctly but one: torch's fp32 `sqrt` on the CPU may be an ulp off, as MKL's is (of
    2**22 numbers between 0 and 1 a fifth on an AMD EPYC, torch 2.13). The compiled steps round it correctly.
    `bc = 1 - b**t` is written as `-expm1(t*log(b))`, which keeps its digits at small `t`.
    """
    b1, b2 = group.betas
    p, m, v = _compute(row.param), _compute(row.exp_avg), _compute(row.exp_avg_sq)
    device, dtype = p.device, p.dtype
    lr, skip = move(lr, device), move(skip, device)

    t = row.step + ~skip
    bc1 = -torch.expm1(t.to(lr.dtype) * _log(b1))
    bc2 = -torch.expm1(t.to(lr.dtype) * _log(b2))

    g = _compute(row.grad)
    if factor is not None:
        g = g * move(factor, device, dtype)
    if group.maximize:
        g = -g
    p = p - (lr * group.weight_decay).to(dtype) * p
    m = m + (g - m) * (1 - b1)
    # in this order, as torch: the square of a finite gradient may overflow
    v = b2 * v + ((1 - b2) * g) * g
    largest = v
    if row.max_exp_avg_sq is not None:
        largest = torch.maximum(_compute(row.max_exp_avg_sq), v)
    denominator = largest.sqrt() / bc2.sqrt().to(dtype) + group.eps
    p = p - (lr / bc1).to(dtype) * (m / denominator)

    # `where` and not a product: what a skipped step computed may be nan
    for tensor, new in ((row.param, p), (row.exp_avg, m), (row.exp_avg_sq, v), (row.max_exp_avg_sq, largest)):
        if tensor is not None:
            tensor.copy_(torch.where(skip, tensor, new.to(tensor.dtype)))
    row.step.copy_(t)


def _compute(x: Tensor) -> Tensor:
    return x.detach() if x.dtype == torch.float64 else x.detach().float()


def _log(b: float) -> float:
    return math.log(b) if b > 0 else -math.inf
