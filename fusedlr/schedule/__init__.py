"""Learning rate schedules as values. Building, evaluating and describing one needs neither torch nor numpy.

phases.py defines what a schedule is, schedule.py holds the value `Schedule`, constructors.py and convert.py
build one, describe.py and curves.py show one, and spec.py reads one from the command line.
"""

from fusedlr.schedule.constructors import (
    CONSTRUCTORS,
    constant,
    constant_with_warmup,
    cosine,
    cosine_warmup_with_min_lr,
    cosine_with_min_lr,
    cosine_with_restarts,
    inverse_sqrt,
    linear,
    polynomial,
    table,
    total_steps,
    warmup_stable_decay,
)
from fusedlr.schedule.convert import from_hf, from_torch, knows_hf
from fusedlr.schedule.phases import SHAPES, Absolute, Phase, evaluate, phase_weights, whole_and_rest
from fusedlr.schedule.schedule import Schedule, check_schedule

__all__ = [
    "CONSTRUCTORS",
    "SHAPES",
    "Absolute",
    "Phase",
    "Schedule",
    "check_schedule",
    "constant",
    "constant_with_warmup",
    "cosine",
    "cosine_warmup_with_min_lr",
    "cosine_with_min_lr",
    "cosine_with_restarts",
    "evaluate",
    "from_hf",
    "from_torch",
    "inverse_sqrt",
    "knows_hf",
    "linear",
    "phase_weights",
    "polynomial",
    "table",
    "total_steps",
    "warmup_stable_decay",
    "whole_and_rest",
]
