"""The C++ kernel against the reference, bit for bit, on every instruction set and number of threads."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import EDGES
from harness import relative_difference
from kit import StepGroup, StepRow, run_step, stepper
from torch import Tensor

import fusedlr
from fusedlr.backends import compiled, cpu
from fusedlr.backends.order import StepInputs
from fusedlr.kept import Kept
from fusedlr.reference import Counters, ReferenceStepper, Signals

if cpu.why_not([torch.device("cpu")]):
    pytest.skip(str(cpu.why_not([torch.device("cpu")])), allow_module_level=True)


CPU = torch.device("cpu")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# pairs that there are loops for
PAIRS = [(p, m) for p in DTYPES for m in dict.fromkeys((torch.float64, torch.float32, p))]
# in which the reference, too, computes everything in one precision
EXACT_PAIRS = [(p, m) for p, m in PAIRS if (p == torch.float64) == (m == torch.float64)]
# work for several threads, and sums over several pieces of a tensor; the last is less than the remainder when
# threads share the elements
LARGE = ((200_000,), (3, 1000), (8192,), (8193,), (5,), (1,))


@pytest.fixture(params=cpu.isas())
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("FUSEDLR_CPU_ISA", request.param)
    return request.param


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def make_rows(
    shapes: Any, dtype: torch.dtype, moments: torch.dtype, amsgrad: bool, offset: int = 0
) -> list[StepRow]:
    """Rows in the middle of a run; every tensor starts `offset` elements into its memory."""
    generator = torch.Generator().manual_seed(2)

    def tensor(shape: tuple[int, ...], of: torch.dtype, values: Callable[[Tensor], Tensor]) -> Tensor:
        drawn = values(torch.randn(shape, generator=generator, dtype=torch.float64)).to(of)
        memory = torch.empty(drawn.numel() + offset, dtype=of)
        return memory[offset:].view(shape).copy_(drawn)

    def drawn_as(name: str) -> Callable[[Tensor], Tensor]:
        return (lambda x: 0.1 * x) if name == "exp_avg" else torch.square

    names = Kept().names(torch.empty(0, dtype=dtype), {"amsgrad": amsgrad})
    rows = []
    for i, shape in enumerate(shapes):
        # exponents over the whole range of fp16, subnormal numbers included
        spread = tensor(shape, torch.float64, lambda x: (x * 3 - 4).exp2())
        rows.append(
            StepRow(
                tensor(shape, dtype, lambda x: x),
                tensor(shape, dtype, lambda x, spread=spread: x * spread),
                {name: tensor(shape, moments, drawn_as(name)) for name in names},
                torch.tensor(float(i % 3)),
            )
        )
    return rows


def tensors(groups: list[StepGroup]) -> list[Tensor]:
    return [x for group in groups for row in group.rows for x in row.tensors()]


def values(counters: Counters) -> list[list[float]]:
    names = ("k", "skipped", "skips_in_row", "lr", "grad_norm", "coef", "limit")
    return [getattr(counters, name).tolist() for name in names]


def bits(x: Tensor) -> list[int]:
    width = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    return x.contiguous().view(-1).view(width).tolist()


def run(
    backend: str, groups: list[StepGroup], *signals: Signals, joint: bool = True
) -> tuple[list[StepGroup], Counters]:
    """Steps on a copy of the groups."""
    groups = copy.deepcopy(groups)
    counters = Counters.zeros(len(groups), CPU)
    for signal in signals or (Signals(),):
        run_step(backend, groups, counters, signal, joint=joint)
    return groups, counters


def assert_same(groups: list[StepGroup], *signals: Signals, joint: bool = True, exact: bool = True) -> None:
    ours, our_counters = run("cpu", groups, *signals, joint=joint)
    theirs, their_counters = run("reference", groups, *signals, joint=joint)
    for a, b in zip(tensors(ours), tensors(theirs), strict=True):
        if exact:
            assert bits(a) == bits(b)
        else:
            # of the largest element: where terms cancel, the norm's last bits weigh more
            assert torch.equal(a, b) or relative_difference([a], [b]) <= 1e-6
    for a, b in zip(values(our_counters), values(their_counters), strict=True):
        # norms are summed in another order
        assert a == pytest.approx(b, rel=1e-6, nan_ok=True)


@pytest.fixture(autouse=True)
def same_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torch take `expm1` from the C library, as the kernel does, and round roots correctly.

    Its own `expm1` may differ in the last bit, and so may its vectorised `sqrt`, as MKL's on AMD processors.
    """

    def expm1(x: Tensor) -> Tensor:
        return torch.tensor(math.expm1(x.item()), dtype=x.dtype)

    def sqrt(x: Tensor) -> Tensor:
        return torch.as_tensor(np.sqrt(x.numpy()))

    monkeypatch.setattr(torch, "expm1", expm1)
    monkeypatch.setattr(Tensor, "sqrt", sqrt)


