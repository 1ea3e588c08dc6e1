"""Wrong spellings of the schedule that the harness must reject: one edit each to the source of the fp32 one.

Each is a mistake that somebody's schedule has made, or a formula that is right in fp64 and not in fp32. An
edit that no longer applies is an error, so the list keeps up with the source.
"""

from __future__ import annotations

import inspect
import types

from schedule import schedule_numpy

_FALLS = "(phase.from_ > phase.to)"
_W0 = "w0 = np.sin(HALF_PI * angle(phase, e, n, remaining=True)) ** 2"
_RESTART = """q = int(phase.shape_param) * e % n
        return real(n - q if remaining else q) / real(n)"""

# name -> (what the fp32 spelling says, what the wrong one says)
EDITS = {
    # steps
    "warm-up off by one": ("np.clip(k, ", "np.clip(k + (phase.from_ < phase.to), "),
    "progress (k+1)/T": ("np.clip(k, ", f"np.clip(k + {_FALLS}, "),
    "progress k/T with warm-up": (
        "in enumerate(schedule.phases)",
        "in enumerate(Phase(**{**vars(p), 'origin': min(p.origin, 0)}) if p.from_ > p.to else p"
        " for p in schedule.phases)",
    ),
    "not clamped past the end": ("phase.end) -", "phase.end if phase.shape == 'table' else 2**62) -"),
    "not clamped before the start": (
        "np.clip(k, phase.begin,",
        "np.clip(k, phase.begin if phase.shape == 'table' else -(2**40),",
    ),
    "<= at the end of warm-up": ("k >= phase.begin", "k > phase.begin"),
    "restarts without an end": (
        "enumerate(schedule.phases)",
        "enumerate(schedule.phases[: -1 if schedule.phases[-2:][0].shape == 'restarts' else None])",
    ),
    "inverse_sqrt from step 0": ("REAL(1) + real(e) / REAL(c)", "real(e + phase.begin) / REAL(c)"),
    "table one ahead": ("table[int(c) + e]", "table[np.minimum(int(c) + e + 1, len(table) - 1)]"),
    "table from its start": ("table[int(c) + e]", "table[e]"),
    "step counter in fp32": ("e = np.clip(k, ", "e = np.clip(real(k).astype(np.int64), "),
    "32-bit product of waves and steps": ("int(half_waves) * e", "(int(half_waves) * e).astype(np.int32)"),
    # levels
    "floor by max()": (
        "REAL(phase.from_) * w0 + REAL(phase.to) * w1",
        "np.maximum(REAL(phase.from_) * w0, REAL(phase.to)) "
        f"if {_FALLS} else REAL(phase.from_) * w0 + REAL(phase.to) * w1",
    ),
    "absolute floor as a ratio": ("resolve(peak)", "resolve(1.0)"),
    "polynomial without lr_end": (
        "REAL(phase.to) * w1",
        "REAL(phase.to * (phase.shape != 'polynomial')) * w1",
    ),
    "warm-up always from 0": ("REAL(phase.from_) * w0", "REAL(phase.from_ * (phase.from_ >= phase.to)) * w0"),
    # shapes
    "part of a wave dropped": ("divmod(2 * phase.shape_param, 1)", "2 * phase.shape_param // 1, 0"),
    "power of the elapsed share": (
        "w0 = (real(r) / real(n)) ** REAL(c)",
        "w0 = REAL(1) - (real(e) / real(n)) ** REAL(c)",
    ),
    "1-sqrt of the wrong side": (
        "return root, real(e) / real(n) / (REAL(1) + root)",
        "return REAL(1) - np.sqrt(real(e) / real(n)), np.sqrt(real(e) / real(n))",
    ),
    # right in fp64, not in fp32
    "0.5*(1+cos)": (_W0, "w0 = REAL(0.5) * (REAL(1) + np.cos(REAL(np.pi) * angle(phase, e, n)))"),
    "cosine as 1 - sin**2": (_W0, "w0 = REAL(1) - np.sin(HALF_PI * angle(phase, e, n)) ** 2"),
    "linear as 1 - progress": ("return real(r) / real(n), real", "return REAL(1) - real(e) / real(n), real"),
    "1-sqrt as written": ("return real(r) / real(n) / (REAL(1) + root), root", "return REAL(1) - root, root"),
    "waves not reduced": ("int(half_waves) * e % (2 * n)", "int(half_waves) * e"),
    "restarts by float modulo": (
        _RESTART,
        """x = REAL(phase.shape_param) * (real(e) / real(n)) % REAL(1)
        return REAL(1) - x if remaining else x""",
    ),
}


def load(name: str) -> types.ModuleType:
    """The fp32 spelling with one edit, as a module."""
    right, wrong = EDITS[name]
    source = inspect.getsource(schedule_numpy)
    assert source.count(right) == 1, f"{name!r} does not apply: {source.count(right)} times {right!r}"
    module = types.ModuleType("wrong_schedule")
    exec(compile(source.replace(right, wrong), f"wrong: {name}", "exec"), module.__dict__)
    return module
