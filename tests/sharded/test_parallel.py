"""Steps on what torch's plans of tensor parallel make, and on pipeline stages, are those of one process."""

from __future__ import annotations

import pytest

from sharded.processes import run


@pytest.mark.parametrize("processes", (2, 4))
def test_models_in_parallel_equal_one_process(processes: int) -> None:
    run("worker_parallel", processes)
