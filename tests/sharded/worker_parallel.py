"""For test_training.py: fully_shard over parallelize_module, against one process with the whole model."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import fusedlr
from sharded.processes import main


class Block(nn.Module):
    """A norm, which tensor parallel leaves whole, and two linears, which it splits."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block()).double()


def work(rank: int, processes: int, arguments: list[str]) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    whole, spread = model(), model()
    for block in spread:
        parallelize_module(block, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        fully_shard(block, mesh=mesh["dp"])
    fully_shard(spread, mesh=mesh["dp"])
    kinds = {str(p.placements) for p in spread.parameters() if isinstance(p, DTensor)}
    assert len(kinds) > 2 and all(isinstance(p, DTensor) for p in spread.parameters()), kinds
    options = {"lr": 0.05, "max_grad_norm": 0.3, "schedule": fusedlr.linear(3, 20)}
    alone = fusedlr.FusedAdamW(whole.parameters(), **options)  # type: ignore[arg-type]
    ours = fusedlr.FusedAdamW(spread.parameters(), **options)  # type: ignore[arg-type]
    for k in range(12):
        torch.manual_seed(k)
        x = torch.randn(4, 6, dtype=torch.float64)
        for module, optimizer in ((whole, alone), (spread, ours)):
            optimizer.zero_grad()
            (module(x) ** 2).mean().backward()
            optimizer.step()
        torch.testing.assert_close(
            ours.metrics()["grad_norm"], alone.metrics()["grad_norm"], rtol=1e-12, atol=0
        )
    for p, q in zip(spread.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(p.full_tensor(), q.detach(), rtol=1e-12, atol=1e-14)  # type: ignore
    plan = ours._planner.plan
    ours.step()
    assert ours._planner.plan is plan


if __name__ == "__main__":
    main(work)
