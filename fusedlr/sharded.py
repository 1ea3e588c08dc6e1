"""Tensors that are spread over processes: which processes a step concerns, whose part counts in the norm, and
the one all-reduce between norm and update.

`step.py` gives every plan a `Layout`; a `ReducingStepper` stands around a backend's stepper. This file
knows DTensors, their meshes and process groups. It is no engine: that is torch.distributed's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fusedlr.reference import (
    Counters,
    GroupStep,
    Inputs,
    Made,
    Row,
    Scope,
    Signals,
    Stepper,
    capturing,
    is_sharded,
)

_ANOTHER = (
    "another process of this optimizer could not make its step and has raised an error: this one has changed "
    "nothing either"
)


@dataclass(frozen=True)
class Layout:
    """Over which processes the tensors of an optimizer are spread.

    Attributes:
        ranks: of the smallest set of processes that covers all meshes, in order; None without DTensors.
        group: the process group of these.
        distinct: a group over which totals are added, each taken for another part of the model, or None.
    """

    ranks: tuple[int, ...] | None
    group: Any
    distinct: Any

    @staticmethod
    def of(params: Iterable[Tensor], distinct: Any = None) -> Layout | None:
        """That of these parameters; None where a step concerns this process alone.

        Args:
            params: all that may be trained, on every process alike.
            distinct: the optimizer's `process_group`.

        Raises:
            RuntimeError: two meshes overlap, and none of them covers the other.
        """
        found: list[Any] = [p for p in params if is_sharded(p)]
        meshes = {id(p.device_mesh): p.device_mesh for p in found}
        if not meshes:
            return None if distinct is None else Layout(None, None, distinct)
        sets = {mesh: frozenset(mesh.mesh.flatten().tolist()) for mesh in meshes.values()}
        largest = max(sets, key=lambda mesh: len(sets[mesh]))
        covering = sets[largest]
        for mesh, ranks in sets.items():
            if not ranks <= covering:
                raise RuntimeError(
                    f"the parameters of this optimizer are on {mesh} and on {largest}, whose processes "
                    "overlap without one covering the other: a norm over both is not defined. Use two "
                    "optimizers"
                )
        if len(covering) == 1:
            # all of it is here
            return Layout.of((), distinct)
        group = _group_of(covering, [mesh for mesh, ranks in sets.items() if ranks == covering])
        return Layout(tuple(sorted(covering)), group, distinct)

    def counts(self, p: Tensor) -> bool:
        """Whether this process's part of a parameter is in the norm: of replicas it is the first one's."""
        if self.ranks is None:
            return True
        if not is_sharded(p):
            return torch.distributed.get_rank() == self.ranks[0]
        mesh = p.device_mesh  # type: ignore[attr-defined]
        here = mesh.get_coordinate()
        # a mesh that leaves processes out has siblings over these, with the same values
        if here is None or self.ranks[0] not in mesh.mesh.flatten().tolist():
            return False
        placements = p.placements  # type: ignore[attr-defined]
        return all(at == 0 for at, place in zip(here, placements, strict=True) if place.is_replicate())

    def add(self, packed: Tensor) -> Tensor:
        """The sum of a vector over all processes; on a GPU nothing waits for it."""
        for group in (self.group, self.distinct):
            if group is not None:
                packed = _all_reduce(packed, group)
        return packed

    def gather(self, x: Any) -> list[Any]:
        """What every process gives, in the order of their ranks: a list per part of the model (waits).

        Processes that hold parts of the same tensors have one list, those of `distinct` one each.
        """
        found = [x]
        for group in (self.group, self.distinct):
            if group is not None:
                all_found: list[Any] = [None] * torch.distributed.get_world_size(group)
                torch.distributed.all_gather_object(all_found, found, group=group)
                found = all_found if group is self.distinct else [y for ys in all_found for y in ys]
        return found if self.distinct is not None else [found]

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether a flag is set on some process (waits for all of them)."""
        return bool(self.add(torch.tensor([float(flag)], device=device)).item())


# ranks -> the group made for them, in the world that it was made in
_made: dict[tuple[int, ...], tuple[Any, Any]] = {}


def _group_of(ranks: frozenset[int], meshes: Sequence[Any]) -> Any:
    """A process group of these ranks: the world, a mesh's own, or one made once."""
    distributed = torch.distributed
    if len(ranks) == distributed.get_world_size():
        return distributed.group.WORLD
    own = next((mesh for mesh in meshes if mesh.ndim == 1), None)
    if own is not None:
        return own.get_group()
    key, world = tuple(sorted(ranks)), distributed.group.WORLD
    if key not in _made or _made[key][0] is not world:
        # those that are in it make it: others may have no such tensors
        _made[key] = world, distributed.new_group(list(key), use_local_synchronization=True)
    return _made[key][1]


def _all_reduce(packed: Tensor, group: Any) -> Tensor:
    """Add over a group; through the device that the group can reduce on, where it is another one."""
    kinds = {device.type for device in group._device_types}
    here = packed if packed.device.type in kinds else packed.to(torch.device(kinds.pop()))
    # torch.distributed.all_reduce is this and 20 us of its own; on a GPU the stream waits, not the host
    group.allreduce([here]).wait()
    return here if here is packed else packed.copy_(here)


