"""`fusedlr report` says what is unusual when it is and not otherwise, and shows what was recorded."""

from __future__ import annotations

import csv
import importlib
import io
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from recordings import GROUPS, NAMES, STEPS, WARMUP, healthy, recording, skip

import fusedlr
from fusedlr import cli
from fusedlr.recorded import Recording
from fusedlr.report.layers import heat, places, short
from fusedlr.report.runs import Run
from fusedlr.report.unusual import unusual


def report(*arguments: Any) -> int:
    return cli.main(["report", *map(str, arguments)])


def found(change: Any = None, **values: Any) -> list[str]:
    return unusual(Run("run", recording(change, **values)))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "run.npz"
    recording().save(path)
    return path


# what is unusual


@pytest.mark.parametrize("seed", range(20))
def test_a_healthy_run_has_nothing_unusual(seed):
    made = Recording(healthy(seed), names=NAMES, groups=GROUPS)
    assert unusual(Run("run", made)) == []


def test_some_skips_of_a_loss_scaler_are_usual():
    assert found(lambda a: skip(a, [0, 1, 2, 200])) == []


def falls(a: dict[str, Any]) -> None:
    """The norm falls to a twentieth over one and a half times the warm-up."""
    a["grad_norm"] *= 20 * np.exp(-np.log(20) * np.minimum(a["step"] / (1.5 * WARMUP), 1))


def settles(a: dict[str, Any]) -> None:
    """The norm falls to a twentieth over half the warm-up."""
    a["grad_norm"] *= 20 * np.exp(-np.log(20) * np.minimum(a["step"] / (0.5 * WARMUP), 1))


