"""What a step on a GPU has to get right, as data: sizes, types, addresses, groups, clipping, skips, counts.

Beside the optimizer suite of cases.py, whose cases have no idea of chunks, buckets and launches.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import fusedlr
from fusedlr import ZClip
from gpu.steps import SCHEDULE

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# a parameter of this shape and type
Make = Callable[..., torch.nn.Parameter]
# sees the optimizer, the step and the parameters, gradients set, before each step
Before = Callable[[Any, int, list[Tensor]], Any]


@dataclass(frozen=True, eq=False)
class GpuCase:
    """A few steps of one optimizer on made-up gradients."""

    groups: Callable[[Make], list[dict[str, Any]]]
    options: dict[str, Any] = field(default_factory=dict)
    steps: int = 3
    before: Before = lambda optimizer, k, params: None
    # elements by which gradients, and parameters, lie off their alignment
    grad_offset: int = 0
    param_offset: int = 0
    grad_size: float = 1.0
    # seconds, not a fraction of one
    large: bool = False
    # whose kernels it is for
    backends: tuple[str, ...] = ("cuda", "triton")


def _sizes(*shapes: Any, dtype: torch.dtype = F32, **more: Any) -> Callable[[Make], list[dict[str, Any]]]:
    return lambda make: [{"params": [make(shape, dtype) for shape in shapes], **more}]


def _both_betas(
    *shapes: Any, dtype: torch.dtype = F32, **more: Any
) -> Callable[[Make], list[dict[str, Any]]]:
    """The sizes twice: compilers may make two loops of the two forms of the first moment."""
    return lambda make: [
        {"params": [make(shape, dtype) for shape in shapes], "betas": betas, **more}
        for betas in ((0.9, 0.999), (0.4, 0.999))
    ]


CLIP: dict[str, Any] = {"max_grad_norm": 1.0}
# around the ends of tiles and chunks, for both backends
SIZES = (1, 3, 1023, 4095, 4096, 4097, 10000, 0)
TAILS = (2, 4, 5, 7, 8, 9, 15, 17, 31, 33, 127, 129, 255, 256, 257, 511, 513, 1024, 1025, 2047, 2049)
TAILS += (3071, 3073, 4080, 4100, 5120, 8191, 8192, 8193)
# and where a thread's part of a tile ends
TAILS += (3, 6, 12, 514, 2044, 2048, 3072, 3076)

GPU_CASES: dict[str, GpuCase] = {}


def _types() -> None:
    for dtype, name in ((F32, "fp32"), (BF16, "bf16"), (F16, "fp16")):
        for state, tag in ((None, name), ("param", f"{name}, 16-bit moments")):
            if state and dtype == F32:
                continue
            options = {**CLIP, "state_dtype": state}
            plain, amsgrad = _sizes(*SIZES, dtype=dtype), _both_betas(*SIZES, dtype=dtype, amsgrad=True)
            GPU_CASES[tag] = GpuCase(plain, options)
            GPU_CASES[f"{tag}, amsgrad"] = GpuCase(amsgrad, options)
            GPU_CASES[f"{tag}, gradients off alignment"] = GpuCase(plain, options, grad_offset=1)
            tails = _both_betas(*TAILS, dtype=dtype)
            GPU_CASES[f"{tag}, tails"] = GpuCase(tails, {**options, "max_grad_norm": 0.5}, steps=2)
        sizes = _sizes(5, 4099, 8192, dtype=dtype, amsgrad=True)
        GPU_CASES[f"{name}, parameters off alignment"] = GpuCase(sizes, CLIP, param_offset=3)


def _masters() -> None:
    for dtype, name in ((BF16, "bf16"), (F16, "fp16")):
        for state, tag in ((None, f"{name}, master"), ("param", f"{name}, 16-bit moments, master")):
            options = {**CLIP, "state_dtype": state, "master_weights": True}
            sizes = _sizes(*SIZES, dtype=dtype)
            GPU_CASES[tag] = GpuCase(sizes, options, before=_assign if state is None else _nothing)
            GPU_CASES[f"{tag}, amsgrad"] = GpuCase(_both_betas(*SIZES, dtype=dtype, amsgrad=True), options)
            GPU_CASES[f"{tag}, tails"] = GpuCase(
                _both_betas(*TAILS, dtype=dtype), {**options, "max_grad_norm": 0.5}, steps=2
            )
            for offset in (2, 4):
                GPU_CASES[f"{tag}, gradients off by {2 * offset} bytes"] = GpuCase(
                    _both_betas(5, 4096, 5000, dtype=dtype), options, grad_offset=offset
                )
    several = lambda make: [  # noqa: E731
        {"params": [make(n, dtype) for n in (9, 4100) for dtype in (F32, BF16, F16)], "amsgrad": amsgrad}
        for amsgrad in (False, True)
    ]
    GPU_CASES["mixed, master"] = GpuCase(several, {**CLIP, "master_weights": True}, 4, _spoil(None, math.nan))


def _nothing(optimizer: Any, k: int, params: list[Tensor]) -> None:
    pass


def _assign(optimizer: Any, k: int, params: list[Tensor]) -> None:
    """Parameters are given other values, zeros among them, whose remainders stay."""
    if k == 2:
        with torch.no_grad():
            params[0].fill_(0.0)
            params[1].fill_(-0.0)
            params[2].view(-1)[::3] = 0.75
            params[3].mul_(2)


_types()
GPU_CASES |= {
    # off what wide accesses need, and on what half of one would
    "fp32, gradients off by 8 bytes": GpuCase(_both_betas(5, 4096, 5000), CLIP, grad_offset=2),
    "bf16, gradients off by 8 bytes": GpuCase(_both_betas(5, 4096, 5000, dtype=BF16), CLIP, grad_offset=4),
    "fp32, amsgrad, gradients off by 8 bytes": GpuCase(
        _both_betas(5, 4096, 5000, amsgrad=True), CLIP, grad_offset=2
    ),
    "bf16, 16-bit moments, gradients off by 8 bytes": GpuCase(
        _both_betas(5, 4096, 5000, dtype=BF16), {**CLIP, "state_dtype": "param"}, grad_offset=4
    ),
    "maximize": GpuCase(_sizes(5, 5000, maximize=True), CLIP),
    "no clipping": GpuCase(_sizes(*SIZES)),
    "no clipping, no schedule": GpuCase(_sizes(3, 4097), {"schedule": None, "lr": 0.02}),
    "clipping that does nothing": GpuCase(_sizes(3, 4097), {"max_grad_norm": 1e6}),
    # the epsilon beside the norm shows
    "a tiny limit": GpuCase(_sizes(3, 4097), {"max_grad_norm": 1e-5}, grad_size=1e-6),
    "betas": GpuCase(
        lambda make: [
            {"params": [make(5), make(4097)], "betas": (0.0, 0.999)},
            {"params": [make(5)], "betas": (0.9, 0.0)},
            {"params": [make(9)], "betas": (0.5, 0.99), "eps": 1e-3, "weight_decay": 0.5},
            {"params": [make(9)], "weight_decay": 0.0},
        ],
        CLIP,
        steps=4,
    ),
    "40 chunks": GpuCase(_sizes(160_000), CLIP, steps=2),
}


# what is not finite


def _spoil(*values: float | None) -> Before:
    """The last gradient's last element at the first steps."""

    def before(optimizer: Any, k: int, params: list[Tensor]) -> None:
        if k < len(values) and values[k] is not None:
            params[-1].grad.view(-1)[-1] = values[k]

    return before


