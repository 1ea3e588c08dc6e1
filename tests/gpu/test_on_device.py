"""What only a GPU shows: graphs, streams, tickets of many blocks at once, where gradients lie, recompiles.

Tests with the arguments `device, backend` also run on the CPU, where a graph is the step itself: that shows
that they run, and that what they expect is right.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import backends_on, relative_difference
from tolerances import GPU_STEP
from torch import Tensor, nn

import fusedlr

# bench is run from the checkout; where only the tests are, there is no bench to test
sys.path.append(str(Path(__file__).resolve().parents[2]))
graphs = pytest.importorskip("bench.graphs")

SCHEDULE = fusedlr.cosine(warmup_steps=5, total_steps=250, min_lr_ratio=0.1)
SIZES = ((16, 64), (64, 16), (1025,), (4096,), (9000,), (3,))
# graphs.capture makes them before it captures
WARM_UP = 3


def many(device: str, backend: str) -> int:
    """Replays or steps: 200 where they are quick."""
    if device == "cpu":
        return 5
    # one operation after the other, for hundreds of tensors
    return 20 if backend == "reference" else 200


def params(device: str, sizes: Any = SIZES, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(size, generator=generator).to(device, dtype)) for size in sizes]


def optimizer_of(some: Any, backend: str, **options: Any) -> fusedlr.FusedAdamW:
    settings = {"lr": 0.01, "schedule": SCHEDULE, "max_grad_norm": 1.0, **options}
    return fusedlr.FusedAdamW(some, backend=backend, **settings)


def all_params(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def gradients(optimizer: Any, k: int) -> list[Tensor]:
    """Of step `k`, the same for every optimizer over the same shapes."""
    generator = torch.Generator().manual_seed(k)
    some = all_params(optimizer)
    return [torch.randn(p.shape, generator=generator).to(p.device, p.dtype) for p in some]


def in_place(optimizer: Any, k: int) -> None:
    """Write the gradients of step `k` where those of the step before are."""
    for p, grad in zip(all_params(optimizer), gradients(optimizer, k), strict=True):
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        p.grad.copy_(grad)


def outcome(optimizer: Any) -> list[Tensor]:
    """Everything that steps leave behind."""
    metrics = optimizer.metrics()
    state = [x for p in all_params(optimizer) for _, x in sorted(optimizer.state[p].items())]
    return [p.detach() for p in all_params(optimizer)] + state + [metrics[key] for key in sorted(metrics)]


def same_bits(a: Any, b: Any) -> None:
    pairs = list(zip(outcome(a), outcome(b), strict=True))
    assert all(torch.equal(x.nan_to_num(7), y.nan_to_num(7)) for x, y in pairs)


def close(a: Any, b: Any, tolerance: float = GPU_STEP) -> None:
    assert relative_difference(all_params(a), all_params(b)) <= tolerance
    assert a.metrics()["step"].tolist() == b.metrics()["step"].tolist()


# --- graphs


def test_replays_equal_steps(device: str, backend: str) -> None:
    ours, theirs = (optimizer_of(params(device), backend) for _ in range(2))
    in_place(ours, 0), in_place(theirs, 0)
    replay = graphs.capture(ours.step, torch.device(device))
    for _ in range(WARM_UP):
        theirs.step()
    count = many(device, backend)
    for k in range(count):
        in_place(ours, k), in_place(theirs, k)
        replay(), theirs.step()
    same_bits(ours, theirs)
    assert ours.metrics()["step"].tolist() == [WARM_UP + count]


class Training:
    """A small model whose iterations give the same bits every time: no matrix product is in it."""

    def __init__(self, device: str, backend: str, scaled: bool = False) -> None:
        self.device = device
        self.params = params(device, ((64, 32), (32,)))
        self.optimizer = optimizer_of(self.params, backend)
        self.x = torch.ones(64, 32, device=device)
        # finite gradients would take ten updates to grow the scale: it does within the run
        self.scaler = torch.amp.GradScaler(device, init_scale=1024.0, growth_interval=10) if scaled else None

    def iteration(self) -> None:
        a, b = self.params
        loss = ((self.x * a).tanh() + b - 1).square().mean()
        if self.scaler is None:
            loss.backward()
            self.optimizer.step()
            return
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def eager(self) -> None:
        self.optimizer.zero_grad()
        self.iteration()

    def capture(self) -> Callable[[], None]:
        """As the documentation says: warm up, gradients to None, capture."""
        if self.device == "cpu":
            for _ in range(WARM_UP):
                self.eager()
            return self.eager
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                self.eager()
        torch.cuda.current_stream().wait_stream(stream)
        self.optimizer.zero_grad()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.iteration()
        return graph.replay

    def feed(self, k: int, bad: tuple[int, ...] = ()) -> None:
        generator = torch.Generator().manual_seed(k)
        self.x.copy_(torch.randn(64, 32, generator=generator))
        if k in bad:
            self.x[0, 0] = torch.inf
            # inf times 0 in the backward of tanh: the gradient is nan
            self.x[0, 1] = torch.nan


@pytest.mark.parametrize("scaled", (False, True))
def test_replayed_iterations_equal_steps(device: str, backend: str, scaled: bool) -> None:
    ours, theirs = (Training(device, backend, scaled) for _ in range(2))
    replay = ours.capture()
    for _ in range(WARM_UP):
        theirs.eager()
    count = many(device, backend)
    bad = tuple(k for k in (1, 3, 50, 51, 120) if k < count)
    for k in range(count):
        for training in (ours, theirs):
            training.feed(k, bad)
        replay()
        theirs.eager()
    same_bits(ours.optimizer, theirs.optimizer)
    metrics = ours.optimizer.metrics()
    assert metrics["skipped"].item() == len(bad)
    assert metrics["step"].tolist() == [WARM_UP + count - len(bad)]
    rate = SCHEDULE.lr_at(WARM_UP + count - len(bad) - 1, 0.01)
    assert metrics["lr"].item() == pytest.approx(rate, rel=1e-6)
    if ours.scaler is not None and theirs.scaler is not None:
        assert ours.scaler.get_scale() == theirs.scaler.get_scale()


def captured(backend: str) -> tuple[fusedlr.FusedAdamW, Callable[[], None]]:
    optimizer = optimizer_of(params("cuda"), backend)
    in_place(optimizer, 0)
    return optimizer, graphs.capture(optimizer.step, torch.device("cuda"))


@pytest.fixture(params=("cuda", "triton"))
def kernels(request: pytest.FixtureRequest) -> str:
    """A backend with kernels of ours."""
    if request.param not in backends_on("cuda"):
        pytest.skip(f"{request.param} does not run on this GPU")
    return request.param


def host_hears(optimizer: Any) -> None:
    """What a training loop does; twice, as the first call only starts the copy."""
    for _ in range(2):
        optimizer.scheduler.step()
        torch.cuda.synchronize()
    optimizer.scheduler.step()


@pytest.mark.gpu
def test_a_graph_of_tensors_that_moved_does_nothing_and_says_so(kernels: str) -> None:
    optimizer, replay = captured(kernels)
    replay()
    host_hears(optimizer)
    p = all_params(optimizer)[0]
    kept, p.data = p.data, p.data.clone()
    optimizer.step()
    before = [x.clone() for x in (*outcome(optimizer), kept)]
    replay()
    assert all(
        torch.equal(a.nan_to_num(7), b.nan_to_num(7))
        for a, b in zip(before, (*outcome(optimizer), kept), strict=True)
    )
    with pytest.raises(RuntimeError, match="Capture the CUDA graph again"):
        host_hears(optimizer)
    # and again it works
    graphs.capture(optimizer.step, torch.device("cuda"))()
    host_hears(optimizer)


@pytest.mark.gpu
def test_replays_follow_a_hyperparameter_after_one_step_outside(kernels: str) -> None:
    optimizer, replay = captured(kernels)
    other = optimizer_of(params("cuda"), kernels)
    in_place(other, 0)
    for _ in range(WARM_UP):
        other.step()
    for o in (optimizer, other):
        o.param_groups[0]["weight_decay"] = 0.3
        o.param_groups[0]["initial_lr"] = 0.05
        o.max_grad_norm = 0.5
        o.step()
    replay(), other.step()
    same_bits(optimizer, other)


@pytest.mark.gpu
def test_replays_follow_a_cooldown_without_a_step_outside(kernels: str) -> None:
    optimizer, replay = captured(kernels)
    other = optimizer_of(params("cuda"), kernels)
    in_place(other, 0)
    for _ in range(WARM_UP):
        other.step()
    for change in ("cooldown", "rewarm", "cancel_cooldown"):
        for o in (optimizer, other):
            getattr(o, change)(*(() if change == "cancel_cooldown" else (20,)))
        for _ in range(8):
            replay(), other.step()
        same_bits(optimizer, other)


@pytest.mark.gpu
def test_two_graphs_of_one_optimizer_take_turns(kernels: str) -> None:
    optimizer, first = captured(kernels)
    second = graphs.capture(optimizer.step, torch.device("cuda"))
    other = optimizer_of(params("cuda"), kernels)
    in_place(other, 0)
    for _ in range(2 * WARM_UP):
        other.step()
    for k in range(10):
        (first if k % 2 else second)()
        other.step()
    same_bits(optimizer, other)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", backends_on("cuda"))
def test_a_first_step_or_a_missing_gradient_in_a_capture_is_refused(backend: str) -> None:
    optimizer = optimizer_of(params("cuda"), backend)
    in_place(optimizer, 0)
    with (
        pytest.raises(RuntimeError, match="make one step outside"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        optimizer.step()
    optimizer.step()
    all_params(optimizer)[1].grad = None
    with (
        pytest.raises(RuntimeError, match="1 parameters have no gradient"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        optimizer.step()
    # nothing is broken
    in_place(optimizer, 1)
    optimizer.step()
    assert optimizer.metrics()["step"].tolist() == [2]


# --- streams


@pytest.mark.gpu
@pytest.mark.parametrize("backend", backends_on("cuda"))
def test_steps_on_another_stream(backend: str) -> None:
    ours, theirs = (optimizer_of(params("cuda"), backend) for _ in range(2))
    side, main = torch.cuda.Stream(), torch.cuda.current_stream()
    for k in range(30):
        in_place(ours, k), in_place(theirs, k)
        if k % 3:
            side.wait_stream(main)
            with torch.cuda.stream(side):
                # more work than the host can queue in the meantime: the step has to wait for it
                torch.cuda._sleep(1_000_000)
                ours.step()
            main.wait_stream(side)
        else:
            ours.step()
        theirs.step()
    same_bits(ours, theirs)


# --- gradients


def test_gradients_in_new_memory_every_step(device: str, backend: str) -> None:
    ours, theirs = (optimizer_of(params(device), backend) for _ in range(2))
    kept = []
    for k in range(many(device, backend) // 4 + 2):
        in_place(theirs, k)
        ours.zero_grad()
        for p, grad in zip(all_params(ours), gradients(ours, k), strict=True):
            p.grad = grad
        # held for a while, so that the allocator cannot give the same memory again
        kept = [*kept, [p.grad for p in all_params(ours)]][-3:]
        ours.step(), theirs.step()
    same_bits(ours, theirs)


@pytest.mark.parametrize("offset", (1, 2, 4))
def test_gradients_that_are_views_of_a_bucket(device: str, backend: str, offset: int) -> None:
    ours, theirs = (optimizer_of(params(device), backend) for _ in range(2))
    # as DDP's gradient_as_bucket_view: end to end in one tensor
    total = sum(p.numel() for p in all_params(ours))
    bucket = torch.zeros(total + offset, device=device)
    begin = offset
    for p in all_params(ours):
        p.grad = bucket[begin : begin + p.numel()].view_as(p)
        begin += p.numel()
    for k in range(3):
        in_place(ours, k), in_place(theirs, k)
        ours.step(), theirs.step()
    close(ours, theirs)


# --- many blocks at once


@pytest.mark.parametrize("groups", ("joint", "independent"))
def test_counters_move_once_however_blocks_are_staggered(device: str, backend: str, groups: str) -> None:
    # one tensor of many chunks among many of a few elements, in three buckets: blocks end at all times
    large = 2**22 if device == "cuda" else 2**14
    few = 300 if device == "cuda" else 10
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    some = [params(device, [(large,), *[(3,)] * few], dtype) for dtype in dtypes]
    # an eps that fp16 can hold, rates that leave the numbers where they are
    optimizer = optimizer_of(
        [{"params": x} for x in some], backend, groups=groups, lr=1e-6, eps=1e-4, weight_decay=0.0
    )
    in_place(optimizer, 0)
    count = many(device, backend)
    norms = []
    for _ in range(count):
        optimizer.step()
        norms.append(optimizer.metrics()["grad_norm"])
    assert optimizer.metrics()["step"].tolist() == [count] * len(some)
    assert {s["step"].item() for s in optimizer.state.values()} == {float(count)}
    # the same gradients: a sum in another order, or one that began too early, would show
    assert all(torch.equal(norm, norms[0]) for norm in norms)
    squares = [sum(p.grad.double().square().sum() for p in x) for x in some]
    exact = torch.stack(squares) if groups == "independent" else sum(squares)
    assert torch.allclose(norms[0].double(), exact.sqrt(), rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("groups", ("joint", "independent"))
def test_groups_and_dtypes_against_the_reference(groups: str, kernels: str) -> None:
    def make(backend: str) -> fusedlr.FusedAdamW:
        kinds: list[dict[str, Any]] = [
            {"params": params("cuda", dtype=torch.bfloat16)},
            {"params": params("cuda"), "lr": 0.05, "weight_decay": 0.0, "betas": (0.8, 0.9)},
            {"params": params("cuda", dtype=torch.float16), "amsgrad": True},
            {"params": params("cuda", ((7,), (5000,))), "maximize": True},
        ]
        return optimizer_of(kinds, backend, groups=groups, eps=1e-4)

    ours, theirs = make(kernels), make("reference")
    for k in range(4):
        in_place(ours, k), in_place(theirs, k)
        ours.step(), theirs.step()
    for a, b in zip(all_params(ours), all_params(theirs), strict=True):
        # one rounding of 16 bits may go the other way in each of four steps
        tolerance = GPU_STEP if a.dtype == torch.float32 else 4 * torch.finfo(a.dtype).eps
        assert relative_difference([a], [b]) <= tolerance
    assert ours.metrics()["step"].tolist() == theirs.metrics()["step"].tolist()


# --- compilation


@pytest.mark.gpu
def test_nothing_is_compiled_after_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    if "triton" not in backends_on("cuda"):
        pytest.skip("Triton does not run on this GPU")
    from triton.runtime.jit import JITFunction

    optimizer = optimizer_of(params("cuda"), "triton")
    in_place(optimizer, 0)
    optimizer.step()
    calls: list[Any] = []
    run = JITFunction.run

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(self)
        return run(self, *args, **kwargs)

    # everything that could compile goes through it
    monkeypatch.setattr(JITFunction, "run", counted)
    group = optimizer.param_groups[0]
    changes: list[Callable[[], Any]] = [
        lambda: group.update(betas=(0.3, 0.4)),
        lambda: group.update(betas=(0.0, 0.0)),
        lambda: group.update(eps=1.0),
        lambda: group.update(weight_decay=0.0),
        lambda: group.update(weight_decay=1),
        lambda: group.update(initial_lr=1),
        lambda: group.update(maximize=True),
        lambda: group.update(schedule=fusedlr.constant()),
        lambda: group.update(schedule=fusedlr.warmup_stable_decay(2, 5, 30)),
        lambda: group.update(schedule=fusedlr.table(lambda k: 1 / (1 + k), total_steps=60)),
        lambda: setattr(optimizer, "max_grad_norm", 16.0),
        lambda: setattr(optimizer, "max_grad_norm", None),
        lambda: group.update(lr=0.2),
        lambda: setattr(optimizer, "grad_scale", torch.tensor(2.0, device="cuda")),
        lambda: setattr(optimizer, "found_inf", torch.tensor(0.0, device="cuda")),
        lambda: optimizer.add_param_group({"params": params("cuda", ((1,), (16,), (4097,)))}),
    ]
    for k, change in enumerate(changes):
        change()
        in_place(optimizer, k)
        optimizer.step()
    assert calls == []
    assert optimizer.metrics()["step"].tolist() == [1 + len(changes), 1]
