"""Contract: an attached model under DDP and every layout of FSDP2, on two processes, has the gradients of one process
that holds all the data: with labels alone, with a token loss and with a loss that couples tokens.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests import budgets
from tests.integrations.comparisons import worst
from tests.integrations.packages import need

need("transformers", "peft")

from tests.integrations.sharded import LAYOUTS, LOSSES, WORLD, on_one, on_ranks  # noqa: E402
from xloss.cli.spawn import World, run_ranks  # noqa: E402

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def by_rank() -> list[Any]:
    return run_ranks(on_ranks, world=World(WORLD, timeout=240.0))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", LAYOUTS)
def test_gradients_are_those_of_one_process(by_rank: list[Any], name: str, loss: str) -> None:
    want = on_one(LAYOUTS[name], loss)
    for rank, found in enumerate(by_rank):
        assert worst(found[name][loss], want) <= budgets.TRAINER_GRADIENT, f"rank {rank}"
