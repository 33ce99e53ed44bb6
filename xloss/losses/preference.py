"""Preference losses: DPO and its kin, reference-free ones, and unpaired ones such as KTO."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import BeforeValidator, Field, model_validator
from torch import Tensor

from xloss.distributed import RankSum, TokenRanks
from xloss.errors import MissingFieldError, OptionError, ShapeError
from xloss.losses import calibration
from xloss.losses.base import BaseLossContext, TokenLoss
from xloss.losses.config import BaseLossConfig
from xloss.losses.model import require
from xloss.losses.preferences import AnyPreferenceTerm, PreferenceBatch, PreferenceTerm, Side
from xloss.losses.preferences.base import SHARED
from xloss.losses.preferences.kwargs import PreferenceLossContextInputItem, PreferenceLossKwargs
from xloss.losses.preferences.layout import Layout, find_pairs, find_sides, tail_tokens
from xloss.losses.preferences.metrics import preference_metrics
from xloss.metrics import Metric
from xloss.packing import Segments
from xloss.policy.preference import Divergence, divergence_score, wpo_weight
from xloss.stats import StatSpec, TokenStats


def _as_terms(value: Any) -> Any:
    return value if isinstance(value, list | tuple) else (value,)


class PreferenceLossConfig(BaseLossConfig):
    """``sum_k weight_k mean_pairs(loss_k)``, the mean over all pairs (or sequences) of the global batch.

    Args:
        loss_type: a name, a term (or a dict of its fields, tagged by ``loss_type``), or a list of these (MPO).
        beta: of the terms that set none; ``None``: each term's default.
        label_smoothing: likewise, for terms that have it.
        average_log_prob: likewise; whether log-probs of a sequence are means over its tokens, not sums.
        layout: which sequences of a micro-batch form a pair when the item does not say: ``alternating`` chosen,
            rejected, chosen, ...; or ``halves``, all chosen, then all rejected in the same order (TRL, Liger).
        reference_free: take the reference's log-probs to be 0.
        f_divergence: of the regulariser, in place of the reverse KL (f-DPO).
        f_alpha: its alpha, for ``f_divergence='alpha'``.
        ld_alpha: weight of a sequence's tokens beyond the length of the shorter one of its pair (LD-DPO).
        use_weighting: multiply each pair's losses (not its likelihood terms) by its WPO weight.
        max_weighting: upper limit of that weight.
        nll_reduction: likelihood of chosen sequences as a mean over all their ``token``s, or over sequences of
            token means (``sample``) or of token sums (``sample_sum``).
        count_empty_sequences: whether pairs and sequences without a valid token count, with log-prob 0 (TRL).
    """

    loss_type: Annotated[tuple[AnyPreferenceTerm, ...], BeforeValidator(_as_terms)] = Field(min_length=1)
    beta: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    label_smoothing: float | None = Field(default=None, ge=0, lt=1)
    average_log_prob: bool | None = None
    layout: Layout = "alternating"
    reference_free: bool = False
    f_divergence: Divergence = "reverse_kl"
    f_alpha: float = Field(default=0.5, allow_inf_nan=False)
    ld_alpha: float | None = Field(default=None, ge=0, le=1)
    use_weighting: bool = False
    max_weighting: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    nll_reduction: Literal["token", "sample", "sample_sum"] = "token"
    count_empty_sequences: bool = False

    @property
    def terms(self) -> tuple[PreferenceTerm, ...]:
        """The terms, with what they left open filled in."""
        shared = {name: getattr(self, name) for name in SHARED}
        return tuple(term.resolved(shared) for term in self.loss_type)

    @property
    def paired(self) -> bool:
        """Whether pairs are compared, or sequences judged each alone."""
        return self.loss_type[0].paired

    @property
    def needs_reference(self) -> bool:
        """Whether a term reads the reference's log-probs."""
        return not self.reference_free and any(term.reads_reference for term in self.loss_type)

    @property
    def loss_ctx_cls(self) -> type[PreferenceLossContext]:
        return PreferenceLossContext

    @model_validator(mode="after")
    def _holds_together(self) -> Self:
        terms, paired = self.terms, self.paired
        names = ", ".join(str(term.loss_type) for term in terms)
        unused = {
            "label_smoothing": self.label_smoothing is not None
            and not any(hasattr(t, "label_smoothing") for t in terms),
            "f_divergence": self.f_divergence != "reverse_kl" and not any(t.reads_scores for t in terms),
            "f_alpha": self.f_alpha != 0.5 and self.f_divergence != "alpha",
            "max_weighting": self.max_weighting is not None and not self.use_weighting,
            "nll_reduction": self.nll_reduction != "token" and not any(t.nll_factor() for t in terms),
            "layout": self.layout != "alternating" and not paired,
            "use_weighting": self.use_weighting and not paired,
            "ld_alpha": self.ld_alpha is not None and not paired,
        }
        for name, is_unused in unused.items():
            if is_unused:
                raise ValueError(f"{name}={getattr(self, name)!r} has no effect here: loss_type is {names}")
        if any(term.paired != paired for term in terms):
            raise ValueError(f"loss_type mixes losses of pairs with unpaired ones: {names}")
        return self


