"""The level at which the ratio of two policies is taken: token, sequence, turn. ``[T]`` to ``[T]``."""

from __future__ import annotations

from typing import Literal, assert_never

from torch import Tensor

from xloss.packing import Segments

RatioLevel = Literal["token", "sequence", "sequence_token", "segment", "sequence_sum"]


def log_ratio_at(level: RatioLevel, logprobs: Tensor, old_logprobs: Tensor, sequences: Segments) -> Tensor:
    """Log-ratio of each token at ``level``, with ``d = logprobs - old_logprobs``; means and sums over valid tokens.

    ``token``: ``d``. ``sequence``: ``mean_i d``, whose gradient reaches every token of the sequence (GSPO, arXiv
    2507.18071). ``sequence_token``: ``logprobs - sg(logprobs) + sg(mean_i d)``, the value of ``sequence`` with each
    token's own gradient (GSPO-token). ``segment``: the mean over the run of consecutive valid tokens, a turn (ROLL).
    ``sequence_sum``: ``sum_i d``, the ratio of whole answers (RLOO in TRL).
    """
    log_ratio = logprobs - old_logprobs
    match level:
        case "token":
            return log_ratio
        case "sequence":
            return sequences.spread(sequences.mean(log_ratio))
        case "sequence_token":
            return logprobs - logprobs.detach() + sequences.spread(sequences.mean(log_ratio.detach()))
        case "segment":
            turns = sequences.runs()
            return turns.spread(turns.mean(log_ratio))
        case "sequence_sum":
            return sequences.spread(sequences.sum(log_ratio))
        case _:
            assert_never(level)
