"""Which second distribution a batch was given: exactly one teacher, and one that the config is about; a reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from xloss.distributed.vocab import HeadWeight, local_head
from xloss.errors import MissingFieldError, OptionError, ShapeError, UnsupportedError
from xloss.head.teacher import LogitsFn, Teacher, TeacherHead, TeacherLogits
from xloss.losses.model import require
from xloss.policy.divergence import Divergence

if TYPE_CHECKING:
    from xloss.losses.distill import DistillLossConfig
    from xloss.losses.distill_kwargs import DistillLossKwargs
    from xloss.losses.grpo import GRPOLossConfig
    from xloss.losses.grpo_kwargs import GRPOLossKwargs


@dataclass(frozen=True)
class GivenTeacher:
    """What ``forward`` was given of a teacher, beside the batch."""

    head_weight: HeadWeight | None
    head_bias: Tensor | None
    logits_fn: LogitsFn | None

    def source(self, cfg: DistillLossConfig, kw: DistillLossKwargs) -> TeacherHead | TeacherLogits | None:
        """Head or logits of the one teacher there is; ``None``: its top k.

        Raises ``MissingFieldError`` unless there is exactly one, ``OptionError`` where the config is about another.
        """
        sources = {
            "teacher_hidden_states": kw.teacher_hidden_states,
            "teacher_logits": kw.teacher_logits,
            "teacher_logits_fn": self.logits_fn,
            "teacher_topk_ids": kw.teacher_topk_ids,
        }
        given = [name for name, value in sources.items() if value is not None]
        if len(given) != 1:
            raise MissingFieldError(f"give one teacher, as one of {tuple(sources)}; got {tuple(given)}")
        name = given[0]
        if (name == "teacher_topk_ids") != (cfg.topk_mode is not None):
            raise OptionError(f"topk_mode={cfg.topk_mode!r} with {name}: it is for teacher_topk_ids, and they need it")
        head = self.head_weight is not None or self.head_bias is not None
        if head != (name == "teacher_hidden_states") or (head and self.head_weight is None):
            raise MissingFieldError(
                "teacher_hidden_states and forward's teacher_head_weight (with teacher_head_bias) come together; "
                f"got {name}"
            )
        if cfg.topk_mode is not None:
            _check_topk(cfg, kw)
            return None
        if kw.teacher_hidden_states is not None and self.head_weight is not None:
            scale, cap = cfg.teacher_logit_scale, cfg.teacher_softcap
            return _head(kw.teacher_hidden_states, self.head_weight, self.head_bias, scale, cap)
        if cfg.teacher_logit_scale != 1.0 or cfg.teacher_softcap is not None:
            raise OptionError(f"teacher_logit_scale and teacher_softcap belong to a teacher's head; {name} has them")
        if self.logits_fn is not None:
            return TeacherLogits(self.logits_fn)
        assert kw.teacher_logits is not None
        return TeacherLogits(_flat(kw.teacher_logits))


def reference(
    kw: GRPOLossKwargs,
    cfg: GRPOLossConfig,
    temperature: float | Tensor,
    head_weight: HeadWeight | None,
    head_bias: Tensor | None,
) -> Teacher | None:
    """The reference policy of ``kl_loss_type="full"``, with the policy's own scale, cap and temperature.

    Raises ``OptionError`` for a reference head that nothing reads, ``MissingFieldError`` where one is needed.
    """
    if not cfg.full_kl:
        if head_weight is not None or head_bias is not None:
            raise OptionError(
                "ref_head_weight and ref_head_bias are for use_kl_loss=True and kl_loss_type='full'; "
                f"got use_kl_loss={cfg.use_kl_loss} and kl_loss_type={cfg.kl_loss_type!r}"
            )
        return None
    if head_weight is None:
        raise MissingFieldError("kl_loss_type='full' needs the reference's head: give forward ref_head_weight")
    hidden = require(kw, "ref_hidden_states", "kl_loss_type='full' compares with the reference's distribution")
    if isinstance(temperature, Tensor):
        temperature = temperature.reshape(-1)
    source = _head(hidden, head_weight, head_bias, cfg.logit_scale, cfg.softcap)
    return Teacher(source, Divergence("reverse_kl"), temperature)


def _head(
    hidden: Tensor, weight: HeadWeight, bias: Tensor | None, logit_scale: float, softcap: float | None
) -> TeacherHead:
    head = local_head(_flat(hidden), weight, bias)
    if head.lora is not None:
        raise UnsupportedError("the second distribution's head is a LoraWeight; give its weight, adapters merged")
    return TeacherHead(head.hidden, head.weight, head.bias, logit_scale, softcap, head.part)


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _check_topk(cfg: DistillLossConfig, kw: DistillLossKwargs) -> None:
    logprobs, ids = require(kw, "teacher_topk_logprobs", "teacher_topk_ids need them"), kw.teacher_topk_ids
    if ids is None or ids.shape != logprobs.shape:
        raise ShapeError(
            "teacher_topk_ids and teacher_topk_logprobs must have one shape; "
            f"got {None if ids is None else tuple(ids.shape)} and {tuple(logprobs.shape)}"
        )
    tempered = kw.temperature is not None or cfg.temperature != 1.0
    if tempered and cfg.hard_weight and cfg.topk_mode != "renormalized":
        raise OptionError(
            f"hard_weight={cfg.hard_weight} at temperature 1 and topk_mode={cfg.topk_mode!r} at another need two "
            "normalisers of one token; use topk_mode='renormalized', or two contexts"
        )