class PreferenceLossContext(BaseLossContext[PreferenceLossContextInputItem]):
    """Preference loss of one micro-batch."""

    loss_cfg: PreferenceLossConfig
    loss_kwargs: PreferenceLossKwargs

    @classmethod
    def calibrate(
        cls,
        kwargs_list: list[PreferenceLossKwargs],
        loss_cfg: PreferenceLossConfig,
        cu_seq_lens_list: Sequence[Tensor] | None,
        ranks: TokenRanks,
    ) -> None:
        calibration.attach_cu_seq_lens(kwargs_list, cu_seq_lens_list)
        for kwargs in kwargs_list:
            _check_fields(kwargs, loss_cfg)
            _find_sides(kwargs, loss_cfg)
        factor = ranks.gradient_factor(loss_cfg.grad_reduce)
        counts = [_num_terms(kwargs, loss_cfg) for kwargs in kwargs_list]
        num_losses, num_likelihoods = ranks.sum([n for n, _ in counts]), ranks.sum([n for _, n in counts])
        needs_kl = "kl" in {n for term in loss_cfg.loss_type for n in term.needs}
        kl = _sum_of_kl(kwargs_list, ranks) if needs_kl else None
        for kwargs in kwargs_list:
            kwargs.loss_divisor, kwargs.nll_divisor = num_losses.divisor() / factor, num_likelihoods.divisor() / factor
            kwargs.kl_point = None if kl is None else _mean_kl(kl, kwargs)

    def check_ready(self) -> None:
        require(self.loss_kwargs, "loss_divisor", "call build_batches on the contexts of this optimizer step first")
        _check_fields(self.loss_kwargs, self.loss_cfg)

    def why_coupled(self) -> str:
        return "a preference is between whole sequences"

    def stats_needed(self) -> StatSpec:
        return StatSpec(sum_p2=self.loss_cfg.use_weighting)

    def live_mask(self) -> Tensor:
        kwargs = self.loss_kwargs
        if kwargs.chosen is None or kwargs.rejected is None:
            return super().live_mask()
        sequences = kwargs.sequences(self.loss_cfg.ignore_idx)
        compared = torch.zeros(sequences.count, dtype=torch.bool, device=sequences.ids.device)
        compared[kwargs.chosen] = True
        compared[kwargs.rejected] = True
        return sequences.valid & sequences.spread(compared)

    def token_loss(self, stats: TokenStats, loss_kwargs: Any) -> TokenLoss:
        cfg, kw = self.loss_cfg, loss_kwargs
        sequences, terms = kw.sequences(cfg.ignore_idx), cfg.terms
        sums, ref_sums = self._sums(stats.logprobs, kw, sequences)
        lengths = sequences.lengths(sums).clamp(min=1)
        batches = {average: self._batch(sums, ref_sums, lengths if average else None, kw) for average in (False, True)}
        losses = [term.losses(batches[bool(term.average_log_prob)]) for term in terms]
        metrics = preference_metrics(batches[bool(terms[0].average_log_prob)], terms[0].scale, cfg.paired)
        if kw.kl_point is not None:
            metrics["kl"] = Metric.mean(kw.kl_point)
        if cfg.use_weighting:
            assert stats.sum_p2 is not None
            aligned = sequences.mean(stats.logprobs.detach() - stats.sum_p2.detach().log())
            weights = wpo_weight(aligned[kw.chosen] + aligned[kw.rejected], cfg.max_weighting)
            losses = [weights * x for x in losses]
            metrics["wpo_weight"] = Metric.mean(weights)
        total = sums.new_zeros(())
        for term, x in zip(terms, losses, strict=True):
            total = total + term.weight * x.sum()
            if len(terms) > 1:
                metrics[f"loss/{term.loss_type}"] = Metric.mean(x)
        loss = total / kw.loss_divisor
        if nll_factor := sum(term.weight * term.nll_factor() for term in terms):
            nll = -sequences.sum(stats.logprobs)[kw.chosen]
            metrics["nll"] = Metric(nll.detach().sum(), lengths[kw.chosen].sum(), "mean")
            per_sequence = nll / lengths[kw.chosen] if cfg.nll_reduction == "sample" else nll
            loss = loss + nll_factor * per_sequence.sum() / kw.nll_divisor
        return loss, metrics

    def _sums(self, logprobs: Tensor, kw: Any, sequences: Segments) -> tuple[Tensor, Tensor]:
        """Log-probs of sequences ``[N]``, of the policy and of the reference."""
        share = torch.ones_like(logprobs)
        if kw.tail is not None:
            share = share.masked_fill(kw.tail, self.loss_cfg.ld_alpha or 0.0)
        sums = sequences.sum(logprobs * share)
        if kw.ref_logprobs is not None:
            return sums, sequences.sum(kw.ref_logprobs * share)
        if kw.ref_sequence_logprobs is not None:
            return sums, kw.ref_sequence_logprobs.to(sums.dtype)
        return sums, torch.zeros_like(sums)

    def _batch(self, sums: Tensor, ref_sums: Tensor, lengths: Tensor | None, kw: Any) -> PreferenceBatch:
        """What terms see, divided by ``lengths`` for those that average. NaN in sequences left out does not enter."""

        def side(numbers: Tensor) -> Side:
            own, ref = sums[numbers], ref_sums[numbers]
            scores = divergence_score(own - ref, self.loss_cfg.f_divergence, self.loss_cfg.f_alpha)
            return Side(*(x if lengths is None else x / lengths[numbers] for x in (own, ref, scores)))

        return PreferenceBatch(side(kw.chosen), side(kw.rejected), kw.kl_point, kw.reward_shift)


