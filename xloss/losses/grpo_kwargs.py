"""What a policy loss is given for one micro-batch, and what calibration makes of it."""

from __future__ import annotations

from typing import Annotated

from torch import Tensor

from xloss.losses.model import BaseLossContextInputItem, BaseLossKwargs, PerBatch, PerToken, TokenBatch


class _PolicyFields(TokenBatch):
    advantages: Annotated[Tensor, PerToken(pad=0.0)]
    old_logprobs: Annotated[Tensor | None, PerToken(pad=0.0)] = None
    ref_logprobs: Annotated[Tensor | None, PerToken(pad=0.0)] = None
    rollout_logprobs: Annotated[Tensor | None, PerToken(pad=0.0)] = None
    is_weights: Annotated[Tensor | None, PerToken(pad=1.0)] = None
    group_ids: Annotated[Tensor | None, PerToken(pad=0)] = None
    rewards: Annotated[Tensor | None, PerToken(pad=0.0)] = None
    returns: Annotated[Tensor | None, PerToken(pad=0.0)] = None
    old_values: Annotated[Tensor | None, PerToken(pad=0.0)] = None
    ref_hidden_states: Annotated[Tensor | None, PerToken(pad=0.0, trailing=True, head_only=True)] = None


class RLLossContextInputItem(_PolicyFields, BaseLossContextInputItem):
    """One micro-batch of rollouts. All tensors but ``ref_hidden_states`` have the shape of ``shifted_labels``.

    Args:
        advantages: per token; the same for all tokens of a response in GRPO.
        old_logprobs: of the policy at the start of the step; ``None``: ``rollout_logprobs`` if given and no
            ``rollout_correction`` wants them, else on-policy (the current ones, detached).
        ref_logprobs: of the frozen reference, for the KL penalty.
        rollout_logprobs: as the sampler reported them.
        is_weights: constant weight on the policy term, correcting sampler against trainer.
        group_ids: number of each token's prompt, the same on all ranks; for losses and reductions over prompts.
        rewards: of the token's answer; tells which are positive. ``None``: those of positive advantage.
        returns: what the critic's values should be.
        old_values: of the critic at the start of the step, for ``value_clip``.
        ref_hidden_states: ``[.., H2]`` of the frozen reference, for ``kl_loss_type="full"``.
    """


class GRPOLossKwargs(_PolicyFields, BaseLossKwargs):
    """The item's tensors, and weights that hold the global denominator.

    Args:
        loss_mask: tokens that take part, where those with a label are not all; ``None``: they are.
        rollout_weights: of the rollout correction, where the batch decides them.
        policy_loss_weight: ``w is_weights rollout_weights``. kl_loss_weight: ``w kl_loss_coef``. entropy_loss_weight:
            ``w entropy_coef``. value_loss_weight: ``w value_loss_coef``. nll_loss_weight: of ``-logprobs``. All 0 at
            tokens that take no part.
        global_grad_tokens: valid tokens of the global batch, 0-d.
        gradient_factor: in every weight, for what the training engine does to gradients, 0-d.
    """

    loss_mask: Annotated[Tensor | None, PerToken(pad=0)] = None
    rollout_weights: Annotated[Tensor | None, PerToken(pad=0.0)] = None
    policy_loss_weight: Annotated[Tensor | None, PerToken(pad=0.0, weight=True)] = None
    kl_loss_weight: Annotated[Tensor | None, PerToken(pad=0.0, weight=True)] = None
    entropy_loss_weight: Annotated[Tensor | None, PerToken(pad=0.0, weight=True)] = None
    nll_loss_weight: Annotated[Tensor | None, PerToken(pad=0.0, weight=True)] = None
    value_loss_weight: Annotated[Tensor | None, PerToken(pad=0.0)] = None
    global_grad_tokens: Annotated[Tensor | None, PerBatch()] = None
    gradient_factor: Annotated[Tensor | None, PerBatch()] = None

    def taking_part(self, weight: Tensor) -> Tensor:
        """``weight``, 0 at tokens outside ``loss_mask``."""
        return weight if self.loss_mask is None else weight.masked_fill(~self.loss_mask, 0)

    def narrowed(self, ignore_idx: int) -> GRPOLossKwargs:
        """The same with labels outside ``loss_mask`` ignored."""
        if self.loss_mask is None:
            return self
        return self.replaced({"shifted_labels": self.shifted_labels.masked_fill(~self.loss_mask, ignore_idx)})
