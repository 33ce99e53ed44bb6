"""``TrainingClient``: Tinker's training API on a local model."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from xloss import distributed
from xloss.errors import GraphError, NonFiniteError, OptionError, UnsupportedError
from xloss.head.dispatch import Mode
from xloss.tinker import checkpoints
from xloss.tinker.async_calls import AsyncCalls
from xloss.tinker.futures import Future, Ready
from xloss.tinker.model import LanguageModel, as_language_model
from xloss.tinker.packs import packs_of
from xloss.tinker.passes import CustomLoss, Engine, run_custom, run_loss
from xloss.tinker.sampling import SamplingClient
from xloss.tinker.types import Answers, Returns, adam_of


class TrainingClient(AsyncCalls, Ready):
    """Trains a local model through Tinker's calls. Every call runs at once and returns a finished ``Future``.

    Gradients of ``forward_backward`` calls add up until ``optim_step``. The model's ``train()`` or ``eval()`` mode is
    left as it is.

    Args:
        model: a ``LanguageModel``; of Hugging Face, by ``from_transformers``.
        max_pack_tokens: cut data into packs of at most so many tokens, one after another through the model; ``None``:
            one pack. Losses that compare sequences, and custom ones while their function runs, hold all of it.
        checkpoint_dir: where checkpoints go; ``None``: saving raises.
        returns: results as ``tinker``'s types, as ``torch`` tensors in ours, or ``auto``: the first where installed.
        mode: how the head runs, as in ``linear_logprobs``. chunk_size: as there. logits_budget: as there.
        all_logprobs: give log-probs of tokens of weight 0 too, as Tinker does; ``False`` gives 0 and saves the head's
            forward pass on them.
        lora_rank: of the model's adapters, for ``get_info`` and checkpoints. user_metadata: for checkpoints.

    Raises:
        OptionError: a value is wrong. UnsupportedError: several processes; a gradient would miss those of the others.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        max_pack_tokens: int | None = None,
        checkpoint_dir: str | Path | None = None,
        returns: Returns = "auto",
        mode: Mode = "auto",
        chunk_size: int | None = None,
        logits_budget: int | None = None,
        all_logprobs: bool = True,
        lora_rank: int | None = None,
        user_metadata: dict[str, str] | None = None,
    ) -> None:
        if distributed.world_size() > 1:
            raise UnsupportedError("TrainingClient works in one process; use a loss context in the model's forward")
        if max_pack_tokens is not None and max_pack_tokens < 1:
            raise OptionError(f"max_pack_tokens must be at least 1; got {max_pack_tokens}")
        self.model = as_language_model(model)
        self.model_id, self.lora_rank = f"local:{self.model.name}", lora_rank
        self.checkpoint_dir = None if checkpoint_dir is None else Path(checkpoint_dir)
        self._user_metadata = dict(user_metadata or {})
        self._max_pack_tokens = max_pack_tokens
        self._engine = Engine(mode, chunk_size, logits_budget, all_logprobs)
        self._answers = Answers(returns)
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        if not parameters:
            raise OptionError("model has no parameter that requires a gradient")
        self._optimizer = torch.optim.AdamW(parameters)
        self._failed = False

    # -- gradients -------------------------------------------------------------------------------------------------

    def forward(
        self, data: Sequence[Any], loss_fn: str, loss_fn_config: Mapping[str, Any] | None = None
    ) -> Future[Any]:
        """Loss and log-probs without gradients. Arguments, result and errors as ``forward_backward``."""
        return self._run(data, loss_fn, loss_fn_config, backward=False)

    def forward_backward(
        self, data: Sequence[Any], loss_fn: str, loss_fn_config: Mapping[str, Any] | None = None
    ) -> Future[Any]:
        """Loss of ``data``, summed over tokens and sequences; its gradient is added to that of earlier calls.

        Args:
            data: ``Datum`` of any lengths, ``tinker``'s or ours. Inputs by loss: ``docs/tinker.md``.
            loss_fn: ``cross_entropy``, ``importance_sampling``, ``ppo``, ``cispo``, ``dro``, or any of
                ``loss_names()``.
            loss_fn_config: numbers of the loss, such as ``clip_low_threshold``; ``None``: its defaults.

        Returns:
            ``Future`` of ``ForwardBackwardOutput``: ``logprobs`` of each datum, and the metric ``loss:sum``.

        Raises:
            OptionError, MissingFieldError, ShapeError, DtypeError, LabelError, UnsupportedError: before any work on
            the head. pydantic.ValidationError: a number is out of its range.
        """
        return self._run(data, loss_fn, loss_fn_config, backward=True)

    def forward_backward_custom(self, data: Sequence[Any], loss_fn: CustomLoss) -> Future[Any]:
        """A loss of your own, ``loss_fn(data, logprobs) -> (loss, metrics)``; its gradient is added as above.

        The model runs forward once and backward once. Of the head, only its logits are formed again for the backward
        pass, and not even those that fit ``logits_budget``, here by default 1 GiB on a CPU and 2 GiB on CUDA.

        Args:
            data: as above; ``loss_fn_inputs`` other than ``target_tokens`` are for the function alone.
            loss_fn: gets ``data`` and the log-probs of each datum's targets, CPU leaves ``[N]`` or ``[N, K]``, and
                returns a scalar, which may mix all of them, and a dict of numbers. Targets of -100 are left out.

        Returns:
            As above, with its metrics; ``loss:sum`` is its value, ``surrogate_loss:sum`` the sum of log-prob times
            gradient.

        Raises:
            GraphError: the loss does not depend on the log-probs. NonFiniteError: its gradient is NaN or inf.
            OptionError: something else was returned.
        """
        if not callable(loss_fn):
            raise OptionError(f"loss_fn must be a function of (data, logprobs); got {type(loss_fn).__name__}")
        packs = packs_of(data, self._max_pack_tokens, self.model.device)
        with torch.enable_grad(), self._whole_or_failed():
            return Future(self._answers.output(*run_custom(self.model, self._engine, packs, data, loss_fn)))

    def _run(
        self, data: Sequence[Any], loss_fn: str, loss_fn_config: Mapping[str, Any] | None, backward: bool
    ) -> Future[Any]:
        packs = packs_of(data, self._max_pack_tokens, self.model.device)
        with self._whole_or_failed():
            found = run_loss(self.model, self._engine, packs, loss_fn, loss_fn_config, backward)
        return Future(self._answers.output(*found))

    @contextmanager
    def _whole_or_failed(self) -> Iterator[None]:
        """Gradients of a part of the data must not become a step."""
        before = [p.grad for p in self._weights_of_steps()]
        versions = [None if g is None else g._version for g in before]
        try:
            yield
        except BaseException:
            now = [p.grad for p in self._weights_of_steps()]
            same = (a is b and (a is None or a._version == v) for a, b, v in zip(before, now, versions, strict=True))
            self._failed = self._failed or not all(same)
            raise

    def _weights_of_steps(self) -> list[nn.Parameter]:
        return [p for group in self._optimizer.param_groups for p in group["params"]]

    def zero_grad(self) -> None:
        """Forget the gradients so far."""
        self._optimizer.zero_grad(set_to_none=True)
        self._failed = False

    def optim_step(self, optim_params: Any = None, *, adam_params: Any = None) -> Future[Any]:
        """One step of ``torch.optim.AdamW`` on the gradients so far, which are then forgotten.

        Args:
            optim_params: ``AdamParams`` of ``tinker`` or ours. adam_params: its older name.

        Returns:
            ``Future`` of ``OptimStepResponse``, with ``grad_norm`` before clipping.

        Raises:
            OptionError: not the numbers of AdamW. GraphError: there is no gradient. NonFiniteError: its norm is NaN or
                inf, which would be in every weight after the step; the weights stay, and so does the gradient.
        """
        if (optim_params is None) == (adam_params is None):
            raise OptionError("give AdamParams, as optim_params or as adam_params")
        params = adam_of(adam_params if optim_params is None else optim_params)
        weights = self._weights_of_steps()
        if self._failed:
            raise GraphError("a forward_backward failed after a part of its data: zero_grad() and run the step anew")
        if all(p.grad is None for p in weights):
            raise GraphError("optim_step without a gradient: call forward_backward first")
        limit = params.grad_clip_norm if params.grad_clip_norm > 0 else float("inf")
        norm = nn.utils.get_total_norm([p.grad for p in weights if p.grad is not None])
        if not norm.isfinite():
            raise NonFiniteError(f"the gradient's norm is {float(norm)}: no step is taken; zero_grad() forgets it")
        nn.utils.clip_grads_with_norm_(weights, limit, norm)
        self._optimizer.param_groups[0].update(
            lr=params.learning_rate,
            betas=(params.beta1, params.beta2),
            eps=params.eps,
            weight_decay=params.weight_decay,
        )
        self._optimizer.step()
        self.zero_grad()
        return Future(self._answers.stepped({"grad_norm": float(norm)}))

    # -- weights ---------------------------------------------------------------------------------------------------

    def save_state(
        self,
        name: str,
        ttl_seconds: int | None = None,
        overwrite: bool = False,
        user_metadata: dict[str, str] | None = None,
    ) -> Future[Any]:
        """Weights and optimizer to a file ``<name>-state.pt``; the result's ``path`` says where.

        ``ttl_seconds`` means nothing to a file: it stays until someone deletes it. ``user_metadata`` is saved too.

        Raises:
            OptionError: there is no ``checkpoint_dir``, or the file exists and ``overwrite`` is False.
        """
        state = {**self._weights(), "optimizer": self._optimizer.state_dict()}
        path = checkpoints.save(self.checkpoint_dir, f"{name}-state", state, overwrite, self._metadata(user_metadata))
        return Future(self._answers.saved(path, for_sampler=False))

    def load_state(self, path: str) -> Future[Any]:
        """Weights from a file of ``save_state`` or ``save_weights_for_sampler``; a fresh optimizer."""
        self._load(path)
        return Future(self._answers.loaded(path, self.model_id))

    def load_state_with_optimizer(self, path: str) -> Future[Any]:
        """Weights and optimizer from a file of ``save_state``."""
        found = self._load(path)
        if "optimizer" not in found:
            raise OptionError(f"{path} holds no optimizer; it was saved for a sampler. Use load_state")
        self._optimizer.load_state_dict(found["optimizer"])
        return Future(self._answers.loaded(path, self.model_id))

    def _weights(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "base_model": self.model.name, "lora_rank": self.lora_rank}

    def _metadata(self, given: dict[str, str] | None) -> dict[str, str]:
        return self._user_metadata | (given or {})

    def _load(self, path: str) -> dict[str, Any]:
        found = checkpoints.load(path, self.model.device)
        self.model.load_state_dict(found["model"])
        self._optimizer.state.clear()
        self.zero_grad()
        return found

    def save_weights_for_sampler(
        self, name: str, ttl_seconds: int | None = None, user_metadata: dict[str, str] | None = None
    ) -> Future[Any]:
        """Weights to a file ``<name>-sampler.pt``, replacing one of that name. ``ttl_seconds`` as in ``save_state``."""
        path = checkpoints.save(
            self.checkpoint_dir, f"{name}-sampler", self._weights(), True, self._metadata(user_metadata)
        )
        return Future(self._answers.saved(path, for_sampler=True))

    # -- sampling --------------------------------------------------------------------------------------------------

    def save_weights_and_get_sampling_client(
        self, name: str | None = None, *, kind: Literal["snapshot", "inflight"] = "snapshot"
    ) -> SamplingClient:
        """A sampler of the weights as they are now (a copy of the model), or, ``inflight``, as they go on to be."""
        if name is not None:
            warnings.warn("name has no effect: a sampler's weights are not saved", DeprecationWarning, stacklevel=2)
        if kind not in ("snapshot", "inflight"):
            raise OptionError(f"kind must be snapshot or inflight; got {kind!r}")
        return SamplingClient(self._copied() if kind == "snapshot" else self.model, self._answers)

    def create_sampling_client(self, model_path: str) -> SamplingClient:
        """A sampler of saved weights."""
        model = self._copied()
        model.load_state_dict(checkpoints.load(model_path, model.device)["model"])
        return SamplingClient(model, self._answers)

    def _copied(self) -> LanguageModel:
        memo = {id(self.model.tokenizer): self.model.tokenizer}
        return copy.deepcopy(self.model, memo).eval().requires_grad_(False)

    # -- about -----------------------------------------------------------------------------------------------------

    def get_info(self) -> Any:
        """``model_id`` and the model's name."""
        return self._answers.info(self.model_id, self.model.name, self.lora_rank)

    def get_tokenizer(self) -> Any:
        """The model's tokenizer. Raises ``OptionError`` where it has none."""
        return self.model.get_tokenizer()
