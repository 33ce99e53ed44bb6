"""``BaseLossConfig``: what every loss lets its user choose."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_type_hints

import torch
from pydantic import ConfigDict, Field
from torch.distributed.device_mesh import DeviceMesh

from xloss.distributed import Order
from xloss.head.choice import KernelChoice
from xloss.head.dispatch import Mode, RunOptions
from xloss.head.options import HeadOptions
from xloss.losses.facts import LossForm
from xloss.losses.model import BaseLossKwargs, StrictModel
from xloss.stats import StatSpec

if TYPE_CHECKING:
    from xloss.losses.base import BaseLossContext


class BaseLossConfig(StrictModel):
    """What you chose: frozen and serialisable. Subclass it with the fields of your loss and its ``loss_ctx_cls``.

    Args:
        ignore_idx: label of tokens to leave out.
        mode: ``eager`` (holds and returns logits, by autograd), ``chunk`` (any device), ``fused`` (Triton), ``auto``.
        chunk_size: tokens per chunk; ``None`` sizes chunks in bytes.
        plan: ``auto``, or ``two_pass`` to have differentiable ``info.logprobs``, or ``one_pass``.
        logits_budget: bytes of logits held at once; default 64 MiB on CPU, 2 GiB on CUDA; 0 writes none (``fused``).
        kernels: ``chunked_logits`` or ``no_logits`` to insist; ``auto`` chooses by shape, dtype and budget.
        accumulate_into_main_grad: add the weight's gradient to ``head_weight.main_grad``, as Megatron-LM does.
        temperature: divides the logits; per-token values go into the batch instead.
        softcap: ``c`` in ``c tanh(x / c)``, or ``None``.
        logit_scale: factor on the logits, before the cap.
        return_entropy: put each token's entropy into ``info``.
        skip_zero_grad_rows: leave tokens whose gradient is known to be 0 out of the statistics and metrics too.
        allow_retain_graph: allow several backwards through a one-pass loss, at the price of a copy of the gradients.
        check_labels: check that labels are in the vocabulary; on CUDA the device does, and a later call fails.
        grad_reduce: what the training engine does to gradients of several ranks: ``mean`` (DDP, FSDP) or ``sum``.
    """

    model_config = ConfigDict(frozen=True)

    forms: ClassVar[tuple[LossForm, ...]] = ()
    """The losses that this class computes, for the catalog."""

    ignore_idx: int = -100
    mode: Mode = "auto"
    chunk_size: int | None = Field(default=None, gt=0)
    plan: Literal["auto", "one_pass", "two_pass"] = "auto"
    logits_budget: int | None = Field(default=None, ge=0)
    kernels: KernelChoice = "auto"
    accumulate_into_main_grad: bool = False
    temperature: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    softcap: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    logit_scale: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    return_entropy: bool = False
    skip_zero_grad_rows: bool = False
    allow_retain_graph: bool = False
    check_labels: bool = True
    grad_reduce: Literal["mean", "sum"] = "mean"

    def form(self) -> str:
        """Name of the one of ``forms`` that this config computes."""
        return self.forms[0].name if self.forms else type(self).__name__

    @property
    def loss_ctx_cls(self) -> type[BaseLossContext[Any]]:
        """The context that computes this loss."""
        raise NotImplementedError(f"{type(self).__name__} must define the property loss_ctx_cls")

    @property
    def loss_kwargs_cls(self) -> type[BaseLossKwargs]:
        """The kwargs of this loss: the annotation of ``loss_kwargs`` in its context."""
        found: type[BaseLossKwargs] = get_type_hints(self.loss_ctx_cls)["loss_kwargs"]
        return found

    def build(
        self,
        data: dict[str, Any],
        sp_mesh: DeviceMesh | None = None,
        device: torch.device | str | None = None,
        sp_order: Order = "contiguous",
    ) -> BaseLossContext[Any] | None:
        """A context for one micro-batch straight from a dict, to be calibrated by ``build_batches``.

        Keys are the kwargs' field names; others are not ours and passed over. ``None`` when a required one is missing.
        With ``sp_mesh`` the full sequences given are split in ``sp_order``, each rank keeping its part.
        """
        kwargs_cls = self.loss_kwargs_cls
        fields = kwargs_cls.model_fields
        given = {name: data[name] for name in fields if data.get(name) is not None}
        if any(info.is_required() and name not in given for name, info in fields.items()):
            return None
        loss_kwargs = kwargs_cls(**given)
        loss_kwargs.check()
        if device is not None:
            loss_kwargs.to(device)
        if sp_mesh is not None:
            loss_kwargs.sp_split(sp_mesh, sp_order)
        return self.loss_ctx_cls(self, loss_kwargs)

    def head_options(self, stats: StatSpec) -> HeadOptions:
        """How hidden states become logits under this config."""
        return HeadOptions(self.logit_scale, self.softcap, self.ignore_idx, stats)

    def run_options(self) -> RunOptions:
        """How the head runs under this config."""
        return RunOptions(**{field.name: getattr(self, field.name) for field in fields(RunOptions)})
