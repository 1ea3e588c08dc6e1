"""A step on tensors that are spread over processes is the step of one process that holds all of them."""

from __future__ import annotations

import pytest
from ptx import driver

from sharded.processes import run


@pytest.mark.parametrize(("processes", "backend"), ((2, "cpu"), (3, "reference"), (4, "cpu")))
def test_every_mesh_equals_one_process(processes: int, backend: str) -> None:
    run("worker_meshes", processes, backend)


@pytest.mark.parametrize("backend", driver.BACKENDS)
def test_the_kernels_of_a_gpu_do_too(backend: str) -> None:
    why = driver.why_not()[backend]
    if why is not None:
        pytest.skip(why)
    # built once, before two processes would
    driver.compile_all()
    run("worker_meshes", 2, backend)
