"""Training with fully_shard: what a step makes and keeps, failures of one process, parts kept by hand."""

from __future__ import annotations

from sharded.processes import run


def test_training_with_fully_shard() -> None:
    run("worker_training", 2)
