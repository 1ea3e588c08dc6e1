"""DeepSpeedCPUAdam in the benchmark: measured where it is installed, else left out with a reason."""

from __future__ import annotations

import importlib.machinery
import json
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fusedlr import cli

# in a checkout that is not installed this also makes `fusedlr.bench` known
cli.bench_package()
from fusedlr.bench import parity, providers, shapes, step  # noqa: E402

CPU = torch.device("cpu")
PROVIDER = providers.PROVIDERS["deepspeed"]


@pytest.fixture(autouse=True)
def fresh_answer() -> Iterator[None]:
    """The provider asks once per process whether it can run; the tests here change the answer."""
    PROVIDER.why_not.cache_clear()
    yield
    PROVIDER.why_not.cache_clear()


def install(monkeypatch: pytest.MonkeyPatch, optimizer: Any) -> None:
    """Put a package with the names of DeepSpeed, and `optimizer` as its class, in place of any real one."""
    for name in ("deepspeed", "deepspeed.ops", "deepspeed.ops.adam"):
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    sys.modules["deepspeed.ops.adam"].DeepSpeedCPUAdam = optimizer


class LikeDeepSpeed(torch.optim.Adam):
    """Torch's step behind DeepSpeed's arguments, with something said on the way."""

    def __init__(self, params: Any, *, adamw_mode: bool, **options: Any) -> None:
        print("Setting accelerator to CPU")
        super().__init__(params, **options, decoupled_weight_decay=adamw_mode)


class Unbuildable:
    def __init__(self, params: Any, **options: Any) -> None:
        raise RuntimeError("the cpu_adam op failed to build/load.\nmore")


def test_without_deepspeed_the_run_goes_on_and_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find_spec = providers.importlib.util.find_spec
    monkeypatch.setattr(
        providers.importlib.util, "find_spec", lambda name: None if name == "deepspeed" else find_spec(name)
    )
    few = ["bench", "--device", "cpu", "tiny", "--rounds", "2", "--providers"]
    assert cli.main([*few, "foreach", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["not here"]["deepspeed"] == "not installed"
    with pytest.raises(SystemExit) as end:
        cli.main([*few, "deepspeed"])
    assert end.value.code == 2
    assert "argument --providers: deepspeed: not installed" in capsys.readouterr().err


def test_it_is_left_out_on_a_gpu_and_where_it_cannot_be_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, Unbuildable)
    assert PROVIDER.why_not(torch.device("cuda")) == "runs on cpu alone"
    assert PROVIDER.why_not(CPU) == "cannot run here: RuntimeError: the cpu_adam op failed to build/load."


def test_what_it_prints_does_not_reach_the_results(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install(monkeypatch, LikeDeepSpeed)
    few = ["tiny", "--rounds", "2", "--providers", "deepspeed", "--json"]
    assert cli.main(["bench", "--device", "cpu", *few]) == 0
    out, err = capsys.readouterr()
    (run,) = json.loads(out)
    assert [row["provider"] for row in run["inventories"][0]["rows"]] == ["fused", "deepspeed"]
    assert "Setting accelerator to CPU" in err


def test_the_gate_rejects_its_other_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    class Coupled(LikeDeepSpeed):
        def __init__(self, params: Any, *, adamw_mode: bool, **options: Any) -> None:
            super().__init__(params, adamw_mode=not adamw_mode, **options)

    install(monkeypatch, Coupled)
    result = step.run(shapes.TINY, [providers.PROVIDERS["fused"], PROVIDER], step.Timing(CPU, rounds=2))
    assert "from the fp64 oracle, where rounding allows" in result.rejected["deepspeed"]


@pytest.mark.slow
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("dtype", list(step.DTYPES))
def test_the_real_one_passes_with_room(dtype: str, clip: bool) -> None:
    # compiled at its first use, which takes two minutes on two busy cores
    pytest.importorskip("deepspeed")
    assert PROVIDER.why_not(CPU) is None
    begin = parity.start(shapes.TINY, step.DTYPES[dtype], CPU)
    expected, bound = parity.oracle(begin, clip), parity.bound(shapes.TINY, step.DTYPES[dtype])
    # measured with 0.19.8 on AVX-512: 0.09 to 0.16 of the bound
    assert 0 < parity.gate(PROVIDER.build(begin.parameters(), clip), begin, expected) <= bound / 2
