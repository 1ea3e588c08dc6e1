"""The comparison of the runs: the table printed at the end, and report.json with everything measured."""

import json
import math
import platform
import textwrap
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from statistics import median

from fusedlr.console import aligned
from fusedlr.demo.base import Base
from fusedlr.demo.finetune import FOREACH, FUSEDLR, OFF_BY_ONE, STOCK, Result
from fusedlr.demo.settings import Settings
from fusedlr.info import installed_version

# optimizer code is allowed to differ from another in rounding only; stock's two differ by 1 on this scale.
# Any two of stock's, cpu and reference over any other two: 99 % within 2.7, at most 3.3 (quick, 12 seeds,
# 2026-11); a learning rate off by a millionth makes it 4.5. With the weight that differs most in place of the
# mean it would be up to 17: one weight is a draw
DISTANCE_LIMIT = 4.0


@dataclass
class Distance:
    """How far a run ended from the stock run."""

    loss: float  # largest difference in training loss over all updates, nats
    weights: float  # mean absolute difference of the adapter weights after the last update
    weight: float  # the largest of them


def distance(a: Result, b: Result) -> Distance:
    """The differences between two runs over the same data, NaN where a run diverged."""
    import torch

    # torch's max, unlike Python's, never passes over a NaN
    losses = torch.tensor(a.losses, dtype=torch.float64) - torch.tensor(b.losses, dtype=torch.float64)
    weights = torch.cat([(a.weights[name] - b.weights[name]).abs().double().flatten() for name in a.weights])
    return Distance(losses.abs().max().item(), weights.mean().item(), weights.max().item())


def ratio(ours: Distance, stock: Distance) -> float:
    """How many times as far fusedlr is from stock as stock's two kernels are from each other, in weights."""
    if stock.weights == 0:
        return 0.0 if ours.weights == 0 else math.inf
    return ours.weights / stock.weights


def compare(results: list[Result]) -> dict[str, Distance]:
    """The distance of every run but the stock one from the stock one, by run name."""
    stock = next(result for result in results if result.run == STOCK)
    return {result.run.name: distance(result, stock) for result in results if result.run != STOCK}


def phase(result: Result) -> tuple[float, float]:
    """Median time of the optimizer phase in ms, and the median of its share of the step."""
    shares = (part / whole for part, whole in zip(result.phase_ms, result.step_ms, strict=True))
    return median(result.phase_ms), median(shares)


def table(settings: Settings, base: Base, results: list[Result]) -> str:
    """The report in words and columns, for a terminal 100 columns wide."""
    by_run = {result.run: result for result in results}
    columns = [by_run[FUSEDLR], by_run[STOCK], by_run[FOREACH]]
    rows = [
        ("", *(result.run.name for result in columns)),
        ("held-out loss on code, before", *(f"{base.code:.4f}" for _ in columns)),
        ("held-out loss on code, after", *(f"{result.code:.4f}" for result in columns)),
        ("held-out loss on prose, before", *(f"{base.prose:.4f}" for _ in columns)),
        ("held-out loss on prose, after", *(f"{result.prose:.4f}" for result in columns)),
        ("lr at the first update", *(f"{result.lrs[0]:.3e}" for result in columns)),
        ("lr at its peak", *(f"{max(result.lrs):.3e}" for result in columns)),
        ("lr at the last update", *(f"{result.lrs[-1]:.3e}" for result in columns)),
        ("optimizer phase, ms per update", *(f"{phase(result)[0]:.3f}" for result in columns)),
        ("  its share of the update", *(f"{phase(result)[1]:.1%}" for result in columns)),
        ("backend", *(result.backend for result in columns)),
    ]
    lines = [
        f"base model: held-out prose {base.prose_untrained:.3f} -> {base.prose:.3f} nats per token"
        + (" (from the cache)" if base.cached else ""),
        f"LoRA: {settings.steps} updates, {settings.schedule}, warm-up {settings.warmup}, "
        f"peak lr {settings.lr:g}, on {settings.device};",
        f"an update sees {settings.accumulation} x {settings.size.batch} examples "
        f"of {settings.size.sequence} tokens",
        "",
        *aligned(rows),
        "",
        *aligned(_distance_rows(results)),
        "",
        verdict(results),
        "",
        not_faster(results),
    ]
    return "\n".join(lines)


