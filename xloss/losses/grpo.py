"""GRPO and its kin: a policy loss on advantages, with optional KL to a reference and entropy bonus."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from xloss.head.backend import LossTwin
from xloss.losses import calibration
from xloss.losses.base import BaseLossConfig, BaseLossContext, TokenLoss, require
from xloss.losses.model import BaseLossContextInputItem, BaseLossKwargs, PerBatch, PerToken
from xloss.losses.policy_cfg import AnyPolicyLossConfig, PolicyLossConfig
from xloss.metrics import Metric
from xloss.policy.kl import KL_ESTIMATOR, KLType, kl_penalty
from xloss.stats import StatSpec, TokenStats

_METRIC_LIMIT = 20.0  # of |log r| in metrics, as XTuner and verl
_CALL_BUILD = "call build_batches on the contexts of this optimizer step first"


class GRPOLossConfig(BaseLossConfig):
    """``sum_t (is_t policy_t + kl_loss_coef kl_t - entropy_coef H_t) / N``, N all valid tokens of the global batch.

    Args:
        policy_loss_cfg: a typed policy loss or a dict of its fields, tagged by ``loss_type``.
        use_kl_loss: add the KL penalty; needs ``ref_logprobs``.
        kl_loss_coef: its factor.
        kl_loss_type: its estimator, required with ``use_kl_loss``.
        entropy_coef: factor of the entropy bonus, with the exact gradient of the full distribution's entropy.
    """

    policy_loss_cfg: AnyPolicyLossConfig
    use_kl_loss: bool = False
    kl_loss_coef: float = Field(default=0.001, allow_inf_nan=False)
    kl_loss_type: KLType | None = None
    entropy_coef: float = Field(default=0.0, allow_inf_nan=False)

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
        old_logprobs: of the policy at the start of the step; ``None`` is on-policy (the current ones, detached).
        ref_logprobs: of the frozen reference, for the KL penalty.
        rollout_logprobs: as the sampler reported them.
        is_weights: constant weight on the policy term, correcting sampler against trainer.
    """

    advantages: Annotated[Tensor, PerToken(pad=0.0)]
    old_logprobs: Annotated[Tensor | None, PerToken(pad=0.0)] = None
    ref_logprobs: Annotated[Tensor | None, PerToken(pad=0.0)] = None
    rollout_logprobs: Annotated[Tensor | None, PerToken(pad=0.0)] = None
    is_weights: Annotated[Tensor | None, PerToken(pad=1.0)] = None


class GRPOLossKwargs(BaseLossKwargs):
    """The item's tensors, and weights that hold the global denominator.

    Args:
        policy_loss_weight: ``is_weights / N``. kl_loss_weight: ``kl_loss_coef / N``. entropy_loss_weight:
            ``entropy_coef / N``. All 0 at ignored labels.
        global_grad_tokens: N, 0-d.
    """

    advantages: Annotated[Tensor, PerToken(pad=0.0)]
    old_logprobs: Annotated[Tensor | None, PerToken(pad=0.0)] = None
    ref_logprobs: Annotated[Tensor | None, PerToken(pad=0.0)] = None
    rollout_logprobs: Annotated[Tensor | None, PerToken(pad=0.0)] = None
    is_weights: Annotated[Tensor | None, PerToken(pad=1.0)] = None
    policy_loss_weight: Annotated[Tensor | None, PerToken(pad=0.0, weight=True)] = None
    kl_loss_weight: Annotated[Tensor | None, PerToken(pad=0.0, weight=True)] = None
    entropy_loss_weight: Annotated[Tensor | None, PerToken(pad=0.0, weight=True)] = None
    global_grad_tokens: Annotated[Tensor | None, PerBatch()] = None


