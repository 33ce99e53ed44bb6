"""Contract: policy losses of xloss registered with verl give verl's own losses, gradients and figures, under every
``loss_agg_mode`` and whatever counts of the global batch it knows; xloss's head behind ``use_fused_kernels`` gives
verl's log-probs, entropies and gradients. What cannot be honoured raises.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import budgets
from tests.integrations.comparisons import Comparison, worst
from tests.integrations.packages import need

need("verl")

from verl.trainer.ppo import core_algos  # noqa: E402
from verl.utils.experimental import torch_functional  # noqa: E402
from verl.workers.config import ActorConfig, PolicyLossConfig  # noqa: E402

from xloss import GRPOLossConfig, preset  # noqa: E402
from xloss.adapters import verl as adapter  # noqa: E402
from xloss.errors import MissingFieldError, OptionError, UnsupportedError  # noqa: E402

B, S = 5, 9
AGG_MODES = list(adapter.REDUCTIONS)
GLOBAL = {"dp_size": 4, "batch_num_tokens": 117, "global_batch_size": 21, "loss_scale_factor": 32}
PARTS: dict[str, Any] = {"one process": {}, "of a global batch": GLOBAL}
MODES = ["vanilla", "gspo", "gpg", "kl_cov", "dro", "cispo", "dppo_tv", "dppo_kl"]
ONE_REDUCTION = ["sapo", "geo_mean"]  # verl reduces these its own way whatever loss_agg_mode is


def actor(counts: dict[str, Any]) -> Any:
    numbers = PolicyLossConfig(dro_beta=0.3, kl_cov_ratio=0.2)
    found = ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, policy_loss=numbers)
    found.global_batch_info.update(counts)
    return found


def ours(mode: str) -> GRPOLossConfig:
    """The preset with verl's defaults for its clip range and the numbers of ``actor``."""
    if mode == "dro":
        return GRPOLossConfig(policy_loss_cfg={"loss_type": "dro", "beta": 0.3})
    changed: dict[str, Any] = {"gspo": {"cliprange_low": 0.2, "cliprange_high": 0.2}, "kl_cov": {"kl_cov_ratio": 0.2}}
    found = preset(f"verl/{mode}", **changed.get(mode, {}))
    assert isinstance(found, GRPOLossConfig)
    return GRPOLossConfig(policy_loss_cfg=found.policy_loss_cfg)


def batch(empty_row: bool = True, weights: bool = True) -> dict[str, Any]:
    """Ratios on both sides of every bound, holes in the mask, a row without a token."""
    gen = torch.Generator().manual_seed(11)

    def drawn() -> Tensor:
        return torch.randn(B, S, dtype=torch.float64, generator=gen)

    mask = torch.rand(B, S, generator=gen) > 0.3
    if empty_row:
        mask[2] = False
    log_prob = -drawn().abs() - 0.1
    return {
        "old_log_prob": log_prob + drawn() * 0.4,
        "log_prob": log_prob.requires_grad_(),
        "advantages": drawn(),
        "response_mask": mask,
        "rollout_is_weights": drawn().abs() if weights else None,
    }


def both(mode: str, agg: str, counts: dict[str, Any], **how: bool) -> list[tuple[Tensor, Tensor, dict[str, Any]]]:
    """Loss, gradient and metrics: verl's, then ours."""
    data, found = batch(**how), []
    for fn in (core_algos.get_policy_loss_fn(mode), adapter.policy_loss(ours(mode))):
        loss, metrics = fn(**data, loss_agg_mode=agg, config=actor(counts))
        (grad,) = torch.autograd.grad(loss, data["log_prob"])
        found.append((loss.detach(), grad, metrics))
    return found


def assert_same(found: list[tuple[Tensor, Tensor, dict[str, Any]]]) -> None:
    theirs, mine = found
    budgets.assert_relative("loss", mine[0], theirs[0], budgets.F64_STEP)
    budgets.assert_relative("gradient", mine[1], theirs[1], budgets.F64_STEP)
    assert not mine[1][~batch()["response_mask"]].any()


@pytest.mark.parametrize("counts", PARTS)
@pytest.mark.parametrize("agg", AGG_MODES)
@pytest.mark.parametrize("mode", MODES)
def test_losses_and_gradients(mode: str, agg: str, counts: str) -> None:
    assert_same(both(mode, agg, PARTS[counts]))


@pytest.mark.parametrize("mode", MODES)
def test_without_rollout_weights(mode: str) -> None:
    assert_same(both(mode, "token-mean", {}, weights=False))


def test_sapo_is_reduced_by_sequences() -> None:
    assert_same(both("sapo", "seq-mean-token-mean", GLOBAL))


def test_geo_mean_is_a_mean_over_rows() -> None:
    assert_same(
        [
            (x, g * batch()["response_mask"], m)
            for x, g, m in both("geo_mean", "seq-mean-token-mean", {}, empty_row=False)
        ]
    )


def test_figures_have_verls_names() -> None:
    (_, _, theirs), (_, _, mine) = both("vanilla", "token-mean", {})
    assert theirs.keys() <= mine.keys()
    for name, value in theirs.items():
        assert mine[name] == pytest.approx(value, rel=budgets.F64_STEP)
    assert all(isinstance(v, float) and name.startswith(("actor/", "rollout_corr/")) for name, v in mine.items())


def test_micro_batches_add_up_to_the_batch() -> None:
    """Without the counts, each is a mean of its own; with them, parts of one number."""
    data = batch()
    counts = {"dp_size": 1, "batch_num_tokens": int(data["response_mask"].sum()), "global_batch_size": B - 1}
    fn = adapter.policy_loss(ours("gspo"))
    for agg in AGG_MODES:
        whole, _ = fn(**data, loss_agg_mode=agg, config=actor(counts))
        parts = [
            fn(**{k: v[i : i + 1] for k, v in data.items()}, loss_agg_mode=agg, config=actor(counts))[0]
            for i in range(B)
        ]
        budgets.assert_relative(agg, torch.stack(parts).sum(), whole, budgets.F64_STEP)


