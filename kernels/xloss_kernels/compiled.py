"""What the compiler makes of the kernels, without a GPU: registers, spills, shared memory, matrix instruction.

Each case of `compiled_cases.py` runs the real launcher on untouched CPU memory with its kernel replaced by a recorder,
so what is compiled here is what the launcher launches there. `report.py` shows the result.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

if TYPE_CHECKING:
    from xloss_kernels.compiled_cases import Case

ARCHS = (80, 90, 100)
SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448}
"""Shared memory one block may use, in bytes: 163, 227 and 227 KiB."""

_TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int8: "i8",
}
_INSTRUCTIONS = ("tcgen05.mma", "wgmma.mma_async", "mma.sync")


@dataclass(frozen=True)
class CompiledKernel:
    """One row of the table. `registers` per thread, `spill_bytes` per thread, `shared_bytes` per block."""

    kernel: str
    case: str
    arch: int
    warps: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    instruction: str


class Recorder:
    """Stands in for a kernel: keeps the arguments of the launch instead of launching."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.launch: tuple[tuple[Any, ...], dict[str, Any]] | None = None

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def record(*args: Any, **kwargs: Any) -> None:
            self.launch = args, kwargs

        return record


@contextmanager
def recording(module: ModuleType, name: str) -> Iterator[Recorder]:
    """Replace kernel `name` of `module` while the block runs."""
    kernel = getattr(module, name)
    recorder = Recorder(kernel)
    setattr(module, name, recorder)
    try:
        yield recorder
    finally:
        setattr(module, name, kernel)


def _argument(value: Any) -> tuple[str, bool]:
    """Triton's type of a launch argument and whether it is known to be a multiple of 16."""
    if isinstance(value, torch.Tensor):
        return "*" + _TYPES[value.dtype], value.data_ptr() % 16 == 0
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{_TYPES[value.base.dtype]}{list(value.block_shape)}>", False
    if isinstance(value, float):
        return "fp32", False
    assert isinstance(value, int) and not isinstance(value, bool), f"cannot pass {value!r} to a kernel"
    return ("i32" if -(2**31) <= value < 2**31 else "i64"), value % 16 == 0


def compile_launch(recorder: Recorder, arch: int) -> Any:
    """Compile the recorded launch for sm_`arch`."""
    assert recorder.launch is not None, "the launcher launched nothing"
    args, kwargs = recorder.launch
    kernel = recorder.kernel
    given = {**dict(zip(kernel.arg_names, args, strict=False)), **kwargs}
    options = {name: given.pop(name) for name in list(given) if name not in kernel.arg_names}
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for param in kernel.params:
        value = given[param.name]
        if param.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[param.name], constants[param.name] = "constexpr", value
            continue
        signature[param.name], aligned = _argument(value)
        if aligned:
            attributes[(param.num,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def describe(compiled: Any, kernel: str, case: str, arch: int) -> CompiledKernel:
    """Read the resource usage out of the machine code."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = subprocess.run(
            [str(tool), "--dump-resource-usage", cubin.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack, local = (max(map(int, re.findall(rf"{key}:(\d+)", usage))) for key in ("REG", "STACK", "LOCAL"))
    ptx = compiled.asm["ptx"]
    instruction = next((name for name in _INSTRUCTIONS if name in ptx), "-")
    return CompiledKernel(
        kernel, case, arch, compiled.metadata.num_warps, registers, stack + local, compiled.metadata.shared, instruction
    )


def toolchain() -> str:
    """Versions that decide what comes out: triton's, and those of the assemblers it calls."""
    versions = sorted({str(get_ptxas(arch).version) for arch in ARCHS})
    return f"triton {triton.__version__}, ptxas {' and '.join(versions)}"


def compile_points(points: Iterable[tuple[Case, int]]) -> Iterator[CompiledKernel]:
    """Compile cases for architectures, one after the other."""
    for case, arch in points:
        with recording(case.module, case.kernel) as recorder:
            case.launch(arch)
        yield describe(compile_launch(recorder, arch), case.kernel, case.name, arch)
