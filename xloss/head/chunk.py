"""``mode="chunk"``: row work on a chunk of logits in torch ops, on any device.

A backend turns raw logits into statistics (``forward``) and, given one adjoint per statistic, into their gradient
(``backward``), both in the buffer the GEMM wrote. Elementwise passes run over blocks of rows that fit the cache.

    dz = g (onehot(y) - p) - e p (log p + entropy) + l p + m / V + 2 s p (p - sum_p2)
       + d (q - p sum(q)) / student_temperature,   q = p * d divergence / d p
    draw = dz / temperature * softcap'(.) * logit_scale
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from xloss.head import part_divergence
from xloss.head.backend import Adjoints, LossTwin, RawRows, RowState
from xloss.head.memory import DIVERGENCE_SHARE, block_rows
from xloss.head.options import HeadOptions
from xloss.head.teacher import TeacherRows
from xloss.head.transform import column, transform_
from xloss.policy.divergence import divergence, divergence_grad
from xloss.stats import TokenStats


def forward(rows: RawRows, options: HeadOptions, *, for_backward: bool) -> RowState:
    """Statistics; the buffer then holds transformed logits.

    ``for_backward``: it holds probabilities instead when the gradient needs nothing else (one pass saved).
    """
    raw, labels = rows.logits, rows.labels
    spec = options.stats
    _transform_(rows, options)
    picked = raw.gather(1, _label_index(labels, raw.shape[1])).view(labels.shape)
    mean_logit = raw.mean(1) if spec.mean_logit else None
    top1 = raw.argmax(1) if spec.top1 else None
    top1_logit = None if rows.part is None or top1 is None else raw.gather(1, top1.unsqueeze(1)).squeeze(1)
    found = None if rows.teacher is None or rows.part is not None else _divergence(raw, rows.teacher)
    to_probs = for_backward and not (spec.entropy or spec.sum_p2) and options.softcap is None and rows.teacher is None
    lse = raw.new_empty(raw.shape[0])
    entropy = torch.empty_like(lse) if spec.entropy else None
    sum_p2 = torch.empty_like(lse) if spec.sum_p2 else None
    scratch = None if to_probs else _scratch(raw)
    shifted = None if entropy is None else _scratch(raw)
    for span, z in _blocks(raw):
        peak = z.amax(1)
        p = torch.softmax(z, 1, out=z if scratch is None else scratch[: z.shape[0]])
        # p at the peak is 1 / sum(exp(z - peak)) to the last bit: no second sum over the row
        log_peak = p.amax(1).log_()
        torch.sub(peak, log_peak, out=lse[span])
        if entropy is not None and shifted is not None:  # about the peak: exact for logits of any size
            below = torch.sub(z, peak.unsqueeze(1), out=shifted[: z.shape[0]])
            entropy[span] = -log_peak - below.mul_(p).sum(1)
        if sum_p2 is not None:
            sum_p2[span] = p.square_().sum(1)
    logprobs = picked - (lse if labels.ndim == 1 else lse.unsqueeze(1))
    stats = TokenStats(logprobs, lse, entropy, mean_logit, sum_p2, top1, found)
    return RowState(rows, stats, to_probs, top1_logit)


def resume(rows: RawRows, options: HeadOptions, stats: TokenStats) -> RowState:
    """The buffer holds transformed logits again."""
    _transform_(rows, options)
    return RowState(rows, stats)


def backward(state: RowState, adjoints: Adjoints, options: HeadOptions, operand: torch.dtype) -> Tensor:
    """Overwrites the buffer; always in its dtype, the GEMMs narrow it."""
    buffer = state.rows.logits
    labels, vocab = state.rows.labels, buffer.shape[1]
    live = labels != options.ignore_index
    g = torch.where(live, adjoints["logprobs"], 0)
    onehot = g if labels.ndim == 2 else g.unsqueeze(1)
    p_coef = -onehot.sum(1)
    if state.rows.part is not None:
        onehot = onehot.masked_fill((labels == vocab).view(onehot.shape), 0)
    row_live = live if labels.ndim == 1 else live.any(1)
    others = {k: torch.where(row_live, v, 0) for k, v in adjoints.items() if k != "logprobs"}
    if "lse" in others:
        p_coef = p_coef + others["lse"]
    if "sum_p2" in others:
        assert state.stats.sum_p2 is not None
        p_coef = p_coef - 2 * others["sum_p2"] * state.stats.sum_p2
    if "entropy" in others:
        assert state.stats.entropy is not None
        p_coef = p_coef + others["entropy"] * (state.stats.lse - state.stats.entropy)
    uniform = others["mean_logit"] / vocab if "mean_logit" in others else None
    inner = options.logit_scale / state.rows.temperature  # d z / d raw, softcap apart
    if options.softcap is None:
        p_coef, onehot = p_coef * inner, onehot * column(inner)
        uniform = None if uniform is None else uniform * inner
        others = {k: v * inner for k, v in others.items()}
    if "divergence" in others:
        if state.rows.part is None:
            _divergence_to_grad_(state.rows, others["divergence"])
        else:
            part_divergence.to_grad_(state.rows, state.rows.part, others["divergence"])
    if state.holds_probs:
        _probs_to_grad_(buffer, p_coef if state.share is None else p_coef * state.share, uniform)
        buffer.scatter_add_(1, _label_index(labels, vocab), onehot.to(buffer.dtype))
    else:
        _logits_to_grad_(state, p_coef, uniform, onehot, others, options)
    return buffer


def loss_rows(
    rows: RawRows, options: HeadOptions, twin: LossTwin, operand: torch.dtype
) -> tuple[TokenStats, Tensor, Tensor] | None:
    """None: losses are torch code here."""
    return None


def scale(grad: Tensor, upstream: Tensor, dtype: torch.dtype, *, in_place: bool) -> Tensor:
    """On CPU an upstream gradient of 1 costs nothing; on CUDA looking at it would wait for the device."""
    if not upstream.is_cuda and float(upstream) == 1.0:
        return grad.to(dtype, copy=not in_place)
    if grad.dtype in (torch.float32, torch.float64):
        upstream = upstream.to(grad.dtype)
        return grad.mul_(upstream).to(dtype) if in_place else (grad * upstream).to(dtype)
    out = grad if in_place and grad.dtype == dtype else torch.empty_like(grad, dtype=dtype)
    for rows, part in _blocks(grad):
        out[rows] = part.float().mul_(upstream)
    return out


def _probs_to_grad_(p: Tensor, p_coef: Tensor, uniform: Tensor | None) -> None:
    p.mul_(p_coef.unsqueeze(1))
    if uniform is not None:
        p.add_(uniform.unsqueeze(1))


def _logits_to_grad_(
    state: RowState,
    p_coef: Tensor,
    uniform: Tensor | None,
    onehot: Tensor,
    others: dict[str, Tensor],
    options: HeadOptions,
) -> None:
    entropy, sum_p2 = others.get("entropy"), others.get("sum_p2")
    teacher = state.rows.teacher if "divergence" in others else None
    buffer = state.rows.logits
    index = _label_index(state.rows.labels, buffer.shape[1])
    probs = _scratch(buffer)
    slope = _scratch(buffer) if options.softcap is not None else None
    for rows, z in _blocks(buffer):
        if state.rows.part is not None:  # normalised over the whole vocabulary
            p = torch.sub(z, state.stats.lse[rows].unsqueeze(1), out=probs[: z.shape[0]]).exp_()
        else:
            p = torch.softmax(z, 1, out=probs[: z.shape[0]])
        if slope is not None:
            chain = _softcap_slope(z, state.rows.temperature, rows, options, out=slope[: z.shape[0]])
        if entropy is not None:
            z.mul_(-entropy[rows].unsqueeze(1)).add_(p_coef[rows].unsqueeze(1))
        else:
            z.copy_(p_coef[rows].unsqueeze(1).expand_as(z))
        if sum_p2 is not None:
            z.addcmul_(p, 2 * sum_p2[rows].unsqueeze(1))
        z.mul_(p)
        if uniform is not None:
            z.add_(uniform[rows].unsqueeze(1))
        z.scatter_add_(1, index[rows], onehot[rows].to(z.dtype))
        if teacher is not None:
            z.add_(teacher.logits[rows])
        if slope is not None:
            z.mul_(chain)


def _softcap_slope(z: Tensor, temperature: float | Tensor, rows: slice, options: HeadOptions, out: Tensor) -> Tensor:
    """``d z / d raw = logit_scale / temperature * (1 - tanh^2)``, with ``tanh = z temperature / softcap``."""
    assert options.softcap is not None
    t = column(temperature[rows]) if isinstance(temperature, Tensor) else temperature
    torch.mul(z, t / options.softcap, out=out)
    return out.square_().neg_().add_(1).mul_(options.logit_scale / t)


def _divergence(z: Tensor, teacher: TeacherRows) -> Tensor:
    """Divergence ``[C]`` of transformed logits ``z [C, V]`` from the teacher's."""
    out = z.new_empty(z.shape[0])
    for span, part in _blocks(z, DIVERGENCE_SHARE):
        out[span] = divergence(part / teacher.student_column(span), teacher.logits[span], teacher.divergence)
    return out


