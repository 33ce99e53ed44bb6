"""Contract: custom losses for slime give what slime's own policy and SFT losses were recorded to give, through slime's
own reducer, and refuse options that they would not honour. The interface alone: the package is not installable, so the
call, the log-probs that slime makes of its logits, and its reducer (a mean over each sample, or a sum over tokens) are
restated here, and its numbers come from ``tests/golden``.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import budgets
from tests.docs.test_readme_and_docs import run_page
from tests.golden import records
from tests.golden.test_slime import CASES, GLOBAL_BATCH, step_of
from tests.integrations.page import sections
from xloss import CELossConfig, GRPOLossConfig, preset
from xloss.adapters import slime as adapter
from xloss.errors import OptionError, UnsupportedError

DEFAULTS = {
    "calculate_per_token_loss": False,
    "use_rollout_logprobs": False,
    "use_tis": False,
    "use_opsm": False,
    "use_kl_loss": False,
    "entropy_coef": 0.0,
    "rollout_temperature": 1.0,
}
GSPO = records.entries("slime", "slime_gspo")
SFT = records.entries("slime", "slime_sft")
# groups share a mean by slime's reducer, which this restates for single samples; is_weights stand for its TIS there
POLICY = [e for e in CASES if "group_of" not in e["config"] and not e["config"]["args"].get("use_tis")]


@pytest.fixture(autouse=True)
def _slime(monkeypatch: pytest.MonkeyPatch) -> None:
    def get_log_probs_and_entropy(
        logits: Tensor,
        *,
        args: Any,
        unconcat_tokens: Any,
        total_lengths: Any,
        response_lengths: Any,
        with_entropy: bool,
    ) -> tuple[Tensor, dict[str, list[Tensor]]]:
        assert logits.shape[0] == 1
        logp = torch.log_softmax(logits[0] / args.rollout_temperature, -1)
        picked = logp.gather(-1, torch.cat(unconcat_tokens).unsqueeze(-1)).squeeze(-1)
        entropy = -(logp.exp() * logp).sum(-1)
        if not args.entropy_coef:
            entropy = entropy.detach()
        found = {"log_probs": list(picked.split(response_lengths))}
        return torch.empty(0), found | ({"entropy": list(entropy.split(response_lengths))} if with_entropy else {})

    parts = ["slime", "backends", "megatron_utils", "loss"]
    for end in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:end]), ModuleType(".".join(parts[:end])))
    module = sys.modules[".".join(parts)]
    monkeypatch.setattr(module, "get_log_probs_and_entropy", get_log_probs_and_entropy, raising=False)
    monkeypatch.setattr(module, "get_rollout_top_p_logprob_kwargs", lambda args, batch: {}, raising=False)


def reducer(masks: list[Tensor], per_token: bool) -> adapter.Reducer:
    """Sum over samples of their masked means, or of their masked sums."""

    def reduce(x: Tensor) -> Tensor:
        parts = zip(x.split([len(m) for m in masks]), masks, strict=True)
        return torch.stack([(v * m).sum() / (1 if per_token else m.sum().clamp(min=1)) for v, m in parts]).sum()

    return reduce


def run(config: Any, entry: records.Entry) -> tuple[list[Tensor], list[Tensor], Tensor, list[dict[str, Tensor]]]:
    """Losses of the case's micro-batches as slime scales them, hidden states, head, and what was reported."""
    cfg, data = entry["config"], records.tensors(entry["inputs"])
    args = Namespace(**DEFAULTS | cfg["args"])
    count = int(data["n_batches"])
    weight = data["weight"].double().requires_grad_()
    hidden = [data[f"hidden_{b}"].double().requires_grad_() for b in range(count)]
    losses, reported = [], []
    fn = adapter.loss_function(config)
    for b in range(count):
        lengths = data[f"cu_seq_lens_{b}"].diff().tolist()

        def each(name: str, b: int = b, lengths: list[int] = lengths) -> list[Tensor]:
            return list(data[f"{name}_{b}"][0].double().split(lengths))

        masks = list((data[f"labels_{b}"][0] != -100).double().split(lengths))
        batch: dict[str, Any] = {
            "unconcat_tokens": list(data[f"targets_{b}"][0].split(lengths)),
            "total_lengths": lengths,
            "response_lengths": lengths,
            "loss_masks": masks,
            "advantages": each(cfg.get("adv", "adv_seq_tok")),
            "log_probs": None if cfg.get("old_none") else each("old_logps"),
            "rollout_log_probs": None if cfg.get("old_none") else each("rollout_logps"),
            "ref_log_probs": each("ref_logps"),
        }
        reduce = reducer(masks, args.calculate_per_token_loss)
        loss, metrics = fn(args, batch, hidden[b] @ weight.T, reduce)
        losses.append(loss if args.calculate_per_token_loss else loss * count / GLOBAL_BATCH)
        reported.append(metrics)
    return losses, hidden, weight, reported


