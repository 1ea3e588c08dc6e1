"""An optimizer that goes from one GPU backend to the other goes on; what was captured before is inert."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import backends_on

from gpu.steps import all_params, compare, params, train
from gpu.test_graphs import Graph, capture, stale, weights

pytestmark = pytest.mark.skipif(
    not {"cuda", "triton"} <= set(backends_on("cpu")), reason="not both GPU backends can be compiled here"
)
__all__ = ["capture"]


def make() -> list[dict[str, Any]]:
    return [{"params": params(5, 1030)}, {"params": params(3, seed=2), "lr": 0.1}]


def go_to(backend: str, optimizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEDLR_BACKEND", backend)
    # the backend is chosen when a plan is made
    optimizer._planner.plan = None
    assert optimizer.backend == backend


def test_every_switch_goes_on_as_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    order = ("cuda", "triton", "triton", "cuda", "reference", "cuda", "cuda", "triton", "reference", "triton")
    ours = train("cuda", make, steps=len(order), before=lambda o, k: go_to(order[k], o, monkeypatch))
    monkeypatch.delenv("FUSEDLR_BACKEND")
    compare(ours, train("reference", make, steps=len(order)))


@pytest.mark.parametrize("old, new", (("cuda", "triton"), ("triton", "cuda")))
def test_a_graph_of_the_old_backend_is_inert(
    old: str, new: str, capture: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimizer, graph = train(old, make, steps=2), Graph()
    with capture(graph):
        optimizer.step()
    graph.replay()
    assert optimizer.metrics()["step"].tolist() == [3, 3] and not stale(optimizer)
    go_to(new, optimizer, monkeypatch)
    optimizer.step()
    before = weights(optimizer)
    graph.replay()
    assert all(map(torch.equal, weights(optimizer), before))
    assert optimizer.metrics()["step"].tolist() == [4, 4] and stale(optimizer)
    # nor does it come back to life
    go_to(old, optimizer, monkeypatch)
    optimizer.step()
    before = weights(optimizer)
    graph.replay()
    assert all(map(torch.equal, weights(optimizer), before))


def test_a_graph_of_the_new_backend_is_right(capture: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer, other = train("triton", make, steps=2), train("reference", make, steps=2)
    go_to("cuda", optimizer, monkeypatch)
    optimizer.step()
    graph = Graph()
    with capture(graph):
        optimizer.step()
    graph.replay()
    monkeypatch.delenv("FUSEDLR_BACKEND")
    for _ in range(2):
        other.step()
    compare(optimizer, other)
    assert {state["step"].item() for p in all_params(optimizer) if (state := optimizer.state[p])} == {4.0}
