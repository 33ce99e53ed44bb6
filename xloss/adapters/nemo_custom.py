"""A loss function written for NeMo RL as a loss of xloss, run on hidden states and a head.

``fn(next_token_logits, data, global_valid_seqs, global_valid_toks) -> (loss, metrics)``, or the same with
``next_token_logprobs``. NeMo RL itself is not needed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, Self

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional as F

from xloss.distributed import Order, TokenRanks
from xloss.errors import MissingFieldError, OptionError, UnsupportedError
from xloss.losses.base import BaseLossContext, TokenLoss
from xloss.losses.config import BaseLossConfig
from xloss.losses.model import BaseLossContextInputItem, BaseLossKwargs, PerBatch, PerToken, require
from xloss.metrics import Metric
from xloss.stats import TokenStats

_INPUTS = {"next_token_logits": "logit", "logits": "logit", "next_token_logprobs": "logprob"}


def from_nemo_rl(
    nemo_loss: Callable[..., Any],
    loss_type: Literal["token_level", "sequence_level"] | None = None,
    **options: Any,
) -> NemoLossConfig:
    """The config of a loss function in NeMo RL's style.

    A ``token_level`` loss is a sum over tokens divided by ``global_valid_toks``: on logits it runs chunk by chunk, so
    that the logits of one chunk are all there ever are. It must read logits ``[:, :-1]`` beside fields ``[:, 1:]``, as
    NeMo RL's frames are: a chunk ends in a row of NaN in the place of the next chunk's first. A ``sequence_level`` loss
    on logits holds those of the micro-batch; on log-probs either runs in two passes, without logits. Tokens outside
    ``token_mask`` and ``sample_mask`` have log-prob 0.

    Args:
        nemo_loss: takes ``next_token_logits`` or ``logits`` ``[B, S, V]``, or ``next_token_logprobs`` ``[B, S - 1]``;
            ``data``, ``global_valid_seqs``, ``global_valid_toks``. Returns ``(loss, metrics)``; metrics are numbers
            that add up, or extremes whose names end in ``_min`` and ``_max``.
        loss_type: where the function has no attribute that tells.
        options: of ``BaseLossConfig``.

    Raises:
        OptionError: nothing tells what the function takes, or its ``loss_type``.
        UnsupportedError: ``options`` ask for what a function of logits cannot have.
    """
    taken = [name for name in _INPUTS if name in inspect.signature(nemo_loss).parameters]
    if len(taken) != 1:
        raise OptionError(f"nemo_loss must take one of {', '.join(_INPUTS)}; it takes {taken or 'none of them'}")
    told = getattr(nemo_loss, "loss_type", None)
    found = loss_type or getattr(told, "value", told)
    if found not in ("token_level", "sequence_level"):
        raise OptionError(
            f"loss_type must be token_level or sequence_level; nemo_loss has {told!r}, given {loss_type!r}"
        )
    if _INPUTS[taken[0]] == "logit":
        for name in ("temperature", "softcap", "logit_scale"):
            if name in options:
                raise UnsupportedError(f"{name} is for a function of logits to apply itself")
        if found == "sequence_level" and options.setdefault("mode", "eager") != "eager":
            raise UnsupportedError("a sequence_level loss on logits takes them whole, mode='eager'; take log-probs")
    return NemoLossConfig(nemo_loss=nemo_loss, loss_type=found, takes=taken[0], **options)  # type: ignore[arg-type]


class NemoLossConfig(BaseLossConfig):
    """See ``from_nemo_rl``; ``takes`` is the name of the function's argument for logits or log-probs."""

    nemo_loss: Any
    loss_type: Literal["token_level", "sequence_level"]
    takes: Literal["next_token_logits", "logits", "next_token_logprobs"]

    @property
    def loss_ctx_cls(self) -> type[NemoContext]:
        return NemoContext if _INPUTS[self.takes] == "logprob" else NemoLogitContext

    def build(
        self,
        data: Any,
        sp_mesh: DeviceMesh | None = None,
        device: torch.device | str | None = None,
        sp_order: Order = "contiguous",
    ) -> BaseLossContext[Any]:
        """A context of one micro-batch from NeMo RL's ``data``, to be calibrated by ``build_batches``.

        ``input_ids`` and ``token_mask`` are ``[B, S]``, ``sample_mask`` ``[B]``; hidden states will be ``[B, S, H]``.
        """
        if sp_mesh is not None and sp_mesh.size() > 1:
            raise UnsupportedError("sp_mesh: functions for NeMo RL take whole sequences")
        for name in ("input_ids", "token_mask", "sample_mask"):
            if data.get(name) is None:
                raise MissingFieldError(f"data[{name!r}] is missing")
        valid = (data["token_mask"] * data["sample_mask"].unsqueeze(-1)) != 0
        labels = data["input_ids"].masked_fill(~valid, self.ignore_idx).roll(-1, 1)
        labels[:, -1] = self.ignore_idx
        places = torch.arange(labels.shape[1], device=labels.device).expand_as(labels).contiguous()
        kwargs = NemoKwargs(shifted_labels=labels, places=places, data=data)
        return self.loss_ctx_cls(self, kwargs if device is None else kwargs.to(device))


