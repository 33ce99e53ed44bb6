"""xloss in each of its modes and plans, through its public interface."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from benchmarks.cases import Batch, Case
from benchmarks.losses import (
    CISPO_HIGH,
    CLIP,
    DPPO_DELTA,
    DRO_BETA,
    ENTROPY_COEF,
    FOCAL_GAMMA,
    KIMI_TAU,
    KL_COEF,
    PPO_DELTA,
    SAPO_TAU,
)
from benchmarks.providers.base import Prepared, Provider, Result, backward, leaves
from benchmarks.providers.xloss_gspo import SequenceRatioConfig, SequenceRatioItem
from benchmarks.providers.xloss_own import TanhRatioConfig
from xloss import (
    BaseLossConfig,
    BaseLossContext,
    BaseLossContextInputItem,
    CELossConfig,
    CELossContextInputItem,
    GRPOLossConfig,
    LogProbConfig,
    RLLossContextInputItem,
    XlossError,
    linear_logprobs,
)

_PPO = {"loss_type": "vanilla", "cliprange_low": CLIP, "cliprange_high": CLIP}
_POLICIES: dict[str, dict[str, Any]] = {
    "grpo": _PPO,
    "cispo": {"loss_type": "cispo", "clip_high_threshold": CISPO_HIGH},
    "dro": {"loss_type": "dro", "beta": DRO_BETA},
    "importance_sampling": {"loss_type": "importance_sampling"},
    "ppo-delta": {"loss_type": "ppo", "cliprange_low": CLIP, "cliprange_high": CLIP, "delta": PPO_DELTA},
    "sapo": {"loss_type": "sapo", **SAPO_TAU},
    "dppo_tv": {"loss_type": "dppo_tv", "delta_low": DPPO_DELTA, "delta_high": DPPO_DELTA},
    "kimi": {"loss_type": "kimi", "tau": KIMI_TAU},
    "topr": {"loss_type": "topr"},
    "own-policy": {"loss_type": "benchmark_softplus"},
}
_CONFIGS: dict[str, tuple[type[BaseLossConfig], dict[str, Any]]] = {
    "ce": (CELossConfig, {}),
    "dft": (CELossConfig, {"token_scaling": "dft"}),
    "focal": (CELossConfig, {"focal_gamma": FOCAL_GAMMA}),
    **{name: (GRPOLossConfig, {"policy_loss_cfg": policy}) for name, policy in _POLICIES.items()},
    "grpo-kl-entropy": (
        GRPOLossConfig,
        {
            "policy_loss_cfg": _PPO,
            "use_kl_loss": True,
            "kl_loss_type": "k3",
            "kl_loss_coef": KL_COEF,
            "entropy_coef": ENTROPY_COEF,
        },
    ),
    "gspo": (SequenceRatioConfig, {"clip": CLIP}),
    "own-token-loss": (TanhRatioConfig, {}),
    "logprob": (LogProbConfig, {"return_entropy": True}),
}
_TINY = 8  # tokens of the call that asks the engine whether a mode can run


def context(case: Case, batch: Batch, **settings: Any) -> BaseLossContext[Any]:
    """The loss context of a case, calibrated, its live rows counted: what a training loop does once per batch."""
    config_cls, fields = _CONFIGS[case.loss_name]
    config = config_cls(**fields, chunk_size=case.chunk_size, logits_budget=case.logits_budget, **settings)
    item = _item(case, batch)
    context_cls = config.loss_ctx_cls
    (kwargs,) = context_cls.build_batches_loss_kwargs([item], config, [batch.cu_seq_lens])
    made = context_cls(config, kwargs)
    made.find_rows()
    return made


def _item(case: Case, batch: Batch) -> BaseLossContextInputItem:
    t = batch.tokens
    if _CONFIGS[case.loss_name][0] is CELossConfig:
        return CELossContextInputItem(shifted_labels=t.labels)
    if case.loss_name == "logprob":
        return BaseLossContextInputItem(shifted_labels=t.labels)
    if case.loss_name in ("gspo", "own-token-loss"):
        return SequenceRatioItem(shifted_labels=t.labels, advantages=t.advantages, old_logprobs=t.old)
    return RLLossContextInputItem(
        shifted_labels=t.labels, advantages=t.advantages, old_logprobs=t.old, ref_logprobs=t.ref
    )


def planned(case: Case, batch: Batch) -> Any:
    """The plan that xloss would follow for the plain case, left to itself."""
    return context(case.plain, batch).explain(*leaves(case.plain, batch))


def _prepare(mode: str, plan: str, kernels: str) -> Callable[[Case, Batch], Prepared]:
    def prepare(case: Case, batch: Batch) -> Prepared:
        settings = {"plan": plan} if plan in ("one_pass", "two_pass") else {}
        if mode != "eager":
            settings["kernels"] = kernels
        if plan == "kept":
            budget = 2 * case.shape.num_tokens * case.shape.vocab_size * max(4, batch.hidden.element_size())
            case = replace(case, logits_budget=budget)
            settings["plan"] = "two_pass"
        ctx = context(case, batch, mode=mode, **settings)

        def run() -> Result:
            hidden, weight = leaves(case, batch)
            with torch.set_grad_enabled(not case.loss.forward_only):
                loss, info = ctx.forward(hidden, weight)
            if case.loss.forward_only:
                return Result(logprobs=info.logprobs, entropy=info.entropy)
            return backward(loss, hidden, weight)

        found = ctx.explain(*leaves(case, batch))
        how = "no logits" if found.kernels == "no_logits" else f"{found.num_chunks} chunks"
        return Prepared(run, f"{found.kind}, {found.mode}, {how}", found.chunk_rows)

    return prepare


def _absent(mode: str) -> Callable[[Case], str | None]:
    """The engine's own words where it refuses the mode on this device."""

    def absent(case: Case) -> str | None:
        ones = torch.ones(_TINY, 16, device=case.device)
        try:
            linear_logprobs(ones, ones, torch.arange(_TINY, device=case.device), mode=mode)  # type: ignore[arg-type]
        except (XlossError, ImportError) as error:
            return re.sub(r"^\[[\w-]+\] ", "", str(error))  # without its code
        return None

    return absent


