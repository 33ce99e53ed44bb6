"""The demo's text: real source code from the user's own disk, cut into words, with a word-level vocabulary.

By default the text is Python's standard library, so that nothing is downloaded. A large vocabulary is the point: with
65,536 words the logits of 4,096 tokens fill 1 GiB, as they do in a real language model.
"""

from __future__ import annotations

import random
import re
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from xloss.cli.errors import CannotRun

# A word, one punctuation mark, or a line break with the indentation behind it.
TOKEN = re.compile(r"\w+|[^\w\s]|\n[ \t]*")
UNKNOWN = "<unk>"
MIN_CHARS = 4_000_000  # read on until the vocabulary is full and this much text is there ...
MAX_CHARS = 64_000_000  # ... but never more than this: a demo must start within seconds
_SKIP = {"site-packages", "dist-packages", "__pycache__", "lib2to3"}
_TESTS = {"test", "tests", "idle_test"}


@dataclass(frozen=True)
class Corpus:
    """A text as word ids. ``words[i]`` is the word with id ``i``; ``words[0]`` stands for every word left out."""

    source: str
    num_files: int
    num_chars: int
    num_types: int
    words: tuple[str, ...]
    ids: Tensor  # [N] int64, documents in a shuffled order

    @property
    def vocab_size(self) -> int:
        """Number of ids, padding included."""
        return len(self.words)

    @property
    def unknown_frac(self) -> float:
        """Share of the text's tokens that the vocabulary does not hold."""
        return float((self.ids == 0).double().mean())

    def split(self, held_out: float = 0.05) -> tuple[Tensor, Tensor]:
        """``(training ids, held-out ids)``; the held-out part is the end of the shuffled text."""
        cut = int(len(self.ids) * (1 - held_out))
        return self.ids[:cut], self.ids[cut:]


def load_corpus(
    files: Sequence[Path], vocab_size: int, seed: int = 0, tick: Callable[[], None] = lambda: None
) -> Corpus:
    """Read ``files``, or the standard library where there are none, and number its words by frequency.

    Args:
        files: Text files, UTF-8 (undecodable bytes are replaced).
        vocab_size: Number of ids. The rarest words become ``<unk>``; too few words are padded with unused ids.
        seed: Order of the documents.
        tick: Called after each file.

    Raises:
        OSError: a file of ``files`` cannot be read.
        CannotRun: the text has fewer than 2,000 tokens.
    """
    source = "text given" if files else "Python standard library"
    documents, counts, num_chars = _read(files, vocab_size, tick)
    if not files and num_chars < 100_000:  # a frozen or stripped Python ships no sources
        source, (documents, counts, num_chars) = "pydoc_data.topics", _tokenise(_pydoc_topics(), vocab_size)
    num_tokens = counts.total()
    if num_tokens < 2000:
        raise CannotRun(
            f"the text ({source}) has {num_tokens} tokens; the demo needs at least 2000. Give longer files."
        )
    words = vocabulary(counts, vocab_size)
    index = {word: i for i, word in enumerate(words)}
    random.Random(seed).shuffle(documents)
    ids = torch.tensor([index.get(token, 0) for document in documents for token in document])
    return Corpus(source, len(documents), num_chars, len(counts), words, ids)


def vocabulary(counts: Counter[str], size: int) -> tuple[str, ...]:
    """``size`` words: ``<unk>``, then the most frequent ones (ties by spelling), then unused padding."""
    ranked = sorted(counts, key=lambda word: (-counts[word], word))[: size - 1]
    return (UNKNOWN, *ranked, *(f"<unused-{i}>" for i in range(size - 1 - len(ranked))))


def _read(
    files: Sequence[Path], vocab_size: int, tick: Callable[[], None]
) -> tuple[list[list[str]], Counter[str], int]:
    def texts() -> Iterator[str]:
        for path in files or standard_library_files():
            yield path.read_text("utf-8", "replace")
            tick()

    return _tokenise(texts(), vocab_size, read_all=bool(files))


def _tokenise(
    texts: Iterable[str], vocab_size: int, read_all: bool = False
) -> tuple[list[list[str]], Counter[str], int]:
    documents: list[list[str]] = []
    counts: Counter[str] = Counter()
    num_chars = 0
    for text in texts:
        tokens = TOKEN.findall(text[: MAX_CHARS - num_chars])
        documents.append(tokens)
        counts.update(tokens)
        num_chars += min(len(text), MAX_CHARS - num_chars)
        enough = not read_all and len(counts) >= vocab_size - 1 and num_chars >= MIN_CHARS
        if enough or num_chars >= MAX_CHARS:
            break
    return documents, counts, num_chars


def standard_library_files() -> list[Path]:
    """The library's ``.py`` files, its own tests last: they are read only while the vocabulary is not yet full."""
    root = Path(sysconfig.get_path("stdlib"))
    found = [path for path in sorted(root.rglob("*.py")) if not _SKIP & set(path.relative_to(root).parts)]
    return sorted(found, key=lambda path: bool(_TESTS & set(path.relative_to(root).parts)))


def _pydoc_topics() -> list[str]:
    from pydoc_data.topics import topics

    return [topics[key] for key in sorted(topics)]
