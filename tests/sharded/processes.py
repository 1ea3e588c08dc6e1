"""Runs a function in several processes that form a group on this machine: for the tests in this folder.

They are forked from one that has imported everything, so that four of them cost little more than one.
"""

from __future__ import annotations

import faulthandler
import os
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

# longer than any of these runs takes on a busy machine with two cores, in seconds
PATIENCE = 240
TESTS = Path(__file__).resolve().parents[1]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run(module: str, processes: int, *arguments: str) -> str:
    """Run the `main` of a module in this folder in so many processes; returns what they printed."""
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("torch was built without gloo")
    paths = filter(None, [os.environ.get("PYTHONPATH")])
    environment = {
        **os.environ,
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent), *paths]),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(
        [sys.executable, "-m", f"sharded.{module}", str(processes), str(free_port()), *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=2 * PATIENCE,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout


def main(work: Callable[[int, int, list[str]], Any]) -> None:
    """Call `work(rank, processes, arguments)` in as many processes as the first argument says.

    The exit status is 0 only if it returned in all of them.
    """
    processes, port, arguments = int(sys.argv[1]), sys.argv[2], sys.argv[3:]
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, WORLD_SIZE=str(processes))
    children = []
    for rank in range(processes):
        child = os.fork()
        if child == 0:
            os._exit(_one(rank, processes, work, arguments))
        children.append(child)
    failed = 0
    for child in children:
        _, status = os.waitpid(child, 0)
        failed += status != 0
    sys.exit(failed)


def _one(rank: int, processes: int, work: Callable[[int, int, list[str]], Any], arguments: list[str]) -> int:
    # one that hangs says where, and ends
    faulthandler.dump_traceback_later(PATIENCE, exit=True)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    try:
        torch.distributed.init_process_group("gloo", rank=rank, world_size=processes)
        work(rank, processes, arguments)
        torch.distributed.barrier()
    except BaseException:
        print(f"process {rank} of {processes}:\n{traceback.format_exc()}", flush=True)
        return 1
    # without a word to threads that may still run
    return 0
