"""Wrong optimizer steps that the harness must reject: one edit each to the source of the reference.

Each is a mistake that somebody's optimizer has made. An edit that no longer applies is an error, so the list
keeps up with the source.
"""

from __future__ import annotations

import inspect
import sys
import types

from fusedlr import reference

# name -> (what the reference says, what the wrong step says)
EDITS = {
    "eps under the root": ("bc2.sqrt().to(dtype) + group.eps", "(bc2 + group.eps).sqrt().to(dtype)"),
    "no correction of the first moment": ("(lr / bc1).to(dtype)", "lr.to(dtype)"),
    "no correction of the second moment": ("divisor.sqrt() / bc2.sqrt().to(dtype)", "divisor.sqrt()"),
    "bias correction counts from 0": ("t = row.step + ~skip", "t = (row.step + ~skip - 1).clamp(min=1)"),
    "decay into the gradient": (
        "p = p - (lr * group.weight_decay).to(dtype) * p",
        "g = g + group.weight_decay * p",
    ),
    "decay without the rate": ("(lr * group.weight_decay).to(dtype) * p", "group.weight_decay * p"),
    "decay at the peak": ("(lr * group.weight_decay)", "(lr * 0 + group.peak * group.weight_decay)"),
    "betas swapped": ("b1, b2 = group.betas", "b2, b1 = group.betas"),
    "small b1 loses a small gradient": (
        "m = m + (g - m) * (1 - b1) if 1 - b1 < 0.5 else g - (g - m) * b1",
        "m = m + (g - m) * (1 - b1)",
    ),
    "second moment of the mean": ("((1 - b2) * g) * g", "((1 - b2) * g) * m"),
    "maximize ignored": ("if group.maximize:", "if False:"),
    "amsgrad forgets": ('torch.maximum(_compute(state["max_exp_avg_sq"]), v)', "v"),
    "clipping without the epsilon": ("(norm + CLIP_EPS)", "norm"),
    "clipping that scales up": (".clamp(max=1)", ".clamp(max=1e9)"),
    "norm of the first tensor": ("for grad in grads:\n", "for grad in list(grads)[:1]:\n"),
    "norm per group": (
        "for row in rows if groups[row.group].scope == i and row.counted]",
        "for row in rows if row.group == i]",
    ),
    "warm-up off by one": (
        "counters.k[i], group.schedule.table",
        "counters.k[i] + 1, group.schedule.table",
    ),
    "schedule that counts gradients": (
        "counters.k[i] += made",
        "counters.k[i] += any(row.group == i and row.grad is not None for row in rows)",
    ),
    "skipped step moves the schedule": ("counters.k[i] += made", "counters.k[i] += 1"),
    "skipped step counts for the bias": ("t = row.step + ~skip", "t = row.step + 1"),
    "skip only at 1": ("xp.scalar(signals.found_inf) != 0", "xp.scalar(signals.found_inf) == 1"),
    "skip only above 0": ("xp.scalar(signals.found_inf) != 0", "xp.scalar(signals.found_inf) > 0"),
    "inf is applied": ("bad = ~torch.isfinite(norm)", "bad = torch.isnan(norm)"),
    "norm of scaled gradients": ("if g is not None], factor, xp)", "if g is not None], None, xp)"),
    "scaled gradients": ("factor = coef if factor is None else factor * coef", "factor = coef"),
    "skip by a product": (
        "old.copy_(torch.where(skip, old, value.to(old.dtype)))",
        "old.add_((value.to(old.dtype) - old) * ~skip)",
    ),
}

# the same for what a ZClip does, which stock torch has nothing of
GUARD_EDITS = {
    "limit of a threshold": ("zclip.z_thresh * zclip.z_thresh * deviation / z", "zclip.z_thresh * deviation"),
    "variance by the old mean": (
        "torch.where(warm, left, above) * left",
        "torch.where(warm, above, above) * left",
    ),
    "variance of a sample": (
        "spike = (seen >=",
        "deviation = deviation * (seen / (seen - 1)).sqrt()\n    spike = (seen >=",
    ),
    "spikes move the mean whole": ("moved(norms.to(xp.dtype), held,", "moved(norms.to(xp.dtype), norm,"),
    "skipped spikes are seen": ("enters = ~skip & torch.isfinite(norm)", "enters = torch.isfinite(norm)"),
    "spikes below the mean": ("(z > zclip.z_thresh)", "(z.abs() > zclip.z_thresh)"),
    "one norm too late": ("(seen >= zclip.warmup_steps) &", "(seen > zclip.warmup_steps) &"),
    "warm-up of running averages": (
        "torch.where(warm, 1 - zclip.alpha, 1 / (seen + 1))",
        "torch.full_like(seen, 1 - zclip.alpha)",
    ),
    "max_norm from the first spike on": (
        "highest = torch.where(spike, limit, highest)",
        "highest = torch.where(spike, limit, math.inf)",
    ),
}

# right numbers, but the host waits for the device
SYNCS = {
    "host decides to skip": (
        "bad = ~torch.isfinite(norm)",
        "bad = torch.full_like(no, not math.isfinite(norm.item()))",
    ),
}


def load(name: str, edits: dict[str, tuple[str, str]] = EDITS) -> types.ModuleType:
    """The reference with one edit, as a module."""
    right, wrong = edits[name]
    source = inspect.getsource(reference)
    assert source.count(right) == 1, f"{name!r} does not apply: {source.count(right)} times {right!r}"
    module = types.ModuleType("wrong_reference")
    # dataclasses look their module up
    sys.modules[module.__name__] = module
    exec(compile(source.replace(right, wrong), f"wrong: {name}", "exec"), module.__dict__)
    return module
