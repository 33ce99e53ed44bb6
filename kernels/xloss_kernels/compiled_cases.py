"""The launches that `compiled.py` compiles: every kernel, with all options on and with the usual ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType

import torch

from xloss_kernels import dlogits, finalize, head_backward, head_forward, policy_rows, row_stats, scale, tiles
from xloss_kernels.compiled import ARCHS
from xloss_kernels.policy_rows import PolicySpec
from xloss_kernels.transform import Transform

_ROWS, _VOCAB = 4, 128256


@dataclass(frozen=True)
class Case:
    """`launch(arch)` calls the launcher of `module` once, which launches `kernel`."""

    module: ModuleType
    kernel: str
    name: str
    launch: Callable[[int], object]
    min_arch: int = 80


def _logits(dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(_ROWS, _VOCAB, dtype=dtype)


def _labels(num_labels: int = 1) -> torch.Tensor:
    return torch.zeros((_ROWS,) if num_labels == 1 else (_ROWS, num_labels), dtype=torch.int64)


def _vector() -> torch.Tensor:
    return torch.empty(_ROWS)


def _everything(dtype: torch.dtype) -> Transform:
    return Transform(logit_scale=0.5, softcap=30.0, temperature=_vector(), bias=torch.empty(_VOCAB, dtype=dtype))


def _row_stats(dtype: torch.dtype, full: bool) -> Callable[[int], object]:
    def launch(arch: int) -> object:
        transform = _everything(dtype) if full else None
        return row_stats.row_stats(
            _logits(dtype), _labels(4 if full else 1), transform, entropy=True, mean_logit=full, sum_p2=full, top1=full
        )

    return launch


def _dlogits(dtype: torch.dtype, full: bool, overlay: bool = False) -> Callable[[int], object]:
    def launch(arch: int) -> object:
        logits = _logits(dtype)
        out = logits.view(torch.bfloat16)[:, :_VOCAB] if overlay else None
        return dlogits.dlogits(
            logits, _labels(), _vector(), _everything(dtype) if full else None, entropy=_vector(), sum_p2=_vector(),
            d_logprobs=_vector(), d_entropy=_vector() if full else None, d_lse=_vector() if full else None,
            d_mean_logit=_vector() if full else None, d_sum_p2=_vector() if full else None, out=out)  # fmt: skip

    return launch


def _policy(
    dtype: torch.dtype, spec: PolicySpec, full: bool = False, out: str = "in place", mean: bool = False
) -> Callable[[int], object]:
    def launch(arch: int) -> object:
        logits = _logits(dtype)
        target = {"in place": None, "bf16": _logits(_BF16), "overlay": logits.view(_BF16)[:, :_VOCAB]}[out]
        return policy_rows.policy_rows(
            logits, _labels(), spec, _everything(dtype) if full else None, weight=_vector(), advantages=_vector(),
            old_logprobs=_vector(), ref_logprobs=_vector(), kl_weight=_vector(), mean_logit=full or mean,
            sum_p2=full, top1=full, out=target)  # fmt: skip

    return launch


def _head(
    dtype: torch.dtype, full: bool = False, tma: bool = True, tokens: int = 256, size: int = 512
) -> Callable[[int], object]:
    def launch(arch: int) -> object:
        tile = tiles.head_tile(dtype, arch)
        if not tma:
            tile = replace(tile, use_tma=False)
        vocab = 4096
        transform = Transform(0.5, 30.0, torch.empty(tokens), torch.empty(vocab, dtype=dtype)) if full else None
        return head_forward.head_forward(
            torch.empty(tokens, size, dtype=dtype), torch.empty(vocab, size, dtype=dtype),
            torch.zeros(tokens, dtype=torch.int64), transform, entropy=True, mean_logit=full, sum_p2=full, top1=full,
            tile=tile)  # fmt: skip

    return launch


def _head_dlogits(dtype: torch.dtype, full: bool = False) -> Callable[[int], object]:
    def launch(arch: int) -> object:
        tokens, vocab, size = 256, 4096, 512
        vector = torch.empty(tokens)
        extra = vector if full else None
        transform = Transform(0.5, 30.0, vector, torch.empty(vocab, dtype=dtype)) if full else None
        return head_backward.head_dlogits(
            torch.empty(tokens, size, dtype=dtype), torch.empty(vocab, size, dtype=dtype),
            torch.zeros(tokens, dtype=torch.int64), vector, transform, entropy=vector, sum_p2=extra, d_logprobs=vector,
            d_entropy=vector, d_lse=extra, d_mean_logit=extra, d_sum_p2=extra,
            tile=tiles.head_tile(dtype, arch))  # fmt: skip

    return launch


def _finalize(arch: int) -> object:
    partials = torch.empty(126, 6, 256)
    return finalize.finalize(
        partials, torch.empty(256), torch.zeros(256, dtype=torch.int64), _VOCAB, entropy=True, top1=True)  # fmt: skip


def points(kernel: str = "") -> list[tuple[Case, int]]:
    """Every case of kernels whose name contains `kernel`, with every architecture it is for."""
    return [(case, arch) for case in CASES if kernel in case.kernel for arch in ARCHS if arch >= case.min_arch]


_GRPO_FULL = PolicySpec("ppo", dual_clip=3.0, kl="k3", entropy_coef=0.01, z_loss_coef=1e-4)
_SMOOTH = PolicySpec("ce", label_smoothing=0.1)
_FLOAT32, _BF16 = torch.float32, torch.bfloat16

CASES = (
    Case(row_stats, "row_stats_kernel", "float32, entropy", _row_stats(_FLOAT32, False)),
    Case(row_stats, "row_stats_kernel", "bf16, entropy", _row_stats(_BF16, False)),
    Case(row_stats, "row_stats_kernel", "bf16, every option, 4 labels", _row_stats(_BF16, True)),
    Case(dlogits, "dlogits_kernel", "float32 in place", _dlogits(_FLOAT32, False)),
    Case(dlogits, "dlogits_kernel", "bf16 in place", _dlogits(_BF16, False)),
    Case(dlogits, "dlogits_kernel", "float32 to bf16 overlay", _dlogits(_FLOAT32, False, overlay=True)),
    Case(dlogits, "dlogits_kernel", "bf16, every option", _dlogits(_BF16, True)),
    Case(policy_rows, "policy_rows_kernel", "ce, bf16", _policy(_BF16, PolicySpec("ce"))),
    Case(policy_rows, "policy_rows_kernel", "ce + label smoothing, bf16", _policy(_BF16, _SMOOTH, mean=True)),
    Case(policy_rows, "policy_rows_kernel", "ppo, float32", _policy(_FLOAT32, PolicySpec("ppo"))),
    Case(policy_rows, "policy_rows_kernel", "ppo, bf16", _policy(_BF16, PolicySpec("ppo"))),
    Case(policy_rows, "policy_rows_kernel", "cispo, bf16", _policy(_BF16, PolicySpec("cispo"))),
    Case(policy_rows, "policy_rows_kernel", "ppo + k3 + entropy + z, bf16", _policy(_BF16, _GRPO_FULL)),
    Case(policy_rows, "policy_rows_kernel", "ppo, float32 to bf16", _policy(_FLOAT32, PolicySpec("ppo"), out="bf16")),
    Case(
        policy_rows,
        "policy_rows_kernel",
        "ppo, float32 to bf16 overlay",
        _policy(_FLOAT32, PolicySpec("ppo"), out="overlay"),
    ),
    Case(policy_rows, "policy_rows_kernel", "ppo, every option, float32", _policy(_FLOAT32, _GRPO_FULL, full=True)),
    Case(head_forward, "head_forward_kernel", "bf16, entropy", _head(_BF16)),
    Case(head_forward, "head_forward_kernel", "bf16, entropy, pointers", _head(_BF16, tma=False), min_arch=90),
    Case(head_forward, "head_forward_kernel", "bf16, every option", _head(_BF16, full=True)),
    Case(head_forward, "head_forward_kernel", "bf16, one token, H = 1000", _head(_BF16, tokens=1, size=1000)),
    Case(head_forward, "head_forward_kernel", "float32 ieee, entropy", _head(_FLOAT32)),
    Case(head_backward, "head_dlogits_kernel", "bf16, entropy", _head_dlogits(_BF16)),
    Case(head_backward, "head_dlogits_kernel", "bf16, every option", _head_dlogits(_BF16, full=True)),
    Case(finalize, "finalize_kernel", "126 splits", _finalize),
    Case(
        scale,
        "scale_kernel",
        "bf16 in place",
        lambda arch: scale.scale_(torch.empty(4096, dtype=_BF16), torch.empty(1)),
    ),
)
