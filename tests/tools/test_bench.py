"""The benchmark: what it updates, that its gate can tell, and the command from options to report."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys

import pytest
import torch

from fusedlr import cli
from fusedlr.backends.gpu import triton

# in a checkout that is not installed this also makes `fusedlr.bench` known
bench = cli.bench_package()
from fusedlr.bench import measure, parity, providers, report, results, shapes, step  # noqa: E402
from fusedlr.bench.providers import Provider, Stepper  # noqa: E402

CPU = torch.device("cpu")
TIMING = step.Timing(CPU, rounds=2)
FEW = ["tiny", "--rounds", "2", "--providers", "foreach,fusedlr-reference"]


# inventories

# tensors, parameters at r = 8, smallest and largest tensor at r = 8, as PEFT makes them; linear in r
COUNTS = {
    "llama-2-7b-qv": (128, 4_194_304, 32_768, 32_768),
    "llama-2-7b-all": (448, 19_988_480, 32_768, 88_064),
    "llama-3-8b-qv": (128, 3_407_872, 8_192, 32_768),
    "llama-3-8b-all": (448, 20_971_520, 8_192, 114_688),
    "qwen2.5-7b-qv": (112, 2_523_136, 4_096, 28_672),
    "qwen2.5-7b-all": (392, 20_185_088, 4_096, 151_552),
    "llama-3-70b-qv": (320, 16_384_000, 8_192, 65_536),
    "llama-3-70b-all": (1120, 103_546_880, 8_192, 229_376),
}


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("r", [8, 16, 64])
def test_inventories_are_those_of_the_models(name, r):
    inventory = shapes.INVENTORIES[f"{name}-r{r}"]
    tensors, *sizes = COUNTS[name]
    found = [inventory.parameters, min(inventory.sizes), max(inventory.sizes)]
    assert (inventory.tensors, found) == (tensors, [size * r // 8 for size in sizes])
    # A is (r, in) and B is (out, r), in turns
    assert all(
        a[0] == r and b[1] == r for a, b in zip(inventory.shapes[::2], inventory.shapes[1::2], strict=True)
    )


def test_no_inventory_is_unchecked():
    assert len(shapes.INVENTORIES) == 1 + 3 * len(COUNTS)
    assert (shapes.TINY.tensors, shapes.TINY.parameters) == (16, 32_768)


def test_sweeps_change_one_thing():
    swept = shapes.sweeps()
    assert {point.parameters for point in swept["tensors"]} == {2**22}
    assert [point.tensors for point in swept["tensors"]] == list(shapes.SWEEP_TENSORS)
    assert {point.tensors for point in swept["size"]} == {128}
    assert all(max(point.sizes) - min(point.sizes) <= 1 for points in swept.values() for point in points)


# the gate


def one_step_ahead(params, clip):
    optimizer = torch.optim.AdamW(params, **providers.OPTIONS)
    scheduler = providers.schedule_of(optimizer)

    def step():
        if clip:
            torch.nn.utils.clip_grad_norm_(params, providers.MAX_NORM)
        scheduler.step()
        optimizer.step()

    return Stepper(params, optimizer, step)


def with_options(**options):
    def build(params, clip):
        return providers.with_scheduler(
            params, torch.optim.AdamW(params, **providers.OPTIONS | options), clip
        )

    return build


def without_clipping(params, clip):
    return providers.with_scheduler(params, torch.optim.AdamW(params, **providers.OPTIONS), clip=False)


def constant_rate(params, clip):
    optimizer = torch.optim.AdamW(params, **providers.OPTIONS)
    return Stepper(params, optimizer, optimizer.step)


def coupled_decay(params, clip):
    return providers.with_scheduler(params, torch.optim.Adam(params, **providers.OPTIONS), clip)


def last_tensor_forgotten(params, clip):
    stepper = providers.PROVIDERS["fused"].build(params[:-1], clip)
    stepper.params = params
    return stepper


def not_a_number(params, clip):
    stepper = providers.PROVIDERS["fused"].build(params, clip)
    usual = stepper.step

    def spoilt():
        usual()
        with torch.no_grad():
            params[3][0, 0] = torch.nan

    stepper.step = spoilt
    return stepper


def breaks(params, clip):
    raise RuntimeError("no such kernel")


WRONG = {
    "a schedule one step ahead": one_step_ahead,
    "eps": with_options(eps=1e-4),
    "beta1": with_options(betas=(0.9001, 0.95)),
    "beta2": with_options(betas=(0.9, 0.951)),
    "weight decay": with_options(weight_decay=0.501),
    "lr": with_options(lr=0.1001),
    "no clipping": without_clipping,
    "no schedule": constant_rate,
    "coupled decay": coupled_decay,
    "a tensor left out": last_tensor_forgotten,
    "not a number": not_a_number,
    "an exception": breaks,
}


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize("mistake", WRONG)
def test_gate_rejects(mistake):
    wrong = Provider("wrong", WRONG[mistake])
    result = step.run(shapes.TINY, [providers.PROVIDERS["fused"], wrong], TIMING)
    assert list(result.rejected) == ["wrong"]
    assert [row.provider for row in result.rows] == ["fused"]


def test_nothing_is_timed_without_the_baseline():
    result = step.run(shapes.TINY, [Provider("fused", without_clipping)], TIMING)
    assert result.rejected and not result.rows
    assert "NOT TIMED, fused: " in "\n".join(report._inventory(vars(result)))


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("dtype", list(step.DTYPES))
def test_everybody_here_passes_with_room(dtype, clip):
    # the bound counts roundings as if all went one way; measured: 0.09 to 0.23 of it
    begin = parity.start(shapes.TINY, step.DTYPES[dtype], CPU)
    expected, bound = parity.oracle(begin, clip), parity.bound(shapes.TINY, step.DTYPES[dtype])
    names = [
        n for n, why in providers.available(CPU).items() if why is None and not providers.PROVIDERS[n].slow
    ]
    assert {"fused", "foreach", "forloop", "fusedlr-reference"} <= set(names)
    for name in names:
        stepper = providers.PROVIDERS[name].build(begin.parameters(), clip)
        assert 0 < parity.gate(stepper, begin, expected) <= bound / 2


# what is counted and timed


@pytest.mark.parametrize(
    ("dtype", "name", "moved"),
    [
        ("float32", "fused", 28),
        ("float32", "fusedlr-reference", 28),
        ("bfloat16", "fused", 14),
        # its moments of 16-bit parameters are fp32
        ("bfloat16", "fusedlr-reference", 22),
    ],
)
def test_bytes_per_parameter(dtype, name, moved):
    begin = parity.start(shapes.TINY, step.DTYPES[dtype], CPU)
    for clip in (False, True):
        stepper = providers.PROVIDERS[name].build(begin.parameters(), clip)
        parity.advance(stepper, begin)
        width = step.DTYPES[dtype].itemsize
        assert stepper.bytes_per_step(clip) == shapes.TINY.parameters * (moved + clip * width)
    moments = 2 * shapes.TINY.parameters * (moved - 3 * width) // 4
    # and the counters, fp32, of 16 tensors
    assert stepper.state_bytes() == moments + 4 * 16


def test_stock_schedule_is_transformers():
    schedule = pytest.importorskip("transformers").get_cosine_with_min_lr_schedule_with_warmup
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    theirs = schedule(optimizer, 2, 6, min_lr_rate=0.1).lr_lambdas[0]
    assert [providers.warmup_cosine(k, 2, 6, 0.1) for k in range(9)] == [theirs(k) for k in range(9)]


def test_rounds_rotate_and_leave_one_step_out():
    calls: list[str] = []
    steps = {name: lambda name=name: calls.append(name) for name in "abc"}
    samples = measure.interleave(steps, CPU, rounds=3, seconds=0)
    assert {name: len(found) for name, found in samples.items()} == dict.fromkeys("abc", 3)
    order = "".join(name for name, before in zip(calls, [None, *calls], strict=False) if name != before)
    # first the estimates
    assert order == "abc" + "abc" + "bca" + "cab"
    # of a round each has one step that is not counted, and as many as its sample needs
    assert {calls.count(name) > 3 * (1 + 1) for name in "abc"} == {True}
    assert all(sample.ms == sample.host_ms > 0 for sample in samples["a"])


def test_spread():
    assert measure.Spread.of([1, 2, 3, 4, 5]) == measure.Spread(3, 2, 4)
    assert measure.Spread.of([7.0]) == measure.Spread(7.0, 7.0, 7.0)


def test_bandwidth_pass_moves_what_it_says():
    operation = measure.in_place_pass(32 * 1000, CPU)
    before = operation.__self__.data_ptr()
    x = operation()
    assert x.data_ptr() == before and 2 * x.nbytes == 32 * 1000 and x.unique().tolist() == [-1.0]


# the command


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = cli.main(["bench", "--device", "cpu", *arguments])
    out, err = capsys.readouterr()
    return code, out, err


def test_tiny_end_to_end(capsys, tmp_path):
    code, out, _ = run(capsys, *FEW, "--out", str(tmp_path))
    assert code == 0
    lines = out.splitlines()
    assert "tiny q,v r=8: 16 tensors, 32,768 parameters, float32, with clipping, 2 rounds" in lines
    heads = [line.split()[0] for line in lines if line.startswith(("f", "c"))]
    assert heads[:3] == ["fused", "foreach", "fusedlr-reference"]
    assert max(map(len, lines[1:])) <= report.WIDTH
    run(capsys, *FEW, "--no-clip", "--out", str(tmp_path))
    assert [kept["inventories"][0]["clip"] for kept in results.read(tmp_path)] == [True, False]
    pytest.importorskip("matplotlib")
    assert (tmp_path / "step.png").stat().st_size > 5000


def test_json_has_all_that_was_measured(capsys):
    code, out, _ = run(capsys, *FEW, "--json")
    (found,) = json.loads(out)
    assert code == 0 and found["schema"] == results.SCHEMA
    assert {"date", "commit", "processor", "threads", "omp_wait_policy", "packages"} <= set(
        found["environment"]
    )
    (result,) = found["inventories"]
    assert (result["inventory"], result["tensors"], result["parameters"]) == ("tiny", 16, 32_768)
    for row in result["rows"]:
        for key in ("ms", "host_ms", "ratio"):
            assert 0 < row[key]["low"] <= row[key]["median"] <= row[key]["high"]
        assert 0 < row["distance"] <= result["bound"]
        assert row["gb_per_s"] == pytest.approx(32 * 32_768 / row["ms"]["median"] / 1e6)
    assert result["rows"][0]["provider"] == "fused" and result["rows"][0]["ratio"]["median"] == 1


def test_a_rejected_provider_ends_in_code_1(capsys, monkeypatch):
    monkeypatch.setitem(providers.PROVIDERS, "foreach", Provider("foreach", without_clipping))
    code, out, _ = run(capsys, *FEW)
    assert code == 1
    assert "NOT TIMED, foreach: " in out and "from the fp64 oracle, where rounding allows" in out


def test_a_run_in_another_wait_policy(capsys):
    code, out, _ = run(capsys, *FEW, "--wait-policy", "active", "--json")
    (found,) = json.loads(out)
    assert code == 0 and found["environment"]["omp_wait_policy"] == "ACTIVE"
    assert [row["provider"] for row in found["inventories"][0]["rows"]] == [
        "fused",
        "foreach",
        "fusedlr-reference",
    ]


def test_a_measuring_process_that_dies_is_reported(capsys, monkeypatch):
    monkeypatch.setattr(bench.main.sys, "executable", "false")
    code, out, err = run(capsys, *FEW, "--wait-policy", "active")
    # false, for whatever it is asked, ends in code 1 and says nothing
    assert code == 1 and not out
    assert "error: the run with OMP_WAIT_POLICY=ACTIVE ended with exit code 1" in err.splitlines()[-1]


BAD = {
    "unknown inventory": (["llama"], "argument INVENTORY: llama matches none of tiny, or MODEL-TARGETS"),
    "all and one": (["tiny", "--all"], "argument --all: names all inventories already"),
    "unknown provider": (["--providers", "lion"], "argument --providers: 'lion' is none of fused, "),
    "provider that cannot": (["--providers", "fusedlr-triton"], "argument --providers: fusedlr-triton: "),
    "threads": (["--threads", "0"], "argument --threads: 0 is out of range"),
    "rounds": (["--rounds", "x"], "argument --rounds: 'x' is not a whole number"),
    "seconds": (["--seconds", "0"], "argument --seconds: 0 is out of range: must be above 0"),
    "both": (["--rounds", "3", "--seconds", "3"], "argument --seconds: not allowed with argument --rounds"),
    "policy": (["--wait-policy", "spin"], "argument --wait-policy: invalid choice"),
    "dtype": (["--dtype", "float16"], "argument --dtype: invalid choice"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_arguments_end_in_one_line(what, capsys, monkeypatch):
    # on the machine of ptx/ it could run
    monkeypatch.setattr(triton, "_why_not_on", lambda device: "it is not for this test")
    arguments, message = BAD[what]
    with pytest.raises(SystemExit) as end:
        run(capsys, *arguments)
    assert end.value.code == 2
    out, err = capsys.readouterr()
    assert not out and message in err.splitlines()[-1]
    assert err.splitlines()[-1].startswith("fusedlr bench: error: ")


@pytest.mark.parametrize("content", ["{", '{"a": 1}', "[1]"])
def test_results_of_somebody_else_are_not_touched(content, tmp_path, capsys):
    (tmp_path / "step.json").write_text(content)
    with pytest.raises(SystemExit) as end:
        run(capsys, *FEW, "--out", str(tmp_path))
    assert end.value.code == 2 and "argument --out: " in capsys.readouterr().err
    assert (tmp_path / "step.json").read_text() == content


def test_what_does_not_fit_is_left_out(capsys, monkeypatch):
    monkeypatch.setattr(bench.main, "free_memory", lambda device: 10**6)
    code, out, _ = run(capsys, *FEW)
    assert code == 0 and "left out: tiny needs 0.0 GiB, 0.0 are free" in out


def test_the_options_do_not_load_torch():
    # whose OpenMP runtime reads the wait policy when it is loaded
    code = "import sys; from fusedlr import cli; cli.bench_package(); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=cli.ROOT, timeout=60)


def test_every_option_says_its_default(capsys):
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    for action in parser._actions:
        assert action.help and (action.dest == "help" or "(default: " in action.help), action.dest


# text


def test_sentence():
    row = {
        "provider": "fusedlr-cpu",
        "ms": {"median": 2.345},
        "ratio": {"median": 2.5, "low": 2.4, "high": 2.625},
    }
    result = {"label": "X", "clip": True, "rows": [row]}
    assert report.sentence(result, "fusedlr-cpu") == (
        "X: fusedlr-cpu makes a step in 2.35 ms, 2.50 times as fast as clip_grad_norm_, "
        "AdamW(fused=True) and LambdaLR (quartiles 2.40 to 2.62)."
    )
    row["ratio"]["median"] = 0.5
    assert report.sentence(result, "fusedlr-cpu").endswith("so it is slower here.")
    assert report.sentence(result, "fusedlr-triton") == ""


def test_sweep_in_columns():
    rows = [
        {"provider": name, "ms": {"median": ms}, "ratio": {"median": 0.8 / ms}}
        for name, ms in (("fused", 0.8), ("fusedlr-cpu", 0.0123))
    ]
    lines = report._sweep("size", [{"label": "128 tensors of 64", "rows": rows, "rejected": {}}])
    assert " ".join(lines[0].split()) == "sweep of size, ms per step fused fusedlr-cpu x fused"
    assert " ".join(lines[2].split()) == "128 tensors of 64 0.800 0.0123 65.04"


def test_packages_are_those_of_the_tree():
    tomllib = pytest.importorskip("tomllib")
    if not (cli.ROOT / "pyproject.toml").is_file():
        pytest.skip("not a checkout")
    with open(cli.ROOT / "pyproject.toml", "rb") as file:
        setuptools = tomllib.load(file)["tool"]["setuptools"]
    inside = {
        ".".join(path.parent.relative_to(cli.ROOT).parts) for path in cli.ROOT.glob("fusedlr/**/__init__.py")
    }
    assert set(setuptools["packages"]) == inside | set(setuptools["package-dir"])
