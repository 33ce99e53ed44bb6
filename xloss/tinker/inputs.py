"""``loss_fn_inputs`` of packed sequences as the tensors of a loss, under its names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from xloss.errors import MissingFieldError, NonFiniteError, OptionError, ShapeError, UnsupportedError, unknown_name
from xloss.losses.base import BaseLossContext
from xloss.losses.ce import CELossConfig, CELossContextInputItem
from xloss.losses.config import BaseLossConfig
from xloss.losses.distill import DistillLossConfig
from xloss.losses.distill_kwargs import DistillLossContextInputItem
from xloss.losses.grpo import GRPOLossConfig
from xloss.losses.grpo_kwargs import RLLossContextInputItem
from xloss.losses.model import BaseLossContextInputItem, PerBatch, PerToken
from xloss.losses.preference import PreferenceLossConfig
from xloss.losses.preferences.kwargs import PreferenceLossContextInputItem
from xloss.losses.soft_ce import SoftCELossConfig, SoftCELossContextInputItem
from xloss.tinker.packs import IGNORE, Pack, Row, widened

_ITEMS: dict[type[BaseLossConfig], type[BaseLossContextInputItem]] = {
    GRPOLossConfig: RLLossContextInputItem,
    CELossConfig: CELossContextInputItem,
    SoftCELossConfig: SoftCELossContextInputItem,
    PreferenceLossConfig: PreferenceLossContextInputItem,
    DistillLossConfig: DistillLossContextInputItem,
}
_ALIASES = {"rollout_logprobs": "logprobs", "token_weight": "weights", "target_weights": "weights"}
"""Tinker's names of our fields."""
OF_BATCH = ("kl", "reward_shift")
"""Fields of preference losses that are one number for the batch; they come in ``loss_fn_config``."""
_NOT_IN_DATA = ("shifted_labels", "target_tokens", "class_weight", "teacher_hidden_states", "ref_hidden_states")


