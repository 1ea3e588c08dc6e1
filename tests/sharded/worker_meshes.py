"""For test_meshes.py: steps on every kind of mesh, compared with one process that holds the whole model.

Its argument is the backend.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as distributed
from ptx import driver
from tolerances import GPU_STEP
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

import fusedlr
from sharded.processes import free_port, main

STEPS = 50
# steps whose collectives are counted, some of which are skipped
COUNTED = 7
# uneven over 2, 3 and 4 processes; some have no element of the second
SHAPES = ((7, 5), (1, 3), (6, 2), (5,), (4, 4))
OPTIONS: dict[str, Any] = {
    "lr": 0.05,
    "weight_decay": 0.1,
    "max_grad_norm": 0.5,
    "schedule": fusedlr.cosine(warmup_steps=5, total_steps=STEPS, min_lr_ratio=0.1),
}

# a mesh and placements per parameter; None for a plain tensor
Spread = list[tuple[DeviceMesh, list[Any]] | None]


def spreads(processes: int) -> dict[str, Spread]:
    """Every kind of mesh that so many processes can form."""
    flat = init_device_mesh("cpu", (processes,), mesh_dim_names=("dp",))
    found: dict[str, Spread] = {
        "fsdp": [(flat, [Shard(0)])] * 5,
        "second dimension": [(flat, [Shard(len(shape) - 1)]) for shape in SHAPES],
        "fsdp and plain": [(flat, [Shard(0)]), None, (flat, [Shard(0)]), None, None],
        "replicas and shards": [(flat, [Replicate()]), (flat, [Shard(0)]), None, (flat, [Shard(0)]), None],
    }
    if processes == 4:
        square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        both = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        found["hsdp"] = [(square, [Replicate(), Shard(0)])] * 5
        found["fsdp x tp"] = [
            (both, [Shard(0), Shard(1)]),
            (both["dp"], [Shard(0)]),
            (both, [Shard(0), Shard(0)]),
            (both["dp"], [Shard(0)]),
            (both["tp"], [Shard(1)]),
        ]
        # linears over all, experts over a smaller mesh and its siblings
        found["experts"] = [
            (flat, [Shard(0)]),
            (both, [Shard(0), Replicate()]),
            (both, [Replicate(), Shard(1)]),
            (flat, [Shard(0)]),
            None,
        ]
    return found


def put(whole: Tensor, spread: tuple[DeviceMesh, list[Any]] | None) -> Tensor:
    return whole.clone() if spread is None else distribute_tensor(whole.clone(), *spread, src_data_rank=None)


def gather(x: Tensor) -> Tensor:
    x = x.detach()
    return x.full_tensor() if isinstance(x, DTensor) else x


def gradients(k: int, dtype: torch.dtype, *, finite: bool) -> list[Tensor]:
    """Of one step, the same on every process; unless all are to be finite, one is not now and then."""
    torch.manual_seed(1000 + k)
    grads = [torch.randn(shape, dtype=torch.float64).to(dtype) * (1 + k % 3) for shape in SHAPES]
    if k % 10 == 4 and not finite:
        # in the last row, which one process has alone
        grads[0][-1, 0] = float("inf")
    return grads


def train(
    spread: Spread | None, dtype: torch.dtype, backend: str, steps: int = STEPS, **options: Any
) -> dict[str, Any]:
    """Steps with skips; `spread`: None for the whole model in this process."""
    torch.manual_seed(0)
    values = [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in SHAPES]
    where: Spread = [None] * len(SHAPES) if spread is None else spread
    params = [nn.Parameter(put(*each)) for each in zip(values, where, strict=True)]
    groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.02}]
    optimizer = fusedlr.FusedAdamW(groups, backend=backend, **{**OPTIONS, **options})
    scaled = options.get("amp_scaling", False)
    norms, skipped, collectives = [], [], []
    for k in range(steps):
        for p, grad, at in zip(
            params, gradients(k, dtype, finite=optimizer.nonfinite == "propagate"), where, strict=True
        ):
            p.grad = None if k % 7 == 3 and grad.ndim == 1 else put(grad, at)
        if scaled:
            # one process alone has found one
            alone = k % 9 == 5 and (
                spread is None or distributed.get_rank() == distributed.get_world_size() - 1
            )
            optimizer.found_inf = torch.tensor(float(alone))  # type: ignore[attr-defined]
            optimizer.grad_scale = torch.tensor(1.0)  # type: ignore[attr-defined]
        # counting takes longer than the step
        with CommDebugMode() if k < COUNTED else nullcontext() as counted:
            optimizer.step()
        if counted is not None:
            collectives.append(counted.get_total_counts())
        metrics = optimizer.last_metrics()
        norms.append(metrics["grad_norm"])
        skipped.append(metrics["skipped"])
        assert [p.grad is None for p in params] == [k % 7 == 3 and p.ndim == 1 for p in params]
    metrics = optimizer.last_metrics()
    return {
        "params": [gather(p) for p in params],
        "moments": [gather(optimizer.state[p][name]) for p in params for name in ("exp_avg", "exp_avg_sq")],
        "t": [int(optimizer.state[p]["step"]) for p in params],
        "k": metrics["step"],
        "skipped": skipped,
        "norms": norms,
        "lr": metrics["lr"],
        "collectives": collectives,
    }


def compare(mine: dict[str, Any], whole: dict[str, Any], tolerance: float, what: str) -> None:
    for name in ("t", "k", "skipped"):
        assert mine[name] == whole[name], (what, name, mine[name], whole[name])
    norms, expected = (torch.tensor(run["norms"], dtype=torch.float64) for run in (mine, whole))
    torch.testing.assert_close(norms, expected, rtol=tolerance, atol=0, equal_nan=True)
    assert mine["lr"] == whole["lr"]
    for name in ("params", "moments"):
        for a, b in zip(mine[name], whole[name], strict=True):
            difference = (a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30)
            assert difference <= tolerance, (what, name, float(difference))


CASES: dict[str, dict[str, Any]] = {
    "clipping": {},
    "amsgrad, a scaler": {"amsgrad": True, "amp_scaling": True},
    "independent": {"groups": "independent"},
    "no norm": {"max_grad_norm": None},
    "a scaler without clipping": {"max_grad_norm": None, "amp_scaling": True},
}


def groups_are_made_once(rank: int) -> None:
    """A group of processes takes memory and time: the world and a mesh's own are taken where they will do."""
    halves = ((0, 1), (2, 3))
    flat = [DeviceMesh("cpu", half) for half in halves][rank // 2]
    square = [DeviceMesh("cpu", [half]) for half in halves][rank // 2]
    world = DeviceMesh("cpu", halves)
    made: list[Any] = []
    new_group = distributed.new_group
    distributed.new_group = lambda *given, **named: made.append(given) or new_group(*given, **named)
    try:
        for mesh, count in ((world, 0), (flat, 0), (square, 1), (square, 1), (None, 2)):
            if mesh is None:
                another_world(rank)
                mesh = [DeviceMesh("cpu", [half]) for half in halves][rank // 2]
            p = nn.Parameter(distribute_tensor(torch.ones(4), mesh, [Replicate(), Shard(0)][-mesh.ndim :]))
            p.grad = torch.ones_like(p)
            optimizer = fusedlr.FusedAdamW([p], **OPTIONS)
            optimizer.step()
            assert optimizer.metrics()["grad_norm"] == 2 and len(made) == count, (mesh, made)
    finally:
        distributed.new_group = new_group


def another_world(rank: int) -> None:
    """Begin anew with the same processes, in which no group of before is of use."""
    processes, port = distributed.get_world_size(), [free_port()]
    distributed.broadcast_object_list(port)
    distributed.destroy_process_group()
    address = f"tcp://127.0.0.1:{port[0]}"
    distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=processes)


def the_group_is_that_of_the_largest_mesh(rank: int) -> None:
    """A smaller mesh that is named first has a group of its own, over which no norm is whole."""
    halves = ((0, 1), (2, 3))
    half = halves[rank // 2]
    small = [DeviceMesh("cpu", [first]) for first, _ in halves][rank // 2]
    large = [DeviceMesh("cpu", [ranks]) for ranks in halves][rank // 2]
    params = []
    for mesh in (small, large):
        at = [Replicate(), Shard(0)][-mesh.ndim :]
        p = nn.Parameter(distribute_tensor(torch.ones(8), mesh, at, src_data_rank=None))
        p.grad = distribute_tensor(torch.ones(8), mesh, at, src_data_rank=None)
        params.append(p)
    optimizer = fusedlr.FusedAdamW(params, **OPTIONS)
    optimizer.step()
    assert optimizer.metrics()["grad_norm"] == 4, half


def on_the_machine(processes: int, backend: str) -> None:
    """The kernels of a GPU backend, executed on this processor: see tests/ptx."""
    assert backend in driver.installed().names
    for what in ("clipping", "independent"):
        whole = train(None, torch.float32, "reference", steps=8, **CASES[what])
        for name, spread in spreads(processes).items():
            mine = train(spread, torch.float32, backend, steps=8, **CASES[what])
            # counters keep in fp32 what a step used
            mine["lr"] = whole["lr"]
            compare(mine, whole, GPU_STEP, f"{backend}, {what}, {name}")
            assert set(mine["collectives"]) == {1}


def work(rank: int, processes: int, arguments: list[str]) -> None:
    (backend,) = arguments
    if backend in driver.BACKENDS:
        on_the_machine(processes, backend)
        return
    if processes == 4:
        groups_are_made_once(rank)
        the_group_is_that_of_the_largest_mesh(rank)
    for what, options in CASES.items():
        for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-6)):
            if dtype == torch.float32 and what != "clipping":
                continue
            whole = train(None, dtype, backend, **options)
            for name, spread in spreads(processes).items():
                mine = train(spread, dtype, backend, **options)
                compare(mine, whole, tolerance, f"{what}, {name}, {dtype}")
                wanted = 0 if what == "no norm" else 1
                assert set(mine["collectives"]) == {wanted}, (what, name, mine["collectives"])
    assert set(whole["collectives"]) == {0}


if __name__ == "__main__":
    main(work)
