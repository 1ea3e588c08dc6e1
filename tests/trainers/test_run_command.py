"""`fusedlr run`: somebody's script as it is, with transformers patched, in every worker of a launcher."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from sharded.processes import free_port

import fusedlr
from fusedlr import cli

transformers = pytest.importorskip("transformers")
hf = pytest.importorskip("fusedlr.hf")

ROOT = Path(fusedlr.__file__).resolve().parent.parent
# the script knows nothing of fusedlr; its epsilon keeps the last bits of small gradients from deciding
SCRIPT = """
import faulthandler, json, os, sys, time
from pathlib import Path

# a process that hangs says where it does, and ends
faulthandler.dump_traceback_later(120, exit=True)

import torch
import beside
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

set_seed(0)
config = LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                     vocab_size=32, max_position_embeddings=8, use_cache=False)
rows = [{"input_ids": [i % 32] * 8, "labels": [i % 32] * 8} for i in range(32)]
args = TrainingArguments(sys.argv[1], max_steps=4, per_device_train_batch_size=2, learning_rate=1e-2,
                         adam_epsilon=1e-3,
                         use_cpu=True, report_to="none", disable_tqdm=True, logging_steps=1,
                         save_strategy="no", dataloader_pin_memory=False)
trainer = Trainer(LlamaForCausalLM(config), args, train_dataset=rows)
trainer.train()
logs = [entry for entry in trainer.state.log_history if "loss" in entry]
result = {
    "kinds": [type(trainer.optimizer.optimizer).__name__, type(trainer.lr_scheduler).__name__],
    "world": args.world_size,
    "argv": sys.argv,
    "name": __name__,
    "rates": [entry["learning_rate"] for entry in logs],
    "norms": [entry["grad_norm"] for entry in logs],
    "weights": [p.double().sum().item() for p in trainer.model.parameters()],
}
Path(sys.argv[1], f"rank{os.environ.get('RANK', 0)}.json").write_text(json.dumps(result))
# threads of the process group that still run when Python is gone may end the process by an abort, so each
# process waits until all have written their results and ends at once
while len(list(Path(sys.argv[1]).glob("rank*.json"))) < int(os.environ.get("WORLD_SIZE", 1)):
    time.sleep(0.01)
