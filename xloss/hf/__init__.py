"""Hugging Face Transformers: a causal language model whose forward computes an xloss loss."""

from xloss.hf.attach import attach, detach, is_attached
from xloss.hf.transform import logit_transform

__all__ = ["attach", "detach", "is_attached", "logit_transform"]
