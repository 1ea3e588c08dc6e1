"""Loops on accelerate, for test_accelerate.py: `python worker_accelerate.py PROCESSES OUTPUT PORT`.

Imports once and forks, so that four processes cost little more than one. Saves what each kind of run leaves
behind, after every process has compared its weights with the others'.
"""

from __future__ import annotations

import gc
import os
import sys
import warnings

import torch
import torch.distributed as distributed
import torch.multiprocessing as multiprocessing
from trainer_kit import (
    CLIP,
    FOREACH,
    FUSED,
    LATE,
    OURS,
    STEPS,
    Outcome,
    examples,
    lora_model,
    optimizers,
    trainable,
    weights_of,
)

ACCUMULATION, BATCH = 2, 2


def train(kind: str, processes: int) -> Outcome:
    """A loop as people write it: each process sees its share, `ACCUMULATION` batches make an update."""
    # optional, and every file here is imported for its doctests
    from accelerate import Accelerator
    from accelerate.utils import set_seed

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATION)
    set_seed(0)
    model = lora_model()
    # accelerate steps a scheduler once per process
    optimizer, scheduler = optimizers(kind, trainable(model), per_update=processes, max_grad_norm=CLIP)
    rows = examples(STEPS * ACCUMULATION * BATCH * processes)
    loader = torch.utils.data.DataLoader(rows, batch_size=BATCH)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    result = Outcome(torch.empty(0), [])
    model.train()
    set_seed(accelerator.process_index)
    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients and kind != OURS:
                accelerator.clip_grad_norm_(model.parameters(), CLIP)
            if accelerator.sync_gradients:
                result.rates.append(scheduler.get_last_lr()[0])
                result.losses.append(accelerator.reduce(loss.detach(), "mean").item())
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    result.weights = weights_of(accelerator.unwrap_model(model))
    assert len(result.rates) == STEPS
    if kind == OURS:
        fused = optimizer.optimizer
        assert fused.last_metrics()["step"] == [STEPS]
        assert {int(state["step"]) for state in fused.state.values()} == {STEPS}
    if processes > 1:
        everywhere = [torch.empty_like(result.weights) for _ in range(processes)]
        distributed.all_gather(everywhere, result.weights)
        assert all(torch.equal(weights, result.weights) for weights in everywhere)
    accelerator.free_memory()
    return result


def work(rank: int, processes: int, output: str) -> None:
    warnings.filterwarnings("error", message=".*(lr_scheduler.step|optimizer.step|was assigned to group)")
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1"
    )
    runs = {kind: train(kind, processes) for kind in (OURS, FUSED, FOREACH, LATE)}
    if rank == 0:
        torch.save({kind: vars(run) for kind, run in runs.items()}, output)
    if distributed.is_initialized():
        distributed.destroy_process_group()


if __name__ == "__main__":
    count, path = int(sys.argv[1]), sys.argv[2]
    os.environ["MASTER_PORT"] = sys.argv[3]
    torch.set_num_threads(1)
    # imports what is imported at first use, once and not in every process; no backward pass, whose threads
    # do not survive a fork
    optimizers(FUSED, trainable(lora_model()))
    # shared with the processes, and left alone by accelerate's collection of garbage
    gc.freeze()
    multiprocessing.start_processes(work, (count, path), nprocs=count, start_method="fork")