@pytest.mark.parametrize("amsgrad", (False, True), ids=("plain", "amsgrad"))
@pytest.mark.parametrize("offset", (0, 1))
@pytest.mark.parametrize(("dtype", "moments"), EXACT_PAIRS, ids=str)
def test_equals_the_reference_bit_for_bit(dtype, moments, offset, amsgrad, isa):
    rows = make_rows((*EDGES, (5, 37)), dtype, moments, amsgrad, offset)
    group = StepGroup(rows, maximize=offset == 1)
    assert_same([group], Signals(), Signals(grad_scale=torch.tensor(1024.0)), Signals(grad_scale=3.0))


@pytest.mark.parametrize(("dtype", "moments"), [pair for pair in PAIRS if pair not in EXACT_PAIRS], ids=str)
def test_mixed_precisions_are_at_least_as_good(dtype, moments, isa):
    group = StepGroup(make_rows((*EDGES, (5, 37)), dtype, moments, False), betas=(0.5, 0.5), eps=1e-3)
    ours, _ = run("cpu", [group])
    wide = [
        StepRow(
            row.param.double(),
            row.grad.double(),
            {name: x.double() for name, x in row.state.items()},
            row.step,
        )
        for row in group.rows
    ]
    exact, _ = run("reference", [replace(group, rows=wide)])
    for a, b in zip(tensors(ours), tensors(exact), strict=True):
        assert relative_difference([a], [b]) <= 2 * torch.finfo(a.dtype).eps


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_every_16_bit_number_is_read_and_rounded_as_torch_does(dtype, isa):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    every = every[every.isfinite()]
    n = every.numel()
    # with decay alone, p becomes (1 - decay) * p: rounded at every place
    moments = torch.zeros(n)
    rows = [
        StepRow(
            every.clone(),
            torch.zeros(n, dtype=dtype),
            {"exp_avg": moments, "exp_avg_sq": moments.clone()},
            torch.tensor(0.0),
        )
    ]
    for decay in (0.0, 0.37, 0.5, 1.5, -3.0):
        assert_same([StepGroup(copy.deepcopy(rows), lr=1.0, weight_decay=decay)])
    # as gradients, and as moments kept in 16 bits
    zeros = {"exp_avg": moments, "exp_avg_sq": moments.clone()}
    rows = [StepRow(torch.ones(n, dtype=dtype), every, zeros, torch.tensor(0.0))]
    assert_same([StepGroup(rows)])
    rows = [
        StepRow(
            torch.ones(n, dtype=dtype),
            torch.zeros(n, dtype=dtype),
            {"exp_avg": every, "exp_avg_sq": every.abs()},
            torch.tensor(0.0),
        )
    ]
    assert_same([StepGroup(rows, betas=(0.3, 0.7))])


@pytest.mark.parametrize("bad", (math.inf, -math.inf, math.nan))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite_spreads_as_in_the_reference(dtype, bad, isa):
    rows = make_rows(((40,),), dtype, torch.float64 if dtype == torch.float64 else torch.float32, True)
    rows[0].grad[3], rows[0].param[11] = bad, bad
    for i, x in enumerate(rows[0].state.values()):
        x[5 + 2 * i] = bad
    ours, _ = run("cpu", [StepGroup(rows)])
    theirs, _ = run("reference", [StepGroup(rows)])
    for a, b in zip(tensors(ours), tensors(theirs), strict=True):
        assert torch.equal(a.nan_to_num(12345), b.nan_to_num(12345))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_and_instruction_sets_do_not_change_a_bit(dtype, threads, monkeypatch):
    moments = torch.float64 if dtype == torch.float64 else torch.float32
    group = StepGroup(make_rows(LARGE, dtype, moments, False), max_grad_norm=1.0)
    seen = set()
    for name in cpu.isas():
        monkeypatch.setenv("FUSEDLR_CPU_ISA", name)
        for n in (1, 2, 3, 5):
            threads(n)
            after, counters = run("cpu", [group], Signals(), Signals())
            seen.add((counters.grad_norm.item(), *(tuple(bits(x)) for x in tensors(after))))
    assert len(seen) == 1


