"""Wrong Triton steps that the suite must reject: one edit each to the source of the kernels."""

from __future__ import annotations

# name -> (what the kernels say, what the wrong ones say)
EDITS = {
    "eps under the root": (
        "tl.div_rn(tl.sqrt_rn(top), root_bc2) + eps",
        "tl.div_rn(tl.sqrt_rn(top + eps), root_bc2)",
    ),
    "decay into the gradient": ("p = p - decay * p", "g = g + decay * p"),
    "betas swapped": ("m = m + (g - m) * one_b1", "m = m + (g - m) * one_b2"),
    "second moment of the mean": ("(one_b2 * g) * g", "(one_b2 * g) * m"),
    "amsgrad forgets": ("top = tl.where((v <= top) | (top != top), top, v)", "top = v"),
    "bias correction counts from 0": (
        ".to(tl.pointer_type(tl.float32))) + 1.0\n    bc1",
        ".to(tl.pointer_type(tl.float32))) + 0.5\n    bc1",
    ),
    "maximize ignored": ("factor * tl.load(floats + SIGN)", "factor * 1.0"),
    "clipping without the epsilon": ("norm + CLIP_EPS", "norm"),
    "clipping that scales up": ("(coef > 1) | (limit", "(coef > 1e9) | (limit"),
    "norm of scaled gradients": (
        "factor = tl.div_rn(1.0, tl.load(grad_scale))\n    wide",
        "factor = 1.0\n    wide",
    ),
    "scaled gradients": ("tl.div_rn(1.0, tl.load(grad_scale)) * coef)", "coef)"),
    "norm without tails": ("tl.sum(squares) + tl.sum(rest)", "tl.sum(squares)"),
    "skip only above 0": ("tl.load(found_inf + scope * 0) != 0", "tl.load(found_inf + scope * 0) > 0"),
    "inf is applied": ('~(tl.abs(norm) < float("inf"))', "(norm != norm)"),
    "a skipped step updates": ("if (left > 0) & (~skip):", "if left > 0:"),
    "counters moved by the first program": ("== programs - 1", "== 0"),
    "counters moved by every launch": (
        'sem="acq_rel", scope="gpu") == programs - 1',
        'sem="acq_rel", scope="gpu") >= 0',
    ),
    "tickets not handed back": ("        tl.store(ticket, 0)", "        tl.store(ticket, 1)"),
    "skipped step moves the schedule": ("tl.load(row + ADVANCE) * (1 - skipped)", "tl.load(row + ADVANCE)"),
    "skipped step counts for the bias": ("inside = inside & ~skip", "inside = inside & (group >= 0)"),
    "inactive groups count": (
        "inside = inside & (tl.load(row + ACTIVE) != 0)",
        "inside = inside & (group >= 0)",
    ),
    "tail of the tensor left out": (
        "(wide <= i * NARROW) & (i * NARROW < left)",
        "(wide <= i * NARROW) & (i * NARROW + NARROW <= left)",
    ),
    "chunks start at 0": (
        "tl.load(chunk + INDEX).to(tl.int64) * CHUNK",
        "tl.load(chunk + INDEX).to(tl.int64) * 0",
    ),
}

# partial sums of more than 4 million elements: too many for the interpreter, so a test calls the sum alone
SUM_EDITS = {
    "norm of the first partial sums": ("        slot += SUMS", "        slot = last"),
    "norm past its last slot": (
        "mask=slot + lanes < last, other=0.0",
        "mask=slot + lanes < last + 1, other=0.0",
    ),
}
