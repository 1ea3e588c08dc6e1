"""The stages of a GPU step and the tables between steps: squares, scopes, missing gradients, given rates.

Steppers are made from rows directly where an optimizer has no way to ask for the case.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from kit import needs_watch
from tolerances import GPU_STEP
from torch import Tensor

from fusedlr import backends
from fusedlr.backends import order
from fusedlr.backends.gpu.tables import Layout, Table
from fusedlr.backends.order import CopyingStepper, StepInputs
from fusedlr.columns import USED
from fusedlr.kept import Kept
from fusedlr.reference import Counters, GroupStep, Row, Scope, Signals, Stepper
from gpu.steps import SCHEDULE, all_params, both, compare, count_calls, params, train

CPU = torch.device("cpu")
CLIPPED = Scope(max_grad_norm=0.5, skip_nonfinite=True, always=False)
FREE = Scope(max_grad_norm=None, skip_nonfinite=False, always=False)


def group(scope: int, **options: Any) -> GroupStep:
    """A group under a schedule."""
    values: dict[str, Any] = {
        "schedule": SCHEDULE,
        "lr": None,
        "peak": 0.01,
        "betas": (0.9, 0.99),
        "eps": 1e-6,
        "weight_decay": 0.1,
        "maximize": False,
    }
    return GroupStep(scope=scope, **{**values, **options})


def make_rows(*sizes: Sequence[int], dtype: torch.dtype = torch.float32, amsgrad: bool = False) -> list[Row]:
    """Rows with gradients, `sizes[i]` elements in the tensors of group `i`."""
    generator = torch.Generator().manual_seed(3)
    rows = []
    for index, own in enumerate(sizes):
        for size in own:
            p = torch.nn.Parameter(torch.randn(size, generator=generator).to(dtype))
            p.grad = torch.randn(size, generator=generator).to(dtype)
            names = Kept().names(p, {"amsgrad": amsgrad})
            rows.append(Row.alone(index, p, {name: torch.zeros(size) for name in names}, torch.zeros(())))
    return rows


def make(
    backend: str, rows: list[Row], groups: list[GroupStep], scopes: list[Scope], rates: Sequence[float] = ()
) -> tuple[Stepper, Counters]:
    """A stepper of a backend for these rows, and its counters."""
    counters = Counters.zeros(len(groups), CPU)
    inputs = StepInputs(rows, rates or [math.nan] * len(groups))
    stepper = backends.BACKENDS[backend].prepare(rows, counters, inputs)
    stepper.assign(groups, scopes)
    return stepper, counters


def outcome(rows: list[Row], counters: Counters) -> list[Tensor]:
    """All that steps leave behind."""
    return [x.detach() for row in rows for x in row.written()] + [counters.counts, counters.used]


def same_bits(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x.nan_to_num(7), y.nan_to_num(7)) for x, y in zip(a, b, strict=True))


def steps_equal(
    backend: str, rows: list[Row], groups: list[GroupStep], scopes: list[Scope], n: int = 2
) -> Counters:
    """Compare some steps with the reference; returns the backend's counters."""
    theirs = copy.deepcopy(rows)
    for row, other in zip(rows, theirs, strict=True):
        other.param.grad = None if row.param.grad is None else row.param.grad.clone()
    ours, counters = make(backend, rows, groups, scopes)
    reference, expected = make("reference", theirs, groups, scopes)
    for _ in range(n):
        ours.step(Signals()), reference.step(Signals())
    assert torch.equal(counters.counts, expected.counts)
    # but for what the blocks of a step tell the last one
    kept = [i for i, name in enumerate(USED) if name not in ("held", "skip")]
    used, wanted = counters.used[kept].double(), expected.used[kept]
    torch.testing.assert_close(used, wanted, rtol=GPU_STEP, atol=0, equal_nan=True)
    for row, other in zip(rows, theirs, strict=True):
        for x, y in zip(row.written(), other.written(), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-7)
    assert list(ours.active()) == list(reference.active())
    return counters


MIXED = [group(0), group(1, weight_decay=0.0), group(0, maximize=True)]
SIZES = ((5, 4097, 0), (9000, 3), (1025,))


