"""Data as it comes in, from the ``tinker`` package or without it, and results in the types of either.

What comes in is read by its attributes, so ``tinker.Datum`` and ``xloss.tinker.Datum`` are the same to the client.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from xloss.errors import DtypeError, LabelError, OptionError, ShapeError, UnsupportedError, unknown_name

Returns = Literal["auto", "tinker", "torch"]


@dataclass(frozen=True)
class Datum:
    """One sequence, as ``tinker.Datum``.

    Args:
        model_input: its tokens ``[N]``: a list, tensor or array, or an object with ``to_ints()``.
        loss_fn_inputs: what the loss reads, by name, ``[N]`` (targets and their weights also ``[N, K]``): tensors,
            arrays, lists, or objects with ``to_torch()``.
    """

    model_input: Any
    loss_fn_inputs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class AdamParams:
    """Numbers of one AdamW step, the names and defaults of ``tinker.AdamParams``; ``grad_clip_norm=0``: no clipping."""

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0


@dataclass(frozen=True)
class ForwardBackwardOutput:
    """As ``tinker.ForwardBackwardOutput``, with tensors where that has ``TensorData``.

    - ``loss_fn_outputs``: ``{"logprobs": [N] or [N, K]}`` of each datum, on the CPU
    - ``metrics``: ``loss:sum``, and the loss's figures as ``name:reducer``
    """

    loss_fn_output_type: str
    loss_fn_outputs: list[dict[str, Tensor]]
    metrics: dict[str, float]


@dataclass(frozen=True)
class OptimStepResponse:
    """As ``tinker.OptimStepResponse``. ``metrics``: ``grad_norm``, before clipping."""

    metrics: dict[str, float]


@dataclass(frozen=True)
class SavedWeights:
    """Where a checkpoint is."""

    path: str


@dataclass(frozen=True)
class SampledSequence:
    """As ``tinker.SampledSequence``. ``logprobs`` are the model's own, whatever the temperature."""

    tokens: list[int]
    logprobs: list[float]
    stop_reason: Literal["stop", "length"]
    sequence_id: str


@dataclass(frozen=True)
class SampleResponse:
    """As ``tinker.SampleResponse``. ``prompt_logprobs``: ``None`` at the first token."""

    sequences: list[SampledSequence]
    prompt_logprobs: list[float | None] | None = None


@dataclass(frozen=True)
class ModelData:
    """As ``tinker.types.ModelData``."""

    model_name: str


@dataclass(frozen=True)
class ModelInfo:
    """As ``tinker.types.GetInfoResponse``."""

    model_id: str
    model_data: ModelData
    model_name: str
    is_lora: bool
    lora_rank: int | None


# -- in ----------------------------------------------------------------------------------------------------------------


def tokens_of(model_input: Any) -> Tensor:
    """Tokens ``[N]`` int64. Raises ``UnsupportedError`` where there are images or sound among them."""
    chunks = getattr(model_input, "chunks", None)
    for chunk in chunks or ():
        if not hasattr(chunk, "tokens"):
            raise UnsupportedError(f"model_input holds a {type(chunk).__name__}; only text tokens can be trained on")
    ints = model_input.to_ints() if hasattr(model_input, "to_ints") else model_input
    tokens = tensor_of("model_input", ints)
    if tokens.ndim != 1 or not tokens.numel():
        raise ShapeError(f"model_input must be [N] tokens, at least one; got {tuple(tokens.shape)}")
    if tokens.dtype.is_floating_point:
        raise DtypeError(f"model_input must be integer; got {tokens.dtype}")
    if int(tokens.min()) < 0:
        raise LabelError(f"model_input must not be negative; got {int(tokens.min())}")
    return tokens.to(torch.int64)


def tensor_of(name: str, value: Any) -> Tensor:
    """A field of a datum as a tensor without gradient: a tensor, array, list or number, or has ``to_torch()``."""
    try:
        found = value.to_torch() if hasattr(value, "to_torch") else torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DtypeError(f"{name} must be a tensor, array, list or TensorData; got {type(value).__name__}") from error
    return found.detach()


