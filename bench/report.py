"""A run in words and columns, made from its data alone, for a terminal 110 columns wide."""

from __future__ import annotations

import textwrap
from typing import Any

from fusedlr.console import aligned

from .providers import BASELINE

Data = dict[str, Any]
WIDTH = 110  # columns


def table(run: Data) -> str:
    """All inventories of a run, its sweeps, who was left out, and last a sentence on fusedlr."""
    where = run["environment"]
    lines = [
        f"{where['processor']}, {run['device']}, {where['threads']} threads, "
        f"OMP_WAIT_POLICY={where['omp_wait_policy']}, torch {where['packages']['torch']}"
    ]
    for result in run["inventories"]:
        lines += ["", *_inventory(result)]
    for name, results in run["sweeps"].items():
        if results:
            lines += ["", *_sweep(name, results)]
    # runs that were stored before this section existed have none
    if run.get("host"):
        lines += ["", *_host(run["host"])]
    # who is missing without a reason of its own is named, and no more
    absent = [name if why == "not installed" else f"{name} ({why})" for name, why in run["not here"].items()]
    if absent:
        lines += ["", *_wrapped(f"not here: {', '.join(absent)}")]
    lines += [f"left out: {name} {why}" for name, why in run["skipped"].items()]
    lines.append("")
    for result in run["inventories"]:
        lines += _wrapped(sentence(result, run["backend"]))
    return "\n".join(lines)


def title(result: Data) -> str:
    """What was updated, in a line."""
    clip = "with clipping" if result["clip"] else "no clipping"
    return (
        f"{result['label']}: {result['tensors']:,} tensors, {_count(result['parameters'])} parameters, "
        f"{result['dtype']}, {clip}"
    )


def _inventory(result: Data) -> list[str]:
    if not result["rows"]:
        return [title(result), *_rejected(result)]
    rate = result["bandwidth_gb_per_s"]["median"]
    rows = [
        (
            "",
            "ms per step",
            "quartiles",
            "x fused",
            "quartiles",
            "GB/s",
            f"of {rate:.1f}",
            "bytes/param",
            "state MiB",
        )
    ]
    for row in result["rows"]:
        ms, ratio = row["ms"], row["ratio"]
        rows.append(
            (
                row["provider"],
                _digits(ms["median"]),
                f"{_digits(ms['low'])}-{_digits(ms['high'])}",
                _times(ratio["median"]),
                f"{_times(ratio['low'])}-{_times(ratio['high'])}",
                f"{row['gb_per_s']:.1f}",
                f"{row['bandwidth_share']:.0%}",
                f"{row['bytes_per_parameter']:.0f}",
                f"{row['state_bytes'] / 2**20:.1f}",
            )
        )
    return [f"{title(result)}, {result['rounds']} rounds", *aligned(rows), *_rejected(result)]


def _rejected(result: Data) -> list[str]:
    return [f"NOT TIMED, {name}: {why}" for name, why in result["rejected"].items()]


def _sweep(name: str, results: list[Data]) -> list[str]:
    names = list(dict.fromkeys(row["provider"] for result in results for row in result["rows"]))
    rows = [(f"sweep of {name}, ms per step", *names, "x fused")]
    for result in results:
        times = {row["provider"]: row for row in result["rows"]}
        cells = [_digits(times[name]["ms"]["median"]) if name in times else "-" for name in names]
        last = times.get(names[-1]) if names else None
        rows.append((result["label"], *cells, _times(last["ratio"]["median"]) if last else "-"))
    return [*aligned(rows), *(line for result in results for line in _rejected(result))]


def _host(result: Data) -> list[str]:
    title = (
        f"host: {result['tensors']} tensors of {result['elements']} elements, float32, with clipping, new "
        f"gradients in every step, {result['rounds']} rounds"
    )
    rows = [("", "ms per step", "quartiles", "time / plain", "quartiles", "stock / time", "quartiles")]
    for row in result["rows"]:
        ms, plain, ratio = row["ms"], row["times_plain"], row["ratio"]
        rows.append(
            (
                row["way"],
                _digits(ms["median"]),
                f"{_digits(ms['low'])}-{_digits(ms['high'])}",
                _times(plain["median"]),
                f"{_times(plain['low'])}-{_times(plain['high'])}",
                _times(ratio["median"]),
                f"{_times(ratio['low'])}-{_times(ratio['high'])}",
            )
        )
    return [title, *(aligned(rows) if result["rows"] else []), *_rejected(result)]


def sentence(result: Data, backend: str) -> str:
    """What the backend that fusedlr would choose reached, or nothing where it was not timed."""
    row = next((row for row in result["rows"] if row["provider"] == backend), None)
    if row is None:
        return ""
    ratio, clip = row["ratio"], "clip_grad_norm_, " if result["clip"] else ""
    slower = "" if ratio["median"] >= 1 else ", so it is slower here"
    return (
        f"{result['label']}: {backend} makes a step in {_digits(row['ms']['median'])} ms, "
        f"{_times(ratio['median'])} times as fast as {clip}AdamW({BASELINE}=True) and LambdaLR "
        f"(quartiles {_times(ratio['low'])} to {_times(ratio['high'])}){slower}."
    )


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH)


def _digits(ms: float) -> str:
    """Three digits that count.

    >>> _digits(0.01234), _digits(1.234), _digits(123.4)
    ('0.0123', '1.23', '123')
    """
    return f"{ms:.{max(0, 2 - _power(ms))}f}"


def _times(ratio: float) -> str:
    """Two decimals, or no more than a ratio above 100 needs.

    >>> _times(1.234), _times(15340.18)
    ('1.23', '15340')
    """
    return f"{ratio:.2f}" if ratio < 100 else _digits(ratio)


def _power(value: float) -> int:
    return int(f"{value:e}".split("e")[1])


def _count(parameters: int) -> str:
    return f"{parameters / 1e6:.1f} M" if parameters >= 1e5 else f"{parameters:,}"
