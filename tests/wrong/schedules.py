"""Wrong spellings of the schedule that the harness must reject: one edit each to the source of the fp32 one.

Each is a mistake that somebody's schedule has made, or a formula that is right in fp64 and not in fp32. An edit
that no longer applies is an error, so the list keeps up with the source.
"""

from __future__ import annotations

import inspect
import types

import schedule_numpy

_LINEAR = "return real(r) / real(n), real(e) / real(n)"
_LEVEL = "REAL(phase.from_) * w0 + REAL(phase.to) * w1"
_CLAMP = "np.clip(k, phase.begin, phase.end)"
_W1 = "w1 = np.sin(HALF_PI * angle(phase, e, n)) ** 2"
_W0 = "w0 = np.sin(HALF_PI * angle(phase, e, n, remaining=True)) ** 2"

# name -> (what the fp32 spelling says, what the wrong one says)
EDITS = {
    # steps
    "warm-up off by one": ("w0, w1 = phase_weights(phase, e, table)", _LEVEL and (
        "w0, w1 = phase_weights(phase, np.minimum(e + (phase.from_ < phase.to), phase.end - phase.origin), table)"
    )),
}
