"""The example of many adapters: each is as alone, the best one is saved and loads, and mistakes are named."""

from __future__ import annotations

import json
from types import ModuleType

import pytest
from kit import ROOT, module_at

_PATH = ROOT / "examples" / "many_adapters.py"
if not _PATH.exists():
    pytest.skip("examples are in the checkout alone", allow_module_level=True)
for package in ("transformers", "peft", "tokenizers", "tqdm"):
    pytest.importorskip(package)

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture
def example(tmp_path, monkeypatch) -> ModuleType:
    monkeypatch.chdir(tmp_path)
    return module_at(_PATH)


def test_adapters_in_one_run_are_as_alone(example, tmp_path, capsys):
    options = ["--quick", "--adapters", "3", "--schedule", "cosine", "linear", "--device", "cpu"]
    report = example.main([*options, "--cache", str(tmp_path / "cache")])
    together, alone, stock = (report[way] for way in (example.TOGETHER, example.ALONE, example.STOCK))
    assert report["same_bits"] == [True] * 3 and together["losses"] == alone["losses"]
    # four updates from the same beginning: nothing has come of the last bits yet
    assert together["losses"] == pytest.approx(stock["losses"], abs=1e-3)
    # the adapters differ by more than they do from stock
    assert len({round(loss, 3) for loss in together["losses"]}) == 3
    assert report["loss_loaded"] == min(together["losses"]) < report["loss_before"]
    for kind in ("adapters", "gradients"):
        assert together["held"][kind] == 3 * alone["held"][kind] > 0
    assert together["held"]["base"] == alone["held"]["base"] == stock["held"]["base"]
    assert 0 < alone["held"]["moments"] < together["held"]["moments"]
    written = tmp_path / "fusedlr-adapters"
    assert json.loads((written / "report.json").read_text())["peaks"] == report["peaks"]
    assert {path.name for path in written.iterdir()} - {"losses.png"} == {"adapter", "base", "report.json"}
    assert (written / "adapter" / "adapter_config.json").exists()
    out = capsys.readouterr().out
    assert out.count("no bit") == 3 and "log10 of the peak rate" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--adapters", "1"], "--adapters"),
        (["--lowest", "1", "--highest", "0.5"], "--lowest: 1 must be below --highest 0.5"),
        (["--schedule", "cosin"], "--schedule"),
    ],
)
def test_bad_arguments_are_named(example, options, message, capsys):
    with pytest.raises(SystemExit):
        example.main(options)
    assert message in capsys.readouterr().err
