"""A LoRA fine-tune with stock torch and with fusedlr, and what the difference between them is worth.

"Equal" is only said beside two measures of the same run: how far torch's fused and foreach steps are from
each other, and how far a run with one more update of warm-up is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tolerances import OFF_BY_ONE_RATIO, STOCK_DISTANCE_RATIO

import fusedlr

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

STEPS, WARMUP, LR, CLIP = 30, 4, 1e-2, 1.0


def tiny_model() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=64
    )
    adapters = peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.05, target_modules="all-linear")
    return peft.get_peft_model(transformers.LlamaForCausalLM(config), adapters)


def train(make: Callable[[Any], Callable[[], None]]) -> tuple[list[float], torch.Tensor]:
    """Losses and final adapter weights of one run; same data, same dropout."""
    model = tiny_model()
    step = make(model)
    losses = []
    generator = torch.Generator().manual_seed(1)
    for k in range(STEPS):
        ids = torch.randint(0, 64, (4, 16), generator=generator)
        # a pattern that can be learned
        ids[:, 1::2] = ids[:, ::2]
        torch.manual_seed(100 + k)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        losses.append(loss.item())
        step()
        model.zero_grad()
    return losses, torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])


def stock(warmup: int = WARMUP, **options: Any) -> Callable[[Any], Callable[[], None]]:
    def make(model: Any) -> Callable[[], None]:
        params = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(params, lr=LR, **options)
        scheduler = transformers.get_cosine_schedule_with_warmup(optimizer, warmup, STEPS)

        def step() -> None:
            torch.nn.utils.clip_grad_norm_(params, CLIP)
            optimizer.step()
            scheduler.step()

        return step

    return make


def ours(backend: str) -> Callable[[Any], Callable[[], None]]:
    def make(model: Any) -> Callable[[], None]:
        schedule = fusedlr.cosine(warmup_steps=WARMUP, total_steps=STEPS)
        # all parameters, as people pass them: the frozen base costs nothing
        optimizer = fusedlr.FusedAdamW(
            model.parameters(), lr=LR, schedule=schedule, max_grad_norm=CLIP, backend=backend
        )
        return optimizer.step

    return make


def test_a_lora_run_is_as_close_to_stock_as_stock_is_to_itself(device: str, backend: str) -> None:
    if device != "cpu":
        pytest.skip("a run on the CPU says it all")
    losses, weights = train(ours(backend))
    stock_losses, stock_weights = train(stock(foreach=True))
    _, fused_weights = train(stock(fused=True))
    _, wrong_weights = train(stock(warmup=WARMUP + 1, foreach=True))

    def far(a: torch.Tensor) -> float:
        return (a - stock_weights).abs().max().item()

    # the run must have learned something, or any two would be close
    assert losses[0] - losses[-1] > 0.05
    assert max(abs(a - b) for a, b in zip(losses, stock_losses, strict=True)) < 1e-4
    assert far(weights) <= STOCK_DISTANCE_RATIO * far(fused_weights)
    assert far(wrong_weights) >= OFF_BY_ONE_RATIO * far(weights)
    print(
        f"ours {far(weights):.3g}, stock fused {far(fused_weights):.3g}, off by one {far(wrong_weights):.3g}"
    )
