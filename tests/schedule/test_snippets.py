"""The lines to paste give the schedule: they run, and every update gets its rate."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fusedlr
from fusedlr.schedule import spec
from fusedlr.schedule.snippets import snippets

PEAK = 3e-4
CALLS = [
    "constant()",
    "constant_with_warmup(warmup_steps=8)",
    "constant_with_warmup(warmup_steps=0.1, total_steps=60)",
    "linear(warmup_steps=8, total_steps=60)",
    "linear(total_steps=60, min_lr_ratio=0.0)",
    "linear(warmup_steps=8, total_steps=60, min_lr_ratio=0.1, warmup_from=0.2)",
    "cosine(warmup_steps=0.1, total_steps=60)",
    "cosine(warmup_steps=60, total_steps=60)",
    "cosine(warmup_steps=8, total_steps=60, num_cycles=1.5)",
    "cosine(warmup_steps=8, total_steps=60, min_lr=2e-5)",
    "cosine_with_restarts(warmup_steps=8, total_steps=60, num_cycles=3)",
    "cosine_with_restarts(warmup_steps=8, total_steps=60, num_cycles=3, cycle_mult=2.0, min_lr=1e-5)",
    "polynomial(warmup_steps=8, total_steps=60, power=2.0)",
    "polynomial(warmup_steps=8, total_steps=60, power=2.0, lr_end=0.0)",
    "inverse_sqrt(warmup_steps=8, timescale=20, total_steps=60)",
    "cosine_with_min_lr(warmup_steps=8, total_steps=60, min_lr_ratio=0.1)",
    "cosine_warmup_with_min_lr(warmup_steps=8, total_steps=60, min_lr=2e-5)",
    "warmup_stable_decay(warmup_steps=8, decay_steps=12, total_steps=60, decay_type='1-sqrt')",
    "warmup_stable_decay(warmup_steps=8, decay_steps=12, stable_steps=40, min_lr_ratio=0.1)",
    "table([1.0, 0.5, 0.25])",
]
# what torch's warm-up begins with in place of 0, and the rounding of its recurrences
OF_TORCH = 2e-9 * PEAK


def pasted(text: str, title: str, **names: Any) -> tuple[fusedlr.Schedule, dict[str, Any]]:
    one = spec.parse(text)
    schedule = one.build()
    exec(snippets(one, schedule, PEAK)[title], names)
    return schedule, names


def rates(scheduler: Any, updates: int) -> list[float]:
    found = []
    for _ in range(updates):
        found.append(scheduler.optimizer.param_groups[0]["lr"])
        scheduler.optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize("text", CALLS)
def test_fusedlr(text):
    schedule, names = pasted(text, "fusedlr", model=torch.nn.Linear(1, 1))
    group = names["optimizer"].param_groups[0]
    assert group["schedule"] == schedule.resolve(PEAK) and group["initial_lr"] == PEAK


@pytest.mark.parametrize("text", CALLS)
def test_torch(text):
    schedule, names = pasted(text, "torch", model=torch.nn.Linear(1, 1))
    updates = schedule.total_steps or 60
    expected = [schedule.lr_at(k, PEAK) for k in range(updates)]
    assert rates(names["scheduler"], updates) == pytest.approx(expected, abs=OF_TORCH, rel=1e-12)


@pytest.mark.parametrize("text", CALLS)
def test_transformers(text, tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    model, handed = torch.nn.Linear(1, 1), []

    def trainer(model: Any, args: Any, optimizers: Any) -> None:
        handed.append(optimizers)

    monkeypatch.setattr(transformers, "Trainer", trainer)
    schedule, names = pasted(text, "TrainingArguments", model=model)
    args = names["args"]
    updates = schedule.total_steps or 60
    assert args.learning_rate == PEAK and args.max_steps in (updates, -1)
    if handed:
        ((optimizer, scheduler),) = handed
        assert scheduler is optimizer.scheduler and optimizer.param_groups[0]["schedule"] is not None
        return
    scheduler = transformers.get_scheduler(
        args.lr_scheduler_type,
        torch.optim.AdamW(model.parameters(), lr=PEAK),
        args.get_warmup_steps(updates),
        updates,
        scheduler_specific_kwargs=args.lr_scheduler_kwargs,
    )
    expected = [schedule.lr_at(k, PEAK) for k in range(updates)]
    assert rates(scheduler, updates) == pytest.approx(expected, abs=1e-12 * PEAK)


def test_what_transformers_has_is_said_in_its_arguments():
    one = spec.parse("cosine(warmup_steps=8, total_steps=60, min_lr_ratio=0.1)")
    code = snippets(one, one.build(), PEAK)["TrainingArguments"]
    assert "'cosine_with_min_lr'" in code and "{'min_lr_rate': 0.1}" in code
