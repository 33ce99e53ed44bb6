"""TRL's ``SFTTrainer`` and ``GRPOTrainer`` with the loss computed by an xloss context inside the model's forward.

TRL's own loss code then runs once more on the log-probs that came out, without gradient: it logs every figure under
TRL's names and keeps TRL's state, and its value must be that of the context.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import trl
from torch import Tensor
from torch.nn.functional import pad
from trl.trainer.utils import FusedCausalLMOutput

from xloss.errors import OptionError, UnsupportedError
from xloss.hf.attach import attach
from xloss.hf.labels import label_context
from xloss.hf.transform import swapped
from xloss.losses.ce import CELossConfig
from xloss.losses.grpo import GRPOLossConfig, GRPOLossContext
from xloss.losses.grpo_kwargs import GRPOLossKwargs

_SAME = 1e-4  # relative; float32 sums of the same terms in another order are far closer


class SFTTrainer(trl.SFTTrainer):  # type: ignore[misc]
    """``trl.SFTTrainer`` on an attached model: ``loss_type`` ``nll`` and ``dft``, label smoothing included.

    Where TRL needs logits (``compute_loss_func``, ``compute_metrics``) its own code runs instead.
    """

    engine: ClassVar[dict[str, Any]] = {}
    """Fields of ``BaseLossConfig`` that say how the head runs: ``mode``, ``chunk_size``, ``logits_budget``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        attach(self.model)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if return_outputs or self.compute_loss_func is not None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        cfg = CELossConfig(
            token_scaling="dft" if self.args.loss_type == "dft" else None,
            label_smoothing=0.0 if self.args.loss_type == "dft" else self.args.label_smoothing_factor,
            return_entropy=True,
            return_token_accuracy=True,
            **self.engine,
        )
        labelled = {**inputs, "num_items_in_batch": num_items_in_batch}
        ctx = label_context(cfg, inputs.get("labels"), labelled)
        own = {name: value for name, value in inputs.items() if name not in ("labels", "shift_labels")}
        routed = {"output_router_logits": True} if self.aux_loss_enabled else {}
        output = model(**{**own, **routed, "use_cache": False}, loss_ctx=ctx)
        loss = output.ctx_loss
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        if self.aux_loss_enabled:
            steps = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
            loss = loss + self.router_aux_loss_coef * output.aux_loss / steps

        accuracy = output.metrics["token_accuracy"]
        seen = FusedCausalLMOutput(
            log_probs=output.logprobs,
            entropy=output.entropy,
            is_top1=accuracy.value,
            label_mask=ctx.loss_kwargs.shifted_labels != cfg.ignore_idx,
            aux_loss=None if output.get("aux_loss") is None else output.aux_loss.detach(),
        )
        with torch.no_grad(), swapped(self, "label_smoother", None):
            theirs = super().compute_loss(lambda **_: seen, inputs, num_items_in_batch=num_items_in_batch)
        if not cfg.label_smoothing:
            _check_same(loss, theirs, theirs.abs())
        return loss


