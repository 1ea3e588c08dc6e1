"""Random runs of several adapters in one optimizer: each equals, bit for bit, an optimizer of its own.

An adapter is a scope of two groups. Its twin is an optimizer of that adapter alone, on tensors of its own.
FUSEDLR_FUZZ_EXAMPLES=N makes N random runs instead of the same few.
"""

from __future__ import annotations

import copy
import os
import pickle
from dataclasses import dataclass
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from kit import CPU_BACKENDS, counters, quiet, through_a_file
from torch import Tensor, nn

import fusedlr

_EXAMPLES = os.environ.get("FUSEDLR_FUZZ_EXAMPLES")
SCHEDULES = (
    fusedlr.linear(warmup_steps=2, total_steps=8, min_lr_ratio=0.1),
    fusedlr.cosine(warmup_steps=0, total_steps=6),
    None,
)
SHAPES = ((3, 2), (2, 5))
schedules = st.sampled_from(SCHEDULES)
peaks = st.sampled_from([0.01, 0.05, 0.3])
limits = st.sampled_from(
    [
        None,
        0.5,
        100.0,
        # norms of random gradients vary by a third: some steps are spikes
        fusedlr.ZClip(alpha=0.5, z_thresh=0.5, warmup_steps=2),
        fusedlr.ZClip(alpha=0.9, z_thresh=1.0, warmup_steps=1, max_norm=3.0, action="skip"),
    ]
)
seeds = st.integers(0, 2**16)
which = st.integers(0, 7)


