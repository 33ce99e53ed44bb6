"""Contract: what is installed is this tree, and a checkout takes no name that belongs to another distribution."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

import xloss

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def distribution() -> importlib.metadata.Distribution:
    try:
        return importlib.metadata.distribution("xloss")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("xloss runs from the tree here; it is not installed")


def test_version_is_the_installed_one(distribution: importlib.metadata.Distribution) -> None:
    assert distribution.version == xloss.__version__


def test_command_is_installed(distribution: importlib.metadata.Distribution) -> None:
    (entry,) = (e for e in distribution.entry_points if e.group == "console_scripts")
    assert (entry.name, entry.value) == ("xloss", "xloss.cli:main")
    assert callable(entry.load())


def test_folder_kernels_hides_no_distribution_of_that_name(tmp_path: Path) -> None:
    """Run from the repository root, ``import kernels`` still finds an installed regular package ``kernels``."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("")
    code = f"import sys; sys.path.append({str(tmp_path)!r}); import kernels; print(kernels.__file__)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == str(tmp_path / "kernels" / "__init__.py")
