"""What an architecture does to the logits after its head: read from the config, and held against the model's forward.

The config alone cannot tell that nothing else happens. So the model's own ``forward`` is run once with its backbone
and its head replaced by random tensors: cheap at any size, on any device, and no weight is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from xloss.distributed import head_weight
from xloss.errors import OptionError, UnsupportedError
from xloss.lora import LoraWeight

_TOKENS = 3
_TOLERANCE = 1e-4  # of float32 logits; what a model does after its head moves them by far more or not at all


@dataclass(frozen=True)
class LogitTransform:
    """``softcap(logit_scale * (h W^T + b))``, in the terms of ``BaseLossConfig``."""

    logit_scale: float = 1.0
    softcap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        logits = logits * self.logit_scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def logit_transform(model: nn.Module) -> LogitTransform:
    """Scale and cap of the logits, from the fields that architectures keep them in.

    ``final_logit_softcapping`` (Gemma) caps. ``logit_scale`` (Cohere), ``output_multiplier`` and ``lm_head_multiplier``
    (Falcon-H1) multiply; ``logits_scaling`` divides (Granite) or, in HyperCLOVA X, multiplies.

    Raises:
        UnsupportedError: several factors, or one that is not a positive number.
    """
    config: Any = model.config
    config = config.get_text_config()
    names = ("logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")
    found = {name: value for name in names if (value := getattr(config, name, None)) is not None}
    if len(found) > 1:
        raise UnsupportedError(f"the config of {type(model).__name__} has several factors of the logits: {found}")
    scale = 1.0
    for name, value in found.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
            raise UnsupportedError(f"{name} of {type(model).__name__} must be a positive number; got {value!r}")
        divides = name == "logits_scaling" and config.model_type != "hyperclovax"
        scale = 1 / value if divides else float(value)
    return LogitTransform(scale, getattr(config, "final_logit_softcapping", None))


def output_head(model: nn.Module) -> nn.Module:
    """The head of a causal language model, one that ``xloss.head_weight`` can read, PEFT's layer around it included.

    Raises:
        UnsupportedError: there is none, or its forward was replaced.
    """
    find: Any = getattr(model, "get_output_embeddings", None)
    head: nn.Module | None = find() if find is not None else None
    if head is None:
        raise UnsupportedError(f"{type(model).__name__} has no head: get_output_embeddings() gives none")
    for module in head.modules():
        if "forward" in vars(module):
            raise UnsupportedError(
                f"the head of {type(model).__name__} has a forward of its own, {vars(module)['forward']!r}; only the "
                "product with its weight is known"
            )
    return head


@contextmanager
def swapped(owner: object, name: str, value: object) -> Iterator[None]:
    """``owner.name`` is ``value`` for a while, on the instance alone."""
    own = vars(owner)
    missing = object()
    before = own.get(name, missing)
    own[name] = value
    try:
        yield
    finally:
        if before is missing:
            own.pop(name, None)
        else:
            own[name] = before


class _BackboneOutput:
    """Output of a backbone that ran nothing: hidden states, and ``None`` under every other name."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)

    def __getitem__(self, index: int | slice) -> Any:
        return (self.last_hidden_state,)[index]


def check_forward(model: nn.Module, forward: Callable[..., Any], transform: LogitTransform) -> None:
    """Raise unless ``forward(model, ..)`` gives ``transform(head(hidden))`` as logits and their mean CE as loss.

    Raises:
        UnsupportedError: it does something else, so a loss made from hidden states and head would be another one.
        OptionError: the head is no product with a weight, as a quantised one.
    """
    name, head = type(model).__name__, output_head(model)
    config: Any = model.config
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedError(f"{name} is an encoder-decoder; xloss.hf knows decoder-only causal language models")
    random = torch.Generator().manual_seed(0)
    with torch.no_grad(), head_weight(head) as (weight, _):  # raises where it cannot be read
        vocab, width = (weight.weight if isinstance(weight, LoraWeight) else weight).shape
    hidden = torch.randn(1, _TOKENS, width, generator=random)
    spread = 4 * (transform.softcap or 1.0) / transform.logit_scale  # a cap shows where logits pass it
    logits = torch.randn(1, _TOKENS, vocab, generator=random) * spread
    labels = torch.randint(0, vocab, (1, _TOKENS), generator=random)
    taken: list[Any] = []
    backbones = _backbones(model)
    if not backbones:
        raise UnsupportedError(f"{name} has no backbone apart from itself, so its head cannot be told apart")

    def head_forward(given: Tensor) -> Tensor:
        taken.append(given)
        return logits.clone()

    options = {"output_router_logits": False} if hasattr(config.get_text_config(), "output_router_logits") else {}
    try:
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(swapped(model, "training", False))
            stack.enter_context(swapped(head, "forward", head_forward))
            for backbone in backbones:
                stack.enter_context(swapped(backbone, "forward", lambda *_, **__: _BackboneOutput(hidden)))
            output = forward(model, input_ids=labels, labels=labels, return_dict=True, **options)
    except Exception as error:
        raise UnsupportedError(
            f"{name} is not known to be a backbone and a head: its forward failed around stand-ins for them, with "
            f"{type(error).__name__}: {error}"
        ) from error
    if len(taken) != 1 or taken[0].device != hidden.device or not torch.equal(taken[0], hidden):
        raise UnsupportedError(f"{name} does something to the hidden states between its backbone and its head")
    _check_same(output.logits, transform(logits), f"logits of {name} are not {transform} of its head's")
    want = nn.functional.cross_entropy(transform(logits)[0, :-1], labels[0, 1:])
    _check_same(output.loss, want, f"the loss of {name} is not the mean cross-entropy of its logits")


def _backbones(model: Any) -> list[nn.Module]:
    """What the forward may call for its hidden states: ``base_model``, its decoder (OPT) or ``model`` (Llama 4)."""
    named = [model.base_model, getattr(model, "get_decoder", lambda: None)(), getattr(model, "model", None)]
    found = [module for module in named if isinstance(module, nn.Module) and module is not model]
    return list(dict.fromkeys(found))


def _check_same(got: Tensor | None, want: Tensor, otherwise: str) -> None:
    if got is None or got.shape != want.shape or not torch.allclose(got.float(), want, _TOLERANCE, _TOLERANCE):
        raise UnsupportedError(
            f"{otherwise}: the architecture transforms them in a way that xloss.hf does not know, and a loss without "
            "it would be wrong"
        )


def with_transform(cfg: Any, transform: LogitTransform) -> Any:
    """The loss config with the model's scale and cap.

    Raises:
        OptionError: it asks for others.
    """
    update = {}
    for name in ("logit_scale", "softcap"):
        asked, own = getattr(cfg, name), getattr(transform, name)
        if asked != own and asked != type(cfg).model_fields[name].default:
            raise OptionError(f"{name}={asked} in the loss config, but the model's own is {own}; leave it out")
        update[name] = own
    return cfg.model_copy(update=update)
