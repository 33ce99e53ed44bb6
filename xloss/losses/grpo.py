"""GRPO and its kin: a policy loss on advantages, with optional KL to a reference and entropy bonus."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from xloss.distributed import Order, TokenRanks
from xloss.distributed.vocab import HeadWeight
from xloss.errors import OptionError, UnsupportedError
from xloss.head.backend import LossTwin
from xloss.head.outside_compile import outside_compile
from xloss.head.plan import Plan
from xloss.head.teacher import Teacher
from xloss.losses import calibration, correction, policy_tokens, run
from xloss.losses.base import BaseLossContext, TokenLoss
from xloss.losses.grpo_kwargs import GRPOLossKwargs, RLLossContextInputItem
from xloss.losses.info import LossInfo
from xloss.losses.kl import kl_of
from xloss.losses.model import require
from xloss.losses.policies import PolicyLossConfig
from xloss.losses.policies.base import Coupling
from xloss.losses.policies.metrics import policy_metrics
from xloss.losses.policy_config import PolicyStepConfig
from xloss.losses.teacher import reference
from xloss.losses.value import weighted_value_loss
from xloss.metrics import Metric
from xloss.packing import Segments, rows_as_segments
from xloss.policy.batch import PolicyBatch
from xloss.stats import StatSpec, TokenStats

_CALL_BUILD = "call build_batches on the contexts of this optimizer step first"


class GRPOLossConfig(PolicyStepConfig):
    """A policy loss and its terms: GRPO, PPO, CISPO and their kin, by ``policy_loss_cfg``."""

    @property
    def loss_ctx_cls(self) -> type[GRPOLossContext]:
        return GRPOLossContext

    def build(
        self,
        data: dict[str, Any],
        sp_mesh: DeviceMesh | None = None,
        device: torch.device | str | None = None,
        sp_order: Order = "contiguous",
    ) -> BaseLossContext[Any] | None:
        if "rollout_is_weights" in data:  # XTuner's name for it in data dicts
            data = {**data, "is_weights": data["rollout_is_weights"]}
        return super().build(data, sp_mesh, device, sp_order)


class GRPOLossContext(BaseLossContext[RLLossContextInputItem]):
    """Policy loss of one micro-batch."""

    loss_cfg: GRPOLossConfig
    loss_kwargs: GRPOLossKwargs

    def is_token_local(self) -> bool:
        return not self._coupled_by()

    def why_coupled(self) -> str:
        return "; ".join(self._coupled_by().values())

    @property
    def _corrects_in_pass(self) -> bool:
        """Whether the weights of the rollout correction wait for the current log-probs, which stand for the old."""
        return self.loss_cfg.rollout_correction is not None and self.loss_kwargs.old_logprobs is None

    def _coupled_by(self) -> dict[Coupling, str]:
        return self.loss_cfg.coupled_by(self._corrects_in_pass)

    @classmethod
    def calibrate(
        cls,
        kwargs_list: list[GRPOLossKwargs],
        loss_cfg: GRPOLossConfig,
        cu_seq_lens_list: Sequence[Tensor] | None,
        ranks: TokenRanks,
    ) -> None:
        if loss_cfg.use_kl_loss and not loss_cfg.full_kl:
            for kwargs in kwargs_list:
                require(kwargs, "ref_logprobs", _NEED_REF)
        calibration.attach_cu_seq_lens(kwargs_list, cu_seq_lens_list)
        homes = None
        if "group" in loss_cfg.coupled_by(policy_tokens.corrects_in_pass(kwargs_list, loss_cfg)):
            asked = "a loss that compares the answers of a prompt"
            _, homes = calibration.group_counts(kwargs_list, loss_cfg.ignore_idx, ranks, asked)
        policy_tokens.weigh_tokens(kwargs_list, loss_cfg, ranks)
        if homes is not None:
            calibration.check_whole_groups(homes)

    def check_ready(self) -> None:
        for built in ("policy_loss_weight", "gradient_factor"):
            require(self.loss_kwargs, built, _CALL_BUILD)
        if self.loss_cfg.use_kl_loss:
            if not self.loss_cfg.full_kl:
                require(self.loss_kwargs, "ref_logprobs", _NEED_REF)
            require(self.loss_kwargs, "kl_loss_weight", _CALL_BUILD)
            if self.loss_cfg.kl_ratio_anchor == "rollout":
                require(self.loss_kwargs, "rollout_logprobs", "kl_ratio_anchor='rollout' takes the ratio to them")
        if self.loss_cfg.entropy_coef:
            require(self.loss_kwargs, "entropy_loss_weight", _CALL_BUILD)
        if self.loss_cfg.nll_coef:
            require(self.loss_kwargs, "nll_loss_weight", _CALL_BUILD)
        if self.loss_cfg.rollout_correction is not None:
            if not self._corrects_in_pass:
                require(self.loss_kwargs, "rollout_weights", _CALL_BUILD)
            elif self.loss_kwargs.rollout_weights is not None:
                raise OptionError(f"old_logprobs is None, but the batch was corrected by them; {_CALL_BUILD}")
        policy: PolicyLossConfig = self.loss_cfg.policy_loss_cfg
        if policy.ratio_anchor() == "rollout":
            require(self.loss_kwargs, "rollout_logprobs", "anchor='rollout' takes the ratio to the sampler's log-probs")
        for name in policy.needed():
            field = "group_ids" if name == "groups" else name
            require(self.loss_kwargs, field, f"{type(policy).__name__} cannot do without it")
        coupled = self._coupled_by()
        if coupled and self.loss_kwargs.cut:
            raise UnsupportedError(f"{self.why_coupled()}: kwargs that chunk() cut hold parts of them; cat() first")
        labels = self.loss_kwargs.shifted_labels
        if coupled.keys() & {"sequence", "group"} and (labels.ndim == 1 or labels.shape[0] == 1):
            why = f"{self.why_coupled()}: cu_seq_lens_list tells which, [0, {labels.numel()}] if it is one"
            require(self.loss_kwargs, "cu_seq_lens", why)

    def value_losses(self, values: Tensor | None) -> tuple[Tensor, dict[str, Metric]] | None:
        cfg, kwargs = self.loss_cfg, self.loss_kwargs
        if cfg.value_loss is None:
            if values is not None:
                raise OptionError("values is given, but the config has no value_loss; set it or leave values out")
            return None
        weight = require(kwargs, "value_loss_weight", _CALL_BUILD)
        require(kwargs, "returns", "value_loss regresses the critic's values on it")
        if cfg.value_loss.value_clip is not None:
            require(kwargs, "old_values", f"value_clip={cfg.value_loss.value_clip} needs it")
        return weighted_value_loss(cfg.value_loss, values, kwargs.narrowed(cfg.ignore_idx), weight, cfg.ignore_idx)

    @outside_compile
    def forward(
        self,
        hidden_states: Tensor,
        head_weight: HeadWeight,
        head_bias: Tensor | None = None,
        *,
        values: Tensor | None = None,
        ref_head_weight: HeadWeight | None = None,
        ref_head_bias: Tensor | None = None,
    ) -> tuple[Tensor, LossInfo]:
        """As ``BaseLossContext.forward``, and what some configs need beside.

        Args:
            hidden_states: as there. head_weight: as there. head_bias: as there.
            values: of a critic, in the shape of ``shifted_labels``, with gradient; for ``value_loss``.
            ref_head_weight: of the reference, constant; for ``kl_loss_type="full"``. ref_head_bias: its bias.

        Raises:
            OptionError: one of them is given and the config has no use for it.
        """
        ref = self._reference(ref_head_weight, ref_head_bias)
        return run.forward(self, hidden_states, head_weight, head_bias, ref, values)

    __call__ = forward

    def explain(
        self,
        hidden_states: Tensor | None = None,
        head_weight: HeadWeight | None = None,
        head_bias: Tensor | None = None,
        *,
        ref_head_weight: HeadWeight | None = None,
        ref_head_bias: Tensor | None = None,
    ) -> Plan:
        """As ``BaseLossContext.explain``, with the reference's head where ``forward`` takes one."""
        ref = None if hidden_states is None else self._reference(ref_head_weight, ref_head_bias)
        return run.explain(self, hidden_states, head_weight, head_bias, ref)

    def _reference(self, head_weight: HeadWeight | None, head_bias: Tensor | None) -> Teacher | None:
        kw = self.loss_kwargs
        return reference(kw, self.loss_cfg, self.head_temperature(kw), head_weight, head_bias)

    def stats_needed(self) -> StatSpec:
        cfg = self.loss_cfg
        ranked = cfg.top_entropy_quantile is not None
        entropy = cfg.entropy_coef != 0 or ranked or cfg.policy_loss_cfg.needs_entropy
        return StatSpec(entropy=entropy, divergence=cfg.full_kl, top1=cfg.return_token_accuracy)

    def live_mask(self) -> Tensor:
        if self.is_token_local():
            return super().live_mask()
        # a token of weight 0 still counts in the sums over its sequence
        live = self.loss_kwargs.shifted_labels.reshape(-1) != self.loss_cfg.ignore_idx
        mask = self.loss_kwargs.loss_mask
        return live if mask is None else live & mask.reshape(-1)

    def known_zero_grad(self) -> Tensor | None:
        cfg, kwargs = self.loss_cfg, self.loss_kwargs
        if kwargs.policy_loss_weight is None or not self.is_token_local():
            return None
        zero = kwargs.policy_loss_weight == 0
        if cfg.policy_loss_cfg.no_gradient_without_advantage():
            zero = zero | (kwargs.advantages == 0)
        for other in (kwargs.kl_loss_weight, kwargs.entropy_loss_weight, kwargs.nll_loss_weight):
            if other is not None:
                zero = zero & (other == 0)
        return zero

    def twin(self, loss_kwargs: Any) -> LossTwin | None:
        waits = self._corrects_in_pass or loss_kwargs.nll_loss_weight is not None
        return (
            None if waits or not self.is_token_local() else self.loss_cfg.twin(loss_kwargs, self._anchor(loss_kwargs))
        )

    def _old(self, kw: Any) -> Tensor | None:
        """The old policy's log-probs; ``None``: the current ones. A correction keeps the sampler's for itself."""
        correction = self.loss_cfg.rollout_correction
        bypass = correction is None or correction.bypass
        old: Tensor | None = kw.rollout_logprobs if kw.old_logprobs is None and bypass else kw.old_logprobs
        return old

    def _anchor(self, kw: Any) -> Tensor | None:
        """Log-probs that the ratio is taken against; ``None`` is on-policy."""
        from_rollout = self.loss_cfg.policy_loss_cfg.ratio_anchor() == "rollout"
        found: Tensor | None = kw.rollout_logprobs if from_rollout else self._old(kw)
        return found

    def policy_batch(self, stats: TokenStats, kw: Any) -> PolicyBatch:
        """What the policy loss sees of these statistics and kwargs."""
        old = self._anchor(kw)
        sequences = None
        if not self.is_token_local():
            valid = kw.shifted_labels != self.loss_cfg.ignore_idx
            whole = rows_as_segments(valid.shape, valid.device) if kw.cu_seq_lens is None else kw.cu_seq_lens
            sequences = Segments.of(whole, valid)
        return PolicyBatch(
            logprobs=stats.logprobs,
            old_logprobs=stats.logprobs.detach() if old is None else old,
            advantages=kw.advantages,
            rollout_logprobs=kw.rollout_logprobs,
            ref_logprobs=kw.ref_logprobs,
            is_weights=kw.is_weights if self.loss_cfg.policy_loss_cfg.folds_is_weights else None,
            entropy=stats.entropy,
            sequences=sequences,
            groups=kw.group_ids,
        )

    def token_loss(self, stats: TokenStats, loss_kwargs: Any) -> TokenLoss:
        cfg, kw = self.loss_cfg, loss_kwargs
        batch = self.policy_batch(stats, kw)
        valid = None if batch.sequences is None else batch.sequences.valid
        policy: PolicyLossConfig = cfg.policy_loss_cfg
        leveled = batch.at(policy.level())
        loss = policy.per_token(leveled if valid is not None else leveled.at_ratio_one(kw.policy_loss_weight == 0))
        masks = cfg.policy_masks(batch)
        for mask in (*masks.values(), valid):
            if mask is not None:
                loss = loss.masked_fill(~mask, 0)
        loss = loss * kw.policy_loss_weight
        metrics = policy_metrics(batch, leveled, policy.ratio_bounds()) | policy.metrics(leveled)
        metrics |= {f"{name}_masked_frac": Metric.mean((~mask).to(loss.dtype), valid) for name, mask in masks.items()}
        if cfg.rollout_correction is not None and self._corrects_in_pass:
            weights, figures = correction.correct_in_pass(cfg.rollout_correction, batch)
            loss = loss * weights
            metrics |= figures
        terms = {"pg_loss": loss}
        if kw.nll_loss_weight is not None:
            terms["nll_loss"] = -batch.logprobs * kw.nll_loss_weight
        if cfg.use_kl_loss:
            sampled = kw.rollout_logprobs if cfg.kl_ratio_anchor == "rollout" else self._old(kw)
            kl = kl_of(cfg, batch, sampled, stats.divergence)
            terms["kl_loss"] = kl * kw.kl_loss_weight
            metrics["ref_kl"] = Metric.mean(kl, valid)
        if stats.entropy is not None:
            metrics["entropy"] = Metric.mean(stats.entropy, valid)
            if cfg.entropy_coef:
                entropy = stats.entropy
                if "low_entropy" in masks:  # TRL leaves these tokens out of the bonus too
                    entropy = entropy.masked_fill(~masks["low_entropy"], 0)
                terms["entropy_loss"] = -entropy * kw.entropy_loss_weight
        if stats.top1 is not None:
            metrics["token_accuracy"] = Metric.mean((stats.top1 == kw.shifted_labels).to(loss.dtype), valid)
        metrics |= Metric.totals(terms, 1 / kw.gradient_factor)
        first, *others = terms.values()
        return sum(others, start=first), metrics


_NEED_REF = (
    "use_kl_loss=True needs the reference model's log-probs: run LogProbContext (or linear_logprobs) on its hidden "
    "states and head under torch.no_grad() and set ref_logprobs, or set use_kl_loss=False"
)
