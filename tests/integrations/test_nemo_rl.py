"""Contract: a config of xloss behind NeMo RL's loss protocol gives what NeMo RL's own loss functions were recorded to
give (values, and gradients in the log-probs), divides by the counts that NeMo RL hands in and by nothing of its own,
and tells of every figure what it was divided by. The protocol alone: the package is not installable, so its enums are
restated in ``nemo_protocol`` and its numbers come from ``tests/golden``.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests import budgets
from tests.docs.test_readme_and_docs import run_page
from tests.golden import records
from tests.golden.test_nemo import correction_of, kl_of, policy_of
from tests.integrations.nemo_protocol import LossInputType, LossType, MetricNormalizer, call, in_token_frame, nemo_rl
from tests.integrations.page import sections
from xloss import CELossConfig, GRPOLossConfig, PreferenceLossConfig, preset
from xloss.adapters.nemo_rl import NemoLoss
from xloss.errors import MissingFieldError, OptionError, ShapeError, UnsupportedError

__all__ = ["nemo_rl"]  # the fixture
pytestmark = pytest.mark.usefixtures("nemo_rl")

POLICY = records.entries("nemo", "nemo_clipped_pg")
VAPO = [e for e in POLICY if e["config"]["loss"].get("positive_example_nll_weight")]


def recorded_data(entry: records.Entry) -> tuple[dict[str, Any], Tensor, dict[str, float]]:
    """NeMo RL's batch, log-probs with gradient, and the counts of the case."""
    theirs, given = entry["config"], records.tensors(entry["inputs"])
    sample_mask = torch.ones(given["labels"].shape[0])
    sample_mask[theirs.get("sample_mask_drop", [])] = 0
    mask = (given["labels"] != -100).double()
    data = {
        "input_ids": in_token_frame(given["labels"].clamp(min=0)),
        "token_mask": in_token_frame(mask),
        "sample_mask": sample_mask,
        "reference_policy_logprobs": in_token_frame(given["ref_logps"].double()),
    }
    if "old_logps" in given:
        data |= {
            "advantages": in_token_frame(given[theirs.get("adv", "adv_seq_tok")].double()),
            "prev_logprobs": in_token_frame(given["old_logps"].double()),
            "generation_logprobs": in_token_frame(given["rollout_logps"].double()),
        }
    counts = {
        "global_valid_seqs": torch.tensor(theirs.get("global_valid_seqs", float(sample_mask.sum()))),
        "global_valid_toks": torch.tensor(theirs.get("global_valid_toks", float((mask * sample_mask[:, None]).sum()))),
    }
    return data, given["cur_logps_f64"].clone().requires_grad_(), counts


def assert_as_recorded(entry: records.Entry, loss: Tensor, logprobs: Tensor) -> None:
    want = records.tensors(entry["file"])
    (grad,) = torch.autograd.grad(loss, logprobs)
    budgets.assert_relative("loss", loss.detach(), want["loss"][0], budgets.F64_STEP)
    budgets.assert_relative("d loss / d logprobs", grad, want["dtap_logps"], budgets.F64_STEP)


def clipped_pg(entry: records.Entry) -> GRPOLossConfig:
    nemo = entry["config"]["loss"]
    return GRPOLossConfig(
        policy_loss_cfg=policy_of(nemo),
        rollout_correction=correction_of(nemo),
        positive_nll_coef=nemo.get("positive_example_nll_weight", 0.0),
        loss_reduction="token" if nemo.get("token_level_loss", True) else "sample",
        **kl_of(nemo),
    )


