"""Golden cases, xloss on trial.

Contract: in float64 and float32, eager and chunked, one-pass and two-pass, xloss gives the losses of every micro-
batch, the gradients, calibrated weights and finalised metrics that XTuner's own code gave, and the losses and
gradients of the documented Tinker formulas (sums, so the calibrated weights are undone). The table of cases is in
test_oracle.py.

On purpose different from XTuner: at ignored positions LogProbContext gives 0, XTuner the log-prob of token 0
(xtuner-logprob-*). A log-prob nobody asked for must not look like one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.golden.cases import ENTRIES, Case, cases, differ, mismatch
from tests.golden.records import Entry
from tests.oracle import head
from tests.property.helpers import leaf
from xloss import (
    BaseLossConfig,
    BaseLossContextInputItem,
    CELossConfig,
    CELossContextInputItem,
    GRPOLossConfig,
    LogProbConfig,
    LossInfo,
    RLLossContextInputItem,
    finalize_metrics,
    rename_metrics,
)

CASES: list[Entry] = ENTRIES
DIFFERENT: dict[str, str] = {
    case["id"]: "0 at ignored positions; XTuner has the log-prob of token 0 there"
    for case in ENTRIES
    if case["loss_name"] == "logprob"
}
RUNS: dict[str, dict[str, Any]] = {
    "eager": {"mode": "eager"},
    "one_pass": {"mode": "chunk", "plan": "one_pass", "chunk_size": 7},
    "two_pass": {"mode": "chunk", "plan": "two_pass", "chunk_size": 7},
    "auto": {},
}
every_run = pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
both_dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])


def _ids(case: Case) -> str:
    return case.id


def _working(case: Case, dtype: torch.dtype) -> torch.dtype:
    return torch.bfloat16 if case.config.get("dtype") == "bfloat16" else dtype


def _run(case: Case, cfg: BaseLossConfig, items: list[Any], dtype: torch.dtype, undo: float) -> tuple[list[Any], ...]:
    """Check what every case records; contexts and infos are for the rest. `undo`: a denominator to take out."""
    working = _working(case, dtype)
    ctx_cls = cfg.loss_ctx_cls
    built = ctx_cls.build_batches_loss_kwargs(items, cfg, cu_seq_lens_list=case.cu_seq_lens)
    contexts = [ctx_cls(cfg, kwargs) for kwargs in built]
    hidden, weight = [leaf(h.to(working)) for h in case.hidden], leaf(case.weight.to(working))
    outs = [ctx.forward(h, weight) for ctx, h in zip(contexts, hidden, strict=True)]
    (torch.stack([loss for loss, _ in outs]).sum() * undo).backward()
    found = [mismatch(case, "loss", [loss.item() * undo for loss, _ in outs], dtype)]
    found += [mismatch(case, f"grad_hidden_{b}", h.grad, dtype) for b, h in enumerate(hidden)]
    found += [mismatch(case, "grad_weight", weight.grad, dtype)]
    assert not [f for f in found if f]
    return contexts, [info for _, info in outs]


def _same_weights(case: Case, name: str, contexts: list[Any]) -> None:
    for b, ctx in enumerate(contexts):
        assert mismatch(case, f"out_{name}_{b}", getattr(ctx.loss_kwargs, name), torch.float32) is None


@every_run
@both_dtypes
@pytest.mark.parametrize("case", cases("ce"), ids=_ids)
def test_ce(case: Case, dtype: torch.dtype, run: dict[str, Any]) -> None:
    cfg = CELossConfig(loss_reduction=case.config.get("loss_reduction", "token"), ignore_idx=case.ignore_index, **run)
    items = [CELossContextInputItem(shifted_labels=b.labels, token_weight=w)
             for b, w in zip(case.batches, case.loss_weight or [None] * len(case.batches), strict=True)]  # fmt: skip
    raw = case.loss_weight or [(b.labels != case.ignore_index).double() for b in case.batches]
    undo = float(sum(w.double().sum() for w in raw)) if case.is_sum else 1.0
    contexts, _ = _run(case, cfg, items, dtype, undo)
    if "out_loss_weight_0" in case.recorded:
        _same_weights(case, "loss_weight", contexts)


@every_run
@both_dtypes
@pytest.mark.parametrize("case", cases("policy"), ids=_ids)
def test_policy(case: Case, dtype: torch.dtype, run: dict[str, Any]) -> None:
    kl = {name: case.config[name] for name in ("use_kl_loss", "kl_loss_coef", "kl_loss_type") if name in case.config}
    cfg = GRPOLossConfig(policy_loss_cfg=case.policy, **kl, **run)
    items = [
        RLLossContextInputItem(
            shifted_labels=b.labels,
            advantages=b.advantages,
            old_logprobs=b.old,
            ref_logprobs=b.ref,
            is_weights=b.is_weights,
        )
        for b in case.batches
    ]
    undo = float(sum((b.labels != -100).sum() for b in case.batches)) if case.is_sum else 1.0
    contexts, infos = _run(case, cfg, items, dtype, undo)
    if case.peer == "xtuner":
        _same_weights(case, "policy_loss_weight", contexts)
        _same_metrics(case, infos, dtype)


def _same_metrics(case: Case, infos: list[LossInfo], dtype: torch.dtype) -> None:
    finalized = finalize_metrics([info.metrics for info in infos])
    results = {name: float(x) for name, x in rename_metrics(finalized, "xtuner").items()}
    results["local_base_loss"] = sum(float(info.extra_info["local_base_loss"]) for info in infos)
    for theirs, want in case.metrics["finalized"].items():
        got = np.float64(results[theirs])
        assert differ(theirs, got, np.float64(want), case.tolerance_for(dtype)) is None


@pytest.mark.parametrize("mode", ["eager", "chunk", "auto"])
@both_dtypes
@pytest.mark.parametrize("case", cases("logprob"), ids=_ids)
def test_logprob(case: Case, dtype: torch.dtype, mode: str) -> None:
    labels = case.batches[0].labels
    cfg = LogProbConfig(mode=mode, chunk_size=9)
    (kwargs,) = cfg.loss_ctx_cls.build_batches_loss_kwargs([BaseLossContextInputItem(shifted_labels=labels)], cfg)
    with torch.no_grad():
        logprobs, _ = cfg.loss_ctx_cls(cfg, kwargs).forward(case.hidden[0].to(dtype), case.weight.to(dtype))
    live = labels != -100
    assert logprobs.dtype == dtype
    assert not bool(logprobs[~live].any()), "0 at ignored positions, on purpose"
    assert mismatch(case, "out_logprobs", torch.where(live, logprobs, _of_token_zero(case)), dtype) is None


def _of_token_zero(case: Case) -> Tensor:
    """What XTuner has at ignored positions."""
    return head.token_stats(case.hidden[0], case.weight, torch.zeros_like(case.batches[0].labels)).logprobs
