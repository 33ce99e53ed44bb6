"""verl: any policy loss of xloss under a ``loss_mode``, and xloss's head behind ``use_fused_kernels``.

verl gives a policy loss padded log-probs and the counts of the global batch (``config.global_batch_info``), and adds
entropy bonus and KL penalty itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from xloss.adapters.given import checked, figures, local_loss, masked_labels, reduced_by
from xloss.errors import MissingFieldError, OptionError, unknown_name
from xloss.head.linear_logprobs import linear_logprobs
from xloss.losses.grpo import GRPOLossConfig

REDUCTIONS = {
    "token-mean": "token",
    "token-sum": "sum",
    "seq-mean-token-mean": "sample",
    "seq-mean-token-sum": "sample_sum",
    "seq-mean-token-sum-norm": "sample_sum_norm",
}
"""``loss_agg_mode`` and our ``loss_reduction``."""

_VERLS_OWN = {
    "use_kl_loss": "set actor.use_kl_loss=True",
    "entropy_coef": "set actor.entropy_coeff",
    "rollout_correction": "set algorithm.rollout_correction",
    "return_token_accuracy": "it has no logits there",
}


def policy_loss(config: GRPOLossConfig) -> Any:
    """A verl policy loss function that computes ``config``, to register with ``register_policy_loss``.

    Args:
        config: a policy loss; ``loss_agg_mode`` of verl's actor reduces it.

    Returns:
        ``fn(old_log_prob, log_prob, advantages, response_mask, loss_agg_mode, config, rollout_is_weights) -> (loss,
        metrics)``, tensors ``[B, S]``. The loss is this micro-batch's share of the global batch, times ``dp_size``.

    Raises:
        OptionError: ``config`` asks for what verl does itself, or for another reduction than ``loss_agg_mode``.
    """
    ours = checked(config, "verl", _VERLS_OWN)

    def fn(
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        loss_agg_mode: str = "token-mean",
        config: Any = None,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        if loss_agg_mode not in REDUCTIONS:
            raise OptionError(unknown_name("loss_agg_mode", loss_agg_mode, list(REDUCTIONS)))
        counts = {} if config is None else config.global_batch_info
        norm = (counts.get("loss_scale_factor") or response_mask.shape[-1]) if "norm" in loss_agg_mode else None
        fields = {
            "shifted_labels": masked_labels(response_mask),
            "advantages": advantages,
            "old_logprobs": old_log_prob,
            "is_weights": rollout_is_weights,
        }
        found = local_loss(reduced_by(ours, REDUCTIONS[loss_agg_mode], norm_length=norm), fields, log_prob)
        metrics = {
            name if "/" in name else f"actor/{name}": value.item()
            for name, value in figures(found.metrics, "verl").items()
        }
        return found.loss * _share(response_mask, loss_agg_mode, counts), metrics

    return fn


def _share(mask: Tensor, loss_agg_mode: str, counts: Any) -> Tensor | float:
    """What makes a mean over the micro-batch its part of the mean over the global batch, times ``dp_size``."""
    dp_size: float = counts.get("dp_size") or 1
    if loss_agg_mode == "token-sum":
        return dp_size
    by_token = loss_agg_mode == "token-mean"
    name = "batch_num_tokens" if by_token else "global_batch_size"
    given = counts.get(name)
    if given is None:
        if dp_size > 1:
            raise MissingFieldError(f"config.global_batch_info[{name!r}] is None with dp_size={dp_size}")
        return dp_size
    mask = mask != 0
    return (mask.sum() if by_token else mask.any(-1).sum()) / given * dp_size


def register(name: str, config: GRPOLossConfig) -> None:
    """Make ``config`` a ``loss_mode`` of verl: ``actor_rollout_ref.actor.policy_loss.loss_mode=<name>``.

    Call it in a module that every worker imports: ``actor_rollout_ref.model.external_lib=<module>``.

    Raises:
        OptionError: verl has a loss of that name, or as ``policy_loss`` says.
    """
    from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY, register_policy_loss

    if name in POLICY_LOSS_REGISTRY:
        raise OptionError(f"verl has a policy loss {name!r} already; choose another name")
    register_policy_loss(name)(policy_loss(config))


class LinearForPPO(torch.nn.Module):
    """Stands in for verl's ``FusedLinearForPPO``: log-probs and entropy of hidden states, both with gradient."""

    def __init__(self, chunk_size: int = 512, impl_backend: str = "torch") -> None:
        super().__init__()
        if impl_backend != "torch":
            raise OptionError(f"fused_kernels_backend must be 'torch' for xloss to stand in; got {impl_backend!r}")

    def forward(
        self, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Float32 log-probs of ``input_ids`` and entropies, in its shape."""
        stats = linear_logprobs(hidden_states, vocab_weights, input_ids, temperature=temperature, return_entropy=True)
        assert stats.entropy is not None
        return stats.logprobs, stats.entropy


def use_xloss_head() -> None:
    """Put xloss's head behind verl's ``use_fused_kernels`` with ``fused_kernel_options.impl_backend=torch``.

    Every architecture that verl patches then takes log-probs and entropies from it. Call it where ``register`` is.
    """
    from verl.utils.experimental import torch_functional

    torch_functional.FusedLinearForPPO = LinearForPPO
