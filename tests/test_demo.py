"""The demo: corpus, cache, options and report by themselves, then all of it, finished and interrupted."""

import json
import os
import select
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fusedlr import demo
from fusedlr.console import Parser
from fusedlr.demo import corpus, files, finetune, main, measure, options, panel, report, skips

DEMO = [sys.executable, "-m", "fusedlr", "demo"]
# a busy machine takes several times the 40 s that the quick demo is meant to take
PATIENCE = 600  # seconds


@pytest.fixture
def parser():
    parser = Parser(prog="fusedlr demo")
    demo.add_arguments(parser)
    return parser


@pytest.fixture
def resolve(parser, tmp_path):
    """Options to settings, with output and cache in a temporary folder."""
    places = ["--output", str(tmp_path / "out"), "--cache", str(tmp_path / "cache"), "--device", "cpu"]

    def resolve(*arguments):
        return options.resolve(parser.parse_args([*places, *arguments]), parser)

    return resolve


# corpus


def test_split_depends_on_names_alone():
    names = [f"package/module_{number}.py" for number in range(2000)]
    held_out = [name for name in names if corpus.is_held_out(name)]
    assert held_out == [name for name in names if corpus.is_held_out(name)]
    # binomial: 200 expected, standard deviation 13
    assert 150 < len(held_out) < 250
    # pinned, because a split that moves would put training texts into the held-out set of an old cache
    assert corpus.fraction("json/decoder.py") == pytest.approx(0.23117427244379962)


SOURCE = '''"""Module docstring, long enough to be kept as prose."""

class A:
    """Class docstring, which is long enough as well."""; b = 1

    def f(self):
        """Docstring ü of
        two lines.
        """
        return "no docstring"
\x0c
async def g(): "On one line with code."
'''


def test_docstrings_and_code_are_told_apart():
    docstrings, code = corpus.split_source(SOURCE)
    assert [text.split()[0] for text in docstrings] == ["Module", "Class", "On", "Docstring"]
    assert "Module docstring" not in code and "two lines" not in code
    assert 'return "no docstring"' in code
    # these share a line with code, which must not be lost
    assert "; b = 1" in code and "async def g()" in code


def library(root, count=60):
    for number in range(count):
        text = (
            f'"""Docstring of the module with number {number}, for the prose."""\n'
            + f"value = {number}\n" * 40
        )
        (root / f"module_{number}.py").write_text(text)
    (root / "test").mkdir()
    (root / "test" / "test_x.py").write_text("skipped = True\n" * 50)
    (root / "broken.py").write_text("def (\n" * 50)
    (root / "latin.py").write_bytes(b"# \xe9\n" * 50)
    return root


def test_corpus_is_read_and_split_by_file(tmp_path):
    prose, code = corpus.read_corpus(root=library(tmp_path))
    assert len(code.train) + len(code.held_out) == 60
    held_out = {text.split()[2] for text in code.held_out}
    assert held_out == {str(n) for n in range(60) if corpus.is_held_out(f"module_{n}.py")}
    assert not any('"""' in text or "skipped" in text for text in code.train + code.held_out)
    assert any("Docstring of the module" in text for text in prose.train)


def test_limited_corpus_keeps_the_share_held_out(tmp_path):
    paths = corpus.library_files(library(tmp_path))
    size = paths[0][1].stat().st_size
    chosen = [name for name, _ in corpus.limited(paths, 10 * size)]
    assert sum(map(corpus.is_held_out, chosen)) == 1
    assert 9 <= len(chosen) <= 12


def test_missing_sources_are_reported(tmp_path):
    with pytest.raises(corpus.CorpusError, match="standard library are not installed"):
        corpus.read_corpus(root=tmp_path)


# files


def test_entry_appears_whole_or_not_at_all(tmp_path):
    entry = tmp_path / "demo" / "data-1"
    with pytest.raises(KeyboardInterrupt), files.new_entry(entry) as folder:
        (folder / "half").write_text("half")
        raise KeyboardInterrupt
    assert list(entry.parent.iterdir()) == []
    with files.new_entry(entry) as folder:
        (folder / "a").write_text("1")
        assert not entry.exists()
    assert (entry / "a").read_text() == "1"


