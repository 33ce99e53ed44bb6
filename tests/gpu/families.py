"""Losses of the other families with their oracles, on the micro-batch of ``problems.py``."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from tests.gpu.lane import on_device
from tests.gpu.problems import LOSSES, VANILLA, Inputs, LossCase, ce_case, policy_case, rl_item
from tests.oracle import correction, grpo, head, preference, sequence
from xloss import (
    GRPOLossConfig,
    PreferenceLossConfig,
    PreferenceLossContextInputItem,
    RLLossContextInputItem,
    SoftCELossConfig,
    SoftCELossContextInputItem,
)

TARGETS = 3


def bounds_of(given: Inputs) -> list[int]:
    """Four sequences of different lengths, two pairs."""
    total = given.batch.labels.numel()
    return [0, total // 5, total // 2, 2 * total // 3, total]


def valid_of(given: Inputs) -> Tensor:
    return (given.batch.labels != -100).reshape(-1)


def _as_item(given: Inputs, **changed: Tensor) -> RLLossContextInputItem:
    return RLLossContextInputItem(**vars(rl_item(given)) | {name: on_device(x) for name, x in changed.items()})


# ---------------------------------------------------------------- K targets a token


def _targets(given: Inputs) -> tuple[Tensor, Tensor]:
    """Targets [1, T, K], one left out here and there, and their weights, of both signs."""
    labels, g = given.batch.labels, torch.Generator().manual_seed(2)
    targets = torch.randint(0, given.weight.shape[0], (*labels.shape, TARGETS), generator=g)
    targets[0, 2::5, 1] = -100
    return targets.masked_fill((labels == -100).unsqueeze(-1), -100), torch.randn(targets.shape, generator=g)


def _soft_terms(stats: head.Stats, given: Inputs) -> Tensor:
    targets, weights = _targets(given)
    return -(weights.double() * stats.logprobs * (targets != -100)).sum(-1) / given.count


def _soft_item(given: Inputs) -> SoftCELossContextInputItem:
    targets, weights = (on_device(x) for x in _targets(given))
    labels = on_device(given.batch.labels)
    return SoftCELossContextInputItem(shifted_labels=labels, target_tokens=targets, target_weights=weights)


# ---------------------------------------------------------------- whole sequences


def _advantages(given: Inputs) -> Tensor:
    """One for each sequence, that of its first token."""
    flat, bounds = given.batch.advantages.reshape(-1), torch.tensor(bounds_of(given))
    return flat[bounds[:-1]].repeat_interleave(bounds.diff()).reshape(given.batch.labels.shape)


def _sequence_case(policy: dict[str, Any]) -> LossCase:
    def terms(stats: head.Stats, given: Inputs) -> Tensor:
        assert given.batch.old is not None
        old, advantages = (x.reshape(-1).double() for x in (given.batch.old, _advantages(given)))
        spans = list(pairwise(bounds_of(given)))
        tokens = sequence.Tokens(stats.logprobs.reshape(-1), old, advantages, valid_of(given), spans)
        return sequence.per_token(tokens, policy) / given.count

    def item(given: Inputs) -> RLLossContextInputItem:
        return _as_item(given, advantages=_advantages(given))

    return LossCase(GRPOLossConfig, terms, {"policy_loss_cfg": policy}, item, local=False, bounds=bounds_of)


def _preference_case(**fields: Any) -> LossCase:
    objective = preference.Objective([{"loss_type": fields["loss_type"]}], fields["beta"], kl=0.25)
    paired = fields["loss_type"] not in preference.UNPAIRED

    def terms(stats: head.Stats, given: Inputs) -> Tensor:
        assert given.batch.ref is not None
        lp, ref, valid = stats.logprobs.reshape(-1), given.batch.ref.reshape(-1).double(), valid_of(given)
        reads, zero = [], lp.new_zeros(())
        for start, stop in pairwise(bounds_of(given)):
            kept = valid[start:stop]
            s, r = lp[start:stop][kept].sum(), ref[start:stop][kept].sum()
            reads.append(preference.Read(s, r, int(kept.sum()), zero, zero))
        (term,) = objective.terms
        if paired:
            return torch.stack([preference.pair(term, *reads[i : i + 2], objective) for i in (0, 2)]) / 2
        return torch.stack([preference.single(term, x, i % 2 == 0, objective) for i, x in enumerate(reads)]) / 4

    def item(given: Inputs) -> PreferenceLossContextInputItem:
        assert given.batch.ref is not None
        labels, ref = on_device(given.batch.labels), on_device(given.batch.ref)
        found = PreferenceLossContextInputItem(shifted_labels=labels, ref_logprobs=ref)
        if not paired:
            found.preferred = on_device(torch.tensor([True, False, True, False]))
            found.kl = on_device(torch.tensor([0.2, 0.3]))
        return found

    return LossCase(PreferenceLossConfig, terms, fields, item, local=False, bounds=bounds_of)


# ---------------------------------------------------------------- a sampler that is not the trainer


def _rollout(given: Inputs) -> Tensor:
    assert given.batch.old is not None
    return given.batch.old - 0.4 * torch.arange(given.batch.old.numel()).sin().reshape(given.batch.old.shape)


def _corrected_case(**fields: Any) -> LossCase:
    def terms(stats: head.Stats, given: Inputs) -> Tensor:
        assert given.batch.old is not None
        old, rollout = given.batch.old.reshape(-1), _rollout(given).reshape(-1)
        found, _ = correction.one(old, rollout, valid_of(given), bounds_of(given), fields)
        weights = (found.weight * found.kept).reshape(given.batch.labels.shape)
        batch, objective = replace(given.batch, is_weights=weights), grpo.Objective(VANILLA, head=given.head)
        return grpo.token_loss(stats, batch, objective, grpo.step_weights([batch], objective)[0])

    def item(given: Inputs) -> RLLossContextInputItem:
        return _as_item(given, rollout_logprobs=_rollout(given))

    settings = {"policy_loss_cfg": VANILLA, "rollout_correction": fields}
    return LossCase(GRPOLossConfig, terms, settings, item, bounds=bounds_of)


# clip ranges of sequences are narrow: their ratios stay near 1
_NARROW = {"cliprange_low": 0.02, "cliprange_high": 0.03}
FAMILIES: dict[str, LossCase] = {
    "focal": ce_case(focal_gamma=2.0),
    "dft": ce_case(token_scaling="dft"),
    "soft-ce": LossCase(
        SoftCELossConfig, _soft_terms, {"loss_reduction": "token"}, _soft_item, labels=lambda given: _targets(given)[0]
    ),
    "sapo": policy_case({"loss_type": "sapo", "tau_pos": 1.0, "tau_neg": 1.05}),
    "dppo_tv": policy_case({"loss_type": "dppo_tv", "delta_low": 0.01, "delta_high": 0.01}),
    "gspo": _sequence_case({"loss_type": "gspo", **_NARROW}),
    "gmpo": _sequence_case({"loss_type": "gmpo", "cliprange_low": 0.4, "cliprange_high": 0.4}),
    "dpo": _preference_case(loss_type="sigmoid", beta=0.1),
    "kto": _preference_case(loss_type="kto", beta=0.1),
    "corrected": _corrected_case(low=0.8, high=1.3),
    "corrected-sequences": _corrected_case(level="geometric", high=1.1),
}
ALL_LOSSES = LOSSES | FAMILIES
