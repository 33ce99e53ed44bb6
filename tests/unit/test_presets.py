"""Catalog, presets and curves.

Contract: every loss that xloss registers says what it is, and the line that makes its config does. A preset has the
numbers of its source, builds, survives JSON, and trains; what is misspelt, missing or taken raises and says so. A curve
is the loss that trains, with the gradient that its paper gives.
"""

from __future__ import annotations

import json
import types
from typing import Any, ClassVar, Literal

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

import xloss
from tests import budgets
from xloss import (
    DistillLossConfig,
    GRPOLossConfig,
    MTPLossConfig,
    PolicyLossConfig,
    PreferenceLossConfig,
    PreferenceTerm,
    Preset,
    SoftCELossConfig,
    preset,
    presets,
    register_preset,
)
from xloss.errors import MissingFieldError, OptionError
from xloss.losses.catalog import CONFIGS, SYMBOLS, catalog, entry_at, entry_of
from xloss.losses.curves import Curve, at_shown
from xloss.losses.policies import policy_losses
from xloss.losses.preferences import preference_losses
from xloss.policy import surrogate
from xloss.policy.batch import PolicyBatch

REGISTERED = policy_losses() | preference_losses()
FOREIGN = {name for name, cls in REGISTERED.items() if not cls.__module__.startswith("xloss.")}  # of other tests
NAMES = [name for name in catalog() if name not in FOREIGN]


@pytest.mark.parametrize("name", NAMES)
def test_every_loss_says_what_it_is(name: str) -> None:
    entry = catalog()[name]
    assert entry.name == name and entry.family in SYMBOLS
    assert entry.formula and entry.source and len(entry.summary) > 10, entry
    assert entry.plan.startswith(("one-pass", "two-pass: ", "no head"))


def test_every_registered_loss_and_public_config_is_in_the_catalog() -> None:
    assert set(catalog()) >= set(policy_losses()) | set(preference_losses())
    assert len(NAMES) >= 74
    public = {getattr(xloss, name) for name in xloss.__all__ if name.endswith("LossConfig")}
    by_registry = {GRPOLossConfig, PreferenceLossConfig, PolicyLossConfig, xloss.ValueLossConfig, xloss.BaseLossConfig}
    assert public - by_registry == set(CONFIGS)


@pytest.mark.parametrize("name", [n for n in NAMES if catalog()[n].family != "value"])
def test_the_line_that_makes_the_config(name: str) -> None:
    config = eval(catalog()[name].use, vars(xloss).copy())
    assert entry_of(config).name == name
    assert type(config).model_validate_json(config.model_dump_json()) == config


def test_parameters_are_the_fields() -> None:
    by_name = {p.name: p for p in catalog()["simpo"].parameters}
    assert by_name["beta"].default == "2.0" and by_name["beta"].accepts == "float | None, above 0"
    assert by_name["label_smoothing"].accepts == "float | None, at least 0, below 1"
    vanilla = {p.name: p for p in catalog()["vanilla"].parameters}
    assert vanilla["cliprange_low"].default == "required" and "loss_type" not in vanilla
    jsd = {p.name: p.accepts for p in catalog()["jsd"].parameters}
    assert jsd["topk_mode"] == "full | renormalized | tail | None" and "mode" not in jsd


@pytest.mark.parametrize("name", presets())
def test_preset_builds(name: str) -> None:
    found = presets()[name]
    config = found.example()
    assert type(config) is found.config
    assert found.summary and found.source
    assert type(config).model_validate_json(config.model_dump_json()) == config
    json.dumps([dict(found.fields), dict(found.required)])
    if name in catalog():
        assert entry_of(config).name == name, "a preset with the name of another loss"