def _divergence_to_grad_(rows: RawRows, adjoint: Tensor) -> None:
    """The teacher's buffer becomes ``adjoint [C]`` times the gradient of the divergence with respect to ``z``."""
    teacher = rows.teacher
    assert teacher is not None
    for span, z in _blocks(rows.logits, DIVERGENCE_SHARE):
        t, other = teacher.student_column(span), teacher.logits[span]
        grad = divergence_grad(z / t, other, teacher.divergence)
        torch.mul(grad, adjoint[span].unsqueeze(1) / t, out=other)


def _transform_(rows: RawRows, options: HeadOptions) -> None:
    transform_(rows.logits, rows.bias, rows.temperature, options.logit_scale, options.softcap)


def _label_index(labels: Tensor, vocab: int) -> Tensor:
    """Labels as a gather index ``[C, K]``: out-of-range ones (ignored) read column 0 or V - 1 and are masked later."""
    index = labels.clamp(0, vocab - 1)
    return index if labels.ndim == 2 else index.unsqueeze(1)


def _block_rows(buffer: Tensor) -> int:
    return block_rows(buffer.shape[1] * buffer.element_size(), buffer.device.type)


def _scratch(buffer: Tensor) -> Tensor:
    return buffer.new_empty(min(_block_rows(buffer), buffer.shape[0]), buffer.shape[1])


def _blocks(buffer: Tensor, share: int = 1) -> Iterator[tuple[slice, Tensor]]:
    step = max(1, _block_rows(buffer) // share)
    for start in range(0, buffer.shape[0], step):
        rows = slice(start, min(start + step, buffer.shape[0]))
        yield rows, buffer[rows]
