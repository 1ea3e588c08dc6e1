"""`fusedlr plot` draws what `lr_at` gives, reads specs without running them, and refuses in one line."""

from __future__ import annotations

import subprocess
import sys
import warnings
from itertools import pairwise

import pytest
from schedule.schedule_zoo import PEAK, ZOO

import fusedlr
from fusedlr import cli
from fusedlr.schedule import curves, page, spec

CALLS = {
    "cosine": {"total_steps": 100},
    "linear": {"total_steps": 100},
    "polynomial": {"total_steps": 100},
    "cosine_with_restarts": {"total_steps": 100},
    "cosine_with_min_lr": {"total_steps": 100, "min_lr_ratio": 0.1},
    "cosine_warmup_with_min_lr": {"total_steps": 100, "min_lr_ratio": 0.1},
    "warmup_stable_decay": {"total_steps": 100, "decay_steps": 10},
}


def plot(*arguments: str) -> int:
    return cli.main(["plot", *arguments])


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        plot(*arguments)
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("fusedlr plot: error: ") and line.endswith(" (fusedlr plot --help)")
    return line


# specs


@pytest.mark.parametrize("name", [name for name in spec.NAMES if name != "table"])
def test_every_constructor_has_a_name(name):
    arguments = {**CALLS.get(name, {})}
    assert spec.parse(name).build({"unknown": 1, **arguments}) == getattr(fusedlr, name)(**arguments)


def test_names_and_arguments_of_transformers():
    text = "warmup_stable_decay(num_warmup_steps=10, num_decay_steps=20, num_training_steps=100)"
    assert spec.parse(text).build() == fusedlr.warmup_stable_decay(10, 20, 100)
    text = "cosine_with_min_lr(10, 100, min_lr_rate=0.2)"
    assert spec.parse(text).build() == fusedlr.cosine_with_min_lr(10, 100, min_lr_ratio=0.2)
    assert spec.parse("table([1, 0.5])").build() == fusedlr.table([1, 0.5])


def test_schedules_that_change_while_they_run():
    built = spec.parse("cosine(5).cooldown(20, steps=10).rewarm(25, 3, to=0.5)").build({"total_steps": 50})
    assert built == fusedlr.cosine(5, 50).cooldown(20, 10).rewarm(25, 3, 0.5)
    # as they are shown
    assert spec.parse(repr(built)).build() == built


def test_what_the_text_gives_wins():
    built = spec.parse("linear(5)").build({"warmup_steps": 20, "total_steps": 50})
    assert built == fusedlr.linear(5, 50)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cosin", "did you mean cosine?"),
        ("", "'' is not a name or name(argument=value, ...)"),
        ("cosine(", "is not a name or name(argument=value, ...)"),
        ("cosine; linear", "is not a name or name(argument=value, ...)"),
        ("cosine.__class__", "is not a name or name(argument=value, ...)"),
        ("fusedlr.cosine(1, 2)", "is not a name or name(argument=value, ...)"),
        ("__import__('os').abort()", "is not a name or name(argument=value, ...)"),
        ("cosine(__import__('os').abort())", "__import__('os').abort() is not a plain value"),
        ("cosine(total_steps=10**10**10)", "10 ** 10 ** 10 is not a plain value"),
        ("cosine(**{'total_steps': 3})", "** has no place here"),
        ("cosine(*[1, 2])", "is not a plain value"),
        ("cosine(total_steps=1, total_steps=2)", "an argument is given twice"),
        ("cosine(total_steps=1, num_training_steps=2)", "an argument is given twice"),
        ("cosine(1, warmup_steps=2)", "multiple values for argument 'warmup_steps'"),
        ("cosine(1, 2, 3)", "too many positional arguments"),
        ("cosine(cycles=1)", "cosine has no argument 'cycles': did you mean num_cycles?"),
        ("constant(lr=1)", "constant has no argument 'lr': known: none"),
        ("(" * 500 + "cosine" + ")" * 500, "is not a name or"),
        ("cosine(\0)", "is not a name or"),
        ("cosine(1, 2).cooldown()", "missing a required argument: 'k'"),
        ("cosine(1, 2).cooldown(1, 2, **{})", "got an unexpected keyword argument '**'"),
        ("cosine(1, 2).resolve(1)", "is not a name or name(argument=value, ...)"),
        ("cosin(1, 2).cooldown(1, 2)", "did you mean cosine?"),
    ],
)
def test_texts_that_are_no_schedule(text, message):
    with warnings.catch_warnings(), pytest.raises(spec.SpecError) as refusal:
        # Python remarks on some of these texts
        warnings.simplefilter("ignore")
        spec.parse(text)
    assert message in str(refusal.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cosine", "cosine: cosine needs total_steps"),
        ("cosine(0, 10, min_lr_ratio='a')", "min_lr_ratio='a' is not a number"),
        ("cosine([], 10)", "warmup_steps=[] is not an integer"),
        ("cosine(0, 10, num_cycles=1e999)", "num_cycles=inf must be a finite number"),
        ("cosine_with_restarts(0, 10, num_cycles=9, cycle_mult=1e300)", "cycle_mult=1e300"),
        ("table", "table: table() missing 1 required positional argument"),
        ("linear(0, 10).cooldown(5, 0)", "steps=0 must be at least 1"),
        ("linear(0, 10, min_lr=1e-5).cooldown(5, 2)", "has an absolute level"),
        ("table(3)", "fn=3 is neither a function of the step nor values in order"),
    ],
)
def test_arguments_that_a_constructor_refuses(text, message):
    with pytest.raises(spec.SpecError) as refusal:
        spec.parse(text).build()
    assert message in str(refusal.value)


