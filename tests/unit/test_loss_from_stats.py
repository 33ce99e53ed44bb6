"""Contract: a context's loss on given statistics is the one of its forward on the head that they are of: value,
gradient in every statistic, loss of each token, metrics. What stands at tokens left out does not matter, and what the
loss cannot do without raises.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from tests import budgets
from xloss import (
    CELossConfig,
    GRPOLossConfig,
    TokenStats,
    linear_logprobs,
)
from xloss.distributed import alone, world_size
from xloss.errors import DtypeError, MissingFieldError, ShapeError, UnsupportedError
from xloss.losses.base import BaseLossContext
from xloss.losses.config import BaseLossConfig
from xloss.losses.evaluation import loss_from_stats

B, S, H, V = 3, 5, 8, 17
LABELS = torch.tensor([[3, 16, -100, 0, 7], [-100] * S, [1, -100, 2, 2, 9]])


def fields(labels: Tensor = LABELS) -> dict[str, Tensor]:
    gen = torch.Generator().manual_seed(5)

    def drawn() -> Tensor:
        return torch.randn(labels.shape, dtype=torch.float64, generator=gen)

    return {
        "shifted_labels": labels,
        "advantages": drawn(),
        "old_logprobs": drawn() * 0.3 - 2.8,
        "ref_logprobs": drawn() * 0.3 - 2.8,
        "token_weight": drawn().abs(),
    }


def policy(loss_type: str, **more: Any) -> GRPOLossConfig:
    return GRPOLossConfig(policy_loss_cfg={"loss_type": loss_type}, mode="eager", **more)


CONFIGS: dict[str, BaseLossConfig] = {
    "ce": CELossConfig(mode="eager"),
    "smoothed": CELossConfig(mode="eager", label_smoothing=0.1, label_smoothing_kind="megatron", z_loss_coef=0.01),
    "accuracy": CELossConfig(mode="eager", return_token_accuracy=True, loss_reduction="sample"),
    "ppo": policy("ppo", loss_reduction="sample", use_kl_loss=True, kl_loss_type="k3", entropy_coef=0.02),
    "gspo": policy("gspo"),
    "kl_cov": policy("kl_cov"),
}


def built(config: BaseLossConfig, data: dict[str, Tensor]) -> BaseLossContext[Any]:
    ctx = config.build(data)
    assert ctx is not None
    return ctx.build_batches([ctx])[0]


def head() -> tuple[Tensor, Tensor]:
    gen = torch.Generator().manual_seed(1)
    hidden = torch.randn(B, S, H, dtype=torch.float64, generator=gen).requires_grad_()
    return hidden, torch.randn(V, H, dtype=torch.float64, generator=gen).requires_grad_()


def stats_of(hidden: Tensor, weight: Tensor, labels: Tensor) -> TokenStats:
    asked = {f"return_{name}": True for name in ("entropy", "mean_logit", "sum_p2", "top1")}
    return linear_logprobs(hidden, weight, labels, mode="eager", **asked)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", CONFIGS)
def test_is_the_forward_without_its_head(name: str) -> None:
    ctx = built(CONFIGS[name], fields())
    hidden, weight = head()
    want, info = ctx.forward(hidden, weight)
    gold = torch.autograd.grad(want, [hidden, weight])

    found = loss_from_stats(ctx, stats_of(hidden, weight, LABELS), vocab_size=V)
    got = torch.autograd.grad(found.loss, [hidden, weight], retain_graph=True)
    for label, ours, theirs in zip(("loss", "dh", "dw"), (found.loss, *got), (want, *gold), strict=True):
        budgets.assert_rounding(label, ours, theirs, 10.0, 1.0)
    assert found.token_loss is not None and info.token_loss is not None
    budgets.assert_rounding("token_loss", found.token_loss, info.token_loss, 10.0, 1.0)
    assert found.metrics.keys() >= info.metrics.keys()  # more statistics are there than the config asks for
    for key, metric in info.metrics.items():
        budgets.assert_rounding(key, found.metrics[key].result().double(), metric.result().double(), 10.0, 10.0)

    upstream = torch.randn(B, S, dtype=torch.float64)  # of each token's loss
    live = LABELS != -100
    (through,) = torch.autograd.grad(found.token_loss, hidden, upstream)
    assert through[live].abs().sum() > 0 and not through[~live].any()


@pytest.mark.parametrize("name", ["ce", "ppo", "gspo"])
def test_what_stands_at_dead_tokens_does_not_matter(name: str) -> None:
    ctx = built(CONFIGS[name], fields())
    dead = LABELS == -100
    clean = stats_of(*head(), LABELS).map(Tensor.detach)
    losses = []
    for fill in (0.0, float("nan")):
        logprobs = clean.logprobs.masked_fill(dead, fill).requires_grad_()
        assert clean.entropy is not None
        found = loss_from_stats(ctx, TokenStats(logprobs, clean.lse, clean.entropy.masked_fill(dead, fill)))
        (grad,) = torch.autograd.grad(found.loss, logprobs)
        assert grad.isfinite().all() and not grad[dead].any()
        losses.append((found.loss.detach(), grad))
    torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=0)


@pytest.mark.parametrize("labels", [torch.full((2, 3), -100), torch.zeros(0, dtype=torch.int64)])
@pytest.mark.parametrize("name", ["ce", "ppo"])
def test_empty_batches_give_zero_that_reaches_the_log_probs(name: str, labels: Tensor) -> None:
    config = CONFIGS[name].model_copy(update={"loss_reduction": "token"})
    logprobs = torch.randn(labels.shape, dtype=torch.float64, requires_grad=True)
    ctx = built(config, fields(labels))
    found = loss_from_stats(ctx, TokenStats(logprobs, torch.zeros_like(logprobs), torch.zeros_like(logprobs)))
    (grad,) = torch.autograd.grad(found.loss, logprobs)
    assert float(found.loss.detach()) == 0 and not grad.any()


def test_bfloat16_statistics_are_summed_in_float32() -> None:
    found = loss_from_stats(
        built(CELossConfig(), fields()), TokenStats(torch.randn(B, S).bfloat16(), torch.zeros(B, S).bfloat16())
    )
    assert found.loss.dtype == torch.float32


def test_what_the_loss_cannot_do_without_raises() -> None:
    stats = TokenStats(torch.zeros(B, S), torch.zeros(B, S))
    with pytest.raises(MissingFieldError, match=r"needs stats\.entropy"):
        loss_from_stats(built(CONFIGS["ppo"], fields()), stats)
    smooth = TokenStats(stats.logprobs, stats.lse, mean_logit=torch.zeros(B, S))
    with pytest.raises(MissingFieldError, match="vocab_size"):
        loss_from_stats(built(CONFIGS["smoothed"], fields()), smooth)
    with pytest.raises(ShapeError, match=r"stats\.logprobs"):
        loss_from_stats(built(CELossConfig(), fields()), TokenStats(torch.zeros(B, S + 1), torch.zeros(B, S)))
    with pytest.raises(ShapeError, match=r"stats\.lse"):
        loss_from_stats(built(CELossConfig(), fields()), TokenStats(torch.zeros(B, S), torch.zeros(S)))
    with pytest.raises(DtypeError, match=r"stats\.logprobs"):
        loss_from_stats(built(CELossConfig(), fields()), TokenStats(LABELS, torch.zeros(B, S)))
    ctx = CELossConfig().build(fields())
    assert ctx is not None
    with pytest.raises(MissingFieldError, match="build_batches"):
        loss_from_stats(ctx, stats)


class OnLogits(BaseLossContext[Any]):
    def loss_fn(self, hidden_states: Tensor, head_weight: Tensor, head_bias: Tensor | None, loss_kwargs: Any) -> Tensor:
        return hidden_states.sum()


def test_a_loss_on_logits_raises() -> None:
    ctx = built(CELossConfig(), fields())
    with pytest.raises(UnsupportedError, match="OnLogits defines loss_fn"):
        loss_from_stats(OnLogits(ctx.loss_cfg, ctx.loss_kwargs), TokenStats(torch.zeros(B, S), torch.zeros(B, S)))


def test_alone_nothing_is_exchanged() -> None:
    """Two ranks by a process group that never answers: what exchanges nothing is what one process computes."""
    store = FakeStore()
    dist.init_process_group("fake", rank=0, world_size=2, store=store)
    try:
        assert world_size() == 2
        with alone():
            assert world_size() == 1
            with alone():
                assert world_size() == 1
            weights = built(CELossConfig(), fields()).loss_kwargs.loss_weight
        assert world_size() == 2
    finally:
        dist.destroy_process_group()
    torch.testing.assert_close(weights, built(CELossConfig(), fields()).loss_kwargs.loss_weight, rtol=0, atol=0)
