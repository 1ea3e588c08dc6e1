"""Malformed checkpoints: each is refused in words that name the entry, and leaves everything as it was.

A kind is a path into a good file and what is put there. After the refusal a good file loads, and the run goes
on bit for bit like one that has never seen the bad file.
"""

from __future__ import annotations

import copy
import functools
import math
import re
import threading
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from kit import make_params, quiet, scheduled, silent, steps, torchs_part
from snapshots import params_of, snapshot, unchanged

import fusedlr

GONE = object()
HUGE = 10**400
# the second tensor of the second group
LAST = 3
SHAPES = ((3,), (4, 3), (5,), (2,))
SCHEDULE = fusedlr.cosine(warmup_steps=3, total_steps=12, min_lr_ratio=0.1)
NUMBERS = SCHEDULE.to_numbers()


def build() -> fusedlr.FusedAdamW:
    params = make_params((torch.float32,), SHAPES)
    groups = [{"params": params[:2]}, {"params": params[2:], "max_grad_norm": 2.0}]
    return scheduled(groups, schedule=SCHEDULE, groups="independent", max_grad_norm=1.0, amsgrad=True)


@functools.cache
def _run() -> fusedlr.FusedAdamW:
    source = build()
    steps(source, 0, 3)
    return source


def of_optimizer() -> dict[str, Any]:
    """A good file."""
    return copy.deepcopy(_run().state_dict())


def of_first_format() -> dict[str, Any]:
    """A good file as the first versions wrote it, with what is ours among the keys of the groups."""
    state = of_optimizer()
    for group, own in zip(state["param_groups"], state.pop("fusedlr")["groups"], strict=True):
        group.update({key: own[key] for key in ("schedule", "k", "k_at_step")}, initial_lr=own["peak"])
    state["param_groups"][1]["max_grad_norm"] = 2.0
    return state


def of_scheduler() -> dict[str, Any]:
    """A good file of the scheduler."""
    return copy.deepcopy(_run().scheduler.state_dict())


def of_lambda_lr() -> dict[str, Any]:
    """A good file of torch's LambdaLR."""
    groups = [{"params": params} for params in (make_params(shapes=SHAPES[:2]), make_params(shapes=SHAPES))]
    stock = torch.optim.AdamW(groups, lr=0.05)
    scheduler = torch.optim.lr_scheduler.LambdaLR(stock, SCHEDULE.lr_at)
    with quiet():
        scheduler.step(), scheduler.step()
    return copy.deepcopy(scheduler.state_dict())


class Kind(NamedTuple):
    """What is put where in which good file (`GONE`: taken out), and what the refusal says."""

    file: Any
    path: tuple[Any, ...]
    value: Any
    says: str

    @property
    def place(self) -> str:
        """Where it is, for the test's id."""
        return f"{self.file.__name__}:{'.'.join(map(str, self.path))}"

    def made(self) -> Any:
        """The malformed file."""
        state = self.file()
        if not self.path:
            return self.value
        place = state
        for key in self.path[:-1]:
            place = place[key]
        if self.value is GONE:
            del place[self.path[-1]]
        else:
            place[self.path[-1]] = self.value
        return state


def kinds(file: Any, path: tuple[Any, ...], values: Iterable[Any], says: str | None = None) -> Iterator[Kind]:
    """One kind per value; by default the refusal has the last key of the path as a word."""
    word = says if says is not None else rf"\b{re.escape(str(path[-1]))}\b"
    return (Kind(file, path, value, word) for value in values)