# curves


@pytest.mark.parametrize("name", ZOO)
def test_every_edge_is_drawn(name):
    schedule = ZOO[name]
    total = curves.length({name: schedule})
    drawn = curves.steps(schedule, total)
    assert drawn[0] == 0 and drawn[-1] == total
    assert len(drawn) < 4 * curves._POINTS or schedule.table
    # between two neighbours the straight line is the schedule, but for its curvature
    rates = {k: schedule.lr_at(k, PEAK) for k in range(min(total, 5000) + 1)}
    for a, b in pairwise(drawn):
        if b in rates and b - a > 1:
            middle = (a + b) // 2
            line = rates[a] + (rates[b] - rates[a]) * (middle - a) / (b - a)
            assert abs(line - rates[middle]) < 0.02 * PEAK


def test_the_curve_in_the_terminal_is_the_schedule():
    schedule = fusedlr.cosine(20, 100)
    width, height = 80, 21
    lines = curves.text({"cosine": schedule}, 1.0, width, height)
    rows = [line.split("|", 1)[1].ljust(width) for line in lines[:height]]
    columns = width - len(lines[0].split("|")[0]) - 1
    for k in range(101):
        column = round(k / 100 * (columns - 1))
        row = round((1 - schedule.lr_at(k)) * (height - 1))
        assert rows[row][column] == "*", k
    # nothing is drawn away from it: one mark per column, more where it is steep
    assert sum(row.count("*") for row in rows) < columns + 2 * height
    assert all(len(line) <= width for line in lines)


def test_a_schedule_of_zeros_and_one_of_one_update_are_drawn():
    assert "*" in "".join(curves.text({"zero": fusedlr.table([0, 0])}, 1.0))
    assert "*" in "".join(curves.text({"one": fusedlr.table([0.5])}, 1.0))


# the command


def test_without_arguments_it_draws_a_cosine(capsys):
    assert plot() == 0
    printed = capsys.readouterr().out
    assert "update 4,000" in printed and "* cosine: first update 0, last 1.71e-07" in printed


def test_several_are_drawn_together_and_described(capsys):
    options = ("--warmup-steps", "200", "--total-steps", "4000", "--peak", "1e-5", "--describe")
    assert plot("cosine,linear(100, 1000)", "constant", *options) == 0
    printed = capsys.readouterr().out
    assert "o linear(100, 1000): first update 0" in printed
    assert "+ constant: first update 1e-05" in printed
    assert "oooo" in printed
    for schedule in (fusedlr.cosine(200, 4000), fusedlr.linear(100, 1000), fusedlr.constant()):
        assert schedule.describe(1e-5) in printed


@pytest.mark.parametrize("name", [name for name in spec.NAMES if name != "table"])
def test_every_name_works_alone(name, capsys):
    assert plot(name) == 0
    assert f"* {name}: first update" in capsys.readouterr().out


