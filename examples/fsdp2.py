"""LoRA training with fully_shard, saved by some processes and continued by another number of them.

    torchrun --nproc-per-node 2 examples/fsdp2.py --folder checkpoint --until 12
    torchrun --nproc-per-node 4 examples/fsdp2.py --folder checkpoint

Runs on GPUs where there are as many as processes, else on the CPU.
"""

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as distributed
import torch.distributed.checkpoint as dcp
from tiny import dataset, lora_model
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

import fusedlr

UPDATES = 24


def state_of(model, optimizer):
    weights, moments = get_state_dict(model, optimizer)
    # the scheduler's state has the schedule's step, for which torch's format of an optimizer has no place
    return {"model": weights, "optimizer": moments, "scheduler": optimizer.scheduler.state_dict()}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("checkpoint"), help="where the run is saved")
    parser.add_argument("--until", type=int, default=UPDATES, help="stop and save before this update")
    args = parser.parse_args()
    gpus = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(device)
    distributed.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo")

    model = lora_model().to(device)
    for layer in model.base_model.model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    trainable = [p for p in model.parameters() if p.requires_grad]
    # stock: AdamW(trainable, lr=2e-3), clip_grad_norm_ and a LambdaLR
    optimizer = fusedlr.FusedAdamW(
        trainable, lr=2e-3, max_grad_norm=1.0, schedule=fusedlr.cosine(warmup_steps=3, total_steps=UPDATES)
    )

    first = 0
    if args.folder.exists():
        saved = state_of(model, optimizer)
        dcp.load(saved, checkpoint_id=args.folder)
        set_state_dict(model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])
        optimizer.scheduler.load_state_dict(saved["scheduler"])
        first = optimizer.last_metrics()["step"][0]

    rank, world = distributed.get_rank(), distributed.get_world_size()
    rows = dataset(UPDATES * 4)
    for k in range(first, args.until):
        # each process takes its share of the four rows of an update
        mine = rows[4 * k : 4 * k + 4][rank::world]
        batch = {name: torch.stack([row[name] for row in mine]).to(device) for name in mine[0]}
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()  # one all-reduce, by which every process clips and skips alike
        optimizer.zero_grad()
        if rank == 0:
            metrics = optimizer.last_metrics()
            rate, norm = metrics["lr"][0], metrics["grad_norm"]
            print(f"update {k}: loss {loss.item():.4f}, lr {rate:.6f}, norm {norm:.3f}")
    dcp.save(state_of(model, optimizer), checkpoint_id=args.folder)
    if rank == 0:
        print(f"saved after {args.until} updates in {args.folder}")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
