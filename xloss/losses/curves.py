"""A loss and its gradient against the one number that it is a function of, by the formulas that train."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from xloss.losses.ce import CELossConfig, CELossContext, CELossKwargs
from xloss.losses.distill import DistillLossConfig
from xloss.losses.policies import PolicyLossConfig
from xloss.losses.preferences import PreferenceBatch, PreferenceTerm, Side
from xloss.losses.preferences.reference_free import SFTTerm
from xloss.losses.value import ValueLossConfig
from xloss.packing import Segments
from xloss.policy.batch import PolicyBatch
from xloss.policy.divergence import divergence
from xloss.policy.preference import Divergence as FDivergence
from xloss.policy.preference import divergence_score
from xloss.policy.value import value_loss
from xloss.stats import TokenStats

Line = tuple[str, Tensor]
_OLD = -2.0
_VOCABULARY = 1000
_TEACHER = 0.7


@dataclass(frozen=True)
class Curve:
    """Lines ``(label, [N])`` over ``x [N]``, float64 and detached.

    Args:
        setting: what is held still.
        mark: where nothing has changed yet (a ratio of 1), or ``None``.
        shown: points that a table shows; all of them are in ``x``.
    """

    x_label: str
    grad_label: str
    x: Tensor
    losses: tuple[Line, ...]
    grads: tuple[Line, ...]
    shown: tuple[float, ...]
    setting: str = ""
    mark: float | None = None


def policy_curve(policy: PolicyLossConfig) -> Curve | str:
    """Against the ratio, for advantages +1 and -1, each token a sequence of its own; or why there is no curve."""
    if policy.couples() in ("group", "batch"):
        return f"{type(policy).__name__} compares tokens with each other: it is no function of one ratio"
    x, shown = _ratios(policy)
    losses, grads = [], []
    for label, advantage in (("A = +1", 1.0), ("A = -1", -1.0)):
        old = torch.full_like(x, _OLD)
        logprobs = (old + x.log()).requires_grad_()
        tokens = torch.arange(x.numel())
        alone = policy.couples() == "token"
        batch = PolicyBatch(
            logprobs=logprobs,
            old_logprobs=old,
            advantages=torch.full_like(x, advantage),
            rollout_logprobs=old,
            ref_logprobs=old,
            entropy=torch.ones_like(x),
            sequences=None if alone else Segments(tokens, x.numel(), tokens >= 0),
        )
        loss = policy.per_token(batch.at(policy.level()))
        losses.append((label, loss.detach()))
        grads.append((label, torch.autograd.grad(loss.sum(), logprobs)[0]))
    setting = f"old log-prob {_OLD:g}, the sampler's and the reference's too"
    if policy.couples() == "sequence":
        setting += "; a sequence of one token"
    return Curve("ratio", "d loss / d logprob", x, tuple(losses), tuple(grads), shown, setting, mark=1.0)


def _ratios(policy: PolicyLossConfig) -> tuple[Tensor, tuple[float, ...]]:
    low, high = policy.ratio_bounds() or (1.0, 1.0)
    span = max(1 - low, high - 1)
    if 0 < span < 0.05:  # a sequence's ratio
        return _grid(1 - 4 * span, 1 + 4 * span, [1 + k * span for k in (-4, -2, -1, 0, 1, 2, 4)])
    end = 4.0 if high < 4 else 1.25 * high
    return _grid(0.02, end, [r for r in (0.25, 0.5, 0.8, 1.0, 1.2, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0) if r <= end])


def preference_curve(
    term: PreferenceTerm, f_divergence: FDivergence = "reverse_kl", f_alpha: float = 0.5
) -> Curve | str:
    """Against the difference of chosen and rejected, each moved by half; of an unpaired term, against the log-ratio.

    Where there is none, why. ``beta`` and all else that a config fills in must be set.
    """
    if isinstance(term, SFTTerm):
        return "SFTTerm is the likelihood of the chosen sequences: a straight line"
    if not term.paired:
        return _unpaired_curve(term)
    bare = not term.reads_reference
    middle = -3.0 if bare else 0.0
    small = f_divergence != "reverse_kl" or (bare and term.average_log_prob)
    reach = 5.0 if small else 5 / term.scale
    x, shown = _grid(-reach, reach, [reach * k / 5 for k in (-5, -3, -1, 0, 1, 3, 5)])
    # one pair at a time: AOT sorts a batch
    chosen, rejected = ((middle + side * x / 2).requires_grad_() for side in (1, -1))
    loss = torch.cat(
        [
            term.losses(_sides(term, *pair, lambda u: divergence_score(u, f_divergence, f_alpha)))
            for pair in zip(chosen.split(1), rejected.split(1), strict=True)
        ]
    )
    grads = torch.autograd.grad(loss.sum(), [chosen, rejected])
    what = "log-probs" if bare else "log-ratios"
    what += ", means per token" if term.average_log_prob else ""
    setting = f"chosen and rejected moved by half the difference each, from {what} of {middle:g}; beta {term.scale:g}"
    if term.nll_factor():
        setting += "; without the likelihood term"
    lines = (("loss", loss.detach()),), tuple(zip(("chosen", "rejected"), grads, strict=True))
    return Curve("chosen - rejected", "d loss / d its log-prob", x, *lines, shown, setting, 0.0)


def _unpaired_curve(term: PreferenceTerm) -> Curve:
    x, shown = _grid(-5 / term.scale, 5 / term.scale, [k / term.scale for k in (-5, -3, -1, 0, 1, 3, 5)])
    losses, grads = [], []
    for label in ("desirable", "undesirable"):
        scores = x.clone().requires_grad_()
        sides = (scores, scores[:0]) if label == "desirable" else (scores[:0], scores)
        loss = term.losses(_sides(term, *sides))
        losses.append((label, loss.detach()))
        grads.append((label, torch.autograd.grad(loss.sum(), scores)[0]))
    setting = f"kl and reward shift 0; beta {term.scale:g}"
    return Curve("log-ratio of the sequence", "d loss / d logprob", x, tuple(losses), tuple(grads), shown, setting, 0.0)


def _sides(
    term: PreferenceTerm, chosen: Tensor, rejected: Tensor, score: Callable[[Tensor], Tensor] = lambda u: u
) -> PreferenceBatch:
    zero = chosen.new_zeros(())
    return PreferenceBatch(
        chosen=Side(chosen, torch.zeros_like(chosen), score(chosen)),
        rejected=Side(rejected, torch.zeros_like(rejected), score(rejected)),
        kl=zero,
        reward_shift=zero if "reward_shift" in term.needs else None,
    )


def supervised_curve(config: CELossConfig) -> Curve:
    """Against the probability of the label; all other tokens are equally probable."""
    p, shown = _grid(0.005, 0.995, [0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99])
    logit = (torch.log(p / (1 - p)) + math.log(_VOCABULARY - 1)).requires_grad_()  # that of all others is 0
    lse = torch.logaddexp(logit, torch.full_like(logit, math.log(_VOCABULARY - 1)))
    context = CELossContext(config, CELossKwargs(shifted_labels=torch.zeros(p.numel(), dtype=torch.int64)))
    context.vocab_size = _VOCABULARY
    loss = context.per_token(TokenStats(logit - lse, lse, mean_logit=logit / _VOCABULARY))
    (grad,) = torch.autograd.grad(loss.sum(), logit)
    setting = f"a vocabulary of {_VOCABULARY}, all other tokens alike"
    lines = (("loss", loss.detach()),), (("gradient", grad),)
    return Curve("probability of the label", "d loss / d logit of the label", p, *lines, shown, setting)


def distillation_curve(config: DistillLossConfig) -> Curve | str:
    """Against the student's probability of one of two tokens; or why there is no curve."""
    if config.divergence == "cosine":
        return "the angle between logits is no function of one probability"
    p, shown = _grid(0.005, 0.995, [0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99])
    logit = torch.logit(p).requires_grad_()
    teacher = torch.tensor([math.log(_TEACHER), math.log(1 - _TEACHER)], dtype=p.dtype).expand(p.numel(), 2)
    loss = divergence(torch.stack([logit, torch.zeros_like(logit)], -1), teacher, config.divergence_of())
    (grad,) = torch.autograd.grad(loss.sum(), logit)
    lines = (("loss", loss.detach()),), (("gradient", grad),)
    setting = f"a vocabulary of two, of which the teacher gives the first {_TEACHER:g}"
    label = "student's probability of the first token"
    return Curve(label, "d loss / d its logit", p, *lines, shown, setting, _TEACHER)


