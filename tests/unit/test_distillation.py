"""What a distillation costs and holds, and what it refuses.

Contract: with two heads a step multiplies live rows by both once (again where chunks are made again) and gradient rows
by the student's twice; ignored and zero-weight rows reach neither head, nor a teacher's function. No tensor reaches
[T, V]; the plan counts both buffers and says so, and a byte budget holds for both. A top-k teacher costs what
cross-entropy costs. What cannot be honoured raises at once, naming the argument.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from tests.unit.dispatch import Recorder
from xloss import DistillLossConfig, DistillLossContextInputItem, XlossError
from xloss.errors import (
    DeviceError,
    DtypeError,
    GraphError,
    LabelError,
    MissingFieldError,
    OptionError,
    ShapeError,
    UnsupportedError,
)
from xloss.head.plan import PlanRequest, make_plan

T, H, H2, V, K = 48, 11, 5, 37, 3
RUNS = {
    "one_pass": {"mode": "chunk", "plan": "one_pass", "chunk_size": 7},
    "two_pass": {"mode": "chunk", "plan": "two_pass", "chunk_size": 7},
    "two_pass-again": {"mode": "chunk", "plan": "two_pass", "chunk_size": 7, "logits_budget": 1},
}
every_run = pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)


def labels(dead: int = 8) -> Tensor:
    g = torch.Generator().manual_seed(1)
    y = torch.randint(0, V, (1, T), generator=g)
    y[0, torch.randperm(T, generator=g)[:dead]] = -100
    return y


def student() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(1, T, H).requires_grad_(), torch.randn(V, H).requires_grad_()


TEACHER_HIDDEN, TEACHER_WEIGHT, TEACHER_LOGITS = torch.randn(1, T, H2), torch.randn(V, H2), torch.randn(1, T, V)
TOPK = {"teacher_topk_ids": torch.randint(0, V, (1, T, K)), "teacher_topk_logprobs": -3 * torch.rand(1, T, K) - 1.2}
BY_HEAD = {"teacher_hidden_states": TEACHER_HIDDEN}


def context(cfg: DistillLossConfig, **fields: Any) -> Any:
    item = DistillLossContextInputItem(**({"shifted_labels": labels()} | fields))
    (kwargs,) = cfg.loss_ctx_cls.build_batches_loss_kwargs([item], cfg)
    return cfg.loss_ctx_cls(cfg, kwargs)


@every_run
@pytest.mark.parametrize("dead", [0, 13, T - 1, T])
def test_cost_of_two_heads(run: dict[str, Any], dead: int) -> None:
    """3 products of the student's and 1 of the teacher's a live row; the plan's flops are those of the step."""
    hidden, weight = student()
    token_weight = torch.ones(1, T)
    token_weight[0, :5] = 0
    ctx = context(DistillLossConfig(**run), shifted_labels=labels(dead), token_weight=token_weight, **BY_HEAD)
    live = int(((labels(dead) != -100) & (token_weight != 0)).sum())
    with Recorder() as ran:
        loss, info = ctx.forward(hidden, weight, teacher_head_weight=TEACHER_WEIGHT)
        loss.backward()
    passes = 2 if run.get("logits_budget") == 1 else 1
    assert ran.multiplied == live * V * ((2 + passes) * H + passes * H2)
    assert info.plan.flops == 2 * ran.multiplied
    assert info.plan.num_live == live


@every_run
def test_nothing_as_large_as_the_logits(run: dict[str, Any]) -> None:
    """Student's and teacher's chunks of 7 of 48 tokens stand in one buffer; given logits are not copied."""
    hidden, weight = student()
    for fields, forward in (
        (BY_HEAD, {"teacher_head_weight": TEACHER_WEIGHT}),
        ({"teacher_logits": TEACHER_LOGITS}, {}),
        ({}, {"teacher_logits_fn": lambda places: TEACHER_LOGITS[0].index_select(0, places)}),
    ):
        ctx = context(DistillLossConfig(divergence="jsd", **run), **fields)
        with Recorder() as ran:
            ctx.forward(hidden, weight, **forward)[0].backward()
        known = (hidden, weight, TEACHER_HIDDEN, TEACHER_WEIGHT, TEACHER_LOGITS)
        assert 0 < ran.largest(known) <= max(2 * 7 * V, T * H, V * H) < T * V


