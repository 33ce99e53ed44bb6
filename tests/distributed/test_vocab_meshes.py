"""Heads and hidden states that are DTensors, over three processes (gloo), and splits that cannot be right.

Contract: a head split by rows (``Shard(0)``, the last part shorter or empty) or replicated, with hidden states that are
plain, replicated or split along the sequence, gives every rank the loss of one process, and gradients that, put
together, are that process's and are laid out as their tensors are. Ranks with other tokens, FSDP's parameters among
them, and splits with gaps are refused on every rank, with the remedy.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests import budgets
from tests.distributed import vocab_meshes, vocab_ranks
from tests.distributed.pages import shown_and_printed
from tests.distributed.vocab_meshes import EMPTY_V, WORLD, V, context, problem
from xloss import linear_logprobs

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    found = vocab_ranks.spawn(tmp_path_factory.mktemp("meshes"), WORLD, {"mesh": vocab_meshes.job})
    return [f["mesh"] for f in found]


def reference(vocab: int = V, norm: bool = False) -> dict[str, torch.Tensor]:
    x = problem(vocab)
    leaves = [x[n].clone().requires_grad_() for n in ("hidden", "weight", "bias")]
    hidden = leaves[0]
    model = nn.LayerNorm(hidden.shape[-1]).double()
    loss, info = context(x["labels"], mode="eager").forward(model(hidden) if norm else hidden, *leaves[1:])
    loss.backward()
    found = {"loss": loss.detach(), "logprobs": info.logprobs}
    found |= {n: t.grad for n, t in zip(("hidden", "weight", "bias"), leaves, strict=True)}
    return found | ({"norm": model.weight.grad} if norm else {})


LAYOUTS = [f"rows-{h}-{m}" for h in vocab_meshes.HIDDEN for m in ("plain", "two_pass", "eager")]
LAYOUTS += ["whole-replicated-plain", "whole-sequence-plain", "empty"]
PLACED = {"alone": None, "replicated": "(Replicate(),)", "sequence": "(Shard(dim=1),)", "rows": "(Shard(dim=0),)",
          "whole": "(Replicate(),)"}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(ranks: list[dict[str, Any]], layout: str) -> None:
    want = reference(EMPTY_V if layout == "empty" else V)
    head, hidden, _ = ("rows", "sequence", "") if layout == "empty" else layout.split("-")
    for seen in (r[layout] for r in ranks):
        for name in ("loss", "logprobs"):
            budgets.assert_rounding(name, seen[name], want[name], 10.0, 1.0)
            assert torch.equal(seen[name], ranks[0][layout][name])
        for name in ("hidden", "weight", "bias"):
            budgets.assert_rounding(f"d {name}", seen[name]["grad"], want[name], 10.0, 1.0)
            assert seen[name]["placements"] == PLACED[hidden if name == "hidden" else head]


def test_torch_tensor_parallelism(ranks: list[dict[str, Any]]) -> None:
    """`SequenceParallel` before, `ColwiseParallel` for the head: gradients go on through the norm."""
    want = reference(norm=True)
    for seen in (r["torch"] for r in ranks):
        budgets.assert_rounding("loss", seen["loss"], want["loss"], 10.0, 1.0)
        for name in ("hidden", "weight", "bias", "norm"):
            budgets.assert_rounding(f"d {name}", seen[name]["grad"], want[name], 10.0, 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_working_dtypes(ranks: list[dict[str, Any]], dtype: torch.dtype) -> None:
    """float32 within the design's bar; bf16 as close to float64 as one process is."""

    def run(working: torch.dtype) -> dict[str, torch.Tensor]:
        x = problem(dtype=dtype)
        hidden, weight = (x[n].to(working).requires_grad_() for n in ("hidden", "weight"))
        stats = linear_logprobs(hidden, weight, x["labels"], return_entropy=True, mode="chunk")
        (stats.logprobs.sum() + 0.3 * stats.entropy.sum()).backward()
        return {"logprobs": stats.logprobs.detach(), "entropy": stats.entropy.detach(), "hidden": hidden.grad,
                "weight": weight.grad}  # fmt: skip

    gold, base = run(torch.float64), run(dtype)
    seen = [r[f"low-{dtype}"] for r in ranks]
    ours = seen[0] | {"weight": torch.cat([s["weight"] for s in seen])}
    for name in ours:
        if dtype == torch.float32:
            budgets.assert_relative(name, ours[name], gold[name], budgets.F32_GRADIENT)
        else:
            budgets.assert_three_way(name, ours[name], base[name], gold[name], dtype)