@pytest.mark.parametrize("max_grad_norm", (None, 0.5, 1e6))
@pytest.mark.parametrize("skip_nonfinite", (False, True))
@pytest.mark.parametrize("joint", (False, True))
def test_counts_as_the_reference(max_grad_norm, skip_nonfinite, joint):
    rows = make_rows(((33,), (4, 5), (7,), (2, 2)), torch.float32, torch.float32, False)
    options: dict[str, Any] = {"max_grad_norm": max_grad_norm, "skip_nonfinite": skip_nonfinite}
    schedule = fusedlr.cosine(warmup_steps=2, total_steps=9)
    groups = [
        StepGroup(rows[:2], **options, lr=schedule, peak=0.1),
        StepGroup([], **options, lr=schedule, peak=0.2),
        StepGroup(rows[2:3], **options, lr=torch.tensor([0.05]), maximize=True),
        StepGroup(rows[3:], **options),
    ]
    if not joint:
        groups[2] = replace(groups[2], max_grad_norm=0.1)
        groups[3] = replace(groups[3], skip_nonfinite=True)
    found = [None, 0.0, torch.tensor([[0.0]]), 1.0, torch.tensor(2.0), math.nan, -1.0, True, torch.tensor(0)]
    scales = [None, 1.0, torch.tensor(64.0), torch.tensor([2], dtype=torch.int64), 0.5]
    signals = [Signals(scales[i % len(scales)], found[i % len(found)]) for i in range(12)]
    assert_same(groups, *signals, joint=joint, exact=False)
    groups[0].rows[0].grad[3] = math.inf
    if skip_nonfinite:
        assert_same(groups, *signals[:3], joint=joint, exact=False)


@pytest.mark.parametrize("backend", ("cpu", "reference"))
def test_the_update_decides_by_the_sums_of_squares_that_it_finds(backend):
    """Those of all processes may have been added since."""
    rows = make_rows(((33,), (4, 5)), torch.float32, torch.float32, False)
    counters, expected = Counters.zeros(1, CPU), math.hypot(*(row.grad.norm().item() for row in rows))
    made = stepper(backend, [StepGroup(rows, max_grad_norm=1.0)], counters)
    made.norm(Signals())
    assert counters.k.item() == 0
    counters.squares.mul_(4)
    made.update(Signals())
    assert counters.grad_norm.item() == pytest.approx(2 * expected, rel=1e-6)


@pytest.mark.parametrize("backend", ("cpu", "reference"))
def test_a_scope_makes_the_step_where_another_process_has_its_gradients(backend):
    rows = make_rows(((3,), (4,)), torch.float32, torch.float32, False)
    groups, counters = [StepGroup([replace(row, grad=None)]) for row in rows], Counters.zeros(2, CPU)
    stepper(backend, groups, counters, joint=False).step(Signals(stepped=torch.tensor([2.0, 0.0])))
    assert counters.k.tolist() == [1, 0]


def test_a_sum_of_squares_that_fp32_cannot_hold_is_skipped_as_in_the_reference():
    rows = make_rows(((5000,),), torch.float32, torch.float32, False)
    rows[0].grad.fill_(1e18)
    assert_same([StepGroup(rows, max_grad_norm=1.0, skip_nonfinite=True)])
    # of its parts fp32 can hold each
    rows[0].grad.fill_(5e17)
    assert_same([StepGroup(rows, max_grad_norm=1.0, skip_nonfinite=True)])
    rows[0].grad.fill_(1e17)
    assert_same([StepGroup(rows, max_grad_norm=1.0, skip_nonfinite=True)], exact=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_skipped_step_leaves_every_bit(dtype, isa):
    rows = make_rows(LARGE, dtype, torch.float32 if dtype != torch.float64 else dtype, True)
    # what would be changed by reading and writing it again
    rows[0].param[0], rows[0].state["exp_avg"][1] = math.nan, math.nan
    rows[1].grad[0, 0] = math.inf
    group = StepGroup(rows, max_grad_norm=1.0, skip_nonfinite=True)
    after, counters = run("cpu", [group], Signals(), Signals(found_inf=1.0))
    for a, b in zip(tensors(after), tensors([group]), strict=True):
        assert bits(a) == bits(b)
    assert [counters.k.item(), counters.skipped.item(), counters.skips_in_row.item()] == [0, 2, 2]


def transposed(x: Tensor) -> Tensor:
    return x.t().contiguous().t()


def sliced(x: Tensor) -> Tensor:
    wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), 7.0, dtype=x.dtype)
    wide[..., ::2] = x
    return wide[..., ::2]