def value_curve(config: ValueLossConfig) -> Curve:
    """Against the error of the value."""
    x, shown = _grid(-4.0, 4.0, [-4, -2, -1, -0.5, 0, 0.5, 1, 2, 4])
    values = x.clone().requires_grad_()
    zero = torch.zeros_like(x)
    loss = value_loss(values, zero, zero, **config.model_dump())
    (grad,) = torch.autograd.grad(loss.sum(), values)
    setting = "" if config.value_clip is None else "the old value is right"
    lines = (("loss", loss.detach()),), (("gradient", grad),)
    return Curve("value - return", "d loss / d value", x, *lines, shown, setting, 0.0)


def _grid(low: float, high: float, shown: Sequence[float]) -> tuple[Tensor, tuple[float, ...]]:
    """An even grid that also holds the points of the table."""
    even, points = torch.linspace(low, high, 401, dtype=torch.float64), torch.tensor(shown, dtype=torch.float64)
    return torch.cat([even, points]).sort().values, tuple(shown)


def at_shown(curve: Curve) -> Curve:
    """The points of the table alone."""
    where = torch.tensor([int((curve.x - x).abs().argmin()) for x in curve.shown])
    losses, grads = (tuple((label, y[where]) for label, y in lines) for lines in (curve.losses, curve.grads))
    return replace(curve, x=curve.x[where], losses=losses, grads=grads)
