"""The CUDA kernels give the same bits in whatever order blocks, warps and lanes run; wrong ones are seen.

On the host: see cuda_on_host.h. A block is done before the next one begins, so what blocks do to each other
while both run is not seen; tests/test_cuda_compile.py finds fence and ticket in the assembly.
"""

from __future__ import annotations

import faulthandler
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cuda_host
import pytest
import torch
from gpu_steps import BACKEND, all_params, compare, needs_backend, params, train
from snapshots import snapshot
from torch import Tensor, nn
from wrong import cuda_steps as wrong
from wrong.gpu_runs import rejected, wanted

import fusedlr
from fusedlr import compiled, gpu

pytestmark = [needs_backend, pytest.mark.skipif(BACKEND != "cuda", reason="for the CUDA backend")]

# in order, from the last to the first, shuffled
ORDERS = (0, 1, 2, 3, 4)
SIZES = (1, 3, 255, 1023, 4096, 4097, 9001, 0)


def mixed() -> list[dict[str, Any]]:
    return [
        {"params": params(*SIZES)},
        {"params": params(*SIZES, dtype=torch.bfloat16, seed=1), "lr": 0.03},
        {"params": params(*SIZES, dtype=torch.float16, seed=2), "maximize": True},
        {"params": [*params(70, 5000, seed=3), *params(9, dtype=torch.bfloat16, seed=4)], "amsgrad": True},
        {"params": []},
    ]


def many() -> list[dict[str, Any]]:
    return [{"params": params(1 + i % 7, seed=i), "lr": 0.01 * (1 + i % 3)} for i in range(40)]


def large() -> list[dict[str, Any]]:
    """More partial sums than a block has threads, and scopes with more than a warp adds up in a round."""
    return [{"params": params(*[3] * count, seed=count)} for count in (300, 40, 270)]


def skip_some(optimizer: Any, k: int) -> None:
    if k == 1:
        all_params(optimizer)[0].grad[0] = float("inf")


def scaled(optimizer: Any, k: int) -> None:
    for p in all_params(optimizer):
        p.grad *= 8
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor([0.0, 1.0, 0.0][k])


CASES: dict[str, tuple[Callable[[], list[dict[str, Any]]], dict[str, Any]]] = {
    "mixed": (mixed, {}),
    "mixed, 16-bit moments": (mixed, {"state_dtype": "param", "eps": 1e-4}),
    "mixed, independent, skips": (mixed, {"groups": "independent", "before": skip_some}),
    "mixed, scaler": (mixed, {"before": scaled}),
    "mixed, no clipping": (mixed, {"max_grad_norm": None, "nonfinite": "propagate"}),
    "many": (many, {}),
    "many, independent, skips": (many, {"groups": "independent", "before": skip_some}),
    "large": (large, {"steps": 1}),
    "large, independent": (large, {"steps": 2, "groups": "independent", "before": skip_some}),
}


