"""The tokenizer, a byte-level BPE of the corpus itself, and the corpus as token arrays; both cached."""

import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusedlr.demo.corpus import read_corpus
from fusedlr.demo.files import cache_entry, new_entry
from fusedlr.demo.progress import bar
from fusedlr.demo.settings import Settings

# ends every text, so that a block of tokens may hold several
END = "<|end|>"
PARTS = ("prose_train", "prose_held_out", "code_train", "code_held_out")
# texts encoded per call: enough to use all cores, few enough to move the bar
CHUNK = 64


@dataclass
class Data:
    """The cache entry's folder and, for each of PARTS, examples as a (examples, sequence) uint16 array."""

    folder: Path
    blocks: dict
    cached: bool

    @property
    def tokenizer_file(self) -> Path:
        """The tokenizer, as the tokenizers library writes it."""
        return self.folder / "tokenizer.json"


def prepare_data(settings: Settings) -> Data:
    """Read the corpus, train the tokenizer and tokenise, or take all that from the cache."""
    size = settings.size
    entry = cache_entry(
        settings.cache,
        "data",
        size=settings.size_name,
        python=platform.python_version(),
        vocabulary=size.vocabulary,
        corpus=size.corpus,
    )
    if not settings.fresh:
        arrays = _load(entry / "tokens.npz")
        if arrays is not None and (entry / "tokenizer.json").is_file():
            return Data(entry, _all_blocks(arrays, size.sequence), cached=True)
    prose, code = read_corpus(size.corpus)
    tokenizer = train_tokenizer(prose.train + code.train, size.vocabulary)
    texts = dict(zip(PARTS, (prose.train, prose.held_out, code.train, code.held_out), strict=True))
    arrays = tokenise(tokenizer, texts)
    _save(entry, tokenizer, arrays)
    return Data(entry, _all_blocks(arrays, size.sequence), cached=False)


def train_tokenizer(texts: list[str], vocabulary: int) -> Any:
    """A byte-level BPE tokenizer with `vocabulary` tokens, END among them, trained on `texts`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    with bar(label="training a tokenizer", total=len(texts)) as progress:

        def counted():
            for text in texts:
                yield text
                progress.update()

        tokenizer.train_from_iterator(counted(), trainer)
    return tokenizer


def tokenise(tokenizer: Any, texts: dict[str, list[str]]) -> dict:
    """Every list of `texts` as one array of token numbers, END after each text."""
    import numpy as np

    end = tokenizer.token_to_id(END)
    arrays = {}
    with bar(label="tokenising", total=sum(map(len, texts.values()))) as progress:
        for name, group in texts.items():
            numbers = []
            for start in range(0, len(group), CHUNK):
                chunk = group[start : start + CHUNK]
                for encoding in tokenizer.encode_batch(chunk):
                    numbers.extend(encoding.ids)
                    numbers.append(end)
                progress.update(len(chunk))
            arrays[name] = np.asarray(numbers, dtype=np.uint16)
    return arrays


def blocks(tokens: Any, sequence: int) -> Any:
    """`tokens` cut into rows of `sequence`, the incomplete last row dropped."""
    rows = len(tokens) // sequence
    return tokens[: rows * sequence].reshape(rows, sequence)


def _all_blocks(arrays, sequence):
    return {name: blocks(arrays[name], sequence) for name in PARTS}


def _load(path: Path) -> dict | None:
    """The arrays in `path`, None where it is missing or damaged."""
    import zipfile

    import numpy as np

    try:
        # numpy leaves a damaged file open if it opened it itself
        with open(path, "rb") as file, np.load(file) as stored:
            return {name: stored[name] for name in PARTS}
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile):
        return None


def _save(entry: Path, tokenizer: Any, arrays: dict) -> None:
    import numpy as np

    with new_entry(entry) as folder:
        tokenizer.save(str(folder / "tokenizer.json"))
        np.savez(folder / "tokens.npz", **arrays)
