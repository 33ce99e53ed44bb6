"""NeMo RL: a loss config of xloss as its ``LossFunction``.

NeMo RL gives a loss padded batches in the frame of tokens (position t of a field is about token t), log-probs or logits
in the frame of predictions, and the counts of valid tokens and sequences of the global batch. ``from_nemo_rl`` is the
other direction.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields as dataclass_fields
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from xloss.adapters.given import checked, local_context, reduced_by
from xloss.distributed import alone
from xloss.errors import MissingFieldError, OptionError, ShapeError, UnsupportedError
from xloss.head import eager
from xloss.losses.config import BaseLossConfig
from xloss.losses.evaluation import StatsLoss, loss_from_stats
from xloss.losses.grpo import GRPOLossConfig
from xloss.losses.metric_names import rename_metrics
from xloss.losses.preference import PreferenceLossConfig
from xloss.losses.preferences.kwargs import PreferenceLossKwargs
from xloss.stats import StatSpec, TokenStats

FIELDS = {
    "advantages": "advantages",
    "prev_logprobs": "old_logprobs",
    "generation_logprobs": "rollout_logprobs",
    "reference_policy_logprobs": "ref_logprobs",
}
"""Fields of NeMo RL's data, ``[B, S]`` in the frame of tokens, and ours."""

_EXTREMES = {"probs_ratio_min": torch.inf, "probs_ratio_max": -torch.inf}  # NeMo RL adds up extremes of other names
_NONE = 1e-8  # what NeMo RL divides by where it counts nothing
_FILTERED = ("curr_logprobs_keep_mask", "curr_logprobs_unfiltered")


