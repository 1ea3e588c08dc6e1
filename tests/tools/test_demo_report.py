"""What the demo measures, compares, says and draws."""

import json

import pytest
import torch
from recordings import NAMES, recording

from fusedlr.demo import finetune, measure, panel, plot, report, skips
from fusedlr.demo.base import Base
from fusedlr.recorded import Recording
from fusedlr.report.terminal import NOTHING


def test_timing_leaves_a_schedulers_state_alone():
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 1.0)
    before = scheduler.state_dict()
    meter = measure.Meter("cpu")
    meter.wrap(scheduler, "step", last=True)
    assert scheduler.state_dict() == before
    meter.begin()
    optimizer.step()
    scheduler.step()
    meter.end()
    assert scheduler.last_epoch == 1
    assert 0 < meter.phase_ms[0] < meter.step_ms[0]


def test_the_recording_is_written_drawn_and_put_into_words(tmp_path):
    pytest.importorskip("matplotlib")
    results = four_results()
    results[0].recording = recording()
    said = report.write_recording(results, tmp_path)
    assert NOTHING in " ".join(said.split())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["record.npz", "recording.png"]
    assert Recording.load(tmp_path / "record.npz")["names"] == NAMES
    results[0].recording = recording(lambda a: a.update(limit=a["limit"] / 10, coef=0.15 / a["grad_norm"]))
    said = report.write_recording(results, tmp_path)
    assert "- the limit clips nearly every update, 400 of 400" in said
    assert max(map(len, said.splitlines())) <= 100


def result(run, weight, losses=(5.0, 4.5, 4.25)):
    return finetune.Result(
        run=run,
        backend="torch",
        seconds=3.0,
        losses=list(losses),
        lrs=[0.0, 1e-3, 5e-4],
        grad_norms=[1.0],
        phase_ms=[1.0, 2.0, 9.0],
        step_ms=[100.0, 100.0, 90.0],
        code=4.5,
        prose=4.1,
        weights={"a": torch.tensor([0.0, weight])},
    )


def four_results(ours=3e-6):
    return [
        result(finetune.FUSEDLR, 1.0 + ours, (5.0, 4.5, 4.2500005)),
        result(finetune.STOCK, 1.0),
        result(finetune.FOREACH, 1.0 + 1e-6),
        result(finetune.OFF_BY_ONE, 1.1, (5.0, 4.6, 4.3)),
    ]


def test_distances_and_their_ratio():
    distances = report.compare(four_results())
    # of two weights, one of them equal
    assert distances["fusedlr"].weights == pytest.approx(1.5e-6, rel=0.05)
    assert distances["fusedlr"].weight == pytest.approx(3e-6, rel=0.05)
    assert distances["stock, warm-up + 1"].loss == pytest.approx(0.1)
    assert report.ratio(distances["fusedlr"], distances["stock, foreach"]) == pytest.approx(3.0, rel=0.1)
    none = report.Distance(0.0, 0.0, 0.0)
    assert report.ratio(none, none) == 0.0
    assert report.ratio(distances["fusedlr"], none) == float("inf")


def test_divergence_is_said():
    results = four_results(ours=float("nan"))
    results[2].losses[1] = float("nan")
    distances = report.compare(results)
    assert distances["fusedlr"].weights != distances["fusedlr"].weights
    assert distances["stock, foreach"].loss != distances["stock, foreach"].loss
    assert "diverged" in report.verdict(results)


def test_table(resolve):
    base = Base({}, 6.9, 4.0, 4.9, cached=True)
    text = report.table(resolve(), base, four_results())
    lines = {line[:31].strip(): line[31:].split() for line in text.splitlines()}
    assert lines["held-out loss on code, before"][0] == "4.9000"
    assert lines["lr at its peak"] == ["1.000e-03"] * 3
    assert lines["optimizer phase, ms per update"] == ["2.000"] * 3
    assert "6.900 -> 4.000 nats per token (from the cache)" in text
    assert ": rounding\n" in text and "MORE" not in text
    assert "Stock's optimizer phase is 2.0% of an update" in text
    assert max(map(len, text.splitlines())) <= 100
    assert ": MORE THAN ROUNDING\n" in report.table(resolve(), base, four_results(ours=1e-3))