def _check_fields(kwargs: PreferenceLossKwargs, cfg: PreferenceLossConfig) -> None:
    """What the terms read is there, and nothing that none of them reads."""
    given = [name for name in ("ref_logprobs", "ref_sequence_logprobs") if getattr(kwargs, name) is not None]
    names = ", ".join(str(term.loss_type) for term in cfg.loss_type)
    if cfg.needs_reference and not given:
        raise MissingFieldError(
            f"loss_type {names} needs ref_logprobs (per token) or ref_sequence_logprobs: run LogProbContext on the "
            "reference's hidden states and head, or set reference_free=True"
        )
    if given and not cfg.needs_reference:
        raise OptionError(
            f"{given[0]} is given, but loss_type {names} with reference_free={cfg.reference_free} reads none"
        )
    if len(given) == 2:
        raise OptionError("ref_logprobs and ref_sequence_logprobs are both given; give one")
    if kwargs.ref_sequence_logprobs is not None:
        if cfg.ld_alpha is not None:
            raise OptionError(
                "ld_alpha weighs tokens of the reference too: give ref_logprobs, not ref_sequence_logprobs"
            )
        count = kwargs.bounds().numel() - 1
        if kwargs.ref_sequence_logprobs.shape != (count,):
            raise ShapeError(
                f"ref_sequence_logprobs must be [N] = ({count},), one per sequence; "
                f"got {tuple(kwargs.ref_sequence_logprobs.shape)}"
            )
    needed = {name for term in cfg.loss_type for name in term.needs}
    readable = needed | ({"reward_shift"} if any(t.loss_type == "bco_pair" for t in cfg.loss_type) else set())
    for name in ("kl", "reward_shift"):
        if getattr(kwargs, name) is None and name in needed:
            raise MissingFieldError(f"loss_type {names} needs {name}; torch.zeros(()) for none")
        if getattr(kwargs, name) is not None and name not in readable:
            raise OptionError(f"{name} is given, but loss_type {names} does not read it")
    if kwargs.reward_shift is not None and kwargs.reward_shift.ndim:
        raise ShapeError(f"reward_shift must be 0-d; got {tuple(kwargs.reward_shift.shape)}")