def _scaler(scales: tuple[float | None, ...], found: tuple[float | None, ...]) -> Before:
    """What a GradScaler leaves on the optimizer, in turn."""

    def before(optimizer: Any, k: int, params: list[Tensor]) -> None:
        for name, values in (("grad_scale", scales), ("found_inf", found)):
            x = values[k % len(values)]
            setattr(optimizer, name, None if x is None else torch.tensor(float(x)))

    return before


def _spoil_scopes(optimizer: Any, k: int, params: list[Tensor]) -> None:
    if k == 1:
        params[1].grad.fill_(math.inf)
    if k == 2:
        params[3].grad.fill_(math.nan)


_masters()
_SCALED = _scaler((1024.0, 65536.0, 1.0, 3.0, 2.0**-10, None), (0.0, 1.0, math.nan, 0.0, 2.0, 0.0))
_inf, _nan = math.inf, math.nan
GPU_CASES |= {
    "skips": GpuCase(_sizes(7, 5000), CLIP, 5, _spoil(None, _inf, _nan, None, -_inf)),
    "amsgrad, skips": GpuCase(_sizes(7, 5000, amsgrad=True), CLIP, 3, _spoil(None, _inf)),
    "bf16, 16-bit moments, skips": GpuCase(
        _sizes(7, 5000, dtype=BF16), {**CLIP, "state_dtype": "param"}, 3, _spoil(None, _inf)
    ),
    "bf16, master, skips": GpuCase(
        _sizes(7, 5000, dtype=BF16), {**CLIP, "master_weights": True}, 3, _spoil(None, _inf)
    ),
    "skips without clipping": GpuCase(_sizes(7, 5000), {"nonfinite": "skip"}, 4, _spoil(_nan, None, -_inf)),
    "inf propagates": GpuCase(_sizes(7, 5000), {**CLIP, "nonfinite": "propagate"}, 3, _spoil(None, _inf)),
    "nan propagates": GpuCase(
        _sizes(7, 5000, amsgrad=True), {"nonfinite": "propagate"}, 3, _spoil(None, _nan)
    ),
    "an infinite limit": GpuCase(
        _sizes(7, 5000), {"max_grad_norm": _inf, "nonfinite": "propagate"}, 2, _spoil(_inf)
    ),
    "skips of independent groups": GpuCase(
        lambda make: [
            {"params": [make(7), make(4097)], "max_grad_norm": 1.0},
            {"params": [make(9), make(100)], "max_grad_norm": 2.0},
            {"params": [make(3)], "max_grad_norm": None},
        ],
        {"groups": "independent"},
        4,
        _spoil_scopes,
    ),
    "scaler": GpuCase(_sizes(7, 5000), CLIP, 7, _SCALED, grad_size=1000.0),
    "scaler, no clipping": GpuCase(_sizes(7, 5000, dtype=F16), {}, 7, _SCALED, grad_size=100.0),
    "scaler, found_inf below 0": GpuCase(_sizes(7, 50), CLIP, 2, _scaler((2.0,), (-1.0, 0.0))),
    "scaler, independent groups": GpuCase(
        lambda make: [{"params": [make(7), make(4097)], "max_grad_norm": 1.0}, {"params": [make(9)]}],
        {"groups": "independent"},
        7,
        _SCALED,
        grad_size=1000.0,
    ),
}


