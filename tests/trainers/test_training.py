"""A plain LoRA loop on every backend, against torch's kernels and against a warm-up that is off by one."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader
from trainer_kit import (
    CLIP,
    OURS,
    STEPS,
    Outcome,
    assert_as_stock,
    examples,
    lora_model,
    optimizers,
    trainable,
    weights_of,
)


def train(kind: str, backend: str) -> Outcome:
    """One run; the data and the dropout are the same for every kind."""
    model = lora_model(target_modules="all-linear")
    # all parameters, as people pass them: the frozen base costs nothing
    optimizer, scheduler = optimizers(kind, model.parameters(), max_grad_norm=CLIP, backend=backend)
    result = Outcome(torch.empty(0), [])
    # one batch again and again, so that the loss falls
    (batch,) = DataLoader(examples(4), batch_size=4)
    for k in range(STEPS):
        torch.manual_seed(100 + k)
        loss = model(**batch).loss
        loss.backward()
        result.losses.append(loss.item())
        if kind != OURS:
            torch.nn.utils.clip_grad_norm_(trainable(model), CLIP)
        optimizer.step()
        result.rates.append(scheduler.get_last_lr()[0])
        if kind != OURS:
            scheduler.step()
        model.zero_grad()
    result.weights = weights_of(model)
    # any two runs that learn nothing are close
    assert result.losses[0] - result.losses[-1] > 0.05
    return result


def test_a_lora_run_is_as_close_to_stock_as_stock_is_to_itself(device, backend):
    if device != "cpu":
        pytest.skip("a run on the CPU says it all")
    assert_as_stock(lambda kind: train(kind, backend))
