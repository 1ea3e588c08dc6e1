"""The fp64 definition against transformers' values and 40 digits; every spelling against the definition."""

from __future__ import annotations

import copy
import json
import math
import pickle
from typing import Any

import mpmath
import numpy as np
import pytest
import schedule_numpy
import schedule_parity
import tolerances
import torch
from golden import make
from schedule_zoo import PEAK, ZOO
from wrong import schedules as wrong

import fusedlr
from fusedlr import Phase, Schedule
from fusedlr.reference import TensorMath
from fusedlr.schedule import Absolute, evaluate

GOLDEN = json.loads(make.FILE.read_text())["schedules"]
# equality and round trips need not look at long tables
LABELLED = {name: s for name, s in ZOO.items() if len(s.table) <= 8}


def golden_id(row: dict[str, Any]) -> str:
    return f"{row['name']}-{row['num_warmup_steps']}-{row['num_training_steps']}-{row['arguments']}"


# --- the definition


@pytest.mark.parametrize("row", GOLDEN, ids=golden_id)
def test_golden(row: dict[str, Any]) -> None:
    schedule = fusedlr.from_hf(
        row["name"], row["num_warmup_steps"], row["num_training_steps"], row["lr"], **row["arguments"]
    )
    for k, value in zip(row["steps"], row["values"], strict=True):
        difference = schedule.lr_at(k, row["lr"]) / row["lr"] - float.fromhex(value)
        assert abs(difference) <= tolerances.SCHEDULE_HF, (k, difference)


def test_golden_file_is_what_transformers_says() -> None:
    pytest.importorskip("transformers")
    made = make.make()["schedules"]
    assert len(made) == len(GOLDEN)
    for new, old in zip(made, GOLDEN, strict=True):
        assert {**new, "values": None} == {**old, "values": None}
        now, then = ([float.fromhex(value) for value in row["values"]] for row in (new, old))
        # another libm may round a cosine differently
        assert now == pytest.approx(then, rel=1e-15, abs=1e-16)


def exact(phase: Phase, k: int, table: tuple[float, ...]) -> mpmath.mpf:
    """The textbook formula of a phase in 40 digits."""
    n = phase.end - phase.origin
    e = min(max(k, phase.begin), phase.end) - phase.origin
    q, c = mpmath.mpf(e) / n, mpmath.mpf(phase.shape_param)
    if phase.shape == "table":
        return mpmath.mpf(table[int(phase.shape_param) + e]) * phase.to
    w0 = {
        "constant": lambda: mpmath.mpf(1),
        "linear": lambda: 1 - q,
        "cosine": lambda: (1 + mpmath.cos(2 * mpmath.pi * c * q)) / 2,
        "restarts": lambda: (1 + mpmath.cos(mpmath.pi * (int(c) * e % n) / n)) / 2,
        "polynomial": lambda: (1 - q) ** c,
        "inverse_sqrt": lambda: 1 / mpmath.sqrt(1 + e / c),
        "1-sqrt": lambda: 1 - mpmath.sqrt(q),
        "1-sqrt-rise": lambda: mpmath.sqrt(1 - q),
    }[phase.shape]()
    return phase.from_ * w0 + phase.to * (1 - w0)


