"""Hypothesis strategies: heads, packs and steps, with the cases that break kernels drawn on purpose.

Only sizes and choices are drawn; numbers come from a generator seeded with a drawn integer, so that shrinking shrinks
structure. Forced now and then: T = 0, T = 1, all labels ignored, label 0 and label V - 1, segments of length 1, logits
of size 1e3, tensors that are views with gaps, chunks longer than T, of one token, or not dividing T.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.oracle.grpo import Batch
from tests.oracle.head import Head

VOCAB_SIZES = (1, 2, 3, 7, 29, 53)
MAGNITUDES = (1.0, 1.0, 30.0, 1e3)  # of hidden states; weights are of unit scale
KL_TYPES = ("kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3")


def with_gaps(x: Tensor) -> Tensor:
    """The same values and shape in a buffer twice as large, every other entry of which is another number."""
    if x.dim() == 0:
        return x
    buffer = torch.full((*x.shape[:-1], 2 * x.shape[-1]), 3, dtype=x.dtype)
    buffer[..., ::2] = x
    return buffer[..., ::2]


def transposed(x: Tensor) -> Tensor:
    """The same values and shape, the last two axes swapped in memory."""
    return x if x.dim() < 2 else x.transpose(-1, -2).contiguous().transpose(-1, -2)


LAYOUTS = {"contiguous": lambda x: x, "gaps": with_gaps, "transposed": transposed}


@dataclass
class HeadCase:
    """Inputs of the head: hidden [.., H], weight [V, H], bias [V] or None, labels [..] or [.., K]."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor
    head: Head
    chunk_size: int | None
    seed: int

    @property
    def leading(self) -> torch.Size:
        return self.hidden.shape[:-1]

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed + 1)

    def to(self, dtype: torch.dtype) -> HeadCase:
        bias = None if self.bias is None else self.bias.to(dtype)
        return HeadCase(
            self.hidden.to(dtype), self.weight.to(dtype), bias, self.labels, self.head, self.chunk_size, self.seed
        )

    def __repr__(self) -> str:
        return (
            f"HeadCase(hidden={tuple(self.hidden.shape)}/{self.hidden.stride()}, V={self.weight.shape[0]}, "
            f"bias={self.bias is not None}, labels={self.labels.tolist()}, {self.head}, chunk={self.chunk_size}, "
            f"seed={self.seed})"
        )


