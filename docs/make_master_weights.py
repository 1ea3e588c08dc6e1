"""Trains a small network in fp32, in bf16, and in bf16 with master weights, and draws the three losses.

A network with random weights teaches another of the same shape; docs/pictures/master_weights.png shows
the loss on inputs that were not trained on. Run it from anywhere; it needs matplotlib and takes ten seconds.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import nn

import fusedlr
from fusedlr.schedule.curves import COLOURS, DPI, HEIGHT, WIDTH

PICTURE = Path(__file__).resolve().parent / "pictures" / "master_weights.png"
UPDATES, WARMUP, LR, BETWEEN = 3000, 150, 2e-4, 50
# the first is drawn thick, because the second lies on it
RUNS = {
    "fp32": (torch.float32, False),
    "bf16, master_weights=True": (torch.bfloat16, True),
    "bf16": (torch.bfloat16, False),
}


def network() -> nn.Module:
    """What teaches, and what is taught."""
    return nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 8))


def train(dtype: torch.dtype, master_weights: bool) -> list[float]:
    """The loss after every `BETWEEN` updates, on inputs that are not trained on."""
    torch.manual_seed(0)
    student, teacher, unseen = network().to(dtype), network().requires_grad_(False), torch.randn(2048, 32)
    optimizer = fusedlr.FusedAdamW(
        student.parameters(),
        lr=LR,
        schedule=fusedlr.cosine(WARMUP, UPDATES),
        weight_decay=0,
        master_weights=master_weights,
    )

    def loss(x: torch.Tensor) -> torch.Tensor:
        return nn.functional.mse_loss(student(x.to(dtype)).float(), teacher(x))

    losses = []
    for k in range(1, UPDATES + 1):
        loss(torch.randn(64, 32)).backward()
        optimizer.step()
        optimizer.zero_grad()
        if k % BETWEEN == 0:
            with torch.no_grad():
                losses.append(loss(unseen).item())
    return losses


def main() -> None:
    # one is faster for matrices as small as these
    torch.set_num_threads(1)
    figure = Figure(figsize=(WIDTH, HEIGHT), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for (name, run), colour, width in zip(RUNS.items(), COLOURS, (5.0, 1.5, 1.5), strict=False):
        losses = train(*run)
        print(f"{name}: {losses[-1]:.4g} at the end")
        axes.plot(range(BETWEEN, UPDATES + 1, BETWEEN), losses, color=colour, linewidth=width, label=name)
    axes.set_yscale("log")
    axes.set_xlabel("updates")
    axes.set_ylabel("loss on unseen inputs")
    axes.set_title(f"The same run in three ways, peak rate {LR:g}")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize="small")
    figure.savefig(PICTURE)


if __name__ == "__main__":
    sys.exit(main())
