"""Random batches of preferences, and one step of them by xloss and by the oracle, for the tests of this folder."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tests import budgets
from tests.oracle import preference as oracle
from xloss import LossInfo, PreferenceLossConfig, PreferenceLossContext, PreferenceLossContextInputItem

PAIRED = (
    "sigmoid", "sigmoid_norm", "robust", "hinge", "ipo", "exo_pair", "nca_pair", "bco_pair", "sppo_hard", "aot",
    "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "cpo", "simpo", "alphapo", "orpo",
)  # fmt: skip
ALL = (*PAIRED, *oracle.UNPAIRED)
WIDTH, VOCABULARY = 4, 23


@dataclass
class Batch:
    """One micro-batch: hidden [1, T, H] with bounds, or [B, S, H]; per-token tensors in the layout of labels."""

    hidden: Tensor
    labels: Tensor
    ref: Tensor
    cu_seq_lens: Tensor | None
    pairs: list[int]
    chosen: list[bool]

    def bounds(self) -> list[int]:
        if self.cu_seq_lens is not None:
            return self.cu_seq_lens.tolist()
        rows, length = self.labels.shape
        return [i * length for i in range(rows + 1)]

    def sequences(self, hidden: Tensor) -> list[oracle.Sequence]:
        h, y, r = hidden.reshape(-1, hidden.shape[-1]), self.labels.reshape(-1), self.ref.reshape(-1)
        found = []
        for i, (a, b) in enumerate(zip(self.bounds()[:-1], self.bounds()[1:], strict=True)):
            keep = y[a:b] != -100
            found.append(oracle.Sequence(h[a:b][keep], y[a:b][keep], r[a:b][keep], self.pairs[i], self.chosen[i]))
        return found


@dataclass
class Case:
    weight: Tensor
    batches: list[Batch]
    layout: str  # alternating, halves or ids

    def to(self, dtype: torch.dtype) -> Case:
        batches = [replace(b, hidden=b.hidden.to(dtype), ref=b.ref.to(dtype)) for b in self.batches]
        return replace(self, weight=self.weight.to(dtype), batches=batches)


def case(seed: int, *, packed: bool | None = None, layout: str | None = None, micro_batches: int | None = None) -> Case:
    """Micro-batches of 0 to 3 pairs; prompts and holes are ignored, some sequences wholly, some have no token."""
    g = torch.Generator().manual_seed(seed)

    def below(n: int) -> int:
        return int(torch.randint(0, n, (), generator=g))

    packed = bool(below(2)) if packed is None else packed
    layout = ("alternating", "halves", "ids")[below(3)] if layout is None else layout
    count = 1 + below(3) if micro_batches is None else micro_batches
    made = [_batch(g, below(4) if packed and i else 1 + below(3), packed, layout) for i in range(count)]
    return Case(torch.randn(VOCABULARY, WIDTH, generator=g, dtype=torch.float64), made, layout)


def _batch(g: torch.Generator, num_pairs: int, packed: bool, layout: str) -> Batch:
    pairs, chosen = [i // 2 for i in range(2 * num_pairs)], [i % 2 == 0 for i in range(2 * num_pairs)]
    if layout == "halves":
        pairs, chosen = [i % num_pairs for i in range(2 * num_pairs)], [i < num_pairs for i in range(2 * num_pairs)]
    if layout == "ids":
        order = torch.randperm(2 * num_pairs, generator=g).tolist()
        pairs, chosen = [7 * pairs[i] for i in order] + [-1], [chosen[i] for i in order] + [True]
    rows = len(pairs)
    lengths = torch.randint(1, 7, (rows,), generator=g)
    if int(torch.randint(0, 3, (), generator=g)) == 0 and rows:
        lengths[0] = 0
    if packed:
        bounds = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        shape: tuple[int, ...] = (1, int(bounds[-1]))
    else:
        bounds, shape = None, (rows, 6)
    labels = torch.randint(0, VOCABULARY, shape, generator=g)
    labels = labels.masked_fill(torch.rand(shape, generator=g) < 0.25, -100)
    if bounds is None:
        labels = labels.masked_fill(torch.arange(6) >= lengths[:, None], -100)
    hidden = torch.randn(*shape, WIDTH, generator=g, dtype=torch.float64)
    ref = -3.0 + torch.randn(shape, generator=g, dtype=torch.float64)
    return Batch(hidden, labels, ref, bounds, pairs, chosen)


def config(case: Case, o: oracle.Objective, **run: Any) -> PreferenceLossConfig:
    return PreferenceLossConfig(
        loss_type=o.terms,
        beta=o.beta,
        label_smoothing=o.label_smoothing,
        average_log_prob=o.average,
        layout="halves" if case.layout == "halves" and o.terms[0]["loss_type"] in PAIRED else "alternating",
        reference_free=o.reference_free,
        f_divergence=o.f_divergence,
        f_alpha=o.f_alpha,
        ld_alpha=o.ld_alpha,
        use_weighting=o.use_weighting,
        max_weighting=o.max_weighting,
        nll_reduction=o.nll_reduction,
        count_empty_sequences=o.count_empty,
        **run,
    )


def items(case: Case, cfg: PreferenceLossConfig, o: oracle.Objective) -> list[PreferenceLossContextInputItem]:
    names = {t["loss_type"] for t in o.terms}
    found = []
    for b in case.batches:
        item = PreferenceLossContextInputItem(shifted_labels=b.labels)
        if cfg.needs_reference:
            item.ref_logprobs = b.ref
        if case.layout == "ids" or not cfg.paired:
            item.preferred = torch.tensor(b.chosen, dtype=torch.bool)
        if case.layout == "ids" and cfg.paired:
            item.pair_ids = torch.tensor(b.pairs, dtype=torch.int64)
        if "kto" in names:
            item.kl = torch.tensor([o.kl - 0.1, o.kl + 0.1], dtype=b.ref.dtype)
        if names & {"bco", "bco_pair"}:
            item.reward_shift = torch.tensor(o.shift, dtype=b.ref.dtype)
        found.append(item)
    return found


@dataclass
class Step:
    loss: Tensor
    hidden: list[Tensor]
    weight: Tensor
    infos: list[LossInfo]


def run_step(case: Case, o: oracle.Objective, upstream: float = 1.0, **run: Any) -> Step:
    cfg = config(case, o, **run)
    bounds = [b.cu_seq_lens for b in case.batches if b.cu_seq_lens is not None] or None
    built = PreferenceLossContext.build_batches_loss_kwargs(items(case, cfg, o), cfg, cu_seq_lens_list=bounds)
    hidden = [b.hidden.clone().requires_grad_(True) for b in case.batches]
    weight = case.weight.clone().requires_grad_(True)
    outs = [PreferenceLossContext(cfg, k).forward(h, weight) for k, h in zip(built, hidden, strict=True)]
    loss = torch.stack([x for x, _ in outs]).sum()
    grads = torch.autograd.grad(upstream * loss, [*hidden, weight])
    return Step(loss.detach(), list(grads[:-1]), grads[-1], [info for _, info in outs])


def gold_step(case: Case, o: oracle.Objective, upstream: float = 1.0) -> tuple[Step, oracle.Result]:
    case = case.to(torch.float64)
    hidden = [b.hidden.clone().requires_grad_(True) for b in case.batches]
    weight = case.weight.clone().requires_grad_(True)
    result = oracle.step([b.sequences(h) for b, h in zip(case.batches, hidden, strict=True)], weight, o)
    leaves = [*hidden, weight]
    found = torch.autograd.grad(upstream * result.loss, leaves, allow_unused=True) if result.loss.requires_grad else ()
    grads = [
        torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found or [None] * len(leaves), strict=True)
    ]
    return Step(result.loss.detach(), grads[:-1], grads[-1], []), result


def assert_same(got: Step, want: Step, case: Case, upstream: float = 1.0) -> None:
    """Up to rounding: log-probs of a sequence are sums, and losses at most quadratic in them."""
    tokens = sum(b.labels.numel() for b in case.batches)
    size = (1.0 + float(want.loss.abs())) * (1 + tokens)
    top = max([float((b.hidden @ case.weight.T).abs().max()) for b in case.batches if b.hidden.numel()], default=0.0)
    budgets.assert_rounding("loss", got.loss, want.loss, top, size)
    width = abs(upstream) * size * (1 + budgets.norm(case.weight) + sum(budgets.norm(b.hidden) for b in case.batches))
    for ours, theirs in zip([*got.hidden, got.weight], [*want.hidden, want.weight], strict=True):
        budgets.assert_rounding("gradient", ours, theirs, top, width)
