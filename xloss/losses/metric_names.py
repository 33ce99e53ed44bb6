"""Names of metrics in other frameworks: results under their names, where they have the same figure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import reduce
from operator import add, sub
from typing import Literal

from torch import Tensor

from xloss.errors import OptionError, unknown_name
from xloss.losses.xtuner_rollout import XTUNER_NAMES

Framework = Literal["xtuner", "trl", "verl", "nemo", "prime-rl"]


@dataclass(frozen=True)
class Peer:
    """A figure of another framework: ``ours`` under another name, or several of ours added or subtracted."""

    name: str
    ours: tuple[str, ...]
    of: Callable[[Tensor, Tensor], Tensor] = add

    @property
    def formula(self) -> str:
        """In our names."""
        return (" + " if self.of is add else " - ").join(self.ours)


def _same(**names: str) -> tuple[Peer, ...]:
    return tuple(Peer(theirs, (ours,)) for ours, theirs in names.items())


PEERS: dict[Framework, tuple[Peer, ...]] = {
    "xtuner": (
        *_same(
            ratio_max="reduced_train_policy_ratio_max",
            ratio_min="reduced_train_policy_ratio_min",
            ratio_abs_dev="reduced_train_policy_ratio_abs_dev_mean",
            approx_kl_k1="reduced_train_policy_kl1",
            approx_kl_k3="reduced_train_policy_kl3",
            ratio_low_frac="reduced_train_policy_clip_frac_low",
            ratio_high_frac="reduced_train_policy_clip_frac_high",
            num_tokens="reduced_train_policy_valid_count",
        ),
        Peer("max_ratio", ("ratio_max",)),
        *_same(**XTUNER_NAMES),
    ),
    "trl": (
        # a figure of sequences, where there is one, has the name
        *_same(seq_clip_frac_low="clip_ratio/low_mean", seq_clip_frac_high="clip_ratio/high_mean"),
        *_same(clip_frac_low="clip_ratio/low_mean", clip_frac_high="clip_ratio/high_mean"),
        Peer("clip_ratio/region_mean", ("seq_clip_frac_low", "seq_clip_frac_high")),
        Peer("clip_ratio/region_mean", ("clip_frac_low", "clip_frac_high")),
        Peer("policy_loss", ("pg_loss", "kl_loss")),
        *_same(
            pg_loss="policy_loss",
            ref_kl="kl",
            token_accuracy="mean_token_accuracy",
            approx_kl_k2="policy/approxkl_avg",
            ratio_mean="val/ratio",
            mismatch_abs="sampling/sampling_logp_difference/mean",
            logps_chosen="logps/chosen",
            logps_rejected="logps/rejected",
            reward_chosen="rewards/chosen",
            reward_rejected="rewards/rejected",
            reward_margin="rewards/margins",
            reward_accuracy="rewards/accuracies",
        ),
        Peer("rewards/margins", ("reward_chosen", "reward_rejected"), sub),
    ),
    "verl": (
        *_same(
            pg_loss="actor/pg_loss",
            approx_kl_k1="actor/ppo_kl",
            dual_clip_frac="actor/pg_clipfrac_lower",
            entropy="actor/entropy_loss",
            ref_kl="actor/kl_loss",
            value_loss="critic/vf_loss",
            value_clip_frac="critic/vf_clipfrac",
        ),
        Peer("actor/pg_clipfrac", ("clip_frac_low", "clip_frac_high")),
        *_same(
            mismatch_k1="rollout_corr/kl",
            mismatch_k3="rollout_corr/k3_kl",
            mismatch_chi2="rollout_corr/chi2_token",
            mismatch_ppl_ratio="rollout_corr/ppl_ratio",
            mismatch_log_ppl_diff="rollout_corr/log_ppl_diff",
            rollout_is_mean="rollout_corr/rollout_is_mean",
            rollout_is_min="rollout_corr/rollout_is_min",
            rollout_is_max="rollout_corr/rollout_is_max",
            rollout_is_high_frac="rollout_corr/rollout_is_ratio_fraction_high",
            rollout_is_mask_frac="rollout_corr/rollout_rs_masked_fraction",
        ),
    ),
    "nemo": _same(
        ratio_mean="probs_ratio",
        ratio_min="probs_ratio_min",
        ratio_max="probs_ratio_max",
        ref_kl="kl_penalty",
        mismatch_k3="gen_kl_error",
        rollout_is_clip_frac="is_oob_ratio",
        num_sequences="num_valid_samples",
        reward_accuracy="accuracy",
    ),
    "prime-rl": _same(
        masked_frac="is_masked",
        masked_frac_low="is_masked_low",
        masked_frac_high="is_masked_high",
        masked_kl_k3="masked_mismatch_kl",
        kept_kl_k3="unmasked_mismatch_kl",
    ),
}
"""What each framework calls our figures. Of several rows with one name, the first whose figures are there counts."""


def rename_metrics(results: Mapping[str, Tensor], to: Framework) -> dict[str, Tensor]:
    """Results of ``finalize_metrics`` under the names of another framework; ``docs/metrics.md`` has the tables.

    What the framework has no name for stays under ours, and so does what it only has as a part of another figure.

    Args:
        results: figures by our names, 0-d.
        to: ``xtuner``, ``trl``, ``verl``, ``nemo`` (NeMo RL) or ``prime-rl``.

    Raises:
        OptionError: another ``to``.
    """
    if to not in PEERS:
        raise OptionError(unknown_name("framework", to, list(PEERS)))
    found: dict[str, Tensor] = {}
    renamed: set[str] = set()
    for peer in PEERS[to]:
        if peer.name in found or any(name not in results for name in peer.ours):
            continue
        found[peer.name] = reduce(peer.of, [results[name] for name in peer.ours])
        if len(peer.ours) == 1:
            renamed.update(peer.ours)
    return {name: value for name, value in results.items() if name not in renamed} | found
