"""Config, Kwargs, Context: the two ways XTuner users write a step.

Contract: both styles give the same loss and gradients, which are plain autograd's; fields may be set between building
and calibrating; kwargs and contexts chunk and cat without changing the loss; `info` unpacks as XTuner's pair; a missing
required key builds None; `explain` says what the step then does.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from tests import budgets
from tests.unit.trio import MODES, VANILLA, T, V, assert_same, every_mode, grads, tensors
from xloss import (
    CELossConfig,
    CELossContext,
    CELossContextInputItem,
    GRPOLossConfig,
    GRPOLossContext,
    GRPOLossKwargs,
    LogProbConfig,
    LossInfo,
    RLLossContextInputItem,
    linear_logprobs,
)
from xloss.errors import MissingFieldError, OptionError


@every_mode
def test_the_grpo_example(run: dict[str, Any]) -> None:
    """The example of the README and the XTuner docs, as printed but for the mode."""
    emb, lm_head = nn.Embedding(10, 2), nn.Linear(2, 10, bias=False)
    input_ids = torch.randint(0, 10, (1, 5))
    shifted_labels, input_ids = input_ids[:, 1:], input_ids[:, :-1]
    hidden_states = emb(input_ids)
    item = RLLossContextInputItem(shifted_labels=shifted_labels, advantages=torch.tensor([[0.5, 0.5, -0.5, -0.5]]))
    with torch.no_grad():
        item.old_logprobs = linear_logprobs(hidden_states, lm_head.weight, shifted_labels).logprobs
    loss_cfg = GRPOLossConfig(
        policy_loss_cfg=dict(cliprange_high=0.2, cliprange_low=0.2, loss_type="vanilla"),  # noqa: C408 - as printed
        use_kl_loss=False,
        **run,
    )
    batches_loss_kwargs = GRPOLossContext.build_batches_loss_kwargs([item], loss_cfg)
    loss_ctx = GRPOLossContext(loss_cfg, batches_loss_kwargs[0])
    loss, info = loss_ctx.forward(hidden_states, lm_head.weight)
    loss.backward()

    ours = [loss.detach(), emb.weight.grad.clone(), lm_head.weight.grad.clone()]
    emb.zero_grad()
    lm_head.zero_grad()
    logprobs = torch.log_softmax(lm_head(emb(input_ids)), -1).gather(-1, shifted_labels[..., None])[..., 0]
    ratio = (logprobs - logprobs.detach()).exp()
    plain = -(ratio * item.advantages).mean()
    plain.backward()
    assert_same(ours[1:], [emb.weight.grad, lm_head.weight.grad])
    assert abs(float(ours[0] - plain.detach())) < 1e-6
    assert isinstance(info, LossInfo)


@every_mode
def test_both_styles_agree(run: dict[str, Any]) -> None:
    """build_batches_loss_kwargs on items, and build + build_batches on dicts with old log-probs set in between."""
    cfg = GRPOLossConfig(policy_loss_cfg=VANILLA, use_kl_loss=True, kl_loss_type="k3", **run)
    batches = [tensors() for _ in range(2)]
    advantages = [torch.randn(1, T, dtype=torch.float64) for _ in batches]
    old = [torch.randn(1, T, dtype=torch.float64) - 2 for _ in batches]
    items = [
        RLLossContextInputItem(shifted_labels=y, advantages=a, old_logprobs=o, ref_logprobs=o + 0.1)
        for (_, _, y), a, o in zip(batches, advantages, old, strict=True)
    ]
    first = [GRPOLossContext(cfg, k) for k in GRPOLossContext.build_batches_loss_kwargs(items, cfg)]

    second = [
        cfg.build({"shifted_labels": y, "advantages": a, "input_ids": "not ours"})
        for (_, _, y), a in zip(batches, advantages, strict=True)
    ]
    for ctx, o in zip(second, old, strict=True):
        ctx.loss_kwargs.old_logprobs = o
        ctx.loss_kwargs.ref_logprobs = o + 0.1
    second = type(second[0]).build_batches(second, cu_seq_lens_list=None, sp_mesh=None)

    for a, b, (hidden, weight, _) in zip(first, second, batches, strict=True):
        x, y = a.forward(hidden, weight)[0], b(hidden, weight)[0]
        assert torch.equal(x, y)
        assert all(torch.equal(p, q) for p, q in zip(grads(x, hidden, weight), grads(y, hidden, weight), strict=True))


def test_fields_set_after_calibration_count() -> None:
    """Old log-probs may arrive last: from a forward pass with the very same context list."""
    hidden, weight, labels = tensors()
    cfg = GRPOLossConfig(policy_loss_cfg=VANILLA, mode="chunk", chunk_size=4)
    (ctx,) = GRPOLossContext.build_batches([cfg.build({"shifted_labels": labels, "advantages": torch.ones(1, T)})])
    on_policy = ctx.forward(hidden, weight)[0]
    ctx.loss_kwargs.old_logprobs = ctx.forward(hidden, weight)[1].logprobs.detach() - 1.0  # ratio e: clipped everywhere
    assert float(on_policy.detach()) == pytest.approx(-1.0)
    loss, _ = ctx.forward(hidden, weight)
    assert float(loss.detach()) == pytest.approx(-1.2)
    assert not any(bool(g.any()) for g in grads(loss, hidden, weight))


def test_build_returns_none_without_a_required_key() -> None:
    cfg = GRPOLossConfig(policy_loss_cfg=VANILLA)
    labels, advantages = torch.zeros(1, 3, dtype=torch.int64), torch.ones(1, 3)
    assert cfg.build({"shifted_labels": labels}) is None
    assert cfg.build({"advantages": advantages}) is None
    assert cfg.build({"shifted_labels": labels, "advantages": None}) is None
    assert CELossConfig().build({}) is None
    ctx = cfg.build({"shifted_labels": labels, "advantages": advantages}, device="cpu")
    assert isinstance(ctx, GRPOLossContext)
    assert ctx.loss_kwargs.shifted_labels is labels
    assert isinstance(LogProbConfig().build({"shifted_labels": labels}), LogProbConfig().loss_ctx_cls)


def test_info_unpacks_as_a_pair() -> None:
    hidden, weight, labels = tensors()
    for run in MODES:
        cfg = CELossConfig(**run)
        (kwargs,) = CELossContext.build_batches_loss_kwargs([CELossContextInputItem(shifted_labels=labels)], cfg)
        loss, (logits, extra) = CELossContext(cfg, kwargs).forward(hidden, weight)
        assert all(isinstance(v, Tensor) and v.ndim == 0 for v in extra.values())
        assert torch.equal(extra["local_base_loss"], loss)
        assert float(extra["num_tokens"]) == T - 2
        if run["mode"] == "eager":
            budgets.assert_rounding("logits", logits, F.linear(hidden, weight), 10.0, 10.0)
        else:
            assert logits is None


def test_logits_of_eager_mode_have_a_gradient() -> None:
    """A distillation loss on top of them, say; ignored tokens have logits too."""
    hidden, weight, labels = tensors()
    cfg = CELossConfig(mode="eager", temperature=2.0)
    (kwargs,) = CELossContext.build_batches_loss_kwargs([CELossContextInputItem(shifted_labels=labels)], cfg)
    _, (logits, _) = CELossContext(cfg, kwargs).forward(hidden, weight)
    budgets.assert_rounding("logits", logits, F.linear(hidden, weight) / 2, 10.0, 10.0)
    live = labels != -100
    ours = grads(logits[live].square().sum(), hidden, weight)
    theirs = grads((F.linear(hidden, weight) / 2)[live].square().sum(), hidden, weight)
    assert_same(ours, theirs, 1e-12)


@pytest.mark.parametrize("ignored", [0, 2])
@pytest.mark.parametrize("run", [{"mode": "eager"}, {"mode": "chunk", "plan": "two_pass"}], ids=["eager", "two-pass"])
def test_statistics_with_a_gradient_are_no_views(run: dict[str, Any], ignored: int) -> None:
    """What a model under FSDP2 returns must not be one: a write in place would undo FSDP2's hooks."""
    hidden, weight, labels = tensors()
    labels = torch.where(labels == -100, labels if ignored else 3, labels)
    cfg = CELossConfig(**run, return_entropy=True)
    (kwargs,) = CELossContext.build_batches_loss_kwargs([CELossContextInputItem(shifted_labels=labels)], cfg)
    _, info = CELossContext(cfg, kwargs).forward(hidden, weight)
    stats = linear_logprobs(hidden, weight, labels, return_entropy=True, mode=run["mode"])
    for seen in (info, stats):
        for name in ("logprobs", "lse", "entropy"):
            value = getattr(seen, name)
            assert value.shape == labels.shape and value.requires_grad and not value._is_view(), name


