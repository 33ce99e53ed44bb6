"""A tiny random Llama over characters, its tokenizer, and a local service that stands in for tinker's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from xloss.tinker import LanguageModel, ServiceClient, from_transformers

NAME = "tiny/characters"
_CHARACTERS = [chr(code) for code in range(32, 127)]


def tokenizer() -> Any:
    """One token a character, and marks for beginning and end."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {token: i for i, token in enumerate(["<bos>", "<eos>", "<unk>", "\n", *_CHARACTERS])}
    made = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>")


def llama(dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """Random weights, the same ones each time."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(
        **{"vocab_size": len(_CHARACTERS) + 4, "max_position_embeddings": 512, "eos_token_id": 1} | sizes | options
    )
    model = LlamaForCausalLM(config).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def make_model(base_model: str, lora_rank: int | None) -> LanguageModel:
    """The tiny model whatever the name; all of its weights are trained."""
    return from_transformers(llama(), tokenizer())


def service(folder: Path) -> ServiceClient:
    return ServiceClient(make_model, checkpoint_dir=folder)


LENGTHS, VOCAB = (7, 3, 5, 4), 99


def rollouts(seed: int = 0) -> list[Any]:
    """Datums of tinker, advantages of both signs."""
    import tinker

    random = np.random.default_rng(seed)
    return [
        tinker.Datum(
            model_input=tinker.ModelInput.from_ints(random.integers(0, VOCAB, n).tolist()),
            loss_fn_inputs={
                "target_tokens": random.integers(0, VOCAB, n),
                "logprobs": -4 * random.random(n) - 3,
                "advantages": torch.tensor(random.standard_normal(n), dtype=torch.float32),
            },
        )
        for n in LENGTHS
    ]


def supervised(seed: int = 0) -> list[Any]:
    """The same sequences with weights."""
    import tinker

    random = np.random.default_rng(seed)
    return [
        tinker.Datum(
            d.model_input,
            {
                "target_tokens": d.loss_fn_inputs["target_tokens"],
                "weights": random.random(len(d.loss_fn_inputs["logprobs"].data)),
            },
        )
        for d in rollouts(seed)
    ]