def test_a_given_stable_phase_decides_the_length(capsys):
    assert plot("warmup_stable_decay(stable_steps=100)") == 0
    out, err = capsys.readouterr()
    # 5 and 10 % of 4,000, and the 100
    assert "update 700" in out and not err
    assert plot("warmup_stable_decay(stable_steps=100)", "--total-steps", "1000") == 0
    assert "fusedlr plot: warning: warmup_steps=50, stable_steps=100" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_picture(suffix, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    path = tmp_path / "new" / f"x.{suffix}"
    assert plot("cosine", "inverse_sqrt", "--peak", "1e-4", "--out", str(path)) == 0
    assert capsys.readouterr().out.strip() == str(path)
    first = path.read_bytes()
    assert first.startswith(b"\x89PNG" if suffix == "png" else b"<?xml")
    # again, over the file: the same bytes
    assert plot("cosine", "inverse_sqrt", "--peak", "1e-4", "--out", str(path)) == 0
    assert path.read_bytes() == first


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cosin"], "argument SCHEDULE: 'cosin' is no schedule: did you mean cosine?"),
        (["cosine,"], "argument SCHEDULE: '' is not a name or name(argument=value, ...)"),
        (["constant", "--warmup-steps", "5"], "argument --warmup-steps: not an argument of constant"),
        (["cosine", "--decay-steps", "5"], "argument --decay-steps: not an argument of cosine"),
        (["cosine", "--warmup-steps", "nan"], "argument --warmup-steps: nan is out of range"),
        (["cosine", "--warmup-steps", "1.5"], "warmup_steps=1.5 is not an integer"),
        (["polynomial", "--peak", "1e-9"], "argument --peak: lr_end=1e-07 is above the peak lr=1e-09"),
        (["--peak", "0"], "argument --peak: 0 is out of range"),
        (["--site", "http://localhost"], "argument --site: it says where the page of --web is"),
        (["--web", "--out", "x.png"], "argument --out: not with --web"),
        (["--out", "x.pdf"], "argument --out: x.pdf must end in .png or .svg"),
        (["--out", "/dev/null/x.png"], "argument --out: "),
        ([",".join(f"cosine({n}, 100)" for n in range(9))], "at most 8 schedules fit in one drawing"),
    ],
)
def test_mistakes_are_one_line(arguments, message, capsys):
    line = refused(capsys, *arguments)
    assert line.startswith("fusedlr plot: error: ") and message in line


def test_the_link_shows_the_same_schedules(capsys):
    assert plot("cosine", "linear(100, 1000)", "table([1, 0.5])", "--peak", "1e-3", "--web") == 0
    address, _, fragment = capsys.readouterr().out.strip().partition("#")
    assert address == "http://localhost:8000/explore.html"
    shown = page.show(fragment)
    assert not shown["problems"] and shown["peak"] == 1e-3
    assert [one["text"] for one in shown["schedules"]] == [
        "cosine(warmup_steps=0.05, total_steps=4000)",
        "linear(warmup_steps=100, total_steps=1000)",
        "table(fn=[1, 0.5])",
    ]
    # a constructor without arguments, and another place
    assert plot("constant", "--web", "--describe", "--site", "https://example.org/docs/") == 0
    link, _, *words = capsys.readouterr().out.splitlines()
    assert link == "https://example.org/docs/explore.html#schedule=constant()&peak=0.0002"
    assert words == fusedlr.constant().describe().splitlines()


def test_a_folder_is_no_picture(tmp_path, capsys):
    folder = tmp_path / "x.png"
    folder.mkdir()
    assert f"{folder} is a folder" in refused(capsys, "--out", str(folder))


def test_without_matplotlib_it_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'fusedlr[plot]'" in refused(capsys, "--out", "x.png")


def test_every_option_is_explained(capsys):
    with pytest.raises(SystemExit) as stopped:
        plot("--help")
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    options = text[text.index("options:") :].split("\n  -")[2:]
    assert len(options) == 11
    assert all("(default:" in " ".join(option.split()) for option in options)


def test_the_terminal_needs_neither_torch_nor_matplotlib():
    code = (
        "import sys; from fusedlr import cli; cli.main(['plot', 'cosine']); "
        "sys.exit(bool({'torch', 'matplotlib'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL).returncode == 0