def test_kwargs_made_by_hand_lack_what_calibration_makes() -> None:
    hidden, weight, labels = tensors()
    ones = torch.ones(1, T)
    made: dict[str, Any] = {"policy_loss_weight": ones, "gradient_factor": torch.ones(())}
    for name in made:
        kwargs = GRPOLossKwargs(shifted_labels=labels, advantages=ones, **{n: v for n, v in made.items() if n != name})
        with pytest.raises(MissingFieldError, match=f"{name} is None in GRPOLossKwargs; call build_batches"):
            GRPOLossContext(GRPOLossConfig(policy_loss_cfg=VANILLA), kwargs).forward(hidden, weight)


@pytest.mark.parametrize("size", [1, 4, T, 50])
def test_chunk_and_cat(size: int) -> None:
    """Pieces of a batch have losses that add up to it, and cat puts it together again."""
    hidden, weight, labels = tensors()
    cfg = GRPOLossConfig(policy_loss_cfg=VANILLA, mode="chunk")
    item = RLLossContextInputItem(
        shifted_labels=labels,
        advantages=torch.randn(1, T),
        old_logprobs=torch.randn(1, T) - 3,
        is_weights=torch.rand(1, T),
    )
    bounds = torch.tensor([0, 3, 4, T])
    (kwargs,) = GRPOLossContext.build_batches_loss_kwargs([item], cfg, cu_seq_lens_list=[bounds])
    pieces = kwargs.chunk(size)
    assert [p.shifted_labels.shape[-1] for p in pieces] == [len(x) for x in torch.arange(T).split(size)]
    contexts = [GRPOLossContext(cfg, p) for p in pieces]
    parts = [c.forward(h, weight)[0] for c, h in zip(contexts, hidden.split(size, dim=1), strict=True)]
    whole = GRPOLossContext(cfg, kwargs).forward(hidden, weight)[0]
    joined = GRPOLossContext.cat(contexts)
    again = joined.forward(hidden, weight)[0]
    for loss in (torch.stack(parts).sum(), again):
        assert_same([loss, *grads(loss, hidden, weight)], [whole, *grads(whole, hidden, weight)], 1e-12)
        whole = GRPOLossContext(cfg, kwargs).forward(hidden, weight)[0]
    for name, value in vars(kwargs).items():
        other = getattr(joined.loss_kwargs, name)
        assert other is None if value is None else torch.equal(other, value)
    cuts = {*bounds.tolist(), *range(0, T, size)}
    for start, piece in zip(range(0, T, size), pieces, strict=True):
        inside = {b - start for b in cuts | {T} if start <= b <= start + size}
        assert set(piece.cu_seq_lens.tolist()) == inside


