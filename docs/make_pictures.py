"""Draws docs/pictures/*.svg, the schedules of docs/schedules.md, with the package's own `lr_at`.

Run it from anywhere after a change to a schedule or to the drawing; it needs matplotlib.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import fusedlr
from fusedlr.schedule import curves
from fusedlr.schedule.readings import literal

FOLDER = Path(__file__).resolve().parent / "pictures"
# one run for all pictures, so that they can be compared: a tenth of it is warm-up
T, W = 4000, 400


@dataclass(frozen=True)
class Picture:
    """Curves under one title; `window` shows some of the steps only."""

    title: str
    curves: dict[str, fusedlr.Schedule]
    window: tuple[int, int] | None = None


READINGS = {
    "p = (k-W)/(T-W), as here and in transformers": fusedlr.cosine(W, T),
    "p = k/T over the whole run: jumps at W": fusedlr.table(literal(fusedlr.cosine(W, T)), T + 1),
}
PICTURES = {
    "constant": Picture(
        "constant and constant_with_warmup",
        {"constant()": fusedlr.constant(), "constant_with_warmup(400)": fusedlr.constant_with_warmup(W, T)},
    ),
    "linear": Picture(
        "linear",
        {
            "linear(400, 4000)": fusedlr.linear(W, T),
            "..., min_lr_ratio=0.1": fusedlr.linear(W, T, min_lr_ratio=0.1),
        },
    ),
    "cosine": Picture(
        "cosine",
        {
            "cosine(400, 4000)": fusedlr.cosine(W, T),
            "..., min_lr_ratio=0.1": fusedlr.cosine(W, T, min_lr_ratio=0.1),
            "..., num_cycles=1.5": fusedlr.cosine(W, T, num_cycles=1.5),
        },
    ),
    "restarts": Picture(
        "cosine_with_restarts(400, 4000, num_cycles=3)",
        {
            "cycles of equal length": fusedlr.cosine_with_restarts(W, T, num_cycles=3),
            "cycle_mult=2": fusedlr.cosine_with_restarts(W, T, num_cycles=3, cycle_mult=2),
        },
    ),
    "polynomial": Picture(
        "polynomial, lr_end=0",
        {f"power={power:g}": fusedlr.polynomial(W, T, power=power, lr_end=0.0) for power in (0.5, 1.0, 2.0)},
    ),
    "inverse_sqrt": Picture(
        "inverse_sqrt",
        {
            "inverse_sqrt(400)": fusedlr.inverse_sqrt(W, T),
            "..., timescale=2000": fusedlr.inverse_sqrt(W, T, timescale=2000),
        },
    ),
    "warmup_stable_decay": Picture(
        "warmup_stable_decay(400, 800, 4000)",
        {
            f"decay_type={kind!r}": fusedlr.warmup_stable_decay(W, 800, T, decay_type=kind)
            for kind in ("cosine", "linear", "1-sqrt")
        },
    ),
    "cooldown": Picture(
        "changed while the run goes on",
        {
            "cosine(400, 4000)": fusedlr.cosine(W, T),
            "....cooldown(k=1500, steps=500)": fusedlr.cosine(W, T).cooldown(1500, 500),
            "....rewarm(k=2600, steps=200)": fusedlr.cosine(W, T).cooldown(1500, 500).rewarm(2600, 200),
        },
    ),
    "first_steps": Picture(
        "the first updates, W = 5 of T = 50",
        {
            "cosine: update 0 gets 0": fusedlr.cosine(5, 50),
            "cosine(warmup_from=0.1)": fusedlr.cosine(5, 50, warmup_from=0.1),
            "cosine_warmup_with_min_lr: one step ahead": fusedlr.cosine_warmup_with_min_lr(
                5, 50, min_lr_ratio=0.1
            ),
        },
        (0, 9),
    ),
    "readings": Picture("cosine after warm-up, W = 400 of T = 4000: two readings", READINGS),
    "readings_at_w": Picture("the same at the end of warm-up", READINGS, (370, 460)),
}


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, picture in PICTURES.items():
        path = FOLDER / f"{name}.svg"
        curves.picture(picture.curves, None, path, title=picture.title, window=picture.window)
        print(path.name, f"{path.stat().st_size:,} bytes")


if __name__ == "__main__":
    sys.exit(main())