# what is recorded: rows of a ring that is shorter than the run, and one that is not filled


def _spoil_and_leave_out(optimizer: Any, k: int, params: list[Tensor]) -> None:
    if k == 1:
        params[2].grad.view(-1)[-1] = math.nan
        params[5].grad.fill_(math.inf)
    if k == 2:
        params[0].grad = params[6].grad = None


_RECORD: dict[str, Any] = {**CLIP, "record": fusedlr.Record(last=3)}
GPU_CASES |= {
    **{
        f"{name}, record": GpuCase(_sizes(*SIZES, dtype=dtype), _RECORD, 5, _spoil_and_leave_out)
        for dtype, name in ((F32, "fp32"), (BF16, "bf16"), (F16, "fp16"))
    },
    **{
        f"{name}, master, record": GpuCase(
            _sizes(*SIZES, dtype=dtype), {**_RECORD, "master_weights": True}, 5, _spoil_and_leave_out
        )
        for dtype, name in ((BF16, "bf16"), (F16, "fp16"))
    },
    "record, gradients off alignment": GpuCase(_sizes(*SIZES), _RECORD, grad_offset=1),
    "record, gradients off by 8 bytes": GpuCase(_both_betas(5, 4096, 5000), _RECORD, grad_offset=2),
    "record, tails": GpuCase(_both_betas(*TAILS), {**_RECORD, "max_grad_norm": 0.5}, steps=2),
    "record, 40 chunks": GpuCase(_sizes(160_000, 3), _RECORD, 2),
    "record, no tensors": GpuCase(_sizes(7, 5000), {**CLIP, "record": fusedlr.Record(2, tensors=False)}),
    "record, scaler": GpuCase(_sizes(7, 5000), _RECORD, 7, _SCALED, grad_size=1000.0),
    "record, scaler, no clipping": GpuCase(_sizes(7, 5000), {"record": fusedlr.Record()}, 7, _SCALED),
    # more columns, groups and tensors than a block has threads or a program has lanes
    "record, 600 groups": GpuCase(
        lambda make: [{"params": [make(1 + i % 3)], "lr": 0.001 * (1 + i)} for i in range(600)],
        {"schedule": None, **_RECORD},
        2,
        large=True,
    ),
}


