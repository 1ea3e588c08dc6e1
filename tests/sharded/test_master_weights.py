"""16-bit parameters in shards are trained as exactly as in one process, also from a checkpoint of DCP on."""

from __future__ import annotations

from pathlib import Path

import pytest

from sharded.processes import run


@pytest.mark.parametrize(
    ("dtype", "first", "then"),
    (("bfloat16", 2, 2), ("float16", 2, 1), ("bfloat16", 4, 2)),
    ids=("two go on in two", "two go on in one", "two replicas of shards go on in two"),
)
def test_processes_are_one_bit_for_bit(tmp_path: Path, dtype: str, first: int, then: int) -> None:
    run("worker_master_weights", 1, str(tmp_path), dtype)
    for processes, begin, end in ((first, "0", "4"), (then, "4", "8")):
        run("worker_master_weights", processes, str(tmp_path), dtype, begin, end)