class LossInputs:
    """Reads the inputs of one loss.

    Args:
        name: of the loss, for messages. config: of the loss. of_batch: values of ``OF_BATCH``.
    """

    def __init__(self, name: str, config: BaseLossConfig, of_batch: Mapping[str, float]) -> None:
        self.name, self.config = name, config
        if of_batch and not isinstance(config, PreferenceLossConfig):
            raise OptionError(f"loss_fn {name!r} has no use for {', '.join(of_batch)} in loss_fn_config")
        self.of_batch = {key: torch.tensor(float(value)) for key, value in of_batch.items()}
        self.item = next(item for cls, item in _ITEMS.items() if isinstance(config, cls))
        fields = [f for f in self.item.model_fields if f not in (*_NOT_IN_DATA, *OF_BATCH)]
        self.fields = {_ALIASES.get(field, field): field for field in fields}
        self.masks = ["mask"]
        if isinstance(config, PreferenceLossConfig):
            self.masks.append("weights")
        if isinstance(config, GRPOLossConfig) and "sequence" in config.coupled_by():
            self.masks.append("sequence_ratio_mask")

    def contexts(self, packs: list[Pack]) -> list[BaseLossContext[Any]]:
        """The loss of each pack, calibrated over all of them."""
        if len(packs) > 1 and (why := self._compares_sequences()):
            raise UnsupportedError(
                f"loss_fn {self.name!r} {why}, but max_pack_tokens cuts the data into {len(packs)} packs; make the "
                "client with max_pack_tokens=None"
            )
        self._check_names([row for pack in packs for row in pack.rows])
        cls = self.config.loss_ctx_cls
        bounds = [pack.cu_seq_lens for pack in packs]
        kwargs = cls.build_batches_loss_kwargs([self._item(pack) for pack in packs], self.config, bounds)
        return [cls(self.config, one) for one in kwargs]

    def _compares_sequences(self) -> str:
        if isinstance(self.config, PreferenceLossConfig):
            return "compares sequences"
        reach = self.config.coupled_by() if isinstance(self.config, GRPOLossConfig) else {}
        return "; ".join(why for far, why in reach.items() if far in ("group", "batch"))

    def _item(self, pack: Pack) -> BaseLossContextInputItem:
        device, targets = pack.tokens.device, pack.targets
        several = self.item is SoftCELossContextInputItem
        if targets.ndim == 3 and not several:
            raise ShapeError(
                f"loss_fn {self.name!r} takes target_tokens [N]; got {tuple(targets.shape[1:])}. Several targets a "
                "token: cross_entropy"
            )
        keep = torch.cat([self._mask(row) for row in pack.rows]).to(device)[None]
        found: dict[str, Any] = {}
        if several:
            targets = targets if targets.ndim == 3 else targets[..., None]
            counts = keep & (targets != IGNORE).any(-1)
            found["shifted_labels"], found["target_tokens"] = torch.where(counts, 0, IGNORE), targets
            found["target_weights"] = torch.ones_like(targets, dtype=torch.float32)
        else:
            found["shifted_labels"] = targets.masked_fill(~keep, IGNORE)
        for given, field in self.fields.items():
            values = self._field(pack, given, field)
            if values is not None:
                found[field] = values.to(device)
        found |= {key: value.to(device) for key, value in self.of_batch.items()}
        self._require(found)
        return self.item(**found)

    def _check_names(self, rows: list[Row]) -> None:
        """Every name is known, and one that is no mask is in all sequences or in none."""
        accepted = ["target_tokens", *self.fields, *self.masks]
        for name in dict.fromkeys(name for row in rows for name in row.inputs):
            if name not in accepted:
                raise OptionError(f"{unknown_name(f'input of loss_fn {self.name!r}', name, accepted)}{_hint(name)}")
            have = [name in row.inputs for row in rows]
            if name not in self.masks and not all(have):
                raise MissingFieldError(f"data[{have.index(False)}] has no {name}, others have it")

    def _mask(self, row: Row) -> Tensor:
        """Tokens that take part, ``[N]`` bool."""
        keep = torch.ones(row.tokens.shape[0], dtype=torch.bool)
        for name in self.masks:
            if name not in row.inputs:
                continue
            mask = row.inputs[name]
            if mask.shape != row.tokens.shape or not bool(((mask == 0) | (mask == 1)).all()):
                raise OptionError(f"{name} must be [N] = {tuple(row.tokens.shape)} of 0 and 1; got {mask}")
            keep &= mask == 1
            lost = row.inputs.get("advantages")
            if name == "sequence_ratio_mask" and lost is not None and bool((lost[mask == 0] != 0).any()):
                raise UnsupportedError(
                    "advantages are not 0 where sequence_ratio_mask is: a token with a loss but no part in the ratio "
                    "is not supported"
                )
        return keep

    def _field(self, pack: Pack, given: str, field: str) -> Tensor | None:
        """A field of all sequences of the pack, ``None`` where they have none."""
        if given in self.masks or given not in pack.rows[0].inputs:
            return None
        mark = next(m for m in self.item.model_fields[field].metadata if isinstance(m, PerToken | PerBatch))
        values = [row.inputs[given] for row in pack.rows]
        if isinstance(mark, PerBatch):
            if any(value.numel() != 1 for value in values):
                raise ShapeError(f"{given} must be one number a sequence")
            return torch.stack([value.reshape(()) for value in values])
        spread = [_per_token(given, value, row, mark) for value, row in zip(values, pack.rows, strict=True)]
        return widened(spread, mark.pad)[None] if not mark.trailing else _trailing(spread, mark.pad)

    def _require(self, found: Mapping[str, Any]) -> None:
        needed = ["advantages", "rollout_logprobs"] if isinstance(self.config, GRPOLossConfig) else []
        for field in needed:
            if field not in found:
                raise MissingFieldError(f"loss_fn {self.name!r} needs {_ALIASES.get(field, field)} in every datum")


def _per_token(name: str, value: Tensor, row: Row, mark: PerToken) -> Tensor:
    length = row.tokens.shape[0]
    if value.ndim == 0 and not mark.trailing:
        value = value.expand(length)
    fits = value.shape == row.targets.shape if name == "weights" and mark.trailing else value.shape[:1] == (length,)
    if not fits or value.ndim > (2 if mark.trailing else 1):
        want = tuple(row.targets.shape) if name == "weights" else (length,)
        raise ShapeError(f"{name} must be {want}, one row for each token; got {tuple(value.shape)}")
    if name == "weights" and not bool(value.isfinite().all()):  # a loss checks the tensors of a rollout itself
        raise NonFiniteError(f"weights must be finite; got {value}")
    floating = isinstance(mark.pad, float)
    return value.float() if floating and not value.dtype.is_floating_point else value


def _trailing(parts: list[Tensor], pad: float) -> Tensor:
    return widened([part if part.ndim == 2 else part[:, None] for part in parts], pad)[None]


def _hint(name: str) -> str:
    if name == "weights":
        return " Tokens to leave out: mask. A factor on a token's loss: multiply its advantage."
    if name in ("clip_low_threshold", "clip_high_threshold"):
        return " Thresholds come in loss_fn_config, the same for all tokens."
    return ""
