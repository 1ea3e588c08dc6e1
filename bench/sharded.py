"""Host time of a step on DTensors, against stock's clipping and fused AdamW on the same ones.

`python -m fusedlr.bench.sharded` starts the processes itself, on this machine's CPU; `--help` has options.
Both optimizers step in turns in the same processes. Tensors are so small that the host's work is timed.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as distributed
import torch.multiprocessing as multiprocessing
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

import fusedlr
from fusedlr.console import Parser, aligned

from . import environment

ROUNDS, STEPS, ROWS, COLUMNS = 9, 10, 8, 8


def parameters(count: int) -> list[nn.Parameter]:
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    torch.manual_seed(0)
    params = []
    for _ in range(count):
        whole, grad = torch.randn(2, ROWS, COLUMNS)
        params.append(nn.Parameter(distribute_tensor(whole, mesh, [Shard(0)])))
        params[-1].grad = distribute_tensor(grad, mesh, [Shard(0)])
    return params


def stock(params: list[nn.Parameter]) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(params, lr=1e-4, fused=True)

    def step() -> None:
        nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()

    return step


def ours(params: list[nn.Parameter]) -> Callable[[], None]:
    return fusedlr.FusedAdamW(params, lr=1e-4, max_grad_norm=1.0).step


def timed(step: Callable[[], None]) -> tuple[float, float]:
    """Milliseconds per step once all processes are ready: by the clock, and of work of the thread that steps.

    Waiting for other processes is in the first alone.
    """
    distributed.barrier()
    begun, worked = time.perf_counter(), time.thread_time()
    for _ in range(STEPS):
        step()
    return (time.perf_counter() - begun) / STEPS * 1e3, (time.thread_time() - worked) / STEPS * 1e3


def work(rank: int, world: int, port: int, counts: list[int], results: Any) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    distributed.init_process_group("gloo", rank=rank, world_size=world)
    for count in counts:
        steps = {"stock": stock(parameters(count)), "fusedlr": ours(parameters(count))}
        collectives = {}
        for name, step in steps.items():
            step()
            with CommDebugMode() as counted:
                step()
            collectives[name] = counted.get_total_counts()
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
        for _ in range(ROUNDS):
            for name, step in steps.items():
                times[name].append(timed(step))
        if rank == 0:
            row: dict[str, Any] = {"processes": world, "tensors": count}
            for i, what in enumerate(("clock", "work")):
                of = {name: [each[i] for each in found] for name, found in times.items()}
                ratios = [a / b for a, b in zip(of["stock"], of["fusedlr"], strict=True)]
                low, middle, high = statistics.quantiles(ratios, n=4)
                row[what] = {name: statistics.median(each) for name, each in of.items()}
                row[what] |= {"ratio": middle, "quartiles": [low, high]}
            results.put({**row, "collectives": collectives})
    distributed.barrier()
    distributed.destroy_process_group()


def main() -> None:
    parser = Parser(prog="python -m fusedlr.bench.sharded", description=__doc__.split("\n")[0])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4], metavar="N")
    parser.add_argument("--tensors", type=int, nargs="+", default=[28, 112, 448], metavar="N")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the numbers there as JSON")
    args = parser.parse_args()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    rows: list[dict[str, Any]] = []
    for world in args.processes:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        results: Any = multiprocessing.get_context("spawn").SimpleQueue()
        multiprocessing.spawn(work, (world, port, args.tensors, results), nprocs=world)
        rows += [results.get() for _ in args.tensors]
    table = [
        ["processes", "tensors", "stock, ms", "fusedlr, ms", "work: stock", "fusedlr", "times less work"]
    ]
    for row in rows:
        cells = [f"{row['processes']}", f"{row['tensors']}"]
        cells += [f"{row[what][name]:.2f}" for what in ("clock", "work") for name in ("stock", "fusedlr")]
        low, high = row["work"]["quartiles"]
        table.append([*cells, f"{row['work']['ratio']:.1f} ({low:.1f} to {high:.1f})"])
    print("\n".join(aligned(table)))
    print("collectives per step:", *(f"{name} {count}" for name, count in rows[-1]["collectives"].items()))
    if args.out is not None:
        record = {"machine": environment.environment(), "rows": rows}
        args.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
