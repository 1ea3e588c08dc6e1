"""`ZClip`: a limit of the gradient norm that follows the norms of the run, and how files have it.

What it does in a step is in reference.py (`judge` and `moved`), csrc/guard.h and Triton's kernels. Nothing
here needs torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from fusedlr import arguments

# norms are counted in fp32 on a GPU, where this is the largest count that is one more than another
_MOST_WARMUP = 2**24
_ACTIONS = ("clip", "skip")


@dataclass(frozen=True)
class ZClip:
    r"""A limit for `max_grad_norm` that clips norms far above those of the steps before, and no others.

    Each scope has a mean and a variance of its own gradient norms. They stay on the device, are moved by the
    step's own kernels, and are saved in checkpoints. A step with the norm n has::

        z = (n - mean) / (sqrt(variance) + 1e-6)
        limit = mean + z_thresh**2 * sqrt(variance) / z        where z > z_thresh, else n
        gradients *= min(1, limit / (n + 1e-6))                where z > z_thresh
        mean = alpha * mean + (1 - alpha) * limit
        variance = alpha * variance + (1 - alpha) * (limit - mean)**2

    The first `warmup_steps` norms are not clipped: their mean and variance are what the run begins with. A
    norm that is not finite is left out. This is the adaptive scaling of Kumar et al. 2025, arXiv:2504.02507.

    Where another `ZClip` or a number is assigned during a run, the mean and the variance stay as they are,
    and the next `ZClip` goes on with them; `reset_scope` begins them anew.

    Args:
        alpha: how much of mean and variance a step keeps, in [0, 1).
        z_thresh: a norm that is more than so many standard deviations above the mean is a spike, > 0.
        warmup_steps: norms before the first that may be clipped, from 1 to 2**24.
        max_norm: a norm that is never exceeded, from the first step on, > 0; None is no such norm.
        action: `"clip"`, or `"skip"`: a step whose norm is a spike is not made, counts as skipped, and is
            left out of mean and variance.

    Raises:
        ValueError: an argument is out of range.

    >>> import torch, fusedlr
    >>> p = torch.nn.Parameter(torch.zeros(1))
    >>> optimizer = fusedlr.FusedAdamW([p], lr=0.1, max_grad_norm=fusedlr.ZClip(warmup_steps=4))
    >>> for norm in (1.0, 2.0, 1.0, 2.0, 50.0):
    ...     p.grad = torch.full((1,), norm)
    ...     optimizer.step()
    >>> round(optimizer.last_metrics()["limit"], 4)
    1.5322
    """

    alpha: float = 0.97
    z_thresh: float = 2.5
    warmup_steps: int = 25
    max_norm: float | None = None
    action: str = "clip"

    def __post_init__(self) -> None:
        """Check the values and make them plain."""
        alpha = arguments.ratio("alpha", self.alpha)
        if alpha == 1:
            raise ValueError(f"alpha={arguments.shown(self.alpha)} must be below 1: it is the share kept")
        object.__setattr__(self, "alpha", alpha)
        object.__setattr__(self, "z_thresh", arguments.positive("z_thresh", self.z_thresh))
        warmup = arguments.count("warmup_steps", self.warmup_steps, 1, _MOST_WARMUP)
        object.__setattr__(self, "warmup_steps", warmup)
        if self.max_norm is not None:
            object.__setattr__(self, "max_norm", arguments.positive("max_norm", self.max_norm))
        arguments.choice("action", self.action, _ACTIONS)

    def capped(self, norm: float | None) -> ZClip:
        """The same with a `max_norm` of at most this norm; None leaves it as it is."""
        least = min((x for x in (self.max_norm, norm) if x is not None), default=None)
        return self if least == self.max_norm else replace(self, max_norm=least)


def max_grad_norm(value: Any) -> float | ZClip | None:
    """What a `max_grad_norm` may be: a `ZClip`, a float above 0 or None, else ValueError."""
    return value if isinstance(value, ZClip) else arguments.max_grad_norm(value)


def fixed_part(limit: float | ZClip | None) -> float | None:
    """The norm that is never exceeded; inf where the norm is needed and may be any."""
    if isinstance(limit, ZClip):
        return math.inf if limit.max_norm is None else limit.max_norm
    return limit


def to_numbers(limit: float | ZClip | None) -> dict[str, Any]:
    """A limit in plain values for a file; readers that know of no `ZClip` find the norm that caps it."""
    plain: dict[str, Any] = {"max_grad_norm": fixed_part(limit)}
    if isinstance(limit, ZClip):
        plain["zclip"] = asdict(limit)
    return plain


def from_numbers(saved: Mapping[str, Any]) -> float | ZClip | None:
    """The limit that `to_numbers` has written, else ValueError."""
    zclip = saved.get("zclip")
    if zclip is None:
        return arguments.max_grad_norm(saved.get("max_grad_norm"))
    known = {field.name for field in fields(ZClip)}
    if not isinstance(zclip, Mapping) or not known.issuperset(zclip):
        raise ValueError(f"zclip={arguments.shown(zclip)} must be a dict with keys among {sorted(known)}")
    return ZClip(**zclip)
