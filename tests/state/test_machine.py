"""Random runs of everything that may happen to an optimizer between steps, against stock torch in fp64.

The model is torch's AdamW and `clip_grad_norm_`, driven with the rates of the schedules' definition. After
every operation parameters, state, counts and rates are compared. FUSEDLR_FUZZ_EXAMPLES=N makes N random runs
instead of the same few; CONTRIBUTING.md says more.
"""

from __future__ import annotations

import copy
import math
import os
import pickle
from collections.abc import Callable
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
from kit import CPU_BACKENDS, counters, quiet, through_a_file, torchs_part
from torch import Tensor, nn

import fusedlr

_EXAMPLES = os.environ.get("FUSEDLR_FUZZ_EXAMPLES")
SETTINGS = settings(
    max_examples=int(_EXAMPLES or 350),
    stateful_step_count=30,
    derandomize=_EXAMPLES is None,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
SCHEDULES = {
    "none": None,
    "linear": fusedlr.linear(warmup_steps=3, total_steps=12, min_lr_ratio=0.1),
    "cosine": fusedlr.cosine(warmup_steps=0, total_steps=9),
    "inverse_sqrt": fusedlr.inverse_sqrt(warmup_steps=2),
    "table": fusedlr.table(lambda k: 1 / (k + 2), total_steps=6),
}
SHAPES = ((3,), (2, 2), (), (5,), (0,))
HYPERPARAMETERS = st.one_of(
    st.tuples(st.just("weight_decay"), st.sampled_from([0.0, 0.1, 0.3])),
    st.tuples(st.just("betas"), st.sampled_from([(0.9, 0.999), (0.5, 0.9), (0.0, 0.99)])),
    st.tuples(st.just("eps"), st.sampled_from([1e-8, 1e-3])),
)
schedules = st.sampled_from(list(SCHEDULES))
rates = st.floats(1e-3, 0.2)
limits = st.sampled_from([None, 0.5, 100.0])
seeds = st.integers(0, 2**16)
which = st.integers(0, 7)


@dataclass
class Group:
    """What the model knows of a group beside torch's own param group.

    Attributes:
        lr: what `group["lr"]` is.
        shown: the rate of its schedule's that was put there last; assigning it is no assignment.
        assigned: whether `lr` is from outside and waits for the next step.
        foreign: whether `lr` is not the schedule's own rate of now.
    """

    schedule: fusedlr.Schedule | None
    peak: float
    limit: float | None
    lr: float = 0.0
    shown: float | None = None
    k: int = 0
    shown_k: int = 0
    skipped: int = 0
    assigned: bool = False
    foreign: bool = False

    def __post_init__(self) -> None:
        if self.schedule is None:
            self.lr = self.peak
        else:
            self.show()

    def show(self) -> None:
        """Show the schedule's rate of the coming update."""
        if self.schedule is not None:
            self.lr = self.shown = self.schedule.lr_at(self.k, self.peak)
            self.assigned = self.foreign = False
        self.shown_k = self.k

    def seems_assigned(self) -> bool:
        """Whether its rate in a plain dict, which does not tell whose it is, is not the schedule's of now."""
        if self.schedule is None:
            return False
        return self.lr not in {self.schedule.lr_at(k, self.peak) for k in (self.shown_k, self.k)}


def draw(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


class Machine(RuleBasedStateMachine):
    """An optimizer and its model side by side; `groups` are the model's, in the order of `param_groups`."""

    def __init__(self, backend: str) -> None:
        super().__init__()
        self.backend = backend
        self.groups: list[Group] = []
        # groups that were taken out of `param_groups`: ours, torch's, the model's
        self.removed: list[tuple[Any, Any, Group]] = []
        self.file: Any = None
        self.scheduler_file: Any = None

    # what both have

    def params(self, optimizer: torch.optim.Optimizer) -> list[Tensor]:
        return [p for group in optimizer.param_groups for p in group["params"]]

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        return list(zip(self.params(self.ours), self.params(self.stock), strict=True))

    def made(self, group: Group, stock: dict[str, Any], params: list[Tensor]) -> dict[str, Any]:
        """A group of ours as its constructor takes it."""
        options = {key: stock[key] for key in ("betas", "eps", "weight_decay")}
        if self.independent:
            options["max_grad_norm"] = group.limit
        # what has become of the schedule is in the files
        schedule = None if group.schedule is None else group.schedule.original
        return {"params": params, "lr": group.peak, "schedule": schedule, **options}

    def anew(self, params: list[list[Tensor]]) -> fusedlr.FusedAdamW:
        """An optimizer with the options of the one at hand and its own history."""
        pairs = zip(self.groups, self.stock.param_groups, params, strict=True)
        return fusedlr.FusedAdamW(
            [self.made(*each) for each in pairs], lr=0.1, backend=self.backend, **self.options()
        )

    def options(self) -> dict[str, Any]:
        return {
            "groups": "independent" if self.independent else "joint",
            "max_grad_norm": self.limit,
            "nonfinite": self.nonfinite,
            "amsgrad": self.amsgrad,
        }

    def forget_files(self) -> None:
        self.file = self.scheduler_file = None

    def limit_of(self, group: Group) -> float | None:
        return group.limit if self.independent else self.limit

    def skips(self, group: Group) -> bool:
        return self.nonfinite == "skip" or self.limit_of(group) is not None

    @initialize(
        independent=st.booleans(),
        limit=limits,
        nonfinite=st.sampled_from([None, "skip"]),
        amsgrad=st.booleans(),
        specs=st.lists(st.tuples(schedules, rates, limits), min_size=1, max_size=3),
        seed=seeds,
    )
    def begin(self, independent, limit, nonfinite, amsgrad, specs, seed):
        self.independent, self.limit, self.nonfinite, self.amsgrad = independent, limit, nonfinite, amsgrad
        generator = torch.Generator().manual_seed(seed)
        ours, stock = [], []
        for i, (schedule, peak, own_limit) in enumerate(specs):
            values = [draw(shape, generator) for shape in SHAPES[i : i + 2]]
            self.groups.append(Group(SCHEDULES[schedule], peak, own_limit))
            stock.append({"params": [nn.Parameter(x.clone()) for x in values], "lr": peak})
            ours.append([nn.Parameter(x.clone()) for x in values])
        self.stock = torch.optim.AdamW(stock, lr=0.1, amsgrad=amsgrad)
        self.ours = self.anew(ours)

    # steps

    def give_gradients(self, seed: int, missing: int, scale: float) -> None:
        generator = torch.Generator().manual_seed(seed)
        for i, (mine, theirs) in enumerate(self.pairs()):
            grad = draw(mine.shape, generator)
            if missing >> (i % 4) & 1:
                mine.grad = theirs.grad = None
            else:
                mine.grad, theirs.grad = grad * scale, grad

    def step_stock(self, found_inf: bool) -> None:
        """Clip, skip, and step with the schedules' rates."""
        torchs = self.stock.param_groups
        scopes = [[i] for i in range(len(torchs))] if self.independent else [range(len(torchs))]
        for scope in scopes:
            params = [p for i in scope for p in torchs[i]["params"] if p.grad is not None]
            active = bool(params) or not self.independent
            first = self.groups[scope[0]]
            norm = torch.nn.utils.get_total_norm([p.grad for p in params]) if params else torch.zeros(())
            # an independent group that has a norm decides by it alone
            decides = self.independent and self.skips(first)
            skip = (found_inf and not decides) or (self.skips(first) and not norm.isfinite())
            if not skip and self.limit_of(first) is not None:
                torch.nn.utils.clip_grad_norm_(params, self.limit_of(first))
            for i in scope:
                group = self.groups[i]
                if group.schedule is not None and not group.assigned:
                    group.show()
                torchs[i]["lr"] = group.lr
                # used, and from now on not ours; without a gradient it waits for the step that is made
                group.assigned = group.assigned and not active
                group.shown_k = group.k
                group.k += active and not skip
                group.skipped += active and skip
            for p in params if skip else ():
                p.grad = None
        self.stock.step()
        self.k_loaded = None

    # what a loaded scheduler's state leaves for the next file
    k_loaded: list[tuple[Group, int]] | None = None

    def adopt(self) -> None:
        """What ours does with what was done to `param_groups`: a scheduler's state is for the groups then."""
        then = [group for group, _ in self.k_loaded or ()]
        if len(then) != len(self.groups) or any(a is not b for a, b in zip(then, self.groups, strict=True)):
            self.k_loaded = None

    @rule(seed=seeds, missing=st.sampled_from([0, 0, 0, 1, 2, 5, 15]))
    def step(self, seed, missing):
        self.give_gradients(seed, missing, 1.0)
        self.ours.step()
        self.step_stock(False)
        self.check_skips()

    @rule(seed=seeds, missing=st.sampled_from([0, 1, 15]), found=st.sampled_from([0.0, 1.0, 2.0, math.nan]))
    def step_with_a_scaler(self, seed, missing, found):
        self.give_gradients(seed, missing, 1024.0)
        self.ours.grad_scale, self.ours.found_inf = torch.tensor(1024.0), torch.tensor(found)
        self.ours.step()
        del self.ours.grad_scale, self.ours.found_inf
        self.step_stock(found != 0)
        self.check_skips()

    @rule(seed=seeds, value=st.sampled_from([math.inf, math.nan]), index=which)
    def step_on_what_is_not_finite(self, seed, value, index):
        self.give_gradients(seed, 0, 1.0)
        # a step that is not skipped would leave nothing to compare
        places = [
            (mine, theirs)
            for group, a, b in zip(self.groups, self.ours.param_groups, self.stock.param_groups, strict=True)
            for mine, theirs in zip(a["params"], b["params"], strict=True)
            if self.skips(group) and mine.numel()
        ]
        for p in places[index % len(places)] if places else ():
            p.grad.view(-1)[0] = value
        self.ours.step()
        self.step_stock(False)
        self.check_skips()

    @rule(seed=seeds)
    def step_by_closure(self, seed):
        def closure() -> float:
            self.give_gradients(seed, 0, 1.0)
            return 3.0

        assert self.ours.step(closure) == 3.0
        self.step_stock(False)

    @rule()
    def show_the_next_rate(self):
        self.ours.scheduler.step()
        self.adopt()
        for group in self.groups:
            group.show()

    def check_skips(self) -> None:
        skipped = counters(self.ours).skipped.tolist()
        assert skipped == [group.skipped for group in self.groups]

    # values of groups

    def group(self, index: int) -> tuple[Any, dict[str, Any], Group]:
        i = index % len(self.groups)
        return self.ours.param_groups[i], self.stock.param_groups[i], self.groups[i]

    @rule(index=which, lr=rates)
    def assign_a_rate(self, index, lr):
        ours, _, group = self.group(index)
        if lr not in (group.lr, group.shown):
            ours["lr"] = group.lr = lr
            group.assigned = group.foreign = True

    @rule(index=which)
    def write_the_rate_back(self, index):
        ours, _, group = self.group(index)
        # a step at an assigned 0 without gradients or state only allocates
        if not group.foreign and group.lr != 0:
            ours["lr"] = float(ours["lr"])

    @rule(index=which, item=HYPERPARAMETERS, way=st.sampled_from(["set", "update", "or"]))
    def assign_a_hyperparameter(self, index, item, way):
        ours, stock, _ = self.group(index)
        name, value = item
        stock[name] = value
        if way == "set":
            ours[name] = value
        elif way == "update":
            ours.update({name: value})
        else:
            ours |= {name: value}

    @rule(index=which, limit=limits)
    def assign_a_limit(self, index, limit):
        ours, _, group = self.group(index)
        if self.independent:
            ours["max_grad_norm"] = group.limit = limit
        else:
            self.ours.max_grad_norm = self.limit = limit

    @rule(index=which, peak=rates)
    def assign_a_peak(self, index, peak):
        ours, _, group = self.group(index)
        if group.schedule is not None and hasattr(ours, "own"):
            ours["initial_lr"] = group.peak = peak
            group.foreign = True

    @rule(index=which, schedule=schedules)
    def assign_a_schedule(self, index, schedule):
        ours, _, group = self.group(index)
        if group.schedule is not None and schedule != "none" and hasattr(ours, "own"):
            ours["schedule"] = group.schedule = SCHEDULES[schedule]
            group.foreign = True
            self.forget_files()

    @precondition(lambda self: self.whole())
    @rule(
        call=st.sampled_from(
            [("cooldown", 4, "linear", 0.2), ("cooldown", 3), ("rewarm", 2), ("cancel_cooldown",)]
        )
    )
    def change_the_schedules(self, call):
        name, *given = call
        scheduled = [group for group in self.groups if group.schedule is not None]
        cancels = name == "cancel_cooldown"
        if not scheduled or (cancels and not any(group.schedule.changes for group in scheduled)):
            with pytest.raises(ValueError, match="no group has a"):
                getattr(self.ours, name)(*given)
            return
        getattr(self.ours, name)(*given)
        self.adopt()
        for group in scheduled:
            group.schedule = (
                group.schedule.original if cancels else getattr(group.schedule, name)(group.k, *given)
            )
            if group.shown_k == group.k and not group.assigned:
                group.show()
        self.forget_files()

    @rule(index=which, k=st.integers(0, 15))
    def assign_k(self, index, k):
        ours, _, group = self.group(index)
        # a plain dict has no k before the next step
        if hasattr(ours, "own"):
            ours["k"] = group.k = k
            self.k_loaded = None
            group.show()

    # tensors

    def pair(self, index: int) -> tuple[Tensor, Tensor]:
        pairs = self.pairs()
        return pairs[index % len(pairs)]

    @rule(index=which, trained=st.booleans())
    def freeze(self, index, trained):
        for p in self.pair(index):
            p.requires_grad_(trained)

    @rule(index=which, factor=st.sampled_from([1.0, 0.5]))
    def move_a_parameter(self, index, factor):
        for p in self.pair(index):
            p.data = p.data.clone() * factor

    @rule(
        index=which,
        key=st.sampled_from(["exp_avg", "exp_avg_sq", "step"]),
        factor=st.sampled_from([1.0, 2.0]),
    )
    def replace_a_tensor_of_the_state(self, index, key, factor):
        for p, optimizer in zip(self.pair(index), (self.ours, self.stock), strict=True):
            entry = optimizer.state.get(p)
            if entry:
                entry[key] = entry[key].clone() * factor

    @rule(index=which)
    def replace_an_entry_of_the_state(self, index):
        for p, optimizer in zip(self.pair(index), (self.ours, self.stock), strict=True):
            if optimizer.state.get(p):
                optimizer.state[p] = {key: x.clone() for key, x in optimizer.state[p].items()}

    @rule(index=which)
    def forget_the_state_of_a_parameter(self, index):
        for p, optimizer in zip(self.pair(index), (self.ours, self.stock), strict=True):
            optimizer.state.pop(p, None)

    # which groups there are

    @precondition(lambda self: len(self.groups) < 5)
    @rule(seed=seeds, schedule=schedules, peak=rates, limit=limits, join=st.booleans())
    def add_a_group(self, seed, schedule, peak, limit, join):
        values = draw((3,), torch.Generator().manual_seed(seed))
        group = Group(SCHEDULES[schedule], peak, limit)
        if join:
            group.k = max((one.k for one in self.groups), default=0)
            group.show()
        stock = {"params": [nn.Parameter(values.clone())], "lr": peak, "weight_decay": 0.2}
        self.stock.add_param_group(stock)
        made = self.made(group, self.stock.param_groups[-1], [nn.Parameter(values.clone())])
        self.ours.add_param_group({**made, "join": join} if join else made)
        self.groups.append(group)
        self.adopt()
        self.forget_files()

    def in_order(self, order: list[int], place: Callable[[Any, list[Any]], None]) -> None:
        """Let both have these of their groups."""
        for optimizer in (self.ours, self.stock):
            place(optimizer, [optimizer.param_groups[i] for i in order])
        self.groups = [self.groups[i] for i in order]
        self.forget_files()

    @rule(seed=st.randoms(use_true_random=False), in_place=st.booleans())
    def reorder_groups(self, seed, in_place):
        order = list(range(len(self.groups)))
        seed.shuffle(order)
        self.in_order(order, _fill if in_place else _assign)

    @precondition(lambda self: len(self.groups) > 1)
    @rule(index=which)
    def remove_a_group(self, index):
        i = index % len(self.groups)
        self.removed.append(
            (self.ours.param_groups.pop(i), self.stock.param_groups.pop(i), self.groups.pop(i))
        )
        self.forget_files()

    @precondition(lambda self: self.removed)
    @rule(first=st.booleans(), plain=st.booleans())
    def put_a_group_back(self, first, plain):
        ours, stock, group = self.removed.pop()
        place = 0 if first else len(self.groups)
        if plain:
            ours = dict(ours)
            group.assigned = group.seems_assigned()
        self.ours.param_groups.insert(place, ours)
        self.stock.param_groups.insert(place, stock)
        self.groups.insert(place, group)
        self.forget_files()

    @rule(index=which)
    def put_a_plain_dict_into_a_groups_place(self, index):
        i = index % len(self.groups)
        group = self.groups[i]
        self.ours.param_groups[i] = dict(self.ours.param_groups[i])
        group.assigned = group.seems_assigned()

    # copies and files

    def whole(self) -> bool:
        """Whether torch can make a state dict: it cannot while there is state without a group."""
        return not self.removed

    def take(self, ours: fusedlr.FusedAdamW) -> None:
        """Go on with another optimizer, whose parameters have no gradients."""
        self.ours = ours
        for group in self.groups:
            group.show()
        self.k_loaded = None

    def copied_params(self) -> list[list[Tensor]]:
        return [
            [nn.Parameter(p.detach().clone(), p.requires_grad) for p in group["params"]]
            for group in self.ours.param_groups
        ]

    @precondition(whole)
    @rule(way=st.sampled_from([copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]))
    def copy_it(self, way):
        self.take(way(self.ours))

    @precondition(whole)
    @rule(in_default_dtype=st.sampled_from([torch.float32, torch.bfloat16]))
    def through_its_file(self, in_default_dtype):
        state = through_a_file(self.ours.state_dict())
        ours = self.anew(self.copied_params())
        torch.set_default_dtype(in_default_dtype)
        try:
            ours.load_state_dict(state)
        finally:
            torch.set_default_dtype(torch.float32)
        self.take(ours)

    @precondition(whole)
    @rule(seed=seeds, scheduler_first=st.sampled_from([None, True, False]), taken=st.integers(0, 2))
    def through_stock_and_back(self, seed, scheduler_first, taken):
        params = self.copied_params()
        spec = [{"params": part, "lr": 0.1} for part in params]
        stock = torch.optim.AdamW(spec, amsgrad=self.amsgrad)
        stock.load_state_dict(torchs_part(through_a_file(self.ours.state_dict())))
        scheduler = through_a_file(self.ours.scheduler.state_dict())
        for i in range(taken if scheduler_first is None else 0):
            self.take(self.ours)
            self.give_gradients(seed + i, 0, 1.0)
            self.limit, limit = None, self.limit
            limits, nonfinite, self.nonfinite = [group.limit for group in self.groups], self.nonfinite, None
            for group in self.groups:
                group.limit = None
            self.step_stock(False)
            self.limit, self.nonfinite = limit, nonfinite
            for group, own in zip(self.groups, limits, strict=True):
                group.limit = own
            for theirs, group in zip(stock.param_groups, self.groups, strict=True):
                theirs["lr"] = group.lr
            for p, (mine, _) in zip(self.params(stock), self.pairs(), strict=True):
                p.grad = mine.grad
            stock.step()
        ours = self.anew(params)
        if scheduler_first:
            ours.scheduler.load_state_dict(scheduler)
        ours.load_state_dict(through_a_file(stock.state_dict()))
        if scheduler_first is False:
            ours.scheduler.load_state_dict(scheduler)
        if scheduler_first is None:
            # without ours the moments' steps tell how far the schedules are
            t = [
                max(
                    (int(self.stock.state[p]["step"]) for p in group["params"] if self.stock.state.get(p)),
                    default=0,
                )
                for group in self.stock.param_groups
            ]
            for group, latest in zip(self.groups, t, strict=True):
                group.k = latest if self.independent else max(t)
                group.skipped = 0
                # and nothing tells of a cooldown
                group.schedule = group.schedule and group.schedule.original
        for p in self.params(ours):
            p.grad = None
        self.take(ours)
        if scheduler_first is False:
            # it would also decide for the next file
            self.k_loaded = [(group, group.k) for group in self.groups]

    @precondition(whole)
    @rule()
    def save(self):
        self.adopt()
        k = [group.k for group in self.groups]
        self.file = (
            through_a_file(self.ours.state_dict()),
            copy.deepcopy(self.stock.state_dict()),
            self.copied_groups(),
        )
        assert [group["k"] for group in self.file[0]["fusedlr"]["groups"]] == k
        for mine, group in zip(self.ours.param_groups, self.groups, strict=True):
            # reading the counters may not change what is shown
            assert math.isclose(mine["lr"], group.lr, rel_tol=1e-12)

    def copied_groups(self) -> list[Group]:
        return [copy.copy(group) for group in self.groups]

    @precondition(lambda self: self.file is not None)
    @rule()
    def load_in_place(self):
        ours, stock, groups = copy.deepcopy(self.file)
        self.ours.load_state_dict(ours)
        self.stock.load_state_dict(stock)
        self.adopt()
        k_loaded = [g.k for g in groups] if self.k_loaded is None else [k for _, k in self.k_loaded]
        for now, then, k in zip(self.groups, groups, k_loaded, strict=True):
            now.peak, now.limit, now.k, now.skipped = then.peak, then.limit, k, then.skipped
            if now.schedule is not None and then.schedule is not None:
                # what has become of it since is taken back
                now.schedule = now.schedule.with_changes(then.schedule.changes)
            if now.schedule is None:
                now.lr = then.lr
            now.show()
        self.k_loaded = None

    @precondition(whole)
    @rule()
    def save_the_scheduler(self):
        self.adopt()
        self.scheduler_file = through_a_file(self.ours.scheduler.state_dict()), self.copied_groups()

    @precondition(lambda self: self.scheduler_file is not None)
    @rule()
    def load_the_scheduler(self):
        state, groups = self.scheduler_file
        self.ours.scheduler.load_state_dict(state)
        for now, then in zip(self.groups, groups, strict=True):
            now.k, now.skipped = then.k, then.skipped
            if now.schedule is not None:
                now.peak = then.peak
            now.show()
        self.k_loaded = [(now, now.k) for now in self.groups]

    # what must hold

    @invariant()
    def agrees_with_the_model(self):
        if not self.groups:
            return
        for mine, theirs, group in zip(
            self.ours.param_groups, self.stock.param_groups, self.groups, strict=True
        ):
            assert mine["k"] == group.k if hasattr(mine, "own") else True
            assert math.isclose(mine["lr"], group.lr, rel_tol=1e-12, abs_tol=1e-18)
            for name in ("betas", "eps", "weight_decay"):
                assert mine[name] == theirs[name]
        for mine, theirs in self.pairs():
            torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-14)
            a, b = self.ours.state.get(mine) or {}, self.stock.state.get(theirs) or {}
            # a step that was skipped on the device has made the state, of zeros
            assert b.keys() == a.keys() or (not b and not any(x.any() for x in a.values()))
            for key in b:
                torch.testing.assert_close(a[key], b[key], rtol=1e-12, atol=1e-14)


def _fill(optimizer: Any, groups: list[Any]) -> None:
    optimizer.param_groups[:] = groups


def _assign(optimizer: Any, groups: list[Any]) -> None:
    optimizer.param_groups = groups


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_any_order_of_operations_gives_what_stock_torch_gives(backend):
    with quiet():
        run_state_machine_as_test(lambda: Machine(backend), settings=SETTINGS)
