"""A causal LM of Hugging Face as a ``LanguageModel``. Knows no class of ``transformers``, only how its models look."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from xloss.errors import OptionError, UnsupportedError
from xloss.hf.transform import logit_transform, output_head
from xloss.tinker.model import LanguageModel


def from_transformers(model: Any, tokenizer: Any = None, *, name: str | None = None) -> LanguageModel:
    """A causal LM of ``transformers``, also with PEFT adapters on its backbone, for ``TrainingClient``.

    Sequences are packed by position ids that start anew, without an attention mask: transformers then keeps them apart
    in every attention implementation that can. Three short sequences through the model, packed and alone, prove it
    here, and prove that head, softcap and scale make the model's own logits.

    Args:
        model: with ``get_output_embeddings()`` and a backbone; frozen parameters stay frozen.
        tokenizer: for ``get_tokenizer`` and stop strings.
        name: for ``get_info``; default ``model.config._name_or_path``.

    Raises:
        OptionError: not such a model. UnsupportedError: packed sequences see each other, or something unknown stands
        between the head and the logits, or an adapter is on the head.
    """
    inner = model.get_base_model() if hasattr(model, "peft_config") else model
    backbone = getattr(inner, getattr(inner, "base_model_prefix", ""), None)
    if backbone is None or not hasattr(inner, "get_output_embeddings"):
        raise OptionError(f"model must be a causal LM of transformers, backbone and head; got {type(model).__name__}")
    transform, config = logit_transform(inner), inner.config.get_text_config()
    eos = getattr(tokenizer, "eos_token_id", None)
    eos = config.eos_token_id if eos is None else eos
    made = _CausalLM(
        backbone,
        output_head(inner),
        softcap=transform.softcap,
        logit_scale=transform.logit_scale,
        tokenizer=tokenizer,
        name=name or getattr(inner.config, "_name_or_path", "") or type(inner).__name__,
        eos_token_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
    )
    _prove(made, inner)
    return made


class _CausalLM(LanguageModel):
    def hidden_states(self, tokens: Tensor, position_ids: Tensor, cu_seq_lens: Tensor) -> Tensor:
        found: Tensor = self.backbone(input_ids=tokens, position_ids=position_ids, use_cache=False)[0]
        return found


@torch.no_grad()
def _prove(made: LanguageModel, model: nn.Module) -> None:
    training = model.training
    model.eval()
    try:
        vocab = made.head.out_features
        tokens = (torch.arange(11) * 7919 % vocab).to(made.device)  # no two sequences alike
        alone = [model(input_ids=part[None], use_cache=False).logits[0] for part in tokens.split([4, 1, 6])]
        bounds = torch.tensor([0, 4, 5, 11], device=made.device)
        positions = torch.cat([torch.arange(4), torch.arange(1), torch.arange(6)])[None].to(made.device)
        packed = made.logits(made(tokens[None], positions, bounds))[0]
        first = made.logits(made(tokens[None, :4], positions[:, :4], bounds[:2]))[0]
    finally:
        model.train(training)
    if not _close(first, alone[0]):
        raise UnsupportedError(
            f"{type(model).__name__} makes other logits than its head with softcap={made.softcap} and "
            f"logit_scale={made.logit_scale}: something unknown stands between them. Write a LanguageModel for it"
        )
    if not _close(packed, torch.cat(alone)):
        raise UnsupportedError(
            f"{type(model).__name__} lets packed sequences see each other (attention implementation "
            f"{getattr(getattr(model, 'config', None), '_attn_implementation', None)!r}). Write a LanguageModel for it"
        )


def _close(got: Tensor, want: Tensor) -> bool:
    """Equal but for rounding: half the digits of the model's dtype."""
    allowed = torch.finfo(want.dtype).eps ** 0.5
    return bool((got - want).abs().max() <= allowed * want.abs().max())