@pytest.mark.parametrize("scale", (None, 8.0))
def test_the_stages_one_by_one_are_a_step(gpu_backend: str, scale: float | None) -> None:
    signals = Signals(grad_scale=None if scale is None else torch.tensor(scale), found_inf=torch.tensor(0.0))
    runs = []
    for staged in (False, True):
        rows = make_rows(*SIZES, amsgrad=True)
        stepper, counters = make(gpu_backend, rows, MIXED, [CLIPPED, FREE])
        for _ in range(3):
            if staged:
                stepper.norm(signals)
                stepper.update(signals)
            else:
                stepper.step(signals)
        runs.append(outcome(rows, counters))
    assert same_bits(*runs)


def test_between_the_stages_lie_the_sums_of_squares(gpu_backend: str) -> None:
    rows = make_rows(*SIZES)
    stepper, counters = make(gpu_backend, rows, MIXED, [CLIPPED, FREE])
    before = outcome(rows, counters)
    stepper.norm(Signals())
    assert same_bits(outcome(rows, counters), before)
    squares = sum(row.param.grad.double().square().sum() for row in rows if MIXED[row.group].scope == 0)
    torch.testing.assert_close(counters.squares[0].double(), squares, rtol=1e-6, atol=0)
    # what other processes would add is taken for the norm
    counters.squares[0] *= 4
    stepper.update(Signals())
    norm = 2 * math.sqrt(squares)
    assert counters.grad_norm.tolist() == pytest.approx([norm, math.nan, norm], rel=1e-6, nan_ok=True)
    assert counters.coef.tolist() == pytest.approx([0.5 / norm, 1, 0.5 / norm], rel=1e-5)


def test_a_sum_that_is_not_finite_skips_its_scope_alone(gpu_backend: str) -> None:
    rows = make_rows(*SIZES)
    stepper, counters = make(gpu_backend, rows, MIXED, [CLIPPED, CLIPPED])
    stepper.norm(Signals())
    counters.squares[0] = math.inf
    stepper.update(Signals())
    assert counters.k.tolist() == [0, 1, 0] and counters.skipped.tolist() == [1, 0, 1]
    assert [row.step.item() for row in rows] == [0, 0, 0, 1, 1, 0]


def test_groups_of_a_scope_may_stand_anywhere(gpu_backend: str) -> None:
    scope_of = (2, 0, 2, 1, 0)
    groups = [group(scope, peak=0.01 * (1 + i)) for i, scope in enumerate(scope_of)]
    scopes = [CLIPPED, Scope(3.0, True, False), Scope(1.0, True, False)]
    rows = make_rows((5, 4097), (300,), (9, 0, 20), (), (4096,))
    counters = steps_equal(gpu_backend, rows, groups, scopes)
    # the group without tensors is alone in its scope
    assert counters.k.tolist() == [2, 2, 2, 0, 2]
    norms = counters.grad_norm.tolist()
    assert norms[0] == norms[2] and norms[1] == norms[4] != norms[0]


def test_the_slots_of_a_scope_lie_together() -> None:
    rows = make_rows((5, 4097), (300,), (9, 0, 20), (), (4096,))
    layout = Layout.of(rows, [2, 0, 2, 1, 0], 3)
    assert layout.slots == [(0, 2), (2, 3), (3, 8)] and layout.programs == 8
    chunks = [layout.chunks[i : i + 6] for i in range(0, len(layout.chunks), 6)]
    assert sorted(chunk[2] for chunk in chunks) == list(range(8))
    for tensor, _, slot, index, scope, _ in chunks:
        begin, end = layout.slots[scope]
        assert begin <= slot < end and scope == [2, 0, 2, 1, 0][index]
        assert tensor < 0 or rows[tensor].group == index
    # one chunk per group says which rate it used
    assert sorted(chunk[3] for chunk in chunks if chunk[5]) == [0, 1, 2, 3, 4]


