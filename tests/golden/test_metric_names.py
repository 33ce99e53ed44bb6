"""Metrics that other frameworks recorded, from ours under their names.

Contract: `rename_metrics` gives the figures that the frameworks' own code gave on the same batch. What they count
otherwise is in each test: sequences without a token, other averages. XTuner's are in test_xloss.py and
test_rollout_correction.py. Figures were recorded with ten digits.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

from tests import budgets
from tests.golden import policy_runs, records, test_nemo, test_preference, test_prime, test_trl, test_verl_token
from tests.golden.policy_step import Step, run_step
from tests.golden.records import Entry, case_id
from tests.golden.test_rollout_correction import CORRECTIONS, VANILLA, from_verl
from xloss import GRPOLossConfig, finalize_metrics, rename_metrics

CHUNK: dict[str, Any] = {"mode": "chunk", "chunk_size": 7}


def same(found: dict[str, float], want: dict[str, float]) -> None:
    assert {name: found[name] for name in want} == pytest.approx(
        want, rel=budgets.FIGURE_WEIGHTED, abs=budgets.FIGURE_F64
    )


def renamed(metrics: dict[str, float], to: Any) -> dict[str, float]:
    results = {name: torch.tensor(value, dtype=torch.float64) for name, value in metrics.items()}
    return {name: float(value) for name, value in rename_metrics(results, to).items()}


def of_step(step: Step, to: Any) -> dict[str, float]:
    step.config["return_entropy"] = True
    return renamed(run_step(step, "chunk-f64")[2][0], to)


@pytest.mark.parametrize("entry", [e for e in test_trl.CASES if "luspo" not in e["id"]], ids=case_id)
def test_names_of_trl(entry: Entry) -> None:
    """TRL's means over sequences count those without a token; its extremes are over ranks."""
    theirs = {"entropy", "kl", "policy_loss"} | {f"clip_ratio/{n}_mean" for n in ("low", "high", "region")}
    want = {name: float(value[0]) for name, value in entry["metrics"].items() if name in theirs}
    leveled = entry["loss_name"] == "trl_rloo" or entry["config"].get("importance_sampling_level", "token") != "token"
    lengths = records.tensors(entry["inputs"])["mask"].sum(1)
    for name in want.keys() & {f"clip_ratio/{n}_mean" for n in ("low", "high", "region")} if leveled else ():
        want[name] *= len(lengths) / int((lengths > 0).sum())
    assert "entropy" in want
    found = of_step(test_trl.step_of(entry), "trl")
    same(found, want)
    if "cispo_clip_ratio" in entry["metrics"]:  # in a trainer whose loss is CISPO
        same(found, {"clip_ratio/high_mean": float(entry["metrics"]["cispo_clip_ratio"][0])})


PAIRS = [e for e in test_preference.CASES if e["id"] in ("trl-dpo_sigmoid-R1-081", "trl-kto_kto-R1-123")]


@pytest.mark.parametrize("entry", PAIRS, ids=case_id)
def test_names_of_trl_preference(entry: Entry) -> None:
    cfg = test_preference.config(entry)
    _, _, info = test_preference.forward(entry, cfg, test_preference.item(entry, cfg, torch.float64), torch.float64)
    found = {name: float(x) for name, x in rename_metrics(finalize_metrics([info.metrics]), "trl").items()}
    names = ("rewards/", "logps/", "kl")
    want = {name: float(v[0]) for name, v in entry["metrics"].items() if name.startswith(names)}
    assert len(want) >= 5
    assert {name: found[name] for name in want} == pytest.approx(want, rel=budgets.FIGURE_F32)


def verl_figures(entry: Entry) -> dict[str, float]:
    """Those that mean the same: entropy and KL averaged over tokens, log-ratios below 20 (verl's k1 is of clamped
    ones), and clip fractions but of CISPO, where verl counts whatever the advantage's sign, and SAPO, where it has 0.
    """
    cfg, logged = entry["config"], entry["metrics"]
    mode = cfg.get("loss_mode") or cfg.get("policy_loss", {}).get("loss_mode")
    want: dict[str, float] = {}
    if "actor/ppo_kl" in logged and "P3" not in entry["id"]:
        want["actor/ppo_kl"] = logged["actor/ppo_kl"]
    if mode == "vanilla" and "actor/pg_clipfrac" in logged:
        want["actor/pg_clipfrac"] = logged["actor/pg_clipfrac"]
        if cfg.get("clip_ratio_c"):
            want["actor/pg_clipfrac_lower"] = logged["actor/pg_clipfrac_lower"]
    if cfg.get("loss_agg_mode") == "token-mean" and entry["loss_name"] == "verl_ppo_full":
        theirs = {"actor/entropy_loss": "actor/entropy_loss", "kl_loss": "actor/kl_loss"}
        want |= {ours: logged[name] for name, ours in theirs.items() if name in logged}
    return want


@pytest.mark.parametrize("entry", [e for e in test_verl_token.CASES if e["metrics"]], ids=case_id)
def test_names_of_verl(entry: Entry) -> None:
    step = test_verl_token.step_of(entry)
    found = of_step(step, "verl")
    same(found, verl_figures(entry))
    if "actor/pg_loss" in entry["metrics"]:
        same(
            {"actor/pg_loss": found["actor/pg_loss"] * step.factor},
            {"actor/pg_loss": entry["metrics"]["actor/pg_loss"]},
        )
    if entry["config"].get("loss_mode") == "cispo":
        either = found["ratio_low_frac"] + found["ratio_high_frac"]
        assert either == pytest.approx(entry["metrics"]["actor/pg_clipfrac"], rel=budgets.FIGURE_WEIGHTED)