@pytest.mark.parametrize("entry", [e for e in POLICY if e not in VAPO], ids=records.case_id)
def test_clipped_pg_as_recorded(entry: records.Entry) -> None:
    nemo = entry["config"]["loss"]
    loss_fn = NemoLoss(clipped_pg(entry))
    by_token = nemo.get("token_level_loss", True)
    assert loss_fn.loss_type is (LossType.TOKEN_LEVEL if by_token else LossType.SEQUENCE_LEVEL)
    assert loss_fn.input_type is LossInputType.LOGPROB
    data, logprobs, counts = recorded_data(entry)
    if nemo.get("force_on_policy_ratio"):
        del data["prev_logprobs"]
    loss, metrics = loss_fn(data=data, next_token_logprobs=logprobs, **counts)
    assert_as_recorded(entry, loss, logprobs)
    assert metrics["loss"] == pytest.approx(float(loss.detach()))
    assert metrics.keys() <= loss_fn.metric_normalizations.keys()


@pytest.mark.parametrize("entry", records.entries("nemo", "nemo_nll"), ids=records.case_id)
def test_nll_as_recorded(entry: records.Entry) -> None:
    data, logprobs, counts = recorded_data(entry)
    loss, _ = NemoLoss(CELossConfig())(data=data, next_token_logprobs=logprobs, **counts)
    assert_as_recorded(entry, loss, logprobs)


