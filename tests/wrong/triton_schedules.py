"""Wrong spellings of the schedule in Triton that the harness must reject: one edit each to its source."""

from __future__ import annotations

# name -> (what the spelling says, what the wrong one says)
EDITS = {
    "not clamped past the end": ("tl.minimum(tl.maximum(k, tl.load(ints + BEGIN)), end)", "k"),
    "end of the phase before its origin": ("        end - origin,", "        end,"),
    "step counter in fp32": ("- origin\n    w0", "- origin\n    e = real(e).to(tl.int64)\n    w0"),
    "32-bit product of waves and steps": (
        "q = whole * e % (2 * n)",
        "q = (whole * e).to(tl.int32).to(tl.int64) % (2 * n)",
    ),
    "waves not folded": ("q = tl.where(q > n, 2 * n - q, q)", "q = q * 1"),
    "part of a wave dropped": ("if part == 0:", "if part < 2:"),
    "restarts as waves": ("if shape == RESTARTS:", "if shape == TABLE:"),
    "cosine as 1 - sin**2": ("tl.minimum(crest, trough)", "crest * 1.0"),
    "weights swapped": (
        "        w0 = remaining\n        w1 = elapsed",
        "        w0 = elapsed\n        w1 = remaining",
    ),
    "linear as 1 - progress": ("        w0 = remaining\n", "        w0 = 1.0 - elapsed\n"),
    "power of the elapsed share": (
        "power(remaining, param_hi, param_lo)",
        "1.0 - power(elapsed, param_hi, param_lo)",
    ),
    "1-sqrt as written": ("w0 = tl.div_rn(remaining, 1.0 + w1)", "w0 = 1.0 - w1"),
    "table one ahead": ("table + whole + e", "table + tl.minimum(whole + e + 1, whole + n)"),
    "table from its start": ("table + whole + e", "table + e"),
    "floor forgotten": ("+ tl.load(floats + TO) * w1", "+ 0.0 * w1"),
}

_COSINES = ("cosine, waves", "cosine, very long", "cosine, uneven waves", "cosine, one wave", "cosine, long")
# schedules of the zoo that show a mistake; the others need not be evaluated
SHOWN_BY = {
    "not clamped past the end": ("linear",),
    "end of the phase before its origin": ("cosine",),
    "step counter in fp32": ("linear, long", "cosine, long"),
    "32-bit product of waves and steps": _COSINES,
    "waves not folded": _COSINES,
    "part of a wave dropped": _COSINES,
    "restarts as waves": ("restarts, 3 cycles",),
    "cosine as 1 - sin**2": ("cosine",),
    "weights swapped": ("linear",),
    "linear as 1 - progress": ("linear",),
    "power of the elapsed share": ("polynomial, square",),
    "1-sqrt as written": ("wsd, long", "wsd linear, 1-sqrt"),
    "table one ahead": ("table",),
    "table from its start": ("table",),
    "floor forgotten": ("cosine, min_lr_ratio",),
}
