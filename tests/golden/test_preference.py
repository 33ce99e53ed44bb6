"""Golden cases of preference losses: TRL's and Liger's DPO and KTO, Liger's CPO, SimPO and ORPO, NeMo RL, Tinker.

Contract: in float64, eager and chunked, and in float32, xloss gives the loss and gradients that the peers' own code
gave, and Tinker's d loss / d log-prob. The reference's log-probs come per token or summed over sequences, the pairs by
layout or by ids: all the same.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests import budgets
from tests.golden.records import Entry, case_id, entries, mismatches, tensors
from xloss import PreferenceLossConfig, PreferenceLossContext, PreferenceLossContextInputItem, TokenStats

CASES: list[Entry] = [
    e for e in entries("trl") + entries("liger") + entries("nemo") + entries("tinker")
    if e["inputs"] == "inputs_R1.npz" and not e["loss_name"].startswith("distill")
]  # fmt: skip
DIFFERENT: dict[str, str] = {}

RUNS: dict[str, dict[str, Any]] = {"eager": {"mode": "eager"}, "chunk": {"mode": "chunk", "chunk_size": 7}}
DIVERGENCE = {"forward_kl": "forward_kl", "js_divergence": "js", "alpha_divergence": "alpha"}


def trl(cfg: dict[str, Any]) -> dict[str, Any]:
    names = cfg.get("loss_types") or [cfg["loss_type"]]
    weights = cfg.get("loss_weights") or [1.0] * len(names)
    terms = [{"loss_type": n, "weight": w} for n, w in zip(names, weights, strict=True)]
    for term in terms:
        if term["loss_type"] == "discopop":
            term["tau"] = cfg["discopop_tau"]
        if term["loss_type"] in ("kto", "apo_zero_unpaired"):
            term |= {n: cfg[n] for n in ("desirable_weight", "undesirable_weight") if n in cfg}
        # of the paired losses TRL smooths these only
        if term["loss_type"] in ("exo_pair", "robust", "aot", "aot_unpaired") and "label_smoothing" in cfg:
            term["label_smoothing"] = cfg["label_smoothing"]
    fields: dict[str, Any] = {"loss_type": terms, "beta": cfg["beta"]}
    if cfg.get("f_divergence_type", "reverse_kl") != "reverse_kl":
        fields["f_divergence"] = DIVERGENCE[cfg["f_divergence_type"]]
        if fields["f_divergence"] == "alpha":
            fields["f_alpha"] = cfg["f_alpha_divergence_coef"]
    if cfg.get("ld_alpha") is not None:
        fields["ld_alpha"] = cfg["ld_alpha"]
    return fields | {"use_weighting": cfg.get("use_weighting", False), "count_empty_sequences": True}


def liger(cfg: dict[str, Any]) -> dict[str, Any]:
    """NLL is on by default in CPO, ORPO and SimPO, off in DPO; averages by default in ORPO and SimPO."""
    kind = cfg.get("kind", "kto")
    name = cfg.get("loss_type", "sigmoid") if kind == "dpo" else kind
    term: dict[str, Any] = {"loss_type": name} | {
        n: cfg[n] for n in ("beta", "label_smoothing", "gamma", "average_log_prob") if n in cfg
    }
    nll = cfg.get("alpha", 1.0) if cfg.get("compute_nll_loss", kind in ("cpo", "orpo", "simpo")) else 0.0
    terms = [term]
    if kind in ("cpo", "orpo", "simpo"):
        term["nll_coef"] = nll
    elif nll:
        terms.append({"loss_type": "sft", "weight": nll})
    return {"loss_type": terms, "reference_free": not cfg.get("use_ref_model", True), "count_empty_sequences": True}


def nemo(cfg: dict[str, Any]) -> dict[str, Any]:
    loss = cfg["loss"]
    terms = [
        {
            "loss_type": "sigmoid",
            "beta": loss["reference_policy_kl_penalty"],
            "weight": loss.get("preference_loss_weight", 1.0),
            "average_log_prob": loss.get("preference_average_log_probs", False),
        }
    ]
    fields: dict[str, Any] = {"loss_type": terms}
    if loss.get("sft_loss_weight"):
        terms.append({"loss_type": "sft", "weight": loss["sft_loss_weight"]})
        fields["nll_reduction"] = "sample" if loss.get("sft_average_log_probs") else "sample_sum"
    return fields


def tinker(cfg: dict[str, Any]) -> dict[str, Any]:
    return {"loss_type": "sigmoid", "beta": cfg["dpo_beta"]}


PEERS = {"trl": trl, "liger": liger, "nemo": nemo, "tinker": tinker}


def config(entry: Entry, **run: Any) -> PreferenceLossConfig:
    fields = PEERS[entry["peer"]](entry["config"])
    paired = "kto" not in entry["loss_name"]
    return PreferenceLossConfig(**{"layout": "halves" if paired else "alternating"} | fields | run)


def item(entry: Entry, cfg: PreferenceLossConfig, dtype: torch.dtype) -> PreferenceLossContextInputItem:
    data = tensors(entry["inputs"])
    mask = data["mask"].bool()
    fields: dict[str, Tensor] = {"shifted_labels": data["targets"].masked_fill(~mask, -100)}
    if cfg.needs_reference:  # TRL and Liger run the reference's head, the others are given its log-probs
        heads = entry["peer"] in ("trl", "liger") and cfg.paired
        fields["ref_logprobs"] = data["ref_logps_f64" if heads else "ref_logps"].to(dtype)
    if not cfg.paired:
        fields["preferred"] = data["preference_labels"]
        if "kl" in {name for term in cfg.loss_type for name in term.needs}:
            use = entry["config"].get("calculate_KL", entry["config"].get("kl", False))
            fields["kl"] = data["kl"].to(dtype) if use else torch.zeros((), dtype=dtype)
    return PreferenceLossContextInputItem(**fields)


def forward(entry: Entry, cfg: PreferenceLossConfig, given: PreferenceLossContextInputItem, dtype: torch.dtype) -> Any:
    data = tensors(entry["inputs"])
    hidden, weight = (data[name].to(dtype).requires_grad_(True) for name in ("hidden", "weight"))
    (kwargs,) = PreferenceLossContext.build_batches_loss_kwargs([given], cfg)
    context = PreferenceLossContext(cfg, kwargs)
    loss, info = context.forward(hidden, weight)
    loss.backward()
    return {"loss": loss, "grad_hidden": hidden.grad, "grad_weight": weight.grad}, context, info


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
@pytest.mark.parametrize("entry", CASES, ids=case_id)
def test_float64(entry: Entry, run: dict[str, Any]) -> None:
    cfg = config(entry, **run)
    found, _, _ = forward(entry, cfg, item(entry, cfg, torch.float64), torch.float64)
    assert not mismatches(entry, found)


@pytest.mark.parametrize("entry", CASES, ids=case_id)
def test_float32(entry: Entry) -> None:
    cfg = config(entry, mode="chunk", chunk_size=7)
    found, _, _ = forward(entry, cfg, item(entry, cfg, torch.float32), torch.float32)
    assert not mismatches(entry, found, "f32")


@pytest.mark.parametrize("entry", [c for c in CASES if c["config"].get("ld_alpha") is None], ids=case_id)
def test_reference_of_sequences_and_pairs_by_id(entry: Entry) -> None:
    """Sums of the reference's log-probs, and pair_ids instead of a layout."""
    cfg = config(entry)
    given = item(entry, cfg, torch.float64)
    if given.ref_logprobs is not None:
        given.ref_sequence_logprobs = given.ref_logprobs.masked_fill(given.shifted_labels == -100, 0).sum(1)
        given.ref_logprobs = None
    if cfg.paired:
        given.pair_ids, given.preferred = torch.tensor([5, 9, 0] * 2), torch.arange(6) < 3
    found, _, _ = forward(entry, cfg, given, torch.float64)
    assert not mismatches(entry, found)