def test_a_scope_that_always_steps_needs_no_gradient(gpu_backend: str) -> None:
    rows = make_rows((5,), (7,))
    for row in rows:
        row.param.grad = None
    always = Scope(max_grad_norm=1.0, skip_nonfinite=True, always=True)
    counters = steps_equal(gpu_backend, rows, [group(0), group(1)], [always, CLIPPED], n=3)
    assert counters.k.tolist() == [3, 0]
    assert counters.grad_norm[0] == 0 and counters.grad_norm[1].isnan()
    assert [row.step.item() for row in rows] == [0, 0]


def test_a_stepper_goes_on_when_captured_launches_are_outdated(gpu_backend: str) -> None:
    rows = make_rows(*SIZES)
    stepper, counters = make(gpu_backend, rows, MIXED, [CLIPPED, FREE])
    stepper.step(Signals())
    counters.graphs.pin("these rows")
    counters.graphs.expect("other rows")
    stepper.step(Signals())
    assert counters.k.tolist() == [2, 2, 2] and counters.stale.tolist() == [0, 0, 0]


def test_torchs_default_dtype_is_no_matter(gpu_backend: str) -> None:
    rate = torch.tensor(0.02, dtype=torch.float64)
    groups = [group(0), group(1, schedule=None, peak=math.nan, lr=rate), group(0)]
    runs = []
    for dtype in (torch.float32, torch.float64):
        rows = make_rows(*SIZES)
        torch.set_default_dtype(dtype)
        try:
            stepper, counters = make(gpu_backend, rows, groups, [CLIPPED, CLIPPED])
            stepper.step(Signals(grad_scale=2.0, found_inf=0))
        finally:
            torch.set_default_dtype(torch.float32)
        runs.append(outcome(rows, counters))
    assert same_bits(*runs)


# gradients that come and go


def leave_some_out(optimizer: Any, k: int) -> None:
    for i, p in enumerate(all_params(optimizer)):
        if k and (i + k) % 3 == 0:
            p.grad = None


def two_groups() -> list[dict[str, Any]]:
    return [{"params": params(5, 4100, 0)}, {"params": params(4, 9, seed=2), "lr": 0.1}]


@needs_watch
@pytest.mark.parametrize("groups", ("joint", "independent"))
def test_gradients_that_come_and_go_make_no_new_plan(gpu_backend: str, groups: str) -> None:
    plans = []

    def before(optimizer: Any, k: int) -> None:
        leave_some_out(optimizer, k)
        plans.append(optimizer._planner.plan)

    ours = train(gpu_backend, two_groups, steps=6, before=before, groups=groups)
    compare(ours, train("reference", two_groups, steps=6, before=leave_some_out, groups=groups))
    assert len({id(plan) for plan in plans[1:]}) == 1 and ours._planner.plan is plans[-1]


def test_an_empty_tensor_counts_when_it_has_a_gradient(gpu_backend: str) -> None:
    def before(optimizer: Any, k: int) -> None:
        if k == 1:
            all_params(optimizer)[2].grad = None

    ours = both(gpu_backend, two_groups, before=before)
    assert [ours.state[p]["step"].item() for p in all_params(ours)] == [3, 3, 2, 3, 3]