def _applies(plan: str) -> Callable[[Case], bool]:
    def applies(case: Case) -> bool:
        if plan == "eager":
            return True
        if case.loss.forward_only:
            return plan == "forward"
        return plan != "forward" and not (plan == "one_pass" and case.loss.coupled)

    return applies


def _provider(
    title: str, mode: str, plan: str, default_on: tuple[str, ...] = ("cpu", "cuda"), kernels: str = "auto"
) -> Provider:
    return Provider(title, _prepare(mode, plan, kernels), _absent(mode), _applies(plan), default_on, ours=True)


def _no_logits(title: str, plan: str) -> Provider:
    """Beside its ``fused`` twin, which takes chunks of logits wherever the budget holds useful ones."""
    return _provider(title, "fused", plan, default_on=("cuda",), kernels="no_logits")


XLOSS: dict[str, Provider] = {
    "xloss-eager": _provider("xloss eager", "eager", "eager", default_on=()),
    "xloss-forward": _provider("xloss chunk", "chunk", "forward"),
    "xloss-one-pass": _provider("xloss chunk one-pass", "chunk", "one_pass"),
    "xloss-two-pass": _provider("xloss chunk two-pass", "chunk", "two_pass"),
    "xloss-two-pass-kept": _provider("xloss chunk two-pass kept", "chunk", "kept", default_on=("cuda",)),
    "xloss-fused-forward": _provider("xloss fused", "fused", "forward"),
    "xloss-fused-one-pass": _provider("xloss fused one-pass", "fused", "one_pass"),
    "xloss-fused-two-pass": _provider("xloss fused two-pass", "fused", "two_pass"),
    "xloss-no-logits-forward": _no_logits("xloss no logits", "forward"),
    "xloss-no-logits-one-pass": _no_logits("xloss no logits one-pass", "one_pass"),
    "xloss-no-logits-two-pass": _no_logits("xloss no logits two-pass", "two_pass"),
}
