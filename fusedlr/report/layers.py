"""Parameters' names taken apart into layer, module and matrix, and updates put together by layer.

Names of PEFT give A and B matrices; any other names give layers by the first number in them.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from fusedlr import peft_names


@dataclass(frozen=True)
class Place:
    """Where a tensor is in its model.

    Attributes:
        layer: the name up to the first number, as `layers.3`; without a number, the tensor's module.
        module: the rest of the name, as `self_attn.q_proj`.
        matrix: `A` or `B` for a matrix of LoRA, empty for other tensors; the adapter's name follows where
            there are several.
    """

    layer: str
    module: str
    matrix: str

    @property
    def row(self) -> str:
        """The row of a heat map that the tensor is in."""
        return f"{self.layer} {self.matrix}".rstrip()

    @property
    def numbered(self) -> bool:
        """Whether the layer is one of several of its kind."""
        return self.layer.rpartition(".")[2].isdigit()

    @property
    def kind(self) -> tuple[str, str, str]:
        """What the tensor has in common with those at its place in other layers."""
        stem, _, number = self.layer.rpartition(".")
        return (stem if number.isdigit() else self.layer, self.module, self.matrix)


def places(names: Sequence[str]) -> list[Place]:
    """The place of every tensor; what all layers' names begin with is left out.

    >>> places(["model.h.0.q.lora_A.default.weight", "model.h.1.norm.weight", "model.head.weight"])
    [Place(layer='h.0', module='q', matrix='A'), Place(layer='h.1', module='norm.weight', matrix=''),
     Place(layer='head', module='weight', matrix='')]
    """
    split = [_split(name) for name in names]
    adapters = {adapter for _, _, _, adapter in split if adapter}
    # the last word stays, and the number behind it
    heads = [layer[:-2] if layer[-1].isdigit() else layer[:-1] for layer, _, _, _ in split]
    common = _common(heads)
    return [
        Place(
            ".".join(layer[common:]),
            ".".join(module),
            f"{matrix} {adapter}".strip() if len(adapters) > 1 else matrix,
        )
        for layer, module, matrix, adapter in split
    ]


def _split(name: str) -> tuple[list[str], list[str], str, str]:
    """Parts of the layer and of the module, the matrix, and the adapter's name."""
    # optimizer.record() tells parameters of one name apart so, which is as good as an adapter's name
    alike = re.fullmatch(r"(.*) \(((?:group|part) \d+)\)", name)
    name, apart = (alike[1], alike[2]) if alike else (name, "")
    parts, matrix, adapter = name.split("."), "", ""
    role = peft_names.role(name)
    if role is not None:
        i = parts.index(role)
        matrix = {"lora_A": "A", "lora_B": "B"}.get(peft_names.kind(name), "")
        adapter = next((part for part in parts[i + 1 : i + 2] if part not in ("weight", "bias")), "")
        # a matrix is told by its letter, so its own name is not needed
        parts = parts[:i] if matrix else [*parts[: i + 1], *parts[i + 2 :]]
    number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    if number is not None:
        cut = number + 1
    else:
        cut = len(parts) if matrix else max(1, len(parts) - 1)
    return parts[:cut], parts[cut:], matrix, f"{adapter} {apart}".strip()


def _common(heads: Sequence[Sequence[str]]) -> int:
    """How many parts all of them begin with."""
    columns = zip(*heads, strict=False)
    return next(
        (i for i, parts in enumerate(columns) if len(set(parts)) > 1), min(map(len, heads), default=0)
    )


def short(names: Sequence[str]) -> list[str]:
    """The names without what all of them begin with, up to a dot.

    >>> short(["model.h.0.weight", "model.h.1.weight"])
    ['h.0.weight', 'h.1.weight']
    """
    heads = [name.split(".")[:-1] for name in names]
    heads = [
        head[: next((i for i, part in enumerate(head) if part.isdigit()), len(head)) - 1] for head in heads
    ]
    common = _common(heads)
    return [".".join(name.split(".")[common:]) for name in names]


def median(values: Any, axis: int) -> Any:
    """The median of what is not NaN, and NaN where all is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return np.nanmedian(values, axis=axis)


def movement(recording: Any) -> Any:
    """`tensor_update_ratio` in fp64, NaN where a tensor did not move or had been 0: (steps, tensors)."""
    ratio = recording["tensor_update_ratio"].astype(np.float64)
    return np.where((ratio > 0) & np.isfinite(ratio), ratio, np.nan)


@dataclass(frozen=True)
class Heat:
    """How much of themselves the tensors of a layer moved: the median over the tensors, then over some steps.

    Attributes:
        labels: one for each row: layers in the model's order, A matrices first, then B, then other tensors.
        values: (rows, columns), NaN where nothing moved.
    """

    labels: list[str]
    values: Any

    def merged(self, most: int) -> Heat:
        """At most about `most` rows: neighbours of one matrix become one row, their median."""
        n = -(-len(self.labels) // most)
        if n <= 1:
            return self
        blocks: dict[str, list[list[int]]] = {}
        for row, label in enumerate(self.labels):
            block = blocks.setdefault(label.partition(" ")[2], [])
            if not block or len(block[-1]) == n:
                block.append([])
            block[-1].append(row)
        chosen = [rows for block in blocks.values() for rows in block]
        firsts = [self.labels[rows[0]].split()[0] for rows in chosen]
        lasts = [self.labels[rows[-1]] for rows in chosen]
        labels = [
            last if len(rows) == 1 else f"{first} to {last}"
            for rows, first, last in zip(chosen, firsts, lasts, strict=True)
        ]
        return Heat(labels, np.array([median(self.values[rows], 0) for rows in chosen]))


def heat(recording: Any, columns: int) -> Heat | None:
    """The heat map with at most `columns` columns, each of some steps; None where no tensor was recorded."""
    if not recording["names"]:
        return None
    found: dict[tuple[str, str], list[int]] = {}
    for i, place in enumerate(places(recording["names"])):
        found.setdefault((place.matrix, place.layer), []).append(i)
    layers = list(dict.fromkeys(layer for _, layer in found))
    # "" is of the other tensors, which come last
    order = sorted(found, key=lambda key: (not key[0], key[0], layers.index(key[1])))
    moved = movement(recording)
    rows = [binned(median(moved[:, found[key]], 1), columns) for key in order]
    return Heat([f"{layer} {matrix}".rstrip() for matrix, layer in order], np.array(rows))


def binned(values: Any, columns: int) -> Any:
    """The medians of at most `columns` neighbouring pieces of a row."""
    if len(values) <= columns:
        return values
    edges = np.linspace(0, len(values), columns + 1).round().astype(int)
    return np.array([median(values[a:b], 0) for a, b in pairwise(edges)])


def bounds(heats: Sequence[Heat]) -> tuple[float, float] | None:
    """The ratios that the colours of several heat maps run between; None where nothing moved at all.

    The hundredth that is lowest and the one that is highest share the ends: one jump would take all colours.
    """
    every = np.concatenate([one.values.ravel() for one in heats]) if heats else np.array([])
    every = every[np.isfinite(every)]
    if not len(every):
        return None
    low, high = np.quantile(every, [0.01, 0.99])
    # one ratio alone still needs a range, as its logarithm is divided by
    return (float(low), float(high)) if high > 1.01 * low else (float(low) / 2, float(high) * 2)
