"""A `Recording` is what it was made of, comes back from its file, and refuses what is not one in words."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from recordings import GROUPS, NAMES, PEAK, SCHEDULE, STEPS, healthy, recording

import fusedlr
from fusedlr.recorded import FORMAT, RecordedGroup, Recording


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "run.npz"
    recording().save(path)
    return path


def members(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {info.filename: archive.read(info) for info in archive.infolist()}


def rewrite(path: Path, changed: dict[str, bytes | None], compression: int = zipfile.ZIP_STORED) -> None:
    """The same file but for some members; None removes one."""
    kept = {**members(path), **changed}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in kept.items():
            if data is not None:
                archive.writestr(name, data)


def as_npy(array: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.asarray(array), **options)
    return buffer.getvalue()


def about(path: Path, **changed: Any) -> bytes:
    """The member that says what the arrays are of, with some of it changed."""
    text = np.lib.format.read_array(io.BytesIO(members(path)["about.npy"])).tobytes()
    return as_npy(np.frombuffer(json.dumps({**json.loads(text), **changed}).encode(), np.uint8))


def refused(path: Path) -> str:
    with pytest.raises(ValueError) as refusal:
        Recording.load(path)
    assert str(refusal.value).startswith(f"{path} is no recording that can be read: ")
    return str(refusal.value)


def assert_same(a: Recording, b: Recording) -> None:
    assert list(a) == list(b)
    for key, value in a.items():
        if isinstance(value, tuple):
            assert value == b[key]
        else:
            assert value.dtype == b[key].dtype
            np.testing.assert_array_equal(value, b[key])


# what it is


def test_it_is_a_mapping_of_what_it_was_made_of():
    made = recording()
    assert made["names"] == NAMES and made["groups"] == GROUPS and made["scopes"] == (None,)
    for key, array in healthy().items():
        np.testing.assert_array_equal(made[key], array)
    assert len(made) == len(dict(made)) == 12
    assert repr(made) == f"<Recording of {STEPS} steps, from 0 to {STEPS - 1}, {len(NAMES)} tensors>"
    assert made == made and made != recording()


def test_planned_is_what_the_schedules_give():
    by_hand = (GROUPS[0], RecordedGroup("by hand", PEAK))
    planned = recording(groups=by_hand).planned()
    assert planned[:, 0].tolist() == [SCHEDULE.lr_at(k, PEAK) for k in range(STEPS)]
    assert np.isnan(planned[:, 1]).all()


def test_arrays_of_scopes_have_one_axis_or_two():
    def two(arrays):
        for name in ("grad_norm", "coef", "limit", "skipped"):
            arrays[name] = np.stack([arrays[name]] * 2, axis=1)

    groups = [RecordedGroup("a", PEAK, SCHEDULE, "a"), RecordedGroup("b", PEAK, SCHEDULE, 1)]
    assert recording(two, groups=groups, scopes=["a", 1]).by_scope("coef").shape == (STEPS, 2)
    assert recording().by_scope("coef").shape == (STEPS, 1)


@pytest.mark.parametrize(
    ("change", "values", "message"),
    [
        (lambda a: a.pop("coef"), {}, "arrays lacks 'coef'"),
        (lambda a: a.update(loss=1), {}, "arrays has an unknown 'loss'"),
        (lambda a: a.update(lr=a["lr"][:, 0]), {}, r"lr has shape \(400,\), expected \(steps, groups\)"),
        (lambda a: a.update(coef=a["coef"][:9]), {}, r"coef has shape \(9,\), expected \(steps, scopes\)"),
        (lambda a: a.update(step=a["k"]), {}, r"step has shape \(400, 2\), expected \(steps,\)"),
        (lambda a: a.update(step=a["step"] * 0), {}, "must count up from 0"),
        (lambda a: a.update(step=a["step"] - 1), {}, "must count up from 0"),
        (lambda a: a.update(skipped=a["coef"]), {}, "skipped has values of type float64"),
        (lambda a: a.update(lr=a["lr"].astype(object)), {}, "lr has values of type object"),
        (None, {"names": NAMES[:-1]}, r"tensor_grad_norm has shape \(400, 32\), expected \(steps, names\)"),
        (None, {"names": (*NAMES[:-1], NAMES[0])}, "twice"),
        (None, {"names": (*NAMES[:-1], "\x1b[2J")}, r"names\[31\]='\\x1b\[2J' is not a text that"),
        (None, {"names": "abc" * 16}, "is not a sequence"),
        (None, {"scopes": ["a"]}, r"groups\[0\] is in scope None, and scopes=\('a',\)"),
        (None, {"scopes": [None, "\n"]}, r"scopes\[1\]='\\n' is not a text"),
        (None, {"scopes": [None, 0.5]}, r"scopes\[1\]=0.5 is not an integer"),
        (lambda a: a.update(step=np.array(0)), {}, r"step has shape \(\), expected \(steps,\)"),
        # one axis is for scopes alone, and for a single one
        (
            lambda a: a.update(lr=a["lr"][:, 0], k=a["k"][:, :1]),
            {"groups": GROUPS[:1]},
            r"lr has shape \(400,\), expected \(steps, groups\)",
        ),
        (None, {"scopes": [None, "a"]}, r"grad_norm has shape \(400,\), expected \(steps, scopes\)"),
        (None, {"scopes": [None, None]}, r"scopes=\[?\(?None, None\]?\)? has one of them twice"),
        (None, {"scopes": []}, r"groups\[0\] is in scope None, and scopes=\(\)"),
        (None, {"groups": []}, "groups needs at least one"),
        (None, {"groups": ["lora_A"]}, r"groups\[0\]='lora_A' is not a RecordedGroup"),
    ],
)
def test_what_does_not_fit_is_refused(change, values, message):
    with pytest.raises(ValueError, match=message):
        recording(change, **values)


def test_a_group_is_checked():
    with pytest.raises(ValueError, match="name=3 is not a text"):
        RecordedGroup(3, PEAK)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="peak=-1"):
        RecordedGroup("a", -1)
    with pytest.raises(TypeError, match="schedule='cosine' is not a"):
        RecordedGroup("a", PEAK, "cosine")  # type: ignore[arg-type]


# its file


def test_it_comes_back_from_its_file(saved):
    assert_same(recording(), Recording.load(saved))
    # without tensors, without steps, with a table, by hand, with scopes of all kinds
    arrays = {
        name: array[:0, ..., :0] if name.startswith("tensor") else array[:0]
        for name, array in healthy().items()
    }
    groups = [RecordedGroup("a", 0, fusedlr.table([0.5, 1])), RecordedGroup("b", PEAK, scope="x")]
    for name in ("grad_norm", "coef", "limit", "skipped"):
        arrays[name] = np.stack([arrays[name]] * 3, axis=1)
    small = Recording(arrays, groups=groups, scopes=[None, "x", 1])
    small.save(saved)
    assert_same(small, Recording.load(saved))
    assert repr(Recording.load(saved)) == "<Recording of 0 steps, 0 tensors>"


def test_numpy_reads_the_file_without_pickle(saved):
    with np.load(saved, allow_pickle=False) as archive:
        np.testing.assert_array_equal(archive["lr"], recording()["lr"])


def test_other_byte_orders_and_layouts_are_the_same_numbers(saved):
    swapped = np.asfortranarray(healthy()["tensor_grad_norm"].astype(">f4"))
    rewrite(saved, {"tensor_grad_norm.npy": as_npy(swapped)})
    assert_same(recording(), Recording.load(saved))


def test_a_write_that_fails_leaves_the_old_file(saved, monkeypatch):
    before = saved.read_bytes()
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("no space")))
    with pytest.raises(OSError, match="no space"):
        recording().save(saved)
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_a_level_that_is_not_resolved_is_not_saved(tmp_path):
    schedule = fusedlr.cosine(0, 10, min_lr=1e-5)
    with pytest.raises(ValueError, match="has an absolute level"):
        recording(groups=[GROUPS[0], RecordedGroup("a", PEAK, schedule)]).save(tmp_path / "x.npz")
    assert not list(tmp_path.iterdir())


def test_a_newer_format_is_refused_in_words(saved):
    rewrite(saved, {"about.npy": about(saved, format=FORMAT + 1)})
    assert f"its format is {FORMAT + 1}, and this fusedlr reads up to {FORMAT}: install" in refused(saved)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"format": None}, "format=None is not an integer"),
        ({"format": 0}, "format=0 must be at least 1"),
        ({"names": "abc"}, "names='abc' is not a list"),
        ({"names": [["a"]] * 32}, "names[0]=['a'] is not a text"),
        ({"scopes": [[]]}, "scopes[0]=[] is not an integer"),
        ({"groups": [3]}, "3 is not a group"),
        ({"groups": [{"name": "a", "peak": 1, "scope": None}]}, "is not a group"),
        (
            {"groups": [{"name": "a", "peak": "x", "scope": None, "schedule": None}]},
            "peak='x' is not a number",
        ),
        ({"groups": [{"name": "a", "peak": 1, "scope": None, "schedule": [1]}]}, "not a schedule in numbers"),
    ],
)
def test_what_the_file_says_of_itself_is_checked(saved, changed, message):
    rewrite(saved, {"about.npy": about(saved, **changed)})
    assert message in refused(saved)


HEADER = "{'descr': '<f8', 'fortran_order': False, 'shape': (%s,), }"


def with_header(header: str) -> bytes:
    data = header.encode()
    return b"\x93NUMPY\x01\x00" + len(data).to_bytes(2, "little") + data


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"about.npy": None}, "it has no about"),
        ({"coef.npy": None}, "it has no coef"),
        ({"about.npy": as_npy(np.frombuffer(b"[]", np.uint8))}, "about=[] is not a JSON object"),
        ({"about.npy": as_npy(np.frombuffer(b"[" * 100_000, np.uint8))}, ""),
        ({"about.npy": as_npy(np.frombuffer(b"\xff\xfe\xfd", np.uint8))}, ""),
        ({"coef.npy": b""}, ""),
        ({"coef.npy": b"not numpy's"}, ""),
        ({"coef.npy": as_npy(np.ones(STEPS), version=(3, 0))}, "coef is in a form that is not read here"),
        # a petabyte, and nothing of it
        ({"coef.npy": with_header(HEADER % 10**14)}, "coef holds 0 bytes, not an array of float64"),
        ({"coef.npy": with_header(HEADER % "-3, -5")}, ""),
        ({"coef.npy": with_header("(" * 9_000)}, ""),
        ({"coef.npy": with_header("__import__('os').abort()")}, ""),
        ({"coef.npy": as_npy(np.array([{}], object), allow_pickle=True)}, "not an array of object"),
        ({"coef.npy": with_header(HEADER.replace("<f8", "|O") % 1) + bytes(8)}, "not an array of object"),
        ({"lr.npy": as_npy(np.array([["a"]]))}, "lr has values of type <U1"),
    ],
)
def test_arrays_that_are_none_are_refused(saved, changed, message):
    rewrite(saved, changed)
    assert message in refused(saved)


def test_a_file_that_would_unpack_to_more_is_refused(saved):
    rewrite(saved, {}, zipfile.ZIP_DEFLATED)
    assert "about is compressed or encrypted" in refused(saved)


def test_a_file_that_says_it_is_encrypted_is_refused(saved):
    # the flags of the first entry in the list of members
    whole = bytearray(saved.read_bytes())
    whole[whole.index(b"PK\x01\x02") + 8] |= 1
    saved.write_bytes(whole)
    assert "about is compressed or encrypted" in refused(saved)


def test_a_file_cut_anywhere_or_with_a_wrong_bit_is_refused_or_whole(saved):
    whole = saved.read_bytes()
    for size in [0, 1, 100, *np.linspace(200, len(whole) - 1, 40).astype(int).tolist()]:
        saved.write_bytes(whole[:size])
        refused(saved)
    random = np.random.default_rng(0)
    for place in random.integers(0, len(whole), 200).tolist():
        saved.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        try:
            # a bit of a date, say
            assert_same(recording(), Recording.load(saved))
        except ValueError as refusal:
            assert "is no recording that can be read: " in str(refusal)


def test_files_of_others_are_refused(tmp_path):
    path = tmp_path / "x"
    for content in (b"", b"text", b"\x93NUMPY", os.urandom(5_000), b"PK\x03\x04" * 500):
        path.write_bytes(content)
        refused(path)
    with path.open("wb") as file:
        np.savez(file, weights=np.ones(3))
    assert "it has no about" in refused(path)
    with pytest.raises(OSError):
        Recording.load(tmp_path / "missing")


def test_without_numpy_it_says_so_and_without_torch_it_works(saved):
    code = (
        "import sys; sys.modules[{!r}] = None; from fusedlr.recorded import Recording; Recording.load({!r})"
    )
    run = [sys.executable, "-c", code.format("numpy", str(saved))]
    error = subprocess.run(run, stderr=subprocess.PIPE, text=True).stderr
    assert error.endswith("ImportError: a recording needs numpy: pip install numpy\n")
    assert subprocess.run([sys.executable, "-c", code.format("torch", str(saved))]).returncode == 0