class NemoKwargs(BaseLossKwargs):
    """NeMo RL's batch.

    Args:
        data: as it is. places: of the tokens in their rows.
        global_valid_seqs, global_valid_toks: of the global batch, 0-d. gradient_factor: of ``grad_reduce``.
    """

    data: Any
    places: Annotated[Tensor, PerToken(pad=0)]
    global_valid_seqs: Annotated[Tensor | None, PerBatch()] = None
    global_valid_toks: Annotated[Tensor | None, PerBatch()] = None
    gradient_factor: float = 1.0

    def to(self, device: torch.device | str) -> Self:
        self.data = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in self.data.items()}
        return super().to(device)


class NemoContext(BaseLossContext[BaseLossContextInputItem]):
    """A function of log-probs, which may couple them."""

    loss_cfg: NemoLossConfig
    loss_kwargs: NemoKwargs

    @classmethod
    def calibrate(
        cls,
        kwargs_list: list[Any],
        loss_cfg: Any,
        cu_seq_lens_list: Sequence[Tensor] | None,
        ranks: TokenRanks,
    ) -> None:
        if cu_seq_lens_list is not None:
            raise UnsupportedError("cu_seq_lens_list: functions for NeMo RL take rows, one sequence each")
        toks = ranks.sum([kwargs.shifted_labels != loss_cfg.ignore_idx for kwargs in kwargs_list])
        seqs = ranks.sum([kwargs.data["sample_mask"] for kwargs in kwargs_list])
        for kwargs in kwargs_list:
            kwargs.global_valid_toks, kwargs.global_valid_seqs = toks.divisor(), seqs.divisor()
            kwargs.gradient_factor = ranks.gradient_factor(loss_cfg.grad_reduce)

    def check_ready(self) -> None:
        require(
            self.loss_kwargs, "global_valid_toks", "call build_batches on the contexts of this optimizer step first"
        )

    def why_coupled(self) -> str:
        return "what a function for NeMo RL couples, nobody knows"

    def token_loss(self, stats: TokenStats, loss_kwargs: Any) -> TokenLoss:
        logprobs = stats.logprobs.view(loss_kwargs.data["input_ids"].shape)
        return self.call(logprobs[:, :-1], loss_kwargs.data, loss_kwargs)

    def call(self, taken: Tensor, data: Mapping[str, Any], kw: Any) -> tuple[Tensor, dict[str, Metric]]:
        """The function's loss, times what the engine's reduction of gradients asks, and its metrics."""
        cfg = self.loss_cfg
        counts = {"global_valid_seqs": kw.global_valid_seqs, "global_valid_toks": kw.global_valid_toks}
        returned = cfg.nemo_loss(**{cfg.takes: taken}, data=data, **counts)
        loss, metrics = returned if isinstance(returned, tuple) and len(returned) == 2 else (None, None)
        if not isinstance(loss, Tensor) or loss.ndim or not isinstance(metrics, Mapping):
            raise OptionError("nemo_loss must return (loss, metrics) with a 0-d loss and a dict")
        return loss * kw.gradient_factor, {name: _metric(name, value, loss) for name, value in metrics.items()}


class NemoLogitContext(NemoContext):
    """A function of logits, on chunks where it is a sum over tokens."""

    def loss_fn(self, hidden_states: Tensor, head_weight: Tensor, head_bias: Tensor | None, loss_kwargs: Any) -> Any:
        if hidden_states.ndim != 3:
            raise OptionError(f"hidden_states must be [B, S, H], as data is; got {tuple(hidden_states.shape)}")
        data, length = loss_kwargs.data, loss_kwargs.data["input_ids"].shape[1]
        start, stop = int(loss_kwargs.places[0, 0]), int(loss_kwargs.places[0, -1]) + 1
        if start == length - 1:  # a chunk of last tokens, which predict nothing
            return hidden_states.sum() * 0
        logits = F.linear(hidden_states, head_weight, head_bias)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if stop < length:  # the token that the last row is about is the next chunk's first, whose logits none may read
            logits = torch.cat([logits, logits.new_full((logits.shape[0], 1, logits.shape[2]), torch.nan)], 1)
            stop += 1
        cut = {
            name: value[:, start:stop]
            if isinstance(value, Tensor) and value.ndim > 1 and value.shape[1] == length
            else value
            for name, value in data.items()
        }
        loss, metrics = self.call(logits, cut, loss_kwargs)
        return loss, (None, metrics)


def _metric(name: str, value: Any, like: Tensor) -> Metric:
    if not isinstance(value, (int, float)) and not (isinstance(value, Tensor) and value.ndim == 0):
        raise OptionError(f"metric {name!r} of nemo_loss must be a number; got {type(value).__name__}")
    number = torch.as_tensor(value, device=like.device).detach().to(like.dtype)
    for end in ("min", "max"):
        if name.endswith(f"_{end}"):
            return Metric(number, None, end)
    return Metric(number)
