"""The C++ kernel against the reference, bit for bit, on every instruction set and number of threads."""

from __future__ import annotations

import copy
import gc
import math
import os
import platform
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import EDGES
from harness import relative_difference
from schedule import schedule_parity
from schedule.schedule_zoo import ZOO
from torch import Tensor

import fusedlr
from fusedlr import compiled, cpu, reference
from fusedlr.reference import Counters, GroupStep, Row, Signals

if cpu.why_not([torch.device("cpu")]):
    pytest.skip(str(cpu.why_not([torch.device("cpu")])), allow_module_level=True)

CPU = torch.device("cpu")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# pairs that there are loops for
PAIRS = [(p, m) for p in DTYPES for m in dict.fromkeys((torch.float64, torch.float32, p))]
# in which the reference, too, computes everything in one precision
EXACT_PAIRS = [(p, m) for p, m in PAIRS if (p == torch.float64) == (m == torch.float64)]
# work for several threads, and sums over several pieces of a tensor
LARGE = ((200_000,), (3, 1000), (8192,), (8193,), (5,))


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
) -> list[Row]:
    """Rows in the middle of a run; every tensor starts `offset` elements into its memory."""
    generator = torch.Generator().manual_seed(2)

    def tensor(shape: tuple[int, ...], of: torch.dtype, values: Callable[[Tensor], Tensor]) -> Tensor:
        drawn = values(torch.randn(shape, generator=generator, dtype=torch.float64)).to(of)
        memory = torch.empty(drawn.numel() + offset, dtype=of)
        return memory[offset:].view(shape).copy_(drawn)

    rows = []
    for i, shape in enumerate(shapes):
        # exponents over the whole range of fp16, subnormal numbers included
        spread = tensor(shape, torch.float64, lambda x: (x * 3 - 4).exp2())
        rows.append(
            Row(
                tensor(shape, dtype, lambda x: x),
                tensor(shape, dtype, lambda x, spread=spread: x * spread),
                tensor(shape, moments, lambda x: 0.1 * x),
                tensor(shape, moments, lambda x: x * x),
                tensor(shape, moments, lambda x: x * x) if amsgrad else None,
                torch.tensor(float(i % 3)),
            )
        )
    return rows


def make_group(rows: list[Row], **options: Any) -> GroupStep:
    values: dict[str, Any] = {
        "index": 0,
        "lr": 0.01,
        "peak": math.nan,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "weight_decay": 0.1,
        "amsgrad": any(row.max_exp_avg_sq is not None for row in rows),
        "maximize": False,
        "max_grad_norm": None,
        "skip_nonfinite": False,
    }
    return GroupStep(rows=rows, **{**values, **options})


def tensors(groups: list[GroupStep]) -> list[Tensor]:
    rows = [row for group in groups for row in group.rows]
    return [x for row in rows for x in vars(row).values() if x is not None]


def values(counters: Counters) -> list[list[float]]:
    names = ("k", "skipped", "skips_in_row", "lr", "grad_norm", "coef")
    return [getattr(counters, name).tolist() for name in names]


def bits(x: Tensor) -> list[int]:
    width = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    return x.contiguous().view(-1).view(width).tolist()


def run(
    step_: Any, groups: list[GroupStep], *signals: Signals, joint: bool = True
) -> tuple[list[GroupStep], Counters]:
    """Steps on a copy of the groups."""
    groups = copy.deepcopy(groups)
    counters = Counters.zeros(len(groups), CPU)
    for signal in signals or (Signals(),):
        step_(groups, counters, signal, joint=joint)
    return groups, counters


