"""Tokens per second of a LoRA run with the Hugging Face Trainer, on its own optimizer and on fusedlr.

The base model is built from a configuration with random weights: speed does not depend on what they are.
"""

from __future__ import annotations

import importlib.util
import statistics
import tempfile
import time
from dataclasses import dataclass
from typing import Any

import torch

import fusedlr

NEEDED = ("transformers", "peft", "accelerate")
LR, WEIGHT_DECAY, MAX_NORM, WARMUP = 1e-4, 0.01, 1.0, 5


@dataclass(frozen=True)
class Size:
    """A run: the model, as Llama's configuration names it, and what is trained on."""

    hidden: int
    layers: int
    heads: int
    intermediate: int
    vocabulary: int
    batch: int
    tokens: int  # per sequence
    steps: int
    uncounted: int  # first steps, in which memory is allocated and kernels are compiled
    dtype: torch.dtype


# 0.5 B parameters (Qwen2.5-0.5B's layers and width, a smaller vocabulary); short sequences and a small batch,
# where the optimizer's share is largest; 168 linears, 336 tensors
GPU = Size(896, 24, 14, 4864, 65536, 4, 64, 40, 10, torch.bfloat16)
REDUCED = Size(32, 2, 2, 64, 64, 2, 8, 4, 1, torch.float32)


def missing() -> str | None:
    """Why the run cannot be made here, or None."""
    names = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    return f"{', '.join(names)} not installed" if names else None


def run(device: str, size: Size, pairs: int) -> dict[str, Any]:
    """`pairs` runs of each, in turns, stock first; tokens per second and losses of all."""
    rates: dict[str, list[float]] = {"stock": [], "fusedlr": []}
    losses: dict[str, float] = {}
    parameters = tensors = 0
    for _ in range(pairs):
        for name in rates:
            model = make_model(size, device)
            trained = [p for p in model.parameters() if p.requires_grad]
            parameters, tensors = sum(p.numel() for p in model.parameters()), len(trained)
            rate, losses[name] = train(name, model, size, device)
            rates[name].append(rate)
            del model, trained
    medians = {name: statistics.median(values) for name, values in rates.items()}
    # the same batches from the same weights; 16-bit training amplifies last bits
    apart = abs(losses["stock"] - losses["fusedlr"]) / abs(losses["stock"])
    return {
        "passed": apart < 0.01,
        "parameters": parameters,
        "trained tensors": tensors,
        "tokens per second": rates,
        "median": medians,
        "ratio": medians["fusedlr"] / medians["stock"],
        "mean loss": losses,
    }


def make_model(size: Size, device: str) -> Any:
    """The model with adapters on all linears of its layers, the same at every call."""
    import peft
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        intermediate_size=size.intermediate,
        vocab_size=size.vocabulary,
        max_position_embeddings=max(64, size.tokens),
        use_cache=False,
        pad_token_id=0,
    )
    # on the device at once: half a billion random numbers take long on a CPU
    with torch.device(device):
        base = transformers.LlamaForCausalLM(config).to(size.dtype)
    lora = peft.LoraConfig(r=8, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    return peft.get_peft_model(base, lora).to(device)


def train(name: str, model: Any, size: Size, device: str) -> tuple[float, float]:
    """Tokens per second after the first steps, and the mean loss of all."""
    import transformers

    class Clock(transformers.TrainerCallback):
        begin = end = 0.0

        def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            if state.global_step in (size.uncounted, size.steps):
                if device == "cuda":
                    torch.cuda.synchronize()
                self.begin, self.end = self.end, time.perf_counter()

    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(size.vocabulary, (size.batch * size.steps, size.tokens), generator=generator)
    data = [{"input_ids": row, "labels": row} for row in ids]
    clock, kept = Clock(), {}
    schedule = fusedlr.cosine(WARMUP, max(size.steps, WARMUP + 1))
    if name == "fusedlr":
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = fusedlr.FusedAdamW(
            trained, lr=LR, weight_decay=WEIGHT_DECAY, max_grad_norm=MAX_NORM, schedule=schedule
        )
        kept["optimizers"] = (optimizer, optimizer.scheduler)
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=size.batch,
            max_steps=size.steps,
            learning_rate=LR,
            weight_decay=WEIGHT_DECAY,
            adam_beta2=0.999,
            optim="adamw_torch_fused",
            lr_scheduler_type="cosine",
            warmup_steps=WARMUP,
            max_grad_norm=0.0 if name == "fusedlr" else MAX_NORM,
            logging_strategy="no",
            # else the host waits for every loss
            logging_nan_inf_filter=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=device == "cpu",
            seed=0,
        )
        trainer = transformers.Trainer(
            model=model,
            args=arguments,
            train_dataset=data,
            data_collator=transformers.default_data_collator,
            callbacks=[clock],
            **kept,
        )
        # it prints its summary past all settings
        trainer.remove_callback(transformers.PrinterCallback)
        loss = trainer.train().training_loss
    tokens = size.batch * size.tokens * (size.steps - size.uncounted)
    return tokens / (clock.end - clock.begin), loss
