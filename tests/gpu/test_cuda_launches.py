"""What is the CUDA backend's alone: its tables, how gradients' addresses travel, its refusals.

tests/gpu/test_steps.py has what a step does, `make ptx` that the order of threads is no matter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import backends_on, relative_difference
from tolerances import GPU_STEP
from torch import Tensor

import fusedlr
from fusedlr.backends import compiled
from fusedlr.backends.gpu import cuda
from fusedlr.backends.gpu.tables import Table
from gpu.steps import MOMENTS, all_params, both, count_calls, counts, params, train

pytestmark = pytest.mark.skipif("cuda" not in backends_on("cpu"), reason="no cuda on this CPU")

# what 4 KB of a launch's parameters hold, (4096 - 152) / 8: for more, a launch is of the larger size
FEW = 493
MOST = compiled.cuda.most_gradients if compiled.cuda else 4076


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of every launcher that is made from now on, whether it finds addresses in a table."""
    found: list[bool] = []
    make = cuda.launcher

    def noted(arguments: Any, *, table: bool, load: bool) -> Any:
        found.append(table)
        return make(arguments, table=table, load=load)

    monkeypatch.setattr(cuda, "launcher", noted)
    return found


def together(optimizer: fusedlr.FusedAdamW) -> list[Tensor]:
    """Parameters and moments; an element alone could be 0 but for its rounding."""
    states = optimizer.state.values()
    return [torch.cat(all_params(optimizer)), *(torch.cat([s[key] for s in states]) for key in MOMENTS[:2])]


def close(make: Callable[[], list[dict[str, Any]]], steps: int) -> None:
    runs = [train(backend, make, steps=steps) for backend in ("cuda", "reference")]
    assert counts(runs[0]) == counts(runs[1])
    assert relative_difference(*map(together, runs)) <= GPU_STEP


@pytest.mark.parametrize("count", (FEW, FEW + 1, MOST, MOST + 1))
def test_addresses_travel_with_a_launch_while_there_is_room(count: int, tables: list[bool]) -> None:
    # empty tensors take an address, but no block, which would copy it for each of its threads here
    sizes = [0 if i % 40 else 2 for i in range(count - 1)] + [3]
    close(lambda: [{"params": params(*sizes)}], steps=3)
    assert tables == [count > MOST]


def test_4100_tensors_of_one_element(tables: list[bool]) -> None:
    close(lambda: [{"params": params(*[1] * 4100)}], steps=1)
    assert tables == [True]


def test_addresses_in_a_table_are_uploaded_when_they_change(
    tables: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled.cuda, "most_gradients", 2)
    ours = both(
        "cuda", lambda: [{"params": [*params(5, 4100), *params(3, dtype=torch.float16)]}], max_grad_norm=None
    )
    assert tables == [True]
    uploads = count_calls(monkeypatch, Table, "_upload")
    ours.step()
    assert not uploads
    for p in all_params(ours):
        p.grad = p.grad.clone()
    ours.step()
    assert len(uploads) == 1


def test_a_missing_gradient_travels_as_no_address(tables: list[bool]) -> None:
    def before(optimizer: Any, k: int) -> None:
        for i, p in enumerate(all_params(optimizer)):
            p.grad = None if k and (i + k) % 2 else p.grad

    both("cuda", lambda: [{"params": params(5, 0, 4100, 7)}], before=before)
    assert tables == [False]


def launches(kind: tuple[int, int], rows: int = 2) -> Any:
    """Launches of nothing, on tensors of these types; addresses are not looked at before a step."""
    numbers = dict.fromkeys(("made_for", "programs", "groups", "scopes", "phases"), 0)
    names = "tensors chunks ints floats rates counts used squares partials tickets generation"
    addresses = dict.fromkeys(names.split(), 0)
    return compiled.cuda.Launcher(
        **addresses,
        **numbers,
        rows=rows,
        normed=False,
        buckets=[(*kind, False, 0, 0)],
        table=False,
        load=False,
    )


@pytest.mark.parametrize("kind", ((0, 0), (0, 1), (1, 0), (1, 2), (2, 3), (4, 1)))
def test_there_is_no_kernel_for_other_types(kind: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="there is no kernel for th"):
        launches(kind)


def test_a_launch_without_a_table_has_room_for_so_many_gradients() -> None:
    launches((1, 1), rows=MOST)
    with pytest.raises(ValueError, match="a launch cannot carry so many gradients"):
        launches((1, 1), rows=MOST + 1)


INSIDE = [75, 80, 86, 90, 120]


@pytest.mark.parametrize(
    ("capability", "driver", "words"),
    (
        (75, 13000, None),
        (87, 13000, None),
        (89, 13010, None),
        (121, 13000, None),
        # by its PTX
        (130, 13000, None),
        (130, 14000, None),
        (70, 13000, "compute capability 7.0, inside are 7.5, 8.0, 8.6, 9.0, 12.0"),
        (110, 13000, "compute capability 11.0, inside"),
        (90, 12090, "it needs a driver for CUDA 13.0, this one is for 12.9"),
    ),
)
def test_a_gpu_is_told_from_what_is_inside(capability: int, driver: int, words: str | None) -> None:
    why = cuda.misfit(capability, INSIDE, 13000, driver)
    assert why is None if words is None else words in (why or "")


def test_an_older_driver_of_the_same_cuda_runs_code_but_compiles_none() -> None:
    assert cuda.misfit(90, INSIDE, 12080, 12010) is None
    assert "it needs a driver for CUDA 12.1" in (cuda.misfit(90, INSIDE, 12080, 12000) or "")
    why = cuda.misfit(130, INSIDE, 12080, 12010) or ""
    assert "to compile for compute capability 13.0 it needs a driver for CUDA 12.8" in why
