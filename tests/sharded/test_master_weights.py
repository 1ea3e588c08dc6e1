"""bf16 parameters in shards are trained as exactly as in one process, also from a checkpoint of DCP on."""

from __future__ import annotations

from pathlib import Path

from sharded.processes import run


def test_two_processes_are_one_bit_for_bit(tmp_path: Path) -> None:
    run("worker_master_weights", 1, str(tmp_path))
    for processes, first, last in ((2, 0, 4), (2, 4, 8)):
        run("worker_master_weights", processes, str(tmp_path), str(first), str(last))


def test_a_checkpoint_of_two_goes_on_in_one(tmp_path: Path) -> None:
    run("worker_master_weights", 1, str(tmp_path))
    for processes, first, last in ((2, 0, 4), (1, 4, 8)):
        run("worker_master_weights", processes, str(tmp_path), str(first), str(last))
