"""Who can make a step: stock torch in its spellings, fusedlr on each backend, and other packages' AdamW.

A provider is given parameters and makes clip, AdamW and schedule out of the same numbers, as its users would
write them. Gradients are there already and are not zeroed by anybody.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch.nn.utils import clip_grad_norm_
from torch.optim.lr_scheduler import LambdaLR

import fusedlr
from fusedlr import backends

BASELINE = "fused"
# What everybody computes. Large enough that a slip in any of them is far above rounding, see parity.py. The
# schedule ends early, at a rate that is not 0: the timed steps come after its end
OPTIONS: dict[str, Any] = {"lr": 0.1, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.5}
MAX_NORM = 1.0
WARMUP_STEPS, TOTAL_STEPS, MIN_LR_RATIO = 2, 6, 0.1


@dataclass
class Stepper:
    """One optimizer at work: `step()` clips, updates and moves the schedule on."""

    params: list[torch.nn.Parameter]
    optimizer: Any
    step: Callable[[], Any]
    # what of it a CUDA graph can hold, None where nothing can
    capturable: Callable[[], Any] | None = None

    def state_bytes(self) -> int:
        """Bytes of memory behind all state tensors; several may lie in one."""
        tensors = [x for state in self.optimizer.state.values() for x in _tensors(state)]
        return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())

    def bytes_per_step(self, clip: bool) -> int:
        """Memory traffic of an ideal step: every parameter and moment read and written, every gradient read.

        28 bytes per fp32 parameter. With clipping the gradients are read once more, for the norm: 32.
        """
        total = 0
        for p in self.params:
            assert p.grad is not None
            moments = [x for x in _tensors(self.optimizer.state[p]) if x.shape == p.shape]
            total += 2 * p.nbytes + (2 if clip else 1) * p.grad.nbytes + 2 * sum(x.nbytes for x in moments)
        return total


def _tensors(state: dict[str, Any]) -> list[torch.Tensor]:
    return [x for x in state.values() if isinstance(x, torch.Tensor)]


@dataclass(frozen=True)
class Provider:
    """A way to make the step."""

    name: str
    # (params, clip) -> Stepper
    build: Callable[[list[torch.nn.Parameter], bool], Stepper]
    # device -> why it cannot run there, or None if it can
    why_not: Callable[[torch.device], str | None] = lambda device: None
    # only when asked for by name
    slow: bool = False


def warmup_cosine(step: int, warmup: int, total: int, min_lr_ratio: float) -> float:
    """The factor that transformers' get_cosine_with_min_lr_schedule_with_warmup gives to LambdaLR."""
    if step < warmup:
        return step / max(1, warmup)
    progress = (step - warmup) / max(1, total - warmup)
    factor = 0.5 * (1.0 + math.cos(math.pi * 0.5 * 2.0 * progress))
    return max(0.0, factor * (1 - min_lr_ratio) + min_lr_ratio)


def schedule_of(optimizer: Any) -> LambdaLR:
    """The schedule on the host, for everybody who has none of their own."""
    factor = partial(warmup_cosine, warmup=WARMUP_STEPS, total=TOTAL_STEPS, min_lr_ratio=MIN_LR_RATIO)
    return LambdaLR(optimizer, factor)


def with_scheduler(
    params: list[torch.nn.Parameter], optimizer: Any, clip: bool, clip_foreach: bool | None = None
) -> Stepper:
    """clip_grad_norm_, then the optimizer's step, then LambdaLR's."""
    scheduler = schedule_of(optimizer)

    def step() -> None:
        if clip:
            clip_grad_norm_(params, MAX_NORM, foreach=clip_foreach)
        optimizer.step()
        scheduler.step()

    return Stepper(params, optimizer, step)


def _stock(kind: str) -> Provider:
    # the baseline clips as clip_grad_norm_ does when left to itself
    options = {
        "forloop": ({"foreach": False, "fused": False}, False),
        "foreach": ({"foreach": True}, True),
        "fused": ({"fused": True}, None),
    }
    kernel, clip_foreach = options[kind]

    def build(params: list[torch.nn.Parameter], clip: bool) -> Stepper:
        return with_scheduler(params, torch.optim.AdamW(params, **kernel, **OPTIONS), clip, clip_foreach)

    return Provider(kind, build)


def _capturable(params: list[torch.nn.Parameter], clip: bool) -> Stepper:
    # on the device, as a graph would freeze a number; the schedule writes it from the host
    options = OPTIONS | {"lr": torch.tensor(OPTIONS["lr"], device=params[0].device)}
    optimizer = torch.optim.AdamW(params, capturable=True, **options)
    scheduler = schedule_of(optimizer)

    def update() -> None:
        if clip:
            clip_grad_norm_(params, MAX_NORM)
        optimizer.step()

    def step() -> None:
        update()
        scheduler.step()

    return Stepper(params, optimizer, step, update)


