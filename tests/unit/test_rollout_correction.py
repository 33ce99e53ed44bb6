"""Contract: a rollout correction that contradicts itself, its loss or its batch is refused by name; XTuner's form is
the native one with its tuples turned round; figures of a built batch follow it through chunk, cat and to.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from tests.property.correction_problem import problem
from tests.property.test_rollout_correction import VANILLA, config, step
from xloss import GRPOLossConfig, RolloutCorrection, RolloutImportanceSampling, merge_metrics
from xloss.errors import MissingFieldError, OptionError, ShapeError


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"low": 1.5, "high": 1.2}, "low=1.5 is above high=1.2"),
        ({"action": "mask", "mask_low": 3.0}, "mask_low=3.0 is above mask_high=2.0"),
        ({"mask_low": 0.5}, "action='truncate' masks nothing"),
        ({"veto_low": 2.0, "veto_high": 1.0}, "veto_low=2.0 is above veto_high=1.0"),
        ({"level": None}, "corrects nothing"),
        ({"level": None, "high": 3.0, "veto_low": 0.1}, "level=None has no weights, but .'high'. are about weights"),
        ({"reject": [{"estimator": "k1"}]}, "needs low, high or both"),
        ({"reject": [{"estimator": "k1", "low": 1.0, "high": 0.0}]}, "low=1.0 is above high=0.0"),
        ({"upper": 2.0}, "unknown field of RolloutCorrection 'upper'"),
    ],
)
def test_refused_corrections(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        RolloutCorrection(**fields)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ({"loss_type": "decoupled_ppo"}, "DecoupledPPOConfig weighs by the sampler itself"),
        ({"loss_type": "ppo", "anchor": "rollout"}, "PPOConfig weighs by the sampler itself"),
        ({"loss_type": "vespo"}, "VESPOConfig folds is_weights into its formula"),
    ],
)
def test_refused_beside_a_policy_loss(policy: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        GRPOLossConfig(policy_loss_cfg=policy, rollout_correction={"high": 2.0})


@pytest.mark.parametrize(
    ("fields", "changed", "error", "message"),
    [
        ({"high": 2.0}, {"rollout_logprobs": None}, MissingFieldError, "rollout_logprobs is None"),
        ({"bypass": True}, {}, OptionError, "bypass takes rollout_logprobs as the old policy"),
        ({"batch_normalize": True}, {"old_logprobs": None}, OptionError, "batch_normalize needs the weights"),
        ({"renormalize_rejected": True}, {"old_logprobs": None}, OptionError, "renormalize_rejected needs the weights"),
    ],
)
def test_refused_batches(fields: dict[str, Any], changed: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        step(problem(0), config(fields), **changed)


@pytest.mark.parametrize("old", ["given", "current"])
def test_a_pack_needs_its_bounds(old: str) -> None:
    case = problem(0)
    case.cu_seq_lens = None  # type: ignore[assignment]
    changed = {} if old == "given" else {"old_logprobs": None}
    with pytest.raises(MissingFieldError, match="whole sequences"):
        step(case, config({"level": "sequence"}), **changed)


def test_xtuner_form() -> None:
    theirs = RolloutImportanceSampling(
        rollout_is_level="sequence",
        rollout_is_mode="both",
        rollout_is_threshold=(5.0, 0.0),
        rollout_is_mask_threshold=(4.0, 0.5),
        rollout_is_veto_threshold=(20.0, 0.0),
    )
    native = RolloutCorrection(
        level="sequence", action="both", low=0.0, high=5.0, mask_low=0.5, mask_high=4.0, veto_high=20.0,
        renormalize_rejected=True,
    )  # fmt: skip
    assert theirs.native() == native
    assert GRPOLossConfig(policy_loss_cfg=VANILLA, rollout_correction=theirs).rollout_correction == native
    assert RolloutImportanceSampling().native() is None
    assert (
        GRPOLossConfig.model_validate_json(
            GRPOLossConfig(policy_loss_cfg=VANILLA, rollout_correction=native).model_dump_json()
        ).rollout_correction
        == native
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rollout_is_threshold": (0.5, 2.0)}, r"\(upper, lower\), as in XTuner"),
        ({"rollout_is_veto_threshold": (2.0, 0.5)}, "needs rollout_is_threshold"),
    ],
)
def test_refused_xtuner_forms(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        RolloutImportanceSampling(**fields)


def test_xtuner_call_checks_lengths() -> None:
    row = torch.zeros(1, 5)
    with pytest.raises(ShapeError, match="num_tokens must add up to 5"):
        RolloutImportanceSampling().compute_rollout_importance_weights_and_metrics(
            row, row, torch.tensor([2, 2]), torch.ones(1, 5)
        )


def test_figures_follow_the_batch() -> None:
    cfg, case = config({"low": 0.8, "high": 1.2}), problem(0)
    first, second = cfg.loss_ctx_cls.build_batches_loss_kwargs(case.items(), cfg, cu_seq_lens_list=case.cu_seq_lens)

    def figures(*parts: Any) -> dict[str, float]:
        return {k: float(m.result()) for k, m in merge_metrics([p.built_metrics for p in parts]).items()}

    alone, both = figures(first), figures(first, second)
    assert "rollout_is_std" in alone and alone != both
    pieces = first.chunk(4)
    assert figures(*pieces) == alone
    assert figures(type(first).cat(pieces)) == alone
    assert figures(type(first).cat([first, second])) == both
    assert figures(first.to("cpu")) == alone


def test_old_logprobs_taken_out_after_the_batch_was_built() -> None:
    """Its weights are in the batch already; the pass would weigh a second time."""
    case = problem(0)
    cfg = GRPOLossConfig(policy_loss_cfg=VANILLA, rollout_correction={"level": "token"})
    kwargs = cfg.loss_ctx_cls.build_batches_loss_kwargs(case.items(), cfg, case.cu_seq_lens)[0]
    kwargs.old_logprobs = None
    with pytest.raises(OptionError, match="old_logprobs is None, but the batch was corrected by them"):
        cfg.loss_ctx_cls(cfg, kwargs).forward(case.hidden[0], case.weight)
