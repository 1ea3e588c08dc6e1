"""Fills in the numbers of the README and of docs/schedules.md from bench/results/ and from the package.

`python tools/readme_numbers.py` rewrites what stands between the markers `<!-- numbers: NAME -->` and
`<!-- end of numbers -->`; `--check` changes nothing and fails where it would.
"""

from __future__ import annotations

import json
import re
import sys
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
PAGES = (ROOT / "README.md", ROOT / "docs" / "schedules.md")
WIDTH = 110  # columns of the prose
MARKED = re.compile(r"(<!-- numbers: (\w+) -->\n)(.*?)(<!-- end of numbers -->)", re.S)
INVENTORIES = ("tiny", "llama-2-7b-qv-r8", "llama-3-8b-all-r8", "llama-2-7b-all-r16")
# OMP_WAIT_POLICY of a run -> how the README calls it, the headline first
POLICIES = {"unset": "default thread policy", "PASSIVE": "`OMP_WAIT_POLICY=PASSIVE`"}
# runs of the demo, and how the README calls them
RUNS = {
    "fusedlr": "fusedlr, `{backend}`",
    "stock": "stock, fused",
    "stock, foreach": "stock, foreach",
    "stock, warm-up + 1": "stock, warm-up one update longer",
}
PEAK, WARMUP, TOTAL = 2e-4, 200, 4000  # of the README's example


def table(rows: Iterable[Iterable[str]]) -> str:
    """Rows as a Markdown table; the first is its head."""
    head, *rest = [f"| {' | '.join(row)} |".replace("|  |", "| |") for row in rows]
    return "\n".join([head, "|" + "---|" * (head.count("|") - 1), *rest, ""])


def demo() -> str:
    """What the demo measured."""
    report = json.loads((RESULTS / "demo.json").read_text())
    runs, distances = report["runs"], report["distance_from_stock"]
    config, machine = report["config"], report["machine"]
    names = [name for name in RUNS if name in runs]
    rows = [
        ["", *(RUNS[name].format(**runs[name]) for name in names)],
        [
            f"held-out loss on code, {report['base']['code']:.4f} before",
            *(f"{runs[name]['code']:.4f}" for name in names),
        ],
        [
            "mean difference of a weight from stock, fused",
            *(f"{distances[name]['weights']:.1e}" if name in distances else "0" for name in names),
        ],
        ["clip, step and scheduler, ms per update", *(f"{phase(runs[name]):.1f}" for name in names)],
        ["share of the update", *(f"{runs[name]['optimizer_phase_share']:.1%}" for name in names)],
    ]
    text = (
        f"`make demo` on {machine['processor']}, {machine['threads']} threads, torch "
        f"{report['versions']['torch']}, {report['date'][:10]}: {config['steps']} LoRA updates, "
        f"{config['schedule']}, {report['seconds']['total']:.0f} s in all. "
        f"{overflow(report['skip'])}"
    )
    return f"{textwrap.fill(text, WIDTH)}\n\n{table(rows)}"


def overflow(skip: dict[str, Any]) -> str:
    """What one overflow did to the schedules, as a sentence."""
    ours, stock = skip["fusedlr"], skip["stock"]
    return (
        f"After one overflow in {len(skip['meant']) + 1} steps under a `GradScaler`, fusedlr's schedule "
        f"has counted {ours['schedule']} of {ours['updates']} updates, stock's {stock['schedule']} of "
        f"{stock['updates']}."
    )


def panel() -> str:
    """What three schedules made of the same run at a high rate."""
    report = json.loads((RESULTS / "demo.json").read_text())
    machine, runs = report["machine"], report["schedules"]
    peak = max(runs["constant"]["lrs"])
    rows = [[f"peak {peak:g}", "highest training loss", "held-out loss on code"]]
    rows += [[f"`{name}`", f"{max(run['losses']):.2f}", f"{run['code']:.2f}"] for name, run in runs.items()]
    where = f"{machine['processor']}, {machine['threads']} threads, {report['date'][:10]}"
    return f"{report['config']['steps']} LoRA updates of `fusedlr demo`, one seed, {where}:\n\n{table(rows)}"


def phase(run: dict[str, Any]) -> float:
    return float(run["optimizer_phase_ms"])


