"""Liger-Kernel: chunked GRPO, scaled CE (a loop without a Hopper GPU), fused linear CE and Triton GRPO (CUDA)."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from benchmarks.cases import Batch, Case
from benchmarks.losses import CISPO_HIGH, CLIP
from benchmarks.providers.base import Prepared, Provider, Result, backward, compose, leaves, needs

_POLICY = {  # what Liger calls our losses; token mean is its "dapo"
    "grpo": {"loss_type": "dapo", "epsilon_low": CLIP, "epsilon_high": CLIP},
    "cispo": {"loss_type": "cispo", "epsilon_high": CISPO_HIGH},
    "gspo": {
        "loss_type": "dapo",
        "epsilon_low": CLIP,
        "epsilon_high": CLIP,
        "importance_sampling_level": "sequence",
    },
}


def _chunked_grpo(case: Case, batch: Batch) -> Prepared:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    compiled = batch.hidden.is_cuda  # its default; on a CPU compiling needs a C++ compiler
    loss_fn = LigerFusedLinearGRPOLoss(
        beta=0.0,
        use_ref_model=False,
        compiled=compiled,
        **_POLICY[case.loss_name],
    )
    t = batch.tokens
    ids, mask = batch.by_sequence(t.labels.clamp(min=0)), batch.by_sequence((t.weight > 0).float())
    old = batch.by_sequence(t.old)

    def run() -> Result:
        hidden, weight = leaves(case, batch)
        loss, _ = loss_fn(
            batch.by_sequence(hidden), weight, ids, mask, batch.sequence_advantages, old_per_token_logps=old
        )
        return backward(loss, hidden, weight)

    return Prepared(run, "one sequence a chunk, 4096 words at a time", batch.sequence_length)


def _flce(case: Case, batch: Batch) -> Prepared:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss_fn = LigerFusedLinearCrossEntropyLoss()

    def run() -> Result:
        hidden, weight = leaves(case, batch)
        return backward(loss_fn(weight, hidden, batch.tokens.labels), hidden, weight)

    return Prepared(run, "its own chunks")


def _scaled_ce(case: Case, batch: Batch) -> Prepared:
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction as Function

    labels = batch.tokens.labels

    def logprobs_of(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        out = Function.apply(hidden, weight, labels, return_entropy=case.loss.entropy)
        return (-out[0], out[1]) if case.loss.entropy else (-out, None)

    return Prepared(compose(case, batch, logprobs_of), "logits computed twice")


def _triton_grpo(case: Case, batch: Batch) -> Prepared:
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    known = dict(_POLICY[case.loss_name])
    clip = {"eps_low": known.pop("epsilon_low", CLIP), "eps_high": known.pop("epsilon_high")}
    t = batch.tokens
    tensors: dict[str, Any] = {
        "old_logp": batch.by_sequence(t.old).contiguous(),
        "ref_logp": None,
        "completion_ids": batch.by_sequence(t.labels.clamp(min=0)).contiguous(),
        "advantages": batch.sequence_advantages,
        "completion_mask": batch.by_sequence(t.weight > 0).int().contiguous(),
    }

    def run() -> Result:
        hidden, weight = leaves(case, batch)
        one_more = F.pad(batch.by_sequence(hidden), (0, 0, 0, 1))  # it wants the logits of L + 1 positions
        loss, _ = triton_grpo_loss(
            F.linear(one_more, weight), temperature=1.0, beta=0.0, reduce=True, **clip, **known, **tensors
        )
        return backward(loss, hidden, weight)

    return Prepared(run, "all logits", case.shape.num_tokens)


LIGER_GRPO = Provider("Liger chunked GRPO", _chunked_grpo, needs("liger_kernel.chunked_loss", losses=tuple(_POLICY)))
LIGER_FLCE = Provider("Liger fused linear CE", _flce, needs("liger_kernel.transformers", cuda=True, losses=("ce",)))
LIGER_SCALED_CE = Provider("Liger scaled CE", _scaled_ce, needs("liger_kernel.ops"), default_on=("cuda",))
LIGER_TRITON_GRPO = Provider(
    "Liger Triton GRPO", _triton_grpo, needs("liger_kernel.transformers", cuda=True, losses=tuple(_POLICY))
)
