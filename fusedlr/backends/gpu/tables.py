"""The tables of a step on a GPU: how tensors are cut into chunks, what rows hold, how they get to the device.

The columns are those of fusedlr/columns.py, which the kernels take by name.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from fusedlr.columns import CHUNK, CHUNKS, PHASE_FLOATS, PHASE_INTS, STATE
from fusedlr.kept import has_rest
from fusedlr.record import Ring
from fusedlr.reference import GroupStep, Row, Scope, capturing
from fusedlr.schedule import SHAPES, Schedule, whole_and_rest

# dtype of a parameter and its gradient, and of its moments
Kind = tuple[torch.dtype, torch.dtype]
# the kind of a launch that only counts
_EMPTY = torch.float32, torch.float32, False

Slots = tuple[int, int]


@dataclass(frozen=True)
class Bucket:
    """Tensors of one kind, which one launch updates: `programs` rows of the chunk table from `first`."""

    kind: Kind
    amsgrad: bool  # whether one of its tensors has a max_exp_avg_sq
    master: bool  # whether the state has the rest of its parameters' fp32 values
    first: int
    programs: int


@dataclass(frozen=True)
class Layout:
    """The chunks of a step, bucket by bucket, and the slots of their partial sums, scope by scope."""

    chunks: list[int]  # rows of CHUNKS
    buckets: list[Bucket]
    slots: list[Slots]  # of every scope: its first slot, and one past its last
    first_slots: list[int]  # of every row: that of its first chunk, where it has one
    programs: int

    @staticmethod
    def of(rows: Sequence[Row], scope_of: Sequence[int], scopes: int) -> Layout:
        """Chunks of these rows; `scope_of[i]` is the scope of group `i`.

        A group without elements has one empty chunk: its program writes which rate the group used.
        """
        kinds = [(row.param.dtype, row.state["exp_avg"].dtype, has_rest(row.names)) for row in rows]
        per_row = [-(-row.param.numel() // CHUNK) for row in rows]
        per_group = [0] * len(scope_of)
        for row, count in zip(rows, per_row, strict=True):
            per_group[row.group] += count
        first, slots = _place_slots(per_group, scope_of, scopes)
        by_kind: dict[tuple[torch.dtype, torch.dtype, bool], list[int]] = {kind: [] for kind in kinds}
        following, first_slots = list(first), []
        for i, (row, kind, count) in enumerate(zip(rows, kinds, per_row, strict=True)):
            group = row.group
            first_slots.append(following[group])
            for index in range(count):
                slot = following[group]
                by_kind[kind] += i, index, slot, group, scope_of[group], int(slot == first[group])
                following[group] += 1
        for group, count in enumerate(per_group):
            if count == 0:
                chunks = by_kind.setdefault(kinds[0] if kinds else _EMPTY, [])
                chunks += -1, 0, first[group], group, scope_of[group], 1
        filled = {kind: chunks for kind, chunks in by_kind.items() if chunks}
        ends = [0]
        for chunks in filled.values():
            ends.append(ends[-1] + len(chunks) // len(CHUNKS))
        amsgrad = {kind for row, kind in zip(rows, kinds, strict=True) if "max_exp_avg_sq" in row.names}
        buckets = [
            Bucket(kind[:2], kind in amsgrad, kind[2], begin, end - begin)
            for kind, (begin, end) in zip(filled, pairwise(ends), strict=True)
        ]
        return Layout(
            [x for chunks in filled.values() for x in chunks], buckets, slots, first_slots, ends[-1]
        )


def _place_slots(per_group: list[int], scope_of: Sequence[int], scopes: int) -> tuple[list[int], list[Slots]]:
    """The first slot of every group, and the slots of every scope, which lie together."""
    members: list[list[int]] = [[] for _ in range(scopes)]
    for group, scope in enumerate(scope_of):
        members[scope].append(group)
    first, slots, slot = [0] * len(scope_of), [], 0
    for groups in members:
        begin = slot
        for group in groups:
            first[group] = slot
            slot += max(per_group[group], 1)
        slots.append((begin, slot))
    return first, slots


def pack_row(row: Row, slot: int) -> tuple[int, ...]:
    """A row of TENSORS; `slot` is that of its first chunk."""
    state = row.state
    kept = [state[name].data_ptr() if name in state else 0 for name in STATE]
    addresses = row.param.data_ptr(), *kept, row.step.data_ptr()
    places = row.place, row.column, slot
    return (*map(_signed, addresses), row.param.numel(), row.group, *places)


def pack_ring(ring: Ring, chunk_sums: Tensor, rows: Sequence[Row]) -> list[int]:
    """The row of RING."""
    *addresses, last, columns = ring.layout()
    most_chunks = max((-(-row.param.numel() // CHUNK) for row in rows), default=0)
    return [*map(_signed, (*addresses, chunk_sums.data_ptr())), last, columns, most_chunks]


def _signed(address: int) -> int:
    """The int64 with the bits of an address; those of some devices have the highest bit set."""
    return address - (address >> 63 << 64)


@dataclass(frozen=True)
class Packed:
    """The options of all groups and scopes as the kernels read them."""

    ints: list[int]  # rows of GROUP_INTS, SCOPE_INTS, PHASE_INTS
    floats: list[float]  # rows of GROUP_FLOATS, SCOPE_FLOATS, PHASE_FLOATS, then tables
    phases: int  # rows for phases, spare ones among them

    @staticmethod
    def of(
        groups: Sequence[GroupStep], scopes: Sequence[Scope], slots: Sequence[Slots], rates: Sequence[int]
    ) -> Packed:
        """Of these groups and scopes; `rates[i]` is where a rate of group `i` lies on the device, or 0."""
        group_ints: list[int] = []
        group_floats: list[float] = []
        phase_ints: list[int] = []
        phase_floats: list[float] = []
        values: list[float] = []
        # groups often share their schedule
        packed: dict[int, tuple[int, int]] = {}
        for group, address in zip(groups, rates, strict=True):
            phases = 0, 0
            if group.schedule is not None:
                if id(group.schedule) not in packed:
                    first = len(phase_ints) // len(PHASE_INTS)
                    more_ints, more_floats = pack_phases(group.schedule, len(values))
                    phase_ints += more_ints
                    phase_floats += more_floats
                    values += group.schedule.table
                    packed[id(group.schedule)] = first, len(phase_ints) // len(PHASE_INTS)
                phases = packed[id(group.schedule)]
            group_ints += *phases, _signed(address), group.scope
            b1, b2 = group.betas
            # a peak is not used where there is no schedule
            peak = 0.0 if group.schedule is None else group.peak
            group_floats += peak, *split(log(b1)), *split(log(b2)), 1 - b1, b2, 1 - b2
            group_floats += group.eps, group.weight_decay, -1.0 if group.maximize else 1.0
        scope_ints: list[int] = []
        scope_floats: list[float] = []
        scope_of = [group.scope for group in groups]
        for i, (scope, own) in enumerate(zip(scopes, slots, strict=True)):
            scope_ints += int(scope.normed), int(scope.skip_nonfinite), int(scope.by_own_norm), *own
            zclip = scope.zclip
            # the joint scope may have no group, and is not looked at then
            scope_ints.append(scope_of.index(i) if i in scope_of else 0)
            scope_ints.append(int(zclip is not None and zclip.action == "skip"))
            # a limit of inf still makes nan of a norm that is inf
            scope_floats.append(math.nan if scope.max_grad_norm is None else scope.max_grad_norm)
            # no norm is a spike after infinitely many
            warmup_steps = math.inf if zclip is None else float(zclip.warmup_steps)
            own_floats = (0.0, 0.0) if zclip is None else (zclip.z_thresh, 1 - zclip.alpha)
            scope_floats += warmup_steps, *own_floats
        count = len(phase_ints) // len(PHASE_INTS)
        spare = _room_for(count) - count
        phase_ints += [0] * (spare * len(PHASE_INTS))
        phase_floats += [0.0] * (spare * len(PHASE_FLOATS))
        return Packed(
            group_ints + scope_ints + phase_ints,
            group_floats + scope_floats + phase_floats + values,
            count + spare,
        )


def _room_for(phases: int) -> int:
    """Rows for so many phases, and some that a cooldown may fill without a change of the tables' layout.

    A row is 56 bytes on the device, and no kernel looks at those that no group points to.
    """
    return max(8, 1 << phases.bit_length()) if phases else 0


def pack_phases(schedule: Schedule, position: int) -> tuple[list[int], list[float]]:
    """The rows of a schedule's phases, if its table begins at `position`."""
    ints: list[int] = []
    floats: list[float] = []
    for phase in schedule.phases:
        whole, rest = whole_and_rest(phase)
        whole += position if phase.shape == "table" else 0
        ints += [phase.begin, phase.end, phase.origin, SHAPES.index(phase.shape), whole]
        floats += [phase.from_, phase.to, *split(rest)]  # type: ignore[list-item]
    return ints, floats


