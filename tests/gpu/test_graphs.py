"""What a captured step does when it is replayed, without a GPU: a graph is a list of launches.

Everything but the capture itself is the code that runs on a GPU; tests/gpu/test_on_device.py has real graphs.
"""

from __future__ import annotations

import ctypes
import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from harness import relative_difference
from kit import needs_watch
from tolerances import GPU_STEP
from torch import Tensor, nn

import fusedlr
from fusedlr.backends import compiled, order
from fusedlr.backends.gpu import arguments, cuda, graphs, tables, triton

SCHEDULE = fusedlr.linear(warmup_steps=2, total_steps=30)


class Graph:
    """Launches and copies, recorded while `capture` is open, made again by `replay`."""

    def __init__(self) -> None:
        self.launches: list[Callable[[], Any]] = []

    def replay(self) -> None:
        for launch in self.launches:
            launch()


@pytest.fixture
def capture(monkeypatch: pytest.MonkeyPatch) -> Callable[[Graph], Any]:
    @contextmanager
    def capture(graph: Graph) -> Iterator[None]:
        run, current = triton.launch, cuda.CudaStepper._current

        def record(*launch: Any) -> None:
            graph.launches.append(lambda: run(*launch))

        def recorder(stepper: Any, signals: Any) -> Any:
            launcher, given = current(stepper, signals)
            rows = 0 if stepper._in_table else len(stepper._arguments._inputs.gradients)
            return Recorder(graph, launcher, rows), given

        with monkeypatch.context() as patch:
            for module in (arguments, graphs, tables, order, cuda):
                patch.setattr(module, "capturing", lambda device: True)
            patch.setattr(triton, "launch", record)
            patch.setattr(cuda.CudaStepper, "_current", recorder)
            yield

    return capture


class Recorder:
    """Stands for the launches in CUDA: a graph keeps their parameters, gradients' addresses among them."""

    def __init__(self, graph: Graph, launcher: Any, rows: int) -> None:
        self._graph, self._launcher, self._rows = graph, launcher, rows

    def step(self, gradients: int, *rest: int) -> None:
        addresses = (ctypes.c_uint64 * self._rows)()
        if self._rows:
            ctypes.memmove(addresses, gradients, ctypes.sizeof(addresses))

        def launch() -> None:
            self._launcher.step(ctypes.addressof(addresses) if self._rows else gradients, *rest)

        self._graph.launches.append(launch)


