"""What every rank imports, for the server that ranks are forked from."""
# ruff: noqa: F401

import torch._dynamo
import torch.distributed.fsdp
import torch.distributed.tensor.parallel

import tests.distributed.vocab_ranks
import xloss.cli.app
