"""What schedules refuse, and that the message names the argument and its value."""

from __future__ import annotations

import math

import pytest

import fusedlr.schedule

# the call, and what its message must say
REFUSED = [
    ("linear(warmup_steps=-1, total_steps=10)", "warmup_steps=-1 must be at least 0"),
    ("linear(warmup_steps=-0.5, total_steps=10)", "warmup_steps=-0.5 is not an integer"),
    ("linear(warmup_steps=2.5, total_steps=10)", "warmup_steps=2.5 is not an integer"),
    ("linear(warmup_steps=nan, total_steps=10)", "warmup_steps=nan is not an integer"),
    ("linear(warmup_steps=True, total_steps=10)", "warmup_steps=True is not an integer"),
    ("linear(warmup_steps='3', total_steps=10)", "warmup_steps='3' is not an integer"),
    ("linear(warmup_steps=None, total_steps=10)", "warmup_steps=None is not an integer"),
    ("linear(warmup_steps=2)", "linear needs total_steps, the number of updates in the run"),
    ("linear(total_steps=0)", "total_steps=0 must be at least 1"),
    ("linear(total_steps=-3)", "total_steps=-3 must be at least 1"),
    ("linear(total_steps=1.5)", "total_steps=1.5 is not an integer"),
    ("linear(total_steps=inf)", "total_steps=inf is not an integer"),
    ("linear(total_steps=False)", "total_steps=False is not an integer"),
    ("linear(total_steps=5, min_lr_ratio=1.5)", r"min_lr_ratio=1.5 must be a ratio in [0, 1]"),
    ("linear(total_steps=5, min_lr_ratio=-0.1)", "min_lr_ratio=-0.1 must be a finite number >= 0"),
    ("linear(total_steps=5, min_lr_ratio=nan)", "min_lr_ratio=nan must be a finite number >= 0"),
    ("linear(total_steps=5, min_lr_ratio=True)", "min_lr_ratio=True is not a number"),
    ("linear(total_steps=5, min_lr=-1e-5)", "min_lr=-1e-05 must be a finite number >= 0"),
    ("linear(total_steps=5, min_lr='1e-5')", "min_lr='1e-5' is not a number"),
    ("linear(total_steps=5, min_lr=[1])", "min_lr=[1] is not a number"),
    ("linear(total_steps=5, min_lr=1e-5, min_lr_ratio=0.1)", "min_lr_ratio=0.1 and min_lr=1e-05 exclude"),
    ("linear(total_steps=5, min_lr=1e-3).lr_at(0, 1e-4)", "min_lr=0.001 is above the peak lr=0.0001"),
    (
        "linear(total_steps=5, min_lr=1e-3).resolve(0.0)",
        "min_lr=0.001 is absolute and needs a peak lr above 0",
    ),
    ("linear(total_steps=5, min_lr=1e-3).to_numbers()", "has an absolute level: resolve(peak) it first"),
    ("linear(5, 9, warmup_from=1.1)", r"warmup_from=1.1 must be a ratio in [0, 1]"),
    ("linear(0, 9, warmup_from=nan)", "warmup_from=nan must be a finite number >= 0"),
    ("linear(total_steps=5).lr_at(0.5)", "k=0.5 is not an integer"),
    ("linear(total_steps=5).lr_at(True)", "k=True is not an integer"),
    ("linear(total_steps=5).lr_at(nan)", "k=nan is not an integer"),
    ("linear(total_steps=5).lr_at(0, -1e-3)", "peak=-0.001 must be a finite number >= 0"),
    ("linear(total_steps=5).lr_at(0, inf)", "peak=inf must be a finite number >= 0"),
    ("constant_with_warmup(0.1)", "warmup_steps=0.1 is a ratio and needs total_steps"),
    ("constant_with_warmup(0.1, 0)", "total_steps=0 must be at least 1"),
    ("cosine(2)", "cosine needs total_steps"),
    ("cosine(2, 9, num_cycles=0)", "num_cycles=0 must be above 0"),
    ("cosine(2, 9, num_cycles=-1)", "num_cycles=-1 must be a finite number >= 0"),
    ("cosine(2, 9, num_cycles=inf)", "num_cycles=inf must be a finite number >= 0"),
    ("cosine_with_restarts(2, 9, num_cycles=1.5)", "num_cycles=1.5 is not an integer"),
    ("cosine_with_restarts(2, 9, num_cycles=0)", "num_cycles=0 must be at least 1"),
    ("cosine_with_restarts(2, 9, cycle_mult=0)", "cycle_mult=0 must be above 0"),
    (
        "cosine_with_restarts(2, 9, num_cycles=8, cycle_mult=2)",
        "num_cycles=8 with cycle_mult=2 leaves a cycle without an update in 7 steps",
    ),
    ("polynomial(2, 9, power=0)", "power=0 must be above 0"),
    ("polynomial(2, 9, power=nan)", "power=nan must be a finite number >= 0"),
    ("polynomial(2, 9, lr_end=-1)", "lr_end=-1 must be a finite number >= 0"),
    ("polynomial(2, 9, lr_end=1e-3).lr_at(0, 1e-4)", "lr_end=0.001 is above the peak lr=0.0001"),
    ("inverse_sqrt(2, timescale=0)", "timescale=0 must be at least 1"),
    ("inverse_sqrt(2, timescale=1.5)", "timescale=1.5 is not an integer"),
    ("cosine_with_min_lr(2, 9)", "cosine_with_min_lr needs one of min_lr_ratio"),
    ("cosine_with_min_lr(2, min_lr=0)", "cosine_with_min_lr needs total_steps"),
    ("cosine_with_min_lr(2, 9, min_lr=0, min_lr_ratio=0)", "min_lr_ratio=0 and min_lr=0 exclude each other"),
    ("cosine_warmup_with_min_lr(2, 9)", "cosine_warmup_with_min_lr needs one of min_lr_ratio"),
    (
        "cosine_warmup_with_min_lr(2, 9, min_lr=0, warmup_lr_rate=2)",
        r"warmup_lr_rate=2 must be a ratio in [0, 1]",
    ),
    (
        "cosine_warmup_with_min_lr(0, 9, min_lr=0, warmup_lr_rate=2)",
        r"warmup_lr_rate=2 must be a ratio in [0, 1]",
    ),
    ("warmup_stable_decay(5, total_steps=9)", "warmup_stable_decay needs decay_steps"),
    ("warmup_stable_decay(5, 5)", "warmup_stable_decay needs total_steps or stable_steps"),
    ("warmup_stable_decay(5, 5, 9)", "total_steps=9 is less than warmup_steps=5 plus decay_steps=5"),
    ("warmup_stable_decay(5, -5, 9)", "decay_steps=-5 must be at least 0"),
    ("warmup_stable_decay(5, 2, stable_steps=-1)", "stable_steps=-1 must be at least 0"),
    ("warmup_stable_decay(0, 0, stable_steps=0)", "stable_steps=0 and decay_steps=0 leave no update"),
    (
        "warmup_stable_decay(5, 2, 9, warmup_type='sqrt')",
        "warmup_type='sqrt' is unknown, expected one of linear",
    ),
    ("warmup_stable_decay(5, 2, 9, decay_type='exp')", "decay_type='exp' is unknown, expected one of linear"),
    ("table(lambda k: 1.0)", "table needs total_steps"),
    ("table([])", "total_steps=None needs that many values, got 0"),
    ("table([1.0], 2)", "total_steps=2 needs that many values, got 1"),
    ("table([1.0, -1.0])", "the value at step 1=-1.0 must be a finite number >= 0"),
    ("table(lambda k: nan if k else 0.5, 2)", "the value at step 1=nan must be"),
    ("total_steps(0, 8)", "examples=0 must be at least 1"),
    ("total_steps(10, 2.5)", "batch_size=2.5 is not an integer"),
    ("total_steps(10, 2, accumulation=0)", "accumulation=0 must be at least 1"),
    ("total_steps(10, 2, epochs=0)", "epochs=0 must be above 0"),
    ("total_steps(10, 2, world_size=True)", "world_size=True is not an integer"),
    ("Schedule(())", "phases=() is empty"),
    ("Schedule((Phase(0, 9, 0, 0, 1, 'cubic'),))", "shape='cubic' is unknown"),
    ("Schedule((Phase(0, 9, 1, 0, 1, 'linear'),))", "a phase needs origin <= begin <= end"),
    ("Schedule((Phase(0, 0, 0, 0, 1, 'linear'),))", "a phase needs origin <= begin <= end"),
    ("Schedule((Phase(0, 9, 0, 0, 1, 'inverse_sqrt'),))", "shape_param=0.0 must be above 0"),
    ("Schedule((Phase(0, 9, 0, nan, 1, 'linear'),))", "a level must be a finite ratio of the peak >= 0"),
    ("Schedule((Phase(0, 9, 0, 0, -1, 'linear'),))", "a level must be a finite ratio of the peak >= 0"),
    ("Schedule((Phase(0, 9, 0, 0, 1, 'table'),), table=(1.0,))", "table has 1 values, too few"),
    ("Schedule((Phase(0, 1, 0, 0, 1, 'table', -1),), table=(1.0, 1.0))", "table has 2 values, too few"),
    ("Schedule((Phase(5, 9, 5, 0, 1, 'linear'),) * 2)", "phases must begin one after the other"),
    ("Schedule((Phase(0, 9, 0, 0, 1, 'linear'),), 0)", "total_steps=0 must be at least 1"),
    ("Schedule.from_numbers([1.0])", "not a schedule in numbers"),
    ("Schedule.from_numbers([1, 5, 0, 5])", "not a schedule in numbers"),
    ("Schedule.from_numbers([1, 5, 0, 5, 0, 1, 0, 99, 0])", "not a schedule in numbers"),
]


@pytest.mark.parametrize(("call", "message"), REFUSED, ids=[call for call, _ in REFUSED])
def test_refused(call: str, message: str) -> None:
    with pytest.raises(ValueError) as error:
        eval(call, {**vars(fusedlr.schedule), "nan": math.nan, "inf": math.inf})
    assert message in str(error.value)
