"""Contract: the wheel and the sdist hold what they should and nothing else, and their metadata tell the truth.

Both are built from the tree by the build backend itself, in a subprocess, without a network, into a temporary folder.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import xloss

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def build(target: str, into: Path) -> Path:
    """The one distribution of kind ``target`` ("wheel" or "sdist") built from the tree."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(into)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=60)
    (built,) = into.iterdir()
    return built


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    return zipfile.ZipFile(build("wheel", tmp_path_factory.mktemp("wheel")))


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    with tarfile.open(build("sdist", tmp_path_factory.mktemp("sdist"))) as archive:
        return {name.partition("/")[2] for name in archive.getnames()}


@pytest.fixture(scope="module")
def metadata(wheel: zipfile.ZipFile) -> Message:
    (name,) = (n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
    return Parser().parsestr(wheel.read(name).decode())


def files_on_disk(package: Path, base: Path) -> set[str]:
    kept = (p for p in package.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
    return {p.relative_to(base).as_posix() for p in kept}


def test_wheel_holds_both_packages_whole_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    wanted = files_on_disk(ROOT / "xloss", ROOT) | files_on_disk(ROOT / "kernels" / "xloss_kernels", ROOT / "kernels")
    held = {n for n in wheel.namelist() if ".dist-info/" not in n}
    assert held == wanted
    assert {"xloss/__init__.py", "xloss/py.typed", "xloss_kernels/__init__.py", "xloss_kernels/py.typed"} <= held


def test_every_folder_of_modules_is_a_package() -> None:
    """A folder without ``__init__.py`` would still be in the wheel, but import-linter passes over it."""
    for package in (ROOT / "xloss", ROOT / "kernels" / "xloss_kernels"):
        folders = {p.parent for p in package.rglob("*.py")}
        assert [f for f in sorted(folders) if not (f / "__init__.py").is_file()] == []


def test_kernels_folder_is_no_package(wheel: zipfile.ZipFile) -> None:
    """``kernels/__init__.py`` would hide the distribution of that name whenever Python runs from the root."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not [n for n in wheel.namelist() if n.startswith(("kernels/", "tests/"))]


def test_sdist_can_be_built_tested_and_read(sdist: set[str]) -> None:
    wanted = {"pyproject.toml", "README.md", "LICENSE", "constraints.txt", ".ci/run", "kernels/README.md", "PKG-INFO"}
    for folder in ("xloss", "kernels", "tests", "docs", "benchmarks"):
        wanted |= {f for f in files_on_disk(ROOT / folder, ROOT) if f.endswith((".py", ".md", ".typed"))}
    assert wanted - sdist == set()


def test_sdist_holds_no_leftovers(sdist: set[str]) -> None:
    assert [n for n in sorted(sdist) if re.search(r"__pycache__|\.pyc$|\.venv|_cache/|\.whl$|^(dist|build)/", n)] == []


def test_metadata(metadata: Message) -> None:
    assert metadata["Name"] == "xloss"
    assert metadata["Version"] == xloss.__version__
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["License-File"] == "LICENSE"
    assert {"plots", "test", "peers"} <= set(metadata.get_all("Provides-Extra") or [])


def test_base_install_needs_four_things_and_triton_on_linux_only(metadata: Message) -> None:
    base = [Requirement(r) for r in metadata.get_all("Requires-Dist") or [] if "extra ==" not in r]
    assert {r.name for r in base} == {"torch", "triton", "pydantic", "cyclopts"}
    (triton,) = (r for r in base if r.name == "triton")
    assert triton.marker is not None
    assert triton.marker.evaluate({"sys_platform": "linux"})
    assert not triton.marker.evaluate({"sys_platform": "darwin"})
    assert not triton.marker.evaluate({"sys_platform": "win32"})


def test_wheel_declares_the_command(wheel: zipfile.ZipFile) -> None:
    (name,) = (n for n in wheel.namelist() if n.endswith(".dist-info/entry_points.txt"))
    assert "xloss = xloss.cli:main" in wheel.read(name).decode()


def constraints() -> dict[str, Requirement]:
    lines = (line.partition("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines())
    return {canonicalize_name(r.name): r for r in map(Requirement, filter(None, lines))}


def test_constraints_pin_everything_that_is_asked_for() -> None:
    """Each requirement of the base and of every extra is constrained to a version that it accepts."""
    asked = [*PROJECT["dependencies"], *(r for extra in PROJECT["optional-dependencies"].values() for r in extra)]
    pinned = constraints()
    for requirement in map(Requirement, asked):
        pin = pinned[canonicalize_name(requirement.name)]
        assert any(requirement.specifier.contains(s.version) for s in pin.specifier), f"{pin} against {requirement}"


def test_constraints_are_pins_of_released_versions() -> None:
    for name, pin in constraints().items():
        assert pin.url is None
        assert "+" not in str(pin.specifier), f"{name}: a local version exists on some machines only"
        assert {s.operator for s in pin.specifier} == ({">=", "<="} if name == "triton" else {"=="})
