"""The demo's options, and what it says about wrong ones."""

import subprocess
import sys

import pytest
import torch

from fusedlr import demo
from fusedlr.console import Parser
from fusedlr.demo import main, options


@pytest.fixture
def parser():
    parser = Parser(prog="fusedlr demo")
    demo.add_arguments(parser)
    return parser


def test_defaults(resolve):
    settings = resolve()
    assert (settings.size_name, settings.steps, settings.warmup, settings.teeth) == ("small", 40, 4, True)
    assert (resolve("--quick").size_name, resolve("--quick").teeth) == ("quick", False)
    assert resolve("--steps", "7").warmup == 1
    assert resolve("--schedule", "constant").warmup == 0


@pytest.mark.parametrize("name", options.SCHEDULES)
def test_every_schedule_is_defined_without_more_options(resolve, name):
    schedule = resolve("--schedule", name).own_schedule()
    assert max(schedule.lr_at(k) for k in range(50)) == pytest.approx(1.0)


BAD = {
    "--steps 0": "at least 1",
    "--steps many": "'many' is not a whole number",
    "--base-steps -3": "at least 1",
    "--lr nan": "out of range",
    "--lr inf": "out of range",
    "--lr 0": "above 0",
    "--lr fast": "'fast' is not a number",
    "--warmup -1": "at least 0",
    "--warmup 41": "41 updates of warm-up do not fit in 40",
    "--warmup 3 --schedule constant": "constant_with_warmup",
    "--accumulation 0": "at least 1",
    "--seed 4294967296": "at most 4.29497e+09",
    "--schedule sawtooth": "invalid choice",
    "--size huge": "invalid choice",
    "--device tpu": "invalid choice",
    "--quick --size large": "contradicts --size large",
}


@pytest.mark.parametrize("arguments", BAD)
def test_bad_values_are_one_line_and_exit_code_2(resolve, capsys, arguments):
    with pytest.raises(SystemExit) as exit:
        resolve(*arguments.split())
    assert exit.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert BAD[arguments] in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_is_refused(resolve, capsys):
    with pytest.raises(SystemExit):
        resolve("--device", "cuda")
    assert "torch sees no GPU" in capsys.readouterr().err


def test_output_among_other_files_is_refused(resolve, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    for output, message in ((tmp_path, "holds other files"), (tmp_path / "notes.txt", "is not a folder")):
        with pytest.raises(SystemExit) as exit:
            resolve("--output", str(output))
        assert exit.value.code == 2
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        resolve("--cache", str(tmp_path / "notes.txt" / "cache"))
    assert "--cache" in capsys.readouterr().err


def test_output_that_cannot_be_written_is_refused_at_once(resolve, tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.mkdtemp", full)
    with pytest.raises(SystemExit) as exit:
        resolve()
    assert exit.value.code == 2
    assert "argument --output: cannot write" in capsys.readouterr().err


def test_missing_packages_name_the_extra(parser, monkeypatch, capsys):
    monkeypatch.setattr(main, "PACKAGES", ("torch", "no_such_package"))
    with pytest.raises(SystemExit) as exit:
        demo.run(parser.parse_args([]), parser)
    assert exit.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "no_such_package" in last and "pip install 'fusedlr[demo]'" in last


def test_importing_the_demo_imports_no_optional_package():
    code = f"import sys, fusedlr.demo; print([name for name in {main.PACKAGES!r} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
