"""The numbers of a report: a summary of runs beside each other, what moved most and least, and the CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from fusedlr.report.layers import median, movement, places
from fusedlr.report.runs import Run

# tensors that are listed at each end
MOVERS = 10


def summary(runs: Sequence[Run]) -> list[tuple[str, ...]]:
    """Rows of text: a name, then a value for every run; the first row has the runs' labels."""
    each = [_summary(run) for run in runs]
    rows = dict.fromkeys(name for one in each for name in one)
    return [
        ("", *(run.label for run in runs)),
        *((row, *(one.get(row, "-") for one in each)) for row in rows),
    ]


def _summary(run: Run) -> dict[str, str]:
    steps = run.steps
    rows = {"steps recorded": f"{len(steps):,}, {steps[0]:,} to {steps[-1]:,}"}
    for scope in range(run.norm.shape[1]):
        of = f", {run.scope_label(scope)}" if run.scope_label(scope) else ""
        rows[f"skipped{of}"] = f"{run.skipped[:, scope].sum():,}"
        made = run.made[:, scope]
        if made.any():
            norms = run.norm[made, scope]
            rows[f"gradient norm{of}: median, highest"] = f"{np.median(norms):.3g}, {norms.max():.3g}"
            clipped = (run.recording.by_scope("coef")[made, scope] < 1).sum()
            rows[f"clipped{of}"] = f"{clipped:,} of {made.sum():,}"
    for line in run.rates():
        rates = line.values[np.isfinite(line.values)]
        if len(rates):
            rows[f"rate of {line.label}: first, highest, last"] = (
                f"{rates[0]:.3g}, {rates.max():.3g}, {rates[-1]:.3g}"
            )
    size = median(movement(run.recording), 0)
    matrices: dict[str, list[int]] = {}
    for i, place in enumerate(places(run.recording["names"])):
        matrices.setdefault(place.matrix, []).append(i)
    for matrix in sorted(matrices, key=lambda one: (not one, one)):
        if np.isfinite(size[matrices[matrix]]).any():
            what = matrix or ("other tensors" if len(matrices) > 1 else "all tensors")
            rows[f"update over parameter, {what}: median"] = f"{median(size[matrices[matrix]], 0):.3g}"
    return rows


def movers(run: Run) -> list[tuple[str, list[tuple[str, ...]]]]:
    """Titles, and rows of text: the tensors that moved most of themselves, and those that moved least."""
    moved = movement(run.recording)
    size, norm = median(moved, 0), run.recording["tensor_grad_norm"].astype(np.float64)
    norm = median(np.where(np.isfinite(norm), norm, np.nan), 0)
    order = np.argsort(-np.nan_to_num(size), kind="stable").tolist()
    head = ("tensor", "update over parameter", "highest", "gradient norm")

    def rows(tensors: list[int]) -> list[tuple[str, ...]]:
        return [
            head,
            *((run.names[i], *map(_shown, (size[i], _highest(moved[:, i]), norm[i]))) for i in tensors),
        ]

    tables = [("moved most, medians over the updates", order[:MOVERS])]
    # a tensor is listed once
    tables.append(("moved least", order[MOVERS:][-MOVERS:][::-1]))
    return [(title, rows(tensors)) for title, tensors in tables if tensors]


def _highest(values: Any) -> float:
    known = values[np.isfinite(values)]
    return float(known.max()) if len(known) else float("nan")


def _shown(value: float) -> str:
    return f"{value:.3g}" if np.isfinite(value) else "-"


def numbers(runs: Sequence[Run]) -> str:
    """All recorded numbers as CSV, a row for every step; several runs have their label in the first column.

    Numbers are written so that reading them gives the same ones; a column that a run lacks is left empty.
    """
    columns = [(run, _columns(run)) for run in runs]
    header = dict.fromkeys(name for _, one in columns for name in one)
    text = io.StringIO()
    writer = csv.DictWriter(text, [*(["run"] if len(runs) > 1 else []), *header], lineterminator="\n")
    writer.writeheader()
    for run, one in columns:
        label = {"run": run.label} if len(runs) > 1 else {}
        for values in zip(*one.values(), strict=True):
            writer.writerow({**label, **dict(zip(one, values, strict=True))})
    return text.getvalue()


def _columns(run: Run) -> dict[str, list[Any]]:
    """A list of values for every column of the CSV."""
    recording, columns = run.recording, {"step": run.steps.tolist()}
    for key in ("k", "lr"):
        for i, group in enumerate(recording["groups"]):
            # groups may share a name
            name = f"{key}/{group.name}"
            columns[f"{name} {i}" if name in columns else name] = recording[key][:, i].tolist()
    for i, group in enumerate(recording["groups"]):
        name = f"planned_lr/{group.name}"
        columns[f"{name} {i}" if name in columns else name] = run.planned[:, i].tolist()
    for key in ("grad_norm", "coef", "limit", "skipped"):
        values = recording.by_scope(key)
        for i in range(values.shape[1]):
            label = run.scope_label(i)
            name = f"{key}/{label}" if label else key
            # True and False are not numbers to a spreadsheet
            columns[f"{name} {i}" if name in columns else name] = (values[:, i] + 0).tolist()
    for key in ("tensor_grad_norm", "tensor_update_ratio"):
        for i, tensor in enumerate(recording["names"]):
            columns[f"{key}/{tensor}"] = recording[key][:, i].tolist()
    return columns