@st.composite
def leading_shapes(draw: st.DrawFn, max_tokens: int = 23) -> tuple[int, ...]:
    """[T], [1, T] or [B, S]; empty and single-token ones are frequent."""
    tokens = draw(st.one_of(st.integers(2, max_tokens), st.sampled_from((0, 1, 1, max_tokens))))
    layout = draw(st.sampled_from(("T", "1T", "BS")))
    if layout == "T":
        return (tokens,)
    if layout == "1T":
        return (1, tokens)
    return (draw(st.integers(2, 4)), max(1, tokens // 3))


@st.composite
def label_tensors(
    draw: st.DrawFn, shape: tuple[int, ...], vocab: int, ignore_index: int, generator: torch.Generator
) -> Tensor:
    """Random labels with the first and last live ones forced to V - 1 and 0, then some, none or all ignored."""
    labels = torch.randint(0, vocab, shape, generator=generator)
    flat = labels.reshape(-1)
    if flat.numel():
        flat[0], flat[-1] = vocab - 1, 0
        if flat.numel() > 2 and draw(st.booleans()):
            flat[1] = vocab - 1
    share = draw(st.sampled_from((0.0, 0.0, 0.3, 0.8, 1.0)))
    dead = torch.rand(shape, generator=generator) < share
    labels = labels.reshape(shape)
    labels[dead] = ignore_index
    return labels


def chunk_sizes(tokens: int) -> st.SearchStrategy[int | None]:
    return st.one_of(st.integers(1, max(1, tokens)), st.sampled_from((None, 1, tokens + 5)))


@st.composite
def head_cases(
    draw: st.DrawFn,
    *,
    max_tokens: int = 23,
    several_labels: bool = True,
    magnitudes: tuple[float, ...] = MAGNITUDES,
    dtype: torch.dtype = torch.float64,
) -> HeadCase:
    seed = draw(st.integers(0, 2**31))
    g = torch.Generator().manual_seed(seed)
    shape = draw(leading_shapes(max_tokens))
    hidden_size, vocab = draw(st.integers(1, 9)), draw(st.sampled_from(VOCAB_SIZES))
    num_labels = draw(st.sampled_from((None, None, 1, 3))) if several_labels else None
    ignore_index = draw(st.sampled_from((-100, -100, -1)))
    label_shape = shape if num_labels is None else (*shape, num_labels)
    temperature = draw(st.sampled_from((1.0, 1.0, 0.6, "per token")))
    head = Head(
        temperature=0.3 + 2 * torch.rand(shape, generator=g, dtype=dtype)
        if temperature == "per token"
        else temperature,
        softcap=draw(st.sampled_from((None, None, 3.0, 30.0))),
        logit_scale=draw(st.sampled_from((1.0, 1.0, 0.25, 2.0))),
        ignore_index=ignore_index,
    )
    layout = st.sampled_from(tuple(LAYOUTS))
    hidden = torch.randn(*shape, hidden_size, generator=g, dtype=dtype) * draw(st.sampled_from(magnitudes))
    weight = torch.randn(vocab, hidden_size, generator=g, dtype=dtype)
    bias = torch.randn(vocab, generator=g, dtype=dtype) if draw(st.booleans()) else None
    labels = draw(label_tensors(label_shape, vocab, ignore_index, g))
    return HeadCase(
        hidden=LAYOUTS[draw(layout)](hidden),
        weight=LAYOUTS[draw(layout)](weight),
        bias=bias,
        labels=LAYOUTS[draw(layout)](labels),
        head=head,
        chunk_size=draw(chunk_sizes(int(torch.Size(shape).numel()))),
        seed=seed,
    )


@st.composite
def packs(draw: st.DrawFn, max_segments: int = 4, max_length: int = 6) -> list[int]:
    """Lengths of the samples of one pack, lengths 1 and 0 among them."""
    lengths = st.one_of(st.just(1), st.integers(1, max_length), st.integers(0, max_length))
    return draw(st.lists(lengths, min_size=1, max_size=max_segments))


@dataclass
class StepCase:
    """All micro-batches of one optimizer step over one head."""

    weight: Tensor
    bias: Tensor | None
    hidden: list[Tensor]
    batches: list[Batch]
    cu_seq_lens: list[Tensor] | None
    head: Head
    chunk_size: int | None
    seed: int

    def __repr__(self) -> str:
        labels = [b.labels.tolist() for b in self.batches]
        cu = None if self.cu_seq_lens is None else [c.tolist() for c in self.cu_seq_lens]
        return (
            f"StepCase(V={self.weight.shape[0]}, H={self.weight.shape[1]}, bias={self.bias is not None}, "
            f"labels={labels}, cu={cu}, {self.head}, chunk={self.chunk_size}, seed={self.seed})"
        )


@st.composite
def step_cases(
    draw: st.DrawFn,
    *,
    packed: bool | None = None,
    weighted: bool = True,
    scalar_temperature: bool = True,
    dtype: torch.dtype = torch.float64,
    max_batches: int = 3,
) -> StepCase:
    """One to three micro-batches, packed or padded, with everything that a policy loss may ask for.

    `old` is near the current log-probs now and then far off, so that every branch of every clip is taken.
    """
    seed = draw(st.integers(0, 2**31))
    g = torch.Generator().manual_seed(seed)
    hidden_size, vocab = draw(st.integers(1, 7)), draw(st.sampled_from(VOCAB_SIZES[1:]))
    packed = draw(st.booleans()) if packed is None else packed
    layout = draw(st.sampled_from(("T", "1T") if packed else ("T", "1T", "BS")))
    hidden, batches, cus = [], [], []
    weight = torch.randn(vocab, hidden_size, generator=g, dtype=dtype)
    for _ in range(draw(st.integers(1, max_batches))):
        lengths = draw(packs())
        tokens = sum(lengths)
        shape = {"T": (tokens,), "1T": (1, tokens), "BS": (len(lengths), max(lengths))}[layout]
        labels = draw(label_tensors(shape, vocab, -100, g))

        def randn(shape: tuple[int, ...] = shape) -> Tensor:
            return torch.randn(shape, generator=g, dtype=dtype)

        advantages = randn() * (torch.rand(shape, generator=g) > draw(st.sampled_from((0.0, 0.5))))
        spread = draw(st.sampled_from((0.3, 1.0, 12.0)))
        guess = -float(torch.tensor(float(vocab)).log())
        batches.append(
            Batch(
                labels,
                advantages,
                old=guess + spread * randn(),
                ref=guess + spread * randn(),
                is_weights=torch.rand(shape, generator=g, dtype=dtype) * 2
                if weighted and draw(st.booleans())
                else None,
            )
        )
        hidden.append(torch.randn(*shape, hidden_size, generator=g, dtype=dtype))
        cus.append(torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32))
    head = Head(
        temperature=draw(st.sampled_from((1.0, 0.7))) if scalar_temperature else 1.0,
        softcap=draw(st.sampled_from((None, None, 5.0))),
        logit_scale=draw(st.sampled_from((1.0, 0.5))),
    )
    bias = torch.randn(vocab, generator=g, dtype=dtype) if draw(st.booleans()) else None
    longest = max(h.reshape(-1, hidden_size).shape[0] for h in hidden)
    return StepCase(weight, bias, hidden, batches, cus if packed else None, head, draw(chunk_sizes(longest)), seed)


@st.composite
def policies(draw: st.DrawFn) -> dict[str, object]:
    """A policy_loss_cfg with tight clips, so that both sides act. The ratio is against `old`."""
    name = draw(st.sampled_from(("vanilla", "dro", "reinforce", "kimi", *TOKEN_RATIO)))
    if name == "vanilla":
        return {
            "loss_type": name,
            "cliprange_low": draw(st.sampled_from((0.1, 0.2))),
            "cliprange_high": draw(st.sampled_from((0.1, 0.28))),
            "clip_ratio_c": draw(st.sampled_from((None, 1.5, 3.0))),
            "log_prob_diff_min": draw(st.sampled_from((-20.0, -2.0))),
            "log_prob_diff_max": draw(st.sampled_from((20.0, 1.5))),
        }
    fields = TOKEN_RATIO.get(name) or {"dro": {"beta": (0.05, 1.0)}, "kimi": {"tau": (0.1, 1.0)}}.get(name, {})
    return {"loss_type": name} | {field: draw(st.sampled_from(values)) for field, values in fields.items()}


_CLAMP = {"log_ratio_clamp": (20.0, 1.5)}
_DELTAS = {"anchor": ("old",), "delta_low": (0.05, 0.2), "delta_high": (0.02, 0.2), "ratio_cap": (None, 2.0)}
TOKEN_RATIO: dict[str, dict[str, tuple[object, ...]]] = {
    "ppo": {
        "clip_low_threshold": (0.9, 0.8),
        "clip_high_threshold": (1.1, 1.28),
        "dual_clip_c": (None, 1.4, 3.0),
        "delta": (None, 1.5, 4.0),
        **_CLAMP,
    },
    "cispo": {"clip_low_threshold": (0.0, 0.8), "clip_high_threshold": (1.2, 5.0), "unified_mask": (False, True)},
    "importance_sampling": {"log_ratio_clamp": (None, 1.5)},
    "tis": _CLAMP,
    "rollout_is": {"anchor": ("old",), "cliprange_low": (0.2, 0.9), "cliprange_high": (0.3, 4.0), **_CLAMP},
    "topr": {"positive_weight": (1.0, 0.3), "negative_weight": (1.0, 2.0)},
    "sapo": {"tau_pos": (1.0, 2.0), "tau_neg": (1.05, 0.6), **_CLAMP},
    "dppo_tv": _DELTAS | {"one_sided": (True, False)} | _CLAMP,
    "dppo_kl": _DELTAS | _CLAMP,
}
"""Fields of losses of a token's own ratio, and values to draw; all but `kimi` and `dro` scale with the advantages."""
