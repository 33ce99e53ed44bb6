"""GRPO and its kin: a policy loss on advantages, with optional KL to a reference and entropy bonus."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from xloss.head.backend import LossTwin
from xloss.losses import calibration, correction, policy_tokens
from xloss.losses.base import BaseLossContext, TokenLoss, require
from xloss.losses.model import BaseLossContextInputItem, BaseLossKwargs, PerBatch, PerToken
from xloss.losses.nonfinite import NonFinite
from xloss.losses.policies import AnyPolicyLossConfig, PolicyLossConfig
from xloss.losses.policies.metrics import policy_metrics
from xloss.losses.reduced import ReducedLossConfig
from xloss.losses.reduction import reduction_weights
from xloss.losses.xtuner_rollout import AnyRolloutCorrection
from xloss.metrics import Metric
from xloss.packing import Segments, rows_as_segments
from xloss.policy.batch import PolicyBatch
from xloss.policy.kl import KL_ESTIMATOR, KLType, kl_penalty
from xloss.stats import StatSpec, TokenStats

_CALL_BUILD = "call build_batches on the contexts of this optimizer step first"


class GRPOLossConfig(ReducedLossConfig):
    """``sum_t w_t (is_t policy_t + kl_loss_coef kl_t - entropy_coef H_t)``, ``w_t`` calibrated by ``loss_reduction``.

    Args:
        policy_loss_cfg: a typed policy loss or a dict of its fields, tagged by ``loss_type``.
        use_kl_loss: add the KL penalty; needs ``ref_logprobs``.
        kl_loss_coef: its factor.
        kl_loss_type: its estimator, required with ``use_kl_loss``.
        entropy_coef: factor of the entropy bonus, with the exact gradient of the full distribution's entropy.
        rollout_correction: weights and masks on the policy term that correct the sampler against the trainer.
        positive_nll_coef: factor of the mean of ``-logprobs`` over tokens of positive ``rewards`` (VAPO).
        nonfinite: what to do where the inputs of a token are NaN or inf: ``raise``, or ``drop`` the token and count it.
    """

    policy_loss_cfg: AnyPolicyLossConfig
    use_kl_loss: bool = False
    kl_loss_coef: float = Field(default=0.001, allow_inf_nan=False)
    kl_loss_type: KLType | None = None
    entropy_coef: float = Field(default=0.0, allow_inf_nan=False)
    rollout_correction: AnyRolloutCorrection = None
    positive_nll_coef: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    nonfinite: NonFinite = "raise"

    @property
    def nll_coef(self) -> float:
        """Factor of the mean negative log-likelihood of positive tokens."""
        return self.positive_nll_coef

    @model_validator(mode="after")
    def _corrects_once(self) -> GRPOLossConfig:
        if self.rollout_correction is not None and "rollout_logprobs" in self.policy_loss_cfg.needs:
            raise ValueError(
                f"{type(self.policy_loss_cfg).__name__} weighs by the sampler itself; rollout_correction would do it "
                "twice: leave one out"
            )
        return self

    @model_validator(mode="after")
    def _kl_type_given(self) -> GRPOLossConfig:
        if self.use_kl_loss and self.kl_loss_type is None:
            raise ValueError("kl_loss_type must be given with use_kl_loss=True; low_var_kl (k3) is the usual choice")
        return self

    @property
    def loss_ctx_cls(self) -> type[GRPOLossContext]:
        return GRPOLossContext

    def build(
        self, data: dict[str, Any], sp_mesh: DeviceMesh | None = None, device: torch.device | str | None = None
    ) -> BaseLossContext[Any] | None:
        if "rollout_is_weights" in data:  # XTuner's name for it in data dicts
            data = {**data, "is_weights": data["rollout_is_weights"]}
        return super().build(data, sp_mesh, device)


class RLLossContextInputItem(BaseLossContextInputItem):
    """One micro-batch of rollouts. All tensors have the shape of ``shifted_labels``.

    Args:
        advantages: per token; the same for all tokens of a response in GRPO.
        old_logprobs: of the policy at the start of the step; ``None``: ``rollout_logprobs`` if given, else on-policy
            (the current ones, detached).
        ref_logprobs: of the frozen reference, for the KL penalty.
        rollout_logprobs: as the sampler reported them.
        is_weights: constant weight on the policy term, correcting sampler against trainer.
        group_ids: number of each token's prompt, the same on all ranks; for losses and reductions over prompts.
        rewards: of the token's answer; tells which are positive. ``None``: those of positive advantage.
    """

    advantages: Annotated[Tensor, PerToken(pad=0.0)]
    old_logprobs: Annotated[Tensor | None, PerToken(pad=0.0)] = None
    ref_logprobs: Annotated[Tensor | None, PerToken(pad=0.0)] = None
    rollout_logprobs: Annotated[Tensor | None, PerToken(pad=0.0)] = None
    is_weights: Annotated[Tensor | None, PerToken(pad=1.0)] = None
    group_ids: Annotated[Tensor | None, PerToken(pad=0)] = None
    rewards: Annotated[Tensor | None, PerToken(pad=0.0)] = None


class GRPOLossKwargs(BaseLossKwargs):
    """The item's tensors, and weights that hold the global denominator.

    Args:
        loss_mask: tokens that take part, where those with a label are not all; ``None``: they are.
        rollout_weights: of the rollout correction, where the batch decides them.
        policy_loss_weight: ``w is_weights rollout_weights``. kl_loss_weight: ``w kl_loss_coef``. entropy_loss_weight:
            ``w entropy_coef``. nll_loss_weight: of ``-logprobs``. All 0 at tokens that take no part.
        global_grad_tokens: valid tokens of the global batch, 0-d.
    """

    advantages: Annotated[Tensor, PerToken(pad=0.0)]
    old_logprobs: Annotated[Tensor | None, PerToken(pad=0.0)] = None
    ref_logprobs: Annotated[Tensor | None, PerToken(pad=0.0)] = None
    rollout_logprobs: Annotated[Tensor | None, PerToken(pad=0.0)] = None
    is_weights: Annotated[Tensor | None, PerToken(pad=1.0)] = None
    group_ids: Annotated[Tensor | None, PerToken(pad=0)] = None
    rewards: Annotated[Tensor | None, PerToken(pad=0.0)] = None
    loss_mask: Annotated[Tensor | None, PerToken(pad=0)] = None
    rollout_weights: Annotated[Tensor | None, PerToken(pad=0.0)] = None
    policy_loss_weight: Annotated[Tensor | None, PerToken(pad=0.0, weight=True)] = None
    kl_loss_weight: Annotated[Tensor | None, PerToken(pad=0.0, weight=True)] = None
    entropy_loss_weight: Annotated[Tensor | None, PerToken(pad=0.0, weight=True)] = None
    nll_loss_weight: Annotated[Tensor | None, PerToken(pad=0.0, weight=True)] = None
    global_grad_tokens: Annotated[Tensor | None, PerBatch()] = None


class GRPOLossContext(BaseLossContext[RLLossContextInputItem]):
    """Policy loss of one micro-batch."""

    loss_cfg: GRPOLossConfig
    loss_kwargs: GRPOLossKwargs

    def is_token_local(self) -> bool:
        return self.loss_cfg.policy_loss_cfg.coupling == "token" and not self._corrects_sequences_in_pass

    @property
    def _corrects_in_pass(self) -> bool:
        """Whether the weights of the rollout correction wait for the current log-probs, which stand for the old."""
        return self.loss_cfg.rollout_correction is not None and self.loss_kwargs.old_logprobs is None

    @property
    def _corrects_sequences_in_pass(self) -> bool:
        found = self.loss_cfg.rollout_correction
        return found is not None and found.needs_sequences and self.loss_kwargs.old_logprobs is None

    @classmethod
    def calibrate(
        cls,
        kwargs_list: list[GRPOLossKwargs],
        loss_cfg: GRPOLossConfig,
        cu_seq_lens_list: Sequence[Tensor] | None,
        sp_mesh: DeviceMesh | None,
    ) -> None:
        if not kwargs_list:
            return
        if loss_cfg.use_kl_loss:
            for kwargs in kwargs_list:
                require(kwargs, "ref_logprobs", _NEED_REF)
        calibration.attach_cu_seq_lens(kwargs_list, cu_seq_lens_list, sp_mesh)
        counted = policy_tokens.settle_tokens(kwargs_list, loss_cfg, cu_seq_lens_list, sp_mesh)
        options = loss_cfg.reduction_options()
        weights = reduction_weights(counted, loss_cfg.ignore_idx, options, cu_seq_lens_list, sp_mesh)
        num_tokens = calibration.global_sum([kwargs.shifted_labels != loss_cfg.ignore_idx for kwargs in counted])
        of_policy = cls.policy_weights(counted, weights, loss_cfg)
        for kwargs, whole, policy in zip(kwargs_list, weights, of_policy, strict=True):
            weight = policy_tokens.taking_part(kwargs, whole)
            kwargs.policy_loss_weight = policy_tokens.corrected(kwargs, policy)
            kwargs.kl_loss_weight = weight * loss_cfg.kl_loss_coef if loss_cfg.use_kl_loss else None
            kwargs.entropy_loss_weight = weight * loss_cfg.entropy_coef if loss_cfg.entropy_coef else None
            kwargs.global_grad_tokens = num_tokens
        if loss_cfg.nll_coef:
            policy_tokens.weigh_positive_nll(kwargs_list, counted, loss_cfg)

    @classmethod
    def policy_weights(cls, counted: list[Any], weights: list[Tensor], loss_cfg: Any) -> list[Tensor]:
        """Weights of the policy term from those of ``loss_reduction``; ``counted`` has the labels that they count."""
        return weights

    def check_ready(self) -> None:
        require(self.loss_kwargs, "policy_loss_weight", _CALL_BUILD)
        if self.loss_cfg.use_kl_loss:
            require(self.loss_kwargs, "ref_logprobs", _NEED_REF)
            require(self.loss_kwargs, "kl_loss_weight", _CALL_BUILD)
        if self.loss_cfg.entropy_coef:
            require(self.loss_kwargs, "entropy_loss_weight", _CALL_BUILD)
        if self.loss_cfg.nll_coef:
            require(self.loss_kwargs, "nll_loss_weight", _CALL_BUILD)
        if self.loss_cfg.rollout_correction is not None and not self._corrects_in_pass:
            require(self.loss_kwargs, "rollout_weights", _CALL_BUILD)
        policy: PolicyLossConfig = self.loss_cfg.policy_loss_cfg
        for name in policy.needs:
            field = "group_ids" if name == "groups" else name
            require(self.loss_kwargs, field, f"{type(policy).__name__} cannot do without it")
        labels = self.loss_kwargs.shifted_labels
        if self._corrects_sequences_in_pass and (labels.ndim == 1 or labels.shape[0] == 1):
            require(self.loss_kwargs, "cu_seq_lens", "rollout_correction weighs or rejects whole sequences")
        if policy.coupling == "sequence" and (labels.ndim == 1 or labels.shape[0] == 1):
            require(
                self.loss_kwargs,
                "cu_seq_lens",
                f"{type(policy).__name__} needs cu_seq_lens_list, [0, {labels.numel()}] if it is one sequence",
            )

    def stats_needed(self) -> StatSpec:
        return StatSpec(entropy=self.loss_cfg.entropy_coef != 0 or self.loss_cfg.policy_loss_cfg.needs_entropy)

    def live_mask(self) -> Tensor:
        if self.is_token_local():
            return super().live_mask()
        # a token of weight 0 still counts in the sums over its sequence
        live = self.loss_kwargs.shifted_labels.reshape(-1) != self.loss_cfg.ignore_idx
        mask = self.loss_kwargs.loss_mask
        return live if mask is None else live & mask.reshape(-1)

    def known_zero_grad(self) -> Tensor | None:
        cfg, kwargs = self.loss_cfg, self.loss_kwargs
        if kwargs.policy_loss_weight is None or not self.is_token_local():
            return None
        zero = kwargs.policy_loss_weight == 0
        if cfg.policy_loss_cfg.zero_at_zero_advantage:
            zero = zero | (kwargs.advantages == 0)
        for other in (kwargs.kl_loss_weight, kwargs.entropy_loss_weight, kwargs.nll_loss_weight):
            if other is not None:
                zero = zero & (other == 0)
        return zero

    def twin(self, loss_kwargs: Any) -> LossTwin | None:
        cfg, kw = self.loss_cfg, loss_kwargs
        policy: PolicyLossConfig = cfg.policy_loss_cfg
        known = policy.twin()
        if known is None or self._corrects_in_pass or kw.nll_loss_weight is not None:
            return None
        loss, numbers = known
        vectors = {
            "weight": kw.policy_loss_weight,
            "advantages": kw.advantages,
            "old_logprobs": self._old_logprobs(kw),
            "ref_logprobs": kw.ref_logprobs if cfg.use_kl_loss else None,
            "kl_weight": kw.kl_loss_weight,
            "aux_weight": kw.entropy_loss_weight,  # holds the coefficient
        }
        numbers["entropy_coef"] = 1.0 if cfg.entropy_coef else 0.0
        kl = KL_ESTIMATOR[cfg.kl_loss_type] if cfg.use_kl_loss and cfg.kl_loss_type else None
        return LossTwin(loss, numbers, kl, vectors)

    def _old_logprobs(self, kw: Any) -> Tensor | None:
        """What the ratio is taken against; ``None``: the current ones. A correction keeps the sampler's for itself."""
        found = self.loss_cfg.rollout_correction
        bypass = found is None or found.bypass
        old: Tensor | None = kw.rollout_logprobs if kw.old_logprobs is None and bypass else kw.old_logprobs
        return old

    def policy_batch(self, stats: TokenStats, kw: Any) -> PolicyBatch:
        """What the policy loss sees of these statistics and kwargs."""
        old = self._old_logprobs(kw)
        sequences = None
        if not self.is_token_local():
            valid = kw.shifted_labels != self.loss_cfg.ignore_idx
            whole = rows_as_segments(valid.shape, valid.device) if kw.cu_seq_lens is None else kw.cu_seq_lens
            sequences = Segments.of(whole, valid)
        return PolicyBatch(
            logprobs=stats.logprobs,
            old_logprobs=stats.logprobs.detach() if old is None else old,
            advantages=kw.advantages,
            rollout_logprobs=kw.rollout_logprobs,
            ref_logprobs=kw.ref_logprobs,
            entropy=stats.entropy,
            sequences=sequences,
            groups=kw.group_ids,
        )

    def token_loss(self, stats: TokenStats, loss_kwargs: Any) -> TokenLoss:
        cfg, kw = self.loss_cfg, loss_kwargs
        batch = self.policy_batch(stats, kw)
        valid = None if batch.sequences is None else batch.sequences.valid
        policy: PolicyLossConfig = cfg.policy_loss_cfg
        loss = policy.per_token(batch)
        if valid is not None:
            loss = loss.masked_fill(~valid, 0)
        loss = loss * kw.policy_loss_weight
        metrics = policy_metrics(batch, policy.ratio_bounds()) | policy.metrics(batch)
        if cfg.rollout_correction is not None and self._corrects_in_pass:
            weights, figures = correction.correct_in_pass(cfg.rollout_correction, batch)
            loss = loss * weights
            metrics |= figures
        if kw.nll_loss_weight is not None:
            loss = loss - batch.logprobs * kw.nll_loss_weight
        if cfg.use_kl_loss:
            assert cfg.kl_loss_type is not None
            kl = kl_penalty(batch.logprobs, kw.ref_logprobs, cfg.kl_loss_type)
            loss = loss + kl * kw.kl_loss_weight
            metrics["ref_kl"] = Metric.mean(kl, valid)
        if stats.entropy is not None:
            metrics["entropy"] = Metric.mean(stats.entropy, valid)
            if cfg.entropy_coef:
                loss = loss - stats.entropy * kw.entropy_loss_weight
        return loss, metrics


_NEED_REF = (
    "use_kl_loss=True needs the reference model's log-probs: run LogProbContext (or linear_logprobs) on its hidden "
    "states and head under torch.no_grad() and set ref_logprobs, or set use_kl_loss=False"
)
