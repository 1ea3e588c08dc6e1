"""Named schedules that every spelling is checked on: all constructors, all options, and the edges of each."""

from __future__ import annotations

import math

import fusedlr
from fusedlr import Phase, Schedule

# the rate every schedule of the zoo is evaluated with; not a power of two, so that rounding it matters
PEAK = 3e-4


def _types() -> dict[str, Schedule]:
    """Every pair of warm-up and decay of warmup_stable_decay."""
    types = ("linear", "cosine", "1-sqrt")
    return {
        f"wsd {rise}, {fall}": fusedlr.warmup_stable_decay(
            warmup_steps=40,
            decay_steps=90,
            total_steps=300,
            warmup_type=rise,
            decay_type=fall,
            min_lr_ratio=0.05,
        )
        for rise in types
        for fall in types
    }


ZOO: dict[str, Schedule] = {
    "constant": fusedlr.constant(),
    "constant_with_warmup": fusedlr.constant_with_warmup(warmup_steps=30),
    "constant_with_warmup, share": fusedlr.constant_with_warmup(warmup_steps=0.1, total_steps=333),
    # linear
    "linear": fusedlr.linear(warmup_steps=20, total_steps=400),
    "linear, no warm-up": fusedlr.linear(total_steps=97),
    "linear, min_lr_ratio": fusedlr.linear(warmup_steps=7, total_steps=100, min_lr_ratio=0.25),
    "linear, min_lr": fusedlr.linear(warmup_steps=7, total_steps=100, min_lr=3e-5),
    "linear, warmup_from": fusedlr.linear(warmup_steps=10, total_steps=60, warmup_from=0.3),
    "linear, long": fusedlr.linear(warmup_steps=10**6, total_steps=10**9),
    "linear, total 1": fusedlr.linear(total_steps=1),
    # cosine
    "cosine": fusedlr.cosine(warmup_steps=200, total_steps=4000),
    "cosine, no warm-up": fusedlr.cosine(total_steps=120),
    "cosine, min_lr_ratio": fusedlr.cosine(warmup_steps=10, total_steps=200, min_lr_ratio=0.1),
    "cosine, min_lr": fusedlr.cosine(warmup_steps=10, total_steps=200, min_lr=1e-5),
    "cosine, floor at the peak": fusedlr.cosine(warmup_steps=5, total_steps=50, min_lr_ratio=1.0),
    "cosine, warmup_from": fusedlr.cosine(warmup_steps=10, total_steps=60, warmup_from=0.5),
    "cosine, one wave": fusedlr.cosine(warmup_steps=10, total_steps=217, num_cycles=1),
    "cosine, waves": fusedlr.cosine(warmup_steps=3, total_steps=1003, num_cycles=7.5, min_lr_ratio=0.02),
    "cosine, part of a wave": fusedlr.cosine(warmup_steps=10, total_steps=500, num_cycles=0.4),
    "cosine, uneven waves": fusedlr.cosine(
        warmup_steps=10, total_steps=500, num_cycles=3.3, min_lr_ratio=0.1
    ),
    "cosine, long": fusedlr.cosine(warmup_steps=2000, total_steps=10**7),
    "cosine, very long": fusedlr.cosine(warmup_steps=10**6, total_steps=10**9, num_cycles=2.5),
    "cosine, very long, uneven": fusedlr.cosine(total_steps=10**9, num_cycles=1.2),
    "cosine, warm-up is the run": fusedlr.cosine(warmup_steps=50, total_steps=50, min_lr_ratio=0.2),
    "cosine, warm-up past the run": fusedlr.cosine(warmup_steps=80, total_steps=50, min_lr_ratio=0.2),
    "cosine, warm-up 1": fusedlr.cosine(warmup_steps=1, total_steps=2),
    "cosine, total 1": fusedlr.cosine(total_steps=1),
    "cosine_with_min_lr": fusedlr.cosine_with_min_lr(warmup_steps=11, total_steps=90, min_lr=2e-5),
    "cosine_with_min_lr, ratio": fusedlr.cosine_with_min_lr(total_steps=90, min_lr_ratio=0.3, num_cycles=1.5),
    # one step ahead
    "ahead": fusedlr.cosine_warmup_with_min_lr(warmup_steps=12, total_steps=100, min_lr_ratio=0.1),
    "ahead, min_lr": fusedlr.cosine_warmup_with_min_lr(warmup_steps=12, total_steps=100, min_lr=1e-5),
    "ahead, warmup_lr_rate": fusedlr.cosine_warmup_with_min_lr(
        warmup_steps=12, total_steps=100, min_lr_ratio=0.1, warmup_lr_rate=0.05, num_cycles=1.5
    ),
    "ahead, no warm-up": fusedlr.cosine_warmup_with_min_lr(total_steps=50, min_lr_ratio=0.0),
    "ahead, warm-up 1": fusedlr.cosine_warmup_with_min_lr(
        warmup_steps=1, total_steps=5, min_lr_ratio=0.1, warmup_lr_rate=0.1
    ),
    "ahead, warm-up is the run": fusedlr.cosine_warmup_with_min_lr(
        warmup_steps=20, total_steps=20, min_lr_ratio=0.1
    ),
    "ahead, total 1": fusedlr.cosine_warmup_with_min_lr(total_steps=1, min_lr_ratio=0.1),
    # restarts
    **{
        f"restarts, {cycles} cycles": fusedlr.cosine_with_restarts(
            warmup_steps=10, total_steps=10 + total, num_cycles=cycles
        )
        for cycles, total in ((1, 100), (2, 101), (3, 300), (7, 490), (13, 1000), (21, 2100), (21, 8))
    },
    "restarts, min_lr_ratio": fusedlr.cosine_with_restarts(
        warmup_steps=5, total_steps=605, num_cycles=4, min_lr_ratio=0.15
    ),
    "restarts, cycle_mult": fusedlr.cosine_with_restarts(
        warmup_steps=20, total_steps=1000, num_cycles=5, cycle_mult=1.7, min_lr=1e-6, warmup_from=0.1
    ),
    "restarts, shrinking": fusedlr.cosine_with_restarts(total_steps=400, num_cycles=4, cycle_mult=0.5),
    "restarts, long": fusedlr.cosine_with_restarts(warmup_steps=1000, total_steps=10**9, num_cycles=21),
    "restarts, warm-up is the run": fusedlr.cosine_with_restarts(warmup_steps=9, total_steps=9, num_cycles=3),
    "restarts, total 1": fusedlr.cosine_with_restarts(total_steps=1, num_cycles=2),
    # polynomial
    "polynomial": fusedlr.polynomial(warmup_steps=10, total_steps=200),
    "polynomial, square": fusedlr.polynomial(warmup_steps=10, total_steps=200, power=2.0, lr_end=1e-5),
    "polynomial, root": fusedlr.polynomial(total_steps=300, power=0.5, lr_end=0.0),
    "polynomial, steep": fusedlr.polynomial(warmup_steps=3, total_steps=150, power=12.5, lr_end=0.0),
    "polynomial, long": fusedlr.polynomial(warmup_steps=1000, total_steps=10**8, power=3.0),
    "polynomial, warm-up is the run": fusedlr.polynomial(warmup_steps=30, total_steps=30),
    "polynomial, total 1": fusedlr.polynomial(total_steps=1, power=2.0),
    # inverse square root
    "inverse_sqrt": fusedlr.inverse_sqrt(warmup_steps=100, total_steps=1000),
    "inverse_sqrt, timescale": fusedlr.inverse_sqrt(warmup_steps=50, timescale=7),
    "inverse_sqrt, no warm-up": fusedlr.inverse_sqrt(),
    # warm-up, stable, decay
    **_types(),
    "wsd, waves": fusedlr.warmup_stable_decay(
        warmup_steps=10, decay_steps=200, stable_steps=40, num_cycles=1.5
    ),
    "wsd, uneven waves": fusedlr.warmup_stable_decay(
        warmup_steps=10, decay_steps=200, stable_steps=40, num_cycles=0.8, min_lr_ratio=0.1
    ),
    "wsd, no stable phase": fusedlr.warmup_stable_decay(warmup_steps=30, decay_steps=70, total_steps=100),
    "wsd, no warm-up": fusedlr.warmup_stable_decay(decay_steps=70, total_steps=100, decay_type="1-sqrt"),
    "wsd, no decay": fusedlr.warmup_stable_decay(
        warmup_steps=5, decay_steps=0, total_steps=20, min_lr_ratio=0.5
    ),
    "wsd, long": fusedlr.warmup_stable_decay(
        warmup_steps=10**5,
        decay_steps=10**7,
        total_steps=10**8,
        warmup_type="1-sqrt",
        decay_type="1-sqrt",
    ),
    # tables
    "table": fusedlr.table(lambda k: 0.5 * (1 + math.sin(k)) * 1.7, total_steps=200),
    "table, long": fusedlr.table(lambda k: 1 / (1 + k), total_steps=4096),
    "table, two values": fusedlr.table([0.25, 0.0]),
    "table, total 1": fusedlr.table([0.7]),
    # changed while it ran
    "cooldown in a cosine": fusedlr.cosine(warmup_steps=50, total_steps=1000).cooldown(400, 200),
    "cooldown in the warm-up": fusedlr.linear(warmup_steps=50, total_steps=500).cooldown(
        20, 33, "cosine", to=0.1
    ),
    "cooldown in a table": fusedlr.table(lambda k: 1 / (1 + k), total_steps=64).cooldown(20, 7, "linear"),
    "cooldown past the end": fusedlr.cosine(total_steps=40, min_lr_ratio=0.3).cooldown(77, 10, "linear"),
    "cooldown at once": fusedlr.constant().cooldown(0, 90),
    "cooldown, rewarm, cooldown": fusedlr.cosine_with_restarts(total_steps=400, num_cycles=5)
    .cooldown(130, 60, "cosine", to=0.05)
    .rewarm(160, 31, to=1.25)
    .cooldown(250, 1),
    # phases no constructor makes: a wave up from 0 and back; a negative begin, held gaps, part of a table
    "bump": Schedule((Phase(0, 4000, 0, 0.0, 1.0, "cosine", 1.0),), 4000),
    "by hand": Schedule(
        (
            Phase(-5, 3, -5, 0.1, 0.9, "1-sqrt-rise"),
            Phase(10, 40, 0, 2.0, 0.5, "linear"),
            Phase(60, 62, 60, 0.0, 1.0, "table", 1.0),
            Phase(70, 90, 65, 0.3, 1.3, "cosine", 2.0),
        ),
        total_steps=100,
        table=(9.0, 0.5, 0.25, 0.125),
    ),
}
