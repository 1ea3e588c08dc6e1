"""`fusedlr bench host`: what it times, that its gate can tell, and how it is asked for and shown."""

from __future__ import annotations

import itertools
import json

import pytest
import torch

import fusedlr
from fusedlr import cli

# in a checkout that is not installed this also makes `fusedlr.bench` known
cli.bench_package()
from fusedlr.bench import host, measure, options, parity, report  # noqa: E402
from fusedlr.bench.providers import MAX_NORM, OPTIONS, TOTAL_STEPS  # noqa: E402

CPU = torch.device("cpu")
STOCK = next(iter(host.WAYS))


def build(name: str) -> tuple[host.Driven, parity.Start]:
    begin = parity.start(host.INVENTORY, torch.float32, CPU)
    return host.WAYS[name].build(begin.parameters()), begin


def joint_scopes(params: host.Params) -> host.Driven:
    groups = [{"params": part} for part in parity.parts(params, host.SCOPES)]
    optimizer = fusedlr.FusedAdamW(groups, **OPTIONS, schedule=host._schedule(), max_grad_norm=MAX_NORM)
    return host.Driven(params, optimizer, optimizer.step)


def signals_withheld(params: host.Params) -> host.Driven:
    driven = host.WAYS["GradScaler's signals"].build(params)
    signalled = driven.before

    def before() -> None:
        signalled()
        driven.optimizer.grad_scale = None

    driven.before = before
    return driven


def lr_left_alone(params: host.Params) -> host.Driven:
    driven = host.WAYS["tensor lr"].build(params)
    driven.optimizer.param_groups[0]["lr"].fill_(host.rate(1))
    driven.before = lambda: None
    return driven


WRONG = {
    "groups in one scope": host.Way(joint_scopes, host.SCOPES),
    "gradients never unscaled": host.Way(signals_withheld),
    "a rate nobody rewrites": host.Way(lr_left_alone),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_the_gate_rejects(mistake: str) -> None:
    ways = {name: host.WAYS[name] for name in (STOCK, host.PLAIN)}
    result = host.run(CPU, 1, 0, {**ways, "wrong": WRONG[mistake]})
    assert list(result.rejected) == ["wrong"]
    assert "from the fp64 oracle, where rounding allows" in result.rejected["wrong"]
    assert [row.way for row in result.rows] == [STOCK, host.PLAIN]


def test_every_step_sees_new_gradients_and_new_signals() -> None:
    driven, begin = build("GradScaler's signals")
    timed = host.Timed(driven, list(begin.gradients(0)), CPU)
    timed.prepare()
    before = [p.grad for p in driven.params]
    addresses = [grad.data_ptr() for grad in before]
    signals = driven.optimizer.grad_scale, driven.optimizer.found_inf
    timed.prepare()
    after = [p.grad for p in driven.params]
    assert not {grad.data_ptr() for grad in after} & set(addresses)
    assert all(torch.equal(x, y) and x is not y for x, y in zip(before, after, strict=True))
    assert driven.optimizer.grad_scale is not signals[0] and driven.optimizer.found_inf is not signals[1]


def test_the_outside_rate_is_another_in_every_step() -> None:
    # a rate that is written back unchanged counts as not given
    rates = [host.rate(step) for step in range(TOTAL_STEPS, TOTAL_STEPS + 6)]
    assert all(a != b for a, b in itertools.pairwise(rates)) and min(rates) > 0


def test_groups_given_to_the_scopes_are_normed_alone() -> None:
    driven, _ = build(f"{host.SCOPES} scopes")
    groups = driven.optimizer.param_groups
    assert [len(group["params"]) for group in groups] == [host.TENSORS // host.SCOPES] * host.SCOPES


def test_the_clock_stands_still_before_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def work(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr(host.time, "perf_counter", lambda: now)
    # the second step is interrupted by another program
    durations = iter([0.25, 64.0, 0.25])
    driven = host.Driven([], None, step=lambda: work(next(durations)), before=lambda: work(8.0))
    sample = host.time_step_alone(host.Timed(driven, [], CPU), 3)
    assert sample == measure.Sample(250.0, 250.0)


def test_host_end_to_end(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "host", "--device", "cpu", "--rounds", "2", "--json"]) == 0
    (run,) = json.loads(capsys.readouterr().out)
    found = run["host"]
    assert run["inventories"] == [] and not found["rejected"]
    assert (found["tensors"], found["elements"], found["rounds"]) == (448, 32, 2)
    rows = {row["way"]: row for row in found["rows"]}
    assert list(rows) == list(host.WAYS)
    assert rows[STOCK]["ratio"]["median"] == rows[host.PLAIN]["times_plain"]["median"] == 1
    for row in rows.values():
        for key in ("ms", "times_plain", "ratio"):
            assert 0 < row[key]["low"] <= row[key]["median"] <= row[key]["high"]
        assert 0 < row["distance"] <= found["bound"]
    lines = report.table(run).splitlines()
    (title,) = (line for line in lines if line.startswith("host: "))
    assert "448 tensors of 32 elements" in title and "2 rounds" in title
    assert all(any(line.startswith(f"{way}  ") for line in lines) for way in host.WAYS)
    assert max(map(len, lines[1:])) <= report.WIDTH


def test_a_rejected_way_ends_in_code_1(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(host.WAYS, f"{host.SCOPES} scopes", WRONG["groups in one scope"])
    assert cli.main(["bench", "host", "--device", "cpu", "--rounds", "1"]) == 1
    assert f"NOT TIMED, {host.SCOPES} scopes: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("asked", "inventories", "measured"),
    [([], [options.DEFAULT], False), (["host"], [], True), (["host", "tiny"], ["tiny"], True)],
)
def test_host_stands_among_the_inventories(asked: list[str], inventories: list[str], measured: bool) -> None:
    parser = cli.Parser()
    options.add_arguments(parser)
    settings = options.resolve(parser.parse_args([*asked, "--device", "cpu"]), parser)
    assert [inventory.name for inventory in settings.inventories] == inventories
    assert settings.host is measured is ("host" in settings.arguments())
    with_all = options.resolve(parser.parse_args([*asked[:1], "--all", "--device", "cpu"]), parser)
    assert len(with_all.inventories) == len(options.INVENTORIES) and with_all.host is measured
