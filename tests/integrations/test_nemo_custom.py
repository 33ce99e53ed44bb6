"""Contract: a loss function written for NeMo RL gives, on hidden states and a head, what it gives on all logits at once
(value, gradients, figures), however small the chunks; two micro-batches give what one gives. What cannot be run rightly
raises, or is NaN.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests import budgets
from tests.integrations.nemo_protocol import LossType
from xloss.adapters.nemo_custom import from_nemo_rl
from xloss.errors import MissingFieldError, OptionError, UnsupportedError

B, S, H, V = 4, 9, 6, 23


def batch() -> dict[str, Any]:
    gen = torch.Generator().manual_seed(6)
    token_mask = (torch.rand(B, S, generator=gen) > 0.3).double()
    token_mask[2] = 0
    return {
        "input_ids": torch.randint(V, (B, S), generator=gen),
        "token_mask": token_mask,
        "sample_mask": torch.tensor([1.0, 1, 1, 0]),
        "advantages": torch.randn(B, S, dtype=torch.float64, generator=gen),
        "teacher_logits": torch.randn(B, S, V, dtype=torch.float64, generator=gen),
        "note": "not a tensor",
    }


def head() -> tuple[Tensor, Tensor, Tensor]:
    gen = torch.Generator().manual_seed(7)
    shapes = ((B, S, H), (V, H), (V,))
    hidden, weight, bias = (torch.randn(s, dtype=torch.float64, generator=gen).requires_grad_() for s in shapes)
    return hidden, weight, bias


def mask_of(data: Any) -> Tensor:
    mask: Tensor = data["token_mask"][:, 1:] * data["sample_mask"].unsqueeze(-1)
    return mask


def distil(next_token_logits: Tensor, data: Any, global_valid_seqs: Tensor, global_valid_toks: Tensor) -> Any:
    """Of each token, on logits: KL to a teacher and the sampled token's score, with extremes to merge."""
    logp, teacher = (x[:, :-1].log_softmax(-1) for x in (next_token_logits, data["teacher_logits"]))
    kl = (teacher.exp() * (teacher - logp)).sum(-1)
    picked = logp.gather(-1, data["input_ids"][:, 1:, None]).squeeze(-1)
    mask = mask_of(data)
    loss = ((kl - 0.3 * picked * data["advantages"][:, 1:]) * mask).sum() / global_valid_toks
    dead = torch.where(mask > 0, kl.detach(), torch.inf)
    return loss, {"loss": loss.item(), "kl_min": dead.min(), "tokens": mask.sum().item()}


distil.loss_type = LossType.TOKEN_LEVEL  # type: ignore[attr-defined]


class Sequences:
    """Of whole sequences, on log-probs; the variance couples all of them."""

    loss_type = "sequence_level"

    def __call__(self, next_token_logprobs: Tensor, data: Any, global_valid_seqs: Any, global_valid_toks: Any) -> Any:
        sums = (next_token_logprobs * mask_of(data)).sum(1)
        return (sums.square() * data["sample_mask"]).sum() / global_valid_seqs, {"seqs": data["sample_mask"].sum()}


def pooled(logits: Tensor, data: Any, global_valid_seqs: Tensor, global_valid_toks: Tensor) -> Any:
    """Of whole sequences, on logits."""
    top = (logits[:, :-1].logsumexp(-1) * mask_of(data)).sum(1)
    return top.cos().sum() / global_valid_seqs, {}


def directly(fn: Any, data: Any, hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """The function as NeMo RL would call it, on all logits."""
    logits = hidden @ weight.T + bias
    logprobs = logits[:, :-1].log_softmax(-1).gather(-1, data["input_ids"][:, 1:, None]).squeeze(-1)
    taken = {"distil": ("next_token_logits", logits), "pooled": ("logits", logits)}
    name, value = taken.get(getattr(fn, "__name__", ""), ("next_token_logprobs", logprobs))
    mask = data["token_mask"][:, 1:] * data["sample_mask"][:, None]
    counts = {"global_valid_seqs": data["sample_mask"].sum(), "global_valid_toks": mask.sum()}
    found: tuple[Tensor, dict[str, Any]] = fn(**{name: value}, data=data, **counts)
    return found


RUNS: dict[str, tuple[Any, dict[str, Any], str]] = {
    **{f"chunks of {n}": (distil, {"chunk_size": n * B, "mode": "chunk"}, "chunked-autograd") for n in (1, 2, 4, 8, 9)},
    "chunks of less than a column": (distil, {"chunk_size": 1}, "chunked-autograd"),
    "by bytes": (distil, {}, "chunked-autograd"),
    "eager": (distil, {"mode": "eager"}, "eager"),
    "log-probs": (Sequences(), {"mode": "chunk", "chunk_size": 5}, "two-pass"),
    "log-probs, eager": (Sequences(), {"mode": "eager"}, "eager"),
    "sequences on logits": (pooled, {"loss_type": "sequence_level"}, "eager"),
}


@pytest.mark.parametrize("run", RUNS)
def test_is_the_function_on_all_logits(run: str) -> None:
    fn, options, plan = RUNS[run]
    leaves, data = head(), batch()
    want, figures = directly(fn, data, *leaves)
    ctx = from_nemo_rl(fn, **options).build(data)
    ctx.build_batches([ctx])
    got, info = ctx.forward(*leaves)
    assert info.plan.kind == plan
    budgets.assert_rounding("loss", got, want, 20.0, 1.0)
    pairs = zip(torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves), strict=True)
    for name, (ours, theirs) in zip(("dh", "dw", "db"), pairs, strict=True):
        budgets.assert_rounding(name, ours, theirs, 20.0, 1.0)
    for name, value in figures.items():
        assert float(info.metrics[name].result()) == pytest.approx(float(value), rel=budgets.FIGURE_F32)


