"""Carries a context's loss through the head: one-pass, two-pass, forward-only, eager, or chunked autograd."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from xloss.distributed.agree import rank_named
from xloss.distributed.vocab import HeadWeight
from xloss.errors import MissingFieldError, UnsupportedError
from xloss.head import eager, engine, gemm
from xloss.head.dispatch import Mode, RunOptions, gather_inputs, head_call, plan_call, resolve_mode, whole_inputs
from xloss.head.functions import LinearLogprobs, OnePass, OnePassJob
from xloss.head.linear_logprobs import spread_stats
from xloss.head.options import HeadInputs, HeadOptions, LiveRows
from xloss.head.plan import Plan, PlanKind
from xloss.head.runner import ChunkRunner
from xloss.head.teacher import Teacher
from xloss.losses.chunked_autograd import run_chunked, split_result
from xloss.losses.evaluation import Evaluation
from xloss.losses.info import LossInfo
from xloss.losses.model import BaseLossKwargs
from xloss.metrics import Metric, merge_metrics
from xloss.stats import DIFFERENTIABLE, StatSpec, TokenStats

if TYPE_CHECKING:
    from xloss.losses.base import BaseLossContext

    Ctx = BaseLossContext[Any]


class _Run:
    """One forward of a token loss: checked inputs, live rows, and the loss on their statistics."""

    def __init__(
        self,
        ctx: Ctx,
        hidden: Tensor,
        weight: HeadWeight,
        bias: Tensor | None,
        kwargs: BaseLossKwargs,
        mode: Mode | None,
        teacher: Teacher | None,
        *,
        look_only: bool = False,
    ) -> None:
        cfg = ctx.loss_cfg
        self.ctx = ctx
        self.options: HeadOptions = cfg.head_options(ctx.stats_needed() | StatSpec(entropy=cfg.return_entropy))
        self.run_options: RunOptions = cfg.run_options()
        labels, temperature = ctx.head_labels(kwargs), ctx.head_temperature(kwargs)
        self.inputs: HeadInputs = gather_inputs(
            hidden, weight, bias, labels, temperature, self.options, self.run_options, ctx.label_field,
            look_only=look_only,
        )  # fmt: skip
        ctx.vocab_size = self.inputs.vocab_size
        mode = mode or cfg.mode
        beside: tuple[str, ...] = ()
        if teacher is not None:
            teacher = teacher.of_part(self.inputs.part)
            teacher.check(self.inputs.hidden.shape[0], self.inputs.weight.shape[0], self.inputs.weight.device)
            self.inputs = replace(self.inputs, teacher=teacher)
            mode, beside = _mode_with_teacher(mode)
        elif self.options.stats.divergence:
            raise MissingFieldError(
                f"{type(ctx).__name__} needs a second distribution: give forward its head or logits"
            )
        self.mode = resolve_mode(mode, self.inputs.weight.device.type, self.inputs.operand_dtype)
        # a chunk of the kwargs (loss_fn called by hand) has rows of its own
        self.rows: LiveRows = ctx.live_rows() if kwargs is ctx.loss_kwargs else type(ctx)(cfg, kwargs).live_rows()
        self.on = Evaluation(ctx, kwargs, self.rows, self.inputs.lead, gemm.accumulate_dtype(self.inputs.operand_dtype))
        self.kind, why = self._choose()
        self.reasons: tuple[str, ...] = beside + why

    def _choose(self) -> tuple[PlanKind, tuple[str, ...]]:
        asked, local = self.ctx.loss_cfg.plan, self.on.local
        if asked == "one_pass" and not local:
            raise UnsupportedError(
                f"plan='one_pass' needs a loss of each token alone; {type(self.ctx).__name__} couples tokens "
                f"({self.ctx.why_coupled()}): use plan='two_pass' or 'auto'"
            )
        if self.mode == "eager":
            refused = {"plan": asked != "auto", "logits_budget": self.run_options.logits_budget is not None}
            if self.ctx.loss_cfg.mode == "eager" and any(refused.values()):
                name = next(n for n, set_ in refused.items() if set_)
                raise UnsupportedError(
                    f"{name}={getattr(self.ctx.loss_cfg, name)!r} means nothing in mode='eager', which holds all "
                    "logits; use mode='chunk' or leave it out"
                )
            return "eager", ("mode is eager",)
        if not self.inputs.tracked:
            return "forward-only", ("no gradient is wanted",)
        if asked == "two_pass":
            return "two-pass", ("plan='two_pass' was asked for",)
        if local:
            return "one-pass", ("the loss is a sum over tokens: gradients are formed in forward",)
        reasons = [f"the loss couples tokens: {self.ctx.why_coupled()}"]
        if self.on.split is not None:
            reasons.append(f"statistics of {self.on.split.sp_mesh.size()} sequence-parallel ranks are gathered")
        return "two-pass", tuple(reasons)

    @property
    def plan(self) -> Plan:
        return plan_call(self.inputs, self.options, self.rows, self.kind, self.mode, self.run_options, self.reasons)

    def info(self, loss: Tensor, live_stats: TokenStats, token_loss: Tensor | None, plan: Plan) -> LossInfo:
        """Everything in the shape of the labels."""
        lead = self.inputs.lead
        stats = spread_stats(live_stats, self.rows).shaped(lead)
        return LossInfo(
            loss=loss.detach(),
            plan=plan,
            logprobs=stats.logprobs,
            lse=stats.lse,
            entropy=stats.entropy,
            token_loss=None if token_loss is None else token_loss.detach().reshape(lead),
            metrics=merge_metrics(self.on.metrics),
        )


@rank_named()
def forward(
    ctx: Ctx,
    hidden: Tensor,
    weight: HeadWeight,
    bias: Tensor | None,
    teacher: Teacher | None = None,
    values: Tensor | None = None,
) -> tuple[Tensor, LossInfo]:
    """Loss and info of a context.

    ``teacher`` where its loss is about a second distribution; ``values`` of a critic where it has a value loss, which
    is added beside the head's.
    """
    ctx.loss_kwargs.check()
    (ctx.whole() if ctx.needs_whole() else ctx).check_ready()
    beside = ctx.value_losses(values)
    if ctx.has_own_loss_fn:
        loss, info = run_loss_fn(ctx, hidden, weight, bias)
    else:
        loss, info = run_token_loss(ctx, hidden, weight, bias, ctx.loss_kwargs, None, teacher)
    ctx.last_plan = info.plan
    if beside is not None:
        loss = loss + beside[0].sum().to(loss.dtype)
        info.add(loss, *beside)
    return loss, info


def _mode_with_teacher(mode: Mode) -> tuple[Mode, tuple[str, ...]]:
    """The mode that can, and why: the Triton kernels know one distribution."""
    if mode == "fused":
        raise UnsupportedError("mode='fused' has no kernel for a second distribution; use mode='chunk' or 'auto'")
    if mode == "auto":
        return "chunk", ("auto is chunk: no Triton kernel knows a second distribution",)
    return mode, ()


def run_token_loss(
    ctx: Ctx,
    hidden: Tensor,
    weight: HeadWeight,
    bias: Tensor | None,
    kwargs: BaseLossKwargs,
    mode: Mode | None = None,
    teacher: Teacher | None = None,
) -> tuple[Tensor, LossInfo]:
    """Loss and info of a context whose loss is a ``token_loss``."""
    run = _Run(ctx, hidden, weight, bias, kwargs, mode, teacher)
    plan = run.plan
    if plan.kind == "one-pass":
        return _one_pass(run, plan)
    logits = None
    if plan.kind == "eager":
        inputs = whole_inputs(run.inputs, run.options, run.rows, plan)
        live, z = eager.live_stats(inputs, run.options, run.rows)
        logits = eager.all_logits(inputs, run.options, run.rows, z)
    else:
        live = _chunked_stats(run, plan)
    loss, token_loss = run.on.losses(live)
    info = run.info(loss, live, token_loss, plan)
    info.logits = None if logits is None else logits.reshape(*run.inputs.lead, logits.shape[1])
    return loss, info


def _one_pass(run: _Run, plan: Plan) -> tuple[Tensor, LossInfo]:
    live_kwargs = run.on.live_kwargs()

    def loss_of(start: int, stop: int, stats: TokenStats) -> Tensor:
        return run.on.evaluate(stats, live_kwargs.map_tokens(lambda x, _: x[start:stop]))

    call = head_call(run.inputs, run.options, run.rows, plan, run.run_options)
    empty = torch.empty(0, dtype=gemm.accumulate_dtype(run.inputs.operand_dtype), device=run.inputs.hidden.device)
    job = OnePassJob(loss_of, empty, run.ctx.twin(live_kwargs))
    loss = OnePass.apply(*run.inputs.tensors(run.rows, run.options.ignore_index), call, job)
    assert job.stats is not None
    if not job.losses:  # nothing is live: the metrics still have their names, on every rank
        job.losses.append(run.on.evaluate(job.stats, live_kwargs))
    return loss, run.info(loss, job.stats, run.rows.spread(job.token_losses()), plan)


def _chunked_stats(run: _Run, plan: Plan) -> TokenStats:
    call = head_call(run.inputs, run.options, run.rows, plan, run.run_options)
    tensors = run.inputs.tensors(run.rows, run.options.ignore_index)
    if plan.kind == "forward-only":
        return engine.forward_stats(ChunkRunner(call, tensors), 0, run.rows.num_live)
    *values, top1 = LinearLogprobs.apply(*tensors, call)
    return TokenStats(**dict(zip(DIFFERENTIABLE, values, strict=True)), top1=top1)


def run_loss_fn(ctx: Ctx, hidden: Tensor, weight: HeadWeight, bias: Tensor | None) -> tuple[Tensor, LossInfo]:
    """Loss and info of a context with a ``loss_fn`` of its own: whole in eager mode, else chunk by chunk."""
    cfg = ctx.loss_cfg
    if cfg.mode == "fused":
        raise UnsupportedError(
            "mode='fused' cannot run a custom loss_fn; use mode='chunk', or define token_loss to have the kernels"
        )
    for name in ("plan", "return_entropy", "skip_zero_grad_rows"):
        if getattr(cfg, name) != type(cfg).model_fields[name].default:
            raise UnsupportedError(
                f"{name}={getattr(cfg, name)!r} needs token_loss: a custom loss_fn runs through autograd, which cannot "
                "honour it"
            )
    plan = explain(ctx, hidden, weight, bias)
    assert isinstance(weight, Tensor)
    if plan.kind == "eager":
        loss, logits, extra = split_result(ctx.loss_fn(hidden, weight, bias, ctx.loss_kwargs))
        parts = [extra]
    else:
        loss, parts = run_chunked(ctx, hidden, weight, bias, plan)
        logits = None
    metrics = merge_metrics([{k: v for k, v in p.items() if isinstance(v, Metric)} for p in parts])
    others: dict[str, Any] = {}
    for part in parts:
        for name, value in part.items():
            if not isinstance(value, Metric):
                others.setdefault(name, []).append(value)
    if plan.kind == "eager":
        others = {name: values[0] for name, values in others.items()}
    return loss, LossInfo(loss=loss.detach(), plan=plan, logits=logits, metrics=metrics, user_info=others)


def explain(
    ctx: Ctx, hidden: Tensor | None, weight: HeadWeight | None, bias: Tensor | None, teacher: Teacher | None = None
) -> Plan:
    """The plan ``forward`` would follow; without inputs, what the last one did."""
    if hidden is None or weight is None:
        if ctx.last_plan is None:
            raise MissingFieldError("explain() needs hidden_states and head_weight before the first forward")
        return ctx.last_plan
    if not ctx.has_own_loss_fn:
        return _Run(ctx, hidden, weight, bias, ctx.loss_kwargs, None, teacher, look_only=True).plan
    cfg, kwargs = ctx.loss_cfg, ctx.loss_kwargs
    options, run_options = cfg.head_options(StatSpec()), cfg.run_options()
    inputs = gather_inputs(hidden, weight, bias, kwargs.shifted_labels, 1.0, options, run_options, "shifted_labels")
    if inputs.weight is not weight:
        raise UnsupportedError(
            "a custom loss_fn gets a plain weight; head_weight is on a mesh, a part of a vocabulary or has adapters: "
            "define token_loss, which every layout of the head serves"
        )
    eager_mode = cfg.mode == "eager"
    kind: PlanKind = "eager" if eager_mode else "chunked-autograd"
    reasons = ("a custom loss_fn is differentiated by autograd",)
    return plan_call(inputs, options, LiveRows.all(inputs.hidden.shape[0]), kind, cfg.mode, run_options, reasons)
