"""Three schedules at a rate that is too high: what warm-up and decay are for, seen on this machine.

The same LoRA run as the comparison's, with fusedlr. Left out where it would take the demo past its time.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from fusedlr.console import aligned
from fusedlr.demo.base import Base
from fusedlr.demo.finetune import Result, Run, finetune
from fusedlr.demo.settings import Settings
from fusedlr.demo.tokens import Data

# four times the rate of the comparison: without warm-up the first updates throw the model off
PEAK = 2e-2
SCHEDULES = ("constant", "constant_with_warmup", "cosine")
BUDGET = 225  # seconds of the demo's four minutes; the rest goes to loading libraries and drawing


def left_out(settings: Settings, spent: float, run_seconds: float) -> str | None:
    """Why there is no panel, or None if there is time for it.

    `spent` is the demo's time so far, `run_seconds` what one LoRA run took.
    """
    if not settings.panel:
        return "schedules at a high rate: left out (--panel runs them)"
    expected = spent + len(SCHEDULES) * run_seconds
    # on a GPU sizes and times are others, and somebody who asks for more steps has the time
    if expected > BUDGET:
        return f"schedules at a high rate: left out, the demo would take {expected:.0f} s with them"
    return None


def run(
    settings: Settings, data: Data, base: Base, folder: Path, train: Callable[..., Any] = finetune
) -> Any:
    """One result per schedule, by name."""
    results: dict[str, Result] = {}
    for name in SCHEDULES:
        warmup = 0 if name == "constant" else settings.warmup
        changed = replace(settings, schedule=name, lr=PEAK, warmup=warmup)
        results[name] = train(Run(name), changed, data, base, folder, False)
    return results


def table(results: dict[str, Result]) -> str:
    """The comparison in words and columns."""
    rows = [("", "highest training loss", "held-out loss on code", "on prose")]
    for name, result in results.items():
        rows.append((name, f"{max(result.losses):.3f}", f"{result.code:.4f}", f"{result.prose:.4f}"))
    return "\n".join(
        [
            f"three schedules at a high peak rate, {PEAK:g}:",
            *aligned(rows),
            # small, seed 0, two cores of a Xeon, 2026-11: 5.113, with warm-up 5.122, cosine 5.182
            "one seed each, at a rate chosen to show it: at 0.005 the order on code was the other way round,",
            "constant 5.11 and cosine 5.18, because in so short a run a decay costs updates",
        ]
    )