CASES = {
    "rate": (
        lambda a: a["lr"].__setitem__((slice(300, 310), 1), 1e-3),
        ["the rate of lora_B was not the planned one in 10 of 400 steps, first in step 300: 0.001 where"],
    ),
    "limit": (
        lambda a: a.update(limit=a["limit"] / 10, coef=0.15 / a["grad_norm"]),
        ["the limit clips nearly every update, 400 of 400: it is 0.15, and the median norm 0.98"],
    ),
    "warm-up": (falls, ["the warm-up ends while the norm still falls: it is "]),
    "a norm that settles within the warm-up": (settles, []),
    "a norm that falls as the rate does harm": (
        lambda a: (falls(a), a["tensor_update_ratio"].__imul__(150)),
        ["the A matrices move by more than 10% of themselves in "],
    ),
    "a few large strides": (
        lambda a: a["tensor_update_ratio"][5:12].__imul__(2000),
        [],
    ),
    "growth": (
        lambda a: a.update(grad_norm=a["grad_norm"] * np.exp(a["step"] / 100)),
        ["the norm has grown from "],
    ),
    "skips": (
        lambda a: skip(a, slice(100, 400, 10), 5),
        [
            "30 of 400 steps were skipped, 1 of them in a row from step 100; the gradient of "
            "layers.2.self_attn.v_proj.lora_A.default.weight was not finite in 30 of these"
        ],
    ),
    "skips in a row": (
        lambda a: skip(a, slice(50, 60)),
        ["10 of 400 steps were skipped, 10 of them in a row"],
    ),
    "not finite and applied": (
        lambda a: a["grad_norm"].__setitem__(slice(390, 400), np.nan),
        ["the norm was not finite in 10 steps that were made, first in step 390"],
    ),
    "still": (
        lambda a: a["tensor_update_ratio"].__setitem__((slice(None), [3, 20]), 0),
        [
            "2 of 32 tensors never moved: layers.1.self_attn.v_proj.lora_A.default.weight, "
            "layers.2.self_attn.q_proj.lora_B.default.weight"
        ],
    ),
    "layer that moves much": (
        lambda a: a["tensor_update_ratio"].__setitem__(
            (slice(None), 10), 20 * a["tensor_update_ratio"][:, 10]
        ),
        ["layers.5 A is far from the other layers: it moves up to "],
    ),
    "layer that moves little": (
        lambda a: a["tensor_update_ratio"].__setitem__(
            (slice(None), 31), a["tensor_update_ratio"][:, 31] / 20
        ),
        ["layers.7 B is far from the other layers: it moves up to 1/"],
    ),
    "layer that moves a little more": (
        lambda a: a["tensor_update_ratio"].__setitem__(
            (slice(None), 10), 2 * a["tensor_update_ratio"][:, 10]
        ),
        [],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_each_thing_is_said_and_nothing_else(name):
    change, expected = CASES[name]
    said = found(change)
    assert len(said) == len(expected)
    assert all(words.startswith(begin) for words, begin in zip(said, expected, strict=True)), said


@pytest.mark.parametrize("warmup", [0, 1, WARMUP])
def test_a_jump_in_the_first_updates_is_for_want_of_a_warm_up(warmup):
    schedule = fusedlr.cosine(warmup_steps=warmup, total_steps=STEPS)
    groups = [replace(group, schedule=schedule) for group in GROUPS]

    def jump(a: dict[str, Any]) -> None:
        a["grad_norm"][:10] = 1.0
        a["grad_norm"][3] = 7.0
        rates = np.array([[schedule.lr_at(k, group.peak) for group in groups] for k in range(STEPS)])
        a["lr"] = rates.astype(np.float32)

    said = found(jump, groups=groups)
    if warmup == WARMUP:
        # one spike is nothing that a run with a warm-up is told
        assert said == []
        return
    has = "a warm-up of 1" if warmup else "no warm-up"
    assert said == [
        f"the norm jumps in the first updates, from 1 to 7 in step 3, and the schedule has {has}: with a "
        "longer one the moments settle before the rate is high"
    ]
    # a recording that begins later does not know
    made = recording(jump, groups=groups)
    later = {name: made[name][1:] for name in made if isinstance(made[name], np.ndarray)}
    assert unusual(Run("run", Recording(later, names=NAMES, groups=groups))) == []


def test_without_lora_the_weights_stride():
    names = [name.replace("lora_A.default", "up").replace("lora_B.default", "down") for name in NAMES]
    said = found(lambda a: a["tensor_update_ratio"].__imul__(150), names=names)
    assert [words.partition(" move ")[0] for words in said] == ["the weights"]


def test_a_run_by_hand_without_norms_and_tensors_is_not_judged():
    def bare(a):
        a.update(grad_norm=a["grad_norm"] * np.nan, limit=a["limit"] * np.nan, coef=a["coef"] * 0 + 1)
        a.update({name: a[name][:, :0] for name in ("tensor_grad_norm", "tensor_update_ratio")})

    groups = [replace(group, schedule=None) for group in GROUPS]
    assert found(bare, groups=groups, names=()) == []


def test_scopes_are_named():
    def two(a):
        for name in ("grad_norm", "coef", "limit", "skipped"):
            a[name] = np.stack([a[name]] * 2, axis=1)
        a["coef"][:, 1] = 0.5

    groups = [replace(GROUPS[0], scope="a"), replace(GROUPS[1], scope="b")]
    (words,) = found(two, groups=groups, scopes=["a", "b"])
    assert words.startswith("the limit of b clips nearly every update")


# names


@pytest.mark.parametrize(
    ("name", "layer", "module", "matrix"),
    [
        ("m.layers.3.mlp.up.lora_A.default.weight", "m.layers.3", "mlp.up", "A"),
        ("m.embed.lora_embedding_B.default", "m.embed", "", "B"),
        ("m.head.modules_to_save.default.weight", "m.head.modules_to_save", "weight", ""),
        ("h.0.q.lora_magnitude_vector.default.weight", "h.0", "q.lora_magnitude_vector.weight", ""),
        ("0.weight", "0", "weight", ""),
        ("weight", "weight", "", ""),
        ("", "", "", ""),
        ("m.layers.3.mlp.up.lora_A.weight (group 1)", "m.layers.3", "mlp.up", "A"),
        ("w (group 0)", "w", "", ""),
        ("parameter 3 of the past", "parameter 3 of the past", "", ""),
    ],
)
def test_names_are_taken_apart(name, layer, module, matrix):
    # another one without anything in common keeps the name whole
    place = places([name, "x.y.z"])[0]
    assert (place.layer, place.module, place.matrix) == (layer, module, matrix)


def test_what_all_names_begin_with_is_left_out_and_adapters_are_told_apart():
    names = [f"base.model.layers.{i}.q.lora_A.{adapter}.weight" for i in (0, 1) for adapter in "xy"]
    assert [place.row for place in places(names)] == [
        "layers.0 A x",
        "layers.0 A y",
        "layers.1 A x",
        "layers.1 A y",
    ]
    assert short(names)[0] == "layers.0.q.lora_A.x.weight"
    assert short(["weight"]) == ["weight"] and short([]) == []


def test_the_heat_map_has_a_row_for_a_and_b_of_each_layer():
    rows = heat(recording(), 100)
    assert rows is not None and rows.values.shape == (16, 100)
    assert rows.labels == [f"layers.{i} {matrix}" for matrix in "AB" for i in range(8)]
    merged = rows.merged(8)
    assert merged.labels[:2] == ["layers.0 to layers.1 A", "layers.2 to layers.3 A"]
    assert merged.values.shape == (8, 100)
    assert (
        heat(recording(lambda a: a.update({n: a[n][:, :0] for n in a if "tensor" in n}), names=()), 9) is None
    )


# the command


def test_the_terminal_shows_rates_norms_heat_tensors_and_words(saved, capsys):
    assert report(saved, "--width", 90) == 0
    printed = capsys.readouterr().out
    for words in ("learning rate, run", "gradient norm, run", "update over parameter, run", "moved most"):
        assert words in printed
    assert "* lora_A   o lora_B   . planned" in printed and "nothing of what is looked for" in printed
    assert max(map(len, printed.splitlines())) <= 96


def test_two_runs_stand_side_by_side(saved, tmp_path, capsys):
    other = tmp_path / "other.npz"
    recording(lambda a: skip(a, slice(50, 60))).save(other)
    assert report(saved, other) == 0
    printed = capsys.readouterr().out
    assert any(
        "learning rate, run" in line and "learning rate, other" in line for line in printed.splitlines()
    )
    assert "unusual in other:\n- 10 of 400 steps were skipped" in printed


def test_csv_gives_back_every_number(saved, tmp_path, capsys):
    path = tmp_path / "new" / "run.csv"
    assert report(saved, "--csv", path) == 0
    assert capsys.readouterr().out == f"{path}\n"
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    made = recording()

    def column(name: str) -> Any:
        return np.array([float(row[name]) for row in rows])

    assert len(rows) == STEPS
    for name in ("step", "grad_norm", "coef", "limit", "skipped"):
        np.testing.assert_array_equal(column(name), made[name])
    for i, group in enumerate(("lora_A", "lora_B")):
        np.testing.assert_array_equal(column(f"lr/{group}"), made["lr"][:, i])
        np.testing.assert_array_equal(column(f"planned_lr/{group}"), made.planned()[:, i])
    for i, name in enumerate(NAMES):
        np.testing.assert_array_equal(
            column(f"tensor_update_ratio/{name}"), made["tensor_update_ratio"][:, i]
        )


class Loads(HTMLParser):
    """Collects what a page would fetch, and sees that tags are closed."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name.split(":")[-1] in ("src", "href") and not (value or "").startswith(("#", "data:")):
                self.fetched.append(f"{tag} {value}")


@pytest.mark.parametrize("runs", [1, 2])
def test_page_and_picture(saved, tmp_path, runs, capsys):
    pytest.importorskip("matplotlib")
    hostile = tmp_path / "<b>$x$.npz"
    names = [f"<script>alert({i})</script>.$_{i}^" for i in range(32)]
    recording(lambda a: skip(a, slice(50, 60)), names=names).save(hostile)
    page, picture = tmp_path / "x.html", tmp_path / "x.png"
    files = [hostile, saved][:runs]
    assert report(*files, "--out", page) == report(*files, "--out", picture) == 0
    text = page.read_text()
    reader = Loads()
    reader.feed(text)
    assert reader.fetched == [] and "script" not in reader.tags and "b" not in reader.tags
    assert reader.tags.count("svg") == 3 and "currentColor" in text and "prefers-color-scheme: dark" in text
    assert "10 of 400 steps were skipped" in text
    assert picture.read_bytes().startswith(b"\x89PNG")
    before = page.read_bytes()
    assert report(*files, "--out", page) == 0 and page.read_bytes() == before


def refused(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    with pytest.raises(SystemExit) as stopped:
        report(*arguments)
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("fusedlr report: error: argument ")
    return line


def test_the_words_below_a_picture_end_before_its_edge(monkeypatch):
    pytest.importorskip("matplotlib")
    image = pytest.importorskip("matplotlib.image")
    picture = importlib.import_module("fusedlr.report.picture")
    monkeypatch.setattr(picture, "words", lambda run, width, several: ["W" * width] * 3)
    pixels = image.imread(io.BytesIO(picture.png([Run("run", recording())])))[..., :3]
    written = np.flatnonzero((pixels[-25:] < 0.5).any((0, 2)))
    assert 0.94 < written.max() / pixels.shape[1] < 0.99


@pytest.mark.parametrize("high", [3.0, 500.0])
def test_axes_in_powers_are_labelled_with_numbers(high, monkeypatch):
    pytest.importorskip("matplotlib")
    picture = importlib.import_module("fusedlr.report.picture")
    figures = []
    stock = picture._figure
    monkeypatch.setattr(picture, "_figure", lambda *args: figures.append(stock(*args)) or figures[-1])
    picture.png([Run("run", recording(lambda a: a["grad_norm"].__setitem__(slice(3, 6), [0.1, high, 1.0])))])
    (norms,) = [axes for axes in figures[0].axes if axes.get_title() == "gradient norm"]
    assert norms.get_yscale() == "log"
    labels = [one.get_text() for one in norms.get_yticklabels(which="both") if one.get_text()]
    assert len(labels) >= 3
    for label in labels:
        float(label)


def test_mistakes_are_one_line(saved, tmp_path, capsys, monkeypatch):
    assert "cannot read nowhere.npz: No such file" in refused(capsys, "nowhere.npz")
    assert "3 files were given, and two are laid" in refused(capsys, saved, saved, saved)
    assert "x.pdf must end in .png or .html" in refused(capsys, saved, "--out", "x.pdf")
    assert f"--csv: {tmp_path} is a folder" in refused(capsys, saved, "--csv", tmp_path)
    cut = tmp_path / "cut.npz"
    cut.write_bytes(saved.read_bytes()[:5_000])
    assert "cut.npz is no recording that can be read: File is not a zip file" in refused(capsys, cut)
    Recording({name: array[:0] for name, array in healthy().items()}, names=NAMES, groups=GROUPS).save(cut)
    assert "cut.npz has no step" in refused(capsys, cut)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'fusedlr[plot]'" in refused(capsys, saved, "--out", "x.png")


def test_every_option_is_explained(capsys):
    with pytest.raises(SystemExit) as stopped:
        report("--help")
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    options = text[text.index("options:") :].split("\n  -")[2:]
    assert len(options) == 4
    assert all("(default:" in " ".join(option.split()) for option in options)


def test_the_terminal_needs_neither_torch_nor_matplotlib(saved):
    code = (
        "import sys; from fusedlr import cli; cli.main(['report', sys.argv[1]]); "
        "sys.exit(bool({'torch', 'matplotlib'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code, saved], stdout=subprocess.DEVNULL).returncode == 0


@pytest.mark.parametrize("steps", [1, 2])
def test_a_run_of_one_step_is_shown(steps, tmp_path):
    path = tmp_path / "x.npz"
    Recording({name: array[:steps] for name, array in healthy().items()}, names=NAMES, groups=GROUPS).save(
        path
    )
    assert report(path) == 0