NOT_NUMBERS = ("abc", None, True, [1.0], {}, 1j, torch.tensor([0.1, 0.2]), np.array([0.1, 0.2]))
NOT_RATES = (
    math.nan,
    math.inf,
    -1.0,
    -math.inf,
    HUGE,
    -HUGE,
    torch.tensor(math.nan),
    torch.tensor(-1.0),
    *NOT_NUMBERS,
)
NOT_COUNTS = (-1, 1.5, math.nan, math.inf, 2**63, -(2**63), HUGE, *NOT_NUMBERS)
NOT_DICTS = (None, 5, "text", [1], torch.zeros(2))
NOT_LISTS = (None, 5, "text", {}, torch.zeros(2))
NOT_MOMENTS = (
    None,
    5.0,
    "text",
    [0.0, 0.0],
    np.zeros(2, np.float32),
    torch.zeros(2, 1),
    torch.zeros(()),
    torch.zeros(3),
    torch.zeros(0),
    torch.zeros(2, dtype=torch.int64),
    # what the rest of a bf16 parameter's fp32 value is kept in
    torch.zeros(2, dtype=torch.int16),
    torch.zeros(2, dtype=torch.bool),
    torch.zeros(2, dtype=torch.complex64),
    torch.zeros(2, dtype=torch.float8_e4m3fn),
    torch.zeros(2, device="meta"),
    torch.zeros(2).to_sparse(),
)
NOT_STEPS = (
    *NOT_COUNTS,
    2**30,
    torch.tensor(math.nan),
    torch.tensor(math.inf),
    torch.tensor(-1.0),
    torch.tensor(0.5),
    torch.tensor(1e30),
    torch.tensor(True),
    torch.tensor(1j),
    torch.zeros(0),
    torch.tensor(1.0, device="meta"),
    torch.ones(1).to_sparse(),
)
NOT_SCHEDULES = (
    5.0,
    "text",
    True,
    {},
    [],
    [1, 2, 3],
    [math.inf] * 9,
    [math.nan] * 9,
    ["a"] * 9,
    [None] * 9,
    [1e6, *NUMBERS[1:]],
    [1e12, *NUMBERS[1:]],
    [-1, *NUMBERS[1:]],
    [0, *NUMBERS[1:]],
    [HUGE, *NUMBERS[1:]],
    torch.zeros(16),
    NUMBERS[:-1],
    # more cycles than any number of steps
    [*NUMBERS[:-1], 1e308],
)
# every number of a schedule, the shape's too, and what none of them may be
NOT_SCHEDULES += tuple(
    [*NUMBERS[:i], value, *NUMBERS[i + 1 :]]
    for i in range(len(NUMBERS))
    for value in (math.nan, math.inf, -7.5, "a", None, HUGE)
    # a schedule may be of no length, and a shape that has no parameter does not look at it
    if not (value == -7.5 and NUMBERS[i] == 0)
)
NOT_LIMITS = (0.0, -1.0, math.nan, "abc", True, [1.0], {}, 1j, torch.tensor([1.0, 2.0]), -HUGE)


GROUP = ("param_groups", 1)
OWN = ("fusedlr", "groups", 1)


def _of_torch() -> Iterator[Kind]:
    file = of_optimizer
    yield from kinds(file, (), (None, 5, "text", [], (), torch.zeros(2), {}), "loaded state dict")
    yield from kinds(file, ("state",), (GONE, *NOT_DICTS, []), "'state'")
    yield from kinds(file, ("param_groups",), (GONE, *NOT_LISTS), "'param_groups'")
    first = of_optimizer()["param_groups"][0]
    yield from kinds(file, ("param_groups",), ([], [first], [first] * 3), "parameter groups")
    yield from kinds(file, GROUP, (*NOT_DICTS,), "group 1 of the loaded state dict is a")
    yield from kinds(file, GROUP, ({}, first), "group 1 of the loaded state dict")
    yield from kinds(file, (*GROUP, "params"), (GONE, *NOT_LISTS, "ab"), "group 1 .*'?params'?")
    yield from kinds(file, (*GROUP, "params"), ([], [2], [2, 3, 4]), "group 1 .* parameters")
    yield from kinds(
        file,
        (*GROUP, "params"),
        ([[2], [3]], [{}, {}], [([2],), ([3],)], [2, 2], [0, 3]),
        "group 1 .*params=",
    )
    yield from kinds(file, (*GROUP, "lr"), (GONE, *NOT_RATES), r"group 1 .*\blr\b")
    for name in ("eps", "weight_decay"):
        yield from kinds(file, (*GROUP, name), NOT_RATES, rf"group 1 .*\b{name}\b")
    pairs = [(0.9,), (0.9, 0.9, 0.9), {0.9, 0.99}, ("a", "b"), (None, 0.9), (True, 0.9), {0.9: 0.99}]
    pairs += [(bad, 0.9) for bad in (math.nan, math.inf, -0.1, 1.0, HUGE, 1j)]
    pairs += [(0.9, bad) for bad in (math.nan, math.inf, -0.1, 1.0, HUGE, torch.zeros(2))]
    yield from kinds(file, (*GROUP, "betas"), (*pairs, *NOT_LISTS[:-1], "ab"), "group 1 .*betas")
    for name in ("amsgrad", "maximize"):
        yield from kinds(
            file, (*GROUP, name), ("no", None, 2, math.nan, [], torch.zeros(2)), rf"group 1 .*\b{name}\b"
        )
    yield from kinds(file, (*GROUP, "differentiable"), (True, "no", 2), "group 1 .*differentiable")
    yield from kinds(
        file,
        (*GROUP, "param_names"),
        (5, "ab", ["a"], ["a", "b", "c"], [1, 2], [["a"], "b"]),
        "group 1 .*param_names",
    )
    for name in ("max_lr", "initial_lr"):
        yield from kinds(file, (*GROUP, name), NOT_RATES, rf"group 1 .*\b{name}\b")
    lock = threading.Lock()
    yield from kinds(file, (*GROUP, "extra"), (lock,), "group 1 .*extra")
    entry = ("state", LAST)
    yield from kinds(file, entry, (*NOT_DICTS,), "parameter 1 of group 1.* loaded state is a")
    momentum = {"momentum_buffer": torch.zeros(2)}
    yield from kinds(file, entry, (momentum,), "parameter 1 of group 1.* loaded state has no step")
    for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
        values = NOT_MOMENTS if name == "max_exp_avg_sq" else (GONE, *NOT_MOMENTS)
        yield from kinds(file, (*entry, name), values, rf"parameter 1 of group 1.*\b{name}\b")
    yield from kinds(file, (*entry, "step"), (GONE, *NOT_STEPS), r"parameter 1 of group 1.*\bstep\b")
    graph = torch.ones(2, requires_grad=True) * 2
    yield from kinds(file, (*entry, "extra"), (lock, graph), "parameter 1 of group 1.*extra")
    yield from kinds(file, ("state", "no id of a parameter"), ({"extra": lock},), "no id of a parameter")