LAYOUTS = {"transposed": transposed, "sliced": sliced, "plain": lambda x: x}


@pytest.mark.parametrize("state", LAYOUTS)
@pytest.mark.parametrize("grad", [*LAYOUTS, "expanded", "negated"])
@pytest.mark.parametrize("param", LAYOUTS)
def test_layouts_in_any_combination(param, grad, state):
    def rows() -> list[StepRow]:
        made = make_rows(((6, 5), (3, 4)), torch.float32, torch.float32, True)
        row = made[0]
        row.param = LAYOUTS[param](row.param)
        for name in ("exp_avg", "max_exp_avg_sq"):
            row.state[name] = LAYOUTS[state](row.state[name])
        if grad == "expanded":
            row.grad = torch.tensor(0.5).expand(6, 5)
        elif grad == "negated":
            row.grad = torch.complex(row.grad, row.grad).conj().imag
        else:
            row.grad = LAYOUTS[grad](row.grad)
        return made

    results = []
    for backend in ("cpu", "reference"):
        group, counters = StepGroup(rows()), Counters.zeros(1, CPU)
        for _ in range(3):
            run_step(backend, [group], counters, Signals())
        results.append([bits(x) for x in tensors([group])])
        if param == "sliced":
            assert (group.rows[0].param.as_strided((6, 5), (10, 2), 1) == 7).all()
    assert results[0] == results[1]


def test_autograd_is_told_of_every_parameter_that_is_written():
    rows = make_rows(((4,), (0,)), torch.float32, torch.float32, True)
    before = [row.param._version for row in rows]
    run_step("cpu", [StepGroup(rows)], Counters.zeros(1, CPU), Signals())
    assert all(row.param._version > v for row, v in zip(rows, before, strict=True))


def test_auto_picks_the_kernel():
    optimizer = fusedlr.FusedAdamW([torch.nn.Parameter(torch.ones(3))])
    assert optimizer.backend == "cpu"


@pytest.mark.parametrize("what", ("a parameter of 8 bits", "moments of two dtypes"))
def test_what_there_is_no_loop_for_is_the_references(what):
    optimizers = []
    for backend in ("cpu", "reference"):
        dtype = torch.float32 if what == "moments of two dtypes" else torch.float8_e5m2
        p = torch.nn.Parameter(torch.tensor([1.0, -2.0, 0.5]).to(dtype))
        p.grad = torch.ones(3).to(dtype)
        optimizers.append(fusedlr.FusedAdamW([p], lr=0.25, backend=backend))
        optimizers[-1].step()
        if dtype == torch.float32:
            optimizers[-1].state[p]["exp_avg_sq"] = optimizers[-1].state[p]["exp_avg_sq"].double()
        optimizers[-1].step()
    ours, expected = (optimizer.param_groups[0]["params"][0] for optimizer in optimizers)
    assert torch.equal(ours.float(), expected.float()) and ours.float()[0] < 1


def test_counters_on_another_device_are_not_written_through_their_address():
    # of a model that was trained on a GPU, and whose groups have been taken out
    counters = Counters.zeros(1, torch.device("meta"))
    assert isinstance(cpu.prepare([], counters, StepInputs([], [0.1])), ReferenceStepper)


def test_other_devices_are_refused_with_the_reason():
    assert cpu.why_not([CPU, torch.device("meta")]) == "it does not run on meta"


def test_a_module_that_cannot_be_used_is_the_reason(monkeypatch):
    monkeypatch.setattr(compiled, "cpu", None)
    monkeypatch.setattr(compiled, "cpu_error", "the C++ kernel was not built")
    assert cpu.why_not([CPU]) == "the C++ kernel was not built"
    optimizer = fusedlr.FusedAdamW([torch.nn.Parameter(torch.ones(3))])
    assert optimizer.backend == "reference"


