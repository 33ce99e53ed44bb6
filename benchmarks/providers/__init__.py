"""Everything that can compute a case, by the name the command line knows it by."""

from __future__ import annotations

from benchmarks.providers.base import Provider
from benchmarks.providers.cce import CCE
from benchmarks.providers.eager import COMPILE, EAGER
from benchmarks.providers.gemm import GEMM
from benchmarks.providers.liger import LIGER_FLCE, LIGER_GRPO, LIGER_SCALED_CE, LIGER_TRITON_GRPO
from benchmarks.providers.quack import QUACK
from benchmarks.providers.torch_lce import TORCH_LCE, TORCH_LCE_TUNED
from benchmarks.providers.trl import TRL
from benchmarks.providers.xloss_plans import XLOSS
from benchmarks.providers.xtuner_loop import XTUNER_LOOP

PROVIDERS: dict[str, Provider] = {
    "gemm": GEMM,
    "eager": EAGER,
    "compile": COMPILE,
    "torch-lce": TORCH_LCE,
    "torch-lce-tuned": TORCH_LCE_TUNED,
    "liger-grpo": LIGER_GRPO,
    "liger-flce": LIGER_FLCE,
    "liger-triton-grpo": LIGER_TRITON_GRPO,
    "liger-scaled-ce": LIGER_SCALED_CE,
    "cce": CCE,
    "quack": QUACK,
    "trl": TRL,
    "xtuner-loop": XTUNER_LOOP,
    **XLOSS,
}

__all__ = ["PROVIDERS", "Provider"]