os._exit(0)
"""


@pytest.fixture
def script(tmp_path):
    (tmp_path / "beside.py").write_text("")
    (tmp_path / "train.py").write_text(SCRIPT)
    return tmp_path / "train.py"


def start(*command: str, folder: Path) -> list[dict[str, Any]]:
    """What every process of the command has written into the folder."""
    folder.mkdir()
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "CUDA_VISIBLE_DEVICES": "",
        # the processes find each other without asking for the machine's name
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
    }
    with subprocess.Popen(
        [sys.executable, "-m", *command, str(folder)],
        env=environment,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as launched:
        try:
            output, _ = launched.communicate(timeout=240)
        except subprocess.TimeoutExpired:
            # the launcher's processes too, and what they have said
            os.killpg(launched.pid, signal.SIGKILL)
            output, _ = launched.communicate()
            pytest.fail(f"{command} did not end in 240 s: {output[-3000:]}")
    assert launched.returncode == 0, output[-3000:]
    return [json.loads(path.read_text()) for path in sorted(folder.glob("rank*.json"))]


def launcher(name: str) -> list[str]:
    """The command that starts two processes on the CPU, up to what they run."""
    if name == "torchrun":
        return ["torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    pytest.importorskip("accelerate")
    # accelerate starts several processes on a CPU through MPI alone, unless it takes them for GPUs
    machine = ["--num_processes", "2", "--num_machines", "1", "--multi_gpu", "--mixed_precision", "no"]
    port = ["--dynamo_backend", "no", "--main_process_port", str(free_port())]
    return ["accelerate.commands.launch", *machine, *port]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["torchrun", "accelerate"])
def test_every_worker_of_a_launcher_trains_with_it_and_as_stock(script, tmp_path, name):
    if not torch.distributed.is_gloo_available():
        pytest.skip("torch was built without gloo")
    ours = start(*launcher(name), "-m", "fusedlr", "run", str(script), folder=tmp_path / "ours")
    stock = start(*launcher(name), str(script), folder=tmp_path / "stock")
    assert len(ours) == len(stock) == 2
    for mine, theirs in zip(ours, stock, strict=True):
        assert mine["kinds"] == ["FusedAdamW", "ScheduleView"]
        assert theirs["kinds"] == ["AdamW", "LambdaLR"]
        assert mine["world"] == 2
        assert mine["argv"] == [str(script), str(tmp_path / "ours")]
        assert mine["name"] == "__main__"
        assert mine["rates"] == pytest.approx(theirs["rates"], abs=1e-15)
        assert mine["norms"] == pytest.approx(theirs["norms"], rel=1e-5)
        assert mine["weights"] == pytest.approx(theirs["weights"], rel=1e-5, abs=1e-5)
    assert ours[0]["weights"] == ours[1]["weights"]


@pytest.mark.parametrize("module", [False, True])
def test_a_script_sees_what_python_would_show_it(tmp_path, monkeypatch, module):
    (tmp_path / "mine.py").write_text(
        "import beside, sys\nfrom transformers import Trainer\n"
        "assert __name__ == '__main__'\n"
        "beside.seen = sys.argv[1:], Trainer.create_scheduler.__code__.co_filename, sys.path[0]\n"
    )
    (tmp_path / "beside.py").write_text("")
    before = list(sys.argv), list(sys.path), dict(vars(transformers.Trainer))
    monkeypatch.chdir(tmp_path)
    asked = ["-m", "mine"] if module else ["mine.py"]
    try:
        assert cli.main(["run", *asked, "--lr", "1", "-m", "x", "--help"]) == 0
        arguments, patched, folder = sys.modules["beside"].seen  # type: ignore[attr-defined]
    finally:
        sys.modules.pop("beside", None)
    assert arguments == ["--lr", "1", "-m", "x", "--help"]
    assert patched == hf.__file__
    assert Path(folder) == tmp_path
    assert (sys.argv, sys.path, dict(vars(transformers.Trainer))) == before


@pytest.mark.parametrize("asks", [True, False])
def test_where_no_trainer_asked_for_adamw_one_line_says_so(tmp_path, capsys, asks):
    (tmp_path / "a.py").write_text(
        "import tempfile\nfrom transformers import Trainer, TrainingArguments\n"
        f"args = TrainingArguments(tempfile.gettempdir(), optim={'adamw_torch' if asks else 'sgd'!r})\n"
        "print(Trainer.get_optimizer_cls_and_kwargs(args)[0].__name__)\n"
    )
    assert cli.main(["run", str(tmp_path / "a.py")]) == 0
    said = capsys.readouterr()
    assert said.out.splitlines()[-1] == ("FusedAdamW" if asks else "SGD")
    line = "fusedlr run: no Trainer asked for torch's AdamW: fusedlr had nothing to do"
    assert (line in said.err.splitlines()) == (not asks)


def test_its_exit_code_is_the_scripts_own(tmp_path):
    path = tmp_path / "ends.py"
    path.write_text("raise SystemExit(7)\n")
    with pytest.raises(SystemExit) as stopped:
        cli.main(["run", str(path)])
    assert stopped.value.code == 7
    path.write_text("raise KeyError('mine')\n")
    with pytest.raises(KeyError, match="mine"):
        cli.main(["run", str(path)])


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_a_script_that_is_not_there_is_named(capsys):
    line = error_of(capsys, "run", "nowhere.py", "--lr", "1")
    assert line.startswith("fusedlr run: error: argument SCRIPT: there is no file nowhere.py")


def test_without_transformers_it_says_what_to_install(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "fusedlr.hf", None)
    (tmp_path / "a.py").write_text("")
    line = error_of(capsys, "run", str(tmp_path / "a.py"))
    assert "transformers cannot be imported" in line and "pip install 'fusedlr[hf]'" in line


def test_it_leaves_the_threads_policy_alone(tmp_path):
    path = tmp_path / "look.py"
    path.write_text("import os\nassert 'OMP_WAIT_POLICY' not in os.environ\n")
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, "-m", "fusedlr", "run", str(path)], env=environment, timeout=120)
    assert done.returncode == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ("plot", "cosine", "--warmup", "200", "--total-steps", "4000"),
        ("plot", "cosine", "--total-steps", "4000", "--pe", "1e-5"),
        ("demo", "--dev", "cpu"),
        ("--vers",),
    ],
    ids=" ".join,
)
def test_an_option_is_written_out(capsys, arguments):
    short = next(a for a in arguments if a in ("--warmup", "--pe", "--dev", "--vers"))
    line = error_of(capsys, *arguments)
    assert "error: " in line and (short in line or "required" in line)