# groups


def _some_without(optimizer: Any, k: int, params: list[Tensor]) -> None:
    if k == 1:
        params[0].grad = params[1].grad = None
    if k == 2:
        params[-1].grad = None


GPU_CASES["record, skips of independent groups"] = GpuCase(
    lambda make: [
        {"params": [make(7), make(4097)], "max_grad_norm": 1.0},
        {"params": [make(9), make(100)], "max_grad_norm": 2.0},
        {"params": [make(3)], "max_grad_norm": None},
    ],
    {"groups": "independent", "record": fusedlr.Record()},
    4,
    _spoil_scopes,
)


def _adapters(make: Make) -> list[dict[str, Any]]:
    """Three scopes of two groups each, and the joint one."""
    return [
        {"params": [make(n), make(m)], "scope": name, "lr": lr, "max_grad_norm": limit}
        for n, m, name, lr, limit in (
            (5, 4100, "a", 0.01, 0.5),
            (7, 100, "b", 0.02, 1.0),
            (1023, 8, "a", 0.03, 0.5),
            (64, 3, "b", 0.04, 1.0),
            (9, 33, "c", 0.05, None),
        )
    ] + [{"params": [make(12)]}]


def _one_after_the_other(optimizer: Any, k: int, params: list[Tensor]) -> None:
    optimizer.only = (("a",), ("b", None), None, (), ("a", "c"), ("b",))[k]
    if k == 1:
        # of a scope that does not step
        params[0].grad.fill_(math.nan)
    if k == 4:
        params[4].grad.fill_(math.inf)


def _chosen_on_the_device(optimizer: Any, k: int, params: list[Tensor]) -> None:
    flags = ((1, 0, 0, 1), (0, 1, 1, 0), (1, 1, 1, 1), (0, 0, 0, 0))[k]
    optimizer.only = torch.tensor([flag != 0 for flag in flags], device=params[0].device)


def _scaled_scopes(optimizer: Any, k: int, params: list[Tensor]) -> None:
    _scaler((64.0, 64.0, 64.0), (0.0, 1.0, 1.0))(optimizer, k, params)
    if k == 1:
        params[1].grad[3] = math.inf


def _no_gradient(*steps: int) -> Before:
    def before(optimizer: Any, k: int, params: list[Tensor]) -> None:
        for p in params:
            p.grad = None if k in steps else p.grad

    return before


def _first_scope_is_inf(optimizer: Any, k: int, params: list[Tensor]) -> None:
    if k == 1:
        params[2].grad.fill_(math.inf)


