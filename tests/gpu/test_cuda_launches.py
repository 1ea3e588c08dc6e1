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
from fusedlr.kept import MOMENTS
from gpu.steps import all_params, both, count_calls, counts, params, train

pytestmark = pytest.mark.skipif("cuda" not in backends_on("cpu"), reason="no cuda on this CPU")

# what 4 KB of a launch's parameters hold, (4096 - 152) / 8: for more, a launch is of the larger size
FEW = 492
MOST = compiled.cuda.many if compiled.cuda else 4075


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of every launcher that is made from now on, whether it finds addresses in a table."""
    found: list[bool] = []
    make = cuda.launcher

    def noted(*given: Any, table: bool) -> Any:
        found.append(table)
        return make(*given, table=table)

    monkeypatch.setattr(cuda, "launcher", noted)
    return found


def together(optimizer: fusedlr.FusedAdamW) -> list[Tensor]:
    """Parameters and moments; an element alone could be 0 but for its rounding."""
    states = list(optimizer.state.values())
    kept = [name for name in MOMENTS if name in states[0]]
    return [torch.cat(all_params(optimizer)), *(torch.cat([s[name] for s in states]) for name in kept)]


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
    monkeypatch.setattr(cuda, "most_gradients", lambda device: 2)
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


def launches(rows: int, *, few: bool) -> Any:
    """Launches of nothing; addresses are not looked at before a step."""
    numbers = dict.fromkeys(("made_for", "programs", "groups", "scopes", "phases", "device"), 0)
    names = "tensors chunks ints floats rates counts used squares partials tickets generation ring"
    addresses = dict.fromkeys(names.split(), 0)
    return compiled.cuda.Launcher(
        **addresses, **numbers, rows=rows, normed=False, buckets=[], few=few, table=False
    )


def test_a_launch_without_a_table_has_room_for_so_many_gradients() -> None:
    for most, few in ((compiled.cuda.few, True), (MOST, False)):
        launches(most, few=few)
        with pytest.raises(ValueError, match="a launch cannot carry so many gradients"):
            launches(most + 1, few=few)
