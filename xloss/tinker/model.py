"""A model as the client needs it: packed tokens in, hidden states out, and a head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from xloss.errors import OptionError, ShapeError, UnsupportedError


class LanguageModel(nn.Module):
    """Hidden states and a head.

    Args:
        backbone: called as ``backbone(tokens, position_ids, cu_seq_lens)`` with ``[1, T]`` int64 tokens of several
            sequences one after another, the position of each in its own sequence ``[1, T]``, and the bounds ``[N + 1]``
            of the sequences. It returns hidden states ``[1, T, H]``, after the final norm, in which no sequence sees
            another.
        head: the ``nn.Linear`` that makes logits of them.
        softcap: ``c`` in ``c tanh(logits / c)``, or ``None``.
        logit_scale: factor on the logits, before the cap.
        tokenizer: for ``get_tokenizer`` and stop strings, or ``None``.
        name: of the model, for ``get_info``.
        eos_token_ids: tokens that end a sample.

    Raises:
        UnsupportedError: the head is not an ``nn.Linear`` (an adapter around it, say), which would be left out.
    """

    def __init__(
        self,
        backbone: nn.Module,
        head: nn.Module,
        *,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        tokenizer: Any = None,
        name: str = "local",
        eos_token_ids: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        if not isinstance(head, nn.Linear):
            raise UnsupportedError(
                f"head must be an nn.Linear; got {type(head).__name__}, whose weight alone may not be the head. Merge "
                "an adapter on it first, or leave it off the head"
            )
        if head._forward_hooks or head._forward_pre_hooks:
            raise UnsupportedError("head has forward hooks, which would not run: only its weight and bias are read")
        self.backbone = backbone
        self.head = head
        self.softcap, self.logit_scale = softcap, logit_scale
        self.tokenizer, self.name, self.eos_token_ids = tokenizer, name, eos_token_ids

    @property
    def device(self) -> torch.device:
        """Of the head's weight."""
        return self.head.weight.device

    def hidden_states(self, tokens: Tensor, position_ids: Tensor, cu_seq_lens: Tensor) -> Tensor:
        """The backbone's output; override to call it in another way."""
        found: Tensor = self.backbone(tokens, position_ids, cu_seq_lens)
        return found

    def forward(self, tokens: Tensor, position_ids: Tensor, cu_seq_lens: Tensor) -> Tensor:
        """Hidden states ``[1, T, H]`` of packed ``tokens [1, T]``."""
        hidden = self.hidden_states(tokens, position_ids, cu_seq_lens)
        want = (1, tokens.shape[1], self.head.in_features)
        if not isinstance(hidden, Tensor) or tuple(hidden.shape) != want:
            got = tuple(hidden.shape) if isinstance(hidden, Tensor) else type(hidden).__name__
            raise ShapeError(f"the backbone must return hidden states [1, T, H] = {want}; got {got}")
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of some hidden states, for sampling: ``[.., H]`` to ``[.., V]``, float32 or wider."""
        logits = nn.functional.linear(hidden, self.head.weight, self.head.bias) * self.logit_scale
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def get_tokenizer(self) -> Any:
        """The tokenizer. Raises ``OptionError`` where there is none."""
        if self.tokenizer is None:
            raise OptionError("the model has no tokenizer; give one where it is made: tokenizer=...")
        return self.tokenizer


def as_language_model(model: Any) -> LanguageModel:
    """The model, if it is one. Raises ``OptionError`` with the way to make one."""
    if isinstance(model, LanguageModel):
        return model
    helper = "from_transformers(model)" if hasattr(model, "get_output_embeddings") else "LanguageModel(backbone, head)"
    raise OptionError(f"model must be a LanguageModel; got {type(model).__name__}. Make one by xloss.tinker.{helper}")