def test_cat_of_batches_that_differ_in_their_fields() -> None:
    """A tensor that only some of them have must not get lost, whichever comes first."""
    cfg = GRPOLossConfig(policy_loss_cfg=VANILLA)
    data = {"shifted_labels": torch.zeros(1, 3, dtype=torch.int64), "advantages": torch.ones(1, 3)}
    with_old, without = cfg.build(data | {"old_logprobs": torch.ones(1, 3)}), cfg.build(data)
    for order in ([with_old, without], [without, with_old]):
        with pytest.raises(MissingFieldError, match="old_logprobs"):
            GRPOLossContext.cat(order)
    with pytest.raises(OptionError, match="config"):
        GRPOLossContext.cat([without, GRPOLossConfig(policy_loss_cfg=VANILLA, chunk_size=3).build(data)])


def test_to_moves_every_tensor() -> None:
    cfg = GRPOLossConfig(policy_loss_cfg=VANILLA, use_kl_loss=True, kl_loss_type="k1", entropy_coef=0.1)
    one = torch.ones(1, 3)
    item = RLLossContextInputItem(
        shifted_labels=one.long(), advantages=one, ref_logprobs=one, is_weights=one, temperature=one
    )
    (kwargs,) = GRPOLossContext.build_batches_loss_kwargs([item], cfg, cu_seq_lens_list=[torch.tensor([0, 3])])
    kwargs.to("meta")
    found = {n: v.device.type for n, v in vars(kwargs).items() if isinstance(v, Tensor)}
    assert set(found.values()) == {"meta"}
    assert {"cu_seq_lens", "policy_loss_weight", "kl_loss_weight", "temperature", "shifted_labels"} <= set(found)


@every_mode
def test_explain_is_what_runs(run: dict[str, Any]) -> None:
    hidden, weight, labels = tensors()
    cfg = GRPOLossConfig(policy_loss_cfg=VANILLA, **run)
    advantages = torch.ones(1, T)
    advantages[0, 5:8] = 0
    (kwargs,) = GRPOLossContext.build_batches_loss_kwargs(
        [RLLossContextInputItem(shifted_labels=labels, advantages=advantages)], cfg
    )
    ctx = GRPOLossContext(cfg, kwargs)
    for grad, kind in ((True, "one-pass"), (False, "forward-only")):
        with torch.set_grad_enabled(grad):
            plan = ctx.explain(hidden, weight)
            _, info = ctx.forward(hidden, weight)
        assert plan == info.plan
        assert plan.kind == ("eager" if run["mode"] == "eager" else kind)
        assert (plan.num_rows, plan.num_live) == (T, T - 2)
        assert plan.mode == ("chunk" if run["mode"] == "auto" else run["mode"])
        assert plan.reasons
        for word in (plan.kind, plan.mode, str(T), str(T - 2), *plan.reasons):
            assert word in str(plan)
        if run["mode"] != "eager":
            assert plan.chunk_rows == min(run.get("chunk_size", T - 2), T - 2)
            assert plan.logits_bytes == plan.chunk_rows * V * 8 or plan.num_grad < plan.chunk_rows
    assert ctx.explain(hidden, weight.detach()).grad_bytes < ctx.explain(hidden, weight).grad_bytes
