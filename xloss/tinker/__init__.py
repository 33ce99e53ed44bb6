"""Tinker's training API on a local model: ``forward_backward``, ``optim_step`` and the rest.

    client = TrainingClient(from_transformers(model, tokenizer))
    client.forward_backward(data, "importance_sampling")
    client.optim_step(AdamParams(learning_rate=1e-5))

The ``tinker`` package is optional: where it is installed, its types go in and come out.
"""

from xloss.tinker.client import TrainingClient
from xloss.tinker.futures import Future
from xloss.tinker.huggingface import from_transformers
from xloss.tinker.losses import loss_names
from xloss.tinker.model import LanguageModel
from xloss.tinker.sampling import SamplingClient
from xloss.tinker.service import ServiceClient
from xloss.tinker.types import AdamParams, Datum, ForwardBackwardOutput, OptimStepResponse

__all__ = [
    "AdamParams",
    "Datum",
    "ForwardBackwardOutput",
    "Future",
    "LanguageModel",
    "OptimStepResponse",
    "SamplingClient",
    "ServiceClient",
    "TrainingClient",
    "from_transformers",
    "loss_names",
]
