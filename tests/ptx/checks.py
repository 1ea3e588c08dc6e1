"""What `make ptx` does with one backend: cases in several orders, schedules, stale launches, faults."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu.cases import BF16, F32
from schedule import schedule_parity
from schedule.schedule_zoo import PEAK, ZOO

import fusedlr

from . import cases, driver, faults, selftest
from .cases import Case, Outcome

# Reports that are known to be harmless, each with why; whatever else is reported fails the run.
HARMLESS = {
    # Triton's reductions have every lane that holds a sum store it: the same bits to the same place
    "same-value stores to shared memory by Triton's reductions": re.compile(
        r"same-value race: .*write/write in a block on shared\+"
    ),
}

# (architecture, order of threads, what approximate instructions return); the first is held against the
# reference, the others against its bits
_ORDERS = [(90, "straight", 0), (90, "torn", 0), (90, "shuffled", 0), (90, "backwards", 0), (80, "torn", 0)]
# a second or more each
_LARGE_ORDERS = [(90, "straight", 0), (80, "shuffled", 0)]
# the optimizer suite has numbers to say, rather than orders
_SUITE_ORDERS = [(90, "shuffled", 0), (80, "torn", 0)]
# how often a long run says what it is doing
_EVERY_SECONDS = 10
# CUDA's libraries use instructions of which PTX leaves the last bits open
_APPROXIMATE = (90, "straight", 3)


@dataclass
class Findings:
    """What came out for one backend."""

    cases: int = 0
    mismatches: list[str] = field(default_factory=list)
    reports: list[str] = field(default_factory=list)
    harmless: Counter[str] = field(default_factory=Counter)
    planted: int = 0
    missed: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    kernels: int = 0

    def count(self, kind: str) -> int:
        """How many reports are of a kind; both kinds of races are races."""
        return sum(line.partition("] ")[2].startswith((kind, f"same-value {kind}")) for line in self.reports)


class Checks:
    """The checks of one backend; `progress` is told what is being done, now and then."""

    def __init__(
        self, using: driver.Driver, backend: str, only: str, progress: Callable[[str], None]
    ) -> None:
        self.driver, self.backend, self.only, self._progress = using, backend, only, progress
        self.found = Findings()

    def progress(self, text: str) -> None:
        """Say what is being done."""
        self._progress(f"{self.backend}: {text}")

    def _note(self, where: str, mismatch: str | None) -> None:
        """Keep what was reported since the last call, and a mismatch if there is one."""
        for line in self._reports():
            self.found.reports.append(f"[{self.backend} {where}] {line}")
        if mismatch is not None:
            self.found.mismatches.append(f"[{self.backend} {where}] {mismatch}")

    def _reports(self) -> list[str]:
        kept = []
        for line in self.driver.take_reports():
            why = next((why for why, pattern in HARMLESS.items() if pattern.match(line)), None)
            if why is None:
                kept.append(line)
            else:
                self.found.harmless[why] += 1
        return kept

    def selftest(self) -> None:
        """The machine itself."""
        self.progress("selftest and litmus tests of the machine")
        self.found.mismatches += [f"[the machine] {what}" for what in selftest.run(self.driver.machine)]
        self.driver.watch_launches()

    # cases

    def cases(self) -> None:
        """Every case of the shared suite: the reference's numbers, and the same bits in every order."""
        chosen = [
            case
            for name, case in cases.all_cases().items()
            if self.only in name and self.backend in case.backends
        ]
        seconds: dict[str, float] = {}
        for i, case in enumerate(chosen):
            self.progress(f"case {i + 1} of {len(chosen)}, {case.name}")
            begun = time.perf_counter()
            self._case(case)
            seconds[case.name] = time.perf_counter() - begun
        slowest = sorted(seconds.items(), key=lambda item: -item[1])[:4]
        self.found.notes.append("slowest cases: " + ", ".join(f"{name} {s:.1f} s" for name, s in slowest))
        if not self.only:
            self._every_kernel_has_run()

    def _case(self, case: Case) -> None:
        orders = _LARGE_ORDERS if case.large else _SUITE_ORDERS if case.of_suite else _ORDERS
        if self.backend == "cuda" and orders is _ORDERS:
            orders = [*orders, _APPROXIMATE]
        first: Outcome | None = None
        for seed, (arch, order, approx) in enumerate(orders):
            self.driver.use(arch)
            self.driver.machine.order(order, seed, approx)
            where = f"sm_{arch} {order}: {case.name}"
            self.found.cases += 1
            try:
                ours = case.run(self.backend, False)
            except Exception as error:
                self._note(where, f"{type(error).__name__}: {error}")
                return
            if first is None or approx:
                self._note(where, cases.leaves_reference(ours, case))
                first = first or ours
            else:
                # not promised between architectures, but so it is
                self._note(where, cases.bits_differ(ours, first))

    def _every_kernel_has_run(self) -> None:
        """A kernel that no case launches has not been tested, whatever else is right."""
        ran = total = 0
        for arch in driver.ARCHS:
            self.driver.use(arch)
            for symbol, (some, all_) in self.driver.coverage(self.backend).items():
                self.found.kernels += 1
                ran, total = ran + some, total + all_
                if not some:
                    name = f"{driver.kernel_name(symbol)}, sm_{arch}"
                    self.found.mismatches.append(f"[{self.backend}] no case launches the kernel {name}")
        share = f"{100 * ran / total:.1f} % of their {total:,} instructions"
        self.found.notes.append(f"the cases run {self.found.kernels} kernels, and {share}")

    # schedules

    def schedules(self) -> None:
        """All schedules of the zoo at once, a group each, at the steps where something happens."""
        self.progress(f"{len(ZOO)} schedules")
        marks = {name: _marks(schedule.resolve(PEAK)) for name, schedule in ZOO.items()}
        rounds = max(map(len, marks.values()))
        for arch in driver.ARCHS:
            for approx in (0, 1, 2, 3) if self.backend == "cuda" else (0,):
                self.driver.use(arch)
                self.driver.machine.order("shuffled", arch, approx, races=approx == 0)
                params = [torch.nn.Parameter(torch.ones(1)) for _ in ZOO]
                groups = [{"params": [p], "schedule": s} for p, s in zip(params, ZOO.values(), strict=True)]
                optimizer = fusedlr.FusedAdamW(groups, lr=PEAK, backend=self.backend, max_grad_norm=1.0)
                for p in params:
                    p.grad = torch.ones(1)
                # all of them once, elsewhere a third
                for i in range(0, rounds, 1 if (arch, approx) == (90, 0) else 3):
                    steps = [own[i % len(own)] for own in marks.values()]
                    driver.set_steps(optimizer, steps)
                    optimizer.step()
                    wrong = _wrong_rates(steps, driver.counters(optimizer).lr.tolist())
                    if driver.counters(optimizer).k.tolist() != [k + 1 for k in steps]:
                        wrong = wrong or "a group has not counted its step"
                    self.found.cases += 1
                    self._note(f"sm_{arch} schedules, approximations {approx}", wrong)

    # stale launches

    def stale(self) -> None:
        """Launches of tensors that have moved, as a CUDA graph makes them: only their own counter moves."""
        self.progress("stale launches")
        for arch in driver.ARCHS:
            for clip in (None, 1.0):
                for dtype, options in ((F32, {}), (F32, {"amsgrad": True}), (BF16, {"state_dtype": "param"})):
                    self.driver.use(arch)
                    self.driver.machine.order("shuffled", 3)
                    self.found.cases += 1
                    where = f"sm_{arch} stale launches, {dtype}, {options}, clipping {clip}"
                    self._note(where, self.stale_launches(dtype, {**options, "max_grad_norm": clip}))

    def stale_launches(self, dtype: torch.dtype, options: dict[str, Any]) -> str | None:
        """What is wrong with three launches of a layout that is out of date, in words."""
        generator = torch.Generator().manual_seed(0)

        def draw(size: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.randn(size, generator=generator).to(dtype)

        # two buckets, the first of this type
        kinds = ((5, dtype), (4097, dtype), (9, torch.float16))
        params = [torch.nn.Parameter(draw(*kind)) for kind in kinds]
        groups = [{"params": params[:1]}, {"params": params[1:]}]
        optimizer = fusedlr.FusedAdamW(groups, lr=0.1, backend=self.backend, **options)
        for p, kind in zip(params, kinds, strict=True):
            p.grad = draw(*kind)
        optimizer.step()
        before = Outcome.of(params, optimizer)
        self.driver.launch_outdated(times=3)
        after = Outcome.of(params, optimizer)
        if after.counts[3].tolist() != [3, 0]:
            return f"{after.counts[3].tolist()} stale launches are counted"
        before.counts[3] = after.counts[3]
        if (changed := cases.bits_differ(before, after)) is not None:
            return f"{changed} after stale launches"
        if self.driver.tickets().tolist() != [0, 0]:
            return f"tickets {self.driver.tickets().tolist()} after stale launches"
        self.driver.launch_again()
        return None if Outcome.of(params, optimizer).updates == [2, 2, 2] else "the next step is not made"

    # planted faults

    def faults(self) -> None:
        """Kernels with a fault each, which a case of the suite must show in some order."""
        planted = [
            fault for fault in faults.planted(self.driver.texts, self.backend) if self.only in fault.name
        ]
        for i, fault in enumerate(planted):
            self.progress(f"planted fault {i + 1} of {len(planted)}, {fault.name}")
            self.found.planted += 1
            if not self.caught(fault):
                self.found.missed.append(f"[{self.backend}] {fault.name}")
        for arch in driver.ARCHS:
            self.driver.use(arch)

    def caught(self, fault: faults.Fault) -> list[str]:
        """What the cases say of a planted fault: the first in the first order in which one says something."""
        harmless = Counter(self.found.harmless)
        self.driver.use(fault.arch, fault.edit)
        try:
            for case in fault.cases or (None,):
                for seed, order in enumerate(("straight", "torn", "shuffled", "backwards")):
                    self.driver.machine.order(order, seed)
                    self.driver.take_reports()
                    try:
                        mismatch = self._outcome_of(fault, case)
                    except Exception as error:
                        mismatch = str(error)
                    kinds = {line.split(":")[0] for line in self._reports()}
                    if kinds or mismatch is not None:
                        return [*sorted(kinds), *(["mismatch"] if mismatch is not None else [])]
            return []
        finally:
            self.found.harmless = harmless
            self.driver.use(fault.arch)

    def _outcome_of(self, fault: faults.Fault, name: str | None) -> str | None:
        if name is None:
            return self.stale_launches(*fault.kernel.stale)
        case = cases.all_cases()[name]
        return cases.leaves_reference(case.run(self.backend, False), case)


def run(backend: str, parts: list[str], only: str, triton: Path | None, nvrtc: int | None) -> Findings:
    """All that is asked for with one backend, in a process of its own: the machine is one per process."""
    # the tensors are small
    torch.set_num_threads(1)
    said = time.perf_counter()

    def progress(text: str) -> None:
        nonlocal said
        if time.perf_counter() - said > _EVERY_SECONDS:
            said = time.perf_counter()
            print(f"ptx: {text}", flush=True)

    using = driver.Driver((backend,), triton, nvrtc)
    checks = Checks(using, backend, only, progress)
    checks.selftest()
    for part in parts:
        getattr(checks, part)()
    stats = using.machine.stats()
    work = f"{stats.launches:,} launches, {stats.instructions / 1e6:.0f} M instructions of warps"
    checks.found.notes.append(f"{using.compilers()}: {work}")
    return checks.found


def _marks(schedule: fusedlr.Schedule) -> list[int]:
    """Steps at which a schedule may go wrong: the edges of its phases, and some inside."""
    marks = {0, 1, 2, 3, 10**6 + 7}
    for phase in schedule.phases:
        length = min(phase.end, 10**12) - phase.begin
        for edge in (phase.begin, phase.end, phase.origin, (phase.begin + phase.end) // 2):
            marks |= {edge - 1, edge, edge + 1}
        marks |= {phase.begin + length * i // 21 for i in (3, 7, 14)}
    return sorted(k for k in marks if 0 <= k < 2**53)


def _wrong_rates(steps: list[int], rates: list[float]) -> str | None:
    """A rate outside of its bounds, in words."""
    for (name, schedule), k, rate in zip(ZOO.items(), steps, rates, strict=True):
        schedule = schedule.resolve(PEAK)
        want = schedule.lr_at(k, PEAK)
        allowed = schedule_parity.bounds(schedule, np.array([k]), np.array([want]), PEAK, np.float32)[0]
        # written so that nan is an error
        if not abs(rate - want) <= allowed:
            return f"{name} at step {k}: {rate} instead of {want}"
    return None
