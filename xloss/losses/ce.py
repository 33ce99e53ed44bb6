"""Cross-entropy for supervised fine-tuning and pre-training, and the losses made from the label's log-prob alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from xloss.distributed import TokenRanks
from xloss.errors import DeviceError, ShapeError, UnsupportedError
from xloss.head.backend import LossTwin
from xloss.losses import calibration
from xloss.losses.base import BaseLossContext, TokenLoss
from xloss.losses.facts import LossForm
from xloss.losses.model import BaseLossContextInputItem, BaseLossKwargs, PerBatch, PerToken, require
from xloss.losses.reduced import ReducedLossConfig
from xloss.losses.reduction import Weights, reduction_weights
from xloss.metrics import Metric
from xloss.policy import supervised
from xloss.shapes import check_label_range
from xloss.stats import StatSpec, TokenStats


class CELossConfig(ReducedLossConfig):
    """``sum_t w_t (ce_t + z_loss_coef lse_t^2)``, with weights calibrated over the whole global batch.

    ``ce_t`` is the negative log-prob of the label, or what one of these makes of it: ``label_smoothing``,
    ``focal_gamma``, ``token_scaling``. They exclude each other; the z-loss goes with any of them, unscaled.

    Args:
        label_smoothing: mass taken from the label.
        label_smoothing_kind: where it goes: ``torch`` evenly over the vocabulary, label included (arXiv 1512.00567);
            ``megatron`` over the other tokens.
        z_loss_coef: factor of ``lse^2`` (PaLM, arXiv 2204.02311).
        focal_gamma: ``-(1 - p)^gamma log p`` (arXiv 1708.02002).
        token_scaling: ``dft``, ``-sg(p) log p`` (arXiv 2508.05629); ``chord_phi``, ``-sg(p (1 - p)) log p``
            (arXiv 2508.11408).
        cutoff_prob: with ``chord_phi``, labels of a probability above it have no gradient.
        return_token_accuracy: report how often the label is the most probable token.
    """

    forms: ClassVar[tuple[LossForm, ...]] = (
        LossForm("cross_entropy", "-lp", "-", "Negative log-likelihood of the labels."),
        LossForm(
            "label_smoothing",
            "-(1 - eps) lp + eps (lse - mean_v z_v); megatron: eps V / (V - 1) in the place of eps",
            "arXiv 1512.00567; Megatron-LM",
            "Cross-entropy with a share of the mass taken from the label.",
            {"label_smoothing": 0.1},
        ),
        LossForm(
            "focal",
            "-(1 - p)^focal_gamma lp",
            "arXiv 1708.02002",
            "Cross-entropy that weighs down what is already predicted.",
            {"focal_gamma": 2.0},
        ),
        LossForm(
            "dft",
            "-sg(p) lp",
            "DFT, arXiv 2508.05629; TRL, Liger",
            "Dynamic fine-tuning: weighed by the label's probability.",
            {"token_scaling": "dft"},
        ),
        LossForm(
            "chord_phi",
            "-sg(p (1 - p)) min(lp, log cutoff_prob)",
            "CHORD, arXiv 2508.11408; ms-swift, Trinity-RFT",
            "The supervised term of CHORD: weighed where the model is undecided.",
            {"token_scaling": "chord_phi"},
        ),
    )

    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    label_smoothing_kind: Literal["torch", "megatron"] = "torch"
    z_loss_coef: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    focal_gamma: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    token_scaling: Literal["dft", "chord_phi"] | None = None
    cutoff_prob: float = Field(default=1.0, gt=0, le=1)
    return_token_accuracy: bool = False

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        names = ("label_smoothing", "focal_gamma", "token_scaling")
        chosen = [f"{name}={getattr(self, name)!r}" for name in names if getattr(self, name)]
        if len(chosen) > 1:
            raise ValueError(f"{' and '.join(chosen)} are different losses of a token; give one of {', '.join(names)}")
        if self.cutoff_prob != 1.0 and self.token_scaling != "chord_phi":
            raise ValueError(
                f"cutoff_prob={self.cutoff_prob} belongs to token_scaling='chord_phi'; got {self.token_scaling!r}"
            )
        if self.label_smoothing_kind != "torch" and not self.label_smoothing:
            raise ValueError(f"label_smoothing_kind={self.label_smoothing_kind!r} needs label_smoothing > 0")
        return self

    def form(self) -> str:
        if self.label_smoothing:
            return "label_smoothing"
        return "focal" if self.focal_gamma else self.token_scaling or "cross_entropy"

    @property
    def loss_ctx_cls(self) -> type[CELossContext]:
        return CELossContext


class CELossContextInputItem(BaseLossContextInputItem):
    """Labels of one micro-batch.

    Args:
        token_weight: free weight of each token, multiplied into ``loss_reduction``'s and counted in the denominator.
        class_weight: ``[V]``, a weight for each label, used as ``token_weight`` is; the z-loss does without it.
    """

    token_weight: Annotated[Tensor | None, PerToken(pad=0.0)] = None
    class_weight: Annotated[Tensor | None, PerBatch()] = None


class CELossKwargs(BaseLossKwargs):
    """The item's tensors and calibrated weights, the denominator included.

    Args:
        loss_weight: of the cross-entropy. z_loss_weight: of the z-loss, where ``class_weight`` makes it another.
    """

    token_weight: Annotated[Tensor | None, PerToken(pad=0.0)] = None
    class_weight: Annotated[Tensor | None, PerBatch()] = None
    loss_weight: Annotated[Tensor | None, PerToken(pad=0.0, weight=True)] = None
    z_loss_weight: Annotated[Tensor | None, PerToken(pad=0.0, weight=True)] = None

    def check(self) -> None:
        super().check()
        if (given := self.class_weight) is not None:
            if given.ndim != 1 or not given.dtype.is_floating_point:
                raise ShapeError(f"class_weight must be floating point and [V]; got {given.dtype} {tuple(given.shape)}")
            if given.device != self.shifted_labels.device:
                raise DeviceError(f"class_weight is on {given.device}, shifted_labels on {self.shifted_labels.device}")

    def label_weight(self, ignore_idx: int) -> Tensor | None:
        """``token_weight`` times the class weight of each label; ``None`` where neither is given."""
        if self.class_weight is None:
            return self.token_weight
        labels = self.shifted_labels
        check_label_range(labels, self.class_weight.numel(), ignore_idx, "shifted_labels")
        of_class = self.class_weight.detach()[labels.masked_fill(labels == ignore_idx, 0).to(torch.int64)]
        return of_class if self.token_weight is None else of_class * self.token_weight


class CELossContext(BaseLossContext[CELossContextInputItem]):
    """Cross-entropy of one micro-batch."""

    loss_cfg: CELossConfig
    loss_kwargs: CELossKwargs
    token_local: ClassVar[bool] = True

    @classmethod
    def calibrate(
        cls,
        kwargs_list: list[Any],
        loss_cfg: Any,
        cu_seq_lens_list: Sequence[Tensor] | None,
        ranks: TokenRanks,
    ) -> None:
        calibration.attach_cu_seq_lens(kwargs_list, cu_seq_lens_list)
        ignore_idx, options = loss_cfg.ignore_idx, loss_cfg.reduction_options()
        by_class = any(kwargs.class_weight is not None for kwargs in kwargs_list)
        if by_class and loss_cfg.label_smoothing:
            raise UnsupportedError(
                f"class_weight with label_smoothing={loss_cfg.label_smoothing} would weigh every token of the "
                "vocabulary by its class, which the statistics do not tell; give one of them"
            )

        def weights(token_weights: list[Tensor | None]) -> Weights:
            return reduction_weights(kwargs_list, ignore_idx, options, ranks, token_weights)

        loss_weights = weights([kwargs.label_weight(ignore_idx) for kwargs in kwargs_list])
        z_weights: Sequence[Tensor | None] = [None] * len(kwargs_list)
        if loss_cfg.z_loss_coef:  # the sum is asked for on every rank, whatever its batches hold
            of_tokens = weights([kwargs.token_weight for kwargs in kwargs_list])
            z_weights = of_tokens() if by_class else z_weights
        valid = [kwargs.shifted_labels != ignore_idx for kwargs in kwargs_list]
        counts = calibration.sequence_counts(kwargs_list, valid)
        for kwargs, weight, z_weight, count in zip(kwargs_list, loss_weights(), z_weights, counts, strict=True):
            kwargs.loss_weight, kwargs.z_loss_weight = weight, z_weight
            kwargs.keep_metrics(count)

    def check_ready(self) -> None:
        require(self.loss_kwargs, "loss_weight", "call build_batches on the contexts of this optimizer step first")

    def stats_needed(self) -> StatSpec:
        return StatSpec(mean_logit=self.loss_cfg.label_smoothing > 0, top1=self.loss_cfg.return_token_accuracy)

    def _smoothing(self) -> float:
        """Label smoothing in torch's convention."""
        if self.loss_cfg.label_smoothing_kind == "torch":
            return self.loss_cfg.label_smoothing
        return supervised.megatron_smoothing(self.loss_cfg.label_smoothing, self.vocab_size)

    def twin(self, loss_kwargs: Any) -> LossTwin | None:
        cfg, weight, z_weight = self.loss_cfg, loss_kwargs.loss_weight, loss_kwargs.z_loss_weight
        if cfg.focal_gamma or cfg.token_scaling == "chord_phi":
            return None
        vectors = {"weight": weight, "aux_weight": weight if z_weight is None else z_weight}
        if cfg.token_scaling == "dft":  # -sg(clip(exp(lp - 0), 0, 1)) lp: CISPO against old log-probs of 0
            vectors |= {"advantages": torch.ones_like(weight), "old_logprobs": torch.zeros_like(weight)}
            clip = {"ratio_min": 0.0, "ratio_max": 1.0, "log_ratio_min": -math.inf, "log_ratio_max": math.inf}
            return LossTwin("cispo", {**clip, "z_loss_coef": cfg.z_loss_coef}, vectors=vectors)
        numbers: dict[str, float | None] = {"label_smoothing": self._smoothing(), "z_loss_coef": cfg.z_loss_coef}
        return LossTwin("ce", numbers, vectors=vectors)

    def per_token(self, stats: TokenStats) -> Tensor:
        """The loss of each token without weight and z-loss."""
        cfg, logprobs = self.loss_cfg, stats.logprobs
        if cfg.label_smoothing:
            assert stats.mean_logit is not None
            return supervised.label_smoothed_nll(
                logprobs, stats.lse, stats.mean_logit, label_smoothing=self._smoothing()
            )
        if cfg.focal_gamma:
            return supervised.focal(logprobs, gamma=cfg.focal_gamma)
        if cfg.token_scaling == "dft":
            return supervised.dft(logprobs)
        if cfg.token_scaling == "chord_phi":
            return supervised.chord_phi(logprobs, cutoff_prob=cfg.cutoff_prob)
        return -logprobs

    def token_loss(self, stats: TokenStats, loss_kwargs: Any) -> TokenLoss:
        cfg, kw, nll = self.loss_cfg, loss_kwargs, -stats.logprobs
        if kw.class_weight is not None and kw.class_weight.numel() != self.vocab_size:
            raise ShapeError(f"class_weight must be [V] = ({self.vocab_size},); got {tuple(kw.class_weight.shape)}")
        loss = self.per_token(stats) * kw.loss_weight
        metrics = {"nll": Metric.mean(nll), "num_tokens": Metric.count_of(nll)}
        if cfg.z_loss_coef:
            z_loss = supervised.z_loss(stats.lse, coef=cfg.z_loss_coef)
            loss = loss + z_loss * (kw.loss_weight if kw.z_loss_weight is None else kw.z_loss_weight)
            metrics["z_loss"] = Metric.mean(z_loss)
        if stats.entropy is not None:
            metrics["entropy"] = Metric.mean(stats.entropy)
        if stats.top1 is not None:
            metrics["token_accuracy"] = Metric.mean((stats.top1 == self.head_labels(kw)).to(nll.dtype))
        return loss, metrics
