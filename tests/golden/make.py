"""Writes schedules.json: the values of transformers' own schedules, which every spelling must keep giving.

    python tests/golden/make.py

The file is data: it is made again only for a new schedule or a new meaning in transformers, and the
difference is then read before it is committed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("schedules.json")
LR = 2e-4

# name in transformers, num_warmup_steps, num_training_steps, its own arguments
CASES: list[tuple[str, int, int | None, dict[str, Any]]] = [
    ("constant", 0, None, {}),
    ("constant_with_warmup", 10, 40, {}),
    ("constant_with_warmup", 0, 5, {}),
    *[("linear", w, t, {}) for w, t in ((0, 20), (5, 40), (5, 5), (8, 5), (1, 1), (0, 1), (200, 4000))],
    *[
        ("cosine", w, t, {})
        for w, t in ((0, 20), (5, 40), (5, 5), (8, 5), (0, 1), (200, 4000), (10**5, 10**7))
    ],
    *[("cosine", 4, 50, {"num_cycles": c}) for c in (1.0, 1.5, 3.0, 0.4, 2.7)],
    *[("cosine_with_restarts", 6, 90, {"num_cycles": c}) for c in (1, 2, 3, 7, 12)],
    *[("cosine_with_restarts", 10, 10 + 10 * c, {"num_cycles": c}) for c in (5, 11, 13, 17, 19, 20, 21)],
    ("cosine_with_restarts", 5, 5, {"num_cycles": 2}),
    ("cosine_with_restarts", 0, 4, {"num_cycles": 21}),
    ("polynomial", 5, 40, {}),
    ("polynomial", 5, 40, {"power": 2.0, "lr_end": 1e-5}),
    ("polynomial", 0, 30, {"power": 0.5, "lr_end": 0.0}),
    ("polynomial", 3, 60, {"power": 3.7, "lr_end": 1e-6}),
    ("polynomial", 5, 5, {}),
    ("polynomial", 0, 1, {"power": 2.0}),
    ("inverse_sqrt", 10, 200, {}),
    ("inverse_sqrt", 0, 200, {}),
    ("inverse_sqrt", 20, 200, {"timescale": 3}),
    ("cosine_with_min_lr", 5, 40, {"min_lr": 1e-5}),
    ("cosine_with_min_lr", 5, 40, {"min_lr_rate": 0.1}),
    ("cosine_with_min_lr", 0, 40, {"min_lr_rate": 0.25, "num_cycles": 1.5}),
    ("cosine_with_min_lr", 9, 5, {"min_lr_rate": 0.1}),
    ("cosine_warmup_with_min_lr", 5, 40, {"min_lr": 1e-5}),
    ("cosine_warmup_with_min_lr", 5, 40, {"min_lr_rate": 0.1, "warmup_lr_rate": 0.05}),
    ("cosine_warmup_with_min_lr", 5, 40, {"min_lr_rate": 0.1, "num_cycles": 1.5}),
    ("cosine_warmup_with_min_lr", 1, 5, {"min_lr_rate": 0.1, "warmup_lr_rate": 0.1}),
    ("cosine_warmup_with_min_lr", 0, 5, {"min_lr_rate": 0.1}),
    ("cosine_warmup_with_min_lr", 5, 5, {"min_lr_rate": 0.1}),
    ("cosine_warmup_with_min_lr", 0, 1, {"min_lr_rate": 0.1}),
    *[
        (
            "warmup_stable_decay",
            8,
            50,
            {"num_decay_steps": 15, "warmup_type": rise, "decay_type": fall, "min_lr_ratio": ratio},
        )
        for rise in ("linear", "cosine", "1-sqrt")
        for fall in ("linear", "cosine", "1-sqrt")
        for ratio in (0.0, 0.1)
    ],
    ("warmup_stable_decay", 5, None, {"num_decay_steps": 10, "num_stable_steps": 7, "num_cycles": 1.5}),
    ("warmup_stable_decay", 0, 20, {"num_decay_steps": 20}),
    ("warmup_stable_decay", 10, 20, {"num_decay_steps": 10, "min_lr_ratio": 0.3}),
]


def steps(warmup: int, total: int | None) -> list[int]:
    """Every update of a short run; of a long one its edges, the edges of warm-up and a few between."""
    total = total or 60
    if total <= 100:
        return list(range(total))
    edges = [edge + d for edge in (0, warmup, total) for d in (-2, -1, 0, 1, 2)]
    return sorted({k for k in (*edges, *range(0, total, total // 20)) if 0 <= k < total})


def values(
    name: str, warmup: int, total: int | None, arguments: dict[str, Any], ks: list[int]
) -> list[float]:
    """Ratios of the peak, as transformers computes them."""
    import torch
    from transformers import get_scheduler

    optimizer = torch.optim.AdamW([torch.zeros(1)], lr=LR)
    scheduler = get_scheduler(name, optimizer, warmup, total, scheduler_specific_kwargs=arguments)
    return [float(scheduler.lr_lambdas[0](k)) for k in ks]


def make() -> dict[str, Any]:
    """What the file holds."""
    import transformers

    rows = []
    for name, warmup, total, arguments in CASES:
        ks = steps(warmup, total)
        rows.append(
            {
                "name": name,
                "num_warmup_steps": warmup,
                "num_training_steps": total,
                "lr": LR,
                "arguments": arguments,
                "steps": ks,
                # fp64 to the last bit
                "values": [value.hex() for value in values(name, warmup, total, arguments, ks)],
            }
        )
    return {"transformers": transformers.__version__, "schedules": rows}


def main() -> None:
    golden = make()
    rows = ",\n".join("  " + json.dumps(row) for row in golden["schedules"])
    head = json.dumps(golden["transformers"])
    FILE.write_text(f'{{\n "transformers": {head},\n "schedules": [\n{rows}\n ]\n}}\n')


if __name__ == "__main__":
    main()
