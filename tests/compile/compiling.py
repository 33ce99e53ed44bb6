"""Compiling a case once for all tests of this folder."""

from __future__ import annotations

from functools import cache
from typing import Any

from xloss_kernels.compiled import CompiledKernel, compile_launch, describe, recording
from xloss_kernels.compiled_cases import Case


@cache
def compiled(case: Case, arch: int) -> Any:
    """Triton's compiled kernel of a case for sm_`arch`."""
    with recording(case.module, case.kernel) as recorder:
        case.launch(arch)
    return compile_launch(recorder, arch)


@cache
def described(case: Case, arch: int) -> CompiledKernel:
    """What it uses."""
    return describe(compiled(case, arch), case.kernel, case.name, arch)