def _mixed(**more: Any) -> Callable[[Make], list[dict[str, Any]]]:
    """All buckets at once; with `more`, limits of norms for the first two groups."""
    return lambda make: [
        {"params": [make(5000), make(300, BF16), make(4097, F16), make(9)], **more},
        {"params": [make(4096, BF16), make(17), make(12, F16)], "amsgrad": True, "lr": 0.003, **more},
        {"params": [make(5, F16), make(4100, BF16)], "schedule": fusedlr.inverse_sqrt(warmup_steps=2)},
    ]


def _spikes(*steps: int, factor: float = 40.0) -> Before:
    """Gradients of these steps are so much larger, one more than the other; those of others differ a bit."""

    def before(optimizer: Any, k: int, params: list[Tensor]) -> None:
        for p in params:
            p.grad.mul_(factor * (1 + k) if k in steps else (1.0, 1.3, 0.9)[k % 3])

    return before


def _spiking_adapters(optimizer: Any, k: int, params: list[Tensor]) -> None:
    """Each scope has its own spikes, and its own steps."""
    optimizer.only = None if k != 4 else ("a", "c", None)
    for i, p in enumerate(params):
        p.grad.mul_(60.0 if (k, i % 4) in ((4, 0), (5, 1), (6, 2)) else (1.0, 1.2, 0.9, 1.1)[k % 4])
    if k == 3:
        params[2].grad.fill_(math.nan)


def _guarded_adapters(make: Make) -> list[dict[str, Any]]:
    """The adapters, with what they do about spikes."""
    limits = {
        "a": ZClip(warmup_steps=3),
        "b": ZClip(alpha=0.5, z_thresh=1.5, warmup_steps=2, max_norm=70.0, action="skip"),
        "c": ZClip(warmup_steps=2, z_thresh=0.5),
    }
    return [
        {**group, "max_grad_norm": limits[group["scope"]]} if "scope" in group else group
        for group in _adapters(make)
    ]


