"""Every loss there is, found by its registry: defaults, and each field moved off its default, one at a time."""

from __future__ import annotations

from functools import cache, partial
from itertools import product
from typing import Any, get_args

from tests.property.fields import Fields, moved, name_of, own_fields, valid
from tests.property.world import Case
from xloss import (
    BaseLossConfig,
    BaseLossContextInputItem,
    CELossConfig,
    CELossContextInputItem,
    DistillLossConfig,
    DistillLossContextInputItem,
    GRPOLossConfig,
    LogProbConfig,
    MTPLossConfig,
    MTPLossContextInputItem,
    OrealLossConfig,
    PreferenceLossConfig,
    PreferenceLossContextInputItem,
    RLLossContextInputItem,
    SoftCELossConfig,
    SoftCELossContextInputItem,
    ValueLossConfig,
)
from xloss.losses.policies import policy_losses
from xloss.losses.preferences import preference_losses
from xloss.losses.reduction import Reduction
from xloss.policy.divergence import DivergenceKind
from xloss.policy.kl import KLGrad, KLType
from xloss.policy.topk import TopKMode
from xloss.policy.value import ValueLossType
from xloss.policy.weights import Level

POLICY_FIELDS = ("temperature", "advantages", "old_logprobs", "ref_logprobs", "rollout_logprobs", "group_ids",
                 "rewards")  # fmt: skip


# -- policies ----------------------------------------------------------------------------------------------------------

TOGETHER: dict[str, list[Fields]] = {
    "clip_cov": [{"clip_cov_ratio": 1.0, "clip_cov_lb": 0.1}, {"clip_cov_ratio": 0.3, "clip_cov_lb": 0.1}],
    "cispo": [{"clip_high_threshold": 1.1}],
    "decoupled_ppo": [{"behave_high": 1.1}],
    "m2po": [{"cliprange_low": 0.2, "cliprange_high": 0.3}],
    "fipo": [{"weight_cliprange": 0.4, "weight_clip_high_only": False}],
}
"""Fields that make sense together only, or act on a small batch only with others."""


def policy_forms(name: str) -> list[Fields]:
    """A registered loss with its defaults, with fields that go together, and with each field moved."""
    cls = policy_losses()[name]
    bases = [cls.example, *(cls.example | more for more in TOGETHER.get(name, []))]
    found = [*bases, *(f for base in bases for f in moved(cls, base, cls, own_fields(cls)))]
    return [{"loss_type": name} | fields for fields in found]


def policy(form: Fields, fields: tuple[str, ...] = (*POLICY_FIELDS, "is_weights"), **step: Any) -> Case:
    """A policy loss in a step with nothing else."""
    make = partial(GRPOLossConfig, **({"policy_loss_cfg": form} | step))
    coupled = make().coupled_by()
    value = ("returns", "old_values") if step.get("value_loss") else ()
    forward = ("values",) if value else ()
    if make().full_kl:
        value, forward = (*value, "ref_hidden_states"), (*forward, "ref_head_weight", "ref_head_bias")
    by_place = form["loss_type"] == "clip_cov" and form.get("clip_cov_ratio") != 1.0  # draws tokens by their places
    return Case(make, RLLossContextInputItem, (*fields, *value), forward, "batch" in coupled, by_place)


POLICIES: dict[str, Case] = {name: policy(policy_forms(name)[0]) for name in policy_losses()}
VANILLA = policy_forms("vanilla")[0]


def kl_forms() -> dict[str, Case]:
    """Every estimator with every gradient, the exact one, and each other field of the penalty."""
    found: dict[str, Fields] = {f"{k}-{g}": {"kl_loss_type": k, "kl_loss_grad": g}
                                for k, g in product(get_args(KLType), get_args(KLGrad))}  # fmt: skip
    unbiased = {"kl_loss_type": "k3", "kl_loss_grad": "unbiased"}
    found |= {
        "full": {"kl_loss_type": "full"},
        "rollout": unbiased | {"kl_ratio_anchor": "rollout"},
        "sequence": unbiased | {"kl_ratio_level": "sequence"},
        "clamped": {"kl_loss_type": "k3", "kl_clamp_in": 0.4, "kl_clamp_out": 0.1},
        "through": {"kl_loss_type": "k3", "kl_clamp_in": 0.4, "kl_clamp_out": 0.1, "kl_clamp_straight_through": True},
        "weighted": unbiased | {"kl_clamp_out": 0.1, "kl_clamp_weighted": True},
    }
    return {n: policy(VANILLA, use_kl_loss=True, kl_loss_coef=0.3, **f) for n, f in found.items()}


