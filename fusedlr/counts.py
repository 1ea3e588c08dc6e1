"""How far an optimizer is: k, t and skips on the device, what the host knows of them, and what it shows.

`Counts` is one object per optimizer. The host learns what the device counts without ever waiting for it, but
for `sync` and `read`, which checkpoints use.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from fusedlr import arguments, recorder
from fusedlr.arrival import Arrival
from fusedlr.columns import COUNTS, METRICS, NORMS, USED
from fusedlr.groups import (
    Notes,
    ParamGroup,
    ScopeKey,
    check_rates,
    has_schedule,
    name_of,
    scope_keys,
    scopes_of,
)
from fusedlr.record import Record, Ring
from fusedlr.reference import Counters, Made, capturing, is_fake, scalar_dtype, split_norms
from fusedlr.schedule import Schedule, check_schedule
from fusedlr.sharded import Layout
from fusedlr.warn import warn

# dynamic loss scaling may skip a few steps while it finds its scale; ten in a row mean something is broken
_SKIPS_TO_WARN = 10
# rows of the counts that the host looks at: all but that of a step under way
_PACKED = COUNTS.index("found")


@dataclass
class _Copy:
    """A copy of the counters on its way to the host."""

    counters: Arrival
    advances: list[int]


class Counts:
    """The counters of all groups, in the order of `param_groups`, and the host's view of them.

    Between copies from a GPU the host counts every step as made, so `k` runs ahead by the steps skipped
    since.

    Attributes:
        groups: those that are counted, as they were when a step last looked.
        counters: the counters on the device; replaced when groups or the device change.
        k: per group the updates made, as far as the host knows.
        shown: per group the step whose rate `group["lr"]` shows.
        joint: whether all groups are one scope.
        k_loaded: what a loaded scheduler state says of `k`, until a step is made or a file is loaded.
        own_loaded: what it says of peaks and skips, for an optimizer's file that has lost that.
    """

    def __init__(
        self,
        groups: list[ParamGroup],
        notes: Notes,
        defaults: dict[str, Any],
        device: torch.device,
        k: list[int],
        skipped: list[int] | None = None,
        *,
        joint: bool,
        record: Record | None = None,
    ) -> None:
        self._notes, self._defaults, self.joint = notes, defaults, joint
        self.groups = list(groups)
        # parameter -> own keys, counters and norms of a group that was taken out with it, for a plain dict
        # that is put in the group's place
        self._gone: Any = WeakTensorKeyDictionary()
        for i, group in enumerate(groups):
            group.counter = weakref.ref(self), i
        self.k: list[int] = []
        self.shown: list[int] = []
        # per group by how much the steps of its scope are more than its own, for one that came later
        self._steps_before: list[int] = [0] * len(k)
        self._advances: list[int] = []
        self._in_flight: _Copy | None = None
        # scopes that a warning has named
        self._warned_skips: set[ScopeKey] = set()
        self._stale = 0
        self.k_loaded: list[int] | None = None
        self.own_loaded: Any = None
        self.counters = Counters.zeros(len(k), device)
        if record is not None:
            self.counters.ring = Ring.empty(record, len(k), device, self.counters.used.dtype)
        if skipped:
            self.place_skipped(skipped)
        self.place(k)
        self.show(groups, self.k)

    # the groups that are counted

    def adopt(self, groups: list[Any]) -> None:
        """Wrap groups that were put into `param_groups` from outside, and count for those that are there.

        Raises:
            TypeError, ValueError: a schedule or rate that was assigned to a group cannot be used.
        """
        if not self._notes.changed and _same(groups, self.groups):
            return
        for group in groups:
            if dict.__contains__(group, "k"):
                arguments.count("k", group["k"])
            # a schedule assigned to a running group is resolved as one given at the start
            if has_schedule(group) and not isinstance(group["schedule"], (list, tuple)):
                check_schedule(group["schedule"])
                group["schedule"].resolve(self._defaults["lr"])
                if "initial_lr" not in group:
                    check_rates(group["lr"])
        if not _same(groups, self.groups):
            self._follow(groups)
        for group in groups:
            if has_schedule(group):
                group.set_quietly("schedule", group["schedule"].resolve(self._defaults["lr"]))
                if "initial_lr" not in group:
                    group.set_quietly("initial_lr", float(group["lr"]))

    def _is_ours(self, group: dict[str, Any]) -> bool:
        return isinstance(group, ParamGroup) and group.belongs_to(self._notes)

    def _wrapped(self, group: dict[str, Any], origin: int | None) -> ParamGroup:
        """A group from outside; it takes over what the group had that held its parameters."""
        before = self.groups[origin] if origin is not None else None
        gone = self._gone_with(group)
        own, counts, norms = gone if before is None else (dict(getattr(before, "own", {})), None, None)
        wrapped = ParamGroup({**own, **group}, self._notes)
        schedule = wrapped.get("schedule")
        if isinstance(schedule, (list, tuple)):
            schedule = Schedule.from_numbers(schedule)
            wrapped.set_quietly("schedule", schedule)
        shown: tuple[int, ...] = () if origin is None else (self.shown[origin], self.k[origin])
        if counts is not None:
            shown = (int(counts[0]) - 1, int(counts[0]))
        if schedule is not None and "initial_lr" in wrapped and shown:
            # a plain dict does not tell who assigned its lr; a rate that is not ours did come from outside
            ours = {schedule.lr_at(k, wrapped["initial_lr"]) for k in shown}
            if wrapped["lr"] not in ours:
                self._notes.lr_assigned.add(id(wrapped))
            else:
                wrapped.shown_lr = wrapped["lr"]
        wrapped.counts, wrapped.norms = counts, norms
        return wrapped

    def _gone_with(self, group: dict[str, Any]) -> tuple[dict[str, Any], Tensor | None, Tensor | None]:
        """Own keys, counters and norms of the group that was taken out with a parameter of this one."""
        found = next((self._gone[p] for p in group["params"] if p in self._gone), None)
        return ({}, None, None) if found is None else found

    def _follow(self, groups: list[Any]) -> None:
        """Count for these groups: each goes on at its own counts, wherever it stood; new ones start at 0."""
        self.sync()
        old, before = self.counters, self.groups
        # any group of a scope may be its first one afterwards
        norms = old.norms[:, self._first_of_scope()] if before else old.norms
        owner = {id(p): i for i, group in enumerate(before) for p in group["params"]}
        place = {id(group): i for i, group in enumerate(before)}
        origins = [
            place.get(id(group), next((owner[id(p)] for p in group["params"] if id(p) in owner), None))
            for group in groups
        ]
        for i, group in enumerate(before):
            if i not in origins:
                # not a view, which replays of a graph that was captured with these counters would move on
                group.counts, group.norms = old.counts[:, i].clone(), norms[:, i].clone()
                group.shown = self.shown[i]
                self._gone.update((p, (group.own, group.counts, group.norms)) for p in group["params"])
        if origins != list(range(len(before))):
            # what a scheduler's state says is said of the groups that there were
            self.k_loaded = self.own_loaded = None
        given = [dict.get(group, "k") for group in groups]
        for i, group in enumerate(groups):
            if not self._is_ours(group):
                groups[i] = self._wrapped(group, origins[i])
        self._replace(Counters.zeros(len(groups), old.counts.device), origins)
        if old.used.dtype == torch.float32:
            self.counters.use_fp32()
        shown = []
        steps_before = [0 if origin is None else self._steps_before[origin] for origin in origins]
        for i, (group, origin) in enumerate(zip(groups, origins, strict=True)):
            shown.append(0)
            if origin is not None:
                self.counters.counts[:, i] = old.counts[:, origin]
                self.counters.used[:, i] = old.used[:, origin]
                self.counters.norms[:, i] = norms[:, origin]
                shown[i] = self.shown[origin]
            elif group.counts is not None:
                self.counters.counts[:, i] = group.counts.to(self.counters.counts.device)
                shown[i] = int(group.counts[0]) if group.shown is None else group.shown
                if group.norms is not None:
                    self.counters.norms[:, i] = group.norms.to(self.counters.counts.device)
            if given[i] is not None:
                # of a plain dict
                shown[i] = arguments.count("k", given[i])
                self.counters.k[i] = shown[i]
            group.counts = group.norms = group.shown = None
            group.counter = weakref.ref(self), i
            for p in group["params"]:
                self._gone.pop(p, None)
        if old.stale.numel() and groups:
            self.counters.stale.zero_()
            self.counters.stale[0] = old.stale.max()
        self.groups = list(groups)
        self.shown, self._steps_before = shown, steps_before
        # one that comes back is another one
        self._warned_skips.intersection_update(self.scopes())
        self.sync()
        self._share_norms()
        if not is_fake(self.counters.counts):
            there = [i for i, origin in enumerate(origins) if origin is not None]
            self._count_with_scopes([i for i in range(len(groups)) if i not in there], there)

    def _count_with_scopes(self, groups: Iterable[int], others: Sequence[int]) -> None:
        """Number the coming steps of these groups as those of the `others` of their scopes."""
        keys = scope_keys(self.groups, joint=self.joint)
        own = (self.counters.k + self.counters.skipped).tolist()
        for i in groups:
            of_scope = [own[j] + self._steps_before[j] for j in others if keys[j] == keys[i]]
            self._steps_before[i] = max(of_scope, default=own[i]) - own[i]

    def place_on(self, device: torch.device, *, fp32: bool) -> None:
        """Keep the counters on this device, and what a step uses in fp32 where the kernels have no fp64."""
        if device != self.counters.k.device:
            self.sync()
            old = self.counters
            self._replace(Counters.zeros(len(self.k), device), range(len(self.k)))
            self.counters.counts.copy_(old.counts)
            self.counters.norms.copy_(old.norms)
            self.sync()
        if fp32 and self.counters.used.dtype != torch.float32:
            self.counters.use_fp32()
            self._notes.changed = True

    def _replace(self, counters: Counters, origins: Sequence[int | None]) -> None:
        """Count in these from now on; a plan has the addresses of the old ones.

        `origins`: per group which it was among the counted ones, if any.
        """
        if counters.counts.device == self.counters.counts.device:
            counters.math = self.counters.math
        counters.graphs = self.counters.graphs
        if self.counters.ring is not None:
            counters.ring = self.counters.ring.of_groups(origins, counters.k.device, counters.used.dtype)
        self.counters = counters
        self._notes.changed = True

    def record_of(self, params: Iterable[Tensor]) -> dict[int, int]:
        """Record these parameters from now on, if steps are recorded; the id of each -> its column."""
        ring = self.counters.ring
        if ring is None:
            return {}
        self.counters.ring = ring = ring.of_params(tuple(params))
        return {id(p): column for column, p in enumerate(ring.params)}

    def scopes(self) -> dict[ScopeKey, int]:
        """What the scopes of the counted groups are called -> the index of the scope's first group."""
        keys = scope_keys(self.groups, joint=self.joint)
        return {key: keys.index(key) for key in scopes_of(self.groups, joint=self.joint) if key in keys}

    # what a step has made of the counters

    def made(self, made: Made | None, active: Sequence[bool], shown: Sequence[bool] | None) -> None:
        """Take what a step tells, or count one step of the active groups until a copy says more.

        `shown`: per group whether it shows the rate of this step; None where all do.
        """
        self.k_loaded = self.own_loaded = None
        if shown is None:
            self.shown = self.k
        else:
            self.shown = [k if new else old for k, old, new in zip(self.k, self.shown, shown, strict=True)]
        if made is not None:
            self.k = made.k
            self._warn_skips(made.skips_in_row)
            return
        self.k = [k + one for k, one in zip(self.k, active, strict=True)]
        self._advances = [n + one for n, one in zip(self._advances, active, strict=True)]
        if self.counters.k.device.type != "cuda":
            # on the CPU the counters are at hand: nothing to wait for
            self.refresh()

    def recover(self, before: list[int]) -> Made | None:
        """What a step has made of the counters that was interrupted before it could tell; None on a GPU.

        `before`: `k` as it was. On a GPU the next copy corrects what the host knows.
        """
        c = self.counters
        if c.k.device.type != "cpu" or is_fake(c.k) or c.k.tolist() == before:
            return None
        self.k = before
        return Made(c.k.tolist(), c.skips_in_row.tolist(), c.lr.tolist())

    def refresh(self) -> None:
        """Take the last copy that has arrived and start the next one; never waits."""
        device = self.counters.k.device
        if is_fake(self.counters.counts):
            # a step without values is counted as made
            return
        if device.type == "cpu":
            # every step does this, so metrics are left until they are asked for
            self.k, _, in_row, *_ = self.counters.counts.tolist()
            self._warn_skips(in_row)
            return
        # events cannot be queried while a graph is captured
        if not capturing(device):
            self._take_arrived()

    def _take_arrived(self) -> None:
        if self._in_flight is not None:
            rows = self._in_flight.counters.values()
            if rows is None:
                return
            self._take(rows, self._in_flight.advances)
        self._in_flight = _Copy(Arrival(_pack(self.counters)), self._advances)

    def sync(self) -> None:
        """Read the counters now (waits for the device)."""
        zeros = [0] * self.counters.k.numel()
        if is_fake(self.counters.counts):
            # there is nothing to read, so what the host has counted stands
            k, nans = [*self.k, *zeros][: len(zeros)], [math.nan] * len(zeros)
            infs = [math.inf] * len(zeros)
            rows: list[list[Any]] = [k, *[zeros] * (_PACKED - 1), nans, nans, [1.0] * len(zeros), infs]
        else:
            rows = _pack(self.counters).tolist()
        self._advances, self._in_flight = zeros, None
        self._take(rows, self._advances)

    def read(self, groups: list[Any]) -> list[int]:
        """Updates made per group, from the device (waits for it); corrects rates shown too far ahead."""
        self.sync()
        if any(shown > now for shown, now in zip(self.shown, self.k, strict=False)):
            self.show(groups, self.k)
        return list(self.k)

    def place(self, k: Sequence[int]) -> None:
        """Put `k` onto the device (waits for it)."""
        self.k = list(k)
        if not is_fake(self.counters.k):
            self.counters.k.copy_(torch.tensor(k, dtype=torch.int64, device="cpu"))
        self.sync()

    def go_to(self, groups: list[Any], k: list[int]) -> None:
        """Continue every group's schedule at `k`; a checkpoint loaded before the next step keeps it so."""
        self.k_loaded = list(k)
        self.place(k)
        if not is_fake(self.counters.nonfinite):
            self._forget_nonfinite()
            self.sync()
        self.show(groups, k)

    def take_own(self, groups: list[Any], own: list[dict[str, Any]], saved: Any) -> None:
        """Take peaks, cooldowns, skips and norms of a scheduler's state: files may lack them."""
        self.own_loaded = saved
        for group, theirs in zip(groups, own, strict=True):
            if has_schedule(group) and theirs.get("peak") is not None:
                group.set_quietly("initial_lr", theirs["peak"])
            if has_schedule(group) and theirs.get("schedule") is not None:
                schedule = group["schedule"].with_changes(theirs["schedule"].changes)
                group.set_quietly("schedule", schedule)
        self.place_skipped([theirs.get("skipped", 0) for theirs in own])
        self.place_norms([theirs.get("norms", [0.0] * len(NORMS)) for theirs in own])
        self._notes.changed = True

    def read_skipped(self) -> list[int]:
        """Steps skipped per group, from the device (waits for it)."""
        skipped = self.counters.skipped
        return [0] * skipped.numel() if is_fake(skipped) else skipped.tolist()

    def place_skipped(self, skipped: Sequence[int]) -> None:
        """Put the numbers of skipped steps onto the device."""
        if is_fake(self.counters.skipped):
            return
        self.counters.skipped.copy_(torch.tensor(skipped, dtype=torch.int64, device="cpu"))
        self.counters.skips_in_row.zero_()
        # the steps are other ones
        self._forget_nonfinite()

    def _forget_nonfinite(self) -> None:
        self.counters.nonfinite.zero_()
        self.counters.nonfinite_step.zero_()
        every = range(len(self.groups))
        self._steps_before = [0 for _ in every]
        self._count_with_scopes(every, every)

    def read_norms(self) -> list[list[float]]:
        """Per group what its scope's `ZClip` has seen, `columns.NORMS`, from the device (waits for it)."""
        norms = self.counters.norms
        if is_fake(norms):
            return [[0.0] * len(NORMS)] * norms.shape[1]
        rows = norms.tolist()
        return [[row[i] for row in rows] for i in self._first_of_scope()]

    def place_norms(self, norms: Sequence[Sequence[float]], indices: Sequence[int] | None = None) -> None:
        """Put them onto the device, for the groups of these indices or for all."""
        if is_fake(self.counters.norms) or not norms:
            return
        dtype = scalar_dtype(self.counters.norms.device)
        values = torch.tensor(norms, dtype=dtype, device="cpu").T
        if self.counters.used.dtype == torch.float32:
            values = split_norms(values)
        for column, i in zip(
            values.unbind(1), range(len(norms)) if indices is None else indices, strict=True
        ):
            self.counters.norms[:, i] = column

    def place_record(self, saved: dict[str, Any] | None, layout: Layout | None) -> None:
        """Go on recording where a file was; without one, begin anew at the step that it has come to."""
        ring = self.counters.ring
        if ring is not None and not is_fake(ring.steps):
            params = [p for group in self.groups for p in group["params"]]
            self.counters.ring = recorder.restore(ring, saved, params, layout)
            if saved is None:
                ring.steps.fill_(max(map(sum, zip(self.k, self.read_skipped(), strict=True)), default=0))

    def read_record(self, layout: Layout | None) -> dict[str, Any] | None:
        """What a file has of the recorded steps (waits for the device); None where none are."""
        ring = self.counters.ring
        params = [p for group in self.groups for p in group["params"]]
        return None if ring is None else recorder.saved(ring, params, layout)

    def _first_of_scope(self) -> list[int]:
        """Per group the index of the first group of its scope."""
        keys = scope_keys(self.groups, joint=self.joint)
        return [keys.index(key) for key in keys]

    def _share_norms(self) -> None:
        """Let a new group that is the first of its scope take over what the scope has seen."""
        if is_fake(self.counters.norms):
            return
        seen, first = self.counters.norms[0].tolist(), self._first_of_scope()
        for i in {i for i in first if not seen[i]}:
            most = max((j for j, of in enumerate(first) if of == i), key=seen.__getitem__)
            self.counters.norms[:, i] = self.counters.norms[:, most]

    def go_to_one(self, group: dict[str, Any], index: int, k: int) -> None:
        """Continue the schedule of one group at `k`."""
        self.read([])
        self.place([*self.k[:index], k, *self.k[index + 1 :]])
        self.shown[index] = k
        # what a scheduler's state says was said before
        self.k_loaded = None
        _show(group, k)

    def restart(self, groups: list[Any], at: dict[int, tuple[int, int]]) -> None:
        """Let groups, by their indices, go on at these `k` and numbers of skipped steps; others stay.

        Waits for the device.
        """
        self.sync()
        c = self.counters
        for i, (k, skipped) in at.items():
            if not is_fake(c.counts):
                stale = int(c.stale[i])
                new = [k, skipped, 0, stale, *[0] * (len(COUNTS) - 4)]
                c.counts[:, i] = torch.tensor(new, dtype=torch.int64, device="cpu")
                fresh = [0, math.nan, 1, math.inf, *[0] * (len(USED) - len(METRICS))]
                c.used[:, i] = torch.tensor(fresh, dtype=c.used.dtype, device="cpu")
            self.k[i] = k
        self.sync()
        # what a scheduler's state says was said before
        self.k_loaded = self.own_loaded = None
        self.shown = [at[i][0] if i in at else shown for i, shown in enumerate(self.shown)]
        for i in at:
            _show(groups[i], self.shown[i])
        self._warned_skips -= {key for key, i in self.scopes().items() if i in at}

    def forget(self, params: Iterable[Tensor]) -> None:
        """Let a group that is put in later with one of these parameters begin anew."""
        gone = set()
        for p in params:
            self._gone.pop(p, None)
            gone.add(id(p))
        ring = self.counters.ring
        if ring is not None:
            self.counters.ring = ring.of_params([p for p in ring.params if id(p) not in gone])
            self._notes.changed = True

    # what the host shows

    def show(self, groups: list[Any], k: Sequence[int]) -> None:
        """Put the rate of step `k` of every scheduled group into `group["lr"]`."""
        self.shown = list(k)
        for step, group in zip(k, groups, strict=False):
            _show(group, step)

    def show_coming(self, groups: list[Any]) -> None:
        """Show the coming update's rate anew, where that is on show: the schedules have been changed.

        A rate that was used stays, and so does one that was assigned for the coming update.
        """
        for group, shown, k in zip(groups, self.shown, self.k, strict=True):
            if shown == k and id(group) not in self._notes.lr_assigned:
                _show(group, k)

    def show_next(self, groups: list[Any]) -> None:
        """Show the rate of every group's coming update, as far as the host knows which that is."""
        self.adopt(groups)
        self.refresh()
        self.show(groups, self.k)

    @property
    def metrics(self) -> dict[str, list[Any]]:
        """Per group, as of the last copy that has arrived; as of now on the CPU."""
        if self.counters.k.device.type == "cpu":
            self.sync()
        return self._metrics

    def nonfinite(self, key: ScopeKey) -> tuple[str | None, int | None]:
        """The first tensor whose gradient was not finite in the latest step that a scope has skipped for one,
        and that step, of those of the scope, counted from 0 with the skipped ones, as the host knows it; None
        before there is one, and after a file has been loaded.

        With shards this is what the process knows that holds the tensor.
        """
        if all(place < 0 for place, _ in self._nonfinite):
            return None, None
        keys = scope_keys(self.groups, joint=self.joint)
        of_scope = [
            (step, -i)
            for i, (place, step) in enumerate(self._nonfinite)
            if keys[i] == key and 0 <= place < len(self.groups[i]["params"])
        ]
        if not of_scope:
            return None, None
        step, i = max(of_scope)
        return name_of(self.groups[-i], -i, self._nonfinite[-i][0]), step

    def _take(self, rows: list[list[Any]], advances: list[int]) -> None:
        """Take the rows of `_pack` as the host's view, and the steps counted since they were copied."""
        k, skipped, in_row, stale, nonfinite, nonfinite_step, lr, norm, coef, limit = rows
        # steps counted here after the copy was started are not in it
        self.k = [int(a) + now - then for a, now, then in zip(k, self._advances, advances, strict=True)]
        self._metrics: dict[str, list[Any]] = {
            "lr": lr,
            "grad_norm": norm,
            "coef": coef,
            "limit": limit,
            "skipped": [int(x) for x in skipped],
            "step": [int(x) for x in k],
        }
        self._nonfinite = [
            (int(place) - 1, int(step) + before)
            for place, step, before in zip(nonfinite, nonfinite_step, self._steps_before, strict=True)
        ]
        self._warn_skips(in_row)
        if max(stale, default=0) > self._stale:
            self._stale = int(max(stale))
            raise RuntimeError(
                f"{self._stale} replays of a captured step did nothing: parameters or optimizer state have "
                "been moved, replaced or added since the capture. Capture the CUDA graph again"
            )

    def _warn_skips(self, in_row: Sequence[float]) -> None:
        if max(in_row, default=0) < _SKIPS_TO_WARN:
            return
        new = {
            key: i
            for key, i in self.scopes().items()
            if in_row[i] >= _SKIPS_TO_WARN and key not in self._warned_skips
        }
        # before the metrics are read, which comes here again
        self._warned_skips.update(new)
        for key, i in new.items():
            of = "" if key is None else f" of scope {key!r}"
            norm, limit = self.metrics["grad_norm"][i], self.metrics["limit"][i]
            if math.isfinite(norm):
                warn(
                    f"{int(in_row[i])} optimizer steps in a row were skipped: ZClip takes the gradient norms"
                    f"{of} for spikes (last gradient norm {norm:g}, limit {limit:g}). Skipped norms do not "
                    "move its limit: use action='clip' if norms have risen for good"
                )
            else:
                warn(
                    f"{int(in_row[i])} optimizer steps in a row were skipped: gradients{of} are inf or nan "
                    f"(last gradient norm {norm:g}{self._first_nonfinite(key)})"
                )

    def _first_nonfinite(self, key: ScopeKey) -> str:
        """In words, for a warning, which tensor was the first."""
        name, step = self.nonfinite(key)
        return "" if name is None else f"; in step {step} the first of them was that of {name}"