def not_faster(results: list[Result]) -> str:
    """How much of the training time the optimizer could save at all, and what it did save."""
    by_run = {result.run: result for result in results}
    ours, stock = by_run[FUSEDLR], by_run[STOCK]
    (ours_ms, _), (stock_ms, share) = phase(ours), phase(stock)
    faster = f"{stock_ms / ours_ms:.1f} times as fast" if ours_ms < stock_ms else "slower"
    return (
        f"what is not faster: the training. Stock's optimizer phase is {share:.1%} of an update, so no\n"
        f"optimizer can save more here; fusedlr's is {faster}, and a whole update takes\n"
        f"{median(ours.step_ms):.0f} ms against {median(stock.step_ms):.0f} ms"
    )


def verdict(results: list[Result]) -> str:
    """One sentence: does fusedlr differ from stock by more than rounding?"""
    distances = compare(results)
    times = ratio(distances[FUSEDLR.name], distances[FOREACH.name])
    if math.isnan(times):
        return "the training diverged, so there is nothing to compare; try a lower --lr"
    meaning = "rounding" if times <= DISTANCE_LIMIT else "MORE THAN ROUNDING"
    return (
        f"fusedlr's weights are on average {times:.2g} times as far from stock's as stock's own two kernels\n"
        f"are from each other (up to {DISTANCE_LIMIT:g} times is expected of equal arithmetic): {meaning}"
    )


def _distance_rows(results):
    names = {
        FUSEDLR.name: "fusedlr - stock",
        FOREACH.name: "stock foreach - stock fused",
        OFF_BY_ONE.name: "stock, warm-up 1 longer - stock",
    }
    rows = [("difference", "loss, largest", "weights, mean", "weights, largest")]
    for name, gap in compare(results).items():
        rows.append((names[name], f"{gap.loss:.2e}", f"{gap.weights:.2e}", f"{gap.weight:.2e}"))
    return rows


def write_recording(results: list[Result], folder: Path) -> str:
    """Write what fusedlr's run has recorded, and `fusedlr report`'s picture of it; returns its words."""
    from fusedlr.logs import RECORDING
    from fusedlr.report.picture import png
    from fusedlr.report.runs import Run
    from fusedlr.report.terminal import NOTHING
    from fusedlr.report.unusual import unusual

    recording = next(result.recording for result in results if result.run == FUSEDLR)
    recording.save(folder / RECORDING)
    run = Run(FUSEDLR.name, recording)
    (folder / "recording.png").write_bytes(png([run]))
    said = "\n".join(
        textwrap.fill(f"- {words}", 100, subsequent_indent="  ") for words in unusual(run) or [NOTHING]
    )
    return f"unusual in fusedlr's run, by its recording ({RECORDING}, recording.png):\n{said}"


def versions() -> dict[str, str]:
    """Versions of everything that the numbers depend on."""
    names = ("fusedlr", "torch", "transformers", "accelerate", "peft", "tokenizers", "triton")
    found = {name: version for name in names if (version := installed_version(name))}
    return {"python": platform.python_version(), **found}


def machine(settings: Settings) -> dict:
    """What the runs were timed on."""
    import torch

    found = {"platform": platform.platform(), "processor": _processor(), "threads": torch.get_num_threads()}
    if settings.device == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
    return found


def _processor():
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def as_values(result: Result) -> dict:
    """A run as plain values."""
    return {
        name: value for name, value in vars(result).items() if name not in ("run", "weights", "recording")
    }


def as_dict(settings: Settings, base: Base, results: list[Result], seconds: dict[str, float]) -> dict:
    """Everything the demo measured, as plain values."""
    distances = compare(results)
    runs = {}
    for result in results:
        values = as_values(result)
        values["optimizer_phase_ms"], values["optimizer_phase_share"] = phase(result)
        values["lr"] = {"first": result.lrs[0], "peak": max(result.lrs), "last": result.lrs[-1]}
        runs[result.run.name] = values
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": versions(),
        "machine": machine(settings),
        "config": settings.as_dict(),
        "seconds": seconds,
        "base": {
            "prose_untrained": base.prose_untrained,
            "prose": base.prose,
            "code": base.code,
            "cached": base.cached,
        },
        "runs": runs,
        "distance_from_stock": {name: asdict(gap) for name, gap in distances.items()},
        "ratio": ratio(distances[FUSEDLR.name], distances[FOREACH.name]),
        "ratio_limit": DISTANCE_LIMIT,
    }


def to_json(report: dict) -> str:
    r"""`report` as JSON that any reader accepts: what is not finite becomes null.

    >>> to_json({"ratio": float("nan")})
    '{\n  "ratio": null\n}'
    """

    def clean(value):
        if isinstance(value, dict):
            return {key: clean(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [clean(item) for item in value]
        if isinstance(value, float) and not math.isfinite(value):
            return None
        return value

    return json.dumps(clean(report), indent=2)
