"""`python -m xloss_kernels.tune`: time the pruned candidates of every kernel once, and keep the quickest in a file.

Never on the hot path and never on live buffers: several kernels write over their own input, and a timed launch runs
many times, so everything timed here is made here. `tuned.py` says where the file is and who reads it.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, TypeVar

import torch

from xloss_kernels import tiles, tuned

Tile = TypeVar("Tile")
Timer = Callable[[Callable[[], object]], float]
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def milliseconds(run: Callable[[], object]) -> float:
    """Median time of `run` on the current device."""
    import triton

    return float(triton.testing.do_bench(run, quantiles=[0.5]))


def fastest(candidates: Sequence[Tile], launch: Callable[[Tile], object], *, timer: Timer = milliseconds) -> Tile:
    """The candidate whose `launch` is quickest; earlier ones win ties. One that does not fit the device is passed over.

    `launch` is run many times: it must work on copies.
    """
    from triton.runtime.errors import OutOfResources

    times: list[tuple[float, int]] = []
    for index, tile in enumerate(candidates):
        try:
            times.append((timer(lambda tile=tile: launch(tile)), index))  # type: ignore[misc]
        except OutOfResources:
            continue
    assert times, "no candidate fits this device"
    return candidates[min(times)[1]]


@dataclass(frozen=True)
class Job:
    """One entry of the file: its key, what may stand in it, and a launch that owns its tensors."""

    key: str
    candidates: Sequence[Any]
    launch: Callable[[Any], object]


def jobs(
    num_vocab: int, hidden_size: int, dtype: torch.dtype, device: torch.device, num_tokens: int = 2048
) -> list[Job]:
    """Every kernel as the engine launches it for operands of `dtype`: float32 logits, bf16 dlogits laid over them."""
    from xloss_kernels import dlogits, head_backward, head_forward, policy_rows, row_stats

    wide: dict[str, Any] = {"dtype": torch.float32, "device": device}
    logits = torch.randn(num_tokens, num_vocab, **wide)
    out = logits.view(torch.bfloat16)[:, :num_vocab] if dtype == torch.bfloat16 else logits
    strip = logits.view(dtype)[:, :num_vocab]
    hidden = torch.randn(num_tokens, hidden_size, **wide).to(dtype)
    weight = torch.randn(num_vocab, hidden_size, **wide).to(dtype)
    labels = torch.randint(0, num_vocab, (num_tokens,), device=device)
    vector = torch.ones(num_tokens, **wide)
    lse = torch.full((num_tokens,), 20.0, **wide)
    spec = policy_rows.PolicySpec("ce")  # no clip: a clipped row is not read twice
    arch = tiles.arch_of(device)
    rows, pair = (torch.float32,), (torch.float32, out.dtype)
    return [
        Job(tuned.row_key("row_stats", num_vocab, *rows), tuned.row_candidates(num_vocab, *rows),
            lambda tile: row_stats.row_stats(logits, labels, entropy=True, tile=tile)),
        Job(tuned.row_key("dlogits", num_vocab, *pair), tuned.row_candidates(num_vocab, *pair),
            lambda tile: dlogits.dlogits(logits, labels, lse, d_logprobs=vector, out=out, tile=tile)),
        Job(tuned.row_key("policy_rows", num_vocab, *pair), tuned.row_candidates(num_vocab, *pair),
            lambda tile: policy_rows.policy_rows(logits, labels, spec, weight=vector, out=out, tile=tile)),
        Job(tuned.head_key("head_forward", dtype, num_vocab, hidden_size), tiles.head_candidates(dtype, arch),
            lambda tile: head_forward.head_forward(hidden, weight, labels, entropy=True, tile=tile)),
        Job(tuned.head_key("head_dlogits", dtype, num_vocab, hidden_size), tiles.head_candidates(dtype, arch),
            lambda tile: head_backward.head_dlogits(
                hidden, weight, labels, lse, d_logprobs=vector, out=strip, tile=tile)),
    ]  # fmt: skip


def tune(
    num_vocab: int,
    hidden_size: int,
    dtype: torch.dtype = torch.bfloat16,
    *,
    device: torch.device | str = "cuda",
    num_tokens: int = 2048,
    timer: Timer = milliseconds,
    tell: Callable[[str], None] = lambda note: None,
) -> dict[str, Any]:
    """Time every candidate for heads of this size and write the quickest to the file; returns them by key.

    `num_tokens` is only how long the timed batch is. `tell` gets a line before each kernel.
    """
    device = torch.device(device)
    found = {}
    for job in jobs(num_vocab, hidden_size, dtype, device, num_tokens):
        tell(f"{job.key}: {len(job.candidates)} tiles")
        found[job.key] = fastest(job.candidates, job.launch, timer=timer)
    path = tuned.save(tuned.gpu_name(device), found)
    tell(f"Written: {path}. XLOSS_TILES=tuned uses it")
    return found


def main(words: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m xloss_kernels.tune", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--vocab", type=_size, required=True, help="vocabulary size of the head")
    parser.add_argument("--hidden", type=_size, required=True, help="hidden size of the head")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="dtype of hidden states and head")
    parser.add_argument("--tokens", type=_size, default=2048, help="tokens of the timed batch")
    given = parser.parse_args(words)
    if find_spec("triton") is None:
        parser.error("triton is not installed (it has packages for Linux only)")
    if os.environ.get("TRITON_INTERPRET") == "1" or not torch.cuda.is_available():
        parser.error("needs a CUDA device: an interpreter's time says nothing")
    found = tune(
        given.vocab, given.hidden, DTYPES[given.dtype], num_tokens=given.tokens,
        tell=lambda note: print(note, file=sys.stderr, flush=True))  # fmt: skip
    for key, tile in found.items():
        print(f"{key}\n  {tile}")
    return 0


def _size(word: str) -> int:
    value = int(word)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1; got {value}")
    return value


if __name__ == "__main__":
    raise SystemExit(main())