def assert_same(groups: list[GroupStep], *signals: Signals, joint: bool = True, exact: bool = True) -> None:
    ours, our_counters = run(cpu.step_, groups, *signals, joint=joint)
    theirs, their_counters = run(reference.step_, groups, *signals, joint=joint)
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
def same_scalars(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torch take `expm1` from the C library, as the kernel does: its own may differ in the last bit."""

    def expm1(x: Tensor) -> Tensor:
        return torch.tensor(math.expm1(x.item()), dtype=x.dtype)

    monkeypatch.setattr(torch, "expm1", expm1)


@pytest.mark.parametrize("amsgrad", (False, True), ids=("plain", "amsgrad"))
@pytest.mark.parametrize("offset", (0, 1))
@pytest.mark.parametrize(("dtype", "moments"), EXACT_PAIRS, ids=str)
def test_equals_the_reference_bit_for_bit(
    dtype: torch.dtype, moments: torch.dtype, offset: int, amsgrad: bool, isa: str
) -> None:
    rows = make_rows((*EDGES, (5, 37)), dtype, moments, amsgrad, offset)
    group = make_group(rows, maximize=offset == 1)
    assert_same([group], Signals(), Signals(grad_scale=torch.tensor(1024.0)), Signals(grad_scale=3.0))


@pytest.mark.parametrize(("dtype", "moments"), [pair for pair in PAIRS if pair not in EXACT_PAIRS], ids=str)
def test_mixed_precisions_are_at_least_as_good(dtype: torch.dtype, moments: torch.dtype, isa: str) -> None:
    group = make_group(make_rows((*EDGES, (5, 37)), dtype, moments, False), betas=(0.5, 0.5), eps=1e-3)
    ours, _ = run(cpu.step_, [group])
    wide = [
        Row(*(None if x is None else x.double() for x in list(vars(row).values())[:-1]), row.step)
        for row in group.rows
    ]
    exact, _ = run(reference.step_, [replace(group, rows=wide)])
    for a, b in zip(tensors(ours), tensors(exact), strict=True):
        assert relative_difference([a], [b]) <= 2 * torch.finfo(a.dtype).eps


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_every_16_bit_number_is_read_and_rounded_as_torch_does(dtype: torch.dtype, isa: str) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    every = every[every.isfinite()]
    n = every.numel()
    # with decay alone, p becomes (1 - decay) * p: rounded at every place
    moments = torch.zeros(n)
    rows = [
        Row(every.clone(), torch.zeros(n, dtype=dtype), moments, moments.clone(), None, torch.tensor(0.0))
    ]
    for decay in (0.0, 0.37, 0.5, 1.5, -3.0):
        assert_same([make_group(copy.deepcopy(rows), lr=1.0, weight_decay=decay)])
    # as gradients, and as moments kept in 16 bits
    rows = [Row(torch.ones(n, dtype=dtype), every, moments, moments.clone(), None, torch.tensor(0.0))]
    assert_same([make_group(rows)])
    rows = [
        Row(
            torch.ones(n, dtype=dtype),
            torch.zeros(n, dtype=dtype),
            every,
            every.abs(),
            None,
            torch.tensor(0.0),
        )
    ]
    assert_same([make_group(rows, betas=(0.3, 0.7))])


@pytest.mark.parametrize("bad", (math.inf, -math.inf, math.nan))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite_spreads_as_in_the_reference(dtype: torch.dtype, bad: float, isa: str) -> None:
    rows = make_rows(((40,),), dtype, torch.float64 if dtype == torch.float64 else torch.float32, True)
    rows[0].grad[3], rows[0].exp_avg[5], rows[0].exp_avg_sq[7] = bad, bad, bad
    rows[0].max_exp_avg_sq[9], rows[0].param[11] = bad, bad
    ours, _ = run(cpu.step_, [make_group(rows)])
    theirs, _ = run(reference.step_, [make_group(rows)])
    for a, b in zip(tensors(ours), tensors(theirs), strict=True):
        assert torch.equal(a.nan_to_num(12345), b.nan_to_num(12345))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_and_instruction_sets_do_not_change_a_bit(
    dtype: torch.dtype, threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    moments = torch.float64 if dtype == torch.float64 else torch.float32
    group = make_group(make_rows(LARGE, dtype, moments, False), max_grad_norm=1.0)
    seen = set()
    for name in cpu.isas():
        monkeypatch.setenv("FUSEDLR_CPU_ISA", name)
        for n in (1, 2, 3, 5):
            threads(n)
            after, counters = run(cpu.step_, [group], Signals(), Signals())
            seen.add((counters.grad_norm.item(), *(tuple(bits(x)) for x in tensors(after))))
    assert len(seen) == 1


@pytest.mark.parametrize("max_grad_norm", (None, 0.5, 1e6))
@pytest.mark.parametrize("skip_nonfinite", (False, True))
@pytest.mark.parametrize("joint", (False, True))
def test_counts_as_the_reference(max_grad_norm: float | None, skip_nonfinite: bool, joint: bool) -> None:
    rows = make_rows(((33,), (4, 5), (7,), (2, 2)), torch.float32, torch.float32, False)
    options: dict[str, Any] = {"max_grad_norm": max_grad_norm, "skip_nonfinite": skip_nonfinite}
    schedule = fusedlr.cosine(warmup_steps=2, total_steps=9)
    groups = [
        make_group(rows[:2], **options, lr=schedule, peak=0.1),
        make_group([], **options, index=1, lr=schedule, peak=0.2),
        make_group(rows[2:3], **options, index=2, lr=torch.tensor([0.05]), maximize=True),
        make_group(rows[3:], **options, index=3, advance=False),
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


def test_a_sum_of_squares_that_fp32_cannot_hold_is_skipped_as_in_the_reference() -> None:
    rows = make_rows(((5000,),), torch.float32, torch.float32, False)
    rows[0].grad.fill_(1e18)
    assert_same([make_group(rows, max_grad_norm=1.0, skip_nonfinite=True)])
    rows[0].grad.fill_(1e17)
    assert_same([make_group(rows, max_grad_norm=1.0, skip_nonfinite=True)], exact=False)


@pytest.mark.parametrize("single", (False, True), ids=("fp64", "fp32"))
@pytest.mark.parametrize("name", ZOO)
def test_schedule_agrees_with_the_definition(name: str, single: bool) -> None:
    def evaluator(schedule: fusedlr.Schedule, k: Any, peak: float) -> Any:
        return np.array(cpu.compiled_schedule(schedule.resolve(peak), single).rates(k.tolist(), peak))

    schedule_parity.check(evaluator, ZOO[name], np.float32 if single else np.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_skipped_step_leaves_every_bit(dtype: torch.dtype, isa: str) -> None:
    rows = make_rows(LARGE, dtype, torch.float32 if dtype != torch.float64 else dtype, True)
    # what would be changed by reading and writing it again
    rows[0].param[0], rows[0].exp_avg[1] = math.nan, math.nan
    rows[1].grad[0, 0] = math.inf
    group = make_group(rows, max_grad_norm=1.0, skip_nonfinite=True)
    after, counters = run(cpu.step_, [group], Signals(), Signals(found_inf=1.0))
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
def test_layouts_in_any_combination(param: str, grad: str, state: str) -> None:
    def rows() -> list[Row]:
        made = make_rows(((6, 5), (3, 4)), torch.float32, torch.float32, True)
        row = made[0]
        row.param = LAYOUTS[param](row.param)
        row.exp_avg, row.max_exp_avg_sq = LAYOUTS[state](row.exp_avg), LAYOUTS[state](row.max_exp_avg_sq)
        if grad == "expanded":
            row.grad = torch.tensor(0.5).expand(6, 5)
        elif grad == "negated":
            row.grad = torch.complex(row.grad, row.grad).conj().imag
        else:
            row.grad = LAYOUTS[grad](row.grad)
        return made

    results = []
    for step_ in (cpu.step_, reference.step_):
        group, counters = make_group(rows()), Counters.zeros(1, CPU)
        for _ in range(3):
            step_([group], counters, Signals(), joint=True)
        results.append([bits(x) for x in tensors([group])])
        if param == "sliced":
            assert (group.rows[0].param.as_strided((6, 5), (10, 2), 1) == 7).all()
    assert results[0] == results[1]


def step_twice_with_change_between(change: Callable[[Row], None]) -> list[list[list[int]]]:
    """Bits after two steps of the kernel and of the reference, with the tensors changed between."""
    results = []
    for step_ in (cpu.step_, reference.step_):
        rows = make_rows(((6, 6), (3, 4)), torch.float32, torch.float32, False)
        group, counters = make_group(rows), Counters.zeros(1, CPU)
        step_([group], counters, Signals(), joint=True)
        change(rows[0])
        step_([group], counters, Signals(), joint=True)
        step_([group], counters, Signals(), joint=True)
        results.append([bits(x) for x in tensors([group])])
    return results


CHANGES: dict[str, Callable[[Row], Any]] = {
    "parameter moved": lambda row: setattr(row.param, "data", row.param.clone()),
    "parameter turned": lambda row: setattr(row.param, "data", row.param.data.t()),
    "gradient replaced": lambda row: setattr(row, "grad", row.grad.clone()),
    "moment replaced": lambda row: setattr(row, "exp_avg", row.exp_avg + 1),
    "moment moved": lambda row: setattr(row.exp_avg, "data", row.exp_avg * 2),
    "moments in another precision": lambda row: vars(row).update(
        exp_avg=row.exp_avg.double(), exp_avg_sq=row.exp_avg_sq.double(), step=row.step.clone()
    ),
    "one moment in another precision": lambda row: setattr(row, "exp_avg_sq", row.exp_avg_sq.half()),
    "counter replaced": lambda row: setattr(row, "step", row.step + 5),
    "all of another size": lambda row: vars(row).update(
        {name: torch.cat([x, x]) for name, x in vars(row).items() if x is not None and x.dim()}
    ),
    "all of another precision": lambda row: vars(row).update(
        {name: x.bfloat16() for name, x in vars(row).items() if x is not None and x.dim()}
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_tensors_that_change_between_steps_are_seen(name: str) -> None:
    ours, theirs = step_twice_with_change_between(CHANGES[name])
    if name == "moments in another precision":
        # the reference rounds the parameter's scalars to fp32 there
        return
    assert ours == theirs


def test_lr_tensor_changed_in_place_is_read_again() -> None:
    group, counters = make_group(make_rows(((4,),), *(torch.float32,) * 2, False), lr=torch.tensor(0.5)), None
    counters = Counters.zeros(1, CPU)
    for rate in (0.25, 0.125):
        group.lr.fill_(rate)
        cpu.step_([group], counters, Signals(), joint=True)
        assert counters.lr.item() == rate


def test_autograd_is_told_of_every_write() -> None:
    rows = make_rows(((4,), (0,)), torch.float32, torch.float32, True)
    written = [x for row in rows for name, x in vars(row).items() if name != "grad"]
    before = [x._version for x in written]
    cpu.step_([make_group(rows)], Counters.zeros(1, CPU), Signals(), joint=True)
    assert all(x._version > v for x, v in zip(written, before, strict=True))


def test_a_stale_backward_raises() -> None:
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = fusedlr.FusedAdamW([p], backend="cpu")
    loss = (p * p).sum()
    p.grad = torch.ones(3)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_state_goes_with_the_optimizer() -> None:
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = fusedlr.FusedAdamW([p], backend="cpu")
    p.grad = torch.ones(3)
    optimizer.step()
    moment = weakref.ref(optimizer.state[p]["exp_avg"])
    del optimizer
    gc.collect()
    assert moment() is None


def test_auto_picks_the_kernel() -> None:
    optimizer = fusedlr.FusedAdamW([torch.nn.Parameter(torch.ones(3))])
    assert optimizer.backend == "cpu"


def test_other_devices_are_refused_with_the_reason() -> None:
    assert cpu.why_not([CPU, torch.device("meta")]) == "it does not run on meta"


def test_a_module_that_cannot_be_used_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "cpu", None)
    monkeypatch.setattr(compiled, "error", "the C++ kernel was not built")
    assert cpu.why_not([CPU]) == "the C++ kernel was not built"
    optimizer = fusedlr.FusedAdamW([torch.nn.Parameter(torch.ones(3))])
    assert optimizer.backend == "reference"


def test_an_unknown_instruction_set_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEDLR_CPU_ISA", "mmx")
    rows = make_rows(((4,),), torch.float32, torch.float32, False)
    before = [bits(x) for x in tensors([make_group(rows)])]
    with pytest.raises(ValueError, match="this machine cannot run mmx"):
        cpu.step_([make_group(rows)], Counters.zeros(1, CPU), Signals(), joint=True)
    assert [bits(x) for x in tensors([make_group(rows)])] == before


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_one_openmp_runtime() -> None:
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


TESTS = Path(__file__).resolve().parent
CSRC = TESTS.parent / "csrc"
COMPILER: Any = shutil.which("c++")
needs_compiler = pytest.mark.skipif(
    COMPILER is None or not CSRC.is_dir(), reason="needs the sources and a C++ compiler"
)


def objects(folder: Path, flags: str, every_isa: bool) -> list[str]:
    """The kernel and cpu_sanitized.cpp, compiled."""
    shared = (
        f"-std=c++17 -O1 -g -ffp-contract=off -fno-math-errno -fno-trapping-math -fopenmp {flags}".split()
    )
    isas = {"baseline": ""}
    if every_isa and platform.machine() == "x86_64":
        shared.append("-DFUSEDLR_X86")
        isas["avx2"] = "-mavx2 -ftree-vectorize"
        isas["avx512"] = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -ftree-vectorize"
    sources = [(TESTS / "cpu_sanitized.cpp", ""), (CSRC / "cpu.cpp", "")]
    sources += [(CSRC / "cpu_kernel.cpp", f"-DFUSEDLR_ISA={isa} {more}") for isa, more in isas.items()]
    made = [str(folder / f"{i}.o") for i in range(len(sources))]
    builds = [
        subprocess.Popen([COMPILER, *shared, f"-I{CSRC}", *more.split(), "-c", source, "-o", to])
        for (source, more), to in zip(sources, made, strict=True)
    ]
    assert [build.wait() for build in builds] == [0] * len(builds)
    return made


def run_program(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Link and run; `arguments` are the compiler's."""
    program = str(folder / "program")
    subprocess.run([COMPILER, *arguments, "-o", program], check=True)
    # what the OpenMP runtime keeps until the end is no leak
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    return subprocess.run([program], capture_output=True, text=True, env=environment)


@needs_compiler
@pytest.mark.slow
def test_sanitizers_find_nothing(tmp_path: Path) -> None:
    flags = "-fsanitize=address,undefined -fno-sanitize-recover=all"
    ran = run_program(tmp_path, *objects(tmp_path, flags, every_isa=True), "-fopenmp", *flags.split())
    assert ran.returncode == 0, ran.stderr[:3000]
    assert ran.stdout.split() == cpu.isas()


@needs_compiler
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs GCC's names for OpenMP")
def test_threads_do_not_race(tmp_path: Path) -> None:
    made = objects(tmp_path, "-fsanitize=thread -DFEW", every_isa=False)
    # in place of libgomp, whose barriers the sanitizer does not see: it would report every one
    runtime = (str(TESTS / "omp_threads.cpp"), "-pthread", "-fsanitize=thread")
    ran = run_program(tmp_path, *made, *runtime)
    assert ran.returncode == 0 and not ran.stderr, ran.stderr[:3000]
    assert ran.stdout.split() == ["baseline"]
    ran = run_program(tmp_path, *made, *runtime, "-DNO_BARRIER")
    assert "data race" in ran.stderr and ran.returncode
