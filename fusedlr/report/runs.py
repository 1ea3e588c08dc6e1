"""One run as all parts of a report read it: a recording, the label of its file, and what follows from it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fusedlr.recorded import Recording
from fusedlr.report.layers import short


@dataclass(frozen=True)
class Line:
    """Values over the recorded steps, drawn as a line; NaN where there is none."""

    label: str
    values: Any


@dataclass(frozen=True)
class Run:
    """A recording and what the report calls it."""

    label: str
    recording: Recording

    @functools.cached_property
    def planned(self) -> Any:
        """(steps, groups): see `Recording.planned`."""
        return self.recording.planned()

    @functools.cached_property
    def names(self) -> list[str]:
        """The tensors' names without what all of them begin with."""
        return short(self.recording["names"])

    @functools.cached_property
    def scope_of_group(self) -> list[int]:
        """The column of each group's scope."""
        scopes = self.recording["scopes"]
        return [scopes.index(group.scope) for group in self.recording["groups"]]

    @functools.cached_property
    def skipped(self) -> Any:
        """(steps, scopes) of bool."""
        return self.recording.by_scope("skipped")

    @functools.cached_property
    def norm(self) -> Any:
        """(steps, scopes) in fp64."""
        return self.recording.by_scope("grad_norm").astype(np.float64)

    @functools.cached_property
    def made(self) -> Any:
        """(steps, scopes): an update was made, and its norm is known."""
        return np.isfinite(self.norm) & ~self.skipped

    @property
    def steps(self) -> Any:
        """(steps,): numbers of the `step()` calls."""
        return self.recording["step"]

    def scope_label(self, column: int) -> str:
        """How words name a scope; empty where it is the only one."""
        scopes = self.recording["scopes"]
        if len(scopes) == 1:
            return ""
        scope = scopes[column]
        if scope is None:
            return "groups without a scope"
        return self.recording["groups"][scope].name if isinstance(scope, int) else scope

    def rates(self) -> list[Line]:
        """The rates used; groups with the same rates at every step share a line."""
        return self._lines(self.recording["lr"].astype(np.float64))

    def plans(self) -> list[Line]:
        """The rates that the schedules give, likewise."""
        return self._lines(self.planned)

    def _lines(self, values: Any) -> list[Line]:
        shared: dict[bytes, list[str]] = {}
        for column, group in enumerate(self.recording["groups"]):
            # equal values are equal bytes, and every NaN made here has the same ones
            shared.setdefault((values[:, column] + 0.0).tobytes(), []).append(group.name)
        return [Line(", ".join(names), np.frombuffer(row)) for row, names in shared.items()]

    def norms(self) -> list[Line]:
        """The norms of the scopes that have any."""
        return self._of_scopes(self.norm)

    def limits(self) -> list[Line]:
        """The limits of the scopes that have any."""
        return self._of_scopes(self.recording.by_scope("limit").astype(np.float64))

    def _of_scopes(self, values: Any) -> list[Line]:
        kept = np.where(np.isfinite(values), values, np.nan)
        lines = [Line(self.scope_label(i), kept[:, i]) for i in range(kept.shape[1])]
        return [line for line in lines if not np.isnan(line.values).all()]


def span(lines: Sequence[Line]) -> tuple[float, float] | None:
    """The lowest and the highest value above 0 of all lines, or None."""
    every = np.concatenate([line.values for line in lines]) if lines else np.array([])
    every = every[np.isfinite(every) & (every > 0)]
    return (float(every.min()), float(every.max())) if len(every) else None
