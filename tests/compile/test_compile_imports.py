"""xloss_kernels is a leaf: importing it pulls in neither triton nor torch, and its modules nothing of xloss."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import xloss_kernels

PACKAGE = Path(xloss_kernels.__file__).parent


def python(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent
    ).stdout


def test_the_package_imports_nothing():
    assert python("import sys, xloss_kernels; print({'torch', 'triton'} & set(sys.modules))").strip() == "set()"


def test_no_module_imports_xloss():
    names = [path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__"]
    imports = "; ".join(f"import xloss_kernels.{name}" for name in names)
    assert python(f"import sys; {imports}; print('xloss' in sys.modules)").strip() == "False"