class GRPOLossContext(BaseLossContext[RLLossContextInputItem]):
    """Policy loss of one micro-batch."""

    loss_cfg: GRPOLossConfig
    loss_kwargs: GRPOLossKwargs
    token_local: ClassVar[bool] = True

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
        valid = [kwargs.shifted_labels != loss_cfg.ignore_idx for kwargs in kwargs_list]
        num_tokens = calibration.global_sum(valid)
        factor = calibration.gradient_factor(loss_cfg.grad_reduce) / num_tokens
        for kwargs, mask in zip(kwargs_list, valid, strict=True):
            weight = mask.to(torch.float32) * factor
            is_weights = kwargs.is_weights
            kwargs.policy_loss_weight = weight if is_weights is None else weight * is_weights.masked_fill(~mask, 0)
            kwargs.kl_loss_weight = weight * loss_cfg.kl_loss_coef if loss_cfg.use_kl_loss else None
            kwargs.entropy_loss_weight = weight * loss_cfg.entropy_coef if loss_cfg.entropy_coef else None
            kwargs.global_grad_tokens = num_tokens

    def check_ready(self) -> None:
        require(self.loss_kwargs, "policy_loss_weight", _CALL_BUILD)
        if self.loss_cfg.use_kl_loss:
            require(self.loss_kwargs, "ref_logprobs", _NEED_REF)
            require(self.loss_kwargs, "kl_loss_weight", _CALL_BUILD)
        if self.loss_cfg.entropy_coef:
            require(self.loss_kwargs, "entropy_loss_weight", _CALL_BUILD)

    def stats_needed(self) -> StatSpec:
        return StatSpec(entropy=self.loss_cfg.entropy_coef != 0)

    def known_zero_grad(self) -> Tensor | None:
        cfg, kwargs = self.loss_cfg, self.loss_kwargs
        if kwargs.policy_loss_weight is None:
            return None
        zero = kwargs.policy_loss_weight == 0
        if cfg.policy_loss_cfg.zero_at_zero_advantage:
            zero = zero | (kwargs.advantages == 0)
        for other in (kwargs.kl_loss_weight, kwargs.entropy_loss_weight):
            if other is not None:
                zero = zero & (other == 0)
        return zero

    def twin(self, loss_kwargs: Any) -> LossTwin | None:
        cfg, kw = self.loss_cfg, loss_kwargs
        policy: PolicyLossConfig = cfg.policy_loss_cfg
        known = policy.twin()
        if known is None:
            return None
        loss, numbers = known
        vectors = {
            "weight": kw.policy_loss_weight,
            "advantages": kw.advantages,
            "old_logprobs": kw.old_logprobs,
            "ref_logprobs": kw.ref_logprobs if cfg.use_kl_loss else None,
            "kl_weight": kw.kl_loss_weight,
            "aux_weight": kw.entropy_loss_weight,  # holds the coefficient
        }
        numbers["entropy_coef"] = 1.0 if cfg.entropy_coef else 0.0
        kl = KL_ESTIMATOR[cfg.kl_loss_type] if cfg.use_kl_loss and cfg.kl_loss_type else None
        return LossTwin(loss, numbers, kl, vectors)

    def token_loss(self, stats: TokenStats, loss_kwargs: Any) -> TokenLoss:
        cfg, kw, logprobs = self.loss_cfg, loss_kwargs, stats.logprobs
        old = logprobs.detach() if kw.old_logprobs is None else kw.old_logprobs
        loss = cfg.policy_loss_cfg.per_token(logprobs, old, kw.advantages) * kw.policy_loss_weight
        metrics = _policy_metrics(logprobs.detach() - old, kw.advantages, cfg.policy_loss_cfg.ratio_bounds())
        if cfg.use_kl_loss:
            assert cfg.kl_loss_type is not None
            kl = kl_penalty(logprobs, kw.ref_logprobs, cfg.kl_loss_type)
            loss = loss + kl * kw.kl_loss_weight
            metrics["ref_kl"] = Metric.mean(kl)
        if stats.entropy is not None:
            metrics["entropy"] = Metric.mean(stats.entropy)
            if cfg.entropy_coef:
                loss = loss - stats.entropy * kw.entropy_loss_weight
        return loss, metrics


_NEED_REF = (
    "use_kl_loss=True needs the reference model's log-probs: run LogProbContext (or linear_logprobs) on its hidden "
    "states and head under torch.no_grad() and set ref_logprobs, or set use_kl_loss=False"
)


def _policy_metrics(log_ratio: Tensor, advantages: Tensor, bounds: tuple[float, float] | None) -> dict[str, Metric]:
    """Figures of ``r = exp(log_ratio)`` over live tokens.

    ``clip_frac_low`` and ``clip_frac_high`` count tokens whose gradient the clip can stop: ``A < 0`` and ``r`` below,
    or ``A > 0`` and ``r`` above (TRL). ``ratio_low_frac`` and ``ratio_high_frac`` count every ratio out of bounds
    (XTuner).
    ``approx_kl_k1 = -log r`` and ``approx_kl_k3 = r - log r - 1`` estimate KL(old || current).
    """
    safe = torch.clamp(log_ratio, -_METRIC_LIMIT, _METRIC_LIMIT)  # one far token must not make a mean infinite
    ratio = torch.exp(safe)
    metrics = {
        "num_tokens": Metric.count_of(ratio),
        "ratio_mean": Metric.mean(ratio),
        "ratio_min": Metric.extreme(ratio, "min"),
        "ratio_max": Metric.extreme(ratio, "max"),
        "ratio_abs_dev": Metric.mean((ratio - 1).abs()),
        "approx_kl_k1": Metric.mean(-log_ratio),
        "approx_kl_k3": Metric.mean(torch.expm1(safe) - safe),
    }
    if bounds is not None:
        below, above = ratio < bounds[0], ratio > bounds[1]
        fractions = {
            "clip_frac_low": below & (advantages < 0),
            "clip_frac_high": above & (advantages > 0),
            "ratio_low_frac": below,
            "ratio_high_frac": above,
        }
        metrics |= {name: Metric.mean(mask.to(ratio.dtype)) for name, mask in fractions.items()}
    return metrics
