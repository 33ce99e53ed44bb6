"""``attach``: a Transformers model whose forward takes ``loss_ctx=`` and, in training, computes losses without logits.

The model's own ``forward`` still runs, from the inputs to the output object. For one call its head computes the loss
instead of logits, and its loss function hands that loss on. So whatever hooks a framework has put on the model or the
head (DDP, FSDP, ZeRO-3) run as they always do, and the model adds its own auxiliary losses.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, make_dataclass
from types import MethodType
from typing import Any, TypeVar

from torch import Tensor, nn

from xloss.distributed import head_weight
from xloss.errors import OptionError, UnsupportedError
from xloss.hf.labels import label_context
from xloss.hf.transform import LogitTransform, check_forward, logit_transform, output_head, swapped, with_transform
from xloss.losses.base import BaseLossContext
from xloss.losses.ce import CELossConfig
from xloss.losses.info import LossInfo

Model = TypeVar("Model", bound=nn.Module)
Forward = Callable[..., Any]


@dataclass(frozen=True)
class _Attached:
    """What the new forward of a model knows. Nothing here refers to the model, so that a copy of it is whole."""

    config: CELossConfig
    transform: LogitTransform
    forward: Forward  # the one before, as a function of the model
    before: Any  # what stood in the model's own dict under ``forward``, or None
    loss_function: Any  # the model's own


def attach(model: Model, config: CELossConfig | None = None) -> Model:
    """Give the model's ``forward`` a ``loss_ctx`` and, in training, a cross-entropy of ``labels`` without logits.

    - ``model(**inputs, loss_ctx=ctx)`` returns the output of that forward with ``logprobs``, ``entropy``, ``metrics``
      and ``info`` of ``ctx`` (a ``LossInfo``), and ``logits=None``. ``ctx_loss`` is the loss of ``ctx``, and ``loss``
      that with the model's auxiliary losses.
    - ``model(**inputs, labels=labels)`` in training mode does so with ``config``: ``sum / num_items_in_batch`` where
      that is given, else the mean over valid tokens.
    - Without either, and with ``labels`` in eval mode, it is the forward of before.

    The model's scale and cap of the logits go into the config of each context.
    Parameters, buffers and their names stay. ``model`` is changed in place; attach before DDP and FSDP. Attaching again
    replaces ``config``.

    Args:
        model: a decoder-only causal language model of Transformers, or a PEFT model around one.
        config: of the loss of ``labels``.

    Returns:
        ``model``.

    Raises:
        UnsupportedError: logits of this architecture are not a known transform of its head's.
        OptionError: ``config`` is not a ``CELossConfig`` that a token mean goes with; or the head is no product with a
            weight, as a quantised one.
    """
    config = CELossConfig() if config is None else config
    if not isinstance(config, CELossConfig) or config.loss_reduction != "token":
        raise OptionError(
            "config must be a CELossConfig with loss_reduction='token', as Transformers says what labels are divided "
            f"by; give other losses as loss_ctx; got {config!r}"
        )
    causal = _causal_lm(model)
    attached = _attached(causal)
    before = vars(causal).get("forward") if attached is None else attached.before
    forward = _as_function(causal, before)
    transform = logit_transform(causal)
    check_forward(causal, forward, transform)
    state = _Attached(with_transform(config, transform), transform, forward, before, _loss_function(causal))
    vars(causal)["forward"] = MethodType(_forward_with(state), causal)
    return model


def detach(model: Model) -> Model:
    """Undo ``attach``, in place.

    Raises:
        OptionError: the model is not attached, or its forward was wrapped again since.
    """
    causal = _causal_lm(model)
    attached = _attached(causal)
    if attached is None:
        raise OptionError(
            f"the forward of {type(causal).__name__} is not attach's: it was never attached, or something wrapped it "
            "again since, which has to be undone first"
        )
    if attached.before is None:
        del vars(causal)["forward"]
    else:
        vars(causal)["forward"] = attached.before
    return model


def is_attached(model: nn.Module) -> bool:
    """Whether the model's forward is the one that ``attach`` made."""
    return _attached(_causal_lm(model)) is not None


def _attached(causal: nn.Module) -> _Attached | None:
    own = vars(causal).get("forward")
    found = getattr(getattr(own, "__func__", None), "attached", None)
    return found if isinstance(found, _Attached) else None


def _causal_lm(model: nn.Module) -> nn.Module:
    """The causal language model itself, inside PEFT's wrapper if there is one."""
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        base: Any = model
        found: nn.Module = base.get_base_model()
        return found
    if not hasattr(model, "config") or not hasattr(model, "get_output_embeddings"):
        raise UnsupportedError(
            f"attach takes a causal language model of Transformers, before it is wrapped; got {type(model).__name__}"
        )
    return model


def _as_function(model: nn.Module, own: Any) -> Forward:
    """The model's forward as a function of the model."""
    if own is None:
        return type(model).forward
    if isinstance(own, MethodType) and own.__self__ is model:
        return own.__func__
    raise UnsupportedError(
        f"the forward of {type(model).__name__} was replaced by {own!r}; attach before other wrappers, and before "
        "accelerator.prepare"
    )


def _loss_function(model: Any) -> Any:
    return getattr(model, "loss_function", None)