def _show(group: Any, k: int) -> None:
    if has_schedule(group):
        group.show(group["schedule"].lr_at(k, group["initial_lr"]))


def _same(a: Sequence[Any], b: Sequence[Any]) -> bool:
    return len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))


def _pack(counters: Counters) -> Tensor:
    """All counters as one matrix (10, groups) of floats, so that one copy takes them."""
    # a backend may keep in fp32 what a step used; `k` would lose its last digits in it
    dtype = scalar_dtype(counters.k.device)
    return torch.cat([counters.counts[:_PACKED].to(dtype), counters.used[: len(METRICS)].to(dtype)])


class UpdateCounts:
    """One float32 tensor of update counts per device, of which every `state[p]["step"]` is a view."""

    def __init__(self) -> None:
        # parameter -> its view, and where that was made
        self._views: dict[Tensor, Tensor] = {}
        self._places: dict[Tensor, int] = {}

    def has_all(self, params: Sequence[Tensor], state: dict[Tensor, dict[str, Any]]) -> bool:
        """Whether `place` would change nothing."""
        return len(params) == len(self._views) and all(
            self._has_place(p) and (not state.get(p) or state[p].get("step") is self._views[p])
            for p in params
        )

    def place(self, params: Sequence[Tensor], state: dict[Tensor, dict[str, Any]]) -> None:
        """Let `state[p]["step"]` of every parameter that has state be a view; the counts that are there are
        kept.

        `params`: every parameter that has state or may get some.
        """
        # parameters that are gone must not be kept alive here
        if len(params) != len(self._views) or not all(map(self._has_place, params)):
            self._views = _views(params)
            self._places = {p: _address(view) for p, view in self._views.items()}
        for p in params:
            view, entry = self._views[p], state.get(p)
            if not entry or entry.get("step") is view:
                continue
            current = entry.get("step")
            if current is None:
                view.zero_()
            elif isinstance(current, Tensor):
                view.copy_(current.reshape(()))
            else:
                view.fill_(float(current))
            entry["step"] = view

    def _has_place(self, p: Tensor) -> bool:
        """Whether the view of `p` is still the element that it was made as."""
        view = self._views.get(p)
        return view is not None and view.device == p.device and _address(view) == self._places[p]


def _address(x: Tensor) -> int:
    return 0 if is_fake(x) else x.data_ptr()


def _views(params: Sequence[Tensor]) -> dict[Tensor, Tensor]:
    views: dict[Tensor, Tensor] = {}
    for device in {p.device for p in params}:
        here = [p for p in params if p.device == device]
        counts = torch.zeros(len(here), dtype=torch.float32, device=device)
        views.update(zip(here, counts.unbind(), strict=True))
    return views
