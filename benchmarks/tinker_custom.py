"""``python -m benchmarks.tinker_custom``: a custom loss of the training client against a built-in one, whole steps.

A step is the model's forward and backward and the head's, through ``TrainingClient``. Three losses, side by side:

- built-in: ``importance_sampling`` by name, one pass through the head
- custom: the same formula as a function of the log-probs, and the variance of all log-probs, which couples every token
- service: the custom loss as Tinker's SDK has to do it, forward for the log-probs, then ``cross_entropy`` weighed by
  their gradients

Logits of these shapes fit the default budget of a custom loss, which keeps them for the head's second pass. One row is
measured with a budget of a quarter of them: most are formed again.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.environment import device_name
from benchmarks.timing import interleave, paired_ratio, time_once
from xloss.tinker import Datum, LanguageModel, TrainingClient


@dataclass(frozen=True)
class Shape:
    """A dense model of ``layers`` blocks ``[H, 4 H, H]`` and a head; attention within sequences."""

    name: str
    tokens: int
    hidden: int
    layers: int
    vocab: int
    sequences: int = 8


SHAPES = {
    "cpu": (
        Shape("model dominates", 512, 256, 12, 8192),
        Shape("both", 512, 256, 4, 16384),
        Shape("head dominates", 1024, 128, 1, 32768),
    ),
    "cuda": (
        Shape("model dominates", 16384, 2048, 24, 151936),
        Shape("both", 16384, 2048, 8, 151936),
        Shape("head dominates", 16384, 2048, 1, 151936),
    ),
}


class Block(nn.Module):
    """Attention within each sequence, all of one length, and an MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, sequences: int) -> Tensor:
        parts = self.qkv(self.norms[0](x))
        q, k, v = parts.reshape(sequences, -1, 3, self.heads, x.shape[-1] // self.heads).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(x.shape))
        return x + self.mlp(self.norms[1](x))


class Backbone(nn.Module):
    """Sequences of one length: packed tokens are a batch, and no mask is needed."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed = nn.Embedding(shape.vocab, shape.hidden)
        self.blocks = nn.ModuleList(Block(shape.hidden, max(1, shape.hidden // 64)) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.hidden)

    def forward(self, tokens: Tensor, position_ids: Tensor, cu_seq_lens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, cu_seq_lens.numel() - 1)
        return self.norm(x)


def importance_sampling(data: list[Any], logprobs: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
    """The built-in formula as a user writes it."""
    terms = [
        -((lp - d.loss_fn_inputs["logprobs"]).exp() * d.loss_fn_inputs["advantages"]).sum()
        for lp, d in zip(logprobs, data, strict=True)
    ]
    return torch.stack(terms).sum(), {}


def variance(data: list[Any], logprobs: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
    """Couples every token."""
    return torch.cat(logprobs).var(), {}


def steps(shape: Shape, device: str, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    """What is timed, by name; the first is the base."""
    torch.manual_seed(0)
    head = nn.Linear(shape.hidden, shape.vocab, bias=False)
    model = LanguageModel(Backbone(shape), head).to(device, dtype)
    length = shape.tokens // shape.sequences
    data = [
        Datum(
            torch.randint(0, shape.vocab, (length,)),
            {
                "target_tokens": torch.randint(0, shape.vocab, (length,)),
                "logprobs": -10 - torch.rand(length),
                "advantages": torch.randn(length),
            },
        )
        for _ in range(shape.sequences)
    ]
    logits = 4 * shape.tokens * shape.vocab
    default, small = (TrainingClient(model, returns="torch", logits_budget=b) for b in (None, logits // 4))

    def service() -> None:
        targets = [Datum(d.model_input, {"target_tokens": d.loss_fn_inputs["target_tokens"]}) for d in data]
        seen = default.forward(targets, "cross_entropy").result().loss_fn_outputs
        leaves = [out["logprobs"].requires_grad_() for out in seen]
        variance(data, leaves)[0].backward()
        weighed = [
            Datum(d.model_input, {**d.loss_fn_inputs, "weights": -leaf.grad})
            for d, leaf in zip(targets, leaves, strict=True)
        ]
        default.forward_backward(weighed, "cross_entropy")

    def cleared(run: Callable[[], Any]) -> Callable[[], Any]:
        def step() -> None:
            run()
            default.zero_grad()

        return step

    return {
        "built-in": cleared(lambda: default.forward_backward(data, "importance_sampling")),
        "custom, same formula": cleared(lambda: default.forward_backward_custom(data, importance_sampling)),
        "custom, variance": cleared(lambda: default.forward_backward_custom(data, variance)),
        "custom, variance, a quarter of the logits kept": cleared(
            lambda: small.forward_backward_custom(data, variance)
        ),
        "as a service: forward, then backward": cleared(service),
    }


def measure(shape: Shape, device: str, dtype: torch.dtype, rounds: int) -> list[str]:
    """Rows of the table: median, least and most of the rounds, and the median of ratios within a round."""
    runs = steps(shape, device, dtype)
    for run in runs.values():
        run()  # warm
    times, failed = interleave(runs, rounds, lambda run: clock(run, device))
    if failed:
        raise next(iter(failed.values()))
    base = times["built-in"]
    rows = []
    for name, found in times.items():
        spread = f"{statistics.median(found):.0f} ({min(found):.0f} to {max(found):.0f})"
        rows.append(f"| {shape.name} | {name} | {spread} | {paired_ratio(found, base):.2f} |")
    return rows


def clock(run: Callable[[], Any], device: str) -> float:
    """Milliseconds of one step: of the GPU, or of this process's own time on the CPU, which neighbours do not take."""
    if device.startswith("cuda"):
        return time_once(run, device)
    start = time.process_time()
    run()
    return 1e3 * (time.process_time() - start)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tinker_custom", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    kind = torch.device(given.device).type
    dtype = torch.bfloat16 if kind == "cuda" else torch.float32
    print(f"{device_name(given.device)}; {dtype}, torch {torch.__version__}\n")
    print("| shape | step | ms, median (min to max) | / built-in |\n| --- | --- | ---: | ---: |")
    for shape in SHAPES[kind]:
        for row in measure(shape, given.device, dtype, given.rounds):
            print(row, flush=True)
    for shape in SHAPES[kind]:
        print(f"\n{shape.name}: T={shape.tokens} H={shape.hidden} layers={shape.layers} V={shape.vocab}", end="")
    print()


if __name__ == "__main__":
    main()