def _find_sides(kwargs: PreferenceLossKwargs, cfg: PreferenceLossConfig) -> None:
    """Fill in which sequences are compared, and the tokens that LD-DPO weighs."""
    sequences = kwargs.sequences(cfg.ignore_idx)
    if cfg.paired:
        sides = find_pairs(sequences, kwargs.pair_ids, kwargs.preferred, cfg.layout, cfg.count_empty_sequences)
    else:
        if kwargs.pair_ids is not None:
            raise OptionError("pair_ids is given, but the losses are of single sequences; leave it out")
        sides = find_sides(sequences, kwargs.preferred, cfg.count_empty_sequences)
    kwargs.chosen, kwargs.rejected = sides
    if cfg.ld_alpha is not None:
        kwargs.tail = tail_tokens(sequences, kwargs.bounds(), sides).reshape(kwargs.shifted_labels.shape)


def _num_terms(kwargs: PreferenceLossKwargs, cfg: PreferenceLossConfig) -> tuple[Tensor, Tensor]:
    """Summands of the preference loss in this micro-batch, and of the likelihood; 0-d."""
    assert kwargs.chosen is not None and kwargs.rejected is not None
    device, count = kwargs.shifted_labels.device, kwargs.chosen.numel()
    both = count if cfg.paired else count + kwargs.rejected.numel()
    sequences = kwargs.sequences(cfg.ignore_idx)
    if cfg.nll_reduction == "token":
        likelihood = sequences.lengths(torch.ones(1, device=device))[kwargs.chosen].sum()
    else:
        likelihood = torch.tensor(float(count), device=device)
    return torch.tensor(float(both), device=device), likelihood


def _sum_of_kl(kwargs_list: Sequence[PreferenceLossKwargs], ranks: TokenRanks) -> RankSum:
    """Sum and number of ``kl`` over all micro-batches and ranks, ``[2]``."""
    parts = [require(kwargs, "kl", "other micro-batches have it").detach().double() for kwargs in kwargs_list]
    sums = [torch.stack([part.sum(), part.new_tensor(part.numel())]) for part in parts]
    return ranks.add(torch.stack(sums).sum(0) if sums else torch.zeros(2))


def _mean_kl(found: RankSum, kwargs: PreferenceLossKwargs) -> Tensor:
    """The mean, at least 0, in the dtype of ``kl``."""
    total, count = found.value().unbind()
    assert kwargs.kl is not None
    return (total / count.clamp(min=1)).clamp(min=0).to(kwargs.kl)
