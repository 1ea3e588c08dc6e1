"""For test_tools.py: tools that shard a LoRA model, with our optimizer and with stock's.

Arguments: the tool, and a folder. accelerate shards on accelerators alone, so it is told that the processes
are such; what it then does with the model and the optimizer is its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor

import fusedlr
from sharded.processes import main

STEPS, LIMIT, PEAK = 6, 0.2, 1e-2


def accelerator(**given: Any) -> Any:
    """An Accelerator that shards with FSDP 2, as on GPUs; `given` may be the Trainer's arguments of one."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    AcceleratorState._reset_state(True)
    plugin = given.pop("fsdp_plugin", None) or FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        cpu_ram_efficient_loading=False,
    )
    made = Accelerator(cpu=True, **given)
    # both, as accelerate does: it copies the first one's to the other again and again
    PartialState().distributed_type = made.state.distributed_type = DistributedType.FSDP
    made.state.fsdp_plugin = plugin
    return made


def lora_model() -> torch.nn.Module:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "vocab_size": 32, "max_position_embeddings": 16}
    config = LlamaConfig(num_hidden_layers=2, num_attention_heads=2, use_cache=False, **sizes)
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights="gaussian")
    return get_peft_model(LlamaForCausalLM(config), lora)


def in_a_loop(kind: str, processes: int, folder: Path) -> dict[str, Any]:
    from transformers import get_linear_schedule_with_warmup

    parallel, model = accelerator(), lora_model()
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
    run["weights"] = whole(model)
    return run


def in_the_trainer(
    kind: str, processes: int, folder: Path, form: str = "SHARDED_STATE_DICT", resume: Path | None = None
) -> dict[str, Any]:
    import transformers

    import fusedlr.hf

    transformers.trainer.Accelerator = accelerator
    args = transformers.TrainingArguments(
        str(folder / kind / form),
        max_steps=STEPS,
        warmup_steps=2,
        learning_rate=PEAK,
        max_grad_norm=LIMIT,
        per_device_train_batch_size=2,
        logging_steps=1,
        save_steps=STEPS // 2,
        use_cpu=True,
        fsdp=True,
        fsdp_config={
            "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
            "state_dict_type": form,
        },
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    torch.manual_seed(1)
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(0, 32, (2 * STEPS * processes, 8))]
    cls = fusedlr.hf.FusedLRTrainer if kind == "ours" else transformers.Trainer
    trainer = cls(lora_model(), args, train_dataset=rows)
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    assert trainer.accelerator.is_fsdp2
    optimizer = fusedlr.hf.unwrap(trainer.optimizer)
    assert (optimizer is not None) == (kind == "ours")
    # the step clips
    assert optimizer is None or optimizer.max_grad_norm == LIMIT
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        "losses": [entry["loss"] for entry in logs],
        "norms": [entry["grad_norm"] for entry in logs],
        "rates": [entry["learning_rate"] for entry in logs],
        "weights": whole(trainer.model),
    }


def in_parts_of_the_state(kind: str, processes: int, folder: Path) -> dict[str, Any]:
    """ZeroRedundancyOptimizer on a model of DistributedDataParallel: every process updates its parameters."""
    from transformers import get_linear_schedule_with_warmup

    ddp = torch.nn.parallel.DistributedDataParallel(lora_model())
    params = [p for p in ddp.parameters() if p.requires_grad]
    options: dict[str, Any] = {"lr": PEAK}
    if kind == "ours":
        options["schedule"] = fusedlr.linear(warmup_steps=2, total_steps=10)
    cls = fusedlr.FusedAdamW if kind == "ours" else torch.optim.AdamW
    optimizer = ZeroRedundancyOptimizer(params, cls, **options)
    scheduler = None if kind == "ours" else get_linear_schedule_with_warmup(optimizer, 2, 10)
    run: dict[str, Any] = {"losses": [], "norms": [], "rates": []}
    for k in range(STEPS):
        torch.manual_seed(10 * k + torch.distributed.get_rank())
        ids = torch.randint(0, 32, (2, 8))
        loss = ddp(input_ids=ids, labels=ids).loss
        loss.backward()
        # a process's own part has no norm of the model
        run["norms"].append(float(torch.nn.utils.clip_grad_norm_(params, LIMIT)))
        if scheduler is not None:
            run["rates"].append(scheduler.get_last_lr()[0])
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        else:
            run["rates"].append(optimizer.optim.last_metrics()["lr"][0])
        optimizer.zero_grad()
        run["losses"].append(loss.item())
    run["weights"] = whole(ddp)
    return run


def whole(model: torch.nn.Module) -> torch.Tensor:
    """The trained weights of all processes in one vector."""
    trained = [p.detach() for p in model.parameters() if p.requires_grad]
    return torch.cat([(p.full_tensor() if isinstance(p, DTensor) else p).flatten() for p in trained])


def compare(ours: dict[str, Any], stock: dict[str, Any]) -> None:
    assert min(stock["norms"]) < LIMIT < max(stock["norms"]), stock["norms"]
    for name, tolerance in (("losses", 1e-5), ("norms", 1e-5), ("rates", 1e-12)):
        mine, theirs = (torch.tensor(run[name], dtype=torch.float64) for run in (ours, stock))
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=0)
    torch.testing.assert_close(ours["weights"], stock["weights"], rtol=1e-4, atol=1e-6)


TOOLS = {"accelerate": in_a_loop, "trainer": in_the_trainer, "zero": in_parts_of_the_state}


def work(rank: int, processes: int, arguments: list[str]) -> None:
    tool, folder = arguments[0], Path(arguments[1])
    ours, stock = (TOOLS[tool](kind, processes, folder) for kind in ("ours", "stock"))
    compare(ours, stock)
    if tool == "trainer":
        for form in ("SHARDED_STATE_DICT", "FULL_STATE_DICT"):
            goes_on_from_its_checkpoint(processes, folder, form, ours)


def goes_on_from_its_checkpoint(processes: int, folder: Path, form: str, run: dict[str, Any]) -> None:
    saved = folder / "ours" / form / f"checkpoint-{STEPS // 2}"
    if not saved.exists():
        in_the_trainer("ours", processes, folder, form)
    resumed = in_the_trainer("ours", processes, folder, form, saved)
    for name in ("losses", "norms", "rates"):
        # the first half comes from the file
        assert resumed[name] == run[name], (form, name, resumed[name], run[name])
    assert torch.equal(resumed["weights"], run["weights"])


if __name__ == "__main__":
    main(work)