def test_what_is_not_faster_is_said():
    results = four_results()
    assert "fusedlr's is slower" in report.not_faster(results)
    results[0].phase_ms = [0.5, 1.0, 3.0]
    text = report.not_faster(results)
    assert "fusedlr's is 2.0 times as fast, and a whole update takes\n100 ms against 100 ms" in text
    assert max(map(len, text.splitlines())) <= 100


def test_after_an_overflow_only_stocks_schedule_is_ahead():
    pytest.importorskip("transformers")
    before = torch.random.get_rng_state()
    skip = skips.demonstrate("cpu")
    assert torch.equal(torch.random.get_rng_state(), before)
    made = skips.ATTEMPTS - 1
    assert (skip.fusedlr.updates, skip.fusedlr.schedule) == (made, made)
    assert (skip.stock.updates, skip.stock.schedule) == (made, made + 1)
    assert skip.fusedlr.rates == pytest.approx(skip.meant, rel=1e-6)
    # stock is right up to the overflow and one update ahead after it
    assert skip.stock.rates[: skips.OVERFLOW] == pytest.approx(skip.meant[: skips.OVERFLOW])
    assert skip.stock.rates[skips.OVERFLOW : -1] == pytest.approx(skip.meant[skips.OVERFLOW + 1 :])
    rows = {line[:36].strip(): line[36:].split() for line in skips.table(skip).splitlines()[1:]}
    assert rows["updates its schedule counted"] == [str(made), str(made + 1)]
    assert rows["updates at another rate than meant"] == ["0", str(made - skips.OVERFLOW)]


def test_report_is_strict_json(resolve):
    results = four_results()
    results[0].losses[1] = float("nan")
    text = report.to_json(report.as_dict(resolve(), Base({}, 6.9, 4.0, 4.9, True), results, {"total": 1.0}))

    def refuse(name):
        raise AssertionError(name)

    values = json.loads(text, parse_constant=refuse)
    assert values["runs"]["fusedlr"]["losses"] == [5.0, None, 4.2500005]
    assert values["runs"]["stock"]["lr"] == {"first": 0.0, "peak": 1e-3, "last": 5e-4}
    assert values["config"]["size"]["hidden"] == 128
    assert values["versions"]["torch"] == torch.__version__


def assert_picture(path):
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and int.from_bytes(data[16:20], "big") == 900


def test_pictures_are_900_pixels_wide(tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("transformers")
    plot.draw(four_results(), "cosine", tmp_path / "curves.png")
    assert_picture(tmp_path / "curves.png")
    plot.draw_skip(skips.demonstrate("cpu"), tmp_path / "skip.png")
    assert_picture(tmp_path / "skip.png")


def test_panel_is_left_out_where_it_would_take_too_long(resolve):
    assert panel.left_out(resolve(), 100.0, 20.0) is None
    assert "the demo would take 250 s with them" in panel.left_out(resolve(), 130.0, 40.0)
    assert "--panel runs them" in panel.left_out(resolve("--quick"), 0.0, 1.0)
    assert panel.left_out(resolve("--quick", "--panel"), 0.0, 1.0) is None


def test_panel_runs_every_schedule_at_the_high_rate(resolve, tmp_path):
    pytest.importorskip("matplotlib")
    asked = []

    def train(run, settings, *_):
        settings.own_schedule()
        asked.append((settings.schedule, settings.lr, settings.warmup))
        return result(run, 1.0)

    results = panel.run(resolve(), None, None, tmp_path, train)
    assert asked == [(name, panel.PEAK, 0 if name == "constant" else 4) for name in panel.SCHEDULES]
    assert "constant_with_warmup" in panel.table(results) and "5.000" in panel.table(results)
    plot.draw_panel(results, panel.PEAK, tmp_path / "schedules.png")
    assert_picture(tmp_path / "schedules.png")
