"""Golden cases of supervised losses: Apple CCE, Liger's fused CE, TRL, NeMo RL, slime, XTuner's MTP, Tinker's custom
losses.

Contract: losses, gradients, per-token losses and metrics are those that the peers' own code recorded, in float64
(eager, chunked one-pass and two-pass) and float32. Liger's softcap cases are held against the independent float64
result that stands beside them: Liger's kernel adds phantom logits there (see the case's note).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests import budgets
from tests.golden import records
from tests.golden.records import Entry, case_id
from tests.property.helpers import leaf
from xloss import (
    BaseLossConfig,
    BaseLossContext,
    BaseLossContextInputItem,
    BaseLossKwargs,
    CELossConfig,
    CELossContextInputItem,
    LossInfo,
    MTPLossConfig,
    MTPLossContextInputItem,
    TokenStats,
    finalize_metrics,
    shift_labels,
)
from xloss.losses.base import TokenLoss

_PADDED = [
    *records.entries("cce"),
    *records.entries("ligerce"),
    *records.entries("trl", "dft", "ce_chunked"),
    *records.entries("nemo", "nemo_nll"),
]
_MTP = records.entries("xtuner", "mtp")
_SLIME = records.entries("slime", "slime_sft")
_CUSTOM = records.entries("tinker", "tinker_custom")
CASES: list[Entry] = [*_PADDED, *_MTP, *_SLIME, *_CUSTOM]
DIFFERENT: dict[str, str] = {}

RUNS: dict[str, dict[str, Any]] = {
    "eager": {"mode": "eager"},
    "one_pass": {"mode": "chunk", "plan": "one_pass", "chunk_size": 7},
    "two_pass": {"mode": "chunk", "plan": "two_pass", "chunk_size": 7},
}
DTYPES = {"f64": torch.float64, "f32": torch.float32}
every_run = pytest.mark.parametrize(
    ("run", "precision"),
    [*((run, "f64") for run in RUNS.values()), (RUNS["one_pass"], "f32")],
    ids=[*(f"{name}-f64" for name in RUNS), "one_pass-f32"],
)


def _precision(entry: Entry, precision: str) -> str:
    """Liger's Triton cases were recorded in float32 only."""
    return precision if precision in records.tolerance(entry) and entry["f64_mode"] != "n/a" else "f32"


def _ce(entry: Entry, data: dict[str, Tensor]) -> tuple[dict[str, Any], Tensor, Tensor | None, float]:
    """Config fields, shifted labels, token weights, and the denominator that the peer has and xloss is not told of."""
    c, peer, labels = entry["config"], entry["peer"], data["labels"]
    live = labels != -100
    fields: dict[str, Any] = {}
    reduction, weight, denominator = c.get("reduction", "mean"), None, 1.0
    if peer == "cce":
        labels = shift_labels(labels) if c.get("shift") else labels
        fields = {"softcap": c.get("softcap"), "z_loss_coef": c.get("z", 0.0)}
        weight = torch.arange(1, live.numel() + 1) / live.numel() if reduction == "none" else None
    elif peer == "ligerce":
        fields = {
            "softcap": c.get("softcap"),
            "z_loss_coef": c.get("lse_square_scale", 0.0),
            "label_smoothing": c.get("label_smoothing", 0.0),
            "token_scaling": "dft" if c.get("use_token_scaling") else None,
            "return_token_accuracy": c.get("return_token_accuracy", False),
        }
        weight = torch.linspace(0.5, 1.5, live.numel()) if reduction == "none" else None
    elif entry["loss_name"] == "dft":
        fields, denominator = {"token_scaling": "dft"}, c.get("num_items_in_batch", 1.0)
        reduction = "sum" if "num_items_in_batch" in c else "mean"
    elif entry["loss_name"] == "ce_chunked":
        fields = {"return_token_accuracy": True, "return_entropy": True}
        fields |= {"softcap": c.get("final_logit_softcapping"), "logit_scale": c.get("logit_scale", 1.0)}
        denominator = c.get("num_items_in_batch", 1.0)
        reduction = "sum" if "num_items_in_batch" in c else "mean"
    else:  # nemo_nll
        denominator = c.get("global_valid_toks", 1.0)
        reduction = "sum" if "global_valid_toks" in c else "mean"
    fields["loss_reduction"] = "token" if reduction == "mean" else "sum"
    return fields, labels, None if weight is None else weight.reshape(labels.shape), float(denominator)