def correction_forms() -> dict[str, Case]:
    """Corrections at every level and over sequences, formed where the batch is built and in the pass."""
    reject = [{"estimator": "k3", "over": "mean", "high": 0.3}]
    found: dict[str, Fields] = {
        f"{level}-{action}": {"level": level, "action": action, "low": 0.7, "high": 1.3}
        for level, action in product(get_args(Level), ("truncate", "mask", "both"))
    }
    found |= {"veto": {"veto_low": 0.4}, "reject": {"level": None, "reject": reject}}
    cases = {n: policy(VANILLA, rollout_correction=f) for n, f in found.items()}
    current = tuple(n for n in (*POLICY_FIELDS, "is_weights") if n != "old_logprobs")
    cases |= {f"{n}-in-pass": policy(VANILLA, current, rollout_correction=f) for n, f in found.items()}
    cases["bypass"] = policy(VANILLA, current, rollout_correction=found["token-both"] | {"bypass": True})
    for n, f in {"normalized": {"batch_normalize": True}, "renormalized": {"renormalize_rejected": True}}.items():
        cases[n] = policy(VANILLA, rollout_correction=found["geometric-both"] | f)
    return cases


EVERYTHING: Fields = {
    "use_kl_loss": True,
    "kl_loss_coef": 0.2,
    "kl_loss_type": "k3",
    "kl_loss_grad": "unbiased",
    "kl_ratio_level": "sequence",
    "entropy_coef": 0.1,
    "value_loss": {"loss_type": "huber", "value_clip": 0.3},
    "value_loss_coef": 0.5,
    "rollout_correction": {"level": "geometric", "action": "both", "low": 0.8, "high": 1.2, "veto_low": 0.3},
    "positive_nll_coef": 0.2,
    "opsm_delta": 0.05,
    "nonfinite": "drop",
}


def step_forms() -> dict[str, Case]:
    """A policy loss with each other term of the step, and with all of them."""
    found: dict[str, Fields] = {
        "entropy": {"entropy_coef": 0.1},
        "entropy-by-token": {"entropy_coef": 0.1, "loss_reduction": "sample", "entropy_reduction": "token"},
        "nll": {"positive_nll_coef": 0.3},
        "opsm": {"opsm_delta": 0.05},
        "top-entropy": {"top_entropy_quantile": 0.5, "entropy_coef": 0.1},
        "drop": {"nonfinite": "drop"},
        "everything": EVERYTHING,
        "everything-by-rank": EVERYTHING | {"top_entropy_quantile": 0.6},
        "everything-renormalized": EVERYTHING
        | {"rollout_correction": EVERYTHING["rollout_correction"] | {"renormalize_rejected": True}},
    }
    found |= {f"value-{n}": {"value_loss": ValueLossConfig(loss_type=n)} for n in get_args(ValueLossType)}
    cases = {n: policy(VANILLA, **f) for n, f in found.items()}
    cases["everything-gspo"] = policy({"loss_type": "gspo"}, **EVERYTHING)
    cases["everything-on-policy"] = policy(VANILLA, ("advantages", "ref_logprobs", "rollout_logprobs"), **EVERYTHING)
    cases["on-policy"] = policy(VANILLA, ("advantages",))
    base = {"policy_loss_cfg": VANILLA}
    for fields in moved(GRPOLossConfig, base, GRPOLossConfig, own_fields(GRPOLossConfig, BaseLossConfig)):
        more = {n: v for n, v in fields.items() if n not in base}
        cases[name_of(more)] = policy(VANILLA, **more)
    names = own_fields(OrealLossConfig, GRPOLossConfig)
    for fields in (base, *moved(OrealLossConfig, base, OrealLossConfig, names)):
        title = name_of({n: v for n, v in fields.items() if n not in base})
        cases[f"oreal-{title}"] = Case(partial(OrealLossConfig, **fields), RLLossContextInputItem, POLICY_FIELDS)
    return cases


