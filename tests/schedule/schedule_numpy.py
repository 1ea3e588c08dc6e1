"""The schedule in fp32, as a kernel spells it: IEEE operations on numpy arrays, integers where they fit.

Its names are those of `fusedlr.schedule`. It shows that the bounds in tolerances.py can be reached without
fp64 on the device; `wrong/schedules.py` holds mistakes in it that the harness must reject.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fusedlr import Phase, Schedule

REAL = np.float32
HALF_PI = REAL(0.5 * np.pi)


def lr_at(schedule: Schedule, k: NDArray[np.int64], peak: float) -> NDArray[np.float32]:
    """Learning rates of updates `k`."""
    schedule = schedule.resolve(peak)
    table = np.array(schedule.table or [0], REAL)
    value = np.zeros(k.shape, REAL)
    for i, phase in enumerate(schedule.phases):
        e = np.clip(k, phase.begin, phase.end) - phase.origin
        w0, w1 = phase_weights(phase, e, table)
        begun = (k >= phase.begin) | (i == 0)
        value = np.where(begun, REAL(phase.from_) * w0 + REAL(phase.to) * w1, value)
    return REAL(peak) * value


def phase_weights(phase: Phase, e: NDArray[np.int64], table: NDArray[np.float32]) -> tuple:
    """Weights of `from_` and `to` after `e` of the phase's `n` steps."""
    shape, c = phase.shape, phase.shape_param
    n = phase.end - phase.origin
    r = n - e
    if shape == "constant":
        return REAL(1), REAL(0)
    if shape == "linear":
        return real(r) / real(n), real(e) / real(n)
    if shape in ("cosine", "restarts"):
        w0 = np.sin(HALF_PI * angle(phase, e, n, remaining=True)) ** 2
        w1 = np.sin(HALF_PI * angle(phase, e, n)) ** 2
        return w0, w1
    if shape == "polynomial":
        w0 = (real(r) / real(n)) ** REAL(c)
        return w0, REAL(1) - w0
    if shape == "inverse_sqrt":
        w0 = REAL(1) / np.sqrt(REAL(1) + real(e) / REAL(c))
        return w0, REAL(1) - w0
    if shape == "1-sqrt":
        root = np.sqrt(real(e) / real(n))
        return real(r) / real(n) / (REAL(1) + root), root
    if shape == "1-sqrt-rise":
        root = np.sqrt(real(r) / real(n))
        return root, real(e) / real(n) / (REAL(1) + root)
    w1 = table[int(c) + e]
    return REAL(1) - w1, w1


def angle(phase: Phase, e: NDArray[np.int64], n: int, remaining: bool = False) -> NDArray[np.float32]:
    """Where the wave stands, from 0 at the crest to 1 in the trough; `remaining` counts from the trough."""
    half_waves, part = divmod(2 * phase.shape_param, 1)
    if phase.shape == "restarts":
        q = int(phase.shape_param) * e % n
        return real(n - q if remaining else q) / real(n)
    # period 2n, even around n
    q = int(half_waves) * e % (2 * n)
    if part == 0:
        q = np.where(q > n, 2 * n - q, q)
        return real(n - q if remaining else q) / real(n)
    # the rest of a half wave is a small fraction, so its rounding error is small too
    q = np.where(q > n, q - 2 * n, q)
    x = np.abs(real(q) / real(n) + REAL(part) * (real(e) / real(n)))
    x = np.where(x > 1, REAL(2) - x, x)
    return REAL(1) - x if remaining else x


def real(x: NDArray[np.int64] | int) -> NDArray[np.float32]:
    return np.asarray(x).astype(REAL)
