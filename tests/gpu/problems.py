"""Every kind of loss with its oracle, on one micro-batch with all that may stand in one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from tests.gpu.lane import DEVICE, SMALL, Shape, on_device
from tests.oracle import ce, grpo, head
from xloss import (
    BaseLossConfig,
    BaseLossContext,
    BaseLossContextInputItem,
    BaseLossKwargs,
    CELossConfig,
    CELossContextInputItem,
    GRPOLossConfig,
    PerToken,
    RLLossContextInputItem,
    TokenStats,
)
from xloss.losses.info import LossInfo

VANILLA = {"loss_type": "vanilla", "cliprange_low": 0.2, "cliprange_high": 0.28}
_BOUNDS = (0.5, 0.8, 1.28, 1.5, 3.0)  # ratios at which some loss below switches


# ---------------------------------------------------------------- inputs


@dataclass
class Inputs:
    """One micro-batch on the CPU: hidden [1, T, H], weight [V, H] and bias [V] exact in a working dtype."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    batch: grpo.Batch
    head: head.Head

    @property
    def count(self) -> int:
        return int((self.batch.labels != -100).sum())


def make_inputs(
    dtype: torch.dtype, *, shape: Shape = SMALL, options: head.Head | None = None, bias: bool = False, seed: int = 7
) -> Inputs:
    """A quarter of the labels ignored, labels 0 and V - 1, advantages of 0; ratios on all sides of every clip."""
    g = torch.Generator().manual_seed(seed)
    options = options or head.Head()
    hidden = torch.randn(1, shape.tokens, shape.hidden, generator=g).to(dtype)
    weight = (1.5 * torch.randn(shape.vocab, shape.hidden, generator=g) / shape.hidden**0.5).to(dtype)
    offset = torch.randn(shape.vocab, generator=g).to(dtype) if bias else None
    labels = torch.randint(0, shape.vocab, (1, shape.tokens), generator=g)
    labels[0, torch.randperm(shape.tokens, generator=g)[: shape.tokens // 4]] = -100
    labels[0, 0], labels[0, -1] = 0, shape.vocab - 1
    advantages = torch.randn(1, shape.tokens, generator=g)
    advantages[0, 5::7] = 0
    now = head.token_stats(hidden, weight, labels, offset, options).logprobs
    step = 0.5 * torch.randn(1, shape.tokens, generator=g)
    for bound in torch.tensor(_BOUNDS).log():  # off the bounds by more than a log-prob's error: no side to take there
        step = torch.where((step - bound).abs() < 0.02, bound + 0.03, step)
    drift = 0.5 * torch.randn(1, shape.tokens, generator=g)
    batch = grpo.Batch(labels, advantages, old=(now - step).float(), ref=(now - drift).float())
    return Inputs(hidden, weight, offset, batch, options)


# ---------------------------------------------------------------- losses of a user's own


class FocalConfig(BaseLossConfig):
    """``-(1 - p)^2 log p / N`` (arXiv 1708.02002)."""

    @property
    def loss_ctx_cls(self) -> type[FocalContext]:
        return FocalContext


class OwnItem(BaseLossContextInputItem):
    """What both losses read."""

    advantages: Annotated[Tensor, PerToken(pad=0.0)]
    old_logprobs: Annotated[Tensor, PerToken(pad=0.0)]


class OwnKwargs(BaseLossKwargs):
    """The item's tensors, and ``1 / N`` at tokens that count."""

    advantages: Annotated[Tensor, PerToken(pad=0.0)]
    old_logprobs: Annotated[Tensor, PerToken(pad=0.0)]
    loss_weight: Annotated[Tensor | None, PerToken(pad=0.0, weight=True)] = None


class _OwnContext(BaseLossContext[OwnItem]):
    @classmethod
    def calibrate(cls, kwargs_list: list[Any], loss_cfg: Any, cu_seq_lens_list: Any, ranks: Any) -> None:
        for kwargs in kwargs_list:
            valid = (kwargs.shifted_labels != loss_cfg.ignore_idx).float()
            kwargs.loss_weight = valid / valid.sum()


class FocalContext(_OwnContext):
    """Each token's loss is its own: one pass, but no kernel knows it."""

    loss_cfg: FocalConfig
    loss_kwargs: OwnKwargs
    token_local: ClassVar[bool] = True

    def token_loss(self, stats: TokenStats, loss_kwargs: Any) -> Tensor:
        return -((1 - stats.logprobs.exp()) ** 2) * stats.logprobs * loss_kwargs.loss_weight


class SequenceConfig(BaseLossConfig):
    """GSPO (arXiv 2507.18071) on equally long sequences: the clipped ratio of a sequence's mean log-ratio."""

    sequences: int

    @property
    def loss_ctx_cls(self) -> type[SequenceContext]:
        return SequenceContext


class SequenceContext(_OwnContext):
    """Couples tokens: two passes."""

    loss_cfg: SequenceConfig
    loss_kwargs: OwnKwargs

    def token_loss(self, stats: TokenStats, loss_kwargs: Any) -> Tensor:
        shape = (self.loss_cfg.sequences, -1)
        counts = (loss_kwargs.loss_weight > 0).to(stats.lse.dtype).reshape(shape)
        log_ratio = (stats.logprobs - loss_kwargs.old_logprobs).reshape(shape) * counts
        ratio = (log_ratio.sum(1) / counts.sum(1)).exp().unsqueeze(1)
        advantages = loss_kwargs.advantages.reshape(shape)
        surrogate = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
        return -(surrogate * loss_kwargs.loss_weight.reshape(shape)).reshape(-1)


# ---------------------------------------------------------------- losses and their oracles


@dataclass(frozen=True)
class LossCase:
    """A config without its run options, and the oracle's summands from float64 statistics.

    `item`: what the context is given. `local`: tokens stand alone. `bounds`: of packed sequences. `labels`: those of
    the statistics, where they are not the batch's.
    """

    make: Callable[..., BaseLossConfig]
    terms: Callable[[head.Stats, Inputs], Tensor]
    fields: dict[str, Any]
    item: Callable[[Inputs], BaseLossContextInputItem]
    local: bool = True
    bounds: Callable[[Inputs], list[int]] | None = None
    labels: Callable[[Inputs], Tensor] | None = None


def ce_case(**options: Any) -> LossCase:
    def terms(stats: head.Stats, given: Inputs) -> Tensor:
        return ce.step_weights([given.batch.labels])[0] * ce.token_loss(stats, **options)

    return LossCase(CELossConfig, terms, dict(options), _ce_item)


def policy_case(policy: dict[str, Any], kl: str | None = None, entropy: float = 0.0) -> LossCase:
    def terms(stats: head.Stats, given: Inputs) -> Tensor:
        objective = grpo.Objective(policy, 0.3 if kl else 0.0, kl, entropy, given.head)
        return grpo.token_loss(stats, given.batch, objective, grpo.step_weights([given.batch], objective)[0])

    fields = {"use_kl_loss": kl is not None, "kl_loss_type": kl, "kl_loss_coef": 0.3, "entropy_coef": entropy}
    return LossCase(GRPOLossConfig, terms, {"policy_loss_cfg": policy, **fields}, rl_item)


def _ce_item(given: Inputs) -> CELossContextInputItem:
    return CELossContextInputItem(shifted_labels=on_device(given.batch.labels))


def rl_item(given: Inputs) -> RLLossContextInputItem:
    b = given.batch
    assert b.old is not None and b.ref is not None
    labels, advantages, old, ref = (on_device(x) for x in (b.labels, b.advantages, b.old, b.ref))
    return RLLossContextInputItem(shifted_labels=labels, advantages=advantages, old_logprobs=old, ref_logprobs=ref)


def _own_item(given: Inputs) -> OwnItem:
    known = rl_item(given)
    assert known.old_logprobs is not None
    return OwnItem(shifted_labels=known.shifted_labels, advantages=known.advantages, old_logprobs=known.old_logprobs)


def _focal_terms(stats: head.Stats, given: Inputs) -> Tensor:
    lp = stats.logprobs
    return -((1 - lp.exp()) ** 2) * lp / given.count * (given.batch.labels != -100)


def _sequence_terms(stats: head.Stats, given: Inputs) -> Tensor:
    known = (given.batch.labels != -100).reshape(SMALL.sequences, -1)
    assert given.batch.old is not None
    log_ratio = (stats.logprobs - given.batch.old.double()).reshape(known.shape)
    total = torch.zeros((), dtype=torch.float64)
    for d, live, advantages in zip(log_ratio, known, given.batch.advantages.reshape(known.shape), strict=True):
        ratio = d[live].mean().exp()
        a = advantages[live].double()
        total = total - torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a).sum() / given.count
    return total.reshape(1)


LOSSES: dict[str, LossCase] = {
    "ce": ce_case(),
    "ce-smooth-z": ce_case(label_smoothing=0.1, z_loss_coef=0.01),
    "vanilla": policy_case(VANILLA),
    "vanilla-k3-entropy": policy_case(VANILLA, "k3", 0.1),
    "cispo": policy_case({"loss_type": "cispo", "clip_low_threshold": 0.5, "clip_high_threshold": 1.5}),
    "dro": policy_case({"loss_type": "dro", "beta": 0.3}),
    "importance_sampling": policy_case({"loss_type": "importance_sampling"}),
    "own-token-loss": LossCase(FocalConfig, _focal_terms, {}, _own_item),
    "own-sequence-loss": LossCase(
        SequenceConfig, _sequence_terms, {"sequences": SMALL.sequences}, _own_item, local=False
    ),
}


# ---------------------------------------------------------------- running them


@dataclass
class Outcome:
    """A step's results, on the CPU. `grads`: of hidden states, weight and, where there is one, bias."""

    loss: Tensor
    logprobs: Tensor
    grads: list[Tensor]
    terms: Tensor | None = None
    info: LossInfo | None = None


def context_of(case: LossCase, given: Inputs, **run: Any) -> BaseLossContext[Any]:
    """The calibrated context of the micro-batch on the lane's device."""
    options = {"temperature": given.head.temperature, "softcap": given.head.softcap}
    cfg = case.make(**case.fields, **options, logit_scale=given.head.logit_scale, **run)
    cls = cfg.loss_ctx_cls
    bounds = None if case.bounds is None else [on_device(torch.tensor(case.bounds(given), dtype=torch.int32))]
    return cls(cfg, cls.build_batches_loss_kwargs([case.item(given)], cfg, bounds)[0])


def leaves_of(given: Inputs) -> list[Tensor]:
    """Hidden states, weight and bias on the lane's device, to be differentiated."""
    tensors = (given.hidden, given.weight, given.bias)
    return [on_device(x).requires_grad_() for x in tensors if x is not None]


def run_case(case: LossCase, given: Inputs, upstream: float = 1.7, **run: Any) -> Outcome:
    """One step on the lane's device."""
    leaves = leaves_of(given)
    loss, info = context_of(case, given, **run).forward(*leaves)
    grads = torch.autograd.grad(loss * upstream, leaves)
    assert loss.device.type == DEVICE.type and info.logprobs is not None
    return Outcome(loss.detach().cpu(), info.logprobs.detach().cpu(), [g.cpu() for g in grads], info=info)


def gold_case(case: LossCase, given: Inputs, upstream: float = 1.7) -> Outcome:
    """The oracle, in float64 on the CPU."""
    leaves = head.leaves(given.hidden, given.weight, given.bias)
    labels = given.batch.labels if case.labels is None else case.labels(given)
    stats = head.token_stats(leaves[0], leaves[1], labels, leaves[2], given.head)
    terms = case.terms(stats, given)
    grads = [g for g in head.grads(terms.sum() * upstream, leaves) if g is not None]
    return Outcome(terms.sum().detach(), stats.logprobs.detach(), grads, terms.detach())