def test_all_masked_is_zero_with_a_gradient_of_zero() -> None:
    data = batch() | {"response_mask": torch.zeros(B, S, dtype=torch.bool)}
    for agg in AGG_MODES:
        loss, _ = adapter.policy_loss(ours("vanilla"))(**data, loss_agg_mode=agg, config=actor(GLOBAL))
        (grad,) = torch.autograd.grad(loss, data["log_prob"])
        assert float(loss.detach()) == 0 and not grad.any()


def test_registered_under_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core_algos, "POLICY_LOSS_REGISTRY", dict(core_algos.POLICY_LOSS_REGISTRY))
    adapter.register("xloss_test", ours("cispo"))
    loss, _ = core_algos.get_policy_loss_fn("xloss_test")(**batch(), loss_agg_mode="token-mean", config=actor({}))
    assert torch.isfinite(loss)
    with pytest.raises(OptionError, match="'xloss_test' already"):
        adapter.register("xloss_test", ours("cispo"))


@pytest.mark.parametrize(
    "fields, error, says",
    [
        ({"use_kl_loss": True, "kl_loss_type": "k3"}, OptionError, "actor.use_kl_loss"),
        ({"entropy_coef": 0.1}, OptionError, "actor.entropy_coeff"),
        ({"temperature": 0.7}, OptionError, "about the head"),
        ({"chunk_size": 7}, OptionError, "about the head"),
        ({"positive_nll_coef": 0.1}, UnsupportedError, "denominator of its own"),
        ({"value_loss": {"value_clip": 0.2}}, UnsupportedError, "denominator of its own"),
    ],
)
def test_what_verl_does_itself_raises(fields: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        adapter.policy_loss(GRPOLossConfig(policy_loss_cfg={"loss_type": "ppo"}, **fields))


def test_reductions_must_agree() -> None:
    fn = adapter.policy_loss(GRPOLossConfig(policy_loss_cfg={"loss_type": "ppo"}, loss_reduction="sample"))
    fn(**batch(), loss_agg_mode="seq-mean-token-mean", config=actor({}))
    with pytest.raises(OptionError, match=r"loss_reduction='sample'.*'token'"):
        fn(**batch(), loss_agg_mode="token-mean", config=actor({}))
    with pytest.raises(OptionError, match="Did you mean 'token-mean'"):
        fn(**batch(), loss_agg_mode="token-maen", config=actor({}))
    with pytest.raises(MissingFieldError, match="batch_num_tokens"):
        adapter.policy_loss(ours("vanilla"))(**batch(), loss_agg_mode="token-mean", config=actor({"dp_size": 2}))
    with pytest.raises(OptionError, match="count_empty_sequences"):
        adapter.policy_loss(preset("verl/geo_mean"))(**batch(), loss_agg_mode="seq-mean-token-mean", config=actor({}))  # type: ignore[arg-type]


# -- the head behind use_fused_kernels ------------------------------------------------------------------------------


@pytest.fixture
def xloss_head(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_functional, "FusedLinearForPPO", torch_functional.FusedLinearForPPO)
    adapter.use_xloss_head()


def through_model(seed: int = 0) -> dict[str, Tensor]:
    """Log-probs, entropies and gradients of a tiny model that verl has patched."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from verl.models.transformers.monkey_patch import patch_forward_with_backends

    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    forward = LlamaForCausalLM.forward
    model = LlamaForCausalLM(LlamaConfig(vocab_size=61, **sizes))
    try:
        patch_forward_with_backends(model, use_fused_kernels=True, fused_kernels_backend="torch")
        ids = torch.randint(61, (2, 7))
        out = model(input_ids=ids, temperature=0.7, return_dict=True)
    finally:
        LlamaForCausalLM.forward = forward  # verl patches the class
    upstream = torch.randn(2, 2, 7)
    ((out.log_probs * upstream[0]).sum() + (out.entropy * upstream[1]).sum()).backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"log_probs": out.log_probs.detach(), "entropy": out.entropy.detach(), **grads}


def head_difference() -> float:
    theirs = through_model()
    before = torch_functional.FusedLinearForPPO
    try:
        adapter.use_xloss_head()
        return worst(through_model(), theirs)
    finally:
        torch_functional.FusedLinearForPPO = before


def test_head_behind_fused_kernels(xloss_head: None) -> None:
    assert torch_functional.FusedLinearForPPO is adapter.LinearForPPO
    with pytest.raises(OptionError, match="'liger'"):
        adapter.LinearForPPO(impl_backend="liger")


def loss_difference(mode: str) -> float:
    theirs, mine = both(mode, "seq-mean-token-mean", GLOBAL)
    return worst({"log_prob": mine[1]}, {"log_prob": theirs[1]})


ADAPTER = "xloss.adapters.verl"
COMPARISONS = [
    *(
        Comparison(ADAPTER, "verl", f"loss_mode in float64, {mode}", partial(loss_difference, mode))
        for mode in [*MODES, "sapo"]
    ),
    Comparison(ADAPTER, "verl", "use_fused_kernels on a tiny Llama in float32", head_difference),
]


@pytest.mark.parametrize("comparison", COMPARISONS, ids=lambda c: c.what)
def test_table(comparison: Comparison) -> None:
    assert comparison.run() <= (budgets.FLOAT32_FLOOR if "float32" in comparison.what else budgets.F64_STEP)
