"""``mode="fused"`` of every registered policy loss and every form of cross-entropy, under the interpreter.

Contract: loss and gradients in float32 are those of ``mode="eager"`` in float64, to float32's rounding. A loss whose
formula a kernel knows runs it, with every choice of every field and beside KL and entropy; the others run theirs in
torch between two kernels. Which ran is asserted.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests import budgets
from tests.property import registry
from tests.property.registry import POLICIES, policy, policy_forms
from tests.property.world import Case, World
from xloss import CELossConfig
from xloss.losses.policies import policy_losses

WORLD = World()
TERMS = {"use_kl_loss": True, "kl_loss_coef": 0.2, "kl_loss_type": "k3", "entropy_coef": 0.1}
NOT_HERE = ("full", "kl", "mse", "low_var_kl")  # a second distribution is for chunk mode; other names of k1, k2, k3
STEP = {
    **{f"kl-{n}": c for n, c in registry.kl_forms().items() if n.split("-")[0] not in NOT_HERE},
    **{n: c for n, c in registry.step_forms().items() if not n.startswith("value")},
}
CROSS_ENTROPY = {
    n: c for n, c in registry.supervised_forms().items() if isinstance(c.make(), CELossConfig) and "=" not in n
}


@pytest.fixture
def kernel_calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether the kernel that knows loss formulas took each chunk it was offered."""
    from xloss.head import fused

    seen: list[bool] = []
    own = fused.loss_rows
    monkeypatch.setattr(fused, "loss_rows", lambda *a, **k: seen.append((out := own(*a, **k)) is not None) or out)
    return seen


def assert_fused(case: Case, **run: Any) -> None:
    want = WORLD.run(case, mode="eager")
    got = WORLD.run(case, dtype=torch.float32, mode="fused", **run)
    allowed = budgets.FUSED_RELATIVE[torch.float32]
    assert float((got.loss - want.loss).abs()) <= allowed * (1 + float(want.loss.abs()))
    for name, grad in want.grads.items():
        error = float((got.grads[name] - grad).abs().max()) / max(float(grad.abs().max()), 1e-3)
        assert error <= 2 * allowed, f"d {name}: {error:.2g}"


@pytest.mark.parametrize("name", policy_losses())
def test_policies(name: str, kernel_calls: list[bool]) -> None:
    for number, form in enumerate(policy_forms(name)):
        case = policy(form)
        cfg = case.make().policy_loss_cfg
        known = cfg.twin() is not None and cfg.couples() == "token"
        if number == 0 or known:
            kernel_calls.clear()
            assert_fused(case)
            assert any(kernel_calls) == known


@pytest.mark.parametrize("name", POLICIES)
def test_policies_with_every_term(name: str) -> None:
    assert_fused(policy(policy_forms(name)[0], **TERMS), chunk_size=5)


@pytest.mark.parametrize("case", STEP.values(), ids=STEP)
def test_terms_of_a_step(case: Case) -> None:
    assert_fused(case)


@pytest.mark.parametrize("case", CROSS_ENTROPY.values(), ids=CROSS_ENTROPY)
def test_cross_entropy(case: Case) -> None:
    assert_fused(case, chunk_size=5)