@pytest.mark.parametrize("run", [*RUNS.values(), {"mode": "eager"}], ids=[*RUNS, "eager"])
def test_dead_rows_are_not_asked_of_the_teacher(run: dict[str, Any]) -> None:
    asked: list[int] = []

    def logits(places: Tensor) -> Tensor:
        asked.extend(places.tolist())
        return TEACHER_LOGITS[0, places]

    hidden, weight = student()
    context(DistillLossConfig(**run)).forward(hidden, weight, teacher_logits_fn=logits)[0].backward()
    live = (labels()[0] != -100).nonzero().flatten().tolist()
    assert sorted(set(asked)) == live
    assert len(asked) == len(live) * (2 if "logits_budget" in run else 1)


def test_a_byte_budget_holds_both() -> None:
    """Ten rows of the student's float32 logits are five of both; `explain` says it."""
    hidden, weight = student()
    ctx = context(DistillLossConfig(mode="chunk", logits_budget=10 * V * 4), **BY_HEAD)
    with Recorder() as ran:
        _, info = ctx.forward(hidden, weight, teacher_head_weight=TEACHER_WEIGHT)
    plan = info.plan
    assert max(m for m, _, n in ran.products if n == V) == 5
    assert plan.logits_bytes == 2 * plan.chunk_rows * V * 4 <= 10 * V * 4
    assert "half of the logits held are the teacher's" in str(plan)
    kept = context(DistillLossConfig(mode="chunk", plan="two_pass", chunk_size=7), **BY_HEAD)
    plan = kept.explain(hidden, weight, teacher_head_weight=TEACHER_WEIGHT)
    assert plan.saved_chunks == 6 and plan.logits_bytes == 6 * 2 * 7 * V * 4
    assert kept.last_plan is None


def test_a_plan_at_scale() -> None:
    """A pure function of sizes: two buffers halve the rows of a chunk, a given teacher costs no product."""
    sizes = {"kind": "one-pass", "mode": "chunk", "num_rows": 32768, "num_live": 32768, "num_grad": 32768,
             "hidden_size": 4096, "vocab_size": 151936, "logit_bytes": 4, "device_type": "cuda"}  # fmt: skip
    alone, given, head = (make_plan(PlanRequest(**sizes, teacher_size=s)) for s in (None, 0, 2048))
    assert given.chunk_rows == head.chunk_rows < alone.chunk_rows
    assert max(given.logits_bytes, head.logits_bytes) <= 2 << 30
    assert given.flops == alone.flops
    assert head.flops - given.flops == 2 * 2048 * 151936 * 32768


def test_auto_is_chunk_and_says_why() -> None:
    hidden, weight = student()
    ctx = context(DistillLossConfig(), **BY_HEAD)
    plan = ctx.explain(hidden, weight, teacher_head_weight=TEACHER_WEIGHT)
    assert plan.mode == "chunk" and any("second distribution" in reason for reason in plan.reasons)
    ctx.forward(hidden, weight, teacher_head_weight=TEACHER_WEIGHT)
    assert str(ctx.explain()) == str(plan)


@every_run
def test_a_topk_teacher_costs_no_second_head(run: dict[str, Any]) -> None:
    hidden, weight = student()
    ctx = context(DistillLossConfig(topk_mode="tail", **run), **TOPK)
    with Recorder() as ran:
        loss, info = ctx.forward(hidden, weight)
        loss.backward()
    assert ran.multiplied == 40 * V * H * (4 if "logits_budget" in run else 3)
    assert "teacher" not in str(info.plan) and info.logprobs.shape == (1, T, K + 1)


