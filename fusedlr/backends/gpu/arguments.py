"""What the launches of a step are given: brought up to date before every step, made anew when tensors move.

The steppers of cuda.py and triton.py have one `StepArguments` each and launch kernels with what it says.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from ctypes import string_at
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedlr.backends.gpu.graphs import Graphs
from fusedlr.backends.gpu.tables import Layout, Packed, pack_ring, pack_row
from fusedlr.backends.order import CountedGradients
from fusedlr.record import Ring
from fusedlr.reference import Counters, GroupStep, Inputs, Row, Scope, Signals, capturing, move


class Arguments(NamedTuple):
    """What launches are given at every step while no tensor moves; columns are those of columns.py."""

    tensors: Tensor  # int64 (rows, TENSORS)
    chunks: Tensor  # int32 (programs, CHUNKS)
    ints: Tensor  # int64: (groups, GROUP_INTS), (scopes, SCOPE_INTS), (phases, PHASE_INTS)
    floats: Tensor  # fp32: (groups, GROUP_FLOATS), (scopes, SCOPE_FLOATS), (phases, PHASE_FLOATS), tables
    rates: Tensor  # fp32 (groups,): rates that are given as numbers
    counts: Tensor  # see reference.Counters
    used: Tensor
    squares: Tensor
    partials: Tensor  # fp32 (programs,): the sum of squares of every chunk, by slot
    tickets: Tensor  # int32 (2,): see graphs.Graphs
    generation: Tensor  # int32 (1,)
    ring: Tensor  # int64 (RING,): where steps are recorded, if they are
    made_for: int  # the generation that the launches are made for
    layout: Layout
    groups: int
    scopes: int
    phases: int
    rows: int
    normed: bool  # whether a scope needs a norm
    chunk_sums: Tensor  # fp32 (SUMS, programs): of every chunk, by slot, if steps are recorded
    recorded: Ring | None  # where steps are recorded; here, so that it lives as long as captured launches


class NewArguments(NamedTuple):
    """What the launches of one step are given anew."""

    gradients: Tensor | None  # int64 (rows,): addresses, 0 for none; None where launches carry them
    active: Tensor  # int32 (scopes,): whether the scope makes the step
    grad_scale: Tensor  # fp32 (1,)
    found_inf: Tensor  # fp32 (1,)


class StepArguments:
    """Follows all that the kernels of one stepper read; a context in which their launches are queued."""

    def __init__(self, backend: str, rows: Sequence[Row], counters: Counters, inputs: Inputs) -> None:
        self._backend, self._rows, self._inputs = backend, rows, inputs
        # kept, because the tables have their addresses
        self._counters = counters
        self._device = counters.k.device
        self._graphs = Graphs.of(counters)
        self._counted = CountedGradients(rows, inputs)
        self._row_table: list[int] = []
        self._ring_table: list[int] = []
        self._groups: Sequence[GroupStep] = ()
        self._scopes: Sequence[Scope] = ()
        self._scope_of: list[int] | None = None
        self._layout = Layout([], [], [], [], 0)
        self._partials = self._chunk_sums = torch.empty(0)
        # groups whose rate is given as a number, and these numbers
        self._given: list[int] = []
        self._given_rates: list[float] = []
        # groups whose rate is a tensor, where the kernels read it, and copies of those that they cannot read
        self._rate_tensors: list[tuple[int, Tensor]] = []
        self._rate_addresses: list[int] = []
        self._copied_rates = torch.empty(0)
        # per scope whether it makes the step with the gradients of this `Inputs.presence`
        self._presence: int | None = None
        self._ready: list[bool] = []
        self.active_groups: list[bool] = []
        self._options_changed = True
        self._made_from: Any = None
        self._arguments: Arguments | None = None
        self._device_before: Any = None

    def assign(self, groups: Sequence[GroupStep], scopes: Sequence[Scope]) -> None:
        """Take new options."""
        self._groups, self._scopes = groups, scopes
        scope_of = [group.scope for group in groups]
        if scope_of != self._scope_of or len(scopes) != len(self._layout.slots):
            self._scope_of, self._layout = scope_of, Layout.of(self._rows, scope_of, len(scopes))
            programs = max(self._layout.programs, 1)
            self._partials = torch.empty(programs, dtype=torch.float32, device=self._device)
            slots, ring = self._layout.first_slots, self._counters.ring
            pairs = zip(self._rows, slots, strict=True)
            self._row_table = [x for row, slot in pairs for x in pack_row(row, slot)]
            if ring is not None:
                self._chunk_sums = self._graphs.chunk_sums(programs)
                self._ring_table = pack_ring(ring, self._chunk_sums, self._rows)
        self._given = [i for i, group in enumerate(groups) if group.schedule is None and group.lr is None]
        self._given_rates = []
        self._rate_tensors = [(i, group.lr) for i, group in enumerate(groups) if group.lr is not None]
        self._rate_addresses = []
        if self._rate_tensors and self._copied_rates.numel() != len(groups):
            self._copied_rates = torch.zeros(len(groups), dtype=torch.float32, device=self._device)
        self._presence = None
        self._options_changed = True
        if self._graphs.is_captured and not capturing(self._device):
            self._write_over()

    def current(self) -> Arguments:
        """The arguments for the step under way: the same object as before while only values have changed."""
        if self._rate_tensors:
            self._place_rate_tensors()
        if self._given:
            self._put_given_rates()
        if self._inputs.presence != self._presence:
            self._note_presence()
        arguments = self._arguments
        if arguments is None or self._options_changed or arguments.made_for != self._graphs.number:
            arguments = self._put_options()
        return arguments

    def new(self, signals: Signals, *, table: bool, norm: bool = False) -> NewArguments:
        """What a step or its `norm` is given anew, with a `table` of gradients; a captured graph keeps it."""
        graphs, scale, inf = self._graphs, signals.grad_scale, signals.found_inf
        new = NewArguments(
            gradients=graphs.gradients.put_for_graph(self._addresses(norm)) if table else None,
            active=self._active(signals),
            grad_scale=graphs.one if scale is None else self._fp32(scale),
            found_inf=graphs.zero if inf is None else self._flag(inf),
        )
        if capturing(self._device):
            # replays read all of it long after later steps have got other tensors
            rates = self._copied_rates, [lr for _, lr in self._rate_tensors]
            graphs.pin(self._made_from, self._arguments, new, rates, signals)
        return new

    def increment_versions(self, signals: Signals) -> None:
        """Tell autograd that parameters are written to."""
        self._inputs.increment_versions(signals.allowed_groups(self._groups))

    def __enter__(self) -> None:
        """Make the tensors' device the current one, which kernels are launched on."""
        if self._device.type != "cpu":
            module = getattr(torch, self._device.type)
            if self._device.index != module.current_device():
                self._device_before = module.device(self._device)
                self._device_before.__enter__()

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        """Make the device from before the current one; forget a step of which a launch has failed."""
        if kind is not None:
            # programs took tickets, and the last program of the step will not come; this fails too on a lost
            # device
            with suppress(RuntimeError):
                self._graphs.tickets.zero_()
        if self._device_before is not None:
            before, self._device_before = self._device_before, None
            before.__exit__(kind, error, traceback)

    def _place_rate_tensors(self) -> None:
        """Find out where rates that are tensors are now; what is no fp32 on the device is copied."""
        addresses = []
        for i, lr in self._rate_tensors:
            if lr.device != self._device or lr.dtype != torch.float32:
                self._copied_rates[i].copy_(lr.detach().reshape(()), non_blocking=True)
                lr = self._copied_rates[i]
            addresses.append(lr.data_ptr())
        if addresses != self._rate_addresses:
            self._rate_addresses, self._options_changed = addresses, True

    def _put_given_rates(self) -> None:
        rates = self._inputs.rates
        given = [rates[i] for i in self._given]
        if given != self._given_rates:
            table = [0.0] * len(self._groups)
            for i, rate in zip(self._given, given, strict=True):
                table[i] = rate
            self._graphs.rates.put(table)
            self._given_rates = given

    def _note_presence(self) -> None:
        """Find out which scopes make a step with the gradients that there are."""
        presence, addresses = self._inputs.presence, self._inputs.gradients
        stepped = {self._groups[row.group].scope for row, at in zip(self._rows, addresses, strict=True) if at}
        self._ready = [scope.always or i in stepped for i, scope in enumerate(self._scopes)]
        self._presence = presence

    def _active(self, signals: Signals) -> Tensor:
        """Per scope whether it makes the step, on the device; where only that knows, computed there."""
        ready = [signals.allow(i) and ready for i, ready in enumerate(self._ready)]
        self.active_groups = [ready[group.scope] for group in self._groups]
        stepped, only = signals.stepped, signals.only
        if stepped is None:
            active = self._graphs.flags(ready)
        else:
            # another process may have a gradient of the scope
            always = self._graphs.flags([scope.always for scope in self._scopes])
            active = (stepped != 0) | (always != 0)
            if isinstance(only, tuple):
                active = active & (self._graphs.flags(only) != 0)
        if isinstance(only, Tensor):
            active = (active != 0) & move(only, self._device)
        return active.to(torch.int32)

    def _packed(self) -> Packed:
        """The options as the kernels read them."""
        addresses = [0] * len(self._groups)
        for (i, _), address in zip(self._rate_tensors, self._rate_addresses, strict=True):
            addresses[i] = address
        return Packed.of(self._groups, self._scopes, self._layout.slots, addresses)

    def _write_over(self) -> None:
        """Let captured launches find new options before the next step, if their tables keep their layout."""
        if self._rate_tensors:
            self._place_rate_tensors()
        packed, arguments, graphs = self._packed(), self._arguments, self._graphs
        if arguments is None or arguments.made_for != graphs.number or arguments.layout is not self._layout:
            return
        normed = any(scope.normed for scope in self._scopes)
        if (packed.phases, normed) != (arguments.phases, arguments.normed):
            return
        sizes = len(packed.ints), len(packed.floats)
        if sizes == (graphs.ints.tensor.numel(), graphs.floats.tensor.numel()):
            graphs.ints.put(packed.ints)
            graphs.floats.put(packed.floats)

    def _put_options(self) -> Arguments:
        """Put the options into their tables, and make the arguments anew if more than values has changed."""
        graphs, counters, layout, count = self._graphs, self._counters, self._layout, len(self._groups)
        packed = self._packed()
        rates = graphs.rates.tensor if self._given else graphs.rates.put([0.0] * count)
        ints, floats = graphs.ints.put(packed.ints), graphs.floats.put(packed.floats)
        shared = ints, floats, rates, counters.counts, counters.used, counters.squares
        normed = any(scope.normed for scope in self._scopes)
        # what captured launches must find as it was: the tables and counters that they share with later
        # steps, the numbers that they were launched with, and the rows
        numbers = self._backend, normed, count, packed.phases, layout.slots, self._scope_of
        made_from = [x.data_ptr() for x in shared], numbers, self._row_table, self._ring_table
        graphs.expect(made_from)
        arguments = self._arguments
        if arguments is None or made_from != self._made_from or arguments.made_for != graphs.number:
            self._arguments = arguments = Arguments(
                tensors=graphs.tensors.renew(self._row_table),
                chunks=graphs.chunks.renew(layout.chunks),
                ints=ints,
                floats=floats,
                rates=rates,
                counts=counters.counts,
                used=counters.used,
                squares=counters.squares,
                partials=self._partials,
                tickets=graphs.tickets,
                generation=graphs.generation,
                ring=graphs.ring.renew(self._ring_table),
                made_for=graphs.number,
                layout=layout,
                groups=count,
                scopes=len(self._scopes),
                phases=packed.phases,
                rows=len(self._rows),
                normed=normed,
                chunk_sums=self._chunk_sums,
                recorded=counters.ring,
            )
            self._made_from = made_from
        self._options_changed = False
        return arguments

    def gradients_at(self, norm: bool) -> int:
        """Where the gradients' addresses lie in memory: of a `norm`, of those that this process counts."""
        return self._counted.at if norm else self._inputs.gradients_at

    def _addresses(self, norm: bool) -> bytes:
        """The same as they lie in memory."""
        return string_at(self.gradients_at(norm), 8 * len(self._rows)) if self._rows else b""

    def _fp32(self, x: Tensor | float) -> Tensor:
        """A number or a tensor of one element as fp32 on the device."""
        if isinstance(x, Tensor):
            return move(x.detach().reshape(1), self._device, torch.float32)
        return torch.full((1,), float(x), dtype=torch.float32, device=self._device)

    def _flag(self, x: Tensor | float) -> Tensor:
        """A number as fp32 that is 0 where it is 0 and nowhere else."""
        # an integer or a tiny fp64 number could round to 0
        exact = isinstance(x, Tensor) and x.dtype in (torch.float32, torch.bfloat16, torch.float16)
        return self._fp32(x if exact else x != 0)