SECOND = {"loss_reduction": "sample", "count_empty_sequences": True}
NUMBERS: dict[str, dict[str, Any]] = {  # from the papers and the frameworks' own defaults
    "dapo": {"cliprange_low": 0.2, "cliprange_high": 0.28, "loss_reduction": "token", "dual_clip_c": None},
    "grpo": {"cliprange_low": 0.2, "cliprange_high": 0.2, "loss_reduction": "sample", "use_kl_loss": False},
    "gspo": {"cliprange_low": 3e-4, "cliprange_high": 4e-4, "loss_reduction": "sample"},
    "cispo": {"clip_low_threshold": 0.0, "clip_high_threshold": 5.0},
    "sapo": {"tau_pos": 1.0, "tau_neg": 1.05},
    "gmpo": {"cliprange_low": 0.4, "cliprange_high": 0.4},
    "luspo": {"cliprange_low": 2e-3, "cliprange_high": 2.5e-3},
    "vespo": {"k_pos": 2.0, "lambda_pos": 3.0, "k_neg": 3.0, "lambda_neg": 2.0},
    "dppo_tv": {"delta_low": 0.2, "delta_high": 0.2},
    "dppo_kl": {"delta_low": 0.05, "delta_high": 0.05},
    "clip_cov": {"clip_cov_ratio": 2e-4, "clip_cov_lb": 1.0, "clip_cov_ub": 5.0},
    "kl_cov": {"kl_cov_ratio": 2e-4, "ppo_kl_coef": 0.1},
    "m2po": {"m2_threshold": 0.04},
    "decoupled_ppo": {"behave_high": 5.0, "behave_low": None},
    "fipo": {"decay_rate": 32.0, "weight_cliprange": 0.2, "safety_threshold": 4.0, "weight_clip_high_only": True},
    "real": {"tau": 0.5, "loss_reduction": "prompt"},
    "a_star_po": {"beta": 1e-3},
    "kimi": {"tau": 0.1},
    "topr": {"positive_weight": 1.0, "negative_weight": 1.0},
    "z_loss": {"z_loss_coef": 1e-4},
    "focal": {"focal_gamma": 2.0},
    "tinker/ppo": {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2, "log_ratio_clamp": None}
    | {"loss_reduction": "sum", "dual_clip_c": None},
    "tinker/cispo": {"clip_low_threshold": 0.0, "clip_high_threshold": 4.0, "loss_reduction": "sum"},
    "tinker/dro": {"beta": 0.05, "loss_reduction": "sum"},
    "tinker/importance_sampling": {"log_ratio_clamp": None, "loss_reduction": "sum"},
    "tinker/cross_entropy": {"loss_reduction": "sum"},
    "trl/dapo": {"cliprange_low": 0.2, "cliprange_high": 0.2, "log_ratio_clamp": None, "loss_reduction": "token"},
    "trl/grpo": {**SECOND, "kl_loss_type": "k3", "kl_clamp_out": None, "use_kl_loss": False},
    "trl/dr_grpo": {"loss_reduction": "sample_sum_norm", "count_empty_sequences": True},
    "trl/ppo": {"value_loss_coef": 0.1, "cliprange_low": 0.2},
    "trl/gkd": {"beta": 0.5, "temperature": 0.9, "t2_factor": False},
    "verl/vanilla": {"cliprange_low": 0.2, "cliprange_high": 0.2, "dual_clip_c": 3.0, "log_ratio_clamp": 20.0},
    "verl/gspo": {"log_ratio_max": 10.0, "loss_reduction": "sample"},
    "verl/dppo_tv": {"ratio_cap": 3.0, "delta_low": 0.2},
    "verl/forward_kl_topk": {"log_prob_min_clamp": -10.0, "loss_max_clamp": 10.0, "topk_mode": "full"},
    "nemo/grpo": {"kl_loss_coef": 0.01, "use_kl_loss": True, "kl_loss_grad": "score_function", "kl_clamp_in": 20.0},
    "nemo/cispo": {"cliprange_low": 1.0, "cliprange_high": 5.0},
    "nemo/distillation": {"mixed_kl_weight": 0.5, "topk_mode": "renormalized"},
    "xtuner/grpo": {"clip_ratio_c": 3.0, "log_prob_diff_min": -20.0, "log_prob_diff_max": 20.0},
    "xtuner/oreal": {"positive_loss_factor": 1.0, "pos_sft_loss_weight": 1.0, "negative_loss_factor": 1.0},
    "slime/cispo": {"cliprange_low": 1.0, "cliprange_high": 4.0, "log_ratio_clamp": None},
    "slime/opsm": {"opsm_delta": 1e-4},
    "prime/default": {"delta_low": 0.2, "delta_high": 0.2, "kl_tau": 1e-3, "ratio_cap": None, "anchor": "rollout"},
    "prime/ipo": {"delta_low": 0.1, "delta_high": 0.1, "one_sided": False},
    "skyrl/cispo": {"cliprange_low": 1.0, "cliprange_high": 4.0, "kl_loss_coef": 0.001, "use_kl_loss": True},
    "skyrl/kl_cov": {"kl_cov_ratio": 0.2, "ppo_kl_coef": 1.0},
    "areal/m2po": {"trust_region_only": False, "moment_of": "old"},
    "roll/dual_clip": {"dual_clip_c": 1.4},
    "open_instruct/grpo": {"cliprange_low": 0.2, "cliprange_high": 0.272},
    "dpo": {"beta": 0.1, "average_log_prob": False},
    "nemo/dpo": {"beta": 0.05},
    "dpo_norm": {"beta": 5.0, "average_log_prob": True},
    "ipo": {"beta": 0.1, "average_log_prob": True},
    "openrlhf/ipo": {"average_log_prob": False},
    "exo": {"label_smoothing": 1e-3},
    "simpo": {"beta": 2.0, "gamma": 0.5, "nll_coef": 0.0},
    "trl/simpo": {"beta": 0.1, "gamma": 0.5, "nll_coef": 1.0},
    "cpo": {"nll_coef": 1.0, "beta": 0.1},
    "orpo": {"beta": 0.1},
    "kto": {"desirable_weight": 1.0, "undesirable_weight": 1.0, "beta": 0.1},
    "discopop": {"tau": 0.05},
}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers(name: str) -> None:
    config = presets()[name].example()
    held: list[Any] = [config]
    if isinstance(config, GRPOLossConfig):
        held.insert(0, config.policy_loss_cfg)
    elif isinstance(config, PreferenceLossConfig):
        held.insert(0, config.terms[0])
    found = {field: getattr(next(part for part in held if hasattr(part, field)), field) for field in NUMBERS[name]}
    assert found == NUMBERS[name]


