"""Pictures of a run, drawn from its data alone: ratios to the baseline, and the sweeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .providers import BASELINE

Data = dict[str, Any]

# colours that stay apart for colour-blind readers (Okabe and Ito), by order of appearance; stock is grey
_OURS = ("#d55e00", "#e69f00", "#009e73", "#cc79a7")
_OTHERS = ("#0072b2", "#56b4e9", "#000000", "#f0e442")
_BASELINE = "#777777"
_MARKERS = "osD^vP*X"
DPI = 100
WIDTH = 9.0  # inches: 900 pixels, the width of a README


def draw(runs: list[Data], folder: Path) -> list[str]:
    """Write the pictures for which `runs` have data; returns the names of the files.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    written = []
    if any(result["rows"] for run in runs for result in run["inventories"]):
        _ratios(runs).savefig(folder / "step.png")
        written.append("step.png")
    if any(result["rows"] for run in runs for results in run["sweeps"].values() for result in results):
        _sweeps(runs).savefig(folder / "sweep.png")
        written.append("sweep.png")
    return written


def _figure(rows: int, columns: int, height: float, **options: Any) -> tuple[Any, Any]:
    # no pyplot: it keeps every figure it has made
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def _providers(results: list[Data]) -> dict[str, str]:
    """Provider -> colour, in the order of the tables."""
    names = dict.fromkeys(row["provider"] for result in results for row in result["rows"])
    ours, others = iter(_OURS), iter(_OTHERS)
    return {
        name: _BASELINE
        if name == BASELINE
        else next(ours if name.startswith("fusedlr") else others, "#999999")
        for name in names
    }


def _machine(run: Data) -> str:
    where = run["environment"]
    on = ", ".join(gpu["name"] for gpu in where["gpus"]) if run["device"] == "cuda" else where["processor"]
    return f"{on}, {where['threads']} threads, torch {where['packages']['torch']}, {where['date'][:10]}"


def _policy(run: Data) -> str:
    return f"OMP_WAIT_POLICY={run['environment']['omp_wait_policy']}"


def _ratios(runs: list[Data]) -> Any:
    """A row per inventory, a dot per provider with its quartiles; a panel per run."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    results = [result for run in runs for result in run["inventories"]]
    labels = {result["label"]: result for result in results}
    colours = _providers(results)
    figure, axes = _figure(1, len(runs), 1.9 + 0.28 * len(labels), sharey=True, sharex=True)
    for panel, run in zip(axes[0], runs, strict=True):
        found = {result["label"]: result for result in run["inventories"]}
        for marker, (name, colour) in zip(_MARKERS, colours.items(), strict=False):
            spots = [
                (y, row["ratio"])
                for y, label in enumerate(labels)
                for row in found.get(label, {"rows": []})["rows"]
                if row["provider"] == name
            ]
            if name == BASELINE or not spots:
                continue
            x = [ratio["median"] for _, ratio in spots]
            error = [
                [ratio["median"] - ratio["low"] for _, ratio in spots],
                [ratio["high"] - ratio["median"] for _, ratio in spots],
            ]
            at = [y for y, _ in spots]
            panel.errorbar(x, at, xerr=error, fmt=marker, color=colour, label=name, markersize=5, capsize=2)
        panel.axvline(1, color=_BASELINE, linewidth=1.5, label=f"stock {BASELINE} = 1")
        panel.set_xscale("log")
        low, high = panel.get_xlim()
        # over more than two decades the labels between them would run into each other
        panel.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 100 * low else (1.0,)))
        panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.set_title(_policy(run), fontsize=10)
        panel.set_xlabel("times as fast as stock fused (log scale)")
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    texts = [f"{label}, {_size(result)}" for label, result in labels.items()]
    axes[0][0].set_yticks(range(len(texts)), texts, fontsize=8)
    axes[0][0].set_ylabel("adapter, number of parameters", fontsize=9)
    axes[0][0].set_ylim(len(texts) - 0.4, -0.6)
    handles, names = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=min(len(names), 5), frameon=False)
    figure.suptitle(f"{_measured(results[0])}\n{_machine(runs[0])}", fontsize=10)
    return figure


def _measured(result: Data) -> str:
    clip = "clipping, AdamW and schedule" if result["clip"] else "AdamW and schedule, no clipping"
    return f"{clip}, {result['dtype']}; medians and quartiles"


def _size(result: Data) -> str:
    parameters = result["parameters"]
    return f"{parameters / 1e6:.1f} M" if parameters >= 1e5 else f"{parameters / 1e3:.0f} k"


def _sweeps(runs: list[Data]) -> Any:
    """Time per step over the number of tensors and over their size; a row per run."""
    names = list(dict.fromkeys(name for run in runs for name, results in run["sweeps"].items() if results))
    colours = _providers([r for run in runs for results in run["sweeps"].values() for r in results])
    figure, axes = _figure(len(runs), len(names), 1.4 + 3.2 * len(runs), sharex="col", sharey="col")
    for line, run in zip(axes, runs, strict=True):
        for panel, name in zip(line, names, strict=True):
            results = [result for result in run["sweeps"].get(name, []) if result["rows"]]
            _sweep(panel, name, results, colours)
            panel.set_title(f"{_policy(run)}, {_constant(name, results)}", fontsize=9)
        line[0].set_ylabel("ms per step")
    for panel, name in zip(axes[-1], names, strict=True):
        if name == "tensors":
            panel.xaxis.set_major_formatter("{x:,.0f}")
        panel.set_xlabel("number of tensors" if name == "tensors" else "number of parameters")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    first = next(result for run in runs for results in run["sweeps"].values() for result in results)
    figure.suptitle(f"{_measured(first)}\n{_machine(runs[0])}", fontsize=10)
    return figure


def _constant(name: str, results: list[Data]) -> str:
    if not results:
        return ""
    return f"{_size(results[0])} parameters" if name == "tensors" else f"{results[0]['tensors']} tensors"


def _sweep(panel: Any, name: str, results: list[Data], colours: dict[str, str]) -> None:
    key = "tensors" if name == "tensors" else "parameters"
    for marker, (provider, colour) in zip(_MARKERS, colours.items(), strict=False):
        points = [(r[key], row["ms"]) for r in results for row in r["rows"] if row["provider"] == provider]
        x = [at for at, _ in points]
        label = f"stock {BASELINE}" if provider == BASELINE else provider
        panel.plot(
            x, [ms["median"] for _, ms in points], marker=marker, color=colour, label=label, markersize=4
        )
        panel.fill_between(
            x,
            [ms["low"] for _, ms in points],
            [ms["high"] for _, ms in points],
            color=colour,
            alpha=0.2,
            lw=0,
        )
    from matplotlib.ticker import LogLocator, NullFormatter

    # the bytes of an ideal step at the bandwidth of an operation in place
    least = [
        r["parameters"] * r["rows"][0]["bytes_per_parameter"] / r["bandwidth_gb_per_s"]["median"] / 1e6
        for r in results
    ]
    label = "its bytes at the bandwidth of an operation in place"
    panel.plot([r[key] for r in results], least, color="black", linestyle=":", label=label)
    panel.set_xscale("log")
    panel.set_yscale("log")
    # 2 and 5 between the powers of ten, where there are few of those
    panel.yaxis.set_minor_locator(LogLocator(subs=(2.0, 5.0)))
    low, high = panel.get_ylim()
    panel.yaxis.set_minor_formatter("{x:g}" if high < 100 * low else NullFormatter())
    panel.yaxis.set_major_formatter("{x:g}")
    panel.grid(alpha=0.3)
    panel.spines[["top", "right"]].set_visible(False)