def _forward_with(state: _Attached) -> Forward:
    signature = inspect.signature(state.forward)
    rest = next((p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD), None)

    @functools.wraps(state.forward)
    def forward(self: nn.Module, *args: Any, loss_ctx: BaseLossContext[Any] | None = None, **kwargs: Any) -> Any:
        bound = signature.bind_partial(self, *args, **kwargs).arguments
        inputs = {name: value for name, value in bound.items() if name != "self"}
        inputs |= inputs.pop(rest, {}) if rest else {}
        labels = inputs.get("labels")
        if loss_ctx is None:
            unlabelled = labels is None and inputs.get("shift_labels") is None
            if not self.training or unlabelled or inputs.get("fused_lm_head"):  # the last is TRL's own head
                return state.forward(self, *args, **kwargs)
            _check_labels_path(self, state, inputs)
            loss_ctx = label_context(state.config, labels, inputs)
        else:
            if labels is not None or inputs.get("shift_labels") is not None:
                raise OptionError("labels and loss_ctx are both given; the loss of loss_ctx has labels of its own")
        given, loss_ctx = loss_ctx, _with_model(loss_ctx, state)
        output = _run(self, state, loss_ctx, inputs)
        given.last_plan = loss_ctx.last_plan  # for its explain()
        return output

    parameters = list(signature.parameters.values())
    at = next((i for i, p in enumerate(parameters) if p.kind is p.VAR_KEYWORD), len(parameters))
    parameters.insert(at, inspect.Parameter("loss_ctx", inspect.Parameter.KEYWORD_ONLY, default=None))
    forward.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    forward.attached = state  # type: ignore[attr-defined]
    return forward


def _check_labels_path(model: nn.Module, state: _Attached, inputs: Mapping[str, Any]) -> None:
    if _loss_function(model) is not state.loss_function:
        raise UnsupportedError(
            f"loss_function of {type(model).__name__} was replaced after attach; labels alone are the cross-entropy of "
            "attach's config. Give the loss as loss_ctx, or detach(model)"
        )
    if inputs.get("ignore_index", state.config.ignore_idx) != state.config.ignore_idx:
        raise OptionError(
            f"ignore_index={inputs['ignore_index']}, but attach's config has ignore_idx={state.config.ignore_idx}"
        )


def _with_model(ctx: BaseLossContext[Any], state: _Attached) -> BaseLossContext[Any]:
    """The context with the model's scale and cap of the logits."""
    if not isinstance(ctx, BaseLossContext):
        raise OptionError(f"loss_ctx must be a loss context; got {type(ctx).__name__}")
    cfg = with_transform(ctx.loss_cfg, state.transform)
    if cfg == ctx.loss_cfg:
        return ctx
    if ctx.has_own_loss_fn:
        raise UnsupportedError(
            f"{type(ctx).__name__} has a loss_fn of its own, and applies the model's {state.transform} only if its "
            "config holds them: set logit_scale and softcap there"
        )
    ours = copy.copy(ctx)
    ours.loss_cfg, ours.loss_kwargs = cfg, copy.copy(ctx.loss_kwargs)
    rows = ctx.loss_kwargs.known_rows(ctx.loss_cfg)
    if rows is not None:
        ours.loss_kwargs.remember_rows(rows, cfg)
    return ours


def _run(model: nn.Module, state: _Attached, ctx: BaseLossContext[Any], inputs: dict[str, Any]) -> Any:
    """The model's own forward, with a head that computes the loss and a loss function that hands it on."""
    if inputs.get("return_dict") is False:
        raise OptionError("return_dict=False: an attached model returns its loss in an output object")
    head = output_head(model)
    if hasattr(head, "_hf_hook"):
        raise UnsupportedError("the head has a hook of accelerate (device_map or offloading), which moves its weight")
    infos: list[LossInfo] = []
    losses: list[Tensor] = []

    def head_forward(hidden: Tensor) -> Tensor:
        with head_weight(head) as (weight, bias):
            loss, info = ctx.forward(hidden, weight, bias)
        infos.append(info)
        return loss.reshape(1, 1, 1)  # in the place of logits [B, S, V]

    def after_hooks(module: nn.Module, args: Any, output: Tensor) -> None:
        losses.append(output.reshape(()).clone())  # apart from what the model does to its logits

    def loss_function(*args: Any, **kwargs: Any) -> Tensor:
        if len(losses) != 1:
            raise UnsupportedError(f"{type(model).__name__} called its head {len(losses)} times in one forward")
        return losses[0].clone()  # models add their auxiliary losses to it in place

    handle = head.register_forward_hook(after_hooks)
    inputs = {**inputs, "labels": ctx.loss_kwargs.shifted_labels, "return_dict": True}
    try:
        with swapped(head, "forward", head_forward), swapped(model, "_loss_function", loss_function):
            output = state.forward(model, **inputs)
    finally:
        handle.remove()
    return _output(output, losses[0], infos[0])


@functools.lru_cache(maxsize=32)
def _output_class(theirs: type) -> type:
    """The model's own output class with the fields of a loss."""
    names = ("ctx_loss", "logprobs", "entropy", "metrics", "info")
    own = {f.name for f in fields(theirs)}
    added = [(name, Any, field(default=None)) for name in names if name not in own]
    return make_dataclass(f"Loss{theirs.__name__}", added, bases=(theirs,))


def _output(output: Any, loss: Tensor, info: LossInfo) -> Any:
    own = {f.name: getattr(output, f.name) for f in fields(output)}
    found = {
        "ctx_loss": loss,
        "logits": info.logits,
        "logprobs": info.logprobs,
        "entropy": info.entropy,
        "metrics": info.metrics,
        "info": info,
    }
    theirs: Any = type(output)
    return _output_class(theirs)(**{**own, **found})
