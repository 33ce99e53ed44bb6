"""Vocabulary parallelism over two and three processes (gloo), one of which may hold no row of the head.

Contract: every loss, in every plan, gives every rank the loss, the metrics and the hidden gradient of one process with
the whole head, and each rank the gradients of its rows. The reference is one process in eager mode in float64, which
the tests of properties hold to the oracles. All ranks see the same bits.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from tests.distributed import vocab_ranks
from tests.distributed.vocab_ranks import SPLITS, as_result, pairs
from tests.property.registry import PLAIN
from tests.property.same import assert_same
from tests.property.world import WORLD

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """What the ranks of each split saw."""
    return {
        split: vocab_ranks.spawn(
            tmp_path_factory.mktemp(split), len(SPLITS[split]), {"losses": partial(vocab_ranks.losses, split)}
        )
        for split in SPLITS
    }


@pytest.mark.parametrize("split, name, run", [(split, *pair) for split in SPLITS for pair in pairs(split)])
def test_every_loss_is_one_process(seen: dict[str, list[Any]], split: str, name: str, run: str) -> None:
    ranks = [r["losses"][name, run] for r in seen[split]]
    assert_same(as_result(ranks, SPLITS[split]), WORLD.run(PLAIN[name], mode="eager"))
    for other in ranks[1:]:
        assert torch.equal(other["loss"], ranks[0]["loss"])
        assert torch.equal(other["grads"]["hidden"], ranks[0]["grads"]["hidden"])
        assert torch.equal(other["info"].logprobs, ranks[0]["info"].logprobs)
