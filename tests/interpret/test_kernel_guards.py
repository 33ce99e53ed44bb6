"""The lane's own guards work."""

from __future__ import annotations

import pytest
import torch

from xloss_kernels.row_stats import row_stats


def test_bfloat16_is_refused():
    with pytest.raises(AssertionError, match="bfloat16"):
        row_stats(torch.zeros(2, 8, dtype=torch.bfloat16), torch.tensor([0, 1]))


def test_empty_is_poisoned():
    assert torch.empty(3).isnan().all() and torch.empty_like(torch.zeros(3)).isnan().all()
