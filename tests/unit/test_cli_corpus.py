"""Corpus, rollouts and sizes of the demo.

Contract: a vocabulary has exactly the size asked for, <unk> first, then words by frequency, then padding; every id of a
corpus is inside it; advantages are normalised inside their group; a demo too large for the memory there is gets smaller
and says so.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from tests import budgets
from xloss.cli.corpus import load_corpus, standard_library_files, vocabulary
from xloss.cli.errors import CannotRun
from xloss.cli.options import DemoOptions, choose_sizes, needed_bytes
from xloss.cli.rollouts import GROUP, batch_shape, group_advantages


def test_vocabulary_is_ranked_and_padded() -> None:
    words = vocabulary(Counter({"b": 3, "a": 3, "c": 9}), 65536)
    assert words[:5] == ("<unk>", "c", "a", "b", "<unused-0>")
    assert len(words) == len(set(words)) == 65536


def test_vocabulary_drops_the_rarest() -> None:
    assert vocabulary(Counter({"x": 5, "y": 1, "z": 2}), 3) == ("<unk>", "x", "z")


def test_corpus_of_given_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one two two\n    three " * 300)
    (tmp_path / "b.txt").write_bytes(b"caf\xe9 " * 900)  # not UTF-8: replaced, not refused
    ticks: list[int] = []
    corpus = load_corpus([tmp_path / "a.txt", tmp_path / "b.txt"], 4, tick=lambda: ticks.append(1))
    assert corpus.vocab_size == 4
    assert corpus.words == ("<unk>", "caf", "\ufffd", "two")
    assert corpus.num_files == len(ticks) == 2
    assert corpus.ids.min() == 0
    assert corpus.ids.max() == 3
    assert corpus.unknown_frac == pytest.approx(900 / (1500 + 1800), abs=budgets.FIGURE_SHARE)
    train, held_out = corpus.split(0.25)
    assert len(train) + len(held_out) == len(corpus.ids)


def test_too_little_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("too short")
    with pytest.raises(CannotRun, match="2 tokens"):
        load_corpus([path], 100)


def test_library_tests_are_read_last() -> None:
    in_tests = [bool({"test", "tests", "idle_test"} & set(path.parts)) for path in standard_library_files()]
    assert len(in_tests) > 300
    assert in_tests == sorted(in_tests)


def test_advantages_are_normalised_in_groups() -> None:
    rewards = torch.rand(3 * GROUP, generator=torch.Generator().manual_seed(0))
    rewards[:GROUP] = 0.5  # all equal: no signal, and no division by 0
    groups = group_advantages(rewards).view(3, GROUP)
    assert groups[0].abs().max() == 0
    assert groups.mean(1).abs().max() < 1e-5
    assert (groups[1:].std(1) - 1).abs().max() < 1e-3


@pytest.mark.parametrize("tokens", [64, 100, 512, 1000, 4096, 5000])
def test_batch_fits_the_tokens(tokens: int) -> None:
    prompts, length = batch_shape(tokens)
    assert tokens // 2 < prompts * length * GROUP <= tokens


def test_demo_shrinks_when_memory_is_short() -> None:
    asked = DemoOptions(device="cpu")
    sizes, notes = choose_sizes(asked, free=64 << 30)
    assert (sizes.tokens, sizes.vocab_size, notes) == (4096, 65536, [])
    sizes, notes = choose_sizes(asked, free=2 << 30)
    assert sizes.tokens < 4096
    assert needed_bytes(sizes) < 2 << 30
    assert "--tokens 4096 ->" in notes[0]
    with pytest.raises(CannotRun, match=r"0\.2 GiB"):
        choose_sizes(asked, free=200 << 20)


def test_given_sizes_win_over_quick() -> None:
    sizes, _ = choose_sizes(DemoOptions(device="cpu", quick=True, steps=3), free=64 << 30)
    assert (sizes.steps, sizes.tokens) == (3, 1024)
