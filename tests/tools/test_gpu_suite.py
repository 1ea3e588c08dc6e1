"""The GPU suite in its reduced form: that it runs, keeps what it has, and can tell."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from kit import ROOT

# bench is run from the checkout; where only the tests are, there is no bench to test
sys.path.append(str(ROOT))
gpu_suite = pytest.importorskip("bench.gpu_suite")
from bench import gpu_report, gpu_sections, graphs, sanitized, variants  # noqa: E402
from bench.shapes import even  # noqa: E402

# the sections that run tests or scripts take longest, and have tests of their own below
QUICK = "environment,syncs,launches,benchmark,compiled"


@pytest.fixture
def settings(tmp_path: Path) -> gpu_sections.Settings:
    return gpu_sections.Settings("cpu", tmp_path, steps=2)


def test_suite_runs_in_reduced_form(tmp_path, capfd):
    arguments = ["--device", "cpu", "--steps", "2", "--sections", QUICK, "--out", str(tmp_path)]
    assert gpu_suite.main(arguments) == 0
    results = json.loads((tmp_path / "gpu_suite.json").read_text())
    assert results["failed"] == []
    assert results["syncs"]["reference"]["passed"]
    (with_clipping, without) = results["benchmark"]["runs"]
    assert with_clipping["clip"] and not without["clip"]
    rows = {row["provider"] for row in with_clipping["rows"]}
    assert {"fused", "fusedlr-reference"} <= rows
    assert with_clipping["replay"]["fusedlr-reference"]["ms"] > 0
    assert results["launches"]["tiny, with clipping"]["fused"]["kernels"] == 0
    out = capfd.readouterr().out
    assert "[1/5] environment" in out and "reduced form" in out
    text = (tmp_path / "gpu_suite.md").read_text()
    for wanted in ("| syncs | passed |", "fusedlr-reference", "with clipping", "no GPU"):
        assert wanted in text


def test_tests_are_run_and_counted(settings):
    found = gpu_sections.run_other_tests(settings)
    assert found["passed"] and found["tests"] > 0 and found["failed tests"] == []
    assert "PASSED" in (settings.out / found["log"]).read_text()


def test_a_failing_test_is_named(settings, tmp_path):
    path = tmp_path / "test_wrong.py"
    path.write_text("def test_wrong():\n    assert False\n")
    found = gpu_sections.run_tests(settings, "wrong", [str(path), "-c", "/dev/null"])
    assert not found["passed"] and found["failures"] == 1
    assert "test_wrong" in found["failed tests"][0]
    assert "test_wrong" in gpu_report.markdown({"tests": {**found, "seconds": 1.0}})


def test_no_test_at_all_is_a_failure(settings, tmp_path):
    path = tmp_path / "test_nothing.py"
    path.write_text("")
    assert not gpu_sections.run_tests(settings, "nothing", [str(path), "-c", "/dev/null"])["passed"]


def test_the_sanitized_script_runs(settings):
    found = gpu_sections.sanitize(settings)
    assert found["passed"] and "8 cases" in found["script"]["says"][0]


def test_the_sanitized_script_sees_a_step_that_did_not_happen(monkeypatch):
    import fusedlr

    monkeypatch.setattr(fusedlr.FusedAdamW, "step", lambda self: None)
    with pytest.raises(SystemExit, match="counters say"):
        sanitized.run("reference", "cpu")


@pytest.mark.slow
def test_end_to_end(settings):
    pytest.importorskip("peft")
    pytest.importorskip("transformers")
    found = gpu_sections.end_to_end(settings)
    assert found["passed"]
    # both trained, from the same weights on the same batches
    assert found["mean loss"]["fusedlr"] == pytest.approx(found["mean loss"]["stock"], rel=1e-4)
    assert set(found["median"]) == {"stock", "fusedlr"}


def test_every_variant_can_be_made(tmp_path):
    assert len({variant.name for variant in variants.VARIANTS}) == len(variants.VARIANTS)
    for i, variant in enumerate(variants.VARIANTS):
        folder = tmp_path / str(i)
        variants.plant(variant, folder)
        for name, old, new in variant.edits:
            text = (folder / name).read_text()
            assert new in text and old not in text
    stale = variants.Variant("stale", "cuda", (("csrc/cuda/step.cu", "no such text", ""),))
    with pytest.raises(ValueError, match=r"stale: csrc/cuda/step\.cu has 'no such text' 0 times"):
        variants.plant(stale, tmp_path / "stale")


@pytest.mark.slow
def test_variants_in_reduced_form(settings):
    pytest.importorskip("triton")
    found = gpu_sections.compare_variants(settings)
    assert found["passed"], found
    cuda, triton = found["rows"]
    assert set(triton) == {"variant", "float32", "bfloat16"}
    assert triton["bfloat16"]["distance"] > triton["float32"]["distance"] > 0
    if "left out" not in cuda["compiled"]:
        assert cuda["compiled"]["step"]["spilled"] == 0
    text = gpu_report.markdown({"variants": {**found, "seconds": 1.0}})
    assert "| triton, tiles of 512 | not timed: " in text


def test_a_table_of_timed_variants():
    timed = variants.timed("fusedlr-reference", even(3, 300), torch.device("cpu"), "float32")
    assert all(value > 0 for value in timed.values())
    timed |= {"step ms": 0.5, "replay ms": 0.25, "share of bandwidth": 0.5}
    rows = [{"variant": "one", "float32": timed}, {"variant": "two", "error": "no luck"}]
    text = gpu_report.markdown({"variants": {"rows": rows, "passed": False, "seconds": 1.0}})
    assert "| one | float32 | 500 | 250.0 | 50% |" in text
    assert "| two | not timed: {'error': 'no luck'} | | | |" in text


def test_a_variant_that_breaks_says_why():
    broken = variants.Variant("broken", "triton", (("fusedlr/columns.py", "CHUNK = 4096", "CHUNK = ?"),))
    assert "SyntaxError" in variants.run(broken, "cpu")["error"]


def test_what_cannot_run_is_left_out(settings, monkeypatch):
    monkeypatch.setattr(gpu_sections.endtoend, "NEEDED", ("no_such_package",))
    found = gpu_sections.end_to_end(settings)
    assert found == {"left out": "no_such_package not installed"}
    monkeypatch.setattr(gpu_sections, "sanitizer", lambda: None)
    found = gpu_sections.sanitize(replace(settings, device="cuda"))
    assert "left out" in found
    assert "left out" in gpu_report.markdown({"sanitizer": {**found, "seconds": 0.0}})


def test_suite_keeps_what_it_has_when_a_section_breaks(tmp_path):
    def broken() -> dict[str, Any]:
        raise RuntimeError("no luck")

    path = tmp_path / "results.json"
    sections = [("first", lambda: {"a": 1}), ("broken", broken), ("last", lambda: {"b": 2})]
    assert gpu_suite.run_sections(sections, "cpu", path) == 1
    text = path.read_text()
    assert '"a": 1' in text and "RuntimeError: no luck" in text and '"b": 2' in text
    assert "| broken | **failed** RuntimeError: no luck |" in path.with_suffix(".md").read_text()


def test_a_section_in_its_own_process(settings):
    found = gpu_suite.run_isolated("environment", settings, end=time.monotonic() + 100)
    assert found["packages"]["torch"] == torch.__version__
    assert list(settings.out.iterdir()) == []


def test_a_section_is_stopped_at_its_limit(settings, monkeypatch):
    monkeypatch.setattr(gpu_suite, "_LEAST_SECONDS", 0.0)
    begin = time.monotonic()
    found = gpu_suite.run_isolated("tests", settings, end=begin + 1000, seconds=0.3)
    assert found == {"passed": False, "error": "stopped after 0 s"}
    assert time.monotonic() - begin < 10
    found = gpu_suite.run_isolated("tests", settings, end=begin)
    assert found == {"passed": False, "error": "no time left for it"}


def test_a_section_that_dies_keeps_what_it_had(settings, monkeypatch):
    class Died:
        pid = 0

        def __init__(self, command: list[str], **options: Any) -> None:
            Path(command[command.index("--result") + 1]).write_text('{"passed": true, "runs": [1]}')

        def wait(self, limit: float | None = None) -> int:
            return -11

        def poll(self) -> int:
            return -11

    monkeypatch.setattr(gpu_suite.subprocess, "Popen", Died)
    found = gpu_suite.run_isolated("benchmark", settings, end=time.monotonic() + 100)
    assert found == {"passed": False, "runs": [1], "error": "ended with code -11"}


def test_what_a_trace_shows():
    host = ["cudaLaunchKernel", "cuLaunchKernelEx", "cudaMemcpyAsync", "Optimizer.step#FusedAdamW.step"]
    device = [
        "norm_kernel",
        "step_kernel",
        "Memcpy HtoD (Pinned -> Device)",
        "Memcpy DtoD (Device -> Device)",
        "Memset (Device)",
        # a range, which the profiler shows on both
        "Optimizer.step#FusedAdamW.step",
    ]
    found = graphs.classify([*((name, False) for name in host), *((name, True) for name in device)])
    assert found == {
        "kernels": 2,
        "launches": 2,
        "copies to the device": 1,
        "copies to the host": 0,
        "copies on the device": 1,
        "fills": 1,
    }


@pytest.mark.parametrize(
    ("count", "passed"),
    (
        ({"kernels": 1, "copies to the device": 0}, {False: True, True: False}),
        ({"kernels": 2, "copies to the device": 0}, {False: False, True: True}),
        ({"kernels": 1, "copies to the device": 1}, {False: False, True: False}),
        ({"error": "no luck"}, {False: False, True: False}),
    ),
)
def test_a_launch_too_many_fails_the_suite(count, passed, settings, monkeypatch):
    ours = gpu_sections.PROVIDERS["fusedlr-triton"]
    monkeypatch.setattr(gpu_sections, "quick", lambda device: [ours])
    for clip in (False, True):

        def counted(provider: Any, inventory: Any, clipping: bool, told: Any, clip: bool = clip) -> Any:
            right = {"kernels": 1 + clipping, "copies to the device": 0}
            return count if clipping == clip else right

        monkeypatch.setattr(gpu_sections, "count_one", counted)
        found = gpu_sections.count_launches(replace(settings, device="cuda"))
        assert found["passed"] == passed[clip]


def test_a_gpu_and_what_it_refused_are_in_the_table():
    spread = {"median": 0.5, "low": 0.4, "high": 0.6}
    row = {"provider": "fused", "host_ms": spread, "ms": spread, "ratio": spread, "bytes_per_parameter": 32.0}
    run = {
        "inventory": "tiny",
        "label": "tiny",
        "tensors": 16,
        "parameters": 10**6,
        "clip": True,
        "rounds": 5,
        "bandwidth_gb_per_s": {"median": 2000.0},
        "rows": [row],
        "rejected": {"apex": "away | from the oracle"},
        "replay": {"fused": {"ms": 0.02}, "capturable": {"error": "refused"}},
    }
    text = gpu_report.markdown(
        {
            "environment": {"gpus": [{"name": "a GPU", "driver": "1.2"}], "packages": {"torch": "2.13.0"}},
            "benchmark": {"passed": True, "runs": [run], "seconds": 3.0},
            "launches": {"tiny, with clipping": {"fused": {"kernels": 9.0, "copies to the device": 0.0}}},
        }
    )
    assert "a GPU (driver 1.2); torch 2.13.0" in text
    # 32 MB in 20 us are 1600 GB/s
    assert "| fused | 500 | 500 | 0.50 | 20.0 | 80% | 9 | 0 |" in text
    assert "| apex | not timed: away / from the oracle |" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    (
        (["--steps", "0"], "--steps 0"),
        (["--device", "tpu"], "tpu"),
        (["--out", "/dev/null/x"], "/dev/null/x"),
        (["--sections", "tests,nonsense"], "'nonsense' is none of"),
        (["--minutes", "-1"], "--minutes -1"),
    ),
)
def test_suite_names_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        gpu_suite.main(arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err