def test_an_unknown_instruction_set_is_named(monkeypatch):
    monkeypatch.setenv("FUSEDLR_CPU_ISA", "mmx")
    rows = make_rows(((4,),), torch.float32, torch.float32, False)
    before = [bits(x) for x in tensors([StepGroup(rows)])]
    with pytest.raises(ValueError, match="this machine cannot run mmx"):
        run_step("cpu", [StepGroup(rows)], Counters.zeros(1, CPU), Signals())
    assert [bits(x) for x in tensors([StepGroup(rows)])] == before


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_one_openmp_runtime():
    # two would keep two pools of threads, which fight for the cores
    code = """
import torch, fusedlr
p = torch.nn.Parameter(torch.ones(100_000)); p.grad = torch.ones(100_000)
fusedlr.FusedAdamW([p], backend="cpu", max_grad_norm=1.0).step()
maps = [line.split()[-1] for line in open("/proc/self/maps") if "omp" in line.split()[-1].split("/")[-1]]
print(len(set(maps)), set(maps))
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.startswith("1 "), out


class CompiledStep:
    """The arguments of a compiled stepper for two fp64 tensors of two elements, in a group each."""

    def __init__(self) -> None:
        self.tensors = [torch.ones(2, dtype=torch.float64) for _ in range(6)]
        self.t = [torch.zeros(()) for _ in range(2)]
        self.counters = Counters.zeros(2, CPU)
        p, m, v = (self.tensors[i : i + 2] for i in (0, 2, 4))
        self.arguments: dict[str, Any] = {
            "isa": cpu.isa(),
            "group_of": [0, 1],
            "params": [0, 0],
            "state_types": [0, 0],
            "sizes": [2, 2],
            "p": addresses(p),
            "states": [addresses(m), addresses(v), [0, 0], [0, 0], [0, 0]],
            "t": addresses(self.t),
            "groups": 2,
            "counts": self.counters.counts.data_ptr(),
            "used": self.counters.used.data_ptr(),
            "squares": self.counters.squares.data_ptr(),
            "places": [0, 0],
            "columns": [0, 0],
            "ring": None,
        }

    def stepper(self, **changes: Any) -> Any:
        return compiled.cpu.Stepper(**{**self.arguments, **changes})


def addresses(tensors: list[Tensor]) -> list[int]:
    return [x.data_ptr() for x in tensors]


def compiled_group(scope: int) -> Any:
    return compiled.cpu.Group(None, math.nan, 0.9, 0.999, 1e-8, 0.0, False, scope)


# what would lead to other memory is refused
@pytest.mark.parametrize(
    "name", ("group_of", "params", "state_types", "sizes", "p", "t", "states", "one of the states")
)
def test_lists_of_unequal_lengths_are_refused(name):
    step = CompiledStep()
    if name == "one of the states":
        m, v, *others = step.arguments["states"]
        changes = {"states": [m, v[:1], *others]}
    else:
        changes = {name: step.arguments[name][:-1]}
    with pytest.raises(ValueError, match="every list must have one entry per tensor"):
        step.stepper(**changes)


@pytest.mark.parametrize("group_of", ([0, 2], [1, 0]), ids=("no such group", "out of order"))
def test_tensors_that_do_not_follow_their_groups_are_refused(group_of):
    with pytest.raises(ValueError, match="tensors must be in the order of their groups"):
        CompiledStep().stepper(group_of=group_of)


def test_options_of_other_groups_and_scopes_are_refused():
    step = CompiledStep()
    stepper, scope = step.stepper(), compiled.cpu.Scope(None, False, True, False)
    with pytest.raises(ValueError, match="the number of groups has changed"):
        stepper.assign([compiled_group(0)], [scope])
    with pytest.raises(ValueError, match="a group's scope does not exist"):
        stepper.assign([compiled_group(0), compiled_group(1)], [scope])
    stepper.assign([compiled_group(0)] * 2, [scope])
    grads, rates = torch.tensor(addresses(step.tensors[:2])), torch.ones(2, dtype=torch.float64)
    given = grads.data_ptr(), rates.data_ptr(), None, False, 1
    for stepped, only in (([True, True], None), (None, [True, True])):
        with pytest.raises(ValueError, match="there is an entry per scope"):
            stepper.run(compiled.cpu.UPDATE, *given, stepped, only)