def test_only_which_scopes_step_is_uploaded_when_gradients_come_and_go(
    gpu_backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimizer = train(gpu_backend, two_groups, steps=2, groups="independent")
    static = [p.grad for p in all_params(optimizer)]
    uploads = count_calls(monkeypatch, Table, "_upload")
    graphs = optimizer._counts.counters.graphs
    used, k = optimizer._counts.counters.used[:, 1].clone(), optimizer._counts.counters.k[1].item()
    for p in optimizer.param_groups[1]["params"]:
        p.grad = None
    optimizer.step()
    flags = [table.tensor.tolist() for table, _ in uploads if table is not graphs.gradients]
    assert flags == [[1, 0]] and len(uploads) == 1 + (gpu_backend == "triton")
    # nothing of a scope that made no step has moved
    assert torch.equal(optimizer._counts.counters.used[:, 1], used)
    assert optimizer._counts.counters.k[1].item() == k
    for p, grad in zip(all_params(optimizer), static, strict=True):
        p.grad = grad
    optimizer.step()
    # which was uploaded at the first step
    assert len(uploads) == 1 + 2 * (gpu_backend == "triton")
    assert optimizer._counts.counters.k[1].item() == k + 1


def test_a_gradient_that_is_missing_from_one_group_of_a_scope_changes_no_table(
    gpu_backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimizer = train(gpu_backend, two_groups, steps=2)
    for p in optimizer.param_groups[1]["params"]:
        p.grad = None
    uploads = count_calls(monkeypatch, Table, "_upload")
    optimizer.step()
    # the joint scope makes every step; Triton's launches take addresses from a table
    assert len(uploads) == (gpu_backend == "triton")


# rates


@needs_watch
def test_rates_that_are_given_anew_upload_nothing_but_rates(
    gpu_backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def before(optimizer: Any, k: int) -> None:
        for i, group in enumerate(optimizer.param_groups):
            group["lr"] = 0.01 * (1 + i) / (1 + k)

    options: dict[str, Any] = {"schedule": None}
    optimizer = train(gpu_backend, two_groups, steps=4, before=before, **options)
    compare(optimizer, train("reference", two_groups, steps=4, before=before, **options))
    graphs = optimizer._counts.counters.graphs
    plan, uploads = optimizer._planner.plan, count_calls(monkeypatch, Table, "_upload")
    for k in range(4, 7):
        before(optimizer, k)
        optimizer.step()
        assert optimizer.metrics()["lr"].tolist() == pytest.approx([0.01 / (1 + k), 0.02 / (1 + k)], rel=1e-6)
    assert optimizer._planner.plan is plan
    assert len(uploads) == 3 and {id(table) for table, _ in uploads} == {id(graphs.rates)}
    optimizer.step()
    assert len(uploads) == 3


def test_a_given_rate_beside_a_schedule_and_a_tensor(gpu_backend: str) -> None:
    rate = torch.tensor(0.02)
    groups = [
        group(0, schedule=None, peak=math.nan),
        group(0),
        group(0, schedule=None, peak=math.nan, lr=rate),
        group(0, schedule=None, peak=math.nan, lr=rate.double()),
    ]
    rows = make_rows((5,), (6,), (7,), (8,))
    stepper, counters = make(gpu_backend, rows, groups, [CLIPPED], [0.5, 7.0, math.nan, math.nan])
    for _ in range(2):
        stepper.step(Signals())
    assert counters.lr.tolist() == pytest.approx([0.5, SCHEDULE.lr_at(1, 0.01), 0.02, 0.02], rel=1e-6)
    # a tensor may get other memory
    rate.data = torch.tensor(0.25)
    stepper.step(Signals())
    assert counters.lr.tolist() == pytest.approx([0.5, SCHEDULE.lr_at(2, 0.01), 0.25, 0.02], rel=1e-6)


# copies


def test_a_step_on_copies_cannot_be_captured(gpu_backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = make_rows((6,))
    p = rows[0].param
    p.data, p.grad = torch.ones(2, 3), torch.ones(3, 2).t()
    entry = rows[0].all_state[p]
    entry.update(exp_avg=torch.zeros(2, 3), exp_avg_sq=torch.zeros(2, 3))
    stepper, counters = make(gpu_backend, rows, [group(0)], [FREE])
    assert isinstance(stepper, CopyingStepper)
    monkeypatch.setattr(order, "capturing", lambda device: True)
    with pytest.raises(
        RuntimeError, match=r"do not lie in the same order[^.]*\. Make them contiguous before"
    ):
        stepper.step(Signals())
    assert counters.k.tolist() == [0] and torch.equal(p, torch.ones(2, 3))
    monkeypatch.undo()
    stepper.step(Signals())
    assert counters.k.tolist() == [1] and list(stepper.active()) == [True]


def test_dtypes_without_a_kernel_run_through_the_reference(gpu_backend: str) -> None:
    rows = make_rows((6,), dtype=torch.float64)
    stepper, _ = make(gpu_backend, rows, [group(0)], [FREE])
    assert type(stepper).__name__ == "ReferenceStepper"
