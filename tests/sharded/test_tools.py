"""Tools that shard a model and hand its parts to the optimizer, against stock AdamW in the same script."""

from __future__ import annotations

import pytest

from sharded.processes import run


def test_accelerate_and_the_trainer_with_fully_shard() -> None:
    for name in ("accelerate", "peft", "transformers"):
        pytest.importorskip(name)
    run("worker_tools", 2)