def benchmark() -> str:
    """The last run of the benchmark on a CPU under the default thread policy; beside it the last passive one.

    As long as only one of the two has been measured, that one stands alone and is named.
    """
    runs = [run for run in json.loads((RESULTS / "step.json").read_text()) if run["device"] == "cpu"]
    last = {run["environment"]["omp_wait_policy"]: run for run in runs}
    shown = [last[policy] for policy in POLICIES if policy in last]
    where, policy = shown[0]["environment"], POLICIES[policy_of(shown[0])]
    ratios = ["times as fast (quartiles)", *(POLICIES[policy_of(run)] for run in shown[1:])]
    rows = [["adapters of", "tensors", "parameters", "stock, ms", "fusedlr, ms", *ratios]]
    for name in INVENTORIES:
        result, stock, ours = compared(shown[0], name)
        rows.append(
            [
                result["label"],
                str(result["tensors"]),
                count(result["parameters"]),
                f"{stock['ms']['median']:.3g}",
                f"{ours['ms']['median']:.3g}",
                *(spread(compared(run, name)[2]["ratio"]) for run in shown),
            ]
        )
    text = (
        f"`fusedlr bench` on {where['processor']}, {where['threads']} threads, "
        f"torch {where['packages']['torch']}, {where['date'][:10]}, {policy}: clipping, "
        f"`AdamW(fused=True)` and `LambdaLR` against one fusedlr step, fp32."
    )
    return f"{textwrap.fill(text, WIDTH)}\n\n{table(rows)}"


def policy_of(run: dict[str, Any]) -> str:
    return str(run["environment"]["omp_wait_policy"])


def compared(run: dict[str, Any], inventory: str) -> tuple[dict[str, Any], ...]:
    """What a run measured of an inventory: all of it, stock's row, and that of fusedlr's own choice."""
    result = next(result for result in run["inventories"] if result["inventory"] == inventory)
    rows = {row["provider"]: row for row in result["rows"]}
    return result, rows["fused"], rows[run["backend"]]


def spread(ratio: dict[str, float]) -> str:
    """Median and quartiles."""
    return f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"


def count(parameters: int) -> str:
    return f"{parameters / 1e6:.1f} M" if parameters >= 1e5 else f"{parameters:,}"


def schedules() -> str:
    """What the first, highest and last update get, of every constructor."""
    from fusedlr.schedule import spec

    options = {
        "warmup_steps": WARMUP,
        "total_steps": TOTAL,
        "decay_steps": 400,
        "min_lr_ratio": 0.1,
        "num_cycles": 2,
    }
    # the floor where it must be given, the cycles where they are the point
    needed = {
        "cosine_with_min_lr": ("min_lr_ratio",),
        "cosine_warmup_with_min_lr": ("min_lr_ratio",),
        "cosine_with_restarts": ("num_cycles",),
        "warmup_stable_decay": ("decay_steps",),
    }
    rows = [["", "first update", "peak reached at k =", "half-way, k = 2,000", "last update, k = 3,999"]]
    for name in spec.NAMES:
        if name == "table":
            continue
        keys = ("warmup_steps", "total_steps", *needed.get(name, ()))
        schedule = spec.parse(name).build({key: options[key] for key in keys})
        top = next(k for k in range(TOTAL) if schedule.lr_at(k) == 1)
        extra = ", ".join(f"{key}={options[key]:g}" for key in needed.get(name, ()))
        values = [f"{schedule.lr_at(k, PEAK):.3g}" for k in (0, TOTAL // 2, TOTAL - 1)]
        rows.append([f"`{name}`" + (f", {extra}" if extra else ""), values[0], f"{top}", *values[1:]])
    return table(rows)


SECTIONS: dict[str, Callable[[], str]] = {
    "demo": demo,
    "benchmark": benchmark,
    "panel": panel,
    "schedules": schedules,
}


def filled(text: str) -> str:
    """`text` with every marked section as it should be."""
    return MARKED.sub(lambda found: found[1] + SECTIONS[found[2]]() + found[4], text)


def main(arguments: list[str]) -> int:
    stale = [page for page in PAGES if filled(page.read_text()) != page.read_text()]
    if arguments == ["--check"]:
        for page in stale:
            print(f"{page.relative_to(ROOT)} does not have the numbers of bench/results")
        return 1 if stale else 0
    for page in stale:
        page.write_text(filled(page.read_text()))
        print(f"{page.relative_to(ROOT)} has new numbers")
    return 0


if __name__ == "__main__":
    # the checkout, installed or not
    sys.path.insert(0, str(ROOT))
    sys.exit(main(sys.argv[1:]))
