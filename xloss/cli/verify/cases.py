"""The losses that ``xloss verify`` runs through every layout, and how their batches are made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from xloss import (
    BaseLossConfig,
    BaseLossContextInputItem,
    CELossConfig,
    CELossContextInputItem,
    DistillLossConfig,
    DistillLossContextInputItem,
    GRPOLossConfig,
    PreferenceLossConfig,
    PreferenceLossContextInputItem,
    RLLossContextInputItem,
    SoftCELossConfig,
    SoftCELossContextInputItem,
)
from xloss.cli.errors import CannotRun
from xloss.cli.verify.problem import IGNORED, GlobalBatch
from xloss.errors import unknown_name
from xloss.losses.policies import policy_losses
from xloss.losses.preferences import preference_losses

POLICY = ("advantages", "old_logprobs", "ref_logprobs", "rollout_logprobs", "is_weights", "group_ids", "rewards")
KNOWN_FIELDS = (
    *POLICY,
    "token_weight",
    "target_tokens",
    "target_weights",
    "teacher_topk_ids",
    "teacher_topk_logprobs",
    "pair_ids",
    "preferred",
    "kl",
    "reward_shift",
)
"""Fields of the made-up batch, by the names that losses have for them."""
STANDARD = ("ce", "ce-sample", "grpo", "gspo", "dpo")


@dataclass(frozen=True)
class LossCase:
    """A loss under a name, and the fields of the global batch that its items take."""

    name: str
    config: BaseLossConfig
    item: type[BaseLossContextInputItem]
    fields: tuple[str, ...]

    def configured(self, **options: Any) -> BaseLossConfig:
        """Its config with options of the run (``chunk_size``, ``mode``, ...) replaced."""
        return self.config.model_copy(update=options)

    def build_item(
        self, batch: GlobalBatch, sequences: Sequence[int], packed: bool, device: torch.device, dtype: torch.dtype
    ) -> Any:
        """The input item of a micro-batch; per-token figures in float32, or in float64 with float64 weights."""
        wide = torch.promote_types(dtype, torch.float32)
        given: dict[str, Any] = {}
        for name in ("shifted_labels", *self.fields):
            if name in batch.by_token:
                values = batch.laid_out(batch.by_token[name], sequences, packed, IGNORED * (name == "shifted_labels"))
            elif name in batch.by_sequence:
                values = batch.by_sequence[name][list(sequences)]
            else:
                values = batch.of_batch[name]
            given[name] = values.to(device, wide if values.is_floating_point() else None)
        return self.item(**given)

    def coupled(self) -> bool:
        """Whether the loss couples the tokens of a sequence."""
        config = self.config
        kwargs_cls = config.loss_kwargs_cls
        nothing = dict.fromkeys(kwargs_cls.model_fields) | {"shifted_labels": torch.zeros(0, dtype=torch.int64)}
        return not config.loss_ctx_cls(config, kwargs_cls.model_construct(**nothing)).is_token_local()


def policy_case(name: str, config: GRPOLossConfig) -> LossCase:
    """A policy loss."""
    return LossCase(name, config, RLLossContextInputItem, POLICY)


def _policy(name: str, loss: Any, **fields: Any) -> LossCase:
    return policy_case(name, GRPOLossConfig(policy_loss_cfg=loss, **fields))


def _preference(name: str, terms: Any) -> LossCase:
    return preference_case(name, PreferenceLossConfig(loss_type=terms))


def preference_case(name: str, config: PreferenceLossConfig) -> LossCase:
    """A preference loss, with what its terms need."""
    fields = ["preferred"] + (["pair_ids"] if config.paired else [])
    fields += ["ref_logprobs"] if config.needs_reference else []
    fields += sorted({needed for term in config.terms for needed in term.needs})
    return LossCase(name, config, PreferenceLossContextInputItem, tuple(fields))


def _supervised(name: str, **fields: Any) -> LossCase:
    return LossCase(name, CELossConfig(**fields), CELossContextInputItem, ("token_weight",))


def standard_cases() -> dict[str, LossCase]:
    """Cross-entropy by token and by sequence, GRPO with KL and entropy, and two that couple tokens."""
    vanilla = {"loss_type": "vanilla", "cliprange_low": 0.2, "cliprange_high": 0.28}
    kl = {"use_kl_loss": True, "kl_loss_coef": 0.1, "kl_loss_type": "k3", "entropy_coef": 0.01}
    cases = [
        _supervised("ce"),
        _supervised("ce-sample", loss_reduction="sample", z_loss_coef=1e-3),
        _policy("grpo", vanilla, **kl),
        _policy("gspo", {"loss_type": "gspo"}, loss_reduction="sample"),
        _preference("dpo", "sigmoid"),
    ]
    return {case.name: case for case in cases}


def every_case() -> dict[str, LossCase]:
    """Those, and one of each registered loss whose value does not depend on the cut by its definition."""
    cases = standard_cases()
    for form in CELossConfig.forms[1:]:
        cases[form.name] = _supervised(form.name, **form.fields)
    soft = ("target_tokens", "target_weights")
    cases["soft_ce"] = LossCase("soft_ce", SoftCELossConfig(), SoftCELossContextInputItem, soft)
    topk = ("teacher_topk_ids", "teacher_topk_logprobs")
    distilled = DistillLossConfig(topk_mode="tail")
    cases["distill_topk"] = LossCase("distill_topk", distilled, DistillLossContextInputItem, topk)
    for name, cls in policy_losses().items():
        case = _policy(name, {"loss_type": name} | dict(cls.example))
        assert isinstance(case.config, GRPOLossConfig)
        if "batch" not in case.config.coupled_by():
            cases.setdefault(name, case)
    for name, term in preference_losses().items():
        if name.startswith("aot"):  # rank the sequences of a micro-batch
            continue
        cases.setdefault(name, _preference(name, {"loss_type": name} | dict(term.example)))
    return cases


def find_cases(names: Sequence[str]) -> list[LossCase]:
    """Cases by name; ``all``: every one. Raises CannotRun for a wrong name."""
    known = standard_cases() if set(names) <= set(STANDARD) else every_case()
    chosen = list(known) if "all" in names else list(dict.fromkeys(names))
    for name in chosen:
        if name not in known:
            raise CannotRun(unknown_name("--losses", name, ["all", *known]))
    return [known[name] for name in chosen]