def assert_as_recorded(config: Any, entry: records.Entry) -> None:
    losses, hidden, weight, reported = run(config, entry)
    torch.stack(losses).sum().backward()
    found: dict[str, Any] = {"loss": [float(x.detach()) for x in losses], "grad_weight": weight.grad}
    found |= {f"grad_hidden_{b}": h.grad for b, h in enumerate(hidden)}
    assert not records.mismatches(entry, found)
    assert all("loss" in metrics and not metrics["loss"].requires_grad for metrics in reported)


@pytest.mark.parametrize("entry", POLICY, ids=records.case_id)
def test_policy_losses_as_recorded(entry: records.Entry) -> None:
    config = {k: v for k, v in step_of(entry).config.items() if k not in ("temperature", "loss_reduction")}
    if config["policy_loss_cfg"].get("anchor") == "rollout":  # --use-rollout-logprobs tells which are old
        del config["policy_loss_cfg"]["anchor"]
    assert_as_recorded(GRPOLossConfig(**config), entry)


@pytest.mark.parametrize("entry", GSPO, ids=records.case_id)
def test_gspo_as_recorded(entry: records.Entry) -> None:
    args = entry["config"]["args"]
    clip = {"cliprange_low": args["eps_clip"], "cliprange_high": args["eps_clip_high"]}
    assert_as_recorded(preset("slime/gspo", **clip), entry)


@pytest.mark.parametrize("entry", SFT, ids=records.case_id)
def test_sft_as_recorded(entry: records.Entry) -> None:
    assert_as_recorded(CELossConfig(), entry)


def test_figures_are_sums_over_samples() -> None:
    """slime divides what is reported by all samples of the step."""
    entry = next(e for e in POLICY if int(records.tensors(e["inputs"])["n_batches"]) == 1)
    _, _, _, (metrics,) = run(preset("slime/grpo"), entry)
    data = records.tensors(entry["inputs"])
    bounds, labels = data["cu_seq_lens_0"].tolist(), data["labels_0"][0]
    samples = sum(bool((labels[a:b] != -100).any()) for a, b in pairwise(bounds))
    live = labels != -100
    ratio = (data["cur_logps_f64_0"][0] - data["old_logps_0"][0].double())[live].exp().mean()
    assert float(metrics["ratio_mean"]) == pytest.approx(float(ratio) * samples, rel=budgets.FIGURE_LOGGED)


@pytest.mark.parametrize(
    "config, args, says",
    [
        (preset("slime/grpo"), {"use_kl_loss": True}, "use_kl_loss"),
        (preset("slime/grpo"), {"use_tis": True}, "rollout_correction"),
        (preset("slime/grpo"), {"use_opsm": True}, "opsm_delta"),
        (preset("slime/grpo"), {"entropy_coef": 0.1}, "entropy_coef"),
        (preset("slime/grpo", entropy_coef=0.1), {}, "entropy_coef"),  # slime cuts the entropies' gradient then
        (CELossConfig(loss_reduction="token"), {}, "loss_reduction='token'"),
        (preset("slime/grpo"), {"calculate_per_token_loss": True}, "loss_reduction='sample'"),
    ],
)
def test_options_must_agree(config: Any, args: dict[str, Any], says: str) -> None:
    entry = dict(POLICY[0]) | {"config": {"args": args}}
    with pytest.raises(OptionError, match=says):
        run(config, entry)


def test_parts_of_responses_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["slime.backends.megatron_utils.loss"]
    whole = module.get_log_probs_and_entropy

    def half(*args: Any, **kwargs: Any) -> Any:
        out, found = whole(*args, **kwargs)
        return out, {name: [x[: len(x) // 2] for x in values] for name, values in found.items()}

    monkeypatch.setattr(module, "get_log_probs_and_entropy", half)
    with pytest.raises(UnsupportedError, match="context parallelism"):
        run(preset("slime/grpo"), POLICY[0])


def test_the_lines_of_the_page_run() -> None:
    (section,) = (s for s in sections() if s.title == "slime")
    run_page(section.text, "integrations#slime")
