"""Recordings of tensors that are spread over processes: as on one process, and the same on all of them."""

from __future__ import annotations

import pytest

from sharded.processes import run


@pytest.mark.parametrize("processes", [2, 4])
def test_recordings_count_whole_tensors(processes: int) -> None:
    run("worker_record", processes)
