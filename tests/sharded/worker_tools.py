"""For test_tools.py: FSDP 2 by accelerate and by the Trainer on a LoRA model, with our optimizer and stock's.

accelerate shards on accelerators alone, so it is told that the processes are such; what it then does with the
model and the optimizer is its own.
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from torch.distributed.tensor import DTensor

import fusedlr
from sharded.processes import main

STEPS, LIMIT, PEAK = 6, 0.2, 1e-2


def sharding(made: Any) -> Any:
    """An Accelerator, told that it shards."""
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.utils import DistributedType

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        cpu_ram_efficient_loading=False,
    )
    made.state.__dict__.update(distributed_type=DistributedType.FSDP, fsdp_plugin=plugin)
    return made


def lora_model() -> torch.nn.Module:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "vocab_size": 32, "max_position_embeddings": 16}
    config = LlamaConfig(num_hidden_layers=2, num_attention_heads=2, use_cache=False, **sizes)
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights="gaussian")
    return get_peft_model(LlamaForCausalLM(config), lora)


def train(kind: str, processes: int) -> dict[str, Any]:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from transformers import get_linear_schedule_with_warmup

    AcceleratorState._reset_state(True)
    parallel, model = sharding(Accelerator(cpu=True)), lora_model()
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer: Any
    scheduler: Any
    if kind == "ours":
        schedule = fusedlr.linear(warmup_steps=2, total_steps=10)
        optimizer = fusedlr.FusedAdamW(params, lr=PEAK, max_grad_norm=LIMIT, schedule=schedule)
        scheduler = optimizer.scheduler
    else:
        optimizer = torch.optim.AdamW(params, lr=PEAK)
        # accelerate steps a scheduler once per process
        scheduler = get_linear_schedule_with_warmup(optimizer, 2 * processes, 10 * processes)
    model, optimizer, scheduler = parallel.prepare(model, optimizer, scheduler)
    run: dict[str, Any] = {"losses": [], "norms": [], "rates": []}
    for k in range(STEPS):
        torch.manual_seed(10 * k + torch.distributed.get_rank())
        ids = torch.randint(0, 32, (2, 8))
        loss = model(input_ids=ids, labels=ids).loss
        parallel.backward(loss)
        if kind == "stock":
            run["norms"].append(float(parallel.clip_grad_norm_(model.parameters(), LIMIT)))
        run["rates"].append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        run["losses"].append(loss.item())
        if kind == "ours":
            run["norms"].append(optimizer.optimizer.last_metrics()["grad_norm"])
    trained = [p for p in model.parameters() if p.requires_grad]
    # accelerate has put parts in the place of the optimizer's parameters
    assert all(isinstance(p, DTensor) for p in trained)
    assert {id(p) for p in trained} == {id(p) for p in optimizer.param_groups[0]["params"]}
    run["weights"] = torch.cat([p.full_tensor().detach().flatten() for p in trained])  # type: ignore[attr-defined]
    return run


def train_by_trainer(kind: str) -> list[tuple[float, float, float]]:
    """Loss, norm and rate of every update, as the Trainer logs them."""
    from accelerate.state import AcceleratorState
    from transformers import Trainer, TrainingArguments

    from fusedlr.hf import FusedLRTrainer

    AcceleratorState._reset_state(True)
    seeds = [torch.Generator().manual_seed(i) for i in range(32)]
    rows = [{"input_ids": torch.randint(0, 32, (8,), generator=g), "labels": torch.arange(8)} for g in seeds]
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder,
            max_steps=4,
            per_device_train_batch_size=2,
            learning_rate=PEAK,
            max_grad_norm=LIMIT,
            warmup_steps=2,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            logging_steps=1,
            save_strategy="no",
            dataloader_pin_memory=False,
        )
        trainer = (FusedLRTrainer if kind == "ours" else Trainer)(lora_model(), args, train_dataset=rows)
        sharding(trainer.accelerator)
        trainer.is_fsdp_enabled = True
        trainer.train()
    optimizer = trainer.optimizer.optimizer
    assert isinstance(optimizer, fusedlr.FusedAdamW) == (kind == "ours")
    assert all(isinstance(p, DTensor) for p in optimizer.param_groups[0]["params"])
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return [(entry["loss"], entry["grad_norm"], entry["learning_rate"]) for entry in logs]


def work(rank: int, processes: int, arguments: list[str]) -> None:
    ours, stock = train("ours", processes), train("stock", processes)
    assert min(stock["norms"]) < LIMIT < max(stock["norms"]), stock["norms"]
    for name, tolerance in (("losses", 1e-5), ("norms", 1e-5), ("rates", 1e-12)):
        mine, theirs = (torch.tensor(run[name], dtype=torch.float64) for run in (ours, stock))
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=0)
    torch.testing.assert_close(ours["weights"], stock["weights"], rtol=1e-4, atol=1e-6)
    logged, expected = (torch.tensor(train_by_trainer(kind)) for kind in ("ours", "stock"))
    assert expected[:, 1].min() < LIMIT < expected[:, 1].max(), expected
    torch.testing.assert_close(logged, expected, rtol=1e-5, atol=0)


if __name__ == "__main__":
    main(work)
