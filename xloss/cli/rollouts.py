"""The policy steps' batch: text sampled from the model, rewarded in groups, as in any GRPO run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from xloss import linear_logprobs
from xloss.cli.tiny_lm import Policies, TinyLM, sample, windows

GROUP = 8  # continuations of one prompt
PROMPT = 16  # words of a prompt
CONTINUATION = 64  # words sampled after it


@dataclass(frozen=True)
class Rollouts:
    """``T`` sampled words as the loss sees them; everything detached and flat ``[T]``, hidden states ``[T, H]``."""

    hidden_states: Tensor
    head_weight: Tensor  # [V, H]
    shifted_labels: Tensor
    advantages: Tensor
    old_logprobs: Tensor
    ref_logprobs: Tensor
    num_prompts: int
    mean_reward: float

    @property
    def num_tokens(self) -> int:
        """``T``."""
        return len(self.shifted_labels)


def batch_shape(tokens: int) -> tuple[int, int]:
    """``(prompts, words a continuation)`` that make the most of ``tokens``, at least one group of 8 words each."""
    length = max(8, min(CONTINUATION, tokens // (4 * GROUP)))
    return max(1, tokens // (GROUP * length)), length


def reward(words: Tensor, lengths: Tensor) -> Tensor:
    """Mean number of characters of the words in each continuation ``[B, S]``: say long words. ``[B]``."""
    return lengths[words].mean(1)


def group_advantages(rewards: Tensor) -> Tensor:
    """``(reward - mean) / (std + 1e-6)`` inside each group of ``GROUP`` (GRPO, arXiv 2402.03300). ``[B] -> [B]``."""
    groups = rewards.view(-1, GROUP)
    centred = groups - groups.mean(1, keepdim=True)
    return (centred / (groups.std(1, keepdim=True) + 1e-6)).flatten()


def roll_out(
    policies: Policies,
    held_out: Tensor,
    vocabulary: Sequence[str],
    tokens: int,
    seed: int,
    tick: Callable[[], None] = lambda: None,
) -> Rollouts:
    """Sample from the old policy and look at what it said with the current one and with the reference.

    ``tick`` is called ``batch_shape(tokens)[1]`` times.
    """
    num_prompts, length = batch_shape(tokens)
    generator = torch.Generator().manual_seed(seed + 1)
    device = policies.current.lm_head.weight.device
    prompts = windows(held_out, num_prompts, PROMPT, generator).repeat_interleave(GROUP, 0).to(device)
    words = sample(policies.old, prompts, length, generator, tick)
    read = torch.cat([prompts, words[:, :-1]], 1)
    lengths = torch.tensor([float(len(word)) for word in vocabulary], device=device)
    rewards = reward(words, lengths)
    return Rollouts(
        hidden_states=_hidden(policies.current, read, length),
        head_weight=policies.current.lm_head.weight.detach(),
        shifted_labels=words.flatten(),
        advantages=group_advantages(rewards).repeat_interleave(length),
        old_logprobs=_logprobs(policies.old, read, words),
        ref_logprobs=_logprobs(policies.reference, read, words),
        num_prompts=num_prompts,
        mean_reward=rewards.mean().item(),
    )


@torch.no_grad()
def _hidden(model: TinyLM, read: Tensor, length: int) -> Tensor:
    return model(read)[:, -length:].flatten(0, 1).contiguous()


@torch.no_grad()
def _logprobs(model: TinyLM, read: Tensor, words: Tensor) -> Tensor:
    hidden = _hidden(model, read, words.shape[1])
    return linear_logprobs(hidden, model.lm_head.weight, words.flatten()).logprobs
