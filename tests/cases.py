"""The optimizer suite as data: what is trained, for how many steps, under which schedule and clipping."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

import fusedlr

Shape = tuple[int, ...]

# block sizes of the kernels lie around 1024; 0 and 0-dim are the ends
EDGES: tuple[Shape, ...] = ((1,), (3,), (1023,), (1024,), (1025,), (0,), ())


def lora_layer(hidden: int, out: int, r: int) -> tuple[Shape, Shape]:
    """Shapes of the A and B matrix of one adapted linear layer."""
    return (r, hidden), (out, r)


def lora_inventory(layers: int, hidden: int, kv: int, intermediate: int, r: int) -> tuple[Shape, ...]:
    """Adapters of all linear layers of a Llama-like model, in PEFT's order (sizes scaled down)."""
    linears = ((hidden, hidden), (hidden, kv), (hidden, kv), (hidden, hidden))
    mlp = ((hidden, intermediate), (hidden, intermediate), (intermediate, hidden))
    return tuple(shape for _ in range(layers) for a, b in (*linears, *mlp) for shape in lora_layer(a, b, r))


@dataclass(frozen=True)
class Group:
    """One param group: shapes and torch's options for it."""

    shapes: tuple[Shape, ...]
    options: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype | None = None  # None: the case's


# equal only to itself, so that runs can be cached by their case
@dataclass(frozen=True, eq=False)
class Case:
    """One training run on made-up gradients."""

    name: str
    groups: tuple[Group, ...]
    schedule: fusedlr.Schedule
    max_grad_norm: float | None = 1.0
    steps: int = 60
    options: dict[str, Any] = field(default_factory=dict)
    # (step, index of the tensor) -> True where the tensor has no gradient
    missing: Callable[[int, int], bool] = lambda k, i: False
    # step -> size of the gradients
    grad_size: Callable[[int], float] = lambda k: 1.0
    grad_mean: float = 0.0  # of gradients of size 1
    # a GradScaler's scale, and what it finds at a step: anything but 0 means that the step is skipped
    scale: float | None = None
    found_inf: Callable[[int], float] = lambda k: 0.0
    # step -> a gradient of the first tensor is inf, without a scaler to find it
    overflow: Callable[[int], bool] = lambda k: False
    lr: float = 1e-2

    def skips(self, k: int) -> bool:
        """Whether step `k` must leave everything as it was."""
        return self.found_inf(k) != 0 or self.overflow(k)


def _cosine(steps: int = 60) -> fusedlr.Schedule:
    return fusedlr.cosine(warmup_steps=6, total_steps=steps)


_LORA = lora_inventory(layers=2, hidden=48, kv=16, intermediate=96, r=4)

CASES = (
    Case("edges", (Group(EDGES),), _cosine()),
    Case("edges-no-clip", (Group(EDGES),), _cosine(), max_grad_norm=None),
    Case("lora", (Group(_LORA),), _cosine()),
    Case(
        "lora-plus",
        (
            Group(_LORA[::2]),
            Group(_LORA[1::2], {"lr": 8e-2, "weight_decay": 0.0}),
            Group(((64,), (48,)), {"weight_decay": 0.0, "betas": (0.8, 0.99), "eps": 1e-6}),
        ),
        fusedlr.linear(warmup_steps=5, total_steps=60, min_lr_ratio=0.1),
    ),
    Case("missing-grads", (Group(EDGES), Group(((8, 8),))), _cosine(), missing=lambda k, i: (k + i) % 4 == 1),
    Case("late-tensor", (Group(((8, 8), (16,))),), _cosine(), missing=lambda k, i: i == 1 and k < 30),
    Case("empty-group", (Group(()), Group(((8, 8),))), _cosine()),
    Case("amsgrad", (Group(EDGES),), _cosine(), options={"amsgrad": True}),
    Case("maximize", (Group(EDGES),), _cosine(), options={"maximize": True}),
    Case(
        "no-decay-no-warmup",
        (Group(((33, 7),)),),
        fusedlr.constant(),
        options={"weight_decay": 0.0},
        max_grad_norm=None,
    ),
    Case("beta-zero", (Group(((33, 7),)),), _cosine(), options={"betas": (0.0, 0.0)}),
    # what is left of a spike in a moment of an update without memory
    Case(
        "spike",
        (Group(((33, 7),)),),
        _cosine(),
        max_grad_norm=None,
        options={"betas": (0.0, 0.0)},
        grad_size=lambda k: 1.0 if k % 10 else 1e9,
    ),
    Case("tiny-grads", (Group(((33, 7),)),), _cosine(), grad_size=lambda k: 1e-12),
    Case("large-grads", (Group(((33, 7),)),), _cosine(), grad_size=lambda k: 1e6),
    Case("clip-rarely", (Group(((33, 7),)),), _cosine(), max_grad_norm=15.0),
    Case(
        "restarts",
        (Group(((33, 7),)),),
        fusedlr.cosine_with_restarts(warmup_steps=4, total_steps=60, num_cycles=3),
    ),
    Case("table", (Group(((33, 7),)),), fusedlr.table(lambda k: 1 / (1 + k), total_steps=60)),
    Case(
        "past-the-end", (Group(((33, 7),)),), fusedlr.linear(warmup_steps=3, total_steps=30, min_lr_ratio=0.2)
    ),
    Case(
        "mixed-dtypes",
        (
            Group(((16, 4), (1025,))),
            Group(((32, 8),), dtype=torch.bfloat16),
            Group(((5,),), dtype=torch.float16),
        ),
        _cosine(),
    ),
    Case("misaligned", (Group(((1023,), (1025,), (17, 3))),), _cosine()),
    Case(
        "amp",
        (Group(_LORA[:6]), Group(((8,),), {"lr": 3e-2})),
        _cosine(),
        scale=1024.0,
        found_inf=lambda k: {0: 1.0, 7: 2.0, 8: float("nan"), 30: 1.0}.get(k, 0.0),
    ),
    Case("amp-no-clip", (Group(_LORA[:6]),), _cosine(), max_grad_norm=None, scale=64.0),
    Case("overflow", (Group(EDGES), Group(((8,),))), _cosine(), overflow=lambda k: k in (0, 5, 6, 20)),
    Case("long", (Group(((12, 5), (7,))), Group(((9,),), {"lr": 3e-2})), _cosine(300), steps=300),
)

# gradients that fall by 30x, as they do in training: 16-bit second moments cannot follow, 0.999*v rounds to v
FALLING = Case(
    "falling-gradients",
    (Group(((32, 8),)),),
    fusedlr.constant(),
    max_grad_norm=None,
    steps=2000,
    lr=0.03,
    # the decay keeps parameters small, so that their own 16 bits do not drown the moments'
    options={"weight_decay": 0.1, "eps": 1e-4},
    grad_size=lambda k: 1.0 if k < 500 else 0.03,
)

# cases whose tensors all have the dtype that a test asks for
UNIFORM = tuple(case for case in CASES if all(group.dtype is None for group in case.groups))