@pytest.mark.parametrize("entry", CORRECTIONS, ids=case_id)
def test_names_of_verl_correction(entry: Entry) -> None:
    """Means over sequences count those without a token in verl, where both log-perplexities are 0."""
    cfg = GRPOLossConfig(policy_loss_cfg=VANILLA, rollout_correction=from_verl(entry["config"]), **CHUNK)
    (batch,) = policy_runs.batches(entry)
    old, rollout = batch["old_logps"].double(), batch["rollout_logps"].double()
    item = policy_runs.item(batch, old_logprobs=old, rollout_logprobs=rollout)
    (info,) = policy_runs.run_step(entry, cfg, [item], torch.float64).infos
    found = {name: float(x) for name, x in rename_metrics(finalize_metrics([info.metrics]), "verl").items()}
    share = float(batch["mask"].any(1).double().mean())
    found["rollout_corr/log_ppl_diff"] *= share
    found["rollout_corr/ppl_ratio"] = found["rollout_corr/ppl_ratio"] * share + 1 - share
    names = {"kl", "chi2_token", "ppl_ratio", "log_ppl_diff", "rollout_is_mean", "rollout_is_max", "rollout_is_min"}
    names |= {"rollout_rs_masked_fraction"}
    if "P3" not in entry["id"]:  # beyond |x| = 20, where verl does not clamp in k3 and ppl_ratio
        names |= {"k3_kl"}
    else:
        names -= {"ppl_ratio"}
    if entry["config"].get("rollout_is") == "token":
        names |= {"rollout_is_ratio_fraction_high"}
    want = {f"rollout_corr/{name}": entry["metrics"].get(f"rollout_corr/{name}") for name in names}
    same(found, {name: value for name, value in want.items() if value is not None})


NEMO = [
    e
    for e in test_nemo.POLICY
    if not {"global_valid_toks", "global_valid_seqs", "sample_mask_drop"} & e["config"].keys()
    and not {"disable_ppo_ratio", "force_on_policy_ratio"} & {n for n, on in e["config"]["loss"].items() if on}
]


@pytest.mark.parametrize("entry", NEMO, ids=case_id)
def test_names_of_nemo(entry: Entry) -> None:
    """NeMo's KL figure follows `token_level_loss`, its KL of sampler and trainer the chosen estimator; its ratios are
    also of tokens that a correction masks, which have no weight here.
    """
    nemo = entry["config"]["loss"]
    cfg = GRPOLossConfig(
        policy_loss_cfg=test_nemo.policy_of(nemo),
        rollout_correction=test_nemo.correction_of(nemo),
        **test_nemo.kl_of(nemo),
        **CHUNK,
    )
    (batch,) = policy_runs.batches(entry)
    item = policy_runs.item(
        batch,
        old_logprobs=batch["old_logps"].double(),
        rollout_logprobs=batch["rollout_logps"].double(),
        ref_logprobs=batch["ref_logps"],
    )
    (info,) = policy_runs.run_step(entry, cfg, [item], torch.float64).infos
    found = {name: float(x) for name, x in rename_metrics(finalize_metrics([info.metrics]), "nemo").items()}
    names = set()
    if nemo.get("truncated_importance_sampling_type") not in ("icepop", "seq-mask-tis"):
        names |= {"probs_ratio_min", "probs_ratio_max"}
    if not nemo.get("sequence_level_importance_ratios"):
        names |= {"probs_ratio"} if names else set()
        if cfg.use_kl_loss and nemo.get("token_level_loss", True):
            names |= {"kl_penalty"}
    if nemo.get("reference_policy_kl_type", "k3") == "k3":
        names |= {"gen_kl_error"}
    if cfg.rollout_correction is not None and nemo.get("truncated_importance_sampling_type") != "seq-mask-tis":
        names |= {"is_oob_ratio"} & entry["metrics"].keys()
    want = {name: entry["metrics"][name] for name in names}
    empty = int((~batch["mask"].bool().any(1)).sum())  # which NeMo counts
    same(
        found | {"num_valid_samples": found["num_valid_samples"] + empty},
        want | {"num_valid_samples": entry["metrics"]["num_valid_samples"]},
    )


@pytest.mark.parametrize("entry", test_prime.PLAIN, ids=case_id)
def test_names_of_prime(entry: Entry) -> None:
    """prime-rl has a mean for each sequence; ours are over tokens."""
    data = records.tensors(entry["inputs"])
    ((cfg, items, _),) = test_prime.components(entry, CHUNK)
    built = cfg.loss_ctx_cls.build_batches_loss_kwargs(items, cfg)
    for b, kwargs in enumerate(built):
        _, info = cfg.loss_ctx_cls(cfg, kwargs).forward(data[f"hidden_{b}"].double(), data["weight"].double())
        found = rename_metrics(finalize_metrics([info.metrics]), "prime-rl")
        theirs = {name: torch.tensor(v, dtype=torch.float64) for name, v in entry["metrics"][f"mb{b}"].items()}
        bounds = data[f"cu_seq_lens_{b}"].tolist()
        live = (items[b].shifted_labels != -100).reshape(-1)
        tokens = torch.stack([live[i:j].sum() for i, j in pairwise(bounds)]).double()
        masked = tokens * theirs["is_masked"]
        want = {name: (theirs[name] * tokens).sum() / tokens.sum() for name in theirs if name.startswith("is_masked")}
        for name, weight in (("masked_mismatch_kl", masked), ("unmasked_mismatch_kl", tokens - masked)):
            want[name] = (theirs[name] * weight).sum() / weight.sum().clamp(min=1)
        same({n: float(x) for n, x in found.items()}, {n: float(x) for n, x in want.items()})
