"""Distillation from a teacher over the same vocabulary, with neither model's logits held."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from xloss.distributed import TokenRanks
from xloss.distributed.vocab import HeadWeight
from xloss.head.outside_compile import outside_compile
from xloss.head.plan import Plan
from xloss.head.teacher import LogitsFn, Teacher
from xloss.losses import run
from xloss.losses.base import BaseLossContext, TokenLoss
from xloss.losses.distill_kwargs import DistillLossContextInputItem, DistillLossKwargs
from xloss.losses.facts import LossForm
from xloss.losses.info import LossInfo
from xloss.losses.model import require
from xloss.losses.reduced import ReducedLossConfig
from xloss.losses.reduction import attach_token_weights
from xloss.losses.teacher import GivenTeacher
from xloss.metrics import Metric
from xloss.policy.divergence import Divergence, DivergenceKind
from xloss.policy.topk import TopKMode, check_topk, topk_divergence
from xloss.stats import StatSpec, TokenStats

_MIX_FIELD = {
    "jsd": "beta",
    "mixed": "mixed_kl_weight",
    "skewed_forward_kl": "skew_lambda",
    "skewed_reverse_kl": "skew_lambda",
}


_GKD = "GKD, arXiv 2306.13649; TRL, Liger"
_DISTILLM = "DistiLLM, arXiv 2402.03898; ROLL"
_DRAFT = "arXiv 2602.23881; vLLM speculators"


class DistillLossConfig(ReducedLossConfig):
    """``sum_t w_t (hard_weight nll_t + soft_weight c D_t)``, ``D`` the student's divergence from its teacher.

    ``c`` is ``temperature^2`` with ``t2_factor``, else 1. Kinds of ``D``: ``xloss.policy.divergence.Divergence``.

    Args:
        divergence: kind of ``D``.
        beta: of ``jsd``, the weight of KL(teacher, m); 0.5. 0 means forward KL, 1 reverse KL.
        mixed_kl_weight: of ``mixed``, the weight of the forward KL; 0.5.
        skew_lambda: of the skewed KLs, the share of their first argument in the mixture; 0.1.
        temperature: divides both models' logits inside ``D`` alone; per-token values go into the batch instead.
        teacher_temperature: the teacher's own, where it differs.
        t2_factor: multiply ``D`` by ``temperature^2``, which keeps its gradient's size (Hinton et al., 2015).
        hard_weight: factor of the cross-entropy on the labels, at temperature 1.
        soft_weight: factor of ``D``.
        teacher_logit_scale, teacher_softcap: of the teacher's head.
        topk_mode: how to read a teacher given by ``teacher_topk_ids``; required for one, and for no other.
        outside_logprob: the teacher's log-prob outside its top k, for ``full`` reverse and mixed KL; ``None``: leave
            the rest of the vocabulary out.
        log_prob_min_clamp: both models' top-k log-probs are raised to this (verl: -10); ``full`` only.
        loss_max_clamp: ``D`` is clamped to +- this (verl: 10); the gradient is 0 beyond.
    """

    forms: ClassVar[tuple[LossForm, ...]] = tuple(
        LossForm(name, formula, source, summary, {"divergence": name.removeprefix("distill_")})
        for name, formula, source, summary in (
            ("forward_kl", "F = sum q (log q - log p)", "Hinton et al., arXiv 1503.02531", "KL(teacher, student)."),
            ("reverse_kl", "R = sum p (log p - log q)", "MiniLLM, arXiv 2306.08543", "KL(student, teacher)."),
            (
                "jsd",
                "beta KL(q, m) + (1 - beta) KL(p, m), m = (1 - beta) p + beta q",
                _GKD,
                "Between forward and reverse KL.",
            ),
            ("mixed", "w F + (1 - w) R, w = mixed_kl_weight", "NeMo RL, torchtune", "A weighted sum of both KLs."),
            (
                "skewed_forward_kl",
                "KL(q, l q + (1 - l) p), l = skew_lambda",
                _DISTILLM,
                "Forward KL against a mixture of both.",
            ),
            (
                "skewed_reverse_kl",
                "KL(p, (1 - l) q + l p), l = skew_lambda",
                _DISTILLM,
                "Reverse KL against a mixture of both.",
            ),
            ("tvd", "sum |p - q| / 2", "Liger", "Total variation distance."),
            ("nla", "-log alpha, alpha = sum min(p, q)", _DRAFT, "Minus the log of a draft model's acceptance rate."),
            ("lk_hybrid", "k F + (1 - k) TVD, k = sg(exp(-3 alpha))", _DRAFT, "Forward KL while far, TVD when close."),
            ("distill_cross_entropy", "-sum q log p", "NeMo RL", "Forward KL without the teacher's entropy."),
            ("cosine", "1 - cos(z_p, z_q)", "Liger", "Angle between logits."),
        )
    )

    divergence: DivergenceKind = "forward_kl"
    beta: float | None = Field(default=None, ge=0, le=1)
    mixed_kl_weight: float | None = Field(default=None, ge=0, le=1)
    skew_lambda: float | None = Field(default=None, ge=0, lt=1)
    teacher_temperature: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    t2_factor: bool = False
    hard_weight: float = Field(default=0.0, allow_inf_nan=False)
    soft_weight: float = Field(default=1.0, allow_inf_nan=False)
    teacher_logit_scale: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    teacher_softcap: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    topk_mode: TopKMode | None = None
    outside_logprob: float | None = Field(default=-100.0, lt=0, allow_inf_nan=False)
    log_prob_min_clamp: float | None = Field(default=None, lt=0, allow_inf_nan=False)
    loss_max_clamp: float | None = Field(default=None, gt=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _options_belong(self) -> Self:
        own = _MIX_FIELD.get(self.divergence)
        for name in sorted(set(_MIX_FIELD.values())):
            if name != own and getattr(self, name) is not None:
                raise ValueError(f"{name}={getattr(self, name)} means nothing to divergence={self.divergence!r}")
        if self.topk_mode is None:
            if self.log_prob_min_clamp is not None:
                raise ValueError("log_prob_min_clamp is about top-k log-probs; set topk_mode='full' with it")
            return self
        check_topk(self.divergence_of(), self.topk_mode, self.log_prob_min_clamp)
        if self.teacher_logit_scale != 1.0 or self.teacher_softcap is not None:
            raise ValueError("teacher_logit_scale and teacher_softcap belong to a teacher's head, not to topk_mode")
        if self.topk_mode != "renormalized" and self.teacher_temperature is not None:
            raise ValueError(
                f"teacher_temperature cannot be applied with topk_mode={self.topk_mode!r}: give teacher_topk_logprobs "
                "at the temperature wanted"
            )
        return self

    def divergence_of(self) -> Divergence:
        """The divergence as the formulas take it."""
        own = _MIX_FIELD.get(self.divergence)
        return Divergence(self.divergence, None if own is None else getattr(self, own))

    def form(self) -> str:
        return "distill_cross_entropy" if self.divergence == "cross_entropy" else self.divergence

    @property
    def loss_ctx_cls(self) -> type[DistillLossContext]:
        return DistillLossContext


class DistillLossContext(BaseLossContext[DistillLossContextInputItem]):
    """Distillation of one micro-batch."""

    loss_cfg: DistillLossConfig
    loss_kwargs: DistillLossKwargs
    token_local: ClassVar[bool] = True
    label_field: ClassVar[str] = "shifted_labels or teacher_topk_ids"

    @classmethod
    def calibrate(
        cls,
        kwargs_list: list[DistillLossKwargs],
        loss_cfg: DistillLossConfig,
        cu_seq_lens_list: Sequence[Tensor] | None,
        ranks: TokenRanks,
    ) -> None:
        options = loss_cfg.reduction_options()
        attach_token_weights(kwargs_list, loss_cfg.ignore_idx, options, cu_seq_lens_list, ranks)

    def check_ready(self) -> None:
        require(self.loss_kwargs, "loss_weight", "call build_batches on the contexts of this optimizer step first")

    @outside_compile
    def forward(
        self,
        hidden_states: Tensor,
        head_weight: HeadWeight,
        head_bias: Tensor | None = None,
        values: Tensor | None = None,
        *,
        teacher_head_weight: HeadWeight | None = None,
        teacher_head_bias: Tensor | None = None,
        teacher_logits_fn: LogitsFn | None = None,
    ) -> tuple[Tensor, LossInfo]:
        """As ``BaseLossContext.forward``, with the teacher's head where its hidden states are in the batch.

        Args:
            hidden_states, head_weight, head_bias: the student's.
            values: refused; there is no value loss here.
            teacher_head_weight: ``[V, H2]``, dtype of ``teacher_hidden_states``; constant, as all of the teacher.
            teacher_head_bias: ``[V]`` or ``None``.
            teacher_logits_fn: instead of tensors in the batch: given int64 numbers ``[C]`` of tokens (of the flattened
                batch), their logits ``[C, V]``. It may be asked twice for a token and must give the same.
        """
        given = GivenTeacher(teacher_head_weight, teacher_head_bias, teacher_logits_fn)
        return run.forward(self, hidden_states, head_weight, head_bias, self._teacher(given), values)

    __call__ = forward

    def explain(
        self,
        hidden_states: Tensor | None = None,
        head_weight: HeadWeight | None = None,
        head_bias: Tensor | None = None,
        *,
        teacher_head_weight: HeadWeight | None = None,
        teacher_head_bias: Tensor | None = None,
        teacher_logits_fn: LogitsFn | None = None,
    ) -> Plan:
        """As ``BaseLossContext.explain``; takes what ``forward`` takes."""
        if hidden_states is None:
            return run.explain(self, None, None, None)
        given = GivenTeacher(teacher_head_weight, teacher_head_bias, teacher_logits_fn)
        return run.explain(self, hidden_states, head_weight, head_bias, self._teacher(given))

    def _teacher(self, given: GivenTeacher) -> Teacher | None:
        """The second distribution; ``None`` for a top-k teacher, which needs no second head."""
        cfg, kw = self.loss_cfg, self.loss_kwargs
        source = given.source(cfg, kw)
        if source is None:
            return None
        tau = self.tau(kw)
        if isinstance(tau, Tensor):
            tau = tau.reshape(-1)
        return Teacher(source, cfg.divergence_of(), cfg.teacher_temperature or tau, tau)

    def tau(self, loss_kwargs: Any) -> float | Tensor:
        """Temperature of the divergence."""
        return super().head_temperature(loss_kwargs)

    def head_temperature(self, loss_kwargs: Any) -> float | Tensor:
        whole = self.loss_cfg.topk_mode in ("full", "tail") and not self.loss_cfg.hard_weight
        return self.tau(loss_kwargs) if whole else 1.0

    def head_labels(self, loss_kwargs: Any) -> Tensor:
        labels: Tensor = loss_kwargs.shifted_labels
        ignore, ids = self.loss_cfg.ignore_idx, loss_kwargs.teacher_topk_ids
        if self.loss_cfg.topk_mode is None or ids is None:
            return labels
        ids = ids.masked_fill((labels == ignore).unsqueeze(-1), ignore)
        return torch.cat([ids.to(labels.dtype), labels.unsqueeze(-1)], -1)

    def stats_needed(self) -> StatSpec:
        cfg = self.loss_cfg
        if cfg.topk_mode is None:
            return StatSpec(divergence=True)
        reverse = cfg.divergence in ("reverse_kl", "mixed") and cfg.outside_logprob is not None
        return StatSpec(entropy=cfg.topk_mode == "full" and reverse)

    def token_loss(self, stats: TokenStats, loss_kwargs: Any) -> TokenLoss:
        cfg, metrics = self.loss_cfg, dict[str, Metric]()
        if cfg.topk_mode is None:
            assert stats.divergence is not None
            soft, nll = stats.divergence, -stats.logprobs
        else:
            soft, nll = self._topk(stats, loss_kwargs, metrics), -stats.logprobs[:, -1]
        if cfg.loss_max_clamp is not None:
            soft = soft.clamp(-cfg.loss_max_clamp, cfg.loss_max_clamp)
        metrics |= {"divergence": Metric.mean(soft), "nll": Metric.mean(nll), "num_tokens": Metric.count_of(nll)}
        if stats.entropy is not None:
            metrics["entropy"] = Metric.mean(stats.entropy)
        tau = self.tau(loss_kwargs)
        loss = cfg.soft_weight * (soft * tau**2 if cfg.t2_factor else soft)
        if cfg.hard_weight:
            loss = loss + cfg.hard_weight * nll
        return loss * loss_kwargs.loss_weight, metrics

    def _topk(self, stats: TokenStats, kw: Any, metrics: dict[str, Metric]) -> Tensor:
        cfg = self.loss_cfg
        assert cfg.topk_mode is not None
        present = kw.teacher_topk_ids != cfg.ignore_idx
        student, teacher = stats.logprobs[:, :-1], kw.teacher_topk_logprobs
        for name, logprobs in (("student_mass", student), ("teacher_mass", teacher)):
            metrics[name] = Metric.mean(logprobs.exp().masked_fill(~present, 0).sum(-1))
        if cfg.topk_mode == "renormalized":
            tau = self.tau(kw)
            own = tau if cfg.teacher_temperature is None else cfg.teacher_temperature
            student = student / (tau.unsqueeze(1) if isinstance(tau, Tensor) else tau)
            teacher = teacher / (own.unsqueeze(1) if isinstance(own, Tensor) else own)
        return topk_divergence(
            student,
            teacher,
            cfg.divergence_of(),
            cfg.topk_mode,
            present=present,
            entropy=stats.entropy,
            outside_logprob=cfg.outside_logprob,
            log_prob_min=cfg.log_prob_min_clamp,
        )