def adam_of(params: Any) -> AdamParams:
    """``tinker.AdamParams``, ours or a mapping as ours.

    Raises ``OptionError`` for another optimizer's, and for numbers that AdamW has no step with.
    """
    names = list(AdamParams.__dataclass_fields__)
    if isinstance(params, Mapping):
        for name in params:
            if name not in names:
                raise OptionError(unknown_name("field of adam_params", str(name), names))
        params = AdamParams(**params)
    if not all(hasattr(params, name) for name in names):
        raise OptionError(f"adam_params must be AdamParams, with {', '.join(names)}; got {type(params).__name__}")
    found = {name: float(getattr(params, name)) for name in names}
    for name, value in found.items():
        below = 1.0 if name.startswith("beta") else math.inf
        if not 0 <= value < below:
            raise OptionError(f"{name} of adam_params must be at least 0 and below {below}; got {value}")
    return AdamParams(**found)


# -- out ---------------------------------------------------------------------------------------------------------------


class Answers:
    """Makes results in the types of ``tinker`` or in ours.

    Args:
        returns: ``tinker`` or ``torch`` to insist; ``auto``: tinker's where it is installed.
    """

    def __init__(self, returns: Returns) -> None:
        if returns not in ("auto", "tinker", "torch"):
            raise OptionError(f"returns must be auto, tinker or torch; got {returns!r}")
        installed = importlib.util.find_spec("tinker") is not None
        if returns == "tinker" and not installed:
            raise OptionError("returns='tinker' needs the tinker package: pip install 'xloss[tinker]'")
        use = returns == "tinker" or (returns == "auto" and installed)
        self._tinker: Any = importlib.import_module("tinker") if use else None

    def output(self, logprobs: list[Tensor], metrics: dict[str, float]) -> Any:
        """``ForwardBackwardOutput`` of each datum's log-probs."""
        of_datum = [x.detach().cpu() for x in logprobs]
        if self._tinker is None:
            return ForwardBackwardOutput("TorchLossReturn", [{"logprobs": x} for x in of_datum], metrics)
        data = [{"logprobs": self._tinker.TensorData.from_torch(x)} for x in of_datum]
        return self._tinker.ForwardBackwardOutput(
            loss_fn_output_type="TorchLossReturn", loss_fn_outputs=data, metrics=metrics
        )

    def stepped(self, metrics: dict[str, float]) -> Any:
        """``OptimStepResponse``."""
        return (OptimStepResponse if self._tinker is None else self._tinker.OptimStepResponse)(metrics=metrics)

    def saved(self, path: str, *, for_sampler: bool) -> Any:
        """``SaveWeightsResponse`` or ``SaveWeightsForSamplerResponse``."""
        if self._tinker is None:
            return SavedWeights(path)
        types = self._tinker.types
        return (types.SaveWeightsForSamplerResponse if for_sampler else types.SaveWeightsResponse)(path=path)

    def loaded(self, path: str, model_id: str) -> Any:
        """``LoadWeightsResponse``."""
        if self._tinker is None:
            return SavedWeights(path)
        return self._tinker.types.LoadWeightsResponse(path=path, model_id=model_id)

    def info(self, model_id: str, name: str, lora_rank: int | None) -> Any:
        """``GetInfoResponse``."""
        fields = {"model_id": model_id, "model_name": name, "is_lora": lora_rank is not None, "lora_rank": lora_rank}
        if self._tinker is None:
            return ModelInfo(model_data=ModelData(name), **fields)  # type: ignore[arg-type]
        types = self._tinker.types
        return types.GetInfoResponse(model_data=types.ModelData(model_name=name), **fields)

    def samples(self, sequences: list[SampledSequence], prompt_logprobs: list[float | None] | None) -> Any:
        """``SampleResponse``."""
        if self._tinker is None:
            return SampleResponse(sequences, prompt_logprobs)
        types = self._tinker.types
        theirs = [
            types.SampledSequence(
                stop_reason=s.stop_reason,
                sequence_id=s.sequence_id,
                _tokens_list=s.tokens,
                _logprobs_list=s.logprobs,
            )
            for s in sequences
        ]
        return types.SampleResponse(sequences=theirs, _prompt_logprobs_list=prompt_logprobs)
