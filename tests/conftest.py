"""What holds for every test: one thread, fixed seeds, and no uninitialised memory that looks like numbers.

Poison: torch fills what `torch.empty` and its kin allocate with NaN (the largest value for integers), so an element
that nobody wrote shows up as a failure and not as yesterday's data.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "xloss",
    deadline=None,  # a shared machine stalls now and then
    max_examples=int(os.environ.get("XLOSS_TEST_EXAMPLES", "40")),
    derandomize="CI" in os.environ,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    print_blob=True,
)
settings.load_profile("xloss")


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    """Tensors here are tiny: a second thread costs more than it does."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(20260826)


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all(), "poison does not work on this build of torch"
    yield
    torch.use_deterministic_algorithms(False)
