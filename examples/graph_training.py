"""A whole LoRA training iteration as one CUDA graph: forward, backward and optimizer step, captured once.

The learning rate and skipped steps follow by themselves: both are counted on the device. On a machine without
a GPU the same iterations are made one by one. `python examples/graph_training.py --help` for its options.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor, nn

import fusedlr


class LoraLinear(nn.Module):
    """A frozen linear layer with a trainable low-rank term."""

    def __init__(self, inputs: int, outputs: int, r: int) -> None:
        super().__init__()
        self.base = nn.Linear(inputs, outputs).requires_grad_(False)
        self.lora_A = nn.Parameter(torch.randn(r, inputs) / inputs**0.5)
        self.lora_B = nn.Parameter(torch.zeros(outputs, r))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.lora_A.t() @ self.lora_B.t()


def make_model(width: int, layers: int, r: int) -> nn.Sequential:
    blocks = [nn.Sequential(LoraLinear(width, width, r), nn.GELU()) for _ in range(layers)]
    return nn.Sequential(*blocks, LoraLinear(width, width, r))


def capture(
    iteration: Callable[[], Tensor], optimizer: fusedlr.FusedAdamW
) -> tuple[Callable[[], None], Tensor]:
    """A function that makes `iteration` again on the GPU, and where it leaves its loss."""
    # the first iterations allocate state, compile the kernels and let cuBLAS choose; torch asks for a stream
    # other than the default
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            optimizer.zero_grad()
            iteration()
    torch.cuda.current_stream().wait_stream(stream)
    # gradients that are None now are allocated by the captured backward, which then writes and never adds
    optimizer.zero_grad()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = iteration()
    return graph.replay, loss


def train(device: str, steps: int, width: int = 256, layers: int = 4, batch: int = 32) -> dict[str, float]:
    """Fit a random linear map; the losses of the first and the last step, and the rate of the last."""
    torch.manual_seed(0)
    model = make_model(width, layers, r=8).to(device)
    target = torch.randn(width, width, device=device) / width**0.5
    optimizer = fusedlr.FusedAdamW(
        [p for p in model.parameters() if p.requires_grad],
        lr=5e-3,
        max_grad_norm=1.0,
        schedule=fusedlr.cosine(warmup_steps=max(1, steps // 10), total_steps=steps, min_lr_ratio=0.1),
    )
    # a graph reads its input where it was when it was captured
    x = torch.empty(batch, width, device=device)

    def iteration() -> Tensor:
        loss = nn.functional.mse_loss(model(x), x @ target)
        loss.backward()
        optimizer.step()
        return loss.detach()

    losses = []
    replay, loss = None, torch.empty(())
    k = 0
    while k < steps:
        x.copy_(torch.randn(batch, width))
        if device == "cuda" and replay is None:
            replay, loss = capture(iteration, optimizer)
            # the warm-up iterations were updates of this run; the capture itself was none
            k += 3
            continue
        if replay is not None:
            replay()
        else:
            optimizer.zero_grad()
            loss = iteration()
        k += 1
        # a new tensor, as the graph will write over its own
        losses.append(loss.clone())
        # never waits; here a graph says so that has become out of date
        optimizer.scheduler.step()
    used = optimizer.metrics()  # on the device; one read at the end
    return {
        "updates": used["step"].max().item(),
        "first_loss": losses[0].item(),
        "last_loss": losses[-1].item(),
        "last_lr": used["lr"].max().item(),
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--steps", type=int, default=200, help="updates, at least 10 (default: %(default)s)")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="(default: auto)")
    args = parser.parse_args(argv)
    if args.steps < 10:
        parser.error(f"--steps {args.steps} must be at least 10")
    available = torch.cuda.is_available()
    if args.device == "cuda" and not available:
        parser.error("--device cuda: torch sees no CUDA device here")
    device = "cuda" if available and args.device != "cpu" else "cpu"
    if device == "cpu":
        print("no GPU in use: there is nothing to capture, the iterations are made one by one")
    for name, value in train(device, args.steps).items():
        print(f"{name:>10} {value:.4g}")


if __name__ == "__main__":
    main()