@pytest.mark.parametrize("plan", ["plain", "two_pass"])
def test_main_grad(ranks: list[dict[str, Any]], plan: str) -> None:
    grad = torch.cat([r[f"main_grad-{plan}"] for r in ranks]) - 1
    budgets.assert_rounding("main_grad", grad, reference()["weight"], 10.0, 1.0)


def test_explain(ranks: list[dict[str, Any]]) -> None:
    for rank, rows in enumerate(("0:3", "3:6", "6:7")):
        said = ranks[rank]["rows-sequence-plain"]["plan"]
        assert f"why    the vocabulary is split over 3 ranks, rank {rank} holds {rows}\n" in said
        assert "a chunk's statistics are one gather of 3 numbers a token, its hidden gradient one sum of 4" in said
        assert "H=4 V=3," in said
    page = (Path(__file__).resolve().parents[2] / "docs" / "vocab-parallel.md").read_text(encoding="utf-8")
    shown = page.split("<!-- explained -->\n```text\n")[1].split("\n```")[0]
    assert all(f"  {line}\n" in ranks[0]["rows-sequence-plain"]["plan"] for line in shown.splitlines())


SAID = {
    "fsdp": "UnsupportedError: head_weight is a shard of fully_shard's .* `with xloss.head_weight",
    "tokens": "UnsupportedError: head_weight is shared by 3 ranks, .* labels, hidden states differ: .* FSDP",
    "lengths": r"calls, labels, hidden states differ \(hidden_states by rank: \(13, 4\), \(12, 4\), \(11, 4\)",
    "hidden": "their hidden states differ: .*inside xloss.head_weight",
    "replicated": "their hidden states differ",
    "eager": "their hidden states differ",
    "plan": r"their calls differ \(plan by rank: .*'chunked_logits', 5, .*'chunked_logits', 6, ",
    "columns": r"UnsupportedError: head_weight is a DTensor with placements \(Shard\(dim=1\),\)",
    "partial": r"UnsupportedError: head_weight is a DTensor with placements \(Partial\(sum\),\)",
    "features": r"hidden_states is a DTensor with placements \(Shard\(dim=2\),\); accepted: Replicate, or Shard",
    "sequence alone": "hidden_states is a DTensor on a mesh of .* which is not head_weight's",
    "bias": "head_bias must be a DTensor on head_weight's mesh .* got a plain tensor",
    "bias beside": "OptionError: head_bias is for a head_weight that is whole",
    "gap": "OptionError: the ranks' rows must be exactly 0:7, .* got rows 0:3 of 7, 4:6 of 7, 6:7 of 7",
    "overlap": "OptionError: the ranks' rows must be exactly 0:7",
    "short": "OptionError: the ranks' rows must be exactly 0:7",
    "sizes": "OptionError: the ranks' rows must be exactly 0:[78], .* vocab_size one number",
    "shard of a shard": "UnsupportedError: VocabShard's weight is a DTensor; give that itself as head_weight",
    "loss_fn": "UnsupportedError: a custom loss_fn gets a plain weight; .*: define token_loss",
    "label": "LabelError: labels holds .*; accepted: 0 to 6",
    "teacher": "UnsupportedError: the teacher's head is split .* and the student's is split otherwise",
    "eager teacher": "UnsupportedError: mode='eager' cannot gather a teacher",
}


@pytest.mark.parametrize("name", SAID)
def test_refused_on_every_rank(ranks: list[dict[str, Any]], name: str) -> None:
    for rank, seen in enumerate(ranks):
        said = seen["messages"][name]
        assert re.search(SAID[name], said), f"rank {rank}: {said}"


def test_page_shows_what_two_ranks_print(tmp_path: Path) -> None:
    page, printed = shown_and_printed("vocab-parallel.md", "tests/distributed/test_vocab_meshes.py", tmp_path)
    assert f"```text\n{printed}```" in page, printed