@pytest.fixture(autouse=True, params=("with the launch", "in a table"))
def gradients(request: pytest.FixtureRequest, gpu_backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a graph has the gradients' addresses."""
    if gpu_backend != "cuda" and request.param == "with the launch":
        pytest.skip("Triton's kernels find them in a table")
    if gpu_backend == "cuda" and request.param == "in a table":
        monkeypatch.setattr(cuda, "most_gradients", lambda device: 0)


@pytest.fixture(params=(pytest.param("watched", marks=needs_watch), "unwatched"))
def watch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the compiled watch, and as where it is not built: every step is prepared anew then."""
    if request.param == "unwatched":
        monkeypatch.setattr(compiled, "host", None)


def make(backend: str, sizes: tuple[int, ...] = (5, 1500), **options: Any) -> fusedlr.FusedAdamW:
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(size, generator=generator)) for size in sizes]
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)
    settings = {"lr": 0.01, "schedule": SCHEDULE, "max_grad_norm": 1.0, **options}
    return fusedlr.FusedAdamW(params, backend=backend, **settings)


def weights(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]


def captured(gpu_backend: str, capture: Any, **options: Any) -> tuple[fusedlr.FusedAdamW, Graph]:
    """An optimizer that has made one step, and a graph of the next."""
    optimizer, graph = make(gpu_backend, **options), Graph()
    optimizer.step()
    with capture(graph):
        optimizer.step()
    return optimizer, graph


def stale(optimizer: fusedlr.FusedAdamW) -> bool:
    try:
        optimizer._counts.sync()
    except RuntimeError as error:
        assert "Capture the CUDA graph again" in str(error)
        return True
    return False


def test_a_replay_is_a_step(gpu_backend: str, capture: Any) -> None:
    optimizer, graph = captured(gpu_backend, capture)
    other = make("reference")
    other.step()
    for _ in range(5):
        graph.replay()
        other.step()
    assert relative_difference(weights(optimizer), weights(other)) <= GPU_STEP
    assert optimizer.metrics()["step"].tolist() == [6]
    # the capture itself made no step
    assert {s["step"].item() for s in optimizer.state.values()} == {6.0}


@pytest.mark.usefixtures("watch")
def test_replays_are_recorded(gpu_backend: str, capture: Any) -> None:
    optimizer, graph = captured(gpu_backend, capture, record=fusedlr.Record(last=4))
    other = make("reference", record=fusedlr.Record(last=4))
    other.step()
    for k in range(5):
        # what is not finite is found in a replay, too
        for o in (optimizer, other):
            params = o.param_groups[0]["params"]
            params[1].grad[7] = math.inf if k == 3 else 0.5
        graph.replay()
        other.step()
    ours, theirs = optimizer.record(), other.record()
    assert ours["step"].tolist() == [2, 3, 4, 5]
    for name, values in theirs.items():
        if isinstance(values, np.ndarray):
            np.testing.assert_allclose(
                ours[name].astype(float), values.astype(float), rtol=1e-5, err_msg=name
            )
    found = optimizer.last_metrics()
    assert (found["nonfinite_tensor"], found["nonfinite_step"]) == ("parameter 1 of group 0", 4)


def test_a_replay_follows_a_hyperparameter_after_one_step_outside(gpu_backend: str, capture: Any) -> None:
    optimizer, graph = captured(gpu_backend, capture)
    other = make("reference")
    other.step()
    for o in (optimizer, other):
        o.param_groups[0]["weight_decay"] = 0.5
        o.param_groups[0]["initial_lr"] = 0.1
        o.max_grad_norm = 0.3
        o.step()
    graph.replay()
    other.step()
    assert relative_difference(weights(optimizer), weights(other)) <= GPU_STEP
    assert not stale(optimizer)


@pytest.mark.usefixtures("watch")
def test_a_replay_follows_a_cooldown_without_a_step_outside(gpu_backend: str, capture: Any) -> None:
    optimizer, graph = captured(gpu_backend, capture)
    other = make("reference")
    other.step()

    def replay(count: int) -> None:
        for _ in range(count):
            graph.replay()
            other.step()
            rates = [o.metrics()["lr"].item() for o in (optimizer, other)]
            assert math.isclose(*rates, rel_tol=1e-6, abs_tol=0), optimizer.metrics()["step"]

    replay(4)
    # k comes from the device: the host does not count replays
    for change in ("cooldown", "cooldown", "rewarm", "cancel_cooldown"):
        for o in (optimizer, other):
            getattr(o, change)(*(() if change == "cancel_cooldown" else (6,)))
        replay(3)
    assert relative_difference(weights(optimizer), weights(other)) <= GPU_STEP
    assert optimizer.metrics()["step"].tolist() == [17] and not stale(optimizer)


def two_groups(backend: str) -> fusedlr.FusedAdamW:
    optimizer, p = make(backend), nn.Parameter(torch.ones(300))
    p.grad = torch.ones(300)
    optimizer.add_param_group({"params": [p], "lr": 0.1})
    return optimizer


def assign_a_rate(optimizer: Any) -> None:
    optimizer.param_groups[0]["lr"] = 0.5


def exchange_the_groups(optimizer: Any) -> None:
    optimizer.param_groups.reverse()


@pytest.mark.parametrize("change", (assign_a_rate, exchange_the_groups))
def test_a_cooldown_with_what_only_a_step_outside_takes_leaves_the_graph(
    gpu_backend: str, capture: Any, change: Callable[[Any], None]
) -> None:
    optimizer, other, graph = two_groups(gpu_backend), two_groups("reference"), Graph()
    params = [p for o in (optimizer, other) for group in o.param_groups for p in group["params"]]
    for o in (optimizer, other):
        o.step()
    with capture(graph):
        optimizer.step()
    change(optimizer)
    optimizer.cooldown(6)
    graph.replay()
    other.step()
    assert relative_difference(params[:3], params[3:]) <= GPU_STEP


def test_a_cooldown_without_room_leaves_the_graph_until_a_step_outside(
    gpu_backend: str, capture: Any
) -> None:
    many = fusedlr.cosine_with_restarts(total_steps=100, num_cycles=6, cycle_mult=1.1)
    for _ in range(9):
        many = many.rewarm(many.changes[-1].k + 1 if many.changes else 90, 5)
    assert len(many.phases) == 15
    optimizer, graph = captured(gpu_backend, capture, schedule=many)
    for k in (97, 98):
        optimizer.param_groups[0]["k"] = k + 3
        optimizer.cooldown(50)
    # 16 rows were full, 17 are needed
    assert len(optimizer.param_groups[0]["schedule"].phases) == 17
    before = optimizer.metrics()["step"].item()
    graph.replay()
    assert optimizer.metrics()["step"].item() == before + 1 and not stale(optimizer)
    optimizer.step()
    graph.replay()
    assert stale(optimizer)


def clip_no_more(optimizer: Any) -> None:
    optimizer.max_grad_norm = None


def more_phases_than_there_is_room_for(optimizer: Any) -> None:
    cycles = fusedlr.cosine_with_restarts(total_steps=100, num_cycles=9, cycle_mult=1.1)
    optimizer.param_groups[0]["schedule"] = cycles


def add_a_parameter(optimizer: Any) -> None:
    new = nn.Parameter(torch.ones(3))
    new.grad = torch.ones(3)
    optimizer.param_groups[0]["params"].append(new)


def add_an_empty_group(optimizer: Any) -> None:
    optimizer.add_param_group({"params": []})


def put_a_plain_dict_in_a_groups_place(optimizer: Any) -> None:
    optimizer.param_groups[0] = dict(optimizer.param_groups[0])


def move_a_parameter(optimizer: Any) -> None:
    p = optimizer.param_groups[0]["params"][0]
    # kept, as a graph would read freed memory without the check
    p.kept, p.data = p.data, p.data.clone()


def replace_a_moment(optimizer: Any) -> None:
    for state in optimizer.state.values():
        state["kept"] = state["exp_avg"]
        state["exp_avg"] = state["exp_avg"].clone()


@pytest.mark.parametrize(
    "change",
    (
        clip_no_more,
        more_phases_than_there_is_room_for,
        add_a_parameter,
        add_an_empty_group,
        put_a_plain_dict_in_a_groups_place,
        move_a_parameter,
        replace_a_moment,
    ),
)
def test_a_replay_that_is_out_of_date_does_nothing_and_says_so(
    gpu_backend: str, change: Any, capture: Any
) -> None:
    optimizer, graph = captured(gpu_backend, capture)
    graph.replay()
    assert not stale(optimizer)
    change(optimizer)
    optimizer.step()
    before, k = weights(optimizer), optimizer.metrics()["step"].tolist()
    graph.replay()
    assert all(map(torch.equal, weights(optimizer), before))
    assert optimizer.metrics()["step"].tolist() == k
    # other groups have other counters, and the launches of the graph say so in the old ones
    assert stale(optimizer) or change in (add_an_empty_group, put_a_plain_dict_in_a_groups_place)


@pytest.mark.parametrize("groups", ("joint", "independent"))
def test_a_graph_has_gradients_that_a_step_outside_has_not(
    gpu_backend: str, groups: str, capture: Any
) -> None:
    def two_groups(backend: str) -> fusedlr.FusedAdamW:
        (a, b), (c,) = (nn.Parameter(torch.ones(n)) for n in (5, 1500)), (nn.Parameter(torch.ones(7)),)
        for p in (a, b, c):
            p.grad = torch.full_like(p, 0.1)
        settings = {"lr": 0.01, "schedule": SCHEDULE, "max_grad_norm": 1.0, "groups": groups}
        return fusedlr.FusedAdamW([{"params": [a, b]}, {"params": [c]}], backend=backend, **settings)

    optimizer, other, graph = two_groups(gpu_backend), two_groups("reference"), Graph()
    optimizer.step(), other.step()
    with capture(graph):
        optimizer.step()
    kept = []
    for o in (optimizer, other):
        own = [p for group in o.param_groups for p in group["params"]][1:]
        kept.append([(p, p.grad) for p in own])
        for p in own:
            p.grad = None
        o.step()
    for _ in range(2):
        graph.replay()
        for p, grad in kept[1]:
            p.grad = grad
        other.step()
    assert relative_difference(weights(optimizer), weights(other)) <= GPU_STEP
    assert optimizer.metrics()["step"].tolist() == other.metrics()["step"].tolist()
    steps = [[s["step"].item() for s in o.state.values()] for o in (optimizer, other)]
    assert steps[0] == steps[1] == [4, 3, 3] and not stale(optimizer)


def test_clipping_that_comes_later_needs_a_new_capture(gpu_backend: str, capture: Any) -> None:
    optimizer, graph = captured(gpu_backend, capture, max_grad_norm=None)
    optimizer.max_grad_norm = 1.0
    optimizer.step()
    graph.replay()
    assert stale(optimizer)


def test_a_graph_captured_again_is_right(gpu_backend: str, capture: Any) -> None:
    optimizer, _ = captured(gpu_backend, capture)
    other = make("reference")
    other.step()
    for o in (optimizer, other):
        o.max_grad_norm = None
        o.step()
    graph = Graph()
    with capture(graph):
        optimizer.step()
    graph.replay()
    other.step()
    assert relative_difference(weights(optimizer), weights(other)) <= GPU_STEP


def test_a_hyperparameter_changed_just_before_a_capture_is_refused(gpu_backend: str, capture: Any) -> None:
    optimizer = make(gpu_backend)
    optimizer.step()
    optimizer.param_groups[0]["eps"] = 0.1
    with capture(Graph()), pytest.raises(RuntimeError, match="make one step before the capture"):
        optimizer.step()


def test_two_captures_without_a_step_between(gpu_backend: str, capture: Any) -> None:
    optimizer, _ = captured(gpu_backend, capture)
    graph = Graph()
    if gpu_backend == "triton" or cuda.most_gradients(torch.device("cpu")) == 0:
        # tables of addresses for two are allocated by the step before them
        with capture(Graph()):
            optimizer.step()
        with capture(Graph()), pytest.raises(RuntimeError, match="before every capture"):
            optimizer.step()
        optimizer.step()
    with capture(graph):
        optimizer.step()
    k = optimizer.metrics()["step"].item()
    graph.replay()
    assert optimizer.metrics()["step"].item() == k + 1


def test_a_gradient_that_is_back_in_the_capture_is_refused(gpu_backend: str, capture: Any) -> None:
    optimizer, other = (make(gpu_backend, groups="independent") for _ in range(2))
    other.step()
    # there is state, so that the tensors stay the same when their first gradients come
    optimizer.load_state_dict(other.state_dict())
    p, q = optimizer.param_groups[0]["params"]
    kept, p.grad, q.grad = (p.grad, q.grad), None, None
    optimizer.step()
    p.grad, q.grad = kept
    # which scopes make the step is uploaded
    with capture(Graph()), pytest.raises(RuntimeError, match="with gradients for the same parameters"):
        optimizer.step()
    optimizer.step()
    with capture(Graph()):
        optimizer.step()


def test_tensors_that_have_moved_before_a_capture_are_refused(gpu_backend: str, capture: Any) -> None:
    optimizer, _ = captured(gpu_backend, capture)
    optimizer.step()
    move_a_parameter(optimizer)
    with capture(Graph()), pytest.raises(RuntimeError, match="tensors have changed since the last step"):
        optimizer.step()


def test_a_group_added_later_leaves_the_graph_its_memory(gpu_backend: str, capture: Any) -> None:
    optimizer, graph = captured(gpu_backend, capture)
    new = nn.Parameter(torch.ones(3))
    new.grad = torch.ones(3)
    optimizer.add_param_group({"params": [new]})
    optimizer.step()
    before = weights(optimizer)
    graph.replay()
    assert all(map(torch.equal, weights(optimizer), before))


def test_gradients_of_the_graph_are_its_own(gpu_backend: str, capture: Any) -> None:
    optimizer, graph = captured(gpu_backend, capture)
    params = optimizer.param_groups[0]["params"]
    static = [p.grad for p in params]
    for p in params:
        p.grad = torch.full_like(p, 7.0)
    optimizer.step()
    for grad in static:
        grad.zero_()
    graph.replay()
    assert optimizer.metrics()["grad_norm"].item() == 0


def test_a_replay_follows_the_tensor_that_tells_which_scopes_step(gpu_backend: str, capture: Any) -> None:
    def adapters(backend: str) -> fusedlr.FusedAdamW:
        generator = torch.Generator().manual_seed(0)
        groups = []
        for name, size in (("a", 5), ("b", 1500), ("c", 7)):
            p = nn.Parameter(torch.randn(size, generator=generator))
            p.grad = torch.randn(size, generator=generator)
            groups.append({"params": [p], "scope": name})
        return fusedlr.FusedAdamW(groups, lr=0.01, schedule=SCHEDULE, max_grad_norm=1.0, backend=backend)

    optimizer, other, graph = adapters(gpu_backend), adapters("reference"), Graph()
    only = torch.ones(3, dtype=torch.bool)
    optimizer.step(only=only), other.step()
    # the stand-in records launches alone: what a real graph computes from the tensor is handed over here
    with capture(graph):
        optimizer.step(only=only)
    kept = weakref.ref(only)
    told = optimizer._counts.counters.graphs._pinned[-1]
    turns: list[tuple[bool, bool, bool]] = [(True, False, True), (False, True, False), (False, False, False)]
    active = next(part.active for part in told if hasattr(part, "active"))
    for turn in turns:
        only.copy_(torch.tensor(turn))
        active.copy_(only)
        graph.replay()
        other.step(only=only.clone())
        assert optimizer.metrics()["step"].tolist() == other.metrics()["step"].tolist()
        assert relative_difference(weights(optimizer), weights(other)) <= GPU_STEP
    # a graph goes on reading it when nobody else has it any more
    del only, told
    assert kept() is not None and not stale(optimizer)


@pytest.mark.usefixtures("watch")
def test_a_scope_left_out_of_a_capture_needs_no_gradients(
    gpu_backend: str, capture: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # a parameter that is not trained needs none anywhere
    frozen = {name: nn.Parameter(torch.ones(2), requires_grad=False) for name in "ab"}
    groups = [{"params": [nn.Parameter(torch.ones(5)), frozen[name]], "scope": name} for name in "ab"]
    optimizer, graph = fusedlr.FusedAdamW(groups, lr=0.01, backend=gpu_backend), Graph()
    a, b = (group["params"][0] for group in optimizer.param_groups)
    a.grad = torch.ones(5)
    optimizer.step(only="a")
    monkeypatch.setattr(optimizer._planner, "is_capturing", lambda: True)
    with capture(graph):
        optimizer.step(only="a")
        with pytest.raises(RuntimeError, match="1 parameters have no gradient while a CUDA graph"):
            optimizer.step()
    graph.replay()
    assert optimizer.metrics()["step"].tolist() == [2, 0] and bool((b == 1).all())
