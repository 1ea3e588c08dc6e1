"""The base model: a small Llama trained from scratch on the prose, with fusedlr; cached.

The fine-tuning runs all start from it. `held_out_loss` is how every loss in the report's table is measured.
"""

import json
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusedlr.demo.files import cache_entry, new_entry
from fusedlr.demo.progress import bar
from fusedlr.demo.settings import Settings
from fusedlr.demo.tokens import Data

# a tenth of the run, the usual share; beta2 for a run too short for 0.999's memory of a thousand steps
WARMUP_RATIO = 0.1
BETAS = (0.9, 0.95)
WEIGHT_DECAY = 0.01


@dataclass
class Base:
    """The base model's weights on the CPU, and its held-out losses in nats per token."""

    weights: dict
    prose_untrained: float  # before training
    prose: float
    code: float
    cached: bool


def build_model(settings: Settings) -> Any:
    """An untrained Llama of the chosen size, on the chosen device."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    size = settings.size
    torch.manual_seed(settings.seed)
    config = LlamaConfig(
        hidden_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        intermediate_size=size.intermediate,
        vocab_size=size.vocabulary,
        max_position_embeddings=size.sequence,
        tie_word_embeddings=True,
        # END is 0 and texts are never padded
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=None,
        use_cache=False,
    )
    model: Any = LlamaForCausalLM(config)
    return model.to(settings.device)


def held_out_loss(model: Any, examples: Any, settings: Settings, label: str) -> float:
    """Mean next-token cross entropy, in nats, of evenly spaced held-out `examples`; dropout is off."""
    import torch

    chosen = examples[:: max(1, len(examples) // settings.size.evaluation)][: settings.size.evaluation]
    batch = settings.size.batch * 2
    training = model.training
    model.eval()
    total = 0.0
    with torch.inference_mode():
        for start in bar(range(0, len(chosen), batch), label=label, keep=False):
            tokens = to_tokens(chosen[start : start + batch], settings.device)
            total += model(input_ids=tokens, labels=tokens).loss.item() * len(tokens)
    model.train(training)
    return total / len(chosen)


def to_tokens(rows, device):
    """Rows of a uint16 array as an int64 tensor on `device`."""
    import torch

    return torch.from_numpy(rows.astype("int64")).to(device)


def prepare_base(settings: Settings, data: Data) -> Base:
    """Train the base model on the prose, or take it from the cache."""
    size = settings.size
    entry = cache_entry(
        settings.cache,
        "base",
        data=data.folder.name,
        size=settings.size_name,
        model=[size.hidden, size.layers, size.heads, size.intermediate, size.vocabulary, size.sequence],
        training=[settings.base_steps, size.base_lr, size.batch, WARMUP_RATIO, *BETAS, WEIGHT_DECAY],
        evaluation=size.evaluation,
        seed=settings.seed,
        device=settings.device,
        python=platform.python_version(),
    )
    found = None if settings.fresh else _load(entry)
    return found or _train(settings, data, entry)


def _train(settings: Settings, data: Data, entry: Path) -> Base:
    import torch

    import fusedlr

    model = build_model(settings)
    prose_untrained = held_out_loss(model, data.blocks["prose_held_out"], settings, "untrained, prose")
    optimizer = fusedlr.FusedAdamW(
        model.parameters(),
        lr=settings.size.base_lr,
        betas=BETAS,
        weight_decay=WEIGHT_DECAY,
        max_grad_norm=1.0,
        schedule=fusedlr.cosine(
            warmup_steps=int(settings.base_steps * WARMUP_RATIO),
            total_steps=settings.base_steps,
            min_lr_ratio=0.05,
        ),
    )
    examples = data.blocks["prose_train"]
    # its own generator: what the model draws does not change the order of the data
    generator = torch.Generator().manual_seed(settings.seed)
    model.train()
    with bar(range(settings.base_steps), label="training the base") as progress:
        for step in progress:
            picked = torch.randint(len(examples), (settings.size.batch,), generator=generator)
            tokens = to_tokens(examples[picked.numpy()], settings.device)
            loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if step % 25 == 0:
                progress.set_postfix_str(f"loss {loss.item():.2f}", refresh=False)
    prose = held_out_loss(model, data.blocks["prose_held_out"], settings, "base, prose")
    code = held_out_loss(model, data.blocks["code_held_out"], settings, "base, code")
    weights = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    base = Base(weights, prose_untrained, prose, code, cached=False)
    _save(entry, base)
    return base


def _losses(base: Base) -> dict:
    return {"prose_untrained": base.prose_untrained, "prose": base.prose, "code": base.code}


def _save(entry: Path, base: Base) -> None:
    import torch

    with new_entry(entry) as folder:
        torch.save(base.weights, folder / "weights.pt")
        (folder / "losses.json").write_text(json.dumps(_losses(base)))


def _load(entry: Path) -> Base | None:
    """The base model in `entry`, None where it is missing or damaged."""
    import pickle

    import torch

    try:
        weights = torch.load(entry / "weights.pt", map_location="cpu", weights_only=True)
        losses = json.loads((entry / "losses.json").read_text())
        return Base(weights, **losses, cached=True)
    except (OSError, TypeError, ValueError, RuntimeError, EOFError, pickle.UnpicklingError):
        return None
