"""slime: any token loss of xloss as ``--loss-type custom_loss --custom-loss-function-path my_losses.loss``.

slime computes log-probs and entropies of responses from its logits, and reduces vectors of tokens itself, by the
``sum_of_sample_mean`` that it hands to a loss.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from xloss.adapters.given import checked, local_loss, masked_labels, reduced_by
from xloss.errors import OptionError, UnsupportedError
from xloss.losses.config import BaseLossConfig
from xloss.losses.grpo import GRPOLossConfig

Reducer = Callable[[Tensor], Tensor]
_ASKED_TWICE = {
    "use_tis": "rollout_correction",
    "use_opsm": "opsm_delta",
    "use_kl_loss": "use_kl_loss",
    "entropy_coef": "entropy_coef",
}
"""Options of slime that its own policy loss honours, and the field that does here."""


def loss_function(config: BaseLossConfig) -> Any:
    """A custom loss function of slime that computes ``config``. In a module of yours: ``loss = loss_function(config)``.

    Args:
        config: its ``loss_reduction`` is left out, or what slime does: ``sample``, ``prompt`` where the samples of a
            rollout share a mean, ``token`` with ``--calculate-per-token-loss``.

    Returns:
        ``fn(args, batch, logits, sum_of_sample_mean) -> (loss, metrics)``. ``log_probs`` of the batch are the old ones
        (``rollout_log_probs`` with ``--use-rollout-logprobs``; with neither, the current ones).

    Raises:
        OptionError, UnsupportedError: the config asks for what slime does, or for what it does not give.
    """
    ours = checked(config, "slime", {"return_token_accuracy": "it has no logits there"})
    # a mean over samples counts those without a token in slime
    ours = ours.model_copy(update={"count_empty_sequences": False})

    def fn(args: Any, batch: Any, logits: Tensor, sum_of_sample_mean: Reducer) -> tuple[Tensor, dict[str, Tensor]]:
        by_token = bool(args.calculate_per_token_loss)
        run_as = reduced_by(ours, *(("token",) if by_token else ("sample", "prompt")), run_as="sum")
        _check_args(args, run_as)
        logprobs, entropy = _log_probs(args, batch, logits, bool(getattr(run_as, "entropy_coef", 0.0)))
        found = local_loss(run_as, _fields(args, batch, run_as, logprobs), logprobs, entropy, _bounds(batch, logprobs))
        if found.token_loss is None:
            raise UnsupportedError("this loss is no sum over tokens, which is what slime reduces")
        loss = sum_of_sample_mean(found.token_loss)
        if logprobs.numel() == 0:
            loss = loss + 0 * logits.sum()  # its backward must reach the model all the same
        count = sum_of_sample_mean(torch.ones_like(logprobs)).detach()  # samples, or tokens: slime divides by them all
        means = {name: m.result() * count for name, m in found.metrics.items() if m.reducer == "mean"}
        return loss, {"loss": loss.detach(), **means}

    return fn


def _check_args(args: Any, config: BaseLossConfig) -> None:
    """Raise where slime's options and the config ask for different terms."""
    for option, field in _ASKED_TWICE.items():
        asked, has = getattr(args, option, None) or None, getattr(config, field, None) or None
        same = asked == has if option == "entropy_coef" else asked is None or has is not None
        if not same:
            raise OptionError(
                f"slime has {option}={asked!r}, the config {field}={has!r}: a custom loss is all of the loss, and "
                "slime prepares by its options what the loss needs; make them agree"
            )


def _log_probs(args: Any, batch: Any, logits: Tensor, with_entropy: bool) -> tuple[Tensor, Tensor | None]:
    """Log-probs and entropies of all response tokens of the micro-batch, ``[T]``, by slime's own code."""
    from slime.backends.megatron_utils.loss import get_log_probs_and_entropy, get_rollout_top_p_logprob_kwargs

    _, found = get_log_probs_and_entropy(
        logits,
        args=args,
        unconcat_tokens=batch["unconcat_tokens"],
        total_lengths=batch["total_lengths"],
        response_lengths=batch["response_lengths"],
        with_entropy=with_entropy,
        **get_rollout_top_p_logprob_kwargs(args, batch),
    )
    lengths = [(len(x), len(mask)) for x, mask in zip(found["log_probs"], batch["loss_masks"], strict=True)]
    if any(have != want for have, want in lengths):
        raise UnsupportedError("context parallelism cuts responses into parts, which the adapter does not put together")
    return torch.cat(found["log_probs"]), torch.cat(found["entropy"]) if with_entropy else None


def _fields(args: Any, batch: Any, config: BaseLossConfig, logprobs: Tensor) -> dict[str, Any]:
    def joined(name: str) -> Tensor | None:
        return torch.cat(list(batch[name])) if batch.get(name) else None

    fields: dict[str, Any] = {"shifted_labels": masked_labels(torch.cat(list(batch["loss_masks"])))}
    if isinstance(config, GRPOLossConfig):
        old = joined("rollout_log_probs" if args.use_rollout_logprobs else "log_probs")
        fields |= {
            "advantages": joined("advantages"),
            "old_logprobs": logprobs.detach() if old is None else old,
            "rollout_logprobs": joined("rollout_log_probs"),
            "ref_logprobs": joined("ref_log_probs") if config.use_kl_loss else None,
        }
    return fields


def _bounds(batch: Any, logprobs: Tensor) -> Tensor:
    lengths = torch.tensor([0, *map(len, batch["loss_masks"])], device=logprobs.device)
    return lengths.cumsum(0)
