"""A step on tensors that are spread over processes is the step of one process that holds all of them."""

from __future__ import annotations

import pytest

from sharded.processes import run


@pytest.mark.parametrize(("processes", "backend"), ((2, "cpu"), (3, "reference"), (4, "cpu")))
def test_every_mesh_equals_one_process(processes: int, backend: str) -> None:
    run("worker_meshes", processes, backend)