def _check(entry: Entry, precision: str, losses: list[Tensor], leaves: dict[str, Tensor], **found: Any) -> None:
    torch.stack(losses).sum().backward()
    grads = {f"grad_{name}": x.grad if x.grad is not None else torch.zeros_like(x) for name, x in leaves.items()}
    assert not records.mismatches(
        entry, {"loss": [x.item() for x in losses], **grads, **found}, _precision(entry, precision)
    )


@every_run
@pytest.mark.parametrize("entry", _PADDED, ids=case_id)
def test_cross_entropy(entry: Entry, run: dict[str, Any], precision: str) -> None:
    data, dtype = records.tensors(entry["inputs"]), DTYPES[precision]
    fields, labels, token_weight, denominator = _ce(entry, data)
    cfg = CELossConfig(**fields, **run)
    item = CELossContextInputItem(shifted_labels=labels, token_weight=token_weight)
    (kwargs,) = cfg.loss_ctx_cls.build_batches_loss_kwargs([item], cfg)
    leaves = {name: leaf(data[name].to(dtype)) for name in ("hidden", "weight")}
    bias = torch.linspace(-1, 1, leaves["weight"].shape[0], dtype=dtype) if entry["config"].get("bias") else None
    loss, info = cfg.loss_ctx_cls(cfg, kwargs).forward(*leaves.values(), bias)
    found = {}
    if "out_per_token" in records.arrays(entry["file"]):
        nll = -info.logprobs.detach()
        found["out_per_token"] = nll.reshape(records.arrays(entry["file"])["out_per_token"].shape)
    _check(entry, precision, [loss / denominator], leaves, **found)
    _check_metrics(entry, info)


def _check_metrics(entry: Entry, info: LossInfo) -> None:
    results = finalize_metrics([info.metrics])
    sums = {name: metric.value for name, metric in info.metrics.items()}
    ours = {
        "z_loss": results.get("z_loss"),
        "token_accuracy": results.get("token_accuracy"),
        "correct": sums.get("token_accuracy"),
        "entropy_sum": sums.get("entropy"),
        "n_valid": results["num_tokens"],
        "num_unmasked_tokens": results["num_tokens"],
    }
    for name, want in entry["metrics"].items():
        if name not in ("loss", "num_valid_samples"):
            assert float(ours[name]) == pytest.approx(want, rel=budgets.FIGURE_PEER)


def _packs(entry: Entry, dtype: torch.dtype) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """Leaves (hidden states of every micro-batch, weight), and the other tensors of every micro-batch."""
    data = records.tensors(entry["inputs"])
    count = int(data["n_batches"])
    leaves = {f"hidden_{b}": leaf(data[f"hidden_{b}"].to(dtype)) for b in range(count)}
    leaves["weight"] = leaf(data["weight"].to(dtype))
    names = ("labels", "targets", "mask", "rollout_logps", "cu_seq_lens")
    return leaves, [{name: data[f"{name}_{b}"] for name in names} for b in range(count)]