@pytest.mark.parametrize("name", ZOO)
def test_definition_keeps_its_digits(name: str) -> None:
    schedule = ZOO[name].resolve(PEAK)
    steps = schedule_parity.steps(schedule)
    steps = steps[:: max(1, len(steps) // 150)].tolist()
    with mpmath.workdps(40):
        for k in steps:
            phase = [p for i, p in enumerate(schedule.phases) if i == 0 or p.begin <= k][-1]
            want = exact(phase, k, schedule.table)
            got = schedule.lr_at(k)
            if phase.shape == "cosine" and 2 * phase.shape_param % 1:
                allowed = tolerances.SCHEDULE_UNEVEN_FP64
            else:
                allowed = tolerances.SCHEDULE_ULPS[phase.shape] * math.ulp(want)
            assert abs(got - want) <= allowed, (k, got, float(want))
            # a zero of the formula is a zero, not something small; 1e-38 is what 40 digits leave of one
            assert (got == 0) == (abs(want) < 1e-38), (k, got, float(want))


def test_first_update_and_edges_of_warmup() -> None:
    schedule = fusedlr.linear(warmup_steps=4, total_steps=8)
    assert [schedule.lr_at(k) for k in range(9)] == [0, 0.25, 0.5, 0.75, 1, 0.75, 0.5, 0.25, 0]
    assert fusedlr.linear(total_steps=4).lr_at(0) == 1
    assert fusedlr.linear(4, 8, warmup_from=0.5).lr_at(0) == 0.5


@pytest.mark.parametrize("warmup", [5, 8])
@pytest.mark.parametrize("build", [fusedlr.linear, fusedlr.cosine, fusedlr.cosine_with_restarts])
def test_warmup_as_long_as_the_run(build: Any, warmup: int) -> None:
    schedule = build(warmup_steps=warmup, total_steps=5, min_lr_ratio=0.25)
    assert [schedule.lr_at(k) for k in range(5)] == [k / warmup for k in range(5)]
    assert schedule.lr_at(warmup) == schedule.lr_at(10**9) == 0.25


@pytest.mark.parametrize("name", ZOO)
def test_defined_for_every_integer(name: str) -> None:
    schedule = ZOO[name]
    first, end = schedule.phases[0].begin, schedule.phases[-1].end
    assert schedule.lr_at(-(10**9)) == schedule.lr_at(first - 1) == schedule.lr_at(first)
    assert schedule.lr_at(end) == schedule.lr_at(end + 1) == schedule.lr_at(2**60)


def test_past_the_end_the_last_value_holds() -> None:
    # transformers' cosine climbs again and its polynomial divides by zero at k = T = W
    assert fusedlr.cosine(10, 100).lr_at(150) == 0
    assert fusedlr.polynomial(5, 5, lr_end=0.25).lr_at(5) == 0.25
    assert fusedlr.cosine(10, 100, num_cycles=1).lr_at(150) == 1


def test_step_and_peak_come_in_any_number_type() -> None:
    schedule = fusedlr.cosine(10, 100)
    want = schedule.lr_at(7, 0.25)
    for k in (7.0, np.int32(7), np.int64(7), torch.tensor(7)):
        assert schedule.lr_at(k, 0.25) == want
    for peak in (np.float32(0.25), torch.tensor(0.25)):
        assert schedule.lr_at(7, peak) == want


def test_restarts_with_cycle_mult() -> None:
    schedule = fusedlr.cosine_with_restarts(10, 80, num_cycles=3, cycle_mult=2.0)
    # 70 updates in the ratio 1:2:4
    assert [p.begin for p in schedule.phases] == [0, 10, 20, 40, 80]
    assert [schedule.lr_at(k) for k in (10, 20, 40, 80)] == [1, 1, 1, 0]
    assert schedule.lr_at(30) == pytest.approx(0.5, abs=1e-15)
    # lengths that no float holds are refused as lengths, not as an overflow
    with pytest.raises(ValueError, match=r"num_cycles=9 with cycle_mult=1e\+300 leaves a cycle without"):
        fusedlr.cosine_with_restarts(total_steps=1000, num_cycles=9, cycle_mult=1e300)


def test_stable_steps_win_and_say_so() -> None:
    with pytest.warns(
        UserWarning, match="make 30 updates, not total_steps=100: stable_steps is used"
    ) as caught:
        schedule = fusedlr.warmup_stable_decay(10, 10, 100, stable_steps=10)
    # it points at the caller
    assert caught[0].filename == __file__
    assert schedule.total_steps == 100
    assert [schedule.lr_at(k) for k in (19, 30, 99)] == [1, 0, 0]


# --- spellings


@pytest.mark.parametrize("name", ZOO)
def test_fp32_is_enough(name: str) -> None:
    schedule_parity.check(schedule_numpy.lr_at, ZOO[name])


@pytest.mark.parametrize("edit", wrong.EDITS)
def test_harness_rejects(edit: str) -> None:
    spelling = wrong.load(edit).lr_at
    rejected = [any(schedule_parity.differences(spelling, schedule)) for schedule in ZOO.values()]
    assert any(rejected), "the harness does not see this mistake"
    # a mistake of one kind leaves something alone, else it is the harness that refuses everything
    assert not all(rejected)


class Vectors(TensorMath):
    """The reference's arithmetic over many steps at once."""

    def take(self, values: Any, index: torch.Tensor) -> torch.Tensor:
        return torch.tensor(values, dtype=self.dtype, device=self.device)[index]


def on_device(xp: TensorMath) -> schedule_parity.Evaluator:
    """The evaluator of the reference step."""

    def lr_at(schedule: Schedule, k: np.ndarray, peak: float) -> np.ndarray:
        schedule = schedule.resolve(peak)
        values = []
        # few enough for one thread: MKL's first sine on two may be off by 7e-9 (torch 2.13, 1 process in 200)
        for steps in torch.from_numpy(k).to(xp.device).split(1024):
            ratio = evaluate(schedule.phases, steps, schedule.table, xp)
            # a constant does not depend on the step: it comes back as one number
            ratio = ratio if isinstance(ratio, torch.Tensor) else xp.scalar(ratio)
            values.append((peak * ratio).cpu().expand(steps.shape))
        return torch.cat(values).numpy()

    return lr_at


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_reference_evaluates_on_the_device(device: str) -> None:
    for schedule in ZOO.values():
        schedule_parity.check(on_device(Vectors(torch.device(device))), schedule, np.float64)


@pytest.mark.parametrize("name", ZOO)
def test_reference_evaluates_one_counter(name: str) -> None:
    schedule = ZOO[name].resolve(PEAK)
    xp = TensorMath(torch.device("cpu"))
    for k in {0, 1, schedule.phases[-1].begin, schedule.phases[-1].end - 1, 10**9}:
        got = xp.scalar(evaluate(schedule.phases, torch.tensor(k), schedule.table, xp))
        want = schedule.lr_at(k)
        assert got.shape == () and got.dtype == torch.float64
        assert abs(got.item() - want) <= tolerances.SCHEDULE_ULPS_FP64 * math.ulp(want)


# --- a schedule is a value


@pytest.mark.parametrize("name", ZOO)
def test_round_trips(name: str) -> None:
    schedule = ZOO[name]
    read = Schedule.from_json(schedule.to_json())
    assert read == schedule and repr(read) == repr(schedule)
    resolved = schedule.resolve(PEAK)
    numbers = resolved.to_numbers()
    assert all(isinstance(x, (int, float)) for x in numbers)
    assert Schedule.from_numbers(numbers) == resolved
    # checkpoints may turn every number into a float
    assert Schedule.from_numbers([float(x) for x in numbers]) == resolved
    for twin in (pickle.loads(pickle.dumps(schedule)), copy.deepcopy(schedule)):
        assert twin == schedule and hash(twin) == hash(schedule) and repr(twin) == repr(schedule)


@pytest.mark.parametrize("name", LABELLED)
def test_repr_is_the_call(name: str) -> None:
    schedule = LABELLED[name]
    names = {**vars(fusedlr.schedule), "Phase": Phase, "Absolute": Absolute, "Schedule": Schedule}
    assert eval(repr(schedule), names) == schedule
    resolved = schedule.resolve(PEAK)
    assert eval(repr(resolved), names) == resolved
    anonymous = Schedule.from_numbers(resolved.to_numbers())
    assert eval(repr(anonymous), names) == anonymous


def test_repr_leaves_out_defaults_and_long_tables() -> None:
    assert repr(fusedlr.cosine(10, total_steps=100)) == "cosine(warmup_steps=10, total_steps=100)"
    assert repr(fusedlr.linear(0.1, 100, min_lr_ratio=np.float64(0.5))) == (
        "linear(warmup_steps=0.1, total_steps=100, min_lr_ratio=0.5)"
    )
    assert repr(fusedlr.cosine_with_min_lr(5, 50, min_lr=1e-5).resolve(1e-4)) == (
        "cosine_with_min_lr(warmup_steps=5, total_steps=50, min_lr=1e-05).resolve(0.0001)"
    )
    table = fusedlr.table(range(1000))
    assert repr(table) == "table(<1000 values>)"
    assert len(repr(Schedule(table.phases, 1000, table.table))) < 200


def test_equality_is_about_values() -> None:
    assert fusedlr.cosine(10, 100) == fusedlr.cosine(0.1, 100, min_lr_ratio=0)
    assert fusedlr.cosine(10, 100, min_lr=1e-5) == fusedlr.cosine_with_min_lr(10, 100, min_lr=1e-5)
    assert fusedlr.cosine(10, 100) != fusedlr.cosine(10, 101)
    assert fusedlr.cosine(10, 100) != fusedlr.linear(10, 100)
    assert len({fusedlr.cosine(10, 100), fusedlr.cosine(10, 100), fusedlr.cosine(9, 100)}) == 2


def test_absolute_levels_wait_for_the_peak() -> None:
    schedule = fusedlr.linear(total_steps=10, min_lr=1e-5)
    assert schedule.resolve(1e-4) == fusedlr.linear(total_steps=10, min_lr_ratio=1e-5 / 1e-4)
    assert schedule.lr_at(10, peak=1e-4) == pytest.approx(1e-5, rel=1e-15)
    ratio = fusedlr.linear(total_steps=10)
    assert ratio.resolve(0.0) is ratio


# --- refusals: the call, and what its message must name

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
    ("Schedule.from_json('[]')", "text is not a schedule in JSON"),
    ("Schedule.from_json('{')", "text is not a schedule in JSON"),
    ("Schedule.from_numbers([1.0])", "not a schedule in numbers"),
    ("Schedule.from_numbers([1, 5, 0, 5])", "not a schedule in numbers"),
    ("Schedule.from_numbers([1, 5, 0, 5, 0, 1, 0, 99, 0])", "not a schedule in numbers"),
]


@pytest.mark.parametrize(("call", "message"), REFUSED, ids=[call for call, _ in REFUSED])
def test_refused(call: str, message: str) -> None:
    with pytest.raises(ValueError) as error:
        eval(call, {**vars(fusedlr.schedule), "nan": math.nan, "inf": math.inf})
    assert message in str(error.value)