GPU_CASES |= {
    "ZClip": GpuCase(_sizes(7, 5000), {"max_grad_norm": ZClip(warmup_steps=3)}, 8, _spikes(4, 5, 7)),
    "ZClip that skips": GpuCase(
        _sizes(7, 5000), {"max_grad_norm": ZClip(warmup_steps=3, action="skip")}, 8, _spikes(0, 4, 5, 7)
    ),
    "ZClip under a limit": GpuCase(
        _sizes(7, 5000, dtype=BF16),
        {"max_grad_norm": ZClip(warmup_steps=2, max_norm=75.0, alpha=0.0)},
        6,
        _spikes(0, 3),
    ),
    "ZClip and what is not finite": GpuCase(
        _sizes(7, 500), {"max_grad_norm": ZClip(warmup_steps=2)}, 6, _spoil(_nan, None, _inf, None, _inf)
    ),
    "ZClip that propagates": GpuCase(
        _sizes(7, 500),
        {"max_grad_norm": ZClip(warmup_steps=1), "nonfinite": "propagate"},
        4,
        _spoil(None, None, _inf),
    ),
    "ZClip under a scaler": GpuCase(
        _sizes(7, 5000), {"max_grad_norm": ZClip(warmup_steps=1)}, 7, _SCALED, grad_size=1000.0
    ),
    "ZClip, gradients of 0": GpuCase(
        _sizes(7, 50), {"max_grad_norm": ZClip(warmup_steps=2)}, 4, grad_size=0.0
    ),
    "ZClips of scopes": GpuCase(
        _guarded_adapters, {"max_grad_norm": ZClip(warmup_steps=2)}, 8, _spiking_adapters
    ),
    "ZClips of 600 groups": GpuCase(
        lambda make: [
            {"params": [make(1 + i % 3)] if i % 5 else [], "max_grad_norm": ZClip(warmup_steps=1 + i % 3)}
            for i in range(600)
        ],
        {"groups": "independent"},
        4,
        _spikes(2),
        large=True,
    ),
}
GPU_CASES |= {
    "joint groups": GpuCase(
        lambda make: [
            {"params": [make(5), make(4100)], "lr": 0.1},
            {"params": []},
            {"params": [make(8, BF16)], "schedule": fusedlr.linear(total_steps=5)},
            {"params": [make(0)]},
            {"params": [make(4097)], "maximize": True},
        ],
        CLIP,
        4,
        _some_without,
    ),
    "independent groups": GpuCase(
        lambda make: [
            {"params": [make(5), make(4100)], "lr": 0.1, "max_grad_norm": 0.5},
            {"params": []},
            {"params": [make(8)], "schedule": fusedlr.table(lambda k: 1 / (2 + k), total_steps=9)},
            {"params": [make(0)]},
            {"params": [make(9000)], "maximize": True, "max_grad_norm": 3.0},
        ],
        {"groups": "independent"},
        4,
        _some_without,
    ),
    "no gradient at all": GpuCase(_sizes(5, 7), CLIP, 3, _no_gradient(1)),
    "no gradient at all at the first step": GpuCase(_sizes(5, 7), {}, 2, _no_gradient(0)),
    "no gradient at all, independent groups": GpuCase(
        lambda make: [{"params": [make(5)]}, {"params": [make(7)], "lr": 0.1}],
        {"groups": "independent"},
        3,
        _no_gradient(0, 2),
    ),
    "only empty tensors": GpuCase(_sizes(0, 0), CLIP, 2),
    "rates in tensors": GpuCase(
        lambda make: [
            {"params": [make(5), make(4100)], "lr": torch.tensor(0.03)},
            {"params": [make(5)], "lr": 0.01},
        ],
        {"schedule": None, **CLIP, "lr": torch.tensor(0.02)},
    ),
    "scopes one after the other": GpuCase(_adapters, CLIP, 6, _one_after_the_other),
    "scopes chosen on the device": GpuCase(_adapters, CLIP, 4, _chosen_on_the_device),
    "scopes that lose their gradients": GpuCase(_adapters, CLIP, 3, _some_without),
    "scopes under a scaler": GpuCase(_adapters, CLIP, 3, _scaled_scopes, grad_size=64.0),
    "scopes under a scaler that propagate": GpuCase(
        _adapters, {**CLIP, "nonfinite": "propagate"}, 3, _scaled_scopes, grad_size=64.0
    ),
    "mixed": GpuCase(_mixed(), CLIP, 4, _SCALED),
    "mixed, 16-bit moments, independent": GpuCase(
        _mixed(max_grad_norm=0.5), {"groups": "independent", "state_dtype": "param"}, 4, _first_scope_is_inf
    ),
}


# where things lie, and how many there are


def _transpose(optimizer: Any, k: int, params: list[Tensor]) -> None:
    for p in params:
        p.grad = p.grad.t().contiguous().t()


def _share_a_gradient(optimizer: Any, k: int, params: list[Tensor]) -> None:
    params[1].grad = params[0].grad


def _after(updates: int) -> Before:
    """As if the tensors had been updated so often when the second step is made."""

    def before(optimizer: Any, k: int, params: list[Tensor]) -> None:
        for p in params if k == 1 else ():
            optimizer.state[p]["step"].fill_(updates)

    return before


def _many(
    count: int, *more: int, dtype: torch.dtype = F32, **limits: float
) -> Callable[[Make], list[dict[str, Any]]]:
    return lambda make: [
        {"params": [make(1 + i % 3, dtype) for i in range(n)], **limits} for n in (count, *more)
    ]


def _of_all_types(amsgrad: bool, count: int = 493) -> Callable[[Make], list[dict[str, Any]]]:
    """Tensors of every type; 493 are one gradient more than the smaller launch of CUDA carries."""
    dtypes = F32, BF16, F16
    return lambda make: [
        {"params": [make(1 + i % 5, dtypes[i % 3]) for i in range(count)], "amsgrad": amsgrad}
    ]


