"""Contract: ``import xloss`` is light. It takes in no Triton, no plotting or command-line library, asks CUDA nothing,
and works where Triton does not exist and on systems other than Linux. Each case is a fresh interpreter, for imports
leave traces.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import xloss

ROOT = Path(__file__).resolve().parents[2]

BLOCK = """
import importlib.abc, sys

class Block(importlib.abc.MetaPathFinder):
    def __init__(self, *names):
        self.names = names
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return None
"""

WORK = """
torch.manual_seed(0)
hidden = torch.randn(6, 4, requires_grad=True)
weight = torch.randn(11, 4, requires_grad=True)
labels = torch.tensor([0, 10, -100, 3, 3, 7])
for mode in ("auto", "eager", "chunk"):
    stats = xloss.linear_logprobs(hidden, weight, labels, mode=mode, return_entropy=True)
    (stats.logprobs.sum() + stats.entropy.sum()).backward()
assert hidden.grad.isfinite().all() and weight.grad.isfinite().all()
item = xloss.CELossContextInputItem(shifted_labels=labels)
cfg = xloss.CELossConfig()
kwargs = xloss.CELossContext.build_batches_loss_kwargs([item], cfg)
loss, info = xloss.CELossContext(cfg, kwargs[0]).forward(hidden, weight)
loss.backward()
"""


def run(code: str) -> str:
    """Output of ``code`` in a fresh interpreter that imports from this tree."""
    start = f"import sys; sys.path[:0] = {[str(ROOT), str(ROOT / 'kernels')]!r}\n"
    command = [sys.executable, "-c", start + code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_takes_in_nothing_heavy_and_warns_of_nothing() -> None:
    run("""
import warnings
import torch, pydantic
warnings.simplefilter("error")
import xloss
heavy = ("triton", "xloss_kernels", "matplotlib", "cyclopts", "rich", "hypothesis", "pytest")
heavy += ("transformers", "trl", "tinker")
taken = [name for name in heavy if name in sys.modules]
assert not taken, taken
assert not {"xloss.cli", "xloss.tinker"} & set(sys.modules)
""")


def test_import_asks_cuda_nothing() -> None:
    run("""
import torch

def asked(*args, **kwargs):
    raise AssertionError("import xloss asked CUDA something")

for name in ("init", "_lazy_init", "is_available", "device_count", "current_device", "get_device_capability",
             "get_device_properties", "get_device_name", "mem_get_info"):
    assert hasattr(torch.cuda, name)
    setattr(torch.cuda, name, asked)
import xloss
assert not torch.cuda.is_initialized()
""")


def test_kernel_package_imports_no_kernel() -> None:
    run("""
import xloss_kernels
assert "triton" not in sys.modules and "torch" not in sys.modules
""")


def test_works_where_triton_does_not_exist() -> None:
    run(f"""{BLOCK}
sys.meta_path.insert(0, Block("triton"))
import torch, xloss
{WORK}
try:
    xloss.linear_logprobs(hidden, weight, labels, mode="fused")
except xloss.XlossError as error:
    assert "fused" in str(error), error
else:
    raise AssertionError("mode='fused' ran without Triton")
""")


def test_works_on_other_systems() -> None:
    """A stand-in: with torch and pydantic in, the platform's name is changed and what only POSIX has taken away."""
    for platform in ("win32", "darwin"):
        run(f"""{BLOCK}
import sysconfig, torch, torch.distributed, zoneinfo
from pydantic import BaseModel
sys.platform = {platform!r}
gone = ("triton", "resource", "fcntl", "termios", "pwd", "grp")
for name in gone:
    sys.modules.pop(name, None)
sys.meta_path.insert(0, Block(*gone))
import xloss
{WORK}
""")


def test_public_names_resolve() -> None:
    missing = [name for name in xloss.__all__ if not hasattr(xloss, name)]
    assert missing == []
    assert len(set(xloss.__all__)) == len(xloss.__all__)
    promised = """
        BaseLossConfig BaseLossKwargs BaseLossContext BaseLossContextInputItem
        CELossConfig CELossKwargs CELossContext CELossContextInputItem
        GRPOLossConfig GRPOLossKwargs GRPOLossContext RLLossContextInputItem
        LogProbConfig LogProbKwargs LogProbContext
        linear_logprobs TokenStats Metric LossInfo PerToken XlossError __version__
    """
    assert set(promised.split()) - set(xloss.__all__) == set()
