"""A few steps over all that the kernels branch on, for compute-sanitizer.

`compute-sanitizer --tool memcheck python -m bench.sanitized`
"""

from __future__ import annotations

import argparse
import itertools

import torch
from torch import nn

import fusedlr
from fusedlr import backends

# ends of tiles (256, 1024) and of chunks (4096), nothing, one element
_SIZES = (0, 1, 255, 257, 1023, 1025, 4095, 4097, 9000)


def parameters(device: str, dtype: torch.dtype, offset: int) -> list[nn.Parameter]:
    """Parameters and gradients that begin `offset` elements into memory of their own, and end with it."""
    params = []
    for size in _SIZES:
        p = nn.Parameter(torch.empty(size + offset, device=device, dtype=dtype)[offset:].fill_(0.5))
        p.grad = torch.empty(size + offset, device=device, dtype=dtype)[offset:].fill_(0.1)
        params.append(p)
    return params


def run(backend: str, device: str, steps: int = 2) -> int:
    """Make the steps; returns how many cases there were."""
    cases = itertools.product((False, True), (None, 1.0), ("joint", "independent"))
    count = 0
    for amsgrad, max_grad_norm, groups in cases:
        kinds = itertools.product((torch.float32, torch.bfloat16), (0, 1))
        optimizer = fusedlr.FusedAdamW(
            [{"params": parameters(device, dtype, offset)} for dtype, offset in kinds],
            lr=1e-3,
            schedule=fusedlr.cosine_with_restarts(2, 20, num_cycles=2),
            amsgrad=amsgrad,
            max_grad_norm=max_grad_norm,
            groups=groups,
            backend=backend,
        )
        for _ in range(steps):
            optimizer.step()
        done = optimizer.metrics()["step"].tolist()
        if done != [steps] * len(done):
            raise SystemExit(f"counters say {done} after {steps} steps")
        if any(not p.isfinite().all() for group in optimizer.param_groups for p in group["params"]):
            raise SystemExit("a parameter is not finite")
        count += 1
    return count


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.sanitized", description=__doc__.split("\n")[0], allow_abbrev=False
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="(default: cuda)")
    parser.add_argument("--backend", default="auto", help="whose kernels (default: auto)")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device here")
    device = torch.device(args.device)
    try:
        backend = backends.choose(args.backend, [device]).name
    except (RuntimeError, ValueError) as error:
        parser.error(f"--backend: {error}")
    print(f"{run(backend, args.device)} cases on {backend}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
