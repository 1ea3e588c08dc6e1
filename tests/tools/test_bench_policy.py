"""Under which OpenMP wait policy the benchmark measures, and who sets one."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest

from fusedlr import cli

# in a checkout that is not installed this also makes `fusedlr.bench` known
cli.bench_package()
from fusedlr.bench import options  # noqa: E402


def test_policies_are_measured_with_the_default_first() -> None:
    assert options.WAIT_POLICIES["both"] == (None, "PASSIVE")


def test_the_default_policy_is_measured_with_the_variable_unset(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    few = ["tiny", "--rounds", "1", "--providers", "foreach", "--wait-policy", "both", "--json"]
    assert cli.main(["bench", "--device", "cpu", *few]) == 0
    policies = [run["environment"]["omp_wait_policy"] for run in json.loads(capsys.readouterr().out)]
    assert policies == ["unset", "PASSIVE"]


@pytest.mark.parametrize(("command", "policy"), [("demo", "PASSIVE"), ("bench", None)])
def test_the_demo_alone_sets_a_policy(
    command: str, policy: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    # a copy, so that what the command sets is gone afterwards
    monkeypatch.setattr(cli.os, "environ", {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"})
    monkeypatch.delitem(sys.modules, "torch")
    package = cli.demo if command == "demo" else cli.bench_package()
    monkeypatch.setattr(
        package, "run", lambda *args: found.append(cli.os.environ.get("OMP_WAIT_POLICY")) or 0
    )
    assert cli.main([command]) == 0 and found == [policy]


def test_make_sets_a_policy_for_tests_alone() -> None:
    makefile = cli.ROOT / "Makefile"
    if not makefile.exists():
        pytest.skip("not a checkout")
    variables = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}

    def policy(target: str) -> str:
        # a second makefile, whose target of that name shows what the first one exports to it
        shown = f"{target}:\n\t@echo policy=$$OMP_WAIT_POLICY\n"
        command = ["make", "-s", "-f", str(makefile), "-f", "-", target, "-o", "env-dev", "-o", "env-demo"]
        done = subprocess.run(command, input=shown, env=variables, capture_output=True, text=True, timeout=60)
        return re.findall("policy=(.*)", done.stdout)[-1]

    assert {target: policy(target) for target in ("test", "bench", "demo")} == {
        "test": "PASSIVE",
        "bench": "",
        "demo": "",
    }
