"""``accumulate_into_main_grad`` on the kernels, with chunks of logits and without any. Contract: tests/unit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests import budgets
from tests.unit.test_main_grad import check_sum


@pytest.mark.parametrize("plan", ["one_pass", "two_pass"])
@pytest.mark.parametrize("how", [{"chunk_size": 9}, {"logits_budget": 0, "chunk_size": 9}])
@pytest.mark.parametrize("dtype", budgets.FUSED_RELATIVE, ids=["fp32", "fp16"])
def test_what_is_added(plan: str, how: dict[str, Any], dtype: torch.dtype) -> None:
    check_sum({"mode": "fused", "plan": plan, **how}, dtype, True, budgets.FUSED_RELATIVE[torch.float32])
