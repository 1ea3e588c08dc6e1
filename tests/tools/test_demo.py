"""The whole demo as a command: finished, repeated from its cache, and interrupted."""

import json
import os
import select
import signal
import subprocess
import sys
import time
from importlib.util import find_spec

import pytest

from fusedlr.demo import main
from fusedlr.recorded import Recording

DEMO = [sys.executable, "-m", "fusedlr", "demo"]
# a busy machine takes several times the 40 s that the quick demo is meant to take
PATIENCE = 600  # seconds

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not all(map(find_spec, main.PACKAGES)), reason="needs fusedlr[demo]"),
]


def start(cache, output, *arguments):
    """Start the quick demo with its messages in a pipe."""
    return subprocess.Popen(
        [*DEMO, "--quick", "--device", "cpu", "--cache", str(cache), "--output", str(output), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=output.parent,
        # threads that spin while they wait starve each other on a busy machine
        env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"},
        # a test run in the background inherits an ignored SIGINT
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def finish(process):
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err.decode()[-3000:]
    return out.decode()


def interrupt_at(process, message):
    """Send SIGINT once `message` appears on stderr; returns exit code and stderr."""
    seen = b""
    limit = time.monotonic() + PATIENCE
    while message not in seen:
        assert time.monotonic() < limit and process.poll() is None, seen.decode()[-3000:]
        if select.select([process.stderr], [], [], 1.0)[0]:
            seen += os.read(process.stderr.fileno(), 65536)
    # past the first step, so that threads and buffers exist
    time.sleep(1.0)
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=PATIENCE)
    return process.returncode, (seen + rest).decode()


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    return folder / "cache", folder / "report"


@pytest.fixture(scope="module")
def finished(places):
    """Output, report and picture of one quick demo, and the cache it leaves for the tests below."""
    cache, output = places
    text = finish(start(cache, output, "--teeth"))
    return text, json.loads((output / "report.json").read_text()), output


def test_demo_learns_and_agrees_with_stock(finished):
    text, values, output = finished
    base, runs = values["base"], values["runs"]
    assert base["prose_untrained"] - base["prose"] >= 1.2
    for run in runs.values():
        assert base["code"] - run["code"] >= 0.15
    # each run used the optimizer that it is named after
    backends = [run["backend"] for run in runs.values()]
    assert backends[1:] == ["torch fused", "torch foreach", "torch fused"] and "torch" not in backends[0]
    # the same data in the same order with the same dropout, and no update before the first loss
    assert len({run["losses"][0] for run in runs.values()}) == 1
    assert runs["fusedlr"]["lrs"] == pytest.approx(runs["stock"]["lrs"], rel=1e-12, abs=1e-15)
    # the Trainer logs fusedlr's own gradient norm, of the same update as stock's
    assert runs["fusedlr"]["grad_norms"] == pytest.approx(runs["stock"]["grad_norms"], rel=1e-3)
    assert values["ratio"] <= values["ratio_limit"] == 4.0
    # a schedule that is off by one update is no rounding
    gaps = values["distance_from_stock"]
    assert gaps["stock, warm-up + 1"]["weights"] > 1000 * gaps["fusedlr"]["weights"]
    made = {path.name for path in output.iterdir()}
    assert made == {
        *("checkpoints", "curves.png", "report.json", "skip.png"),
        *("record.npz", "recording.png"),
    }
    assert "unusual in fusedlr's run, by its recording" in text
    recording = Recording.load(output / "record.npz")
    assert len(recording["step"]) == 25 and len(recording["names"]) == 28
    # two ways to the same numbers
    assert recording["lr"][:, 0].tolist() == pytest.approx(runs["fusedlr"]["lrs"], rel=1e-6)
    assert values["schedules"] == {} and "schedules at a high rate: left out" in text
    assert values["skip"]["fusedlr"]["schedule"] == values["skip"]["fusedlr"]["updates"]
    for name in ("fusedlr", "stock"):
        assert (output / "checkpoints" / name / "checkpoint-25" / "adapter_model.safetensors").is_file()
    assert "held-out loss on code, after" in text


def test_demo_repeats_itself_from_the_cache(finished, places):
    _, first, output = finished
    cache, _ = places
    again_output = output.parent / "again"
    finish(start(cache, again_output, "--no-teeth"))
    again = json.loads((again_output / "report.json").read_text())
    assert again["base"]["cached"]
    for name, run in again["runs"].items():
        assert run["losses"] == first["runs"][name]["losses"]


def test_interrupted_base_training_leaves_no_trace(tmp_path):
    cache, output = tmp_path / "cache", tmp_path / "report"
    code, err = interrupt_at(start(cache, output), b"training the base")
    assert code == 130, err[-3000:]
    assert "interrupted" in err and "Traceback" not in err
    # the tokens were complete and stay, the base model was not
    assert [path.name.split("-")[0] for path in (cache / "demo").iterdir()] == ["data"]
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_interrupted_fine_tuning_leaves_the_old_report(finished, places, tmp_path):
    cache, _ = places
    output = tmp_path / "report"
    output.mkdir()
    (output / "report.json").write_text("old")
    code, err = interrupt_at(start(cache, output), b"LoRA, stock")
    assert code == 130, err[-3000:]
    assert "Traceback" not in err
    assert [path.name for path in output.iterdir()] == ["report.json"]
    assert (output / "report.json").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["report"]