def fuzzing(examples: int, steps: int) -> settings:
    return settings(
        max_examples=int(_EXAMPLES or examples),
        stateful_step_count=steps,
        derandomize=_EXAMPLES is None,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


@dataclass
class Adapter:
    """One scope, its options, and its twin."""

    name: str
    schedule: fusedlr.Schedule | None
    peak: float
    limit: float | fusedlr.ZClip | None
    dtype: torch.dtype
    twin: Any = None

    def groups(self, params: list[Tensor]) -> list[dict[str, Any]]:
        """Groups with a rate each, as LoRA+ has them."""
        shared = {"schedule": self.schedule, "max_grad_norm": self.limit}
        return [
            {"params": params[:1], "lr": self.peak, **shared},
            {"params": params[1:], "lr": 4 * self.peak, "weight_decay": 0.0, **shared},
        ]


def params_of(groups: list[Any]) -> list[Tensor]:
    return [p for group in groups for p in group["params"]]


class Scopes(RuleBasedStateMachine):
    """The adapters' optimizer, and their twins."""

    def __init__(self, backend: str) -> None:
        super().__init__()
        self.backend = backend
        self.adapters: list[Adapter] = []
        self.made = 0
        self.exported: tuple[Any, Any] | None = None
        self.saved: Any = None

    def optimizer(self, groups: list[dict[str, Any]], **options: Any) -> fusedlr.FusedAdamW:
        return fusedlr.FusedAdamW(groups, lr=0.1, backend=self.backend, amsgrad=self.amsgrad, **options)

    def alone(self, adapter: Adapter, params: list[Tensor]) -> fusedlr.FusedAdamW:
        # one scope without a name, which is no adapter's: its groups have no limit of their own
        groups = [
            {key: value for key, value in group.items() if key != "max_grad_norm"}
            for group in adapter.groups(params)
        ]
        return self.optimizer(groups, max_grad_norm=adapter.limit)

    def new(self, seed: int, schedule: Any, peak: float, limit: Any, dtype: torch.dtype) -> Adapter:
        adapter = Adapter(f"adapter {self.made}", schedule, peak, limit, dtype)
        self.made += 1
        generator = torch.Generator().manual_seed(seed)
        values = [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]
        adapter.twin = self.alone(adapter, [nn.Parameter(x.clone()) for x in values])
        self.fresh = [nn.Parameter(x.clone()) for x in values]
        return adapter

    def scoped(self, adapter: Adapter, params: list[Tensor]) -> list[dict[str, Any]]:
        return [{**group, "scope": adapter.name} for group in adapter.groups(params)]

    @initialize(
        specs=st.lists(
            st.tuples(seeds, schedules, peaks, limits, st.sampled_from([torch.float32, torch.bfloat16])),
            min_size=2,
            max_size=4,
        ),
        amsgrad=st.booleans(),
    )
    def begin(self, specs, amsgrad):
        self.amsgrad = amsgrad
        groups = []
        for spec in specs:
            adapter = self.new(*spec)
            self.adapters.append(adapter)
            groups += self.scoped(adapter, self.fresh)
        self.ours = self.optimizer(groups)

    def groups_of(self, adapter: Adapter) -> list[Any]:
        return [group for group in self.ours.param_groups if group["scope"] == adapter.name]

    def pairs(self, adapter: Adapter) -> list[tuple[Tensor, Tensor]]:
        return list(
            zip(params_of(self.groups_of(adapter)), params_of(adapter.twin.param_groups), strict=True)
        )

    def pick(self, index: int) -> Adapter:
        return self.adapters[index % len(self.adapters)]

    # steps

    def give_gradients(self, seed: int, missing: int, scale: float, bad: int | None = None) -> None:
        generator = torch.Generator().manual_seed(seed)
        for i, adapter in enumerate(self.adapters):
            for j, (mine, theirs) in enumerate(self.pairs(adapter)):
                grad = torch.randn(mine.shape, generator=generator).to(mine.dtype) * scale
                if bad == i and j == seed % 2:
                    grad.view(-1)[seed % grad.numel()] = (float("inf"), float("nan"))[seed % 3 == 0]
                without = missing >> (2 * i + j) & 1
                mine.grad, theirs.grad = (None, None) if without else (grad, grad.clone())

    def step_twins(self, chosen: list[Adapter], scale: float | None) -> None:
        for adapter in chosen:
            # a scope without a gradient makes no step, and shows the rate of the coming one
            adapter.twin.scheduler.step()
            grads = [p.grad for p in params_of(adapter.twin.param_groups) if p.grad is not None]
            # nobody makes a step without a gradient on one adapter
            if grads:
                if scale is not None:
                    found = any(not g.isfinite().all() for g in grads)
                    adapter.twin.grad_scale = torch.tensor(scale)
                    adapter.twin.found_inf = torch.tensor(float(found))
                adapter.twin.step()
                adapter.twin.grad_scale = adapter.twin.found_inf = None

    @rule(seed=seeds, missing=st.sampled_from([0, 0, 1, 3, 6, 255]), subset=st.integers(0, 255), told=which)
    def step(self, seed, missing, subset, told):
        self.give_gradients(seed, missing, 1.0)
        chosen = [adapter for i, adapter in enumerate(self.adapters) if subset >> i & 1]
        names = [adapter.name for adapter in chosen]
        if told % 3 == 0:
            self.ours.step(only=names)
        elif told % 3 == 1:
            self.ours.only = names
            self.ours.step()
            self.ours.only = None
        else:
            self.ours.step(only=torch.tensor([name in names for name in self.ours.scopes]))
            for adapter in self.adapters:
                # whose turn it was is known on the device alone
                adapter.twin.scheduler.step()
        self.step_twins(chosen, None)

    @rule(seed=seeds, bad=which, scaled=st.booleans())
    def step_all_with_a_bad_gradient(self, seed, bad, scaled):
        scale = 256.0 if scaled else None
        # where nothing skips, nan would be all that is left to compare
        skips = scaled or self.adapters[bad % len(self.adapters)].limit is not None
        self.give_gradients(seed, 0, scale or 1.0, bad % len(self.adapters) if skips else None)
        if scaled:
            # what a scaler finds is one for all; scopes without a norm of their own go by it
            unnormed = [adapter for adapter in self.adapters if adapter.limit is None]
            self.ours.grad_scale, self.ours.found_inf = torch.tensor(scale), torch.tensor(1.0)
            for adapter in unnormed:
                # so that their twins are told the same
                for p in params_of(adapter.twin.param_groups) + params_of(self.groups_of(adapter)):
                    p.grad.view(-1)[0] = float("inf")
        self.ours.step()
        self.ours.grad_scale = self.ours.found_inf = None
        self.step_twins(self.adapters, scale)

    @rule(only=which)
    def zero_grad(self, only):
        adapter = self.pick(only)
        self.ours.zero_grad(only=adapter.name)
        assert all(p.grad is None for p in params_of(self.groups_of(adapter)))

    # one adapter

    @rule(index=which, peak=st.one_of(st.none(), peaks), schedule=schedules)
    def reset(self, index, peak, schedule):
        adapter = self.pick(index)
        self.ours.reset_scope(adapter.name, lr=peak, schedule=schedule)
        adapter.peak = adapter.peak if peak is None else peak
        adapter.schedule = adapter.schedule if schedule is None else schedule
        adapter.twin = self.alone(adapter, params_of(adapter.twin.param_groups))

    @rule(index=which)
    def export(self, index):
        adapter = self.pick(index)
        self.exported = (
            through_a_file(self.ours.scope_state_dict(adapter.name)),
            (copy.copy(adapter), through_a_file(adapter.twin.state_dict())),
        )

    @precondition(lambda self: self.exported is not None)
    @rule(index=which)
    def put_in(self, index):
        adapter = self.pick(index)
        ours, (of, theirs) = self.exported
        if of.dtype != adapter.dtype:
            return
        self.ours.load_scope_state_dict(adapter.name, ours)
        adapter.schedule, adapter.peak, adapter.limit = of.schedule, of.peak, of.limit
        adapter.twin = self.alone(adapter, params_of(adapter.twin.param_groups))
        adapter.twin.load_state_dict(theirs)

    @precondition(lambda self: len(self.adapters) < 8)
    @rule(seed=seeds, schedule=schedules, peak=peaks, limit=limits)
    def add(self, seed, schedule, peak, limit):
        adapter = self.new(seed, schedule, peak, limit, torch.float32)
        for group in self.scoped(adapter, self.fresh):
            self.ours.add_param_group(group)
        self.adapters.append(adapter)

    @precondition(lambda self: len(self.adapters) > 1)
    @rule(index=which)
    def remove(self, index):
        adapter = self.pick(index)
        gone = params_of(self.groups_of(adapter))
        self.ours.remove_scope(adapter.name)
        self.adapters.remove(adapter)
        assert not any(p in self.ours.state for p in gone)

    @rule(index=which, peak=peaks)
    def assign_peaks(self, index, peak):
        adapter = self.pick(index)
        if adapter.schedule is None:
            return
        adapter.peak = peak
        for groups in (self.groups_of(adapter), adapter.twin.param_groups):
            for group, factor in zip(groups, (1, 4), strict=True):
                group["initial_lr"] = factor * peak

    @rule(index=which, limit=limits)
    def assign_a_limit(self, index, limit):
        adapter = self.pick(index)
        adapter.limit = adapter.twin.max_grad_norm = limit
        for group in self.groups_of(adapter):
            group["max_grad_norm"] = limit
            # what was exported before says so of both
            group["nonfinite"] = None

    # the whole

    def take(self, ours: fusedlr.FusedAdamW) -> None:
        """Go on with another optimizer, which shows the rate of the coming update."""
        self.ours = ours
        for adapter in self.adapters:
            adapter.twin.scheduler.step()

    @rule(way=st.sampled_from([copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]))
    def copy_it(self, way):
        self.take(way(self.ours))

    @rule()
    def through_its_file(self):
        state = through_a_file(self.ours.state_dict())
        groups = []
        for adapter in self.adapters:
            params = [nn.Parameter(p.detach().clone()) for p in params_of(self.groups_of(adapter))]
            groups += self.scoped(adapter, params)
        ours = self.optimizer(groups)
        ours.load_state_dict(state)
        self.take(ours)

    # what must hold

    @invariant()
    def every_adapter_is_as_alone(self):
        for adapter in self.adapters:
            for mine, theirs in self.pairs(adapter):
                assert torch.equal(mine, theirs)
                a, b = self.ours.state.get(mine) or {}, adapter.twin.state.get(theirs) or {}
                for name in a.keys() | b.keys():
                    # a reset keeps zeros in the place of what there was
                    x, y = a.get(name, torch.zeros(())), b.get(name, torch.zeros(()))
                    assert torch.equal(x, y.expand_as(x) if name not in b else y)
            for mine, theirs in zip(self.groups_of(adapter), adapter.twin.param_groups, strict=True):
                assert mine["k"] == theirs["k"] and mine["lr"] == theirs["lr"]
        names = [group["scope"] for group in self.ours.param_groups]
        for adapter in self.adapters:
            norms = counters(self.ours).norms[:, names.index(adapter.name)]
            # one counter may be in fp32 where the other has made no step yet
            assert torch.equal(norms.double(), counters(adapter.twin).norms[:, 0].double())
        skips = self.ours.metrics()["skipped"].tolist()
        twins = {adapter.name: int(adapter.twin.metrics()["skipped"]) for adapter in self.adapters}
        assert dict(zip(self.ours.scopes, skips, strict=True)) == twins


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_adapters_in_one_optimizer_are_as_alone(backend):
    with quiet():
        run_state_machine_as_test(lambda: Scopes(backend), settings=fuzzing(150, 25))


def test_adapters_in_one_optimizer_are_as_alone_in_the_kernels(gpu_backend):
    with quiet():
        run_state_machine_as_test(lambda: Scopes(gpu_backend), settings=fuzzing(20, 8))
