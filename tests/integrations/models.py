"""Tiny random models of real architectures, built from their configs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

VOCAB = 101
_SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MOE: dict[str, Any] = {"output_router_logits": True, "router_aux_loss_coef": 0.1, "num_experts_per_tok": 2}
_MAMBA: dict[str, Any] = {
    "mamba_d_ssm": 32,
    "mamba_n_heads": 4,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_chunk_size": 8,
}
_GPT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 64,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "mistral": ("mistral", {}),
    "gemma 2 (softcap, tied)": ("gemma2", {"final_logit_softcapping": 2.0}),
    "gemma 3 (tied)": ("gemma3_text", {"final_logit_softcapping": 1.5}),
    "gpt-neox": ("gpt_neox", {"hidden_dropout": 0.0, "attention_dropout": 0.0}),
    "granite (logits divided)": ("granite", {"logits_scaling": 8.0}),
    "cohere (logits scaled)": ("cohere", {"logit_scale": 0.25}),
    "mixtral (aux loss)": ("mixtral", {**_MOE, "num_local_experts": 4}),
    "qwen3-moe (aux loss)": ("qwen3_moe", {**_MOE, "num_experts": 4, "moe_intermediate_size": 8}),
    "gpt-2": ("gpt2", _GPT),
    "phi (head bias)": ("phi", {"resid_pdrop": 0.0, "embd_pdrop": 0.0}),
    "olmo 2": ("olmo2", {}),
    "falcon-h1 (logits multiplied)": ("falcon_h1", {"lm_head_multiplier": 0.5, **_MAMBA}),
}

UNPACKED: dict[str, tuple[str, dict[str, Any]]] = {
    "opt": ("opt", {"word_embed_proj_dim": 16, "ffn_dim": 24, "dropout": 0.0}),
}
"""Architectures whose packed sequences see each other."""


def build(name: str, dtype: torch.dtype = torch.float64, **overrides: Any) -> Any:
    """The architecture ``name`` with random weights, the same ones each time; logits of unit scale, not near 0."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, options = (ARCHITECTURES | UNPACKED)[name]
    base = {} if model_type == "gpt2" else _SMALL
    torch.manual_seed(7)
    config = AutoConfig.for_model(model_type, **{**base, **options, **overrides})
    config._attn_implementation = "eager" if model_type == "gemma2" else "sdpa"  # Gemma 2 caps its scores too
    config._experts_implementation = "eager"  # the grouped one has no float64
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        model.get_output_embeddings().weight.mul_(8.0)
    return model


def batch(rows: int = 3, length: int = 12, seed: int = 3) -> dict[str, Tensor]:
    """Right-padded rows of uneven lengths, labels at their own tokens."""
    random = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(3, VOCAB, (rows, length), generator=random)
    lengths = torch.tensor([max(2, length - 4 * row) for row in range(rows)])
    attention_mask = (torch.arange(length) < lengths[:, None]).long()
    input_ids = input_ids * attention_mask
    labels = input_ids.masked_fill(attention_mask == 0, -100)
    labels[0, :3] = -100
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Gradients of the parameters, taken off the model."""
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found
