"""From a user's tensors to a ``HeadCall``: checks, flattening, mode, operand dtype, live rows, plan."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal, cast

import torch
from torch import Tensor

from xloss import shapes
from xloss.distributed.routes import check_gradient_route
from xloss.distributed.same_tokens import check_same_tokens
from xloss.distributed.vocab import IGNORED, HeadWeight, VocabShard, local_head, whole_rows
from xloss.errors import OptionError, UnsupportedError
from xloss.head import chunk, gemm
from xloss.head.backend import HeadBackend, RowBackend
from xloss.head.choice import KERNEL_CHOICES, KernelChoice, PlanKind, PlanRequest
from xloss.head.main_grad import MainGrad
from xloss.head.options import HeadInputs, HeadOptions, LiveRows
from xloss.head.plan import Plan, make_plan
from xloss.head.runner import HeadCall, strip_dtype, waiting_dtype
from xloss.lora import LoraWeight

Mode = Literal["auto", "eager", "chunk", "fused"]
MODES: tuple[str, ...] = ("auto", "eager", "chunk", "fused")
_MAX_VOCAB = 1 << 24  # ids travel in float32 partial statistics


@dataclass(frozen=True)
class RunOptions:
    """How a call runs, as opposed to what it computes."""

    mode: Mode = "auto"
    chunk_size: int | None = None
    logits_budget: int | None = None
    kernels: KernelChoice = "auto"
    accumulate_into_main_grad: bool = False
    allow_retain_graph: bool = False
    check_labels: bool = True

    def __post_init__(self) -> None:
        for name, accepted in (("mode", MODES), ("kernels", KERNEL_CHOICES)):
            if getattr(self, name) not in accepted:
                raise OptionError(f"{name} must be one of {accepted}; got {getattr(self, name)!r}")
        size, budget = self.chunk_size, self.logits_budget
        if size is not None and (not isinstance(size, int) or size <= 0):
            raise OptionError(f"chunk_size must be a positive integer or None; got {size!r}")
        if budget is not None and (not isinstance(budget, int) or budget < 0):
            raise OptionError(f"logits_budget must be a number of bytes, 0 or more, or None; got {budget!r}")
        if budget == 0 and self.kernels == "chunked_logits":
            raise OptionError("logits_budget=0 allows no logits and kernels='chunked_logits' writes them; give one")


def fused_missing(device_type: str = "cuda", dtype: torch.dtype = torch.bfloat16) -> str | None:
    """Why ``mode="fused"`` cannot run on tensors of this kind here, or ``None`` if it can."""
    if dtype == torch.float64:
        return "the Triton kernels compute in float32, and these tensors are float64"
    if not has_triton():
        return "the triton package is not installed"
    if device_type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the Triton kernels need a CUDA device, and these tensors are on {device_type}"
    return None


@cache
def has_triton() -> bool:
    """Whether the ``triton`` package is importable, without importing it."""
    try:
        return importlib.util.find_spec("triton") is not None
    except ImportError:
        return False


def resolve_mode(mode: Mode, device_type: str, dtype: torch.dtype) -> Literal["eager", "chunk", "fused"]:
    """``auto`` is ``fused`` on CUDA where the kernels can run, else ``chunk``; ``fused`` raises where they cannot."""
    if mode == "auto":
        return "fused" if device_type == "cuda" and fused_missing(device_type, dtype) is None else "chunk"
    if mode == "fused" and (missing := fused_missing(device_type, dtype)) is not None:
        raise UnsupportedError(f"mode='fused' cannot run: {missing}; use mode='chunk' or 'auto'")
    return mode


def row_backend(mode: str) -> RowBackend:
    """The backend of a resolved mode. The Triton one is imported on its first use."""
    if mode == "fused":
        from xloss.head import fused

        return cast(RowBackend, fused)
    return cast(RowBackend, chunk)


def gather_inputs(
    hidden_states: Tensor,
    head_weight: HeadWeight,
    head_bias: Tensor | None,
    labels: Tensor,
    temperature: float | Tensor,
    options: HeadOptions,
    run: RunOptions,
    label_name: str = "labels",
    *,
    look_only: bool = False,
) -> HeadInputs:
    """Check everything and flatten the token axes. ``look_only``: ranks exchange nothing, the sizes are right."""
    shapes.check_positive("softcap", options.softcap)
    shapes.check_positive("logit_scale", options.logit_scale)
    _check_routes(head_weight, head_bias)
    head = local_head(hidden_states, head_weight, head_bias, look_only=look_only)
    hidden_states, head_weight, head_bias = head.hidden, head.weight, head.bias
    device_type = head_weight.device.type if isinstance(head_weight, Tensor) else "cpu"
    autocast = torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
    shapes.check_head(hidden_states, head_weight, head_bias, autocast, least_rows=1 if head.part is None else 0)
    shapes.check_labels(labels, hidden_states, label_name)
    lead = hidden_states.shape[:-1]
    live = None
    if run.check_labels and isinstance(temperature, Tensor):
        live = labels != options.ignore_index if labels.shape == lead else (labels != options.ignore_index).any(-1)
    shapes.check_temperature(temperature, lead, hidden_states.device, live=live)
    if run.check_labels:
        vocab_size = head_weight.shape[0] if head.part is None else head.part.vocab_size
        shapes.check_label_range(labels, vocab_size, options.ignore_index, label_name)
    operand = hidden_states.dtype
    if autocast and operand != torch.float64:
        operand = torch.get_autocast_dtype(device_type)
    acc = gemm.accumulate_dtype(operand)
    flat = labels.reshape(-1, *labels.shape[len(lead) :]).to(torch.int64)
    return HeadInputs(
        hidden=hidden_states.reshape(-1, hidden_states.shape[-1]),
        weight=head_weight,
        bias=head_bias,
        labels=flat,
        temperature=temperature.reshape(-1).to(acc) if isinstance(temperature, Tensor) else float(temperature),
        lead=lead,
        operand_dtype=operand,
        part=head.part,
        group=head.group,
        gathered=head.gathered,
        lora=head.lora,
    )


def _check_routes(weight: HeadWeight, bias: Tensor | None) -> None:
    """Raise where a gradient of the head would not arrive."""
    part = isinstance(weight, VocabShard)
    if isinstance(weight, LoraWeight):
        for tensor in weight.tensors():
            check_gradient_route(tensor, "an adapter's matrix")
        weight = weight.weight
    elif isinstance(weight, VocabShard):
        bias = weight.bias
        weight = weight.weight
    check_gradient_route(weight, "head_weight", part=part)
    check_gradient_route(bias, "head_bias", part=part)


def live_rows(labels: Tensor, ignore_index: int) -> LiveRows:
    """Rows of flat labels that are not ignored. On CUDA all of them: counting would make the stream wait."""
    if labels.is_cuda:
        return LiveRows.all(labels.shape[0], counted=False)
    live = labels != ignore_index
    return LiveRows.find(live if labels.ndim == 1 else live.any(1))


def _no_logits_refused(inputs: HeadInputs) -> str | None:
    """Why the ``no_logits`` kernels cannot take this head, or ``None`` if they can."""
    weight = inputs.weight
    if inputs.lora is not None:
        return "those know no adapters, and head_weight has one"
    if weight.stride(1) != 1 and weight.shape[1] != 1:
        return f"those read contiguous rows; head_weight has strides {tuple(weight.stride())}"
    if weight.shape[0] > _MAX_VOCAB:
        return f"those know vocabularies up to {_MAX_VOCAB}; head_weight has {weight.shape[0]} rows"
    return None


def plan_call(
    inputs: HeadInputs,
    options: HeadOptions,
    rows: LiveRows,
    kind: PlanKind,
    mode: str,
    run: RunOptions,
    reasons: tuple[str, ...] = (),
) -> Plan:
    """The plan for checked inputs. Ranks that share a vocabulary plan for the widest part, so that they cut alike."""
    part = inputs.part
    if part is not None:
        if kind == "eager" and inputs.teacher is not None:
            raise UnsupportedError("mode='eager' cannot gather a teacher whose vocabulary is split; use mode='chunk'")
        reasons += (str(part), _exchanges(inputs, options, kind))
    operand, acc = inputs.operand_dtype, gemm.accumulate_dtype(inputs.operand_dtype)
    return make_plan(
        PlanRequest(
            kind=kind,
            mode=mode,
            num_rows=rows.total,
            num_live=rows.num_live,
            num_grad=rows.num_grad if kind != "forward-only" else 0,
            hidden_size=inputs.weight.shape[1],
            vocab_size=inputs.vocab_size if part is None or kind == "eager" else part.widest,
            num_parts=1 if part is None else len(part.bounds),
            gathered=inputs.gathered,
            logit_bytes=acc.itemsize,
            operand_bytes=operand.itemsize,
            strip_bytes=strip_dtype(operand).itemsize,
            weight_bytes=inputs.weight.dtype.itemsize,
            hidden_bytes=inputs.hidden.dtype.itemsize,
            waiting_bytes=waiting_dtype(inputs.hidden.dtype, acc).itemsize,
            stats=options.stats,
            softcap=options.softcap is not None,
            bias=inputs.bias is not None,
            weight_cast=inputs.weight.dtype != operand,
            retain=run.allow_retain_graph,
            device_type=inputs.weight.device.type,
            chunk_size=run.chunk_size,
            logits_budget=run.logits_budget,
            kernels=run.kernels,
            no_logits_refused=_no_logits_refused(inputs),
            main_grad=run.accumulate_into_main_grad,
            teacher_size=None if inputs.teacher is None else inputs.teacher.source.hidden_size,
            rank=0 if inputs.lora is None else inputs.lora.rank,
            adapter_bytes=0 if inputs.lora is None else max(x.dtype.itemsize for x in inputs.lora.tensors()),
            adapter_grad=inputs.lora is not None and any(x.requires_grad for x in inputs.lora.tensors()),
            weight_grad=inputs.weight.requires_grad,
            hidden_grad=inputs.hidden.requires_grad,
            reasons=reasons,
        )
    )


def head_call(inputs: HeadInputs, options: HeadOptions, rows: LiveRows, plan: Plan, run: RunOptions) -> HeadCall:
    """Everything the chunk loops need, on every rank of the call: ranks that differ raise."""
    check_ranks(inputs, options, rows, plan)
    labels, part = inputs.labels, inputs.part
    if part is not None:
        labels, options = part.local_labels(labels, options.ignore_index), replace(options, ignore_index=IGNORED)
    backend = row_backend(plan.mode)
    accumulates = run.accumulate_into_main_grad and inputs.weight.requires_grad and plan.kind != "forward-only"
    acc = gemm.accumulate_dtype(inputs.operand_dtype)
    return HeadCall(
        labels=labels,
        temperature=inputs.temperature,
        options=options,
        rows=rows,
        plan=plan,
        backend=backend,
        operand_dtype=inputs.operand_dtype,
        head=cast(HeadBackend, backend) if plan.kernels == "no_logits" else None,
        main_grad=MainGrad.of(inputs.weight, acc) if accumulates else None,
        allow_retain_graph=run.allow_retain_graph,
        teacher=inputs.teacher,
        part=part,
    )


def check_ranks(inputs: HeadInputs, options: HeadOptions, rows: LiveRows, plan: Plan) -> None:
    """Raise unless the ranks that share the head have the same tokens and follow the same plan."""
    if inputs.group is None:
        return
    live = inputs.labels != options.ignore_index
    facts = {
        "hidden_states": tuple(inputs.hidden.shape),
        "labels": tuple(inputs.labels.shape),
        "live tokens": (rows.num_live, rows.num_grad),
        "plan": (plan.kind, plan.mode, plan.kernels, plan.chunk_rows, plan.saved_chunks),
        "statistics": options.stats,
        "hidden_states.requires_grad": inputs.hidden.requires_grad,
    }
    hidden = None if inputs.gathered else inputs.hidden
    check_same_tokens(inputs.group, hidden, inputs.labels, live if live.ndim == 1 else live.any(1), facts)


def whole_inputs(inputs: HeadInputs, options: HeadOptions, rows: LiveRows, plan: Plan) -> HeadInputs:
    """The inputs with the whole head, gathered where ranks share it: what autograd needs to do all the work."""
    check_ranks(inputs, options, rows, plan)
    if inputs.part is None:
        return inputs
    bias = None if inputs.bias is None else whole_rows(inputs.bias, inputs.part)
    return replace(inputs, weight=whole_rows(inputs.weight, inputs.part), bias=bias, part=None)


def _exchanges(inputs: HeadInputs, options: HeadOptions, kind: PlanKind) -> str:
    """What ranks that share the vocabulary exchange, for ``explain()``."""
    if kind == "eager":
        return "eager gathers the head on every rank"
    labels = inputs.labels.shape[1] if inputs.labels.ndim == 2 else 1
    sent = 1 + labels + options.stats.entropy + options.stats.mean_logit + options.stats.sum_p2 + 2 * options.stats.top1
    said = f"a chunk's statistics are one gather of {sent} numbers a token"
    if kind == "forward-only" or not inputs.hidden.requires_grad:
        return said
    return f"{said}, its hidden gradient one sum of {inputs.hidden.shape[1]}"
