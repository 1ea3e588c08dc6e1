"""Every example runs as a user would run it, and uses the rates it says."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys

import pytest
import torch
from kit import ROOT
from trainer_kit import assert_rates

import fusedlr

EXAMPLES = ROOT / "examples"
if not EXAMPLES.exists():
    pytest.skip("the examples are not beside the tests", allow_module_level=True)
for package in ("transformers", "peft", "accelerate"):
    pytest.importorskip(package)

pytestmark = pytest.mark.usefixtures("quick")

NEEDS = {"sft_trainer": "trl", "lightning_trainer": "lightning"}
UPDATES = {
    "plain_loop": 24,
    "hf_trainer": 24,
    "sft_trainer": 24,
    "lightning_trainer": 24,
    "accelerate_loop": 12,
}


@pytest.fixture
def run(tmp_path, monkeypatch):
    # they write to the current directory, and find each other beside themselves
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield lambda name: runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    sys.modules.pop("tiny", None)


@pytest.mark.parametrize("name", UPDATES)
def test_example(name, run):
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    schedule = fusedlr.cosine(warmup_steps=3, total_steps=UPDATES[name])
    assert_rates(run(name)["rates"], [schedule.lr_at(k, 2e-3) for k in range(UPDATES[name])])


def test_switching_midway(run):
    result = run("switch_midway")
    assert_rates(result["rates"], result["stock_rates"])
    # a rate off by one update is 1e-3 away
    assert 0 < result["difference"] < 1e-7


@pytest.mark.slow
def test_a_sharded_run_goes_on_in_another_number_of_processes(tmp_path):
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("torch was built without gloo")
    alone = {"CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    said = []
    for processes, until in ((2, 12), (1, 24)):
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        script = [str(ROOT / "tests/sharded/run_and_end.py"), str(EXAMPLES / "fsdp2.py")]
        command = [sys.executable, *launcher, *script, "--until", str(until)]
        done = subprocess.run(
            command, cwd=tmp_path, env={**os.environ, **alone}, capture_output=True, text=True, timeout=200
        )
        assert done.returncode == 0, done.stderr[-3000:]
        said += re.findall(r"update (\d+): .* lr ([\d.]+)", done.stdout)
    schedule = fusedlr.cosine(warmup_steps=3, total_steps=24)
    assert [(int(k), float(lr)) for k, lr in said] == [
        (k, pytest.approx(schedule.lr_at(k, 2e-3), abs=1e-6)) for k in range(24)
    ]


def test_every_example_is_tested_and_shows_the_stock_lines():
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    # the last two have a file of tests each
    assert names == {*UPDATES, "switch_midway", "tiny", "fsdp2", "graph_training", "many_adapters"}
    for name in UPDATES:
        assert "# stock" in (EXAMPLES / f"{name}.py").read_text()