class NemoLoss:
    """A ``LossFunction``: ``loss_fn(data, global_valid_seqs, global_valid_toks, next_token_logprobs=...)``.

    ``loss_type`` is ``TOKEN_LEVEL`` for ``loss_reduction="token"``, else ``SEQUENCE_LEVEL``: the loss is this
    micro-batch's share, divided by the global count of that kind. ``input_type`` is ``LOGPROB``, or ``LOGIT`` where the
    loss needs more of the distribution (entropy, label smoothing, z-loss, accuracy). ``metric_normalizations`` says
    what each figure was divided by.
    """

    def __init__(self, config: BaseLossConfig, vocab_size: int | None = None) -> None:
        """Needs NeMo RL for its enums.

        Args:
            config: ``loss_reduction`` ``token`` or ``sample``, or a preference loss of pairs, chosen first.
            vocab_size: of the head, where ``input_type`` is ``LOGIT``: a shard of logits shows by its size.

        Raises:
            OptionError, UnsupportedError: the config asks for what NeMo RL does, or needs what it does not give.
            MissingFieldError: ``vocab_size`` is needed.
        """
        from nemo_rl.algorithms.loss.interfaces import LossInputType, LossType, MetricNormalizer

        self.config = _run_as(config)
        by_token = getattr(self.config, "loss_reduction", "") == "token"
        in_pairs = isinstance(self.config, PreferenceLossConfig)
        self.divisor = "pairs" if in_pairs else "tokens" if by_token else "sequences"
        self.needed = _needed(self.config)
        on_logits = self.needed != StatSpec() or bool(getattr(config, "z_loss_coef", 0.0))
        if on_logits and vocab_size is None:
            raise MissingFieldError("this loss is of logits, whose shards look like logits: give vocab_size")
        self.vocab_size = vocab_size
        self.loss_type = LossType.TOKEN_LEVEL if by_token else LossType.SEQUENCE_LEVEL
        self.input_type = LossInputType.LOGIT if on_logits else LossInputType.LOGPROB
        self.kinds = self._kinds()
        own = MetricNormalizer.TOKENS if by_token else MetricNormalizer.SEQUENCES
        divided = {
            "own": own,
            "tokens": MetricNormalizer.TOKENS,
            "sequences": MetricNormalizer.SEQUENCES,
            "pairs": MetricNormalizer.SEQUENCES,
            "none": MetricNormalizer.NONE,
        }
        self.metric_normalizations = {name: divided[kind] for name, kind in self.kinds.values()}
        self.metric_normalizations |= {"loss": own, "num_valid_samples": MetricNormalizer.NONE}

    def __call__(
        self,
        data: Mapping[str, Any],
        global_valid_seqs: Tensor,
        global_valid_toks: Tensor,
        next_token_logprobs: Tensor | None = None,
        logits: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        """Share of the global loss, 0-d, and figures.

        Args:
            data: ``input_ids``, ``token_mask`` ``[B, S]``, ``sample_mask`` ``[B]``, and those of ``FIELDS`` that the
                loss reads; without ``prev_logprobs`` the ratio is 1, as with ``force_on_policy_ratio``.
            global_valid_seqs: of the global batch; ``global_valid_toks``: likewise.
            next_token_logprobs: ``[B, S - 1]``, of the tokens after the first. logits: ``[B, S, V]``.

        Raises:
            MissingFieldError: a field or input that the loss needs is not there.
            ShapeError, UnsupportedError: the logits are a shard; the log-probs are of filtered distributions.
        """
        mask = (data["token_mask"] * data["sample_mask"].unsqueeze(-1))[:, 1:] != 0
        labels = data["input_ids"][:, 1:].masked_fill(~mask, self.config.ignore_idx)
        stats = self._stats(labels, next_token_logprobs, logits)
        fields = {"shifted_labels": labels} | _fields_of(self.config, data)
        if isinstance(self.config, GRPOLossConfig):  # without prev_logprobs: NeMo RL's force_on_policy_ratio
            fields.setdefault("old_logprobs", stats.logprobs.detach())
        found, own = self._loss(fields, stats)
        seqs, toks = (torch.as_tensor(n, device=labels.device) for n in (global_valid_seqs, global_valid_toks))
        of = {"tokens": toks, "sequences": seqs, "pairs": seqs / 2}
        of = {name: count.clamp(min=_NONE) for name, count in of.items()}
        share = own / of[self.divisor]
        loss = found.loss * share
        figures = self._figures(found, int((data["sample_mask"] != 0).sum()), share, of)
        return loss, {"loss": float(loss.detach())} | figures

    def _loss(self, fields: dict[str, Any], stats: TokenStats) -> tuple[StatsLoss, Any]:
        """The loss of this micro-batch as if it were all, and how many tokens, sequences or pairs that divided by."""
        labels = fields["shifted_labels"]
        one = torch.tensor([0, labels.numel()], device=labels.device) if labels.shape[0] == 1 else None
        with alone():
            ctx = local_context(self.config, fields, one)
            found = loss_from_stats(ctx, stats, self.vocab_size)
        valid = labels != self.config.ignore_idx
        if self.divisor == "tokens":
            return found, valid.sum()
        if self.divisor == "sequences":
            return found, valid.any(1).sum()
        assert isinstance(ctx.loss_kwargs, PreferenceLossKwargs) and ctx.loss_kwargs.chosen is not None
        return found, ctx.loss_kwargs.chosen.numel()

    def _stats(self, labels: Tensor, logprobs: Tensor | None, logits: Tensor | None) -> TokenStats:
        if self.input_type.name == "LOGPROB":
            if logprobs is None:
                raise MissingFieldError("next_token_logprobs is None; input_type is LOGPROB")
            return TokenStats(logprobs, torch.full_like(logprobs, torch.nan))
        if logits is None:
            raise MissingFieldError("logits is None; input_type is LOGIT")
        if isinstance(logits, DTensor) or logits.shape[-1] != self.vocab_size:
            raise ShapeError(
                f"logits must hold the whole vocabulary, [B, S, {self.vocab_size}]; got {type(logits).__name__} "
                f"{tuple(logits.shape)}: a loss of more than log-probs cannot run on tensor-parallel shards"
            )
        z = logits[:, :-1].flatten(0, 1)
        options = self.config.head_options(self.needed)
        stats = eager.stats_of_logits(z.to(torch.promote_types(z.dtype, torch.float32)), labels.flatten(), options)
        return stats.map(lambda x: x.view(labels.shape))

    def _figures(self, found: StatsLoss, num_samples: int, share: Any, of: Mapping[str, Any]) -> dict[str, Any]:
        """Figures by NeMo RL's names, each divided by its count in ``of``, by the loss's own, or by nothing."""
        out: dict[str, Any] = {"num_valid_samples": num_samples}
        for ours, (name, kind) in self.kinds.items():
            metric = found.metrics.get(ours)
            if metric is None:  # of a field that this batch does not have
                continue
            if kind == "none":
                out[name] = metric.value if torch.isfinite(metric.value) else _EXTREMES[name]
            else:
                out[name] = metric.value * share if kind == "own" else metric.value / of[kind]
        return {name: float(value) for name, value in out.items()}

    def _kinds(self) -> dict[str, tuple[str, str]]:
        """Of each figure that adds up over micro-batches, NeMo RL's name and what it is a mean over.

        Found by trying: two sequences of 3 and 2 tokens are 5 tokens, and 1 pair.
        """
        labels = torch.tensor([[0, 0, 0], [0, 0, self.config.ignore_idx]])
        one = torch.zeros(labels.shape)
        data = {name: torch.zeros(2, 4) for name in FIELDS}
        needed = {spec.name: one for spec in dataclass_fields(StatSpec) if getattr(self.needed, spec.name)}
        found, _ = self._loss(
            {"shifted_labels": labels} | _fields_of(self.config, data), TokenStats(one, one, **needed)
        )
        kinds = {}
        for ours, metric in found.metrics.items():
            (name,) = rename_metrics({ours: metric.result()}, "nemo")
            if metric.reducer == "mean" and metric.count is not None:
                kind = {5: "tokens", 2: "sequences", 1: "pairs"}.get(int(metric.count))
            elif metric.reducer == "sum":
                kind = "own" if name.endswith("_loss") else None
            else:
                kind = "none" if name in _EXTREMES else None
            if kind is not None:
                kinds[ours] = (name, kind)
        return kinds


def _run_as(config: BaseLossConfig) -> BaseLossConfig:
    """The config as it is run here, or an error."""
    if isinstance(config, PreferenceLossConfig):
        if not config.paired or config.layout != "alternating":
            raise UnsupportedError("NeMo RL's batches are of pairs, chosen and rejected in turn: layout='alternating'")
        if any(term.nll_factor() for term in config.terms) and config.nll_reduction == "token":
            raise UnsupportedError("nll_reduction='token' divides by chosen tokens, which NeMo RL does not count")
        if config.count_empty_sequences:
            raise OptionError("count_empty_sequences=True, but NeMo RL counts the sequences; leave it out")
        return config.model_copy(update={"grad_reduce": "sum"})
    ours = checked(config, "NeMo RL")
    if ours.loss_reduction not in ("token", "sample"):
        raise OptionError(
            f"loss_reduction={ours.loss_reduction!r}; NeMo RL has TOKEN_LEVEL ('token') and SEQUENCE_LEVEL ('sample')"
        )
    # it counts every sequence of sample_mask, those without a token too
    return reduced_by(ours.model_copy(update={"count_empty_sequences": False}), ours.loss_reduction)


def _needed(config: BaseLossConfig) -> StatSpec:
    kwargs_cls = config.loss_kwargs_cls
    nothing = dict.fromkeys(kwargs_cls.model_fields) | {"shifted_labels": torch.zeros(0, dtype=torch.int64)}
    return config.loss_ctx_cls(config, kwargs_cls.model_construct(**nothing)).stats_needed()


def _fields_of(config: BaseLossConfig, data: Mapping[str, Any]) -> dict[str, Any]:
    """Fields that the loss can read, in the frame of predictions."""
    if any(data.get(name) is not None for name in _FILTERED):
        raise UnsupportedError("log-probs of distributions cut by top-k or top-p: xloss has no mask for them here")
    known = config.loss_kwargs_cls.model_fields
    found = {ours: data[theirs][:, 1:] for theirs, ours in FIELDS.items() if theirs in data and ours in known}
    if isinstance(config, PreferenceLossConfig):  # NeMo RL's DPO has the reference in the frame of predictions
        found.pop("ref_logprobs", None)
        if config.needs_reference and "reference_policy_logprobs" in data:
            found["ref_logprobs"] = data["reference_policy_logprobs"][:, :-1]
    if isinstance(config, GRPOLossConfig) and not config.use_kl_loss:
        found.pop("ref_logprobs", None)
    return found
