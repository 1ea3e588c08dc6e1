"""A step on tensors that are spread over processes is the step of one process that holds all of them."""

from __future__ import annotations

import pytest
from ptx import driver

from sharded.processes import run


@pytest.mark.parametrize(("processes", "backend"), ((2, "auto"), (3, "reference"), (4, "auto")))
def test_every_mesh_equals_one_process(processes: int, backend: str) -> None:
    run("worker_meshes", processes, backend)


@pytest.mark.parametrize("backend", driver.BACKENDS)
def test_the_kernels_of_a_gpu_do_too(backend: str) -> None:
    missing = driver.why_not()
    if missing[backend] is not None:
        pytest.skip(str(missing[backend]))
    # built once, before two processes would
    driver.compile_all(tuple(name for name, why in missing.items() if why is None))
    run("worker_meshes", 2, backend)