def _of_ours(file: Any) -> Iterator[Kind]:
    """What lies under our key, in the optimizer's file and in the scheduler's."""
    yield from kinds(file, ("fusedlr",), (5, "text", [], {}, torch.zeros(2)))
    yield from kinds(file, ("fusedlr", "format"), (GONE, "2", 2.5, True, 0, -1, None, [2], HUGE))
    yield from kinds(file, ("fusedlr", "format"), (3, 10**9), "newer fusedlr")
    own = file()["fusedlr"]["groups"]
    yield from kinds(file, ("fusedlr", "groups"), (GONE, *NOT_LISTS, [], own[:1], own + own[:1]))
    yield from kinds(file, OWN, (None, 5, "text", [1]), "group 1")
    yield from _of_group(file, OWN, "peak")
    yield from kinds(file, (*OWN, "skipped"), NOT_COUNTS, r"group 1 .*\bskipped\b")
    yield from kinds(file, (*OWN, "nonfinite"), ("maybe", 5, True, []), r"group 1 .*\bnonfinite\b")


def _of_group(file: Any, path: tuple[Any, ...], peak: str) -> Iterator[Kind]:
    """What is ours in a group, in the files of both formats."""
    for name in ("k", "k_at_step"):
        yield from kinds(file, (*path, name), NOT_COUNTS, rf"group 1 .*\b{name}\b")
    values = [value for value in NOT_RATES if value is not None or peak != "peak"]
    yield from kinds(file, (*path, peak), values, rf"group 1 .*\b{peak}\b")
    yield from kinds(file, (*path, "max_grad_norm"), NOT_LIMITS, r"group 1 .*max_grad_norm")
    yield from kinds(file, (*path, "schedule"), NOT_SCHEDULES, r"group 1 .*schedule")


def _of_schedulers() -> Iterator[Kind]:
    file = of_scheduler
    yield from kinds(file, (), (None, 5, "text", [], torch.zeros(2)), "scheduler's state is a")
    yield from kinds(of_lambda_lr, (), ({},), "last_epoch")
    for one in (file, of_lambda_lr):
        yield from kinds(one, ("last_epoch",), (GONE, *NOT_COUNTS))
        for name in ("base_lrs", "_last_lr"):
            yield from kinds(one, (name,), (5, "text", {}, torch.zeros(2)))
            yield from kinds(one, (name, 1), NOT_RATES)
    yield from kinds(file, ("k",), (None, 5, "text", {}, [], [3], [3, 3, 3], torch.zeros(2)), r"\bk\b")
    yield from kinds(file, ("k", 1), NOT_COUNTS)
    far = {**of_scheduler(), "last_epoch": 2**62, "k": [2**62, 2**62]}
    yield from kinds(file, (), (far,), "last_epoch=4611686018427387904")
    # the file of one scope may be of any other
    yield from kinds(file, (*OWN, "scope"), ("", 5, True, ["a"]), r"group 1 .*\bscope\b")
    yield from kinds(file, ("k_at_epoch",), (GONE, *NOT_COUNTS, 2**40), "k_at_epoch|last_epoch")