def _nan_of_one_group(optimizer: Any, k: int, params: list[Tensor]) -> None:
    if k == 0:
        params[7].grad.fill_(math.nan)


GPU_CASES |= {
    "gradients in another order": GpuCase(_sizes((40, 60), (3, 5)), CLIP, 3, _transpose),
    "one gradient for two": GpuCase(_sizes(50, 50), CLIP, 3, _share_a_gradient),
    # as many addresses as the smaller launch of CUDA carries, and more than the larger one does
    "492 gradients": GpuCase(_many(492), CLIP, 1, large=True),
    "4100 gradients": GpuCase(_many(4100), CLIP, 1, large=True),
    # more slots in a scope than a block adds up in one round
    "2200 gradients, independent": GpuCase(
        _many(1050, 1150, max_grad_norm=0.1), {"groups": "independent"}, 1, large=True
    ),
    **{
        ", ".join(filter(None, ("493 gradients", top, moments, master))): GpuCase(
            _of_all_types(bool(top)),
            {**CLIP, "state_dtype": "param" if moments else None, "master_weights": bool(master)},
            1,
            large=True,
        )
        for top in ("", "amsgrad")
        for moments in ("", "16-bit moments")
        for master in ("", "master")
    },
    # kernels that record, of all kinds; other compilers make them of one source, and take longer
    **{
        ", ".join(
            filter(None, ("60 gradients, record" if few else "493 gradients, record", top, moments, master))
        ): GpuCase(
            _of_all_types(bool(top), 60 if few else 493),
            {
                **CLIP,
                "state_dtype": "param" if moments else None,
                "master_weights": bool(master),
                "record": fusedlr.Record(2),
            },
            1,
            large=True,
            backends=("cuda",),
        )
        for top in ("", "amsgrad")
        for moments in ("", "16-bit moments")
        for master in ("", "master")
        for few in ("", "few")
    },
    # scopes that end anywhere in a round of lanes, and more chunks than a round of unrolled loads
    "scopes of many chunks": GpuCase(
        _many(276, 148, max_grad_norm=0.1), {"groups": "independent"}, 2, large=True
    ),
    "bf16, scopes of many chunks": GpuCase(
        _many(66, 70, dtype=BF16, max_grad_norm=0.1), {"groups": "independent"}, 1, large=True
    ),
    **{f"{n} groups": GpuCase(_many(*range(1, n + 1)), CLIP, 2) for n in (2, 3, 4)},
    # more than a block has threads, of as many tensors as the smaller launch of CUDA carries
    "300 groups": GpuCase(_many(*[1] * 300), {**CLIP, "lr": 0.003}, 2, large=True),
    "300 groups, independent": GpuCase(
        _many(*[1] * 300, max_grad_norm=0.1), {"groups": "independent"}, 1, large=True
    ),
    # and more than the smaller one carries
    "600 groups": GpuCase(
        lambda make: [{"params": [make(1 + i % 3)], "lr": 0.001 * (1 + i)} for i in range(600)],
        {"schedule": None, **CLIP},
        2,
        large=True,
    ),
    "600 groups, independent": GpuCase(
        lambda make: [
            {"params": [make(1 + i % 3)] if i % 5 else [], "max_grad_norm": 0.01 * (1 + i) if i % 3 else None}
            for i in range(600)
        ],
        {"groups": "independent"},
        2,
        _nan_of_one_group,
        large=True,
    ),
    **{
        f"after {n} updates": GpuCase(_sizes(5, 100, betas=(0.9, 0.9999)), CLIP, 3, _after(n))
        for n in (99, 4095, 100_000, 16_000_000)
    },
}