def split(x: float) -> tuple[float, float]:
    """`x` as 12 bits and the rest: products of 12-bit numbers are exact in fp32."""
    mantissa, exponent = math.frexp(x)
    high = math.ldexp(round(math.ldexp(mantissa, 12)), exponent - 12)
    return high, x - high


def log(b: float) -> float:
    """The logarithm of `b`; for 0 a number whose multiples are finite and whose power is 0."""
    return math.log(b) if b > 0 else -128.0


# tables that one captured step may fill: one of the norm, and one of the update
_SPARE = 2


class Table:
    """One table on a device that follows values on the host: uploaded when they change, without waiting.

    Values are a list of numbers, or the bytes of them.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device, self._dtype = device, dtype
        self._values: list[int] | list[float] | bytes | None = None
        # holds the values for all work that is queued after `put` or `renew`
        self.tensor = torch.empty(0, dtype=dtype, device=device)
        # pinned memory, and when the device has last read it
        self._staged: list[tuple[Tensor, torch.Event]] = []
        # memory for the next capture: to pin some asks the driver about events, which ends a capture
        self._spare: list[Tensor] = []

    def put(self, values: list[int] | list[float] | bytes) -> Tensor:
        """The table with these values, written over the old ones where they are as many.

        Captured launches that read the table follow. The list is kept, so it must not be changed later.
        """
        if values is not self._values and values != self._values:
            if capturing(self._device):
                # the copy would become part of the graph, and every replay would bring back these values
                raise RuntimeError(
                    "a hyperparameter has changed since the last step outside a CUDA graph: make one step "
                    "before the capture"
                )
            self._upload(self._on_host(values))
            self._values = values
        return self.tensor

    def renew(self, values: list[int] | list[float] | bytes) -> Tensor:
        """A table with these values, which is never written to again: captured launches keep theirs."""
        if values is not self._values and values != self._values:
            if capturing(self._device):
                raise RuntimeError(_STEP_BEFORE_CAPTURE)
            host = self._on_host(values)
            self.tensor = torch.zeros(max(host.numel(), 1), dtype=self._dtype, device=self._device)
            self._staged.clear()
            self._upload(host)
            self._values = values
        return self.tensor

    def put_for_graph(self, values: bytes) -> Tensor:
        """As `put`, but a CUDA graph that is captured gets a table of its own, which its replays fill anew.

        The table belongs to the graph: whoever captures keeps it, and the pinned memory that it is filled
        from.
        """
        if not capturing(self._device):
            length = len(values) // self._dtype.itemsize
            if len(self._spare) < _SPARE or self._spare[0].numel() != length:
                pin = self._device.type != "cpu"
                self._spare = [
                    torch.empty(length, dtype=self._dtype, device="cpu", pin_memory=pin)
                    for _ in range(_SPARE)
                ]
            return self.put(values)
        host = self._on_host(values)
        if not self._spare or self._spare[0].numel() != host.numel():
            raise RuntimeError(_STEP_BEFORE_CAPTURE)
        pinned = self._spare.pop()
        pinned.copy_(host)
        tensor = torch.empty_like(pinned, device=self._device)
        tensor.copy_(pinned, non_blocking=True)
        # the tensor is what the launches are given; as long as it lives the copy's source does
        tensor.filled_from = pinned  # type: ignore[attr-defined]
        return tensor

    def _upload(self, host: Tensor) -> None:
        # never empty: kernels may look at the first row of nothing
        length = max(host.numel(), 1)
        if self.tensor.numel() != length:
            self.tensor = torch.zeros(length, dtype=self._dtype, device=self._device)
            self._staged.clear()
        if self._device.type == "cpu":
            self.tensor[: host.numel()] = host
        elif host.numel():
            pinned, read = self._free()
            pinned.copy_(host)
            self.tensor.copy_(pinned, non_blocking=True)
            # of the table's device, which may not be the current one
            read.record(torch.accelerator.current_stream(self._device))

    def _on_host(self, values: list[int] | list[float] | bytes) -> Tensor:
        if isinstance(values, bytes):
            # no buffer may be empty
            return torch.frombuffer(bytearray(values or bytes(8)), dtype=self._dtype)[: len(values) // 8]
        return torch.tensor(values, dtype=self._dtype, device="cpu")

    def _free(self) -> tuple[Tensor, torch.Event]:
        """Pinned memory that the device is not reading."""
        for staged in self._staged:
            if staged[1].query():
                return staged
        self._staged.append(
            (torch.empty_like(self.tensor, device="cpu", pin_memory=True), torch.Event(self._device))
        )
        return self._staged[-1]


_STEP_BEFORE_CAPTURE = (
    "make one step outside the CUDA graph before every capture, with gradients for the same parameters: what "
    "the graph needs is allocated there"
)
