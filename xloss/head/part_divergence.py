"""A divergence over a vocabulary that ranks share: what every rank adds, exchanged, and then the same formulas.

Two exchanges make the value (both normalisers; the sums), and at most three the gradient. They wait: the logits they
are about stay in their buffers meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from xloss.distributed.vocab import VocabPart
from xloss.head.backend import RawRows
from xloss.head.memory import DIVERGENCE_SHARE, block_rows
from xloss.head.partials import gathered
from xloss.head.teacher import TeacherRows
from xloss.policy.divergence import add_sums, cosine_grad, divergence_slope, divergence_sums, divergence_value


def value(rows: RawRows, part: VocabPart) -> Tensor:
    """Divergence ``[C]`` of transformed logits from the teacher's."""
    teacher = _teacher(rows)
    sums = _sums(rows, part, None if teacher.divergence.kind == "cosine" else _normalisers(rows, part))
    return divergence_value(sums, teacher.divergence)


def to_grad_(rows: RawRows, part: VocabPart, adjoint: Tensor) -> None:
    """The teacher's buffer becomes ``adjoint [C]`` times the gradient of the divergence with respect to ``z``."""
    teacher = _teacher(rows)
    of = teacher.divergence
    if of.kind == "cosine":
        sums = _sums(rows, part, None)
        for span, z, other, t in _blocks(rows):
            torch.mul(cosine_grad(z, other, sums[span]), adjoint[span].unsqueeze(1) / t, out=other)
        return
    lse = _normalisers(rows, part)
    acceptance = _sums(rows, part, lse)[:, -1] if of.needs_acceptance else None
    slopes = lse.new_empty(lse.shape[0])
    for span, z, other, _ in _blocks(rows):
        log_p, log_q = z - lse[span, :1], other - lse[span, 1:]
        other.copy_(divergence_slope(log_p, log_q, of, None if acceptance is None else acceptance[span]))
        slopes[span] = other.sum(1)
    slopes = gathered(slopes, part).sum(0)
    for span, z, other, t in _blocks(rows):
        p = torch.exp(z - lse[span, :1])
        other.sub_(p.mul_(slopes[span].unsqueeze(1))).mul_(adjoint[span].unsqueeze(1) / t)


def _normalisers(rows: RawRows, part: VocabPart) -> Tensor:
    """``lse`` of the student and of the teacher, ``[C, 2]``."""
    own = rows.logits.new_empty((rows.logits.shape[0], 2))
    for span, z, other, _ in _blocks(rows):
        own[span, 0], own[span, 1] = torch.logsumexp(z, 1), torch.logsumexp(other, 1)
    return torch.logsumexp(gathered(own, part), 0)


def _sums(rows: RawRows, part: VocabPart, lse: Tensor | None) -> Tensor:
    """``divergence_sums`` of the whole vocabulary, ``[C, m]``; of log-probs by these normalisers, else of logits."""
    of = _teacher(rows).divergence
    found = []
    for span, z, other, _ in _blocks(rows):
        if lse is not None:
            z, other = z - lse[span, :1], other - lse[span, 1:]
        found.append(divergence_sums(z, other, of))
    return add_sums(gathered(torch.cat(found), part), of)


def _teacher(rows: RawRows) -> TeacherRows:
    assert rows.teacher is not None
    return rows.teacher


def _blocks(rows: RawRows) -> Iterator[tuple[slice, Tensor, Tensor, float | Tensor]]:
    """Blocks of rows: student's logits at the divergence's temperature, the teacher's, and that temperature."""
    logits, teacher = rows.logits, _teacher(rows)
    step = max(1, block_rows(logits.shape[1] * logits.element_size(), logits.device.type) // DIVERGENCE_SHARE)
    for start in range(0, logits.shape[0], step):
        span = slice(start, min(start + step, logits.shape[0]))
        t = teacher.student_column(span)
        yield span, logits[span] / t, teacher.logits[span], t
