"""Forward and backward of packed data: a loss by name in one pass, or a function of the log-probs in two."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xloss.errors import GraphError, NonFiniteError, OptionError
from xloss.head.dispatch import Mode
from xloss.head.linear_logprobs import linear_logprobs
from xloss.losses.base import BaseLossContext
from xloss.metrics import Metric, merge_metrics
from xloss.tinker.inputs import OF_BATCH, LossInputs
from xloss.tinker.losses import find_loss
from xloss.tinker.model import LanguageModel
from xloss.tinker.packs import IGNORE, Pack

CustomLoss = Callable[[list[Any], list[Tensor]], tuple[Tensor, dict[str, float]]]
_CUSTOM_BUDGET = {"cpu": 1 << 30, "cuda": 2 << 30}


@dataclass(frozen=True)
class Engine:
    """How the client runs the head.

    Args:
        mode, chunk_size, logits_budget: as in ``linear_logprobs``.
        all_logprobs: also give the log-probs of tokens that the loss leaves out, by a forward pass of the head on them.
    """

    mode: Mode = "auto"
    chunk_size: int | None = None
    logits_budget: int | None = None
    all_logprobs: bool = True

    def fields(self, model: LanguageModel) -> dict[str, Any]:
        """As a config or ``linear_logprobs`` takes them, with what stands between the head and its logits."""
        run = {"mode": self.mode, "chunk_size": self.chunk_size, "logits_budget": self.logits_budget}
        return {**run, "softcap": model.softcap, "logit_scale": model.logit_scale}

    def custom_fields(self, model: LanguageModel, num_packs: int) -> dict[str, Any]:
        """``fields`` for a custom loss, whose logits are better kept than formed again; all packs share the budget."""
        found, budget = self.fields(model), self.logits_budget
        if self.mode != "eager":
            budget = _CUSTOM_BUDGET.get(model.device.type, 1 << 30) if budget is None else budget
            found["logits_budget"] = budget // num_packs
        return found


Outcome = tuple[list[Tensor], dict[str, float]]
"""Log-probs of each datum, and metrics."""


def run_loss(
    model: LanguageModel,
    engine: Engine,
    packs: list[Pack],
    loss_fn: str,
    loss_fn_config: Mapping[str, Any] | None,
    backward: bool,
) -> Outcome:
    """A loss by name, summed; with ``backward``, gradients are added to the parameters'."""
    given = dict(loss_fn_config or {})
    of_batch = {name: given.pop(name) for name in OF_BATCH if name in given}
    several = any(pack.targets.ndim == 3 for pack in packs)
    config = find_loss(loss_fn, given, several, engine.fields(model))
    contexts = LossInputs(loss_fn, config, of_batch).contexts(packs)
    logprobs: list[Tensor] = []
    metrics: list[dict[str, Metric]] = []
    total = 0.0
    with torch.set_grad_enabled(backward):
        for pack, context in zip(packs, contexts, strict=True):
            hidden = model(pack.tokens, pack.position_ids, pack.cu_seq_lens)
            loss, info = context.forward(hidden, model.head.weight, model.head.bias)
            if backward:
                loss.backward()
            total += float(loss.detach())
            assert info.logprobs is not None
            found = _of_targets(info.logprobs.detach(), pack)
            if engine.all_logprobs:
                found = found + _logprobs_left_out(model, engine, context, pack, hidden.detach())
            logprobs += pack.apart(found)
            metrics.append(info.metrics)
    figures = {f"{name}:{m.reducer}": float(m.result()) for name, m in merge_metrics(metrics).items()}
    return logprobs, {**figures, "loss:sum": total}


def _of_targets(values: Tensor, pack: Pack) -> Tensor:
    """Values of the labels that a loss has the head look up, for the targets: they stand last, after a teacher's."""
    return values if values.ndim == pack.targets.ndim else values[..., -1]


@torch.no_grad()
def _logprobs_left_out(
    model: LanguageModel, engine: Engine, context: BaseLossContext[Any], pack: Pack, hidden: Tensor
) -> Tensor:
    """Log-probs of the targets that the loss has none of, 0 at the others: it leaves out tokens of weight 0."""
    kwargs = context.loss_kwargs
    known = _of_targets(context.head_labels(kwargs), pack) != IGNORE
    live = context.live_mask().reshape(pack.tokens.shape)
    known &= live if known.ndim == live.ndim else live[..., None]
    labels = pack.targets.masked_fill(known, IGNORE)
    options = engine.fields(model)
    return linear_logprobs(
        hidden,
        model.head.weight,
        labels,
        model.head.bias,
        temperature=context.head_temperature(kwargs),
        **options,
    ).logprobs


def run_custom(model: LanguageModel, engine: Engine, packs: list[Pack], data: Sequence[Any], fn: CustomLoss) -> Outcome:
    """``fn(data, logprobs)`` and its gradient: one forward and one backward of the model, the head's in two passes.

    ``fn`` sees leaves on the CPU, ``[N]`` or ``[N, K]`` of each datum, as Tinker's does.
    """
    options = engine.custom_fields(model, len(packs))
    per_pack = [
        linear_logprobs(
            model(pack.tokens, pack.position_ids, pack.cu_seq_lens),
            model.head.weight,
            pack.targets,
            model.head.bias,
            **options,
        ).logprobs
        for pack in packs
    ]
    flat = [
        leaf.detach().cpu().requires_grad_() for x, pack in zip(per_pack, packs, strict=True) for leaf in pack.apart(x)
    ]
    loss, metrics = _called(fn, data, flat)
    grads = torch.autograd.grad(loss, flat, allow_unused=True)
    if all(grad is None for grad in grads):
        raise GraphError("the loss of forward_backward_custom does not depend on the log-probs it was given")
    adjoints = [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(flat, grads, strict=True)]
    for index, adjoint in enumerate(adjoints):
        if not bool(adjoint.isfinite().all()):
            raise NonFiniteError(f"the gradient of the custom loss at the log-probs of data[{index}] is NaN or inf")
    upstream, start = [], 0
    for x, pack in zip(per_pack, packs, strict=True):
        stop = start + len(pack.rows)
        upstream.append(pack.together(adjoints[start:stop]).to(x))
        start = stop
    torch.autograd.backward(per_pack, upstream)
    surrogate = sum(float((leaf.detach() * adjoint).sum()) for leaf, adjoint in zip(flat, adjoints, strict=True))
    found = {**metrics, "loss:sum": float(loss.detach()), "surrogate_loss:sum": surrogate}
    return [leaf.detach() for leaf in flat], found


def _called(fn: CustomLoss, data: Sequence[Any], logprobs: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
    result = fn(list(data), logprobs)
    if not isinstance(result, tuple) or len(result) != 2:
        raise OptionError(f"a custom loss must return (loss, metrics); got {type(result).__name__}")
    loss, metrics = result
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise OptionError(f"a custom loss must return a scalar tensor and metrics; got {got}")
    if not loss.requires_grad:
        raise GraphError("the loss of forward_backward_custom has no gradient: it was computed from detached log-probs")
    try:
        return loss.reshape(()), {name: float(value) for name, value in metrics.items()}
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise OptionError(f"the metrics of a custom loss must be a dict of numbers; got {metrics!r}") from error
