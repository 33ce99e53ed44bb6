"""Contract: rollout corrections are the definitions of `tests/oracle/correction.py`, weights, loss and gradients, in
every mode and plan; their laws hold; their metrics are those of the whole batch however it is cut.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests import budgets
from tests.oracle import correction as oracle
from tests.oracle import grpo, head
from tests.property.correction_problem import Problem, problem
from xloss import GRPOLossConfig, RolloutCorrection, finalize_metrics, merge_metrics
from xloss.losses.correction import correct
from xloss.packing import Segments
from xloss.policy import weights

VANILLA = {"loss_type": "vanilla", "cliprange_low": 0.2, "cliprange_high": 0.28}
CORRECTIONS: dict[str, dict[str, Any]] = {
    "token": {"high": None},
    "token truncate": {"low": 0.8, "high": 1.3},
    "token mask": {"action": "mask", "low": 0.7, "high": 1.5},
    "token both": {"action": "both", "low": 0.8, "high": 1.2, "mask_low": 0.6, "mask_high": 1.6},
    "sequence truncate": {"level": "sequence", "high": 1.4},
    "sequence mask": {"level": "sequence", "action": "mask", "low": 0.5, "high": 2.5},
    "geometric both": {"level": "geometric", "action": "both", "low": 0.95, "high": 1.05, "mask_low": 0.6},
    "veto": {"high": 3.0, "veto_low": 0.6},
    "veto both sides": {"level": "sequence", "high": 3.0, "veto_low": 0.5, "veto_high": 2.2},
    "normalised tokens": {"high": 1.5, "batch_normalize": True},
    "normalised icepop": {"action": "mask", "low": 0.7, "high": 1.5, "batch_normalize": True, "veto_low": 0.5},
    "normalised sequences": {"level": "sequence", "high": 2.0, "batch_normalize": True},
    "renormalised": {"action": "mask", "low": 0.7, "high": 1.5, "renormalize_rejected": True},
    "renormalised veto": {"level": None, "veto_low": 0.6, "renormalize_rejected": True},
} | {
    f"reject {over} {k}": {"level": None, "reject": [{"estimator": k, "over": over, "low": -0.3 if k == "k1" else None,
                                                     "high": 0.3 if over == "sum" else 0.12}]}
    for over in ("token", "sum", "mean", "max")
    for k in ("k1", "k2", "k3")
}  # fmt: skip
every_correction = pytest.mark.parametrize("fields", CORRECTIONS.values(), ids=CORRECTIONS)
RUNS = {
    "eager": {"mode": "eager"},
    "one_pass": {"mode": "chunk", "plan": "one_pass", "chunk_size": 4},
    "two_pass": {"mode": "chunk", "plan": "two_pass", "chunk_size": 4},
}


def config(fields: dict[str, Any] | None, **more: Any) -> GRPOLossConfig:
    return GRPOLossConfig(**({"policy_loss_cfg": VANILLA, "rollout_correction": fields} | more))


def step(case: Problem, cfg: GRPOLossConfig, **changed: Any) -> tuple[list[Tensor], list[Tensor], list[Any], list[Any]]:
    """Losses, gradients of all hidden states and the weight, kwargs and infos."""
    ctx = cfg.loss_ctx_cls
    kwargs = ctx.build_batches_loss_kwargs(case.items(**changed), cfg, cu_seq_lens_list=case.cu_seq_lens)
    leaves = [x.detach().clone().requires_grad_() for x in (*case.hidden, case.weight)]
    outs = [ctx(cfg, k).forward(h, leaves[-1]) for k, h in zip(kwargs, leaves[:-1], strict=True)]
    grads = torch.autograd.grad(torch.stack([loss for loss, _ in outs]).sum(), leaves)
    return [loss.detach() for loss, _ in outs], list(grads), kwargs, [info for _, info in outs]


def gold(
    case: Problem, fields: dict[str, Any], old: list[Tensor] | None = None
) -> tuple[list[Tensor], list[Tensor], Any]:
    """The same by the oracle: token mean of the PPO clip, with is_weights."""
    olds = [f["old_logprobs"] for f in case.fields] if old is None else old
    valid = [(y != -100).reshape(-1) for y in case.labels]
    parts = [
        (o.reshape(-1), f["rollout_logprobs"].reshape(-1), v, c.tolist())
        for o, f, v, c in zip(olds, case.fields, valid, case.cu_seq_lens, strict=True)
    ]
    found = oracle.step(parts, fields)
    counted = [v & c.kept if fields.get("renormalize_rejected") else v for v, c in zip(valid, found, strict=True)]
    total = sum(int(c.sum()) for c in counted)
    leaves = head.leaves(*case.hidden, case.weight)
    losses = []
    for h, y, f, o, c in zip(leaves[:-1], case.labels, case.fields, olds, found, strict=True):
        lp = head.token_stats(h, leaves[-1], y).logprobs.reshape(-1)
        at = c.kept.nonzero().flatten()
        policy = grpo.vanilla(lp[at], o.reshape(-1)[at].double(), f["advantages"].reshape(-1)[at].double(), VANILLA)
        losses.append((policy * c.weight[at] * f["is_weights"].reshape(-1)[at].double()).sum() / total)
    return losses, head.grads(torch.stack(losses).sum(), leaves), found


def assert_same(got: list[Tensor], want: list[Tensor], relative: float = budgets.F32_GRADIENT) -> None:
    """Calibrated weights are float32, so float32 rounding it is."""
    for i, (ours, theirs) in enumerate(zip(got, want, strict=True)):
        budgets.assert_relative(str(i), ours, theirs, relative)


@every_correction
@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_is_the_oracle(fields: dict[str, Any], run: dict[str, Any]) -> None:
    for seed, far in ((0, False), (1, True)):
        case = problem(seed, far=far)
        losses, grads, kwargs, _ = step(case, config(fields, **run))
        want_losses, want_grads, found = gold(case, fields)
        assert_same(losses, want_losses)
        assert_same(grads, want_grads)
        for k, c in zip(kwargs, found, strict=True):
            assert_same([k.rollout_weights.reshape(-1)], [c.weight * c.kept])


@every_correction
def test_float32(fields: dict[str, Any]) -> None:
    case = problem(2).to(torch.float32)
    losses, grads, _, _ = step(case, config(fields))
    want_losses, want_grads, _ = gold(case, fields)
    assert_same(losses, want_losses, 5 * budgets.F32_LOSS)
    assert_same(grads, want_grads, 5 * budgets.F32_GRADIENT)


IN_PASS = {
    name: fields
    for name, fields in CORRECTIONS.items()
    if not ({"batch_normalize", "renormalize_rejected"} & fields.keys())
}


@pytest.mark.parametrize("fields", IN_PASS.values(), ids=IN_PASS)
@pytest.mark.parametrize("mode", ["eager", "chunk"])
def test_without_old_logprobs_the_current_ones_stand_for_them(fields: dict[str, Any], mode: str) -> None:
    case = problem(3)
    losses, grads, _, infos = step(case, config(fields, mode=mode, chunk_size=4), old_logprobs=None)
    want_losses, want_grads, _ = gold(case, fields, old=case.current())
    assert_same(losses, want_losses)
    assert_same(grads, want_grads)
    alone = not RolloutCorrection(**fields).needs_sequences
    kinds = {"eager": "eager", "chunk": "one-pass" if alone else "two-pass"}
    assert {info.plan.kind for info in infos} == {kinds[mode]}


def test_bypass_takes_the_ratio_to_the_sampler() -> None:
    case = problem(4)
    fields = {"level": None, "reject": [{"estimator": "k2", "high": 0.1}]}
    sampled = [f["rollout_logprobs"] for f in case.fields]
    losses, _, _, infos = step(case, config(fields | {"bypass": True}), old_logprobs=None)
    parts = zip(case.current(), sampled, case.labels, case.cu_seq_lens, strict=True)
    masks = oracle.step(
        [(now.reshape(-1), s.reshape(-1), (y != -100).reshape(-1), c.tolist()) for now, s, y, c in parts], fields
    )
    total = sum(int((y != -100).sum()) for y in case.labels)
    for b, (loss, mask) in enumerate(zip(losses, masks, strict=True)):
        at, f = mask.kept.nonzero().flatten(), case.fields[b]
        lp, old = case.current()[b].reshape(-1)[at], sampled[b].reshape(-1)[at]
        policy = grpo.vanilla(lp, old, f["advantages"].reshape(-1)[at], VANILLA) * f["is_weights"].reshape(-1)[at]
        assert_same([loss], [policy.sum() / total])
    assert all(0 < float(info.metrics["rollout_is_mask_frac"].result()) < 1 for info in infos)


# -- laws --------------------------------------------------------------------------------------------------------------


@every_correction
def test_no_mismatch_changes_nothing(fields: dict[str, Any]) -> None:
    case = problem(5, spread=0.0)
    plain = step(case, config(None))
    got = step(case, config(fields))
    assert_same(got[0], plain[0])
    assert_same(got[1], plain[1])


def test_levels_agree_on_sequences_of_one_token() -> None:
    x = torch.randn(7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    alone = Segments.of(torch.arange(8), torch.ones(7, dtype=torch.bool))
    token, *others = (weights.importance_weight(x, level, alone) for level in ("token", "sequence", "geometric"))
    for other in others:
        torch.testing.assert_close(other, token, rtol=0, atol=0)


def test_open_truncation_is_plain_importance_sampling() -> None:
    case = problem(6)
    got = step(case, config({"high": None}))
    ratios = [torch.exp(f["old_logprobs"] - f["rollout_logprobs"]) * f["is_weights"] for f in case.fields]
    for f, ratio in zip(case.fields, ratios, strict=True):
        f["is_weights"] = ratio
    want = step(case, config(None))
    assert_same(got[0], want[0])
    assert_same(got[1], want[1])


@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
def test_normalised_weights_average_1(level: str) -> None:
    case = problem(7)
    _, _, kwargs, _ = step(case, config({"level": level, "high": 1.4, "batch_normalize": True}))
    values = []
    for k, bounds in zip(kwargs, case.cu_seq_lens, strict=True):
        w, valid = k.rollout_weights.reshape(-1), (k.shifted_labels != -100).reshape(-1)
        groups = oracle.sequences(valid, bounds.tolist())
        values += [float(w[t]) for s in groups for t in (s if level == "token" else s[:1])]
    assert sum(values) / len(values) == pytest.approx(1.0, rel=budgets.FIGURE_F32)


def test_kl_and_entropy_are_not_weighed() -> None:
    """A correction that rejects everything leaves KL and entropy as they are."""
    case = problem(8)
    terms = {"use_kl_loss": True, "kl_loss_type": "k3", "kl_loss_coef": 0.1, "entropy_coef": 0.01}
    nothing = {"level": None, "reject": [{"estimator": "k2", "high": -1.0}]}
    got = step(case, config(nothing, **terms))
    for f in case.fields:
        f["is_weights"] = torch.zeros_like(f["is_weights"])
    want = step(case, config(None, **terms))
    assert_same(got[1], want[1])


def test_rejected_tokens_cost_nothing() -> None:
    """Without KL and entropy a rejected token does not reach the head, and the plan stays one-pass."""
    case = problem(9)
    _, _, kwargs, infos = step(case, config({"level": "sequence", "action": "mask", "low": 0.9, "high": 1.1}))
    for k, info in zip(kwargs, infos, strict=True):
        assert info.plan.kind == "one-pass"
        assert info.plan.num_live == int((k.rollout_weights != 0).sum())


def test_metrics_do_not_depend_on_the_cut() -> None:
    case = problem(10)
    cfg = config({"level": "geometric", "action": "both", "low": 0.9, "high": 1.1, "veto_low": 0.4})
    _, _, kwargs, infos = step(case, cfg)
    merged = {k: float(m.result()) for k, m in merge_metrics([i.metrics for i in infos]).items()}
    assert merged == {k: float(x) for k, x in finalize_metrics([i.metrics for i in infos]).items()}
    x, raw = [], []
    for f, y, bounds in zip(case.fields, case.labels, case.cu_seq_lens, strict=True):
        valid = (y != -100).reshape(-1)
        found = correct(
            cfg.rollout_correction, (f["old_logprobs"] - f["rollout_logprobs"]).reshape(-1), valid,
            Segments.of(bounds, valid),
        )  # fmt: skip
        x.append(found.log_ratio[valid])
        raw.append(found.raw[valid])
    flat, clamped = torch.cat(x), torch.cat(raw).clamp(0.9, 1.1)
    want = {
        "mismatch_k1": -flat.mean(),
        "mismatch_k3": (flat.exp() - flat - 1).mean(),
        "mismatch_abs": flat.abs().mean(),
        "mismatch_chi2": ((2 * flat).exp() - 1).mean(),
        "rollout_is_mean": torch.cat(raw).mean(),
        "rollout_is_min": torch.cat(raw).min(),
        "rollout_is_max": torch.cat(raw).max(),
        "rollout_is_std": clamped.std(correction=0),
        "rollout_is_ess": clamped.mean() ** 2 / clamped.square().mean(),
        "rollout_is_clip_frac": (torch.cat(raw) != clamped).double().mean(),
    }
    for name, value in want.items():
        assert merged[name] == pytest.approx(float(value), rel=budgets.FIGURE_F32_CHAIN), name
    assert kwargs[0].cat([kwargs[0], kwargs[1]]).built_metrics.keys() == kwargs[0].built_metrics.keys()


def test_padded_rows_are_sequences() -> None:
    """[B, S] and the same rows packed give one loss."""
    case = problem(11)
    packed = [t[:, :12].reshape(-1) for t in (case.labels[0], *case.fields[0].values())]
    h = case.hidden[0][:, :12]
    cfg = config({"level": "sequence", "high": 1.5, "veto_low": 0.3})
    names = ["shifted_labels", *case.fields[0]]
    losses = []
    for shape, bounds in (((3, 4), None), ((1, 12), [torch.tensor([0, 4, 8, 12])])):
        item = case.items()[0].replaced({n: v.reshape(shape) for n, v in zip(names, packed, strict=True)})
        (kwargs,) = cfg.loss_ctx_cls.build_batches_loss_kwargs([item], cfg, cu_seq_lens_list=bounds)
        losses.append(cfg.loss_ctx_cls(cfg, kwargs).forward(h.reshape(*shape, -1), case.weight)[0])
    assert_same(losses[:1], losses[1:])


@pytest.mark.parametrize("dropped", [0, 2])
@pytest.mark.parametrize("policy", [VANILLA, {"loss_type": "gspo", "cliprange_low": 0.1, "cliprange_high": 0.1}])
def test_renormalised_tokens_leave_the_batch(policy: dict[str, Any], dropped: int) -> None:
    """As if their label were ignored, in sums over sequences, KL and entropy too; dropped ones stay in denominators."""
    case, without = problem(12), problem(12)
    terms = {"policy_loss_cfg": policy, "use_kl_loss": True, "kl_loss_type": "k3", "entropy_coef": 0.01}
    for c, value in ((case, torch.inf), (without, 0.0)):
        at = (c.labels[1] != -100).nonzero()[:dropped, 1]
        c.fields[1]["old_logprobs"][0, at] = value
    mask = {"action": "mask", "low": 0.8, "high": 1.3, "renormalize_rejected": True}
    losses, grads, kwargs, _ = step(case, config(mask, nonfinite="drop", **terms))
    for y, k in zip(without.labels, kwargs, strict=True):
        y[~k.loss_mask] = -100
    left = sum(int((y != -100).sum()) for y in without.labels)
    want_losses, want_grads, _, _ = step(without, config({"high": None}, **terms))
    factor = left / (left + dropped)
    assert 0 < left < sum(int((y != -100).sum()) for y in case.labels) - dropped, "some are rejected"
    assert_same(losses, [x * factor for x in want_losses])
    assert_same(grads, [x * factor for x in want_grads])
