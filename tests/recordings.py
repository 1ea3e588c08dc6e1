"""Recordings of known content, for the tests of `Recording` and of `fusedlr report`: a healthy LoRA run, and
what can be changed in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

import fusedlr
from fusedlr.recorded import RecordedGroup, Recording

PEAK, LIMIT = 2e-4, 1.5
STEPS, WARMUP, LAYERS = 400, 60, 8
MODULES = ("q_proj", "v_proj")
SCHEDULE = fusedlr.cosine(warmup_steps=WARMUP, total_steps=STEPS, min_lr_ratio=0.1)
GROUPS = (RecordedGroup("lora_A", PEAK, SCHEDULE), RecordedGroup("lora_B", 4 * PEAK, SCHEDULE))
NAMES = tuple(
    f"base_model.model.model.layers.{layer}.self_attn.{module}.lora_{matrix}.default.weight"
    for matrix in "AB"
    for layer in range(LAYERS)
    for module in MODULES
)


def healthy(seed: int = 0) -> dict[str, Any]:
    """The arrays of a run in which nothing is unusual: norms of about 1, of which the limit clips a tenth."""
    random = np.random.default_rng(seed)
    k = np.arange(STEPS)
    share = np.array([SCHEDULE.lr_at(i) for i in k.tolist()])
    norm = 1.0 * np.exp(0.3 * random.standard_normal(STEPS))
    tensors = len(NAMES)
    each = np.exp(0.2 * random.standard_normal((STEPS, tensors)))
    # B starts at 0, so it moves more of itself, and infinitely much at the first update that has a rate
    usual = np.where(["lora_B" in name for name in NAMES], 4e-3, 1e-3)
    ratio = share[:, None] * usual * each
    ratio[1, ["lora_B" in name for name in NAMES]] = np.inf
    return {
        "step": k.copy(),
        "k": np.stack([k, k], axis=1),
        "lr": np.stack([share * group.peak for group in GROUPS], axis=1).astype(np.float32),
        "grad_norm": norm,
        "coef": np.minimum(1, LIMIT / (norm + 1e-6)),
        "limit": np.full(STEPS, LIMIT),
        "skipped": np.zeros(STEPS, dtype=bool),
        "tensor_grad_norm": (norm[:, None] * each / np.sqrt(tensors)).astype(np.float32),
        "tensor_update_ratio": ratio.astype(np.float32),
    }


def skip(arrays: dict[str, Any], rows: Any, tensor: int = 0) -> None:
    """Have these steps skipped, for a gradient of `tensor` that is not finite; the later rates come later."""
    arrays["skipped"][rows] = True
    arrays["grad_norm"][rows] = np.inf
    arrays["tensor_grad_norm"][rows, tensor] = np.nan
    arrays["tensor_update_ratio"][rows] = 0
    made = np.cumsum(~arrays["skipped"])
    k = np.concatenate([[0], made[:-1]])
    arrays["k"] = np.stack([k, k], axis=1)
    rates = np.array([[SCHEDULE.lr_at(i, group.peak) for group in GROUPS] for i in k.tolist()])
    arrays["lr"] = rates.astype(np.float32)


def recording(change: Callable[[dict[str, Any]], object] | None = None, **values: Any) -> Recording:
    """A healthy run, but for what `change` does to its arrays, and for `values`: names, groups, scopes."""
    arrays = healthy()
    if change is not None:
        change(arrays)
    return Recording(arrays, **{"names": NAMES, "groups": GROUPS, **values})