def test_mpo_is_a_weighted_list() -> None:
    assert [(t.loss_type, t.weight) for t in preset("mpo").terms] == [("sigmoid", 0.8), ("bco_pair", 0.2), ("sft", 1.0)]


# -- presets train -----------------------------------------------------------------------------------------------------

CU = torch.tensor([0, 4, 8, 12, 16])


def item_of(config: Any) -> Any:
    """Four sequences of four tokens, two prompts, with everything a loss can ask for."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 30, (1, 16), generator=generator)
    labels[0, ::4] = -100

    def noise() -> Tensor:
        return -3.4 + 0.1 * torch.randn(1, 16, generator=generator)

    if isinstance(config, GRPOLossConfig):
        return xloss.RLLossContextInputItem(
            shifted_labels=labels,
            advantages=torch.tensor([1.0, -0.5, 0.7, -1.2]).repeat_interleave(4).unsqueeze(0),
            old_logprobs=noise(),
            rollout_logprobs=noise(),
            ref_logprobs=noise(),
            group_ids=torch.tensor([0, 0, 1, 1]).repeat_interleave(4).unsqueeze(0),
            rewards=torch.ones(1, 16),
            returns=noise(),
            old_values=noise(),
        )
    if isinstance(config, PreferenceLossConfig):
        paired = {} if config.paired else {"preferred": torch.tensor([True, False, True, False])}
        needs = {name for term in config.loss_type for name in term.needs}
        extra = {name: torch.zeros(()) for name in needs}
        ref = {"ref_logprobs": noise()} if config.needs_reference else {}
        return xloss.PreferenceLossContextInputItem(shifted_labels=labels, **ref, **paired, **extra)
    if isinstance(config, SoftCELossConfig):
        ids, weights = labels.unsqueeze(-1).expand(1, 16, 2).contiguous(), torch.full((1, 16, 2), 0.5)
        return xloss.SoftCELossContextInputItem(shifted_labels=labels, target_tokens=ids, target_weights=weights)
    if isinstance(config, DistillLossConfig):
        if config.topk_mode is None:
            given = {"teacher_logits": torch.randn(1, 16, 30, generator=generator)}
        else:
            top = torch.randn(1, 16, 30, generator=generator).log_softmax(-1).topk(5)
            given = {"teacher_topk_ids": top.indices, "teacher_topk_logprobs": top.values}
        return xloss.DistillLossContextInputItem(shifted_labels=labels, **given)
    if isinstance(config, MTPLossConfig):
        return xloss.MTPLossContextInputItem(shifted_labels=labels, rollout_logprobs=noise())
    return xloss.CELossContextInputItem(shifted_labels=labels)


@pytest.mark.parametrize("name", presets())
def test_preset_trains(name: str) -> None:
    """Chunked and eager give one loss and one gradient, finite and not 0."""
    config = presets()[name].example()
    found = []
    for mode in ("eager", "chunk"):
        cfg = config.model_copy(update={"mode": mode, "chunk_size": 5})
        (kwargs,) = cfg.loss_ctx_cls.build_batches_loss_kwargs([item_of(cfg)], cfg, cu_seq_lens_list=[CU])
        torch.manual_seed(1)
        hidden = (0.1 * torch.randn(1, 16, 6, dtype=torch.float64)).requires_grad_()
        weight = torch.randn(30, 6, dtype=torch.float64)
        critic = isinstance(cfg, GRPOLossConfig) and cfg.value_loss is not None
        more = {"values": torch.zeros(1, 16, requires_grad=True)} if critic else {}
        loss, _ = cfg.loss_ctx_cls(cfg, kwargs).forward(hidden, weight, **more)
        loss.backward()
        assert hidden.grad is not None
        found.append((loss.detach(), hidden.grad))
    (eager, of_eager), (chunked, of_chunked) = found
    assert eager.isfinite() and of_eager.isfinite().all() and of_eager.abs().sum() > 0
    torch.testing.assert_close(chunked.double(), eager.double(), rtol=budgets.FIGURE_F32, atol=budgets.FIGURE_WEIGHTED)
    torch.testing.assert_close(of_chunked, of_eager, rtol=budgets.FIGURE_F32, atol=budgets.FIGURE_WEIGHTED)


# -- overrides ---------------------------------------------------------------------------------------------------------


def test_overrides_reach_the_loss_inside() -> None:
    assert preset("dapo", cliprange_high=0.3, loss_reduction="sample") == GRPOLossConfig(
        policy_loss_cfg={"loss_type": "ppo", "cliprange_low": 0.2, "cliprange_high": 0.3}, loss_reduction="sample"
    )
    assert preset("dapo", policy_loss_cfg={"cliprange_high": 0.3}).policy_loss_cfg.cliprange_low == 0.2
    assert preset("simpo", gamma=1.6, beta=2.5).terms[0].gamma == 1.6
    assert preset("trl/dr_grpo", norm_length=512).norm_length == 512
    assert preset("kto", undesirable_weight=1.33).terms[0].undesirable_weight == 1.33


def test_another_loss_brings_its_own_numbers() -> None:
    found = preset("dapo", policy_loss_cfg={"loss_type": "cispo", "cliprange_high": 2.0}).policy_loss_cfg
    assert found == GRPOLossConfig(policy_loss_cfg={"loss_type": "cispo", "cliprange_high": 2.0}).policy_loss_cfg
    assert preset("dapo", policy_loss_cfg={"loss_type": "cispo"}, clip_high_threshold=3.0).policy_loss_cfg == (
        GRPOLossConfig(policy_loss_cfg={"loss_type": "cispo", "clip_high_threshold": 3.0}).policy_loss_cfg
    )


@pytest.mark.parametrize(
    ("name", "overrides", "error", "message"),
    [
        ("daop", {}, OptionError, "unknown preset 'daop'. Did you mean 'dapo'? presets() lists all."),
        ("trl/grop", {}, OptionError, "Did you mean 'trl/grpo'?"),
        ("dapo", {"cliprang_high": 1}, OptionError, "Did you mean 'cliprange_high'?"),
        ("dapo", {"loss_reductoin": 1}, OptionError, "Did you mean 'loss_reduction'?"),
        ("cross_entropy", {"label_smooting": 0.1}, OptionError, "Did you mean 'label_smoothing'?"),
        ("mpo", {"gamma": 0.1}, OptionError, "unknown field of preset 'mpo' 'gamma'"),
        ("dapo", {"cliprange_high": -1}, ValidationError, "cliprange_high"),
        ("tinker/ppo", {"cliprange_high": 0.3}, ValidationError, "not both"),
        ("dr_grpo", {}, MissingFieldError, "needs norm_length"),
        ("trl/exo_pair", {}, MissingFieldError, "needs label_smoothing"),
        ("areal/m2po", {}, MissingFieldError, "needs m2_threshold"),
    ],
)
def test_what_raises(name: str, overrides: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        preset(name, **overrides)
    assert message in str(caught.value)


# -- a loss of one's own -----------------------------------------------------------------------------------------------


class OwnConfig(PolicyLossConfig):
    """A loss of my own. More of it."""

    loss_type: Literal["own_for_presets"] = "own_for_presets"
    formula: ClassVar[str] = "-power r A"
    source: ClassVar[str] = "me"
    example: ClassVar[dict[str, Any]] = {"power": 2.0}
    power: float

    def per_token(self, batch: PolicyBatch) -> Tensor:
        return self.power * surrogate.importance_sampling(batch.logprobs, batch.old_logprobs, batch.advantages)


class OwnTerm(PreferenceTerm):
    """A preference of my own."""

    loss_type: Literal["own_term_for_presets"] = "own_term_for_presets"
    formula: ClassVar[str] = "-beta delta"
    source: ClassVar[str] = "me"

    def losses(self, batch: Any) -> Tensor:
        return -self.margin(batch)


class NamelessConfig(PolicyLossConfig):
    power: float

    def per_token(self, batch: PolicyBatch) -> Tensor:
        return -self.power * batch.logprobs


@pytest.fixture
def own_module(monkeypatch: pytest.MonkeyPatch) -> str:
    import sys

    module = types.ModuleType("own_losses_of_presets")
    for cls in (OwnConfig, OwnTerm, NamelessConfig):
        setattr(module, cls.__name__, cls)
        monkeypatch.setattr(cls, "__module__", module.__name__)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module.__name__


def test_own_losses_by_import_path(own_module: str) -> None:
    entry = entry_at(f"{own_module}.OwnConfig")
    assert (entry.name, entry.family, entry.summary) == ("own_for_presets", "policy", "A loss of my own.")
    assert (entry.formula, entry.source, entry.plan) == ("-power r A", "me", "one-pass")
    config = eval(entry.use, vars(xloss).copy())
    assert config.policy_loss_cfg == OwnConfig(power=2.0)
    curve = entry.curve()
    assert isinstance(curve, Curve)
    torch.testing.assert_close(curve.losses[0][1], -2 * curve.x)
    term = entry_at(f"{own_module}.OwnTerm")
    assert (term.name, term.family, term.formula) == ("own_term_for_presets", "preference", "-beta delta")
    assert isinstance(term.curve(), Curve)


def test_own_loss_without_facts(own_module: str) -> None:
    entry = entry_at(f"{own_module}.NamelessConfig")
    assert (entry.formula, entry.source) == ("", "")
    assert "example" in str(entry.curve()) and "no default" in entry.plan


@pytest.mark.parametrize(
    "path", ["nowhere.at.All", "xloss.Nothing", "xloss.preset", "xloss.PreferenceLossConfig", "a..b"]
)
def test_what_is_no_loss(path: str) -> None:
    with pytest.raises(OptionError, match=path):
        entry_at(path)


def test_own_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    from xloss.losses.presets import base

    monkeypatch.setattr(base, "_PRESETS", presets())
    policy = {"loss_type": "ppo", "cliprange_low": 0.1}
    mine = Preset("mine/tight", GRPOLossConfig, {"policy_loss_cfg": policy}, "a tight clip", "my runs")
    register_preset(mine)
    register_preset(mine)  # the same again, as when a module is loaded twice
    assert preset("mine/tight").policy_loss_cfg.cliprange_low == 0.1
    with pytest.raises(OptionError, match="exists already"):
        register_preset(Preset("dapo", GRPOLossConfig, {"policy_loss_cfg": policy}, "another", "me"))


# -- curves ------------------------------------------------------------------------------------------------------------


def gradients(name: str, x: float) -> list[float]:
    curve = entry_of(presets()[name].example()).curve()
    assert isinstance(curve, Curve)
    at = int((curve.x - x).abs().argmin())
    assert float(curve.x[at]) == pytest.approx(x, abs=budgets.FIGURE_F64), "not a shown point"
    return [float(y[at]) for _, y in curve.grads]


@pytest.mark.parametrize(
    ("name", "ratio", "want"),
    [  # d loss / d logprob for A = +1 and A = -1
        ("ppo", 1.5, [0.0, 1.5]),
        ("ppo", 0.5, [-0.5, 0.0]),
        ("verl/vanilla", 4.0, [0.0, 0.0]),
        ("cispo", 6.0, [-5.0, 5.0]),
        ("reinforce", 2.0, [-1.0, 1.0]),
        ("tis", 0.25, [-0.25, 0.25]),
        ("tis", 3.0, [-1.0, 1.0]),
        ("topr", 0.5, [-1.0, 0.5]),
        ("rollout_is", 1.5, [0.0, 0.0]),
        ("gspo", 1.0016, [0.0, 1.0016]),
        ("gspo", 0.9984, [-0.9984, 0.0]),
        ("prime/ipo", 1.0, [-1.0, 1.0]),
        ("trl/luspo", 1.01, [0.0, 1.01]),
        ("vespo", 1.0, [-1.0, 1.0]),
    ],
)
def test_policy_curves(name: str, ratio: float, want: list[float]) -> None:
    assert gradients(name, ratio) == pytest.approx(want, rel=budgets.FIGURE_F64, abs=budgets.FIGURE_SAME)


@pytest.mark.parametrize(
    ("name", "x", "want"),
    [
        ("cross_entropy", 0.25, [-0.75]),
        ("dft", 0.25, [-0.25 * 0.75]),
        ("chord_phi", 0.5, [-0.5 * 0.5 * 0.5]),
        ("label_smoothing", 0.5, [0.5 - 0.9 - 0.1 / 1000]),
        ("forward_kl", 0.3, [0.3 - 0.7]),
        ("dpo", 0.0, [-0.05, 0.05]),
        ("hinge", -10.0, [-0.1, 0.1]),
        ("simpo", 0.0, [-2 / (1 + 2.718281828459045**-0.5), 2 / (1 + 2.718281828459045**-0.5)]),
        ("kto", 0.0, [-0.025, 0.025]),
    ],
)
def test_other_curves(name: str, x: float, want: list[float]) -> None:
    assert gradients(name, x) == pytest.approx(want, rel=budgets.FIGURE_F64, abs=budgets.FIGURE_SAME)


@pytest.mark.parametrize("name", NAMES)
def test_curves_are_finite_or_say_why_not(name: str) -> None:
    curve = catalog()[name].curve()
    if isinstance(curve, str):
        assert len(curve) > 20
        return
    for _, y in (*curve.losses, *curve.grads):
        assert y.shape == curve.x.shape and y.isfinite().all() and not y.requires_grad
    assert at_shown(curve).x.tolist() == pytest.approx(list(curve.shown))


def test_which_losses_have_no_curve() -> None:
    none = {name for name in NAMES if isinstance(catalog()[name].curve(), str)}
    assert none == {"clip_cov", "kl_cov", "m2po", "real", "oreal", "sft", "soft_cross_entropy", "mtp", "cosine"}
