"""Named scopes with fully_shard: as on one process, and every process decides alike for each of them."""

from __future__ import annotations

from sharded.processes import run


def test_named_scopes_with_fully_shard() -> None:
    run("worker_scopes", 2)
