"""Checkpoints of torch.distributed: saved by four processes, continued in two and in one."""

from __future__ import annotations

from pathlib import Path

from sharded.processes import run


def test_a_run_goes_on_in_fewer_processes(tmp_path: Path) -> None:
    # the run in one go, then every form of torch's state dicts
    run("worker_checkpoints", 2, str(tmp_path))
    for processes, first, last in ((4, 0, 3), (2, 3, 6), (1, 6, 9)):
        run("worker_checkpoints", processes, str(tmp_path), str(first), str(last))
