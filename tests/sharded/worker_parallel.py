"""For test_parallel.py: models that torch's own plans spread, trained like one process that holds them."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as distributed
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import fusedlr
from fusedlr.backends import compiled
from sharded.processes import main

STEPS, VOCABULARY, WIDTH = 12, 16, 8
TENSORS: dict[str, Any] = {
    "up": ColwiseParallel(),
    "down": RowwiseParallel(),
    "embed": RowwiseParallel(input_layouts=Replicate()),
    "head": ColwiseParallel(output_layouts=Replicate()),
}
# rows of a sequence are spread between the linear layers, and norms work on such rows
SEQUENCES: dict[str, Any] = {
    "norm": SequenceParallel(),
    "up": ColwiseParallel(input_layouts=Shard(1)),
    "down": RowwiseParallel(output_layouts=Shard(1)),
    "embed": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
    "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
}


class Model(nn.Module):
    """An embedding, a block with a norm, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(VOCABULARY, WIDTH), nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return self.head(x + self.down(torch.tanh(self.up(self.norm(x)))))


def make() -> Model:
    torch.manual_seed(0)
    return Model().double()


def optimizer_of(params: Any, **options: Any) -> fusedlr.FusedAdamW:
    schedule = fusedlr.cosine(warmup_steps=3, total_steps=STEPS)
    return fusedlr.FusedAdamW(params, lr=0.05, max_grad_norm=0.5, schedule=schedule, **options)


def gather(p: Tensor) -> Tensor:
    return p.full_tensor().detach() if isinstance(p, DTensor) else p.detach()


def spread_gradients(model: nn.Module) -> int:
    """As docs/distributed.md has it; returns how many gradients were not spread as their parameters."""
    changed = 0
    for p in model.parameters():
        if isinstance(p.grad, DTensor) and p.grad.placements != p.placements:
            p.grad = p.grad.redistribute(placements=p.placements)
            changed += 1
    return changed


def follows_plan(plan: dict[str, Any], tp: DeviceMesh, dp: DeviceMesh | None, others: int) -> None:
    """Train with the plan, of which so many gradients are spread otherwise than their parameters."""
    whole, model = make(), make()
    parallelize_module(model, tp, plan)
    if dp is not None:
        fully_shard(model, mesh=dp)
    alone, ours = optimizer_of(whole.parameters()), optimizer_of(model.parameters())
    plans = []
    for k in range(STEPS):
        torch.manual_seed(k)
        ids = torch.randint(0, VOCABULARY, (4, 6))
        for module in (whole, model):
            nn.functional.cross_entropy(module(ids).flatten(0, 1), ids.flatten()).backward()
        if k == 6 and distributed.get_rank() == 1:
            next(p for p in model.parameters() if isinstance(p, DTensor)).grad.to_local().fill_(float("nan"))  # type: ignore[union-attr]
        if k == 6:
            whole.up.weight.grad.fill_(float("nan"))  # type: ignore[union-attr]
        assert spread_gradients(model) == others
        with CommDebugMode() as counted:
            ours.step()
        assert counted.get_total_counts() == 1
        alone.step()
        ours.zero_grad(), alone.zero_grad()
        mine, expected = ours.last_metrics(), alone.last_metrics()
        assert [mine[name] for name in ("step", "lr", "skipped")] == [
            expected[name] for name in ("step", "lr", "skipped")
        ]
        if k != 6:
            torch.testing.assert_close(mine["grad_norm"], expected["grad_norm"], rtol=1e-12, atol=0)
        plans.append(ours._planner.plan)
    assert mine["skipped"] == 1
    # nothing is prepared anew where the compiled watch looks
    assert compiled.host is None or len(set(map(id, plans))) == 1
    for (name, p), q in zip(model.named_parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(gather(p), q.detach(), rtol=1e-12, atol=1e-14, msg=name)


def stages_of_a_pipeline() -> None:
    """Each half of the processes has one stage, spread over a mesh that the other half is not in."""
    mesh = init_device_mesh("cpu", (2, 2, 1), mesh_dim_names=("pp", "dp", "tp"))
    stage = mesh.get_local_rank("pp")
    torch.manual_seed(0)
    values = [torch.randn(5, 4, dtype=torch.float64) for _ in range(4)]
    whole = [nn.Parameter(value.clone()) for value in values]
    own = slice(2 * stage, 2 * stage + 2)

    def part(x: Tensor) -> Tensor:
        return distribute_tensor(x.clone(), mesh["dp", "tp"], [Shard(0), Shard(1)], src_data_rank=None)

    params = [nn.Parameter(part(value)) for value in values[own]]
    alone, ours = optimizer_of(whole), optimizer_of(params, process_group=mesh["pp"].get_group())
    for k in range(STEPS):
        torch.manual_seed(k)
        for p in whole:
            p.grad = torch.randn_like(p)
        if k == 5:
            # in one stage alone
            whole[3].grad[0, 0] = float("inf")  # type: ignore[index]
        for p, q in zip(params, whole[own], strict=True):
            p.grad = part(q.grad)  # type: ignore[arg-type]
        alone.step(), ours.step()
        assert ours.last_metrics()["skipped"] == alone.last_metrics()["skipped"]
        norms = [optimizer.metrics()["grad_norm"] for optimizer in (ours, alone)]
        torch.testing.assert_close(*norms, rtol=1e-12, atol=0, equal_nan=True)
    for p, q in zip(params, whole[own], strict=True):
        torch.testing.assert_close(gather(p), q.detach(), rtol=1e-12, atol=1e-14)


def work(rank: int, processes: int, arguments: list[str]) -> None:
    if processes == 2:
        tp = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
        # torch leaves the embedding's whole, and those of norms as sums that are still to be made
        follows_plan(TENSORS, tp, None, others=1)
        follows_plan(SEQUENCES, tp, None, others=3)
        return
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    for plan in (TENSORS, SEQUENCES):
        # fully_shard spreads every gradient as its parameter
        follows_plan(plan, mesh["tp"], mesh["dp"], others=0)
    stages_of_a_pipeline()


if __name__ == "__main__":
    main(work)
