"""Fractions of steps in `from_hf` are counts, as in `get_scheduler`; nested schedulers in `from_torch`."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from tolerances import SCHEDULE_HF
from torch.optim import lr_scheduler as lrs

import fusedlr

LR = 2e-4
NAMES = {
    "constant_with_warmup": {},
    "linear": {},
    "cosine": {"num_cycles": 0.4},
    "cosine_with_restarts": {"num_cycles": 3},
    "polynomial": {"power": 2.0, "lr_end": 1e-6},
    "inverse_sqrt": {"timescale": 13.5},
    "cosine_with_min_lr": {"min_lr": 1e-5, "num_cycles": 1.5},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1, "warmup_lr_rate": 0.2},
    "warmup_stable_decay": {"num_decay_steps": 7.5, "min_lr_ratio": 0.1, "warmup_type": "cosine"},
}
WITHOUT_OPTIONS = {
    "inverse_sqrt": {},
    "cosine_warmup_with_min_lr": {"min_lr": 1e-5},
    "warmup_stable_decay": {"num_decay_steps": 3, "num_stable_steps": 40.25},
}


@pytest.mark.filterwarnings("ignore:num_warmup_steps, num_stable_steps and num_decay_steps make")
@pytest.mark.parametrize("total", [64, 61.7, 100.5])
@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.5, 2.5, 7.3, 0.03 * 1250, math.pi, 5])
@pytest.mark.parametrize(("name", "options"), [*NAMES.items(), *WITHOUT_OPTIONS.items()], ids=str)
def test_fractions_of_steps_are_counts_as_in_transformers(name, options, warmup, total):
    transformers = pytest.importorskip("transformers")
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))], lr=LR)
    theirs = transformers.get_scheduler(
        name, optimizer, warmup, total, scheduler_specific_kwargs=dict(options)
    ).lr_lambdas[0]
    ours = fusedlr.from_hf(name, warmup, total, **options).resolve(LR)
    for k in range(math.floor(total)):
        assert ours.lr_at(k) == pytest.approx(theirs(k), rel=0, abs=SCHEDULE_HF), k
    assert fusedlr.Schedule.from_numbers(ours.to_numbers()) == ours


def test_lengths_that_disagree_are_said_in_updates():
    message = "make 8.5 updates, not num_training_steps=20: num_stable_steps is used"
    with pytest.warns(UserWarning, match=message):
        schedule = fusedlr.from_hf("warmup_stable_decay", 2.5, 20, num_decay_steps=3, num_stable_steps=3)
    assert schedule.lr_at(9) == 0


def test_a_fraction_below_one_is_no_share_of_the_run():
    schedule = fusedlr.from_hf("linear", num_warmup_steps=0.5, num_training_steps=100)
    assert schedule.lr_at(1) == pytest.approx(99 / 99.5)
    assert fusedlr.linear(warmup_steps=0.5, total_steps=100).lr_at(1) == pytest.approx(1 / 50)


def test_what_fractions_build_is_said_and_described():
    schedule = fusedlr.from_hf("cosine_with_min_lr", 7.5, 100, min_lr_rate=0.1)
    assert repr(schedule) == (
        "from_hf('cosine_with_min_lr', num_warmup_steps=7.5, num_training_steps=100, min_lr_rate=0.1)"
    )
    assert "warm-up: 8 updates, 8 % of the run" in schedule.describe()
    # whole numbers written as floats are what they were
    assert fusedlr.from_hf("cosine", 8.0, 100.0) == fusedlr.cosine(8, 100)


def test_fractions_without_an_end():
    schedule = fusedlr.from_hf("constant_with_warmup", 2.5)
    assert [schedule.lr_at(k) for k in (0, 1, 2, 3, 1000)] == [0.0, 0.4, 0.8, 1.0, 1.0]


REFUSED = {
    "num_training_steps here: there is no end": lambda: fusedlr.from_hf("inverse_sqrt", 2.5),
    "cosine needs total_steps": lambda: fusedlr.from_hf("cosine", 2.5),
    "cosine_warmup_with_min_lr needs total_steps": lambda: fusedlr.from_hf(
        "cosine_warmup_with_min_lr", 2.5, min_lr=0
    ),
    "warmup_steps=-0.5 must be a finite number >= 0": lambda: fusedlr.from_hf("cosine", -0.5, 10),
    "warmup_steps=nan must be a finite number >= 0": lambda: fusedlr.from_hf("cosine", math.nan, 10),
    "warmup_steps='2.5' is not a number": lambda: fusedlr.from_hf("cosine", "2.5", 10),
    "total_steps=1000000000000 must be at most 16777216": lambda: fusedlr.from_hf("cosine", 2.5, 1e12),
}


@pytest.mark.parametrize("message", REFUSED)
def test_fractions_that_are_refused(message):
    with pytest.raises(ValueError, match=message):
        REFUSED[message]()


# schedulers of torch within each other

LINEAR = lambda o: lrs.LinearLR(o, 0.1, total_iters=5)  # noqa: E731
FALL = lambda o: lrs.ExponentialLR(o, 0.9)  # noqa: E731
HALF = lambda o: lrs.ConstantLR(o, 0.5, 5)  # noqa: E731
STAIRS = lambda o: lrs.StepLR(o, 3, 0.5)  # noqa: E731


def sequence(optimizer, first, second, at):
    return lrs.SequentialLR(optimizer, [first(optimizer), second(optimizer)], [at])


def chain(optimizer, *parts):
    return lrs.ChainedScheduler([part(optimizer) for part in parts])


NESTED = {
    "sequence in sequence": lambda o: sequence(o, lambda o: sequence(o, LINEAR, FALL, 4), STAIRS, 10),
    "three sequences": lambda o: sequence(
        o, lambda o: sequence(o, lambda o: sequence(o, LINEAR, FALL, 4), STAIRS, 8), HALF, 14
    ),
    "sequence that begins at 0": lambda o: sequence(o, LINEAR, lambda o: sequence(o, HALF, FALL, 4), 0),
    "chain in sequence": lambda o: sequence(o, lambda o: chain(o, HALF, FALL), STAIRS, 9),
    "sequence in chain": lambda o: chain(o, STAIRS, lambda o: sequence(o, LINEAR, FALL, 4)),
    "chain in chain": lambda o: chain(o, lambda o: chain(o, STAIRS, FALL), HALF),
    "sequence in chain in sequence": lambda o: sequence(
        o, lambda o: chain(o, lambda o: sequence(o, LINEAR, FALL, 4), HALF), STAIRS, 9
    ),
}


def sgd():
    return torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=LR)


@pytest.mark.parametrize("name", NESTED)
def test_nested_schedulers_are_tabulated(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = sgd()
        scheduler = NESTED[name](optimizer)
        # the same one twice: torch's nested ones are at their second step when they are made
        schedule = fusedlr.from_torch(scheduler, 25)
        for k in range(25):
            assert schedule.lr_at(k, LR) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12), k
            optimizer.step()
            scheduler.step()


@pytest.mark.parametrize("name", NESTED)
def test_nested_schedulers_that_have_been_stepped_are_refused(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scheduler = NESTED[name](sgd())
        scheduler.step()
        with pytest.raises(ValueError, match=r"has been stepped \(last_epoch=\d\): pass a fresh one"):
            fusedlr.from_torch(scheduler, 25)


def test_what_torch_cannot_step_is_refused_in_words():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scheduler = sequence(sgd(), STAIRS, lambda o: chain(o, HALF, FALL), 9)
        with pytest.raises(ValueError, match=r"SequentialLR cannot make step 9: torch's SequentialLR takes"):
            fusedlr.from_torch(scheduler, 25)
        # before that step it has a table
        assert fusedlr.from_torch(scheduler, 9).total_steps == 9