def test_the_teacher_may_not_change_before_backward() -> None:
    """Two-pass reads it again."""
    hidden, weight = student()
    teacher = TEACHER_WEIGHT.clone()
    ctx = context(DistillLossConfig(**RUNS["two_pass-again"]), **BY_HEAD)
    loss, _ = ctx.forward(hidden, weight, teacher_head_weight=teacher)
    teacher.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_backward_twice() -> None:
    hidden, weight = student()
    one = context(DistillLossConfig(mode="chunk"), **BY_HEAD).forward(
        hidden, weight, teacher_head_weight=TEACHER_WEIGHT
    )
    one[0].backward(retain_graph=True)
    with pytest.raises(GraphError):
        one[0].backward()
    two = context(DistillLossConfig(**RUNS["two_pass"]), **BY_HEAD).forward(
        hidden, weight, teacher_head_weight=TEACHER_WEIGHT
    )
    first, second = (torch.autograd.grad(two[0], weight, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_tensors_split_and_join_like_labels() -> None:
    """`chunk`, `cat` and `to` carry the teacher; the loss of the parts adds up."""
    hidden, weight = student()
    ctx = context(DistillLossConfig(mode="chunk"), **BY_HEAD)
    whole, _ = ctx.forward(hidden, weight, teacher_head_weight=TEACHER_WEIGHT)
    pieces, start, total = ctx.loss_kwargs.chunk(20), 0, torch.zeros(())
    for kwargs in pieces:
        stop = start + kwargs.shifted_labels.shape[1]
        part = type(ctx)(ctx.loss_cfg, kwargs)
        total = total + part.forward(hidden[:, start:stop], weight, teacher_head_weight=TEACHER_WEIGHT)[0]
        start = stop
    torch.testing.assert_close(total, whole)
    joined = type(ctx.loss_kwargs).cat(pieces)
    assert torch.equal(joined.teacher_hidden_states, TEACHER_HIDDEN)
    again = type(ctx)(ctx.loss_cfg, joined).forward(hidden, weight, teacher_head_weight=TEACHER_WEIGHT)[0]
    assert torch.equal(again, whole)


def test_build_from_a_dict() -> None:
    cfg = DistillLossConfig(mode="chunk")
    ctx = cfg.build({"shifted_labels": labels(), "teacher_logits": TEACHER_LOGITS, "something_else": 1})
    assert ctx is not None
    ((built,), hidden_weight) = (cfg.loss_ctx_cls.build_batches([ctx]), student())
    assert built.forward(*hidden_weight)[0] > 0


def test_json_round_trip() -> None:
    cfg = DistillLossConfig(divergence="jsd", beta=0.1, temperature=2.0, t2_factor=True, hard_weight=0.5)
    assert DistillLossConfig.model_validate_json(cfg.model_dump_json()) == cfg


HEAD = {"teacher_head_weight": TEACHER_WEIGHT}
REFUSED: dict[str, tuple[type[XlossError], dict[str, Any], dict[str, Any], dict[str, Any], str]] = {
    "none": (MissingFieldError, {}, {}, {}, "give one teacher"),
    "two": (MissingFieldError, {}, BY_HEAD | {"teacher_logits": TEACHER_LOGITS}, HEAD, "teacher_logits"),
    "no-head": (MissingFieldError, {}, BY_HEAD, {}, "teacher_head_weight"),
    "head-of-nothing": (MissingFieldError, {}, {"teacher_logits": TEACHER_LOGITS}, HEAD, "teacher_hidden_states"),
    "bias-alone": (MissingFieldError, {}, BY_HEAD, {"teacher_head_bias": torch.zeros(V)}, "teacher_head_weight"),
    "topk-without-mode": (OptionError, {}, TOPK, {}, "topk_mode"),
    "mode-without-topk": (OptionError, {"topk_mode": "tail"}, BY_HEAD, HEAD, "teacher_topk_ids"),
    "topk-ids-alone": (
        MissingFieldError,
        {"topk_mode": "full"},
        {"teacher_topk_ids": TOPK["teacher_topk_ids"]},
        {},
        "teacher_topk_logprobs",
    ),
    "topk-shapes": (
        ShapeError,
        {"topk_mode": "full"},
        TOPK | {"teacher_topk_logprobs": torch.zeros(1, T, K + 1)},
        {},
        "one shape",
    ),
    "topk-outside": (
        LabelError,
        {"topk_mode": "full"},
        TOPK | {"teacher_topk_ids": torch.full((1, T, K), V)},
        {},
        f"teacher_topk_ids holds {V}",
    ),
    "topk-two-temperatures": (
        OptionError,
        {"topk_mode": "full", "temperature": 2.0, "hard_weight": 1.0},
        TOPK,
        {},
        "hard_weight",
    ),
    "vocabulary": (ShapeError, {}, BY_HEAD, {"teacher_head_weight": torch.zeros(V + 1, H2)}, f"({V}, {H2})"),
    "width": (ShapeError, {}, BY_HEAD, {"teacher_head_weight": torch.zeros(V, H2 + 1)}, "teacher hidden states"),
    "bias": (ShapeError, {}, BY_HEAD, HEAD | {"teacher_head_bias": torch.zeros(V - 1)}, "teacher head bias"),
    "tokens": (ShapeError, {}, {"teacher_hidden_states": torch.zeros(1, T - 1, H2)}, HEAD, "teacher_hidden_states"),
    "logits": (ShapeError, {}, {"teacher_logits": torch.zeros(1, T, V - 1)}, {}, "teacher_logits"),
    "fn-shape": (ShapeError, {}, {}, {"teacher_logits_fn": lambda i: torch.zeros(len(i), 2)}, "teacher_logits_fn"),
    "fn-type": (DtypeError, {}, {}, {"teacher_logits_fn": 3}, "teacher_logits_fn"),
    "fn-dtype": (DtypeError, {}, {}, {"teacher_logits_fn": lambda i: torch.zeros(len(i), V).long()}, "floating"),
    "dtypes": (DtypeError, {}, BY_HEAD, {"teacher_head_weight": TEACHER_WEIGHT.bfloat16()}, "bfloat16"),
    "device": (DeviceError, {}, BY_HEAD, {"teacher_head_weight": TEACHER_WEIGHT.to("meta")}, "meta"),
    "cap-of-logits": (OptionError, {"teacher_softcap": 5.0}, {"teacher_logits": TEACHER_LOGITS}, {}, "teacher_softcap"),
    "fused": (UnsupportedError, {"mode": "fused"}, BY_HEAD, HEAD, "mode='chunk'"),
    "two-temperatures": (
        OptionError,
        {"temperature": 2.0},
        BY_HEAD | {"temperature": torch.ones(1, T)},
        HEAD,
        "temperature",
    ),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_refused(case: tuple[type[XlossError], dict[str, Any], dict[str, Any], dict[str, Any], str]) -> None:
    error, config, fields, forward, names = case
    hidden, weight = student()
    with pytest.raises(error) as found:
        context(DistillLossConfig(**config), **fields).forward(hidden, weight, **forward)
    assert names in str(found.value)
    assert hidden.grad is None


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"divergence": "kl"}, ("divergence", "forward_kl")),
        ({"beta": 0.3}, ("beta", "forward_kl")),
        ({"divergence": "jsd", "skew_lambda": 0.3}, ("skew_lambda", "jsd")),
        ({"divergence": "jsd", "beta": 1.1}, ("beta", "1.1")),
        ({"divergence": "skewed_forward_kl", "skew_lambda": 1.0}, ("skew_lambda", "less than 1")),
        ({"log_prob_min_clamp": -10.0}, ("log_prob_min_clamp", "topk_mode")),
        ({"topk_mode": "tail", "log_prob_min_clamp": -10.0}, ("log_prob_min_clamp", "tail")),
        ({"topk_mode": "full", "divergence": "jsd"}, ("jsd", "renormalized")),
        ({"topk_mode": "full", "teacher_softcap": 3.0}, ("teacher_softcap", "topk_mode")),
        ({"topk_mode": "tail", "teacher_temperature": 3.0}, ("teacher_temperature", "tail")),
        ({"teacher_temperature": 0.0}, ("teacher_temperature", "0")),
        ({"loss_max_clamp": -1.0}, ("loss_max_clamp", "-1")),
    ],
)
def test_configs_that_do_not_validate(fields: dict[str, Any], names: tuple[str, ...]) -> None:
    with pytest.raises((ValidationError, OptionError)) as found:
        DistillLossConfig(**fields)
    assert all(name in str(found.value) for name in names)


def test_a_loss_function_needs_its_teacher() -> None:
    """The eager `loss_fn`, called by hand, has none to give."""
    hidden, weight = student()
    ctx = context(DistillLossConfig(), **BY_HEAD)
    with pytest.raises(MissingFieldError, match="second distribution"):
        ctx.loss_fn(hidden, weight, None, ctx.loss_kwargs)