def _by_chance(seed: int) -> GpuCase:
    """Anything with anything."""
    r = random.Random(seed)
    sizes, dtypes = (1, 2, 7, 8, 100, 1000, 4095, 4096, 4097, 5001, 8192, 12289), (F32, F32, BF16, F16)
    shapes = [(r.choice(sizes), r.choice(dtypes)) for _ in range(r.randint(1, 9))]
    schedules = (
        None,
        SCHEDULE,
        fusedlr.linear(total_steps=3),
        fusedlr.polynomial(total_steps=6, power=2.5),
        fusedlr.inverse_sqrt(warmup_steps=1),
        fusedlr.cosine_with_restarts(total_steps=9, num_cycles=3),
    )
    independent = r.random() < 0.5
    kinds = []
    while shapes:
        count = r.randint(0, len(shapes))
        own, shapes = shapes[:count], shapes[count:]
        kind = {
            "lr": r.choice((0.1, 0.003)),
            "amsgrad": r.random() < 0.4,
            "maximize": r.random() < 0.3,
            "schedule": r.choice(schedules),
            "betas": (r.choice((0.0, 0.9)), r.choice((0.95, 0.999))),
        }
        if independent:
            kind["max_grad_norm"] = r.choice((None, 0.1, 10.0, math.inf))
        kinds.append((own, kind))
    options = {
        "groups": "independent" if independent else "joint",
        "nonfinite": r.choice((None, "skip", "propagate")),
        "state_dtype": r.choice((None, "param")),
    }
    if not independent:
        options["max_grad_norm"] = r.choice((None, 0.1, 10.0))
    events = [
        (r.random() < 0.3, r.choice((math.inf, math.nan)), r.random() < 0.3, r.random() < 0.2)
        for _ in range(4)
    ]
    scaled = r.random() < 0.5

    def before(optimizer: Any, k: int, params: list[Tensor]) -> None:
        spoil, value, drop, found = events[k]
        if spoil:
            params[k % len(params)].grad.view(-1)[-1] = value
        if drop:
            params[-1].grad = None
        if scaled:
            _scaler((8.0,), (float(found),))(optimizer, k, params)

    return GpuCase(
        lambda make: [{"params": [make(*shape) for shape in own], **kind} for own, kind in kinds],
        options,
        4,
        before,
        grad_offset=r.choice((0, 0, 1, 4)),
        param_offset=r.choice((0, 0, 1, 8)),
    )


GPU_CASES |= {f"by chance {seed}": _by_chance(seed) for seed in range(14)}


def run(case: GpuCase, backend: str, double: bool = False) -> tuple[list[torch.nn.Parameter], Any]:
    """The parameters and the optimizer after a case's steps; `double`: in fp64, from the same numbers."""
    generator = torch.Generator().manual_seed(7)
    params: list[torch.nn.Parameter] = []

    def placed(values: Tensor, dtype: torch.dtype, offset: int) -> Tensor:
        """In memory that is nan around them."""
        values = values.to(dtype)
        memory = torch.full(
            (values.numel() + offset + 8,), math.nan, dtype=torch.float64 if double else dtype
        )
        return memory[offset : offset + values.numel()].view(values.shape).copy_(values)

    dtypes = []

    def make(shape: Any, dtype: torch.dtype = F32) -> torch.nn.Parameter:
        params.append(
            torch.nn.Parameter(placed(torch.randn(shape, generator=generator), dtype, case.param_offset))
        )
        dtypes.append(dtype)
        return params[-1]

    options = {"lr": 0.01, "schedule": SCHEDULE, **case.options}
    if double:
        options.pop("state_dtype", None)
    optimizer = fusedlr.FusedAdamW(case.groups(make), backend=backend, **options)
    for k in range(case.steps):
        for p, dtype in zip(params, dtypes, strict=True):
            values = torch.randn(p.shape, generator=generator) * case.grad_size
            p.grad = placed(values, dtype, case.grad_offset)
        case.before(optimizer, k, params)
        optimizer.step()
    return params, optimizer