REDUCTIONS: dict[str, Fields] = {n: {"loss_reduction": n} for n in get_args(Reduction)}
REDUCTIONS["sample_sum_norm"]["norm_length"] = 7.0
REDUCTIONS |= {f"{n}-empty": REDUCTIONS[n] | {"count_empty_sequences": True}
               for n in ("sample", "sample_sum", "sample_sum_norm")}  # fmt: skip


def reduction_forms() -> dict[str, Case]:
    """Every reduction of a loss of each token, of a sequence's, with everything beside, and of cross-entropy."""
    cases = {f"vanilla-{n}": policy(VANILLA, entropy_coef=0.1, **f) for n, f in REDUCTIONS.items()}
    cases |= {f"gspo-{n}": policy({"loss_type": "gspo"}, **f) for n, f in REDUCTIONS.items()}
    cases |= {f"everything-{n}": policy(VANILLA, **EVERYTHING, **f) for n, f in REDUCTIONS.items()}
    for n, f in REDUCTIONS.items():
        if n != "prompt":  # group_ids are of policy losses
            cases[f"ce-{n}"] = Case(partial(CELossConfig, **f), CELossContextInputItem, ("token_weight",))
            cases[f"soft-{n}"] = Case(partial(SoftCELossConfig, **f), SoftCELossContextInputItem, SOFT)
            cases[f"distill-{n}"] = distilled("logits", {}, **f)
    return cases


# -- the others --------------------------------------------------------------------------------------------------------

SOFT = ("temperature", "target_tokens", "target_weights")
SUPERVISED: dict[str, Fields] = {
    "plain": {},
    "smoothed": {"label_smoothing": 0.1},
    "chord": {"token_scaling": "chord_phi", "cutoff_prob": 0.4},
}


def supervised_forms() -> dict[str, Case]:
    """Cross-entropy and multi-token prediction with each field moved; K targets; with a weight for each class."""
    cases: dict[str, Case] = {}
    weighted = ("temperature", "token_weight")
    kinds: list[tuple[str, Any, Any, tuple[str, ...]]] = [
        ("ce", CELossConfig, CELossContextInputItem, weighted),
        ("mtp", MTPLossConfig, MTPLossContextInputItem, (*weighted, "rollout_logprobs")),
    ]
    for kind, cls, item, given in kinds:
        names = own_fields(cls, SoftCELossConfig)
        for title, base in SUPERVISED.items():
            cases[f"{kind}-{title}"] = Case(partial(cls, **base), item, given)
            for fields in moved(cls, base, cls, names):
                cases[f"{kind}-{name_of(fields)}"] = Case(partial(cls, **fields), item, given)
        classes = (*given, "class_weight")
        cases[f"{kind}-classes"] = Case(partial(cls, z_loss_coef=0.1), item, classes)
    cases["soft"] = Case(SoftCELossConfig, SoftCELossContextInputItem, SOFT)
    cases["logprob"] = Case(LogProbConfig, BaseLossContextInputItem, ("temperature",))
    return cases


TEACHERS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "head": (("teacher_hidden_states",), ("teacher_head_weight", "teacher_head_bias")),
    "logits": (("teacher_logits",), ()),
    "topk": (("teacher_topk_ids", "teacher_topk_logprobs"), ()),
}


def distilled(teacher: str, fields: Fields, **more: Any) -> Case:
    given, forward = TEACHERS[teacher]
    names = ("temperature", "token_weight", *given)
    return Case(partial(DistillLossConfig, **fields, **more), DistillLossContextInputItem, names, forward)