@pytest.mark.parametrize("case", CASES)
def test_no_bit_depends_on_the_order(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, options = CASES[case]
    first: Any = None
    for order in ORDERS[:3] if case.startswith("large") else ORDERS:
        monkeypatch.setenv("CUDA_ON_HOST_ORDER", str(order))
        ran = train("cuda", make, **options)
        shot = snapshot(ran), ran.metrics()["grad_norm"].tolist(), ran.metrics()["coef"].tolist()
        assert first is None or str(shot) == str(first)
        first = first or shot
    if case.startswith("large"):
        compare(ran, train("reference", make, **options))


# --- mistakes


def verdict(check: Callable[[], bool]) -> str:
    """What `check` says of the kernels in use: in a copy of this process, which they may bring down."""
    child = os.fork()
    if child:
        status = os.waitpid(child, 0)[1]
        return (
            "crashed"
            if os.WIFSIGNALED(status)
            else ("accepted", "rejected", "failed")[os.WEXITSTATUS(status)]
        )
    code = 2
    try:
        faulthandler.disable()
        # no thread of the pool is in a copy
        torch.set_num_threads(1)
        signal.alarm(100)
        code = int(check())
    except RuntimeError as error:
        code = 1 if "a barrier is not reached" in str(error) else 2
    finally:
        os._exit(code)


@pytest.fixture(scope="module", autouse=True)
def reference_runs() -> None:
    """Made once, here, for all copies of this process."""
    for run in wrong.RUNS:
        wanted(run)


def in_some_order(
    check: Callable[[], bool], path: Path, orders: tuple[int, ...] = ORDERS
) -> Callable[[], bool]:
    """`check` on the module at `path`, in the orders."""

    def checked() -> bool:
        cuda_host.use(cuda_host.load(path))
        for order in orders:
            os.environ["CUDA_ON_HOST_ORDER"] = str(order)
            if check():
                return True
        return False

    return checked


def edited(folder: Path, edits: wrong.Edit, more: str = "") -> Path:
    """The module with these edits to the kernels of fp32 parameters."""
    source = (cuda_host.CSRC / "cuda.cu").read_text()
    for right, other in edits:
        assert source.count(right) == 1, f"does not apply: {source.count(right)} times {right!r}"
        source = source.replace(right, other)
    kernels = folder / "edited.cu"
    kernels.write_text(source)
    return cuda_host.build(folder, kernels, more, rest=cuda_host.installed().parent)


def leaves_the_reference() -> bool:
    return rejected(wrong.RUNS)


def moves_when_stale() -> bool:
    """Whether a step on tensors that have moved since it was captured does more, or less, than to say so."""
    # wrong kernels are those of fp32: one launch of several, then the only one
    return any(_moves_when_stale(first) for first in (params(3, dtype=torch.bfloat16), []))


def _moves_when_stale(first: list[nn.Parameter]) -> bool:
    optimizer = train("cuda", lambda: [{"params": [*first, *params(5, 9000)]}], steps=1)
    (launcher,) = gpu._launchers[optimizer._counters.math]
    launcher._generation.tensor.fill_(7)

    def all_bits() -> str:
        counters = optimizer._counters
        tensors: list[Tensor] = [*all_params(optimizer), counters.counts[:3], counters.used, launcher._norms]
        tensors += [x for state in optimizer.state.values() for x in state.values()]
        return str([x.tolist() for x in tensors])

    for p in all_params(optimizer):
        p.grad *= 2
    before = all_bits()
    optimizer.step()
    return all_bits() != before or optimizer._counters.stale.tolist() != [1]


def leaves_the_reference_with_a_table() -> bool:
    compiled.cuda.most_gradients = 0
    return rejected(wrong.RUNS[:1])


def off_16_bytes(which: str) -> Callable[[], bool]:
    """Steps on tensors of which one is not aligned; the compiler has put a trap there."""

    def off(x: Tensor) -> Tensor:
        return torch.empty(x.numel() + 1)[1:].copy_(x)

    def check() -> bool:
        (p,) = params(9000)
        optimizer = fusedlr.FusedAdamW(
            [nn.Parameter(off(p.detach())) if which == "param" else p],
            backend="cuda",
            amsgrad=True,
            max_grad_norm=1.0,
        )
        for _ in range(2):
            (p,) = all_params(optimizer)
            p.grad = off(torch.ones(9000)) if which.startswith("grad") else torch.ones(9000)
            optimizer.step()
            state = optimizer.state[p]
            if which in state:
                state[which] = off(state[which])
        return False

    return check


@pytest.mark.parametrize("edit", wrong.EDITS)
def test_wrong_kernels_are_rejected(edit: str, tmp_path: Path) -> None:
    path = edited(tmp_path, wrong.EDITS[edit])
    assert verdict(in_some_order(leaves_the_reference, path)) in ("rejected", "crashed")


@pytest.mark.parametrize("edit", wrong.STALE_EDITS)
def test_launches_that_do_not_see_they_are_stale_are_rejected(edit: str, tmp_path: Path) -> None:
    path = edited(tmp_path, wrong.STALE_EDITS[edit])
    assert verdict(in_some_order(moves_when_stale, path)) == "rejected"


@pytest.mark.parametrize("edit", wrong.TABLE_EDITS)
def test_kernels_that_do_not_look_into_the_table_are_rejected(edit: str, tmp_path: Path) -> None:
    path = edited(tmp_path, wrong.TABLE_EDITS[edit])
    assert verdict(in_some_order(leaves_the_reference_with_a_table, path)) in ("rejected", "crashed")


_TRAP = "-fsanitize=alignment -fsanitize-undefined-trap-on-error"


@pytest.mark.parametrize("which", wrong.ALIGNMENT_EDITS)
def test_wide_accesses_off_16_bytes_are_seen(which: str, tmp_path: Path) -> None:
    path = edited(tmp_path, wrong.ALIGNMENT_EDITS[which], _TRAP)
    assert verdict(in_some_order(off_16_bytes(which), path, ORDERS[:1])) == "crashed"


@pytest.fixture(scope="module")
def with_traps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return edited(tmp_path_factory.mktemp("traps"), (), _TRAP)


@pytest.mark.parametrize("which", wrong.ALIGNMENT_EDITS)
def test_no_wide_access_is_off_16_bytes(which: str, with_traps: Path) -> None:
    assert verdict(in_some_order(off_16_bytes(which), with_traps, ORDERS[:1])) == "accepted"


@pytest.mark.parametrize("check", (leaves_the_reference, moves_when_stale, leaves_the_reference_with_a_table))
def test_the_right_kernels_are_accepted(check: Callable[[], bool]) -> None:
    assert verdict(in_some_order(check, cuda_host.installed())) == "accepted"


# --- sanitizers


def mixed_16_bit_moments() -> bool:
    make, options = CASES["mixed, 16-bit moments"]
    train("cuda", make, **options)
    return False


@pytest.mark.slow
def test_no_undefined_behaviour(tmp_path: Path) -> None:
    # a trap, as no library of the sanitizer is in this process. Not for addresses: that one does not know
    # fibers, which leave their stack by longjmp
    path = cuda_host.build(tmp_path, more="-fsanitize=undefined -fsanitize-undefined-trap-on-error")
    for check in (leaves_the_reference, moves_when_stale, mixed_16_bit_moments):
        assert verdict(in_some_order(check, path, ORDERS[:1])) == "accepted", check