KINDS = [
    *_of_torch(),
    *_of_ours(of_optimizer),
    *_of_group(of_first_format, GROUP, "initial_lr"),
    *_of_ours(of_scheduler),
    *_of_schedulers(),
]


def load(optimizer: fusedlr.FusedAdamW, kind: Kind, state: Any) -> None:
    """Load a file into what it is of."""
    into = optimizer.scheduler if kind.file in (of_scheduler, of_lambda_lr) else optimizer
    into.load_state_dict(state)


def running() -> fusedlr.FusedAdamW:
    """An optimizer in the middle of its run that has loaded a scheduler's state, which waits for a file."""
    optimizer = build()
    steps(optimizer, 5, 7)
    state = of_scheduler()
    state.update(last_epoch=7, k=[7, 6], k_at_epoch=7)
    optimizer.scheduler.load_state_dict(state)
    return optimizer


def go_on(optimizer: fusedlr.FusedAdamW) -> list[dict[str, Any]]:
    """What becomes of an optimizer that loads two files, one with and one without our key, and goes on."""
    shots = []
    for state in (torchs_part(of_optimizer()), of_optimizer()):
        optimizer.load_state_dict(state)
        steps(optimizer, 3, 5)
        shots.append(snapshot(optimizer))
    return shots


@functools.cache
def undisturbed() -> list[dict[str, Any]]:
    return go_on(running())


@pytest.mark.parametrize("place", sorted({kind.place for kind in KINDS}))
def test_a_malformed_file_is_refused_and_changes_nothing(place):
    optimizer = running()
    for kind in KINDS:
        if kind.place == place:
            state = kind.made()
            with unchanged(optimizer), silent(), pytest.raises(ValueError, match=f"(?s){kind.says}"):
                load(optimizer, kind, state)
    assert go_on(optimizer) == undisturbed()


NAMES = [["a", "b"], ["c", "d"]]


def named() -> fusedlr.FusedAdamW:
    """As `running`, with names."""
    optimizer = running()
    for group, names in zip(optimizer.param_groups, NAMES, strict=True):
        group["param_names"] = names
    return optimizer


def of_named_optimizer() -> dict[str, Any]:
    """A good file with names."""
    state = of_optimizer()
    for group, names in zip(state["param_groups"], NAMES, strict=True):
        group["param_names"] = list(names)
    return state


NAMED = [Kind(of_named_optimizer, *rest) for file, *rest in KINDS if file is of_optimizer]


@pytest.mark.parametrize("place", sorted({kind.place for kind in NAMED}))
def test_a_malformed_file_matched_by_name_is_refused_or_its_parameters_are_missing(place):
    for kind in NAMED:
        if kind.place != place:
            continue
        optimizer, state = named(), kind.made()
        before = snapshot(optimizer)
        try:
            missing, _ = optimizer.load_state_dict(state, strict=False)
        except ValueError:
            assert snapshot(optimizer) == before
        else:
            # groups keep their options, so what a file says of these is not looked at
            assert missing == (["d"] if kind.path[:2] == ("state", LAST) else []), kind
            assert snapshot(optimizer)["groups"] == before["groups"]
        assert optimizer.load_state_dict(of_named_optimizer(), strict=False) == ([], [])
        steps(optimizer, 3, 4)
        assert all(p.isfinite().all() for p in params_of(optimizer))


def one_scope() -> fusedlr.FusedAdamW:
    """A scope of two groups in the middle of its run, with names."""
    pairs = list(zip("abcd", make_params((torch.float32,), SHAPES), strict=True))
    groups = [{"params": pairs[:2], "scope": "one"}, {"params": pairs[2:], "scope": "one"}]
    optimizer = scheduled(groups, schedule=SCHEDULE, max_grad_norm=1.0, amsgrad=True)
    steps(optimizer, 0, 3)
    return optimizer


def of_scope() -> dict[str, Any]:
    """A good file of that scope."""
    return one_scope().scope_state_dict("one")


SCOPED = [Kind(of_scope, *rest) for file, *rest in KINDS if file is of_optimizer]


@pytest.mark.parametrize("place", sorted({kind.place for kind in SCOPED}))
def test_a_malformed_file_of_a_scope_is_refused_and_changes_nothing(place):
    optimizer = one_scope()
    for kind in SCOPED:
        if kind.place == place:
            says = kind.says.replace("parameter 1 of group 1", "parameter 'd'")
            with unchanged(optimizer), silent(), pytest.raises(ValueError, match=f"(?s){says}"):
                optimizer.load_scope_state_dict("one", kind.made())
