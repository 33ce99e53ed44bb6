"""The differentiable primitive under everything: hidden states and a head in, token statistics out."""

from __future__ import annotations

from torch import Tensor

from xloss.distributed.vocab import HeadWeight
from xloss.head import eager, engine
from xloss.head.choice import KernelChoice
from xloss.head.dispatch import (
    Mode,
    RunOptions,
    gather_inputs,
    head_call,
    live_rows,
    plan_call,
    resolve_mode,
    whole_inputs,
)
from xloss.head.functions import LinearLogprobs
from xloss.head.options import HeadInputs, HeadOptions, LiveRows
from xloss.head.outside_compile import outside_compile
from xloss.head.plan import Plan
from xloss.head.runner import ChunkRunner
from xloss.stats import DIFFERENTIABLE, StatSpec, TokenStats


@outside_compile
def linear_logprobs(
    hidden_states: Tensor,
    head_weight: HeadWeight,
    labels: Tensor,
    head_bias: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    return_entropy: bool = False,
    return_mean_logit: bool = False,
    return_sum_p2: bool = False,
    return_top1: bool = False,
    mode: Mode = "auto",
    chunk_size: int | None = None,
    logits_budget: int | None = None,
    kernels: KernelChoice = "auto",
    accumulate_into_main_grad: bool = False,
    check_labels: bool = True,
) -> TokenStats:
    """Log-probabilities of ``labels`` and other statistics of ``z``, without ever holding ``[T, V]`` logits.

    ``z = softcap(logit_scale * (h W^T + b)) / temperature``, ``softcap(x) = c tanh(x / c)``.

    Args:
        hidden_states: ``[T, H]``, ``[1, T, H]`` or ``[B, S, H]``; float64, float32, bfloat16 or float16.
        head_weight: ``[V, H]``, dtype of ``hidden_states`` (any under autocast); on ranks that share the vocabulary a
            DTensor ``Shard(0)`` or a ``VocabShard``, with the same tokens on each; with adapters a ``LoraWeight``.
        labels: int, the leading shape of ``hidden_states``, or that and ``K`` labels per token. Already shifted.
        head_bias: ``[V]`` or ``None``. An entry of ``-inf`` bans a token.
        temperature: positive number, or one per token; a constant.
        softcap: positive cap of Gemma-like heads, or ``None``.
        logit_scale: factor on the logits before the cap.
        ignore_index: label of tokens to leave out; they cost nothing on CPU.
        return_entropy, return_mean_logit, return_sum_p2, return_top1: which further statistics to return.
        mode: ``eager`` (holds the logits), ``chunk`` (any device), ``fused`` (Triton), ``auto``.
        chunk_size: tokens per chunk; default by bytes.
        logits_budget: bytes of logits held at once; default 64 MiB on CPU and 2 GiB on CUDA; 0 writes none (``fused``).
        kernels: ``chunked_logits`` or ``no_logits`` to insist; ``auto`` chooses by shape, dtype and budget.
        accumulate_into_main_grad: add the weight's gradient to ``head_weight.main_grad``.
        check_labels: check the values of labels and temperatures; on CUDA the device does, and a later call fails.

    Returns:
        ``TokenStats`` in the shape of the labels, float32 (float64 for float64). Every float statistic is
        differentiable in hidden states, weight and bias, with a gradient of its own per token. The second derivative is
        refused with an error.

    Raises:
        ShapeError, DtypeError, DeviceError, LabelError, OptionError, UnsupportedError: before any work.
    """
    spec = StatSpec(return_entropy, return_mean_logit, return_sum_p2, return_top1)
    options = HeadOptions(logit_scale, softcap, ignore_index, spec)
    run = RunOptions(
        mode=mode,
        chunk_size=chunk_size,
        logits_budget=logits_budget,
        kernels=kernels,
        accumulate_into_main_grad=accumulate_into_main_grad,
        check_labels=check_labels,
    )
    inputs = gather_inputs(hidden_states, head_weight, head_bias, labels, temperature, options, run)
    stats, _ = token_stats(inputs, options, run, live_rows(inputs.labels, ignore_index))
    return stats.shaped(inputs.lead)


def token_stats(
    inputs: HeadInputs, options: HeadOptions, run: RunOptions, rows: LiveRows, reasons: tuple[str, ...] = ()
) -> tuple[TokenStats, Plan]:
    """Statistics ``[T]`` of flat, checked inputs (0 at rows that are not live), and the plan that made them."""
    mode = resolve_mode(run.mode, inputs.weight.device.type, inputs.operand_dtype)
    if mode == "eager":
        plan = plan_call(inputs, options, rows, "eager", mode, run, reasons)
        stats, _ = eager.live_stats(whole_inputs(inputs, options, rows, plan), options, rows)
        return spread_stats(stats, rows), plan
    if inputs.tracked:
        plan = plan_call(inputs, options, rows, "two-pass", mode, run, reasons)
        call = head_call(inputs, options, rows, plan, run)
        *values, top1 = LinearLogprobs.apply(*inputs.tensors(rows, options.ignore_index), call)
        stats = TokenStats(**dict(zip(DIFFERENTIABLE, values, strict=True)), top1=top1)
    else:
        plan = plan_call(inputs, options, rows, "forward-only", mode, run, reasons)
        call = head_call(inputs, options, rows, plan, run)
        stats = engine.forward_stats(ChunkRunner(call, inputs.tensors(rows, options.ignore_index)), 0, rows.num_live)
    return spread_stats(stats, rows), plan


def spread_stats(stats: TokenStats, rows: LiveRows) -> TokenStats:
    """Statistics of live rows put back at their places; 0 (``top1``: -1) elsewhere."""
    top1 = None if stats.top1 is None else rows.spread(stats.top1, -1)
    spread = stats.map(rows.spread)
    return TokenStats(**{name: getattr(spread, name) for name in DIFFERENTIABLE}, top1=top1)
