"""What the demo keeps: its corpus, its cache, its tokens and its base model."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fusedlr.demo import base, corpus, files, tokens


def test_split_depends_on_names_alone():
    names = [f"package/module_{number}.py" for number in range(2000)]
    # binomial: 200 expected, standard deviation 13
    assert 150 < sum(map(corpus.is_held_out, names)) < 250
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


def library(root):
    for number in range(60):
        text = f'"""Docstring of the module with number {number}, for the prose."""\n'
        (root / f"module_{number}.py").write_text(text + f"value = {number}\n" * 40)
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


def test_entry_appears_whole_or_not_at_all_and_stays_until_its_successor_is_complete(tmp_path):
    entry = tmp_path / "demo" / "data-1"
    with pytest.raises(KeyboardInterrupt), files.new_entry(entry) as folder:
        (folder / "half").write_text("half")
        raise KeyboardInterrupt
    assert list(entry.parent.iterdir()) == []
    with files.new_entry(entry) as folder:
        (folder / "a").write_text("1")
        assert not entry.exists()
    with pytest.raises(OSError, match="disk full"), files.new_entry(entry) as folder:
        (folder / "a").write_text("2")
        raise OSError("disk full")
    assert (entry / "a").read_text() == "1"
    with files.new_entry(entry) as folder:
        (folder / "b").write_text("3")
    assert [path.name for path in entry.iterdir()] == ["b"]
    assert [path.name for path in entry.parent.iterdir()] == ["data-1"]


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


@pytest.fixture
def small_corpus(monkeypatch):
    """A corpus of a few kilobytes; counts how often it is read."""
    pytest.importorskip("tokenizers")
    calls = []

    def read(size):
        calls.append(size)
        words = ["the optimizer updates the parameters " * 200]
        return corpus.Split(words * 3, words), corpus.Split(["x = f(y)\n" * 300] * 3, ["z = g(y)\n" * 300])

    monkeypatch.setattr(tokens, "read_corpus", read)
    return calls


def test_tokens_are_cached(small_corpus, resolve):
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
    settings = resolve("--quick")
    stored = tokens.prepare_data(settings).folder / "tokens.npz"
    stored.write_bytes(stored.read_bytes()[:1000])
    assert not tokens.prepare_data(settings).cached
    assert tokens.prepare_data(settings).cached


def test_interrupted_tokenising_leaves_no_entry(small_corpus, resolve, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("numpy.savez", interrupted)
    settings = resolve("--quick")
    with pytest.raises(KeyboardInterrupt):
        tokens.prepare_data(settings)
    assert list((settings.cache / "demo").iterdir()) == []


def test_tokenizer_is_reversible():
    pytest.importorskip("tokenizers")
    tokenizer = tokens.train_tokenizer(["def f(x):\n    return x\n" * 50], 300)
    text = "def g(ü):\n\treturn  2\n"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    arrays = tokens.tokenise(tokenizer, {"a": [text, text]})
    assert (arrays["a"] == tokenizer.token_to_id(tokens.END)).sum() == 2


def test_damaged_base_is_not_loaded(tmp_path):
    stored = base.Base({"w": torch.ones(2)}, 7.0, 4.0, 5.0, cached=False)
    base._save(tmp_path / "base", stored)
    loaded = base._load(tmp_path / "base")
    assert loaded.cached and loaded.prose == 4.0 and loaded.weights["w"].tolist() == [1.0, 1.0]
    path = tmp_path / "base" / "weights.pt"
    path.write_bytes(path.read_bytes()[:200])
    assert base._load(tmp_path / "base") is None
    assert base._load(tmp_path / "nothing") is None
