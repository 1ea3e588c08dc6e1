"""For the tests of trainers: a tiny LoRA model with data, stock optimizers, and the comparison they all make.

"As stock" means three things of the same run: the rates are equal, the weights are about as far from torch's
foreach step as torch's fused step is, and a run with one more update of warm-up is far away.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from tolerances import LOGGED_RATE, OFF_BY_ONE_RATIO, STOCK_DISTANCE_RATIO
from torch import Tensor, nn

import fusedlr

VOCABULARY, LENGTH, LR = 64, 16, 1e-2
# long enough that what training makes of a last bit outweighs which bits two steps have in common; gradients
# have norms of 0.2 to 0.5
STEPS, WARMUP, CLIP = 20, 4, 0.25
# kinds of run; `late` is stock with one more update of warm-up
OURS, FUSED, FOREACH, LATE = "ours", "fused", "foreach", "late"


@dataclass
class Outcome:
    """What a run leaves behind, one entry per logged update."""

    weights: Tensor
    rates: list[float]
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)


def tiny_llama(**options: Any) -> Any:
    """An untrained Llama of 21,000 parameters."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": LENGTH,
        "bos_token_id": None,
        "eos_token_id": 0,
        "use_cache": False,
    }
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**settings, **options}))


def lora_model(**options: Any) -> Any:
    """The same with LoRA adapters, r=16, alpha=32, dropout=0.05."""
    peft = pytest.importorskip("peft")
    settings = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "target_modules": ["q_proj", "v_proj"]}
    torch.manual_seed(0)
    return peft.get_peft_model(
        tiny_llama(), peft.LoraConfig(task_type="CAUSAL_LM", **{**settings, **options})
    )


def examples(count: int) -> list[dict[str, Tensor]]:
    """Token rows with a pattern that can be learned: every second token repeats the one before."""
    rows = torch.randint(1, VOCABULARY, (count, LENGTH), generator=torch.Generator().manual_seed(1))
    rows[:, 1::2] = rows[:, ::2]
    return [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in rows]


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """What an optimizer is given."""
    return [p for p in model.parameters() if p.requires_grad]


def weights_of(model: nn.Module) -> Tensor:
    """All trained weights in one vector of fp64."""
    return torch.cat([p.detach().flatten().double() for p in trainable(model)])


def logged(trainer: Any) -> Outcome:
    """What a run of the Hugging Face Trainer leaves behind."""
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return Outcome(
        weights_of(trainer.model),
        rates=[entry["learning_rate"] for entry in logs],
        losses=[entry["loss"] for entry in logs],
        # which older versions log only where they clip
        norms=[entry["grad_norm"] for entry in logs if "grad_norm" in entry],
    )


def stock_adamw(params: Any, kind: str, **options: Any) -> torch.optim.AdamW:
    """torch's AdamW with the kernel that `kind` asks for."""
    kernel = {"fused": True} if kind == FUSED else {"foreach": True}
    return torch.optim.AdamW(params, **{"lr": LR, **options, **kernel})


def optimizers(
    kind: str, params: Any, warmup: int = WARMUP, total: int = STEPS, per_update: int = 1, **ours: Any
) -> tuple[Any, Any]:
    """Optimizer and cosine schedule of a loop; stock's scheduler is stepped `per_update` times an update.

    `ours` are options of our optimizer: where it clips by itself, the loop clips for stock.
    """
    if kind == OURS:
        schedule = fusedlr.cosine(warmup_steps=warmup, total_steps=total)
        optimizer = fusedlr.FusedAdamW(params, lr=LR, schedule=schedule, **ours)
        return optimizer, optimizer.scheduler
    transformers = pytest.importorskip("transformers")
    stock = stock_adamw(params, kind)
    steps = [(warmup + (kind == LATE)) * per_update, total * per_update]
    return stock, transformers.get_scheduler("cosine", stock, *steps)


def distance(a: Outcome, b: Outcome) -> float:
    """Mean distance of a weight: the largest is that of a few weights that Adam makes chaotic."""
    return (a.weights - b.weights).abs().mean().item()


def assert_rates(rates: Sequence[float], expected: Sequence[float]) -> None:
    """Equal to the last bits, zeros exactly."""
    assert len(rates) == len(expected) > 0
    assert list(rates) == pytest.approx(list(expected), rel=LOGGED_RATE, abs=0)


def assert_as_stock(
    train: Callable[[str], Outcome], kinds: Sequence[str] = (OURS, FUSED, FOREACH, LATE)
) -> None:
    """Run every kind and compare."""
    runs = {kind: train(kind) for kind in kinds}
    ours, fused, foreach = (runs[kind] for kind in (OURS, FUSED, FOREACH))
    assert_rates(ours.rates, fused.rates)
    assert ours.losses == pytest.approx(foreach.losses, rel=1e-4)
    assert ours.norms == pytest.approx(foreach.norms, rel=1e-3)
    far = distance(ours, foreach)
    assert far <= STOCK_DISTANCE_RATIO * distance(fused, foreach)
    print(f"ours {far:.3g}, stock fused {distance(fused, foreach):.3g}")
    if LATE in runs:
        assert runs[LATE].rates != ours.rates
        assert distance(runs[LATE], foreach) >= OFF_BY_ONE_RATIO * far
        print(f"off by one {distance(runs[LATE], foreach):.3g}")
