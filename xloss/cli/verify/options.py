"""Options of ``xloss verify``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from cyclopts import Parameter, validators

from xloss.cli.options import Flag

DType = Literal["float32", "float64", "bfloat16"]
Names = Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative="", show_default=False)]
Size = Annotated[int, Parameter(validator=validators.Number(gte=8))]
Positive = Annotated[float | None, Parameter(validator=validators.Number(gt=0))]


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class VerifyOptions:
    """What the user may choose."""

    layouts: Names = ()
    """Layouts to run; all by default, and a wrong name lists them."""
    losses: Names = ()
    """Losses to run: ce ce-sample grpo gspo dpo by default, any that `xloss losses` lists, or all."""
    loss: str | None = None
    """A loss of your own, my_package.my_module:MyLossConfig: a config, its class, or a function that makes one."""
    nproc: Annotated[int | None, Parameter(validator=validators.Number(gte=1, lte=64))] = None
    """Processes to start (2); under torchrun there are as many as it started."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes NCCL if there is a GPU for every process, else gloo on the CPU."""
    hidden_size: Size = 32
    """Hidden size of the model."""
    vocab_size: Annotated[int, Parameter(validator=validators.Number(gte=16))] = 96
    """Words in the vocabulary."""
    tokens: Annotated[int, Parameter(validator=validators.Number(gte=64))] = 192
    """Tokens of one optimizer step, over all processes."""
    dtype: DType = "float32"
    """Dtype of the model."""
    bias: Flag = False
    """Give the head a bias in every layout."""
    softcap: Positive = None
    """Cap the logits: c in c tanh(z / c)."""
    seed: int = 0
    """Seed of weights and data."""
    timeout: Annotated[float, Parameter(validator=validators.Number(gt=0))] = 600
    """Seconds after which processes that are not done are ended."""
    json: Flag = False
    """Print JSON to stdout, and nothing else."""
