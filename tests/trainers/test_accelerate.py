"""Loops on accelerate: accumulation, several processes, checkpoints, loss scaling; against stock."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from sharded.processes import free_port
from trainer_kit import (
    FUSED,
    LR,
    OURS,
    Outcome,
    assert_as_stock,
    assert_rates,
    examples,
    lora_model,
    optimizers,
    trainable,
    weights_of,
)

import fusedlr

accelerate = pytest.importorskip("accelerate")
pytest.importorskip("peft")

HERE = Path(__file__).resolve().parent
STEPS, WARMUP = 8, 2


def test_a_loop_with_accumulation():
    worker = pytest.importorskip("worker_accelerate")
    assert_as_stock(lambda kind: worker.train(kind, processes=1))


@pytest.mark.slow
def test_a_loop_with_accumulation_in_four_processes(tmp_path):
    """Weights equal in all processes, rates counted in updates: nothing is stepped four times."""
    if not torch.distributed.is_gloo_available():
        pytest.skip("torch was built without gloo")
    output = tmp_path / "runs.pt"
    paths = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        [sys.executable, str(HERE / "worker_accelerate.py"), "4", str(output), str(free_port())],
        env={**os.environ, "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    runs = torch.load(output, weights_only=True)
    assert_as_stock(lambda kind: Outcome(**runs[kind]))


class Loop:
    """A loop in this process that can be saved and loaded, with a gradient scaler on the CPU if asked for."""

    def __init__(self, ours: bool, scaler: Any = None) -> None:
        self.accelerator = accelerate.Accelerator(cpu=True)
        # accelerate has one on a GPU alone
        self.accelerator.scaler = scaler
        model = lora_model(lora_dropout=0.0)
        optimizer, scheduler = optimizers(OURS if ours else FUSED, trainable(model), WARMUP, STEPS)
        self.model, self.optimizer, self.scheduler = self.accelerator.prepare(model, optimizer, scheduler)
        self.rates: list[float] = []

    def train(self, steps: range, bad: set[int] = frozenset()) -> None:  # type: ignore[assignment]
        rows = examples(STEPS)
        for k in steps:
            ids = rows[k]["input_ids"][None]
            self.accelerator.backward(self.model(input_ids=ids, labels=ids).loss)
            if k in bad:
                trainable(self.model)[0].grad.view(-1)[0] = torch.inf
            self.optimizer.step()
            self.rates.append(self.scheduler.get_last_lr()[0])
            self.scheduler.step()
            self.optimizer.zero_grad()


def test_a_saved_loop_continues_without_a_trace(tmp_path):
    whole = Loop(ours=True)
    whole.train(range(5))
    whole.accelerator.save_state(str(tmp_path))
    whole.train(range(5, STEPS))
    again = Loop(ours=True)
    again.accelerator.load_state(str(tmp_path))
    again.train(range(5, STEPS))
    assert torch.equal(weights_of(whole.model), weights_of(again.model))
    assert again.rates == whole.rates[5:]


def test_after_overflows_the_schedule_has_counted_the_updates_made_where_stock_drifts():
    bad, made = {1, 4}, STEPS - 2
    loops = {ours: Loop(ours, torch.amp.GradScaler("cpu", init_scale=1024.0)) for ours in (True, False)}
    for loop in loops.values():
        loop.train(range(STEPS), bad)
    schedule = fusedlr.cosine(warmup_steps=WARMUP, total_steps=STEPS)
    # update 1 and then update 3 are tried twice
    assert_rates(loops[True].rates, [schedule.lr_at(k, LR) for k in (0, 1, 1, 2, 3, 3, 4, 5)])
    fused = loops[True].optimizer.optimizer
    assert fused.last_metrics()["step"] == [made]
    assert {int(state["step"]) for state in fused.state.values()} == {made}
    stock = loops[False]
    assert {int(state["step"]) for state in stock.optimizer.state.values()} == {made}
    assert stock.scheduler.scheduler.last_epoch == STEPS
    assert stock.rates == pytest.approx([schedule.lr_at(k, LR) for k in range(STEPS)])
