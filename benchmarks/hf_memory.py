"""Peak memory of one training step of a Transformers model before and after ``xloss.hf.attach``: a table for the docs.

``python -m benchmarks.hf_memory``. Every row is a process of its own. Bytes are those held at the peak of
forward and backward above what was held before it: weights do not count, gradients do.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import torch

from benchmarks.environment import ROOT
from xloss.cli.memory import MIB, start_peak

TOKENS, HIDDEN, VOCAB = 2048, 256, 65536
LOSSES = {"labels alone": "labels", "GRPO, a policy loss with entropy": "grpo"}


def _model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
    )
    return LlamaForCausalLM(config).train()


def _policy_inputs(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    import xloss

    return {
        "shifted_labels": xloss.shift_labels(ids),
        "advantages": torch.randn(ids.shape),
        "old_logprobs": torch.full(ids.shape, -11.0),
    }


def _loss(model: Any, ids: torch.Tensor, loss: str, attached: bool) -> torch.Tensor:
    import xloss

    if loss == "labels":
        return model(input_ids=ids, labels=ids).loss
    fields = _policy_inputs(ids)
    cfg = xloss.GRPOLossConfig(policy_loss_cfg={"loss_type": "ppo"}, entropy_coef=0.01)
    (kwargs,) = xloss.GRPOLossContext.build_batches_loss_kwargs([xloss.RLLossContextInputItem(**fields)], cfg)
    if attached:
        return model(input_ids=ids, loss_ctx=xloss.GRPOLossContext(cfg, kwargs)).loss
    logprobs = torch.log_softmax(model(input_ids=ids).logits.float(), dim=-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    chosen = logprobs.gather(-1, fields["shifted_labels"].clamp(min=0).unsqueeze(-1)).squeeze(-1)
    ratio, advantages = (chosen - fields["old_logprobs"]).exp(), fields["advantages"]
    per_token = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages) - 0.01 * entropy
    return (per_token * (fields["shifted_labels"] != -100)).sum() / (TOKENS - 1)


def step(loss: str, attached: bool) -> dict[str, float]:
    """Peak of one step in MiB, and its loss."""
    from xloss.hf import attach

    torch.manual_seed(0)
    model = attach(_model()) if attached else _model()
    ids = torch.randint(0, VOCAB, (1, TOKENS))
    torch.manual_seed(1)
    peak = start_peak("cpu")
    value = _loss(model, ids, loss, attached)
    value.backward()
    return {"peak": (peak() or 0) / MIB, "loss": value.item()}


def table() -> str:
    lines = ["| step | before | after `attach` | |", "|---|---|---|---|"]
    for name, loss in LOSSES.items():
        before, after = (_apart(loss, attached) for attached in (False, True))
        assert abs(before["loss"] - after["loss"]) < 1e-4, (before, after)
        peaks = before["peak"], after["peak"]
        lines.append(f"| {name} | {peaks[0]:.0f} MiB | {peaks[1]:.0f} MiB | {peaks[0] / peaks[1]:.1f} x less |")
    return "\n".join(lines)


def _apart(loss: str, attached: bool) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.hf_memory", loss, str(int(attached))]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    match sys.argv[1:]:
        case [loss, attached]:
            print(json.dumps(step(loss, bool(int(attached)))))
        case _:
            print(table())
