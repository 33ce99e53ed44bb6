"""prime-rl: any token loss of xloss as a custom loss, ``import_path = "xloss.adapters.prime_rl.loss"``.

prime-rl gives one sequence at a time, wants the plain sum over its tokens, and divides by the count of the step.
"""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from xloss.adapters.given import checked, figures, local_loss, masked_labels, reduced_by
from xloss.errors import MissingFieldError, UnsupportedError
from xloss.losses.grpo import GRPOLossConfig
from xloss.losses.presets.base import preset as preset_of
from xloss.losses.reduced import ReducedLossConfig

_NOT_THERE = {
    "entropy_coef": "it has no entropies with a gradient there",
    "return_token_accuracy": "it has no logits there",
}


def loss(inputs: Any, *, preset: str | None = None, **fields: Any) -> Any:
    """A ``LossFn`` of prime-rl: the sum of the config's loss over the tokens of ``inputs.loss_mask``.

    ``[trainer.loss]`` ``type = "custom"``, ``import_path = "xloss.adapters.prime_rl.loss"``, and in its ``kwargs``:

    Args:
        inputs: prime-rl's ``LossInputs`` of one sequence; ``inference_logprobs`` are ``rollout_logprobs`` and, as there
            are no others, the old ones. ``loss_weights`` multiply the loss of each token.
        preset: name of a preset; without, ``fields`` are those of a ``GRPOLossConfig``.
        fields: of the config, or overrides of the preset.

    Returns:
        prime-rl's ``LossOutputs``: the sum, and means over the sequence's tokens under prime-rl's names.

    Raises:
        OptionError, UnsupportedError, pydantic.ValidationError: the config is wrong, or wants what is not there.
        MissingFieldError: the loss needs ``ref_logprobs`` and the algorithm ships none.
    """
    from prime_rl.trainer.rl.loss import LossOutputs

    config = _config(json.dumps([preset, fields], sort_keys=True))
    if getattr(config, "use_kl_loss", False) and inputs.ref_logprobs is None:
        raise MissingFieldError("use_kl_loss=True, but inputs.ref_logprobs is None: the algorithm ships none")
    given = {
        "shifted_labels": masked_labels(inputs.loss_mask),
        "advantages": inputs.advantages,
        "rollout_logprobs": inputs.inference_logprobs,
        "ref_logprobs": inputs.ref_logprobs,
    }
    found = local_loss(config, given, inputs.trainer_logprobs)
    if found.token_loss is None:
        raise UnsupportedError("this loss is no sum over tokens, which prime-rl weighs one by one")
    weights = inputs.loss_weights
    total = found.loss if weights is None else (found.token_loss * weights).sum()
    return LossOutputs(loss=total, metrics=figures(found.metrics, "prime-rl"))


@cache
def _config(given: str) -> ReducedLossConfig:
    """The config of ``[preset, fields]`` in JSON, checked once."""
    name, fields = json.loads(given)
    config = GRPOLossConfig(**fields) if name is None else preset_of(name, **fields)
    return reduced_by(checked(config, "prime-rl", _NOT_THERE), "token", "sum", run_as="sum")
