"""The GPU suite's results for people: a line while it runs, and tables in Markdown."""

from __future__ import annotations

from typing import Any

from .providers import BASELINE

_HIDDEN = ("seconds", "passed", "runs", "rows")


def short(result: dict[str, Any]) -> str:
    """A section's result in a line."""
    line = ", ".join(f"{key}={value}" for key, value in result.items() if key not in _HIDDEN)
    return line if len(line) <= 160 else line[:157] + "..."


def markdown(results: dict[str, Any]) -> str:
    """All there is so far."""
    lines = ["# GPU suite", "", *_machine(results.get("environment", {})), ""]
    lines += ["| section | | seconds |", "|---|---|---|"]
    for name, result in results.items():
        if isinstance(result, dict) and "seconds" in result:
            lines.append(f"| {name} | {_verdict(result)} | {result['seconds']:.0f} |")
    for name in ("benchmark", "compiled"):
        for run in results.get(name, {}).get("runs", []):
            lines += ["", *_run(run, results.get("launches", {}))]
    lines += _variants(results.get("variants", {}).get("rows", []))
    lines += _end_to_end(results.get("end to end", {}))
    return "\n".join(lines) + "\n"


def _machine(environment: dict[str, Any]) -> list[str]:
    gpus = ", ".join(f"{gpu['name']} (driver {gpu['driver']})" for gpu in environment.get("gpus", []))
    packages = environment.get("packages", {})
    versions = ", ".join(f"{name} {packages[name]}" for name in ("torch", "triton") if name in packages)
    where = gpus or f"no GPU: {environment.get('processor', 'unknown')}"
    return [f"{where}; {versions}; commit {environment.get('commit')}; {environment.get('date')}"]


def _verdict(result: dict[str, Any]) -> str:
    if "left out" in result:
        return f"left out: {_cell(result['left out'])}"
    if result.get("passed", True):
        return "passed"
    reason = result.get("error") or ", ".join(result.get("failed tests", [])[:5])
    return f"**failed** {_cell(reason)}".rstrip()


def _run(run: dict[str, Any], launches: dict[str, Any]) -> list[str]:
    """An inventory: one line per provider, slower ones too."""
    clip = "with" if run["clip"] else "no"
    counted = launches.get(f"{run['inventory']}, {clip} clipping", {})
    lines = [
        f"## {run['label']}, {run['tensors']} tensors, {run['parameters']:,} parameters, {clip} clipping",
        "",
        f"median of {run['rounds']} rounds; an operation in place reaches "
        f"{run['bandwidth_gb_per_s']['median']:.0f} GB/s",
        "",
        f"| | host us | step us | times {BASELINE} | replay us | replay, share of bandwidth "
        "| kernels | copies in |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in run["rows"]:
        name = row["provider"]
        count = counted.get(name, {})
        replay = run["replay"].get(name, {}).get("ms")
        share = "-"
        if replay:
            moved = row["bytes_per_parameter"] * run["parameters"]
            share = f"{moved / replay / 1e6 / run['bandwidth_gb_per_s']['median']:.0%}"
        cells = [
            name,
            f"{1e3 * row['host_ms']['median']:.0f}",
            f"{1e3 * row['ms']['median']:.0f}",
            f"{row['ratio']['median']:.2f}",
            f"{1e3 * replay:.1f}" if replay else "-",
            share,
            *(f"{count[key]:g}" if key in count else "-" for key in ("kernels", "copies to the device")),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [f"| {name} | not timed: {_cell(why)} | | | | | | |" for name, why in run["rejected"].items()]
    return lines


def _variants(rows: list[dict[str, Any]]) -> list[str]:
    """The kernels with other numbers in them: a line per variant and type of the parameters."""
    if not rows:
        return []
    lines = ["", "## The kernels with other numbers in them", ""]
    lines += ["| | | step us | replay us | replay, share of bandwidth |", "|---|---|---|---|---|"]
    for row in rows:
        timed = {key: value for key, value in row.items() if "replay ms" in value}
        for name, found in timed.items():
            times = f"{1e3 * found['step ms']:.0f} | {1e3 * found['replay ms']:.1f}"
            lines.append(f"| {row['variant']} | {name} | {times} | {found['share of bandwidth']:.0%} |")
        if not timed:
            found = {key: value for key, value in row.items() if key != "variant"}
            lines.append(f"| {row['variant']} | not timed: {_cell(found)} | | | |")
    return lines


def _end_to_end(result: dict[str, Any]) -> list[str]:
    if "median" not in result:
        return []
    lines = [
        "",
        f"## Trainer, {result['parameters']:,} parameters, {result['trained tensors']} trained tensors",
    ]
    lines += ["", "| | tokens per second | runs |", "|---|---|---|"]
    for name, rates in result["tokens per second"].items():
        every = ", ".join(f"{rate:.0f}" for rate in rates)
        lines.append(f"| {name} | {result['median'][name]:.0f} | {every} |")
    return lines


def _cell(text: Any) -> str:
    return str(text).replace("|", "/").replace("\n", " ")[:300]