@pytest.mark.parametrize("entry", records.entries("nemo", "dpo_sigmoid"), ids=records.case_id)
def test_dpo_as_recorded(entry: records.Entry) -> None:
    """Chosen and rejected in turn; the reference in the frame of predictions; divided by half the sequences."""
    nemo, given = entry["config"]["loss"], records.tensors(entry["inputs"])
    average = nemo.get("preference_average_log_probs", False)
    terms: list[dict[str, Any]] = [
        {"loss_type": "sigmoid_norm" if average else "sigmoid", "weight": nemo.get("preference_loss_weight", 1.0)}
    ]
    if nemo.get("sft_loss_weight"):
        terms.append({"loss_type": "sft", "weight": nemo["sft_loss_weight"]})
    average_sft = nemo.get("sft_average_log_probs", False)
    likelihood: Any = {"nll_reduction": "sample" if average_sft else "sample_sum"} if len(terms) > 1 else {}
    config = PreferenceLossConfig(
        loss_type=terms,
        beta=nemo["reference_policy_kl_penalty"],
        **likelihood,
    )
    rows = given["labels"].shape[0]
    turns = torch.arange(rows).view(2, rows // 2).T.flatten()  # chosen, rejected, chosen, ...
    labels = given["labels"][turns]
    ref = given["ref_logps"][turns].double()
    data = {
        "input_ids": in_token_frame(labels.clamp(min=0)),
        "token_mask": in_token_frame((labels != -100).double()),
        "sample_mask": torch.ones(rows),
        "reference_policy_logprobs": torch.cat([ref, torch.zeros(rows, 1)], 1),
    }
    hidden = given["hidden"].double().requires_grad_()
    logp = torch.log_softmax(hidden @ given["weight"].double().T, -1)
    logprobs = logp.gather(-1, given["labels"].clamp(min=0).unsqueeze(-1)).squeeze(-1)
    loss_fn = NemoLoss(config)
    assert loss_fn.loss_type is LossType.SEQUENCE_LEVEL
    toks = (labels != -100).sum()
    loss, _ = loss_fn(data, torch.tensor(float(rows)), toks, next_token_logprobs=logprobs[turns])
    want = records.tensors(entry["file"])
    (grad,) = torch.autograd.grad(loss, hidden)
    budgets.assert_relative("loss", loss.detach(), want["loss"][0], budgets.F64_STEP)
    budgets.assert_relative("d loss / d hidden", grad, want["grad_hidden"], budgets.F64_STEP)


# -- the counts are NeMo RL's ---------------------------------------------------------------------------------------


def batch(rows: int = 4, length: int = 7, vocab: int = 19) -> tuple[dict[str, Any], Tensor]:
    gen = torch.Generator().manual_seed(2)

    def drawn() -> Tensor:
        return torch.randn(rows, length, dtype=torch.float64, generator=gen)

    token_mask = (torch.rand(rows, length, generator=gen) > 0.3).double()
    token_mask[1] = 0
    data = {
        "input_ids": torch.randint(vocab, (rows, length), generator=gen),
        "token_mask": token_mask,
        "sample_mask": torch.tensor([1.0, 1, 1, 0])[:rows],
        "advantages": drawn(),
        "prev_logprobs": drawn() * 0.2 - 3,
        "generation_logprobs": drawn() * 0.2 - 3,
        "reference_policy_logprobs": drawn() * 0.2 - 3,
    }
    logits = torch.randn(rows, length, vocab, dtype=torch.float64, generator=gen).requires_grad_()
    return data, logits


def rows_of(data: dict[str, Any], row: int) -> dict[str, Any]:
    return {name: value[row : row + 1] for name, value in data.items()}


@pytest.mark.parametrize("name", ["nemo/grpo", "nemo/gspo", "nemo/cispo", "nemo/reinforce", "nemo/sft"])
def test_micro_batches_add_up_and_figures_say_how(name: str) -> None:
    loss_fn = NemoLoss(preset(name))
    data, logits = batch()
    whole, figures = call(loss_fn, data, logits, seqs=9.0, toks=40.0)
    parts = [call(loss_fn, rows_of(data, i), logits[i : i + 1], seqs=9.0, toks=40.0) for i in range(4)]
    got, want = torch.stack([loss for loss, _ in parts]).sum(), whole
    budgets.assert_relative("loss", got.detach(), want.detach(), budgets.F64_STEP)
    (dz,) = torch.autograd.grad(whole, logits)
    assert not dz[3].any() and not dz[1].any()  # a sample masked out, and one without tokens
    kinds = loss_fn.metric_normalizations
    for key, value in figures.items():
        each = [m[key] for _, m in parts]
        merged = {"min": min(each), "max": max(each)}.get(key[-3:], sum(each))
        assert merged == pytest.approx(value, rel=budgets.FIGURE_F32_CHAIN, abs=budgets.FIGURE_WEIGHTED), key
        assert (kinds[key] is MetricNormalizer.NONE) == (key == "num_valid_samples" or key[-3:] in ("min", "max"))


@pytest.mark.parametrize("name", ["nemo/grpo", "nemo/gspo"])
def test_placeholder_counts_can_be_undone(name: str) -> None:
    """A split trainer passes 1 for both counts and divides afterwards, by what metric_normalizations tells."""
    loss_fn = NemoLoss(preset(name))
    data, logits = batch()
    seqs, toks = 5.0, 17.0
    raw_loss, raw = call(loss_fn, data, logits, seqs=1.0, toks=1.0)
    loss, figures = call(loss_fn, data, logits, seqs=seqs, toks=toks)
    by = {MetricNormalizer.TOKENS: toks, MetricNormalizer.SEQUENCES: seqs, MetricNormalizer.NONE: 1.0}
    own = by[loss_fn.metric_normalizations["loss"]]
    budgets.assert_relative("loss", (raw_loss / own).detach(), loss.detach(), budgets.F64_STEP)
    for key, value in figures.items():
        assert raw[key] / by[loss_fn.metric_normalizations[key]] == pytest.approx(
            value, rel=budgets.FIGURE_F32_CHAIN, abs=budgets.FIGURE_F64
        ), key


def test_losses_of_more_than_log_probs_take_logits() -> None:
    data, logits = batch()
    config = GRPOLossConfig(policy_loss_cfg={"loss_type": "reinforce"}, entropy_coef=0.1)
    loss_fn = NemoLoss(config, vocab_size=19)
    assert loss_fn.input_type is LossInputType.LOGIT
    loss, figures = call(loss_fn, data, logits)
    mask = data["token_mask"][:, 1:] * data["sample_mask"][:, None]
    logp = torch.log_softmax(logits[:, :-1], -1)
    picked = logp.gather(-1, data["input_ids"][:, 1:, None]).squeeze(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    want = ((-data["advantages"][:, 1:] * picked - 0.1 * entropy) * mask).sum() / mask.sum()
    for name, got, gold in zip(
        ("loss", "dz"),
        (loss, *torch.autograd.grad(loss, logits, retain_graph=True)),
        (want, *torch.autograd.grad(want, logits)),
        strict=True,
    ):
        budgets.assert_relative(name, got.detach(), gold.detach(), budgets.F64_STEP)
    assert figures["entropy"] == pytest.approx(
        float(((entropy * mask).sum() / mask.sum()).detach()), rel=budgets.FIGURE_F32
    )
    with pytest.raises(ShapeError, match="whole vocabulary"):
        call(loss_fn, data, logits[..., :10])
    smooth = NemoLoss(CELossConfig(label_smoothing=0.1, z_loss_coef=1e-3), vocab_size=19)
    assert call(smooth, data, logits)[0].isfinite()


def test_an_empty_micro_batch_is_zero() -> None:
    data, logits = batch()
    data["token_mask"] = torch.zeros_like(data["token_mask"])
    for toks in (0.0, 12.0):
        loss, figures = call(NemoLoss(preset("nemo/grpo")), data, logits, seqs=3.0, toks=toks)
        (dz,) = torch.autograd.grad(loss, logits)
        assert float(loss.detach()) == 0 and not dz.any()
        assert figures["probs_ratio_min"] == float("inf") and figures["probs_ratio_max"] == float("-inf")


@pytest.mark.parametrize(
    "make, error, says",
    [
        (lambda: NemoLoss(clipped_pg(VAPO[0])), UnsupportedError, "positive_nll_coef"),
        (lambda: NemoLoss(CELossConfig(loss_reduction="sum")), OptionError, "TOKEN_LEVEL"),
        (lambda: NemoLoss(CELossConfig(temperature=0.5)), OptionError, "about the head"),
        (lambda: NemoLoss(CELossConfig(label_smoothing=0.1)), MissingFieldError, "vocab_size"),
        (lambda: NemoLoss(preset("xtuner/oreal")), UnsupportedError, "counts of its own"),
        (lambda: NemoLoss(preset("kto")), UnsupportedError, "alternating"),
        (lambda: NemoLoss(PreferenceLossConfig(loss_type=["sigmoid", "sft"])), UnsupportedError, "nll_reduction"),
        (
            lambda: NemoLoss(
                GRPOLossConfig(
                    policy_loss_cfg={"loss_type": "ppo"},
                    rollout_correction={"level": "token", "renormalize_rejected": True},
                )
            ),
            UnsupportedError,
            "renormalize_rejected",
        ),
    ],
)
def test_what_nemo_rl_cannot_tell_raises(make: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        make()


def test_batches_that_lack_something_raise() -> None:
    data, logits = batch()
    loss_fn = NemoLoss(preset("nemo/grpo"))
    with pytest.raises(MissingFieldError, match="next_token_logprobs"):
        loss_fn(data, torch.tensor(3.0), torch.tensor(9.0))
    with pytest.raises(MissingFieldError, match="advantages"):
        call(loss_fn, {k: v for k, v in data.items() if k != "advantages"}, logits)
    without = {k: v for k, v in data.items() if k not in ("generation_logprobs", "prev_logprobs")}
    loss, figures = call(loss_fn, without, logits, seqs=3, toks=9)  # whole numbers, and on-policy
    assert loss.isfinite() and figures["probs_ratio"] > 0 and "gen_kl_error" not in figures
    with pytest.raises(MissingFieldError, match="ref_logprobs"):
        call(loss_fn, {k: v for k, v in data.items() if k != "reference_policy_logprobs"}, logits)
    with pytest.raises(UnsupportedError, match="top-k or top-p"):
        call(loss_fn, data | {"curr_logprobs_keep_mask": torch.ones(4, 6)}, logits)


def test_the_lines_of_the_page_run() -> None:
    (section,) = (s for s in sections() if s.title == "NeMo RL")
    run_page(section.text, "integrations#NeMo RL")
