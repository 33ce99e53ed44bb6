"""Golden cases, the oracle on trial.

Contract: tests/oracle gives the losses, gradients, weights, log-probs and metrics that the peers' own code gave, in
float64. An oracle that agrees with nobody else proves nothing.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.golden.cases import Case, cases, count_by_peer, differ, mismatch
from tests.oracle import ce, grpo, head

METRIC_NAMES = {
    "reduced_train_policy_ratio_abs_dev_mean": "ratio_abs_dev",
    "reduced_train_policy_kl1": "approx_kl_k1",
    "reduced_train_policy_kl3": "approx_kl_k3",
    "reduced_train_policy_clip_frac_low": "ratio_low_frac",
    "reduced_train_policy_clip_frac_high": "ratio_high_frac",
    "reduced_train_policy_ratio_max": "ratio_max",
    "reduced_train_policy_ratio_min": "ratio_min",
    "max_ratio": "ratio_max",
}


def _ids(case: Case) -> str:
    return case.id


def _check(case: Case, losses: list[torch.Tensor], leaves: list[torch.Tensor]) -> None:
    *hidden_grads, weight_grad = head.grads(torch.stack(losses).sum(), leaves)
    found = [mismatch(case, "loss", [x.item() for x in losses], torch.float64)]
    found += [mismatch(case, f"grad_hidden_{b}", g, torch.float64) for b, g in enumerate(hidden_grads)]
    found += [mismatch(case, "grad_weight", weight_grad, torch.float64)]
    assert not [f for f in found if f]


@pytest.mark.parametrize("case", [c for c in cases("ce") if "dtype" not in c.config], ids=_ids)
def test_ce(case: Case) -> None:
    *hidden, weight = leaves = head.leaves(*case.hidden, case.weight)
    options = head.Head(ignore_index=case.ignore_index)
    labels = [b.labels for b in case.batches]
    reduction = case.config.get("loss_reduction", "token")
    weights = ce.step_weights(labels, case.cu_seq_lens, reduction, case.loss_weight, case.ignore_index)
    scale = 1.0
    if case.is_sum:
        raw = case.loss_weight or [(y != case.ignore_index).double() for y in labels]
        scale = float(sum(w.double().sum() for w in raw))
    losses = [ce.loss(h, weight, y, w * scale, head=options) for h, y, w in zip(hidden, labels, weights, strict=True)]
    _check(case, losses, leaves)
    for b, w in enumerate(weights):
        if f"out_loss_weight_{b}" in case.recorded:
            assert mismatch(case, f"out_loss_weight_{b}", w, torch.float64) is None


@pytest.mark.parametrize("case", cases("policy"), ids=_ids)
def test_policy(case: Case) -> None:
    *hidden, weight = leaves = head.leaves(*case.hidden, case.weight)
    objective = grpo.Objective(case.policy, case.config.get("kl_loss_coef", 0.0), case.config.get("kl_loss_type"))
    weights = grpo.step_weights(case.batches, objective)
    if case.is_sum:
        weights = [w.times(grpo.num_tokens(case.batches)) for w in weights]
    steps = zip(hidden, case.batches, weights, strict=True)
    losses = [grpo.loss(h, weight, b, w, objective) for h, b, w in steps]
    _check(case, losses, leaves)
    if case.peer == "xtuner":
        lps = [head.token_stats(h, weight, b.labels).logprobs for h, b in zip(hidden, case.batches, strict=True)]
        policy = case.policy
        ours = grpo.metrics(lps, case.batches, policy["cliprange_low"], policy["cliprange_high"])
        for theirs, name in METRIC_NAMES.items():
            got, want = np.float64(ours[name]), np.float64(case.metrics["finalized"][theirs])
            assert differ(name, got, want, case.tolerance_for(torch.float64)) is None


@pytest.mark.parametrize("case", cases("logprob"), ids=_ids)
def test_logprob(case: Case) -> None:
    """XTuner gathers log p(token 0) at ignored positions, so the labels are clamped at 0 and nothing is ignored."""
    labels = case.batches[0].labels.clamp(min=0)
    stats = head.token_stats(case.hidden[0], case.weight, labels)
    assert mismatch(case, "out_logprobs", stats.logprobs, torch.float64) is None


def test_case_counts() -> None:
    """The table of cases by peer: nothing dropped out of the index."""
    assert dict(count_by_peer()) == {
        ("xtuner", "ce"): 17,
        ("xtuner", "grpo"): 24,
        ("xtuner", "logprob"): 2,
        ("tinker", "cross_entropy"): 3,
        ("tinker", "importance_sampling"): 3,
        ("tinker", "ppo"): 5,
        ("tinker", "cispo"): 4,
        ("tinker", "dro"): 4,
    }