@every_run
@pytest.mark.parametrize("entry", _MTP, ids=case_id)
def test_mtp(entry: Entry, run: dict[str, Any], precision: str) -> None:
    c = entry["config"]
    leaves, packs = _packs(entry, DTYPES[precision])
    cfg = MTPLossConfig(
        mtp_depth=c["mtp_depth"],
        detach_mtp_lm_head_weight=c.get("detach", False),
        kl_loss_type="low_var_kl" if c["kl"] else None,
        loss_reduction=c.get("loss_reduction", "token"),
        **run,
    )
    items = [
        MTPLossContextInputItem(shifted_labels=p["labels"], rollout_logprobs=p["rollout_logps"] if c["kl"] else None)
        for p in packs
    ]
    cls = cfg.loss_ctx_cls
    built = cls.build_batches_loss_kwargs(items, cfg, [p["cu_seq_lens"] for p in packs])
    losses = [cls(cfg, kwargs).forward(leaves[f"hidden_{b}"], leaves["weight"])[0] for b, kwargs in enumerate(built)]
    for b, kwargs in enumerate(built):
        assert np.array_equal(kwargs.mtp_labels, records.arrays(entry["file"])[f"out_rolled_labels_{b}"])
    _check(entry, precision, losses, leaves)


@every_run
@pytest.mark.parametrize("entry", _SLIME, ids=case_id)
def test_slime_sft(entry: Entry, run: dict[str, Any], precision: str) -> None:
    """Sums: of tokens, or of sequence means over the global batch of 8 times the number of micro-batches."""
    per_token = entry["config"]["args"].get("calculate_per_token_loss", False)
    leaves, packs = _packs(entry, DTYPES[precision])
    cfg = CELossConfig(loss_reduction="sum" if per_token else "sample", count_empty_sequences=not per_token, **run)
    items = [CELossContextInputItem(shifted_labels=p["labels"]) for p in packs]
    cls = cfg.loss_ctx_cls
    built = cls.build_batches_loss_kwargs(items, cfg, [p["cu_seq_lens"] for p in packs])
    num_sequences = sum(p["cu_seq_lens"].numel() - 1 for p in packs)
    factor = 1.0 if per_token else num_sequences * len(packs) / 8
    losses = [
        factor * cls(cfg, kwargs).forward(leaves[f"hidden_{b}"], leaves["weight"])[0] for b, kwargs in enumerate(built)
    ]
    _check(entry, precision, losses, leaves)


class _CustomConfig(BaseLossConfig):
    fn: str

    @property
    def loss_ctx_cls(self) -> type[_CustomContext]:
        return _CustomContext


class _CustomContext(BaseLossContext[BaseLossContextInputItem]):
    """Tinker's documented examples as a ``token_loss``; both look at every token's log-prob."""

    loss_cfg: _CustomConfig
    loss_kwargs: BaseLossKwargs

    def token_loss(self, stats: TokenStats, loss_kwargs: Any) -> TokenLoss:
        if self.loss_cfg.fn == "custom_loss":
            return stats.logprobs.square()
        return stats.logprobs.var()


@every_run
@pytest.mark.parametrize("entry", _CUSTOM, ids=case_id)
def test_tinker_custom(entry: Entry, run: dict[str, Any], precision: str) -> None:
    """One loss over the log-probs of all sequences of all micro-batches."""
    leaves, packs = _packs(entry, DTYPES[precision])
    run = {name: value for name, value in run.items() if name != "plan"}
    cfg = _CustomConfig(fn=entry["config"]["fn"], **run)
    items = [BaseLossContextInputItem(shifted_labels=p["targets"]) for p in packs]
    cls = cfg.loss_ctx_cls
    whole = cls.cat([cls(cfg, kwargs) for kwargs in cls.build_batches_loss_kwargs(items, cfg)])
    hidden = torch.cat([x for name, x in leaves.items() if name != "weight"], 1)
    loss, _ = whole.forward(hidden, leaves["weight"])
    _check(entry, precision, [loss], leaves)


def test_case_counts() -> None:
    """Nothing dropped out of the index."""
    counts: dict[str, int] = {}
    for entry in CASES:
        counts[entry["peer"]] = counts.get(entry["peer"], 0) + 1
    assert counts == {"cce": 7, "ligerce": 9, "trl": 4, "nemo": 2, "xtuner": 3, "slime": 2, "tinker": 2}