def _compiled(params: list[torch.nn.Parameter], clip: bool) -> Stepper:
    # a tensor, so that a new rate is no reason to compile again
    options = OPTIONS | {"lr": torch.tensor(OPTIONS["lr"], device=params[0].device)}
    optimizer = torch.optim.AdamW(params, **options)
    scheduler = schedule_of(optimizer)

    @torch.compile
    def update() -> None:
        if clip:
            clip_grad_norm_(params, MAX_NORM)
        optimizer.step()

    def step() -> None:
        update()
        scheduler.step()

    return Stepper(params, optimizer, step)


def _ours(backend: str, tag: str = "", **options: Any) -> Provider:
    """Ours on a backend, with more options under a `tag`."""

    def build(params: list[torch.nn.Parameter], clip: bool) -> Stepper:
        schedule = fusedlr.cosine(WARMUP_STEPS, TOTAL_STEPS, min_lr_ratio=MIN_LR_RATIO)
        optimizer = fusedlr.FusedAdamW(
            params,
            **OPTIONS,
            schedule=schedule,
            max_grad_norm=MAX_NORM if clip else None,
            backend=backend,
            **options,
        )
        return Stepper(params, optimizer, optimizer.step, optimizer.step)

    def why_not(device: torch.device) -> str | None:
        override = os.environ.get("FUSEDLR_BACKEND")
        if override and override != backend:
            return f"FUSEDLR_BACKEND={override} overrides it"
        return backends.reasons([device])[backend]

    if tag:
        # only by name
        return Provider(f"fusedlr-{backend}-{tag}", build, why_not, slow=True)
    return Provider(f"fusedlr-{backend}", build, why_not)


def _third_party(
    name: str, package: str, make: Callable[[Any], Any], slow: bool = False, only_on: str | None = None
) -> Provider:
    """Somebody else's AdamW from `package`, with torch's clipping and scheduler around it.

    `only_on` is the type of the only device that it supports; None where a trial step is to find out.
    """

    def build(params: list[torch.nn.Parameter], clip: bool) -> Stepper:
        return with_scheduler(params, make(params), clip)

    @cache
    def why_not(device: torch.device) -> str | None:
        if importlib.util.find_spec(package) is None:
            return "not installed"
        if only_on not in (None, device.type):
            return f"runs on {only_on} alone"
        if slow:
            # to try it would take longer than all the others; the gate will see
            return None
        probe = torch.nn.Parameter(torch.zeros(8, 8, device=device))
        probe.grad = torch.ones_like(probe)
        try:
            make([probe]).step()
        except Exception as error:
            # whatever keeps it from running is the answer
            return f"cannot run here: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
        return None

    return Provider(name, build, why_not, slow)


def _torchao(params: Any) -> Any:
    from torchao.optim import _AdamW

    return _AdamW(params, **OPTIONS)


def _bitsandbytes(params: Any) -> Any:
    from bitsandbytes.optim import AdamW32bit

    return AdamW32bit(params, **OPTIONS)


def _apex(params: Any) -> Any:
    from apex.optimizers import FusedAdam

    return FusedAdam(params, **OPTIONS, adam_w_mode=True)


def _deepspeed(params: Any) -> Any:
    # the first use compiles its C++ with ninja. DeepSpeed logs to the standard output it finds at its import,
    # and that of the benchmark may be JSON
    with contextlib.redirect_stdout(sys.stderr):
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(params, **OPTIONS, adamw_mode=True)


def _optimi(params: Any) -> Any:
    from optimi import AdamW

    return AdamW(params, **OPTIONS, decouple_lr=False)


PROVIDERS = {
    provider.name: provider
    for provider in (
        _stock("fused"),
        _stock("foreach"),
        _stock("forloop"),
        Provider(
            "capturable",
            _capturable,
            lambda device: (
                None if device.type == "cuda" else f"torch has no capturable AdamW on {device.type}"
            ),
        ),
        Provider("compile", _compiled, slow=True),
        *(_ours(backend) for backend in backends.BACKENDS),
        # in fp32 it is the same step
        _ours("cpu", "master", master_weights=True),
        _ours("cpu", "record", record=fusedlr.Record()),
        # its step is compiled
        _third_party("torchao", "torchao", _torchao, slow=True),
        _third_party("bitsandbytes", "bitsandbytes", _bitsandbytes),
        _third_party("apex", "apex", _apex),
        _third_party("optimi", "optimi", _optimi),
        _third_party("deepspeed", "deepspeed", _deepspeed, only_on="cpu"),
    )
}


def chosen_backend(device: torch.device) -> str:
    """The provider for what `backend="auto"` runs on the device."""
    return f"fusedlr-{backends.choose('auto', [device]).name}"


def available(device: torch.device) -> dict[str, str | None]:
    """For every provider why it cannot run on the device, or None if it can."""
    return {name: provider.why_not(device) for name, provider in PROVIDERS.items()}
