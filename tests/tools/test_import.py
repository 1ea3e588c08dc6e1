"""What importing fusedlr costs beside torch, each time in a Python of its own."""

from __future__ import annotations

import os
import subprocess
import sys

# on top of `import torch`, which takes 1 to 2 s; 12 ms measured on a Xeon at 2.1 GHz, 2026-11
LIMIT = 50  # ms

TIMED = """
import time, torch
began = time.perf_counter()
import fusedlr
fusedlr.FusedAdamW
print(1e3 * (time.perf_counter() - began))
"""


def test_import_and_the_first_use_of_the_optimizer_take_little(tmp_path):
    # bytecode as an installed package has it; the first Python writes it
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment["PYTHONPYCACHEPREFIX"] = str(tmp_path)

    def once() -> float:
        return float(subprocess.check_output([sys.executable, "-c", TIMED], env=environment, text=True))

    once()
    # the best, as other work on the machine only adds to it
    times: list[float] = []
    while len(times) < 8 and not (times and min(times) < LIMIT):
        times.append(once())
    assert min(times) < LIMIT


def test_schedules_need_no_torch():
    code = "import sys, fusedlr; fusedlr.cosine(1, 9).lr_at(3); print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"