@pytest.mark.parametrize("entry", [c for c in CASES if c["peer"] == "tinker"], ids=case_id)
def test_derivatives_by_log_prob(entry: Entry) -> None:
    cfg = config(entry)
    _, context, info = forward(entry, cfg, item(entry, cfg, torch.float64), torch.float64)
    logprobs = info.logprobs.detach().reshape(-1).requires_grad_(True)
    kwargs = context.loss_kwargs.flat(torch.float64).replaced({"cu_seq_lens": context.loss_kwargs.bounds()})
    loss, _ = context.token_loss(TokenStats(logprobs, info.lse.reshape(-1)), kwargs)
    (found,) = torch.autograd.grad(loss, logprobs)
    assert not mismatches(entry, {"dtap_logps": found.reshape(info.logprobs.shape)})


def test_metrics() -> None:
    """As TRL and NeMo report them."""
    for entry in [c for c in CASES if c["id"] in ("trl-dpo_sigmoid-R1-081", "trl-kto_kto-R1-123", "trl-dpo_ld-R1-097")]:
        cfg = config(entry)
        _, _, info = forward(entry, cfg, item(entry, cfg, torch.float64), torch.float64)
        want, results = entry["metrics"], {name: float(m.result()) for name, m in info.metrics.items()}
        for side in ("chosen", "rejected"):
            assert results[f"reward_{side}"] == pytest.approx(want[f"rewards/{side}"][0], rel=budgets.FIGURE_F32)
            assert results[f"logps_{side}"] == pytest.approx(want[f"logps/{side}"][0], rel=budgets.FIGURE_F32)
        if cfg.paired:
            assert results["reward_accuracy"] == pytest.approx(want["rewards/accuracies"][0], rel=budgets.FIGURE_F32)
            assert results["reward_margin"] == pytest.approx(want["rewards/margins"][0], rel=budgets.FIGURE_F32)
        else:
            assert results["kl"] == pytest.approx(want["kl"][0], rel=budgets.FIGURE_F32)


def test_all_cases_are_here() -> None:
    assert {e["loss_name"] for e in CASES} >= {"kto", "orpo", "simpo", "cpo", "dpo_sigmoid", "dpo_ipo", "dpo_wpo"}
    assert len(CASES) == 47
