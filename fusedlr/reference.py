"""The meaning of a step, in plain PyTorch: the oracle that every backend is compared with, and the fallback.

Any device, any float dtype, no host sync: rate, norm, skip and counters are device tensors and `torch.where`,
so the step can be captured in a CUDA graph; a captured step keeps the hyperparameters it was captured with.
A step has two stages, `norm_` and `update_`; between them the scopes' sums of squares lie on the device.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fusedlr.columns import COUNTS, METRICS, NORMS, USED
from fusedlr.guard import ZClip
from fusedlr.record import Ring
from fusedlr.schedule import Schedule, evaluate

# what torch.nn.utils.clip_grad_norm_ adds to the norm before it divides
CLIP_EPS = 1e-6
# what ZClip adds to the standard deviation before it divides
Z_EPS = 1e-6
# uploaded tables kept per optimizer, far more than there are groups with a table of their own
_MAX_TABLES = 64


def scalar_dtype(device: torch.device) -> torch.dtype:
    """Precision of per-step scalars: fp64 on every device that has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def move(x: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """`x` on a device and in a dtype; queued behind the device's work, waited for where the CPU reads it."""
    return x.to(device, dtype or x.dtype, non_blocking=device.type != "cpu")


def capturing(device: torch.device) -> bool:
    """Whether what is queued now becomes part of a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def is_fake(x: Tensor) -> bool:
    """Whether a tensor has a shape but no values, as under `FakeTensorMode`: nothing can be read from it."""
    # by name: the module of FakeTensor is slow to import
    return type(x).__name__ == "FakeTensor"


def is_sharded(x: Tensor) -> bool:
    """Whether a tensor is a DTensor, of which this process may hold a part."""
    # by name: its module is slow to import
    return type(x).__name__ == "DTensor"


def local(x: Tensor) -> Tensor:
    """What this process holds of a tensor: of a DTensor its local part, else all of it."""
    if not is_sharded(x):
        return x
    part: Tensor = x._local_tensor  # type: ignore[attr-defined]
    # the result of a collective that may be under way
    return part.wait() if type(part).__name__ == "AsyncCollectiveTensor" else part  # type: ignore[attr-defined]


@dataclass(frozen=True, eq=False)
class Row:
    """One tensor of the step, whose gradient is `owner.grad` or missing.

    A row keeps no tensor but its parameter alive, so that moments can be offloaded between steps.
    """

    group: int  # index of its param group
    owner: Tensor  # the parameter, as the optimizer has it
    all_state: dict[Tensor, dict[str, Any]]  # of the optimizer: parameter -> what is kept for it
    names: tuple[str, ...]  # those of `columns.STATE` that a step of this tensor needs
    counted: bool = True  # whether this process's part is in the norm: of replicas one is
    place: int = 0  # of the parameter among those of its group
    column: int = 0  # of the parameter in a `Ring`, if there is one

    @property
    def param(self) -> Tensor:
        """The part of the parameter that this process holds, which a step updates."""
        return local(self.owner)

    @property
    def grad(self) -> Tensor | None:
        """The gradient of that part."""
        return None if self.owner.grad is None else local(self.owner.grad)

    @property
    def state(self) -> dict[str, Tensor]:
        """The tensors under these names, of that part's shape."""
        entry = self.all_state[self.owner]
        return {name: local(entry[name]) for name in self.names}

    @property
    def step(self) -> Tensor:
        """The updates applied to this tensor, t; 0-dim float32."""
        return self.all_state[self.owner]["step"]

    @staticmethod
    def alone(group: int, param: Tensor, state: dict[str, Tensor], step: Tensor, **others: Any) -> Row:
        """A row with state of its own."""
        return Row(group, param, {param: {**state, "step": step}}, tuple(state), **others)

    def written(self) -> list[Tensor]:
        """The tensors that a step writes."""
        return [self.param, *self.state.values(), self.step]


@dataclass(frozen=True)
class GroupStep:
    """What a step needs of one param group."""

    schedule: Schedule | None  # evaluated on the device, at k; None: the rate is given
    lr: Tensor | None  # a rate that is given as a tensor; None: a number, which is among the inputs of a step
    peak: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    maximize: bool
    scope: int  # index of the scope


@dataclass(frozen=True)
class Scope:
    """Groups that are normed, clipped, skipped and counted together.

    A scope makes a step when one of its tensors has a gradient, or else if it `always` does.
    """

    max_grad_norm: float | None  # the norm is never above it; not None where there is a `zclip`
    skip_nonfinite: bool  # skip a step whose gradient norm is not finite
    always: bool
    # whether it skips by its own norm alone, whatever a scaler has found in the gradients of other scopes
    by_own_norm: bool = False
    zclip: ZClip | None = None  # clips or skips norms far above those before

    @property
    def normed(self) -> bool:
        """Whether the norm of its gradients is needed."""
        return self.max_grad_norm is not None or self.skip_nonfinite


@dataclass(frozen=True)
class Signals:
    """What one step is told; None where there is nothing to tell.

    Attributes:
        grad_scale: what a GradScaler multiplied the loss by.
        found_inf: anything but 0 where it found a gradient that is not finite.
        stepped: of shape (scopes,), not 0 where some process has a gradient of the scope; None where only
            the gradients of this process matter.
        only: per scope whether it may make the step; a tensor, of shape (scopes,), is read on the device.
    """

    grad_scale: Tensor | float | None = None
    found_inf: Tensor | float | None = None
    stepped: Tensor | None = None
    only: Tensor | tuple[bool, ...] | None = None

    def allow(self, scope: int) -> bool:
        """Whether a scope may make the step, as far as the host knows."""
        return not isinstance(self.only, tuple) or self.only[scope]

    def allowed_groups(self, groups: Sequence[GroupStep]) -> list[bool] | None:
        """The same per group; None where all may."""
        return [self.allow(group.scope) for group in groups] if isinstance(self.only, tuple) else None


class Inputs(Protocol):
    """What is new in every step, for all rows and groups; the watch of a plan has it."""

    @property
    def gradients(self) -> Sequence[int]:
        """Per row the address of its gradient, 0 where there is none."""

    @property
    def rates(self) -> Sequence[float]:
        """Per group the rate that is given as a number, nan where it is a tensor."""

    @property
    def gradients_at(self) -> int:
        """Where `gradients` lie in memory, as unsigned 64-bit integers."""

    @property
    def rates_at(self) -> int:
        """Where `rates` lie in memory, as doubles."""

    @property
    def presence(self) -> int:
        """Another number whenever other rows have a gradient than in the step before."""

    def increment_versions(self, groups: Sequence[bool] | None = None) -> None:
        """Tell autograd that parameters with a gradient are written to: those of these groups, or all."""


class Made(NamedTuple):
    """What a step on the CPU tells of every group; a step on a GPU keeps it on the device."""

    k: list[int]
    skips_in_row: list[int]
    lr: list[float]  # the rate used, or of a group that made no step the rate of its next one


class Stepper(Protocol):
    """A step made ready by a backend for rows, groups and scopes; it may be run any number of times.

    Between `norm` and `update`, `Counters.squares` has the sums of squares of this process.
    """

    def assign(self, groups: Sequence[GroupStep], scopes: Sequence[Scope]) -> None:
        """Take new options; called before the first step too."""

    def norm(self, signals: Signals) -> None:
        """Write the scopes' sums of squares."""

    def update(self, signals: Signals) -> Made | None:
        """Decide by the sums of squares, evaluate the schedules, update and count."""

    def step(self, signals: Signals) -> Made | None:
        """Both stages in one."""

    def active(self) -> Sequence[bool]:
        """Per group whether its scope has made the last step, skipped ones included."""


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
        counts: int64 of shape (7, groups), the rows `columns.COUNTS`.
        used: of shape (11, groups), the rows `columns.USED`: `lr`, `grad_norm` (nan where none was needed),
            `coef` (of clipping, 1 where nothing was clipped), `limit` (of the norm, inf where there was
            none), two that are a GPU step's own, and `norms`: those of `columns.NORMS`, in the column of a
            scope's first group.
        squares: of shape (groups,) and never empty, the dtype of `used`: in the first places, per scope, the
            sum of squares of the unscaled gradients of the step under way.
        graphs: what a GPU backend must keep for the CUDA graphs that have captured its steps; it goes on with
            the optimizer when the counters are replaced.
        ring: where steps are recorded, or None.
    """

    counts: Tensor
    used: Tensor
    squares: Tensor
    math: TensorMath = field(repr=False)
    graphs: Any = field(default=None, repr=False)
    ring: Ring | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        """Name the rows."""
        self.k, self.skipped, self.skips_in_row, self.stale = self.counts[:4].unbind()
        self.nonfinite, self.nonfinite_step = self.counts[4:6].unbind()
        self._name_used()

    def _name_used(self) -> None:
        self.lr, self.grad_norm, self.coef, self.limit = self.used[: len(METRICS)].unbind()
        self.norms = self.used[-len(NORMS) :]

    def use_fp32(self) -> None:
        """Keep what a step uses in fp32, for kernels that have no fp64."""
        if self.used.dtype != torch.float32:
            norms = split_norms(self.norms)
            self.used = self.used.float()
            self._name_used()
            self.norms.copy_(norms)
            if self.ring is not None:
                self.ring = self.ring.of_groups(range(self.k.numel()), self.k.device, self.used.dtype)
        self.squares = self.squares.float()

    @staticmethod
    def zeros(groups: int, device: torch.device) -> Counters:
        """Counters of an optimizer that has made no step."""
        dtype = scalar_dtype(device)
        counts = torch.zeros((len(COUNTS), groups), dtype=torch.int64, device=device)
        used = torch.zeros((len(USED), groups), dtype=dtype, device=device)
        # the joint scope is there without groups, too
        squares = torch.zeros(max(groups, 1), dtype=dtype, device=device)
        counters = Counters(counts, used, squares, TensorMath(device))
        counters.grad_norm.fill_(math.nan)
        counters.coef.fill_(1)
        counters.limit.fill_(math.inf)
        return counters


class ReferenceStepper:
    """Runs the stages below: the `Stepper` of the reference."""

    def __init__(self, rows: Sequence[Row], counters: Counters, inputs: Inputs) -> None:
        self._rows, self._counters, self._inputs = rows, counters, inputs
        self._groups: Sequence[GroupStep] = ()
        self._scopes: Sequence[Scope] = ()
        self._last = Signals()

    def assign(self, groups: Sequence[GroupStep], scopes: Sequence[Scope]) -> None:
        """Take new options."""
        self._groups, self._scopes = groups, scopes

    @torch.no_grad()
    def norm(self, signals: Signals) -> None:
        """Write the scopes' sums of squares."""
        norm_(self._rows, self._groups, self._scopes, self._counters, signals)

    @torch.no_grad()
    def update(self, signals: Signals) -> None:
        """Decide, update and count."""
        rates, self._last = self._inputs.rates, signals
        update_(self._rows, self._groups, self._scopes, self._counters, signals, rates)
        # parts were written to, which does not count as a write to what they are parts of
        owners = [
            row.owner
            for row in self._rows
            if is_sharded(row.owner) and row.grad is not None and signals.allow(self._groups[row.group].scope)
        ]
        if owners:
            torch.autograd.graph.increment_version(owners)

    def step(self, signals: Signals) -> None:
        """Both stages in one."""
        self.norm(signals)
        self.update(signals)

    def active(self) -> list[bool]:
        """Per group whether its scope has made the last step."""
        active = active_scopes(self._rows, self._groups, self._scopes, self._last)
        return [active[group.scope] for group in self._groups]


def active_scopes(
    rows: Sequence[Row], groups: Sequence[GroupStep], scopes: Sequence[Scope], signals: Signals
) -> list[bool]:
    """Per scope whether it makes a step with the gradients that there are now, as far as the host knows."""
    stepped = {groups[row.group].scope for row in rows if row.grad is not None}
    return [signals.allow(i) and (scope.always or i in stepped) for i, scope in enumerate(scopes)]


def norm_(
    rows: Sequence[Row],
    groups: Sequence[GroupStep],
    scopes: Sequence[Scope],
    counters: Counters,
    signals: Signals,
) -> None:
    """Write the sums of squares of the unscaled gradients, of every scope that needs a norm."""
    xp = counters.math
    factor = None if signals.grad_scale is None else 1 / xp.scalar(signals.grad_scale)
    for i, scope in enumerate(scopes):
        if scope.normed and signals.allow(i):
            grads = [row.grad for row in rows if groups[row.group].scope == i and row.counted]
            counters.squares[i] = sum_of_squares([g for g in grads if g is not None], factor, xp)


def update_(
    rows: Sequence[Row],
    groups: Sequence[GroupStep],
    scopes: Sequence[Scope],
    counters: Counters,
    signals: Signals,
    rates: Sequence[float],
) -> None:
    """One step of every scope that makes one, in place, by the sums of squares that `norm_` has left.

    Args:
        rows: tensors in the order of their groups; one without a gradient stays as it is.
        groups: every param group in order.
        scopes: every scope.
        counters: of all groups; `k`, `skipped` and the values used are updated.
        signals: the scaler's `grad_scale` and `found_inf`; any `found_inf` but 0, nan included, skips, but
            for scopes that decide by their own norm. And which scopes may make the step.
        rates: per group the rate of a group without a schedule whose rate is a number.
    """
    recorded = None if counters.ring is None else RecordedStep(counters.ring)
    try:
        _update_scopes_(rows, groups, scopes, counters, signals, rates, recorded)
    finally:
        # the groups that were updated before an interrupt have counted the step
        if recorded is not None:
            recorded.store()


def _update_scopes_(
    rows: Sequence[Row],
    groups: Sequence[GroupStep],
    scopes: Sequence[Scope],
    counters: Counters,
    signals: Signals,
    rates: Sequence[float],
    recorded: RecordedStep | None,
) -> None:
    """What `update_` does, but for storing what it has `recorded`."""
    xp = counters.math
    here = active_scopes(rows, groups, scopes, signals)
    for s, scope in enumerate(scopes):
        active = active_on_device(s, scope, signals, xp)
        if not (here[s] if signals.stepped is None else signals.allow(s)):
            continue
        no = torch.zeros((), dtype=torch.bool, device=xp.device)
        found = no if signals.found_inf is None else xp.scalar(signals.found_inf) != 0
        # what multiplies every gradient; None rather than 1, so that untouched gradients cost nothing
        factor = unscale = None if signals.grad_scale is None else 1 / xp.scalar(signals.grad_scale)
        norm = xp.scalar(counters.squares[s]).sqrt() if scope.normed else xp.scalar(math.nan)
        coef, limit = xp.scalar(1), xp.scalar(math.inf)
        bad = ~torch.isfinite(norm) if scope.normed else no
        if scope.by_own_norm:
            skip = bad if scope.skip_nonfinite else bad & found
        else:
            skip = found | bad if scope.skip_nonfinite else found
        if scope.max_grad_norm is not None:
            limit = xp.scalar(scope.max_grad_norm)
            highest = limit
            first = next((i for i, group in enumerate(groups) if group.scope == s), None)
            if scope.zclip is not None and first is not None:
                norms = counters.norms[:, first]
                spike, held = judge(norm, norms.to(xp.dtype), scope.zclip)
                limit = torch.where(highest < held, highest, held)
                highest = torch.where(spike, limit, highest)
                if scope.zclip.action == "skip":
                    skip = skip | spike
                enters = ~skip & torch.isfinite(norm)
                enters = enters if active is None else enters & active
                norms.copy_(torch.where(enters, moved(norms.to(xp.dtype), held, scope.zclip), norms))
            coef = (highest / (norm + CLIP_EPS)).clamp(max=1)
            factor = coef if factor is None else factor * coef
        for i, group in enumerate(groups):
            if group.scope != s:
                continue
            if group.schedule is not None:
                ratio = evaluate(group.schedule.phases, counters.k[i], group.schedule.table, xp)
                lr = group.peak * xp.scalar(ratio)
            else:
                lr = xp.scalar(rates[i] if group.lr is None else group.lr)
            still = skip if active is None else skip | ~active
            own = [row for row in rows if row.group == i and row.grad is not None]
            for row in own:
                before = fp32_value(row.param, row.state).clone() if recorded is not None else None
                adamw_(row, group, lr, factor, still)
                if recorded is not None and before is not None:
                    recorded.tensor(row, before, unscale, skip, active)
            used = torch.stack([lr, norm, coef, limit])
            if recorded is not None:
                recorded.group(i, counters.k[i], used, skip, active)
            made, skipped, in_row = ~skip, skip, (counters.skips_in_row[i] + 1) * skip
            if active is not None:
                used = torch.where(active, used, counters.used[: len(used), i])
                made, skipped = made & active, skipped & active
                in_row = torch.where(active, in_row, counters.skips_in_row[i])
            spikes_skip = scope.zclip is not None and scope.zclip.action == "skip"
            if own and (scope.skip_nonfinite or spikes_skip or signals.found_inf is not None):
                note_nonfinite(own, i, skipped, counters)
            counters.used[: len(used), i] = used
            counters.k[i] += made
            counters.skipped[i] += skipped
            counters.skips_in_row[i] = in_row


def note_nonfinite(rows: Sequence[Row], group: int, skipped: Tensor, counters: Counters) -> None:
    """Note which of a group's tensors was the first whose gradient was not finite, if the step is `skipped`
    and there is one; before the step is counted.
    """
    device = counters.k.device
    none = 1 + max(row.place for row in rows)
    places = torch.full((), none, dtype=torch.int64, device=device)
    for row in rows:
        assert row.grad is not None
        bad = move(~torch.isfinite(row.grad).all(), device)
        places = torch.where(bad, places.clamp(max=row.place), places)
    found = skipped & (places < none)
    number = counters.k[group] + counters.skipped[group]
    counters.nonfinite[group] = torch.where(found, places + 1, counters.nonfinite[group])
    counters.nonfinite_step[group] = torch.where(found, number, counters.nonfinite_step[group])


class RecordedStep:
    """The row of a ring that a step fills."""

    def __init__(self, ring: Ring) -> None:
        self._ring = ring
        self._ints = torch.full_like(ring.ints[:1], -1)
        self._ints[0, 0] = ring.steps[0]
        self._used, self._sums = torch.full_like(ring.used[:1], math.nan), torch.full_like(ring.sums[:1], -1)

    def group(self, index: int, k: Tensor, used: Tensor, skip: Tensor, active: Tensor | None) -> None:
        """Take what a group used, the rows `columns.METRICS`, for its update `k`, if it was `active`."""
        k, values = k.clone(), torch.cat([used, skip.to(used.dtype).reshape(1)])
        self._ints[0, 1 + index] = k if active is None else torch.where(active, k, -1)
        self._used[0, :, index] = values if active is None else torch.where(active, values, math.nan)

    def tensor(
        self, row: Row, before: Tensor, unscale: Tensor | None, skip: Tensor, active: Tensor | None
    ) -> None:
        """Take the sums of squares of a tensor, which was `before`."""
        assert row.grad is not None
        if not self._ring.record.tensors:
            return
        g = _compute(row.grad)
        if unscale is not None:
            g = g * move(unscale, g.device, g.dtype)
        change = fp32_value(row.param, row.state) - before
        sums = [move(x.square().sum(), self._sums.device, self._sums.dtype) for x in (g, change, before)]
        values = torch.stack([sums[0], *(torch.where(skip, 0, x) for x in sums[1:])])
        self._sums[0, :, row.column] = values if active is None else torch.where(active, values, -1)

    def store(self) -> None:
        """Write the row, and go on to the next."""
        ring = self._ring
        at = ring.steps % ring.record.last
        for rows, row in ((ring.ints, self._ints), (ring.used, self._used), (ring.sums, self._sums)):
            rows.index_copy_(0, at, row)
        ring.steps.add_(1)


def judge(norm: Tensor, norms: Tensor, zclip: ZClip) -> tuple[Tensor, Tensor]:
    """Whether a norm is a spike by those before it, and what it is held to: itself if it is none.

    `norms`: the rows `columns.NORMS` of those before it. Kumar et al. 2025, arXiv:2504.02507.
    """
    seen, mean, mean_rest, variance, variance_rest = norms.unbind()
    # both parts are subtracted from the norm, as fp32 needs it
    above, deviation = (norm - mean) - mean_rest, (variance + variance_rest).sqrt()
    z = above / (deviation + Z_EPS)
    spike = (seen >= zclip.warmup_steps) & (z > zclip.z_thresh)
    limit = mean + (zclip.z_thresh * zclip.z_thresh * deviation / z + mean_rest)
    return spike, torch.where(spike, limit, norm)


def moved(norms: Tensor, held: Tensor, zclip: ZClip) -> Tensor:
    """The norms after one that was held to `held` has entered them: plain averages in the warm-up (Welford
    1962), running ones after it.
    """
    seen, mean, mean_rest, variance, variance_rest = norms.unbind()
    warm = seen >= zclip.warmup_steps
    weight = torch.where(warm, 1 - zclip.alpha, 1 / (seen + 1))
    above = (held - mean) - mean_rest
    mean, mean_rest = exact_sum(mean, mean_rest + weight * above)
    left = (held - mean) - mean_rest
    change = weight * (((torch.where(warm, left, above) * left) - variance) - variance_rest)
    variance, variance_rest = exact_sum(variance, variance_rest + change)
    return torch.stack([seen + 1, mean, mean_rest, variance, variance_rest])


def exact_sum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of two numbers as it is rounded, and what the rounding took (Knuth's two-sum)."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def split_norms(norms: Tensor) -> Tensor:
    """Rows of `columns.NORMS` in fp32, mean and variance again as two numbers each."""
    seen, mean, mean_rest, variance, variance_rest = norms.double().unbind()
    rows = [seen.float()]
    for whole, rest in ((mean, mean_rest), (variance, variance_rest)):
        high = (whole + rest).float()
        rows += [high, ((whole - high) + rest).float()]
    return torch.stack(rows)


def active_on_device(index: int, scope: Scope, signals: Signals, xp: TensorMath) -> Tensor | None:
    """Whether a scope makes the step, where only the device knows: other processes have gradients of it, or
    a tensor says so. None where the host knows.
    """
    active = None if scope.always or signals.stepped is None else xp.scalar(signals.stepped[index]) != 0
    if isinstance(signals.only, Tensor):
        chosen = xp.scalar(signals.only[index]) != 0
        active = chosen if active is None else active & chosen
    return active


def sum_of_squares(grads: Sequence[Tensor], factor: Tensor | None, xp: TensorMath) -> Tensor:
    """Sum of squares of `factor * grads` over all tensors: in fp32 per tensor, in fp64 for fp64 gradients."""
    total = xp.scalar(0)
    for grad in grads:
        g = _compute(grad)
        if factor is not None:
            g = g * move(factor, g.device, g.dtype)
        total = total + xp.scalar(g.square().sum())
    return total


def adamw_(row: Row, group: GroupStep, lr: Tensor, factor: Tensor | None, skip: Tensor) -> None:
    """AdamW on one tensor (Loshchilov and Hutter 2019, arXiv:1711.05101), or nothing where `skip`.

    Arithmetic is in fp32, in fp64 for fp64 parameters; scalars are made in fp64 and rounded once. Every
    operation rounds correctly but one: torch's fp32 `sqrt` on the CPU may be an ulp off, as MKL's is (of
    2**22 numbers between 0 and 1 a fifth on an AMD EPYC, torch 2.13). The compiled steps round it correctly.
    `bc = 1 - b**t` is written as `-expm1(t*log(b))`, which keeps its digits at small `t`. A 16-bit parameter
    whose state has the rest of its fp32 value is updated in fp32.
    """
    assert row.grad is not None
    b1, b2 = group.betas
    state = row.state
    p, m, v = fp32_value(row.param, state), _compute(state["exp_avg"]), _compute(state["exp_avg_sq"])
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
    # as torch.lerp: the form that starts at m would lose a g that is small beside it where b1 is small
    m = m + (g - m) * (1 - b1) if 1 - b1 < 0.5 else g - (g - m) * b1
    # in this order, as torch: the square of a finite gradient may overflow
    v = b2 * v + ((1 - b2) * g) * g
    new = {"exp_avg": m, "exp_avg_sq": v}
    divisor = v
    if "max_exp_avg_sq" in state:
        divisor = new["max_exp_avg_sq"] = torch.maximum(_compute(state["max_exp_avg_sq"]), v)
    denominator = divisor.sqrt() / bc2.sqrt().to(dtype) + group.eps
    p = p - (lr / bc1).to(dtype) * (m / denominator)

    new_param, rest = split_value(p, row.param.dtype, state)
    new.update(rest)
    # `where` and not a product: what a skipped step computed may be nan
    for old, value in ((row.param, new_param), *((state[name], value) for name, value in new.items())):
        old.copy_(torch.where(skip, old, value.to(old.dtype)))
    row.step.copy_(t)


def fp32_value(p: Tensor, state: Mapping[str, Tensor]) -> Tensor:
    """What a step computes with for a parameter: its fp32 value, of which the state may have a part.

    bf16 with `param_remainder`, the low 16 bits of the fp32 number: the parameter is that number rounded to
    nearest, ties away from zero, so its bits are the high 16 bits, plus one where the top bit of the
    remainder is set. fp16 with `master_param`, the number itself; it is replaced where it does not round to
    the parameter, because that has been assigned from outside then.
    """
    p = p.detach()
    if "param_remainder" in state:
        high, low = p.view(torch.int16).int() & 0xFFFF, state["param_remainder"].int() & 0xFFFF
        # a zero that was assigned from outside has no number below it
        borrow = (low >> 15) * ((high & 0x7FFF) != 0)
        return (((high - borrow) << 16) | low).view(torch.float32)
    if "master_param" in state:
        master = state["master_param"]
        return torch.where(master.to(p.dtype) == p, master, p.float())
    return _compute(p)


def split_value(
    x: Tensor, dtype: torch.dtype, state: Mapping[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """A parameter of this dtype for a number that a step has computed, and what the state has of it."""
    if "param_remainder" in state:
        x = x.float()
        bits = x.view(torch.int32).long() & 0xFFFFFFFF
        high = torch.where(x.isnan(), 0x7FC0, (bits + 0x8000) >> 16 & 0xFFFF)
        low = torch.where(x.isnan(), 0, bits & 0xFFFF)
        return _int16(high).view(dtype), {"param_remainder": _int16(low)}
    if "master_param" in state:
        return x.to(dtype), {"master_param": x.float()}
    return x, {}


def _int16(x: Tensor) -> Tensor:
    """The signed number with the bits of an unsigned one of 16 bits."""
    return (x - (x >> 15 << 16)).to(torch.int16)


def _compute(x: Tensor) -> Tensor:
    return x.detach() if x.dtype == torch.float64 else x.detach().float()


def _log(b: float) -> float:
    return math.log(b) if b > 0 else -math.inf
