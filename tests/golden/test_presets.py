"""Presets against the recorded cases of the frameworks they are named after.

Contract: a preset with a case's settings, given under the framework's numbers, is the config that the case is known to
agree with. The modules that map each peer's options run those configs; here only configs are compared.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.golden import records, test_nemo, test_preference, test_prime, test_slime, test_trl, test_verl_token
from tests.golden import test_oreal_and_cov as cov
from tests.golden import test_sequence_ratio as sequence
from tests.golden.cases import Case, cases
from tests.golden.policy_step import Step, run_step
from tests.golden.records import Entry, case_id
from xloss import DistillLossConfig, GRPOLossConfig, OrealLossConfig, preset


def renamed(theirs: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    return {ours: theirs[name] for name, ours in names.items() if name in theirs}


def kl_on(coef: float | None, **more: Any) -> dict[str, Any]:
    return {"use_kl_loss": True, "kl_loss_coef": coef, **more} if coef else {}


# -- TRL ---------------------------------------------------------------------------------------------------------------

TRL_TERMS = {"kl_loss_type": "k3", "kl_clamp_in": None, "kl_clamp_out": None, "entropy_reduction": "token"}
TRL_NAMES = {
    "delta": "delta",
    "sapo_temperature_pos": "tau_pos",
    "sapo_temperature_neg": "tau_neg",
    "vespo_k_pos": "k_pos",
    "vespo_lambda_pos": "lambda_pos",
    "vespo_k_neg": "k_neg",
    "vespo_lambda_neg": "lambda_neg",
    "entropy_coef": "entropy_coef",
    "top_entropy_quantile": "top_entropy_quantile",
    "off_policy_mask_threshold": "opsm_delta",
    "temperature": "temperature",
}


@pytest.mark.parametrize("entry", test_trl.CASES, ids=case_id)
def test_trl_grpo(entry: Entry) -> None:
    cfg = entry["config"]
    name, level = cfg.get("loss_type", "rloo"), cfg.get("importance_sampling_level", "token")
    given = renamed(cfg, TRL_NAMES)
    if name == "cispo":
        given["clip_high_threshold"] = cfg["epsilon_high"]
    elif name not in ("sapo", "vespo"):
        given |= {"cliprange_low": cfg["epsilon_low"], "cliprange_high": cfg["epsilon_high"]}
    if name not in ("vespo", "rloo"):
        given["ratio_level"] = level
    if name == "dr_grpo":
        given["norm_length"] = cfg.get("max_completion_length", 20)
    unbiased = {"kl_loss_grad": "unbiased", "kl_ratio_level": level} if cfg.get("use_bias_correction_kl") else {}
    given |= kl_on(cfg.get("beta"), **unbiased)
    terms = {} if name == "rloo" else TRL_TERMS
    assert preset(f"trl/{name}", **given) == GRPOLossConfig(**terms | test_trl.step_of(entry).config)


SINGLE = [e for e in test_preference.CASES if e["peer"] == "trl" and e["loss_name"] not in ("dpo_mix", "dpo_sft")]


@pytest.mark.parametrize("entry", SINGLE, ids=case_id)
def test_trl_preferences(entry: Entry) -> None:
    cfg = entry["config"]
    name = (cfg.get("loss_types") or [cfg["loss_type"]])[0]
    names = {"beta": "beta", "discopop_tau": "tau", "ld_alpha": "ld_alpha", "use_weighting": "use_weighting"}
    names |= {n: n for n in ("label_smoothing", "desirable_weight", "undesirable_weight")}
    given = renamed(cfg, names | {"f_alpha_divergence_coef": "f_alpha"})
    if "f_divergence_type" in cfg:
        given["f_divergence"] = test_preference.DIVERGENCE[cfg["f_divergence_type"]]
    ours = preset("trl/dpo" if name == "sigmoid" else f"trl/{name}", **given)
    want = test_preference.config(entry)
    assert ours.terms == want.terms
    assert ours.model_dump(exclude={"loss_type", "label_smoothing"}) == want.model_dump(
        exclude={"loss_type", "label_smoothing"}
    )


# -- verl --------------------------------------------------------------------------------------------------------------

VERL_NAMES = {"clip_ratio_low": "cliprange_low", "clip_ratio_high": "cliprange_high", "clip_ratio_c": "dual_clip_c"}
VERL_NAMES |= {"tau_pos": "tau_pos", "tau_neg": "tau_neg", "entropy_coeff": "entropy_coef"}


@pytest.mark.parametrize("entry", test_verl_token.ORACLES, ids=case_id)
def test_verl(entry: Entry) -> None:
    cfg = entry["config"]
    config = test_verl_token.step_of(entry).config
    given = renamed(cfg, VERL_NAMES) | {k: config[k] for k in ("loss_reduction", "norm_length") if k in config}
    want = GRPOLossConfig(**{"kl_loss_type": "low_var_kl"} | config)
    assert preset(f"verl/{cfg['loss_mode']}", **given) == want


@pytest.mark.parametrize("entry", records.entries("verl", "verl_gspo", "verl_geo_mean"), ids=case_id)
def test_verl_sequences(entry: Entry) -> None:
    cfg = entry["config"]
    given = {ours: cfg[theirs] for theirs, ours in list(VERL_NAMES.items())[:2]}
    want = GRPOLossConfig(**{"kl_loss_type": "low_var_kl"} | sequence.step_of(entry).config)
    assert preset(f"verl/{cfg['loss_mode']}", **given) == want


@pytest.mark.parametrize("entry", cov.COV, ids=case_id)
def test_verl_covariance(entry: Entry) -> None:
    cfg = entry["config"]
    given = {k: v for k, v in cfg["policy_loss"].items() if k != "loss_mode"}
    if cfg["loss_mode"] == "clip_cov":
        given |= {"cliprange_low": cfg["clip_ratio_low"], "cliprange_high": cfg["clip_ratio_high"]}
    found = preset(f"verl/{cfg['loss_mode']}", **given).policy_loss_cfg
    assert found == GRPOLossConfig(policy_loss_cfg={"loss_type": cfg["loss_mode"], **given}).policy_loss_cfg


# -- NeMo RL, slime, prime-rl, XTuner ----------------------------------------------------------------------------------

WITH_KL = [
    e
    for e in test_nemo.CASES
    if e["config"]["loss"]["reference_policy_kl_penalty"] and not e["config"]["loss"].get("use_kl_in_reward")
]


@pytest.mark.parametrize("entry", WITH_KL, ids=case_id)
def test_nemo_kl_and_clip(entry: Entry) -> None:
    nemo = entry["config"]["loss"]
    kl = test_nemo.kl_of(nemo)
    low, high = nemo["ratio_clip_min"], nemo["ratio_clip_max"]
    changed = {k: kl[k] for k in ("kl_loss_coef", "kl_loss_type", "kl_clamp_in", "kl_clamp_out")}
    if nemo.get("use_on_policy_kl_approximation"):
        changed |= {"kl_loss_grad": "unbiased", "kl_ratio_anchor": "rollout"}
    name = "cispo" if nemo.get("use_cispo") else "gspo" if nemo.get("sequence_level_importance_ratios") else "grpo"
    ours = preset(f"nemo/{name}", cliprange_low=low, cliprange_high=high, **changed)
    want = GRPOLossConfig(policy_loss_cfg=test_nemo.policy_of(nemo), **kl)
    assert {k: getattr(ours, k) for k in kl} == kl
    if name == "cispo":  # there as thresholds
        assert ours.policy_loss_cfg.ratio_bounds() == pytest.approx(want.policy_loss_cfg.ratio_bounds())
    else:
        assert ours.policy_loss_cfg == want.policy_loss_cfg


def test_nemo_distillation() -> None:
    want = DistillLossConfig(divergence="mixed", mixed_kl_weight=0.3, topk_mode="renormalized")
    assert preset("nemo/distillation", mixed_kl_weight=0.3) == want
    assert preset("nemo/draft") == DistillLossConfig(divergence="cross_entropy")


@pytest.mark.parametrize("entry", test_slime.CASES, ids=case_id)
def test_slime_policy(entry: Entry) -> None:
    args, config = entry["config"]["args"], test_slime.step_of(entry).config
    low, high = args.get("eps_clip", 0.2), args.get("eps_clip_high", 0.28)
    given = {"cliprange_low": low, "cliprange_high": high} | renamed(args, {"eps_clip_c": "dual_clip_c"})
    if args.get("use_rollout_logprobs"):
        given["anchor"] = "rollout"
    name = args.get("advantage_estimator", "grpo")
    assert preset(f"slime/{name}", **given).policy_loss_cfg == GRPOLossConfig(**config).policy_loss_cfg


@pytest.mark.parametrize("entry", test_prime.PLAIN, ids=case_id)
def test_prime_policy(entry: Entry) -> None:
    loss = entry["config"].get("loss", {})
    given = renamed(loss, {"dppo_mask_low": "delta_low", "dppo_mask_high": "delta_high", "kl_tau": "kl_tau"})
    if "ipo_threshold" in loss:
        given |= {"delta_low": loss["ipo_threshold"], "delta_high": loss["ipo_threshold"]}
    want = GRPOLossConfig(policy_loss_cfg=test_prime.policy_of(entry["config"]))
    assert preset(f"prime/{entry['config']['type']}", **given).policy_loss_cfg == want.policy_loss_cfg


@pytest.mark.parametrize("case", [c for c in cases("policy") if c.peer == "xtuner"], ids=lambda c: c.id)
def test_xtuner(case: Case) -> None:
    kl = {n: case.config[n] for n in ("use_kl_loss", "kl_loss_coef", "kl_loss_type") if n in case.config}
    want = GRPOLossConfig(**{"kl_loss_type": "low_var_kl", "policy_loss_cfg": case.policy} | kl)
    assert preset("xtuner/grpo", policy_loss_cfg=case.policy, **kl) == want


@pytest.mark.parametrize("entry", cov.OREAL, ids=case_id)
def test_xtuner_oreal(entry: Entry) -> None:
    own = set(OrealLossConfig.model_fields) - {"mode", "chunk_size"}
    given = {k: v for k, v in entry["config"].items() if k in own}
    assert preset("xtuner/oreal", **given) == OrealLossConfig(**{"kl_loss_type": "low_var_kl"} | given)


# -- Tinker: its formulas, run -----------------------------------------------------------------------------------------

TINKER = [c for c in cases("policy") if c.peer == "tinker"]


@pytest.mark.parametrize("run", ["chunk-f64", "chunk-f32"])
@pytest.mark.parametrize("case", TINKER, ids=lambda c: c.id)
def test_tinker(case: Case, run: str) -> None:
    """Sums, absolute thresholds, log-probs of the sampler as the old ones, and no clamp of the log-ratio."""
    name, theirs = case.config["loss_fn"], case.config
    given = renamed(theirs, {n: n for n in ("clip_low_threshold", "clip_high_threshold", "beta")})
    if "eps" in theirs:
        given |= {"clip_low_threshold": 1 - theirs["eps"], "clip_high_threshold": 1 + theirs["eps"]}
    items = [{"shifted_labels": b.labels, "advantages": b.advantages, "rollout_logprobs": b.old} for b in case.batches]
    config = preset(f"tinker/{name}", **given).model_dump()
    names = [f"grad_hidden_{b}" for b in range(len(case.hidden))]
    step = Step({k: config[k] for k in ("policy_loss_cfg", "loss_reduction")}, items, case.hidden, case.weight)
    step.names = names
    precision, found, _ = run_step(step, run)
    entry = next(e for e in records.index()["cases"] if e["id"] == case.id)
    assert not records.mismatches(entry, found, precision)