@pytest.mark.parametrize("fn", [distil, Sequences()], ids=["tokens", "sequences"])
def test_micro_batches_add_up(fn: Any) -> None:
    (hidden, weight, bias), data = head(), batch()
    want, _ = directly(fn, data, hidden, weight, bias)
    cfg = from_nemo_rl(fn)
    halves = [{k: v[i::2] if isinstance(v, Tensor) else v for k, v in data.items()} for i in (0, 1)]
    contexts = [cfg.build(half) for half in halves]
    contexts[0].build_batches(contexts)
    total = torch.stack([ctx.forward(hidden[i::2], weight, bias)[0] for i, ctx in enumerate(contexts)]).sum()
    budgets.assert_rounding("loss", total, want, 20.0, 1.0)
    (got,), (gold,) = (torch.autograd.grad(x, hidden) for x in (total, want))
    budgets.assert_rounding("dh", got, gold, 20.0, 1.0)


def test_reading_the_last_row_of_a_chunk_is_nan_not_wrong() -> None:
    def greedy(next_token_logits: Tensor, data: Any, global_valid_seqs: Tensor, global_valid_toks: Tensor) -> Any:
        return next_token_logits.logsumexp(-1).sum() / global_valid_toks, {}

    ctx = from_nemo_rl(greedy, "token_level", chunk_size=B * 3).build(batch())
    ctx.build_batches([ctx])
    assert ctx.forward(*head())[0].isnan()


def test_no_gradient_wanted_and_nothing_valid() -> None:
    data = batch() | {"token_mask": torch.zeros(B, S)}
    for fn in (distil, Sequences()):
        ctx = from_nemo_rl(fn).build(data)
        ctx.build_batches([ctx])
        leaves = head()
        loss, _ = ctx.forward(*leaves)
        loss.backward()
        assert float(loss.detach()) == 0 and all(x.grad is not None and not x.grad.any() for x in leaves)
        with torch.no_grad():
            assert not ctx.forward(*leaves)[0].requires_grad


def nothing(data: Any, global_valid_seqs: Any, global_valid_toks: Any) -> Any: ...
def both(logits: Any, next_token_logprobs: Any, data: Any, global_valid_seqs: Any, global_valid_toks: Any) -> Any: ...


@pytest.mark.parametrize(
    "make, error, says",
    [
        (lambda: from_nemo_rl(nothing, "token_level"), OptionError, "none of them"),
        (lambda: from_nemo_rl(both, "token_level"), OptionError, "must take one of"),
        (lambda: from_nemo_rl(pooled), OptionError, "loss_type must be"),
        (lambda: from_nemo_rl(pooled, "sequence_level", mode="chunk"), UnsupportedError, "mode='eager'"),
        (lambda: from_nemo_rl(distil, temperature=0.5), UnsupportedError, "temperature"),
        (lambda: from_nemo_rl(distil).build({"input_ids": batch()["input_ids"]}), MissingFieldError, "token_mask"),
        (lambda: from_nemo_rl(distil).build(batch()).forward(*head()), MissingFieldError, "build_batches"),
    ],
)
def test_what_cannot_be_run_rightly_raises(make: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        make()


def test_what_a_function_returns_is_checked() -> None:
    def vector(next_token_logprobs: Any, data: Any, global_valid_seqs: Any, global_valid_toks: Any) -> Any:
        return next_token_logprobs.sum(1), {}

    def text(next_token_logprobs: Any, data: Any, global_valid_seqs: Any, global_valid_toks: Any) -> Any:
        return next_token_logprobs.sum(), {"which": "this"}

    def loss_alone(next_token_logprobs: Any, data: Any, global_valid_seqs: Any, global_valid_toks: Any) -> Any:
        return next_token_logprobs.sum()

    def no_metrics(next_token_logprobs: Any, data: Any, global_valid_seqs: Any, global_valid_toks: Any) -> Any:
        return next_token_logprobs.sum(), None

    cases = ((vector, "0-d loss"), (text, "'which'"), (loss_alone, "must return"), (no_metrics, "and a dict"))
    for fn, says in cases:
        ctx = from_nemo_rl(fn, "token_level").build(batch())
        ctx.build_batches([ctx])
        with pytest.raises(OptionError, match=says):
            ctx.forward(*head())
    ctx = from_nemo_rl(distil).build(batch())
    ctx.build_batches([ctx])
    hidden, weight, bias = head()
    with pytest.raises(OptionError, match=r"\[B, S, H\]"):
        ctx.loss_fn(hidden[0], weight, bias, ctx.loss_kwargs)