def distillation_forms() -> dict[str, Case]:
    """Every divergence from every teacher, and each field moved that a divergence or a top k reads."""
    cases: dict[str, Case] = {}
    names = own_fields(DistillLossConfig, SoftCELossConfig)
    for kind in get_args(DivergenceKind):
        for teacher in ("head", "logits"):
            cases[f"{kind}-{teacher}"] = distilled(teacher, {"divergence": kind})
        for fields in moved(DistillLossConfig, {"divergence": kind}, DistillLossConfig, names):
            (name,) = (fields.keys() - {"divergence"}) or ("divergence",)
            of_kind = name in ("beta", "mixed_kl_weight", "skew_lambda")
            if of_kind or (kind == "forward_kl" and name not in ("divergence", "topk_mode", "outside_logprob")):
                cases[name_of(fields)] = distilled("head", fields)
        for mode in get_args(TopKMode):
            base = {"divergence": kind, "topk_mode": mode}
            if not valid(DistillLossConfig, base):
                continue
            cases[f"{kind}-{mode}"] = distilled("topk", base)
            for fields in moved(DistillLossConfig, base, DistillLossConfig, ("outside_logprob", "log_prob_min_clamp")):
                cases[name_of(fields)] = distilled("topk", fields)
    cases["hard"] = distilled("head", {"hard_weight": 0.4, "t2_factor": True})
    return cases


def preference(terms: Any, **fields: Any) -> Case:
    make = partial(PreferenceLossConfig, **({"loss_type": terms} | fields))
    cfg = make()
    given = ["temperature", "preferred"] + (["pair_ids"] if cfg.paired else [])
    given += ["ref_logprobs"] if cfg.needs_reference else []
    given += sorted({n for t in cfg.loss_type for n in t.needs})
    ranks = any(str(t.loss_type).startswith("aot") for t in cfg.loss_type)
    return Case(make, PreferenceLossContextInputItem, tuple(given), by_rank=ranks)


@cache
def preference_forms() -> dict[str, Case]:
    """Every registered term with each of its fields moved, every field of the config, and several terms at once."""
    cases: dict[str, Case] = {}
    for name, cls in preference_losses().items():
        base = {"loss_type": name} | cls.example
        for fields in (base, *moved(cls, base, cls, own_fields(cls))):
            cases[name_of(fields)] = preference(fields)
    names = own_fields(PreferenceLossConfig, BaseLossConfig)
    for terms in ("sigmoid", "kto", ("sigmoid", "sft")):
        base = {"loss_type": terms}
        for fields in moved(PreferenceLossConfig, base, PreferenceLossConfig, names):
            if fields.get("layout") is None:  # pairs are given by number
                cases[name_of(fields)] = preference(terms, **{n: v for n, v in fields.items() if n != "loss_type"})
    cases["alpha"] = preference("sigmoid", f_divergence="alpha", f_alpha=0.3)
    cases["wpo"] = preference("sigmoid", use_weighting=True, max_weighting=0.7)
    return cases


PLAIN: dict[str, Case] = {
    **{f"policy-{n}": c for n, c in POLICIES.items()},
    **{f"preference-{n}": preference({"loss_type": n} | c.example) for n, c in preference_losses().items()},
    "ce": Case(CELossConfig, CELossContextInputItem, ("temperature", "token_weight")),
    "mtp": Case(MTPLossConfig, MTPLossContextInputItem, ("temperature", "token_weight")),
    "soft": Case(SoftCELossConfig, SoftCELossContextInputItem, SOFT),
    "logprob": Case(LogProbConfig, BaseLossContextInputItem, ("temperature",)),
    **{f"distill-{k}": distilled("head", {"divergence": k}) for k in get_args(DivergenceKind)},
    "distill-topk": distilled("topk", {"topk_mode": "tail"}),
    **{f"step-{n}": step_forms()[n] for n in ("oreal-default", "everything", "everything-gspo", "value-mse")},
    "step-full-kl": kl_forms()["full"],
}
"""One case of every loss."""


def every_case() -> dict[str, dict[str, Case]]:
    """Every loss with every option, by family: a registered policy loss is one."""
    found = {n: {name_of(form): policy(form) for form in policy_forms(n)} for n in policy_losses()}
    return found | {
        "kl": kl_forms(),
        "correction": correction_forms(),
        "step": step_forms(),
        "reduction": reduction_forms(),
        "supervised": supervised_forms(),
        "distillation": distillation_forms(),
        "preference": preference_forms(),
    }