class GRPOTrainer(trl.GRPOTrainer):  # type: ignore[misc]
    """``trl.GRPOTrainer`` on an attached model, with a ``GRPOLossContext`` in the place of TRL's loss.

    Every ``loss_type``, both levels of importance sampling, the KL term, the entropy bonus, the off-policy sequence
    mask, the entropy mask and vLLM's importance weights are TRL's, weighed as TRL weighs them.

    Raises:
        UnsupportedError: an option, or a combination of options, that no context has.
    """

    engine: ClassVar[dict[str, Any]] = {}
    """Fields of ``BaseLossConfig`` that say how the head runs: ``mode``, ``chunk_size``, ``logits_budget``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self._entropy_bonus_enabled and self.top_entropy_quantile < 1.0:
            raise UnsupportedError(
                f"entropy_coef with top_entropy_quantile={self.top_entropy_quantile}: TRL averages the bonus over the "
                "tokens that the mask keeps, whose number is not known where the batch is weighed; use one of them"
            )
        if self.top_entropy_quantile < 1.0 and self.accelerator.num_processes > 1:
            raise UnsupportedError(
                f"top_entropy_quantile={self.top_entropy_quantile} over {self.accelerator.num_processes} processes: "
                "TRL ranks the tokens of all of them, a context those of its own"
            )
        self.loss_config()  # raises
        attach(self.model)

    def loss_config(self, entropy_coef: float = 0.0) -> GRPOLossConfig:
        """The trainer's options as those of a policy step."""
        level = self.importance_sampling_level
        at_level = {"ratio_level": level, "log_ratio_clamp": None}
        clip = {"cliprange_low": self.epsilon_low, "cliprange_high": self.epsilon_high, "delta": self.args.delta}
        taus = {"tau_pos": self.args.sapo_temperature_pos, "tau_neg": self.args.sapo_temperature_neg}
        vespo = {name: getattr(self.args, f"vespo_{name}") for name in ("k_pos", "lambda_pos", "k_neg", "lambda_neg")}
        clipped = {"loss_type": "ppo", **clip, **at_level}
        policies = {
            **dict.fromkeys(("grpo", "bnpo", "dr_grpo", "dapo", "luspo"), clipped),
            "cispo": {"loss_type": "cispo", "clip_low_threshold": 0.0, "clip_high_threshold": self.epsilon_high}
            | at_level,
            "sapo": {"loss_type": "sapo", **taus, **at_level},
            "vespo": {"loss_type": "vespo", **vespo},
        }
        if self.loss_type not in policies:
            raise UnsupportedError(f"loss_type must be one of {', '.join(policies)}; got {self.loss_type!r}")
        kl: dict[str, Any] = {}
        if self.beta:
            kl = {"use_kl_loss": True, "kl_loss_coef": self.beta, "kl_loss_type": "k3"}
            kl |= {"kl_clamp_in": None, "kl_clamp_out": None}
            if self.args.use_bias_correction_kl:
                kl |= {"kl_loss_grad": "unbiased", "kl_ratio_level": level}
        return GRPOLossConfig.model_validate(
            {
                "policy_loss_cfg": policies[self.loss_type],
                "temperature": self.temperature,
                "entropy_coef": entropy_coef,
                "opsm_delta": self.off_policy_mask_threshold,
                "top_entropy_quantile": self.top_entropy_quantile if self.top_entropy_quantile < 1.0 else None,
                "return_entropy": True,
                **kl,
                **self.engine,
            }
        )

    def loss_context(self, inputs: dict[str, Any]) -> GRPOLossContext:
        """The context of a micro-batch as TRL hands it to its loss: tokens of the completions, TRL's denominators."""
        cfg = self.loss_config(self._entropy_coef())
        width, mask = inputs["prompt_ids"].shape[1], _loss_mask(inputs)

        def placed(given: Tensor, fill: float = 0.0) -> Tensor:
            """``[B, C]`` (or ``[B]``, ``[B, 1]``) of the completions at the positions that predict them, ``[B, S]``."""
            given = given if given.dim() == 2 else given.unsqueeze(1)
            return pad(given.expand(mask.shape).where(mask, fill), (width - 1, 1), value=fill)

        weight, advantages = self._token_weights(inputs, mask), placed(inputs["advantages"])
        fields: dict[str, Tensor] = {}
        if inputs.get("old_per_token_logps") is not None:
            fields["old_logprobs"] = placed(inputs["old_per_token_logps"])
        if cfg.opsm_delta is not None and inputs.get("sampling_per_token_logps") is not None:
            fields["rollout_logprobs"] = placed(inputs["sampling_per_token_logps"])
        if self.use_vllm and self.vllm_importance_sampling_correction:
            ratio = placed(inputs["importance_sampling_ratio"], 1.0)
            if cfg.policy_loss_cfg.folds_is_weights:
                fields["is_weights"] = ratio
            else:
                advantages = advantages * ratio  # a factor >= 0 on them is one on the loss
        if self.beta:
            fields["ref_logprobs"] = placed(inputs["ref_per_token_logps"])
            fields["kl_loss_weight"] = placed(weight * self.beta)
        if cfg.entropy_coef:
            bonus = cfg.entropy_coef * mask / (mask.sum().clamp(min=1) * self._accumulation())
            fields["entropy_loss_weight"] = placed(bonus)
        kwargs = GRPOLossKwargs(
            shifted_labels=placed(inputs["completion_ids"], cfg.ignore_idx),
            advantages=advantages,
            policy_loss_weight=placed(weight),
            gradient_factor=torch.ones((), device=mask.device),  # TRL's denominators are those of an average over ranks
            **fields,
        )
        return GRPOLossContext(cfg, kwargs)

    def _accumulation(self) -> int:
        """Micro-batches of an optimizer step."""
        return int(self.current_gradient_accumulation_steps) if self.model.training else 1

    def _entropy_coef(self) -> float:
        """The coefficient that TRL applies in this step."""
        if not self._entropy_bonus_enabled:
            return 0.0
        if self.use_adaptive_entropy and self._last_world_entropy > self.args.entropy_target:
            return 0.0
        return float(self.entropy_coef)

    def _token_weights(self, inputs: dict[str, Any], mask: Tensor) -> Tensor:
        """What TRL divides by, as a weight of each token ``[B, C]``."""
        rows, accumulation = mask.shape[0], self._accumulation()
        if self.loss_type in ("grpo", "sapo"):
            return mask / mask.sum(-1, keepdim=True).clamp(min=1) / (rows * accumulation)
        if self.loss_type == "bnpo":
            return mask / (mask.sum().clamp(min=1) * accumulation)
        if self.loss_type == "dr_grpo":
            return mask / (rows * self.max_completion_length * accumulation)
        if self.loss_type == "luspo":
            return mask / (rows * accumulation)
        total = inputs["num_items_in_batch"].clamp(min=1) / self.accelerator.num_processes
        return mask / (total * accumulation / self.args.steps_per_generation if self.model.training else total)

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        images = [name for name in ("pixel_values", "image_grid_thw") if inputs.get(name) is not None]
        if images:
            raise UnsupportedError(f"the batch has {', '.join(images)}; xloss.hf.trl.GRPOTrainer is for text")
        mask, width = _loss_mask(inputs), inputs["completion_ids"].shape[1]
        ctx = self.loss_context(inputs)
        token_types = {n: inputs[n] for n in ("token_type_ids", "mm_token_type_ids") if inputs.get(n) is not None}
        output = model(
            input_ids=torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
            attention_mask=torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
            use_cache=False,
            loss_ctx=ctx,
            **token_types,
            **({"output_router_logits": True} if self.aux_loss_enabled else {}),
        )
        loss, aux_loss = output.ctx_loss, None
        if self.aux_loss_enabled:
            aux_loss = output.aux_loss
            loss = loss + self.router_aux_loss_coef * aux_loss / self._accumulation()
            aux_loss = aux_loss.detach()

        old = inputs.get("old_per_token_logps")
        logprobs, entropy = (x.detach()[:, -width - 1 : -1] for x in (output.logprobs, output.entropy))
        seen = (
            logprobs.where(mask, 0.0 if old is None else old),
            entropy,
            aux_loss if aux_loss is None else aux_loss.detach(),
        )
        with torch.no_grad(), swapped(self, "_get_per_token_logps_and_entropies", lambda *_, **__: seen):
            theirs = super()._compute_loss(model, inputs)
        _check_same(loss, theirs, inputs["advantages"].abs().max() + theirs.abs())
        return loss


def _loss_mask(inputs: dict[str, Any]) -> Tensor:
    """Tokens of the completions that TRL's loss counts, ``[B, C]`` bool."""
    mask = inputs["completion_mask"]
    tools = inputs.get("tool_mask")
    return (mask if tools is None else mask * tools).bool()


def _check_same(ours: Tensor, theirs: Tensor, scale: Tensor) -> None:
    """Raise unless TRL's own code finds the same loss from the same log-probs."""
    off = (ours.detach() - theirs).abs()
    if bool(off > _SAME * scale.clamp(min=_SAME)) or bool(ours.isnan() != theirs.isnan()):
        raise OptionError(
            f"the loss is {float(ours.detach()):.6g}, and the code of TRL {trl.__version__} finds {float(theirs):.6g} "
            "from the same log-probs: this trainer has an option that xloss.hf.trl does not know"
        )