def whole_to_part(x: Tensor, p: Tensor) -> Tensor:
    """The part of a whole tensor that this process needs for a parameter; a DTensor is returned as it is.

    Nothing is sent: every process has the whole tensor, as from a file.
    """
    if is_sharded(x) or not is_sharded(p):
        return x
    from torch.distributed.tensor import distribute_tensor

    spread: Any = p
    # to the mesh's kind of device, which torch would otherwise complain of
    x = x.to(spread.device_mesh.device_type)
    return distribute_tensor(x, spread.device_mesh, spread.placements, src_data_rank=None)


def spread_like(part: Tensor, p: Tensor) -> Tensor:
    """The tensor of which this process has `part`, spread as a parameter is; `part` where that is whole."""
    if not is_sharded(p):
        return part
    from torch.distributed.tensor import DTensor

    spread: Any = p
    return DTensor.from_local(
        part, spread.device_mesh, spread.placements, run_check=False, shape=p.shape, stride=p.stride()
    )


class ReducingStepper:
    """A backend's stepper with one all-reduce between its norm and its update.

    What travels: the scopes' sums of squares, whether a scaler has found a gradient that is not finite,
    whether a process has failed, and which scopes have a gradient.
    """

    def __init__(
        self, stepper: Stepper, layout: Layout, rows: Sequence[Row], counters: Counters, inputs: Inputs
    ) -> None:
        self._stepper, self._layout = stepper, layout
        self._rows, self._counters, self._inputs = rows, counters, inputs
        self._groups: Sequence[GroupStep] = ()
        self._scopes: Sequence[Scope] = ()
        self._presence: int | None = None
        self._present = torch.empty(0)

    def assign(self, groups: Sequence[GroupStep], scopes: Sequence[Scope]) -> None:
        """Take new options."""
        before = [group.scope for group in self._groups], len(self._scopes)
        if before != ([group.scope for group in groups], len(scopes)):
            self._presence = None
        self._groups, self._scopes = groups, scopes
        self._stepper.assign(groups, scopes)

    def norm(self, signals: Signals) -> None:
        """Write the sums of squares of what this process counts."""
        self._stepper.norm(signals)

    def update(self, signals: Signals) -> Made | None:
        """Decide by the sums of squares, evaluate the schedules, update and count."""
        return self._stepper.update(signals)

    @torch.no_grad()
    def step(self, signals: Signals) -> Made | None:
        """Norm, all-reduce and update; where nothing has to be agreed on, both stages in one."""
        if not travels(self._scopes, signals):
            return self._stepper.step(signals)
        self._stepper.norm(signals)
        count, squares = len(self._scopes), self._counters.squares
        packed = self._layout.add(pack(squares[:count], signals, self._present_here(squares)))
        if packed.device.type == "cpu" and packed[count + 1]:
            raise RuntimeError(_ANOTHER)
        squares[:count] = packed[:count]
        # a process that has failed has everybody skip the step; on a GPU nobody waits to hear of it
        found_inf = packed[count] + packed[count + 1]
        return self._stepper.update(Signals(signals.grad_scale, found_inf, packed[count + 2 :], signals.only))

    def active(self) -> Sequence[bool]:
        """Per group whether its scope has made the last step, as far as this process knows."""
        return self._stepper.active()

    def _present_here(self, like: Tensor) -> Tensor:
        """Per scope whether this process has a gradient of it."""
        presence = self._inputs.presence
        if presence == self._presence:
            return self._present
        pairs = zip(self._rows, self._inputs.gradients, strict=True)
        present = like.new_zeros(len(self._scopes))
        for scope in {self._groups[row.group].scope for row, at in pairs if at}:
            # not by a copy from the host, which a CUDA graph would make of memory that is gone at its replay
            present[scope : scope + 1].fill_(1)
        if not capturing(like.device):
            # what is captured has its values after a replay
            self._present, self._presence = present, presence
        return present


def travels(scopes: Sequence[Scope], signals: Signals) -> bool:
    """Whether processes have to agree on anything in a step: by what is the same on all of them."""
    return signals.found_inf is not None or any(scope.normed for scope in scopes)


def pack(squares: Tensor, signals: Signals, present: Tensor, *, failed: bool = False) -> Tensor:
    """What travels, of shape (2 * scopes + 2,)."""
    flags = squares.new_zeros(2)
    if signals.found_inf is not None:
        inf = signals.found_inf
        flags[0] = inf.detach().reshape(()) != 0 if isinstance(inf, Tensor) else float(inf != 0)
    if failed:
        flags[1] = 1
    return torch.cat([squares, flags, present])


@torch.no_grad()
def tell_failure(
    layout: Layout, scopes: Sequence[Scope], signals: Signals, squares: Tensor, *, norm_alone: bool
) -> None:
    """Take part in the all-reduce of a step that this process cannot make: the others would wait for it.

    Where the `norm_alone` was asked for, it is nan on the others.
    """
    if norm_alone:
        layout.add(squares.new_full((len(scopes),), math.nan))
    elif travels(scopes, signals):
        # the norms become nan, for scopes that decide by these alone
        nans, none = squares.new_full((len(scopes),), math.nan), squares.new_zeros(len(scopes))
        layout.add(pack(nans, signals, none, failed=True))