def test_entry_is_kept_until_its_successor_is_complete(tmp_path):
    entry = tmp_path / "data-1"
    with files.new_entry(entry) as folder:
        (folder / "a").write_text("1")
    with pytest.raises(OSError, match="disk full"), files.new_entry(entry) as folder:
        (folder / "a").write_text("2")
        raise OSError("disk full")
    assert (entry / "a").read_text() == "1"
    with files.new_entry(entry) as folder:
        (folder / "b").write_text("3")
    assert [path.name for path in entry.iterdir()] == ["b"]
    assert [path.name for path in tmp_path.iterdir()] == ["data-1"]


def test_cache_key_sees_every_option():
    keys = [{"seed": 0}, {"seed": 1}, {"seed": 0, "device": "cpu"}]
    assert len({files.cache_entry(Path("c"), "base", **key) for key in keys}) == 3


def test_publishing_replaces_the_report_and_nothing_else(tmp_path):
    output, staged = tmp_path / "out", tmp_path / "staged"
    for folder, text in ((output, "old"), (staged, "new")):
        (folder / "checkpoints").mkdir(parents=True)
        (folder / "checkpoints" / text).write_text(text)
        (folder / "report.json").write_text(text)
    (output / "notes.txt").write_text("mine")
    files.publish(staged, output)
    assert (output / "report.json").read_text() == "new"
    assert [path.name for path in (output / "checkpoints").iterdir()] == ["new"]
    assert (output / "notes.txt").read_text() == "mine"


# tokens and base


@pytest.fixture
def small_corpus(monkeypatch):
    """A corpus of a few kilobytes; counts how often it is read."""
    pytest.importorskip("tokenizers")
    from fusedlr.demo import tokens

    calls = []

    def read(size):
        calls.append(size)
        words = ["the optimizer updates the parameters " * 200]
        return corpus.Split(words * 3, words), corpus.Split(["x = f(y)\n" * 300] * 3, ["z = g(y)\n" * 300])

    monkeypatch.setattr(tokens, "read_corpus", read)
    return calls


def test_tokens_are_cached(small_corpus, resolve):
    from fusedlr.demo import tokens

    settings = resolve("--quick")
    first = tokens.prepare_data(settings)
    again = tokens.prepare_data(settings)
    assert len(small_corpus) == 1 and again.cached and not first.cached
    for part in tokens.PARTS:
        assert (first.blocks[part] == again.blocks[part]).all()
        assert first.blocks[part].shape[1] == settings.size.sequence
    tokens.prepare_data(replace(settings, fresh=True))
    assert len(small_corpus) == 2


def test_damaged_tokens_are_made_again(small_corpus, resolve):
    from fusedlr.demo import tokens

    settings = resolve("--quick")
    stored = tokens.prepare_data(settings).folder / "tokens.npz"
    stored.write_bytes(stored.read_bytes()[:1000])
    assert not tokens.prepare_data(settings).cached
    assert tokens.prepare_data(settings).cached


def test_interrupted_tokenising_leaves_no_entry(small_corpus, resolve, monkeypatch):
    from fusedlr.demo import tokens

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("numpy.savez", interrupted)
    settings = resolve("--quick")
    with pytest.raises(KeyboardInterrupt):
        tokens.prepare_data(settings)
    assert list((settings.cache / "demo").iterdir()) == []


def test_tokenizer_is_reversible():
    pytest.importorskip("tokenizers")
    from fusedlr.demo import tokens

    tokenizer = tokens.train_tokenizer(["def f(x):\n    return x\n" * 50], 300)
    text = "def g(ü):\n\treturn  2\n"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    arrays = tokens.tokenise(tokenizer, {"a": [text, text]})
    assert (arrays["a"] == tokenizer.token_to_id(tokens.END)).sum() == 2


def test_damaged_base_is_not_loaded(tmp_path):
    from fusedlr.demo import base

    stored = base.Base({"w": torch.ones(2)}, 7.0, 4.0, 5.0, cached=False)
    base._save(tmp_path / "base", stored)
    loaded = base._load(tmp_path / "base")
    assert loaded.cached and loaded.prose == 4.0 and loaded.weights["w"].tolist() == [1.0, 1.0]
    path = tmp_path / "base" / "weights.pt"
    path.write_bytes(path.read_bytes()[:200])
    assert base._load(tmp_path / "base") is None
    assert base._load(tmp_path / "nothing") is None


