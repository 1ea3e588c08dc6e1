"""Tools that shard a model and hand its parts to the optimizer, against stock AdamW in the same script."""

from __future__ import annotations

from pathlib import Path

import pytest

from sharded.processes import run


@pytest.mark.parametrize("tool", ("accelerate", "trainer", "zero"))
def test_a_tool_trains_as_with_stock(tool: str, tmp_path: Path) -> None:
    for name in ("accelerate", "peft", "transformers"):
        pytest.importorskip(name)
    run("worker_tools", 2, tool, str(tmp_path))


def test_processes_with_clocks_of_their_own_cool_down_together(tmp_path: Path) -> None:
    for name in ("accelerate", "transformers"):
        pytest.importorskip(name)
    run("worker_cooldown", 2, str(tmp_path))
