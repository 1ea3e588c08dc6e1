"""Who can run a step on given devices and dtypes, and why the others cannot."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from fusedlr import arguments
from fusedlr.backends import cpu
from fusedlr.backends.gpu import cuda, triton
from fusedlr.reference import ReferenceStepper, Stepper
from fusedlr.warn import warn


class FallbackWarning(UserWarning):
    """`backend="auto"` found nothing faster than the reference; the message says why."""


@dataclass(frozen=True)
class Backend:
    """A way to make the step of `reference.py`."""

    name: str
    # (rows, counters, inputs) -> what makes steps on these rows
    prepare: Callable[..., Stepper]
    # devices of the tensors -> why it cannot run there, or None if it can
    why_not: Callable[[Iterable[torch.device]], str | None]
    # whether what a step used is kept in fp32: its kernels have no fp64
    single: bool = False


# fastest first: `auto` takes the first that can run
BACKENDS = {
    backend.name: backend
    for backend in (
        # before Triton, which on the CPU is an interpreter
        Backend("cpu", cpu.prepare, cpu.why_not),
        Backend("cuda", cuda.prepare, cuda.why_not, single=True),
        Backend("triton", triton.prepare, triton.why_not, single=True),
        Backend("reference", ReferenceStepper, lambda devices: None),
    )
}


def check_name(name: str, source: str = "backend") -> str:
    """`name` if it is a backend or `auto`, else ValueError."""
    return arguments.choice(source, name, ("auto", *BACKENDS), show=str)


def reasons(devices: Iterable[torch.device]) -> dict[str, str | None]:
    """For every backend why it cannot run on `devices`, or None where it can."""
    devices = tuple(devices)
    return {name: backend.why_not(devices) for name, backend in BACKENDS.items()}


def requested(name: str) -> tuple[str, str]:
    """The backend to look for, and where it was asked for: `FUSEDLR_BACKEND` overrides the argument."""
    override = os.environ.get("FUSEDLR_BACKEND")
    return (override, "FUSEDLR_BACKEND") if override else (name, "backend")


def choose(name: str, devices: Iterable[torch.device]) -> Backend:
    """The backend called `name`, or the fastest that can run for `auto`. `FUSEDLR_BACKEND` overrides `name`.

    Raises:
        ValueError: no backend has that name.
        RuntimeError: a backend asked for by name cannot run; says why.
    """
    name, source = requested(name)
    check_name(name, source)
    why_not = reasons(devices)
    if name == "auto":
        return next(BACKENDS[candidate] for candidate, reason in why_not.items() if reason is None)
    if why_not[name] is not None:
        raise RuntimeError(f"{source}={name!r} cannot run here: {why_not[name]}")
    return BACKENDS[name]


def warn_fallback(devices: Iterable[torch.device]) -> None:
    """Say why `auto` ended at the reference; an optimizer does so at its first step."""
    why = "; ".join(f"{name}: {reason}" for name, reason in reasons(devices).items() if reason)
    warn(f"fusedlr runs its reference step in plain PyTorch ({why})", FallbackWarning)