# options


def test_every_option_has_help(parser):
    assert all(action.help for action in parser._actions)


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

    monkeypatch.setattr(files.tempfile, "mkdtemp", full)
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


# measuring and reporting


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
    from fusedlr.demo.base import Base

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
    from fusedlr.demo.base import Base

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


def test_picture_is_900_pixels_wide(tmp_path):
    pytest.importorskip("matplotlib")
    from fusedlr.demo.plot import draw

    draw(four_results(), "cosine", tmp_path / "curves.png")
    data = (tmp_path / "curves.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert int.from_bytes(data[16:20], "big") == 900


def test_picture_of_the_skip(tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("transformers")
    from fusedlr.demo.plot import draw_skip

    draw_skip(skips.demonstrate("cpu"), tmp_path / "skip.png")
    data = (tmp_path / "skip.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert int.from_bytes(data[16:20], "big") == 900


def test_panel_is_left_out_where_it_would_take_too_long(resolve):
    assert panel.left_out(resolve(), 100.0, 20.0) is None
    assert "the demo would take 250 s with them" in panel.left_out(resolve(), 130.0, 40.0)
    assert "--panel runs them" in panel.left_out(resolve("--quick"), 0.0, 1.0)
    assert panel.left_out(resolve("--quick", "--panel"), 0.0, 1.0) is None


def test_panel_runs_every_schedule_at_the_high_rate(resolve, tmp_path):
    pytest.importorskip("matplotlib")
    from fusedlr.demo.plot import draw_panel

    asked = []

    def train(run, settings, *_):
        settings.own_schedule()
        asked.append((settings.schedule, settings.lr, settings.warmup))
        return result(run, 1.0)

    results = panel.run(resolve(), None, None, tmp_path, train)
    assert asked == [(name, panel.PEAK, 0 if name == "constant" else 4) for name in panel.SCHEDULES]
    assert "constant_with_warmup" in panel.table(results) and "5.000" in panel.table(results)
    draw_panel(results, panel.PEAK, tmp_path / "schedules.png")
    data = (tmp_path / "schedules.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and int.from_bytes(data[16:20], "big") == 900


# the whole demo


needs_demo = pytest.mark.skipif(
    any(not main.importlib.util.find_spec(name) for name in main.PACKAGES), reason="needs fusedlr[demo]"
)


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


@needs_demo
@pytest.mark.slow
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
    assert sorted(path.name for path in output.iterdir()) == [
        "checkpoints",
        "curves.png",
        "report.json",
        "skip.png",
    ]
    assert values["schedules"] == {} and "schedules at a high rate: left out" in text
    assert values["skip"]["fusedlr"]["schedule"] == values["skip"]["fusedlr"]["updates"]
    for name in ("fusedlr", "stock"):
        assert (output / "checkpoints" / name / "checkpoint-25" / "adapter_model.safetensors").is_file()
    assert "held-out loss on code, after" in text


@needs_demo
@pytest.mark.slow
def test_demo_repeats_itself_from_the_cache(finished, places):
    _, first, output = finished
    cache, _ = places
    again_output = output.parent / "again"
    finish(start(cache, again_output, "--no-teeth"))
    again = json.loads((again_output / "report.json").read_text())
    assert again["base"]["cached"]
    for name, run in again["runs"].items():
        assert run["losses"] == first["runs"][name]["losses"]


@needs_demo
@pytest.mark.slow
def test_interrupted_base_training_leaves_no_trace(tmp_path):
    cache, output = tmp_path / "cache", tmp_path / "report"
    code, err = interrupt_at(start(cache, output), b"training the base")
    assert code == 130, err[-3000:]
    assert "interrupted" in err and "Traceback" not in err
    # the tokens were complete and stay, the base model was not
    assert [path.name.split("-")[0] for path in (cache / "demo").iterdir()] == ["data"]
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


@needs_demo
@pytest.mark.slow
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
