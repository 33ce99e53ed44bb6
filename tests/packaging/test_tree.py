"""Contract: the tree is for any machine. No file names a path of one, or the host of a package registry, and the two
set-up commands of the README are what CI and a newcomer run: one line each, constrained, from a fresh clone.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LEFT_BEHIND = re.compile(
    r"\.git|__pycache__|\.hypothesis|build|dist|out|\.?venv.*|xloss-demo|node_modules|\..*_cache|.*\.egg-info"
)

# Written in pieces so that this file is not its own finding.
HOSTS = ["pypi" + ".org", "pythonhosted" + ".org", "download.pytorch" + ".org", "npmjs" + ".org", "anaconda" + ".org"]
PATHS = ["/" + p for p in ("work/", "tmp/venv", "tmp/site", "tmp/pkgtest", "farm/", "root/", "opt/wheels", "opt/pypi")]
FORBIDDEN = re.compile("|".join([*(rf"(?<![\w.~-]){re.escape(p)}" for p in PATHS), *map(re.escape, HOSTS)]))


def text_files() -> Iterator[tuple[Path, str]]:
    """Every text file of the tree but what tools leave behind, which git ignores."""
    for folder, folders, names in os.walk(ROOT):
        folders[:] = [f for f in folders if not LEFT_BEHIND.fullmatch(f)]
        for name in names:
            path = Path(folder, name)
            try:
                yield path, path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue


def test_no_file_names_a_machine_or_a_registry() -> None:
    found = []
    for path, text in text_files():
        for number, line in enumerate(text.splitlines(), 1):
            if match := FORBIDDEN.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {match.group()}")
    assert found == []


@pytest.mark.parametrize("line", ["see " + PATHS[0] + "x", "--index https://" + HOSTS[0], "'" + PATHS[1] + "/bin'"])
def test_the_search_finds(line: str) -> None:
    assert FORBIDDEN.search(line)


@pytest.mark.parametrize("line", ["docs/work/plan.md", "a framework/x", "~/work/x"])
def test_the_search_spares(line: str) -> None:
    assert not FORBIDDEN.search(line)


@pytest.mark.parametrize("end", [".venv/bin/xloss demo", ".venv/bin/pytest -q"])
def test_readme_has_the_command_once_in_one_line(end: str) -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    (command,) = (
        line for line in lines if line.startswith("python3 -m venv .venv && ") and line.endswith(f" && {end}")
    )
    installs = [part for part in command.split(" && ") if " install " in part]
    assert [part for part in installs if "-c constraints.txt" not in part] == []
    assert "torch==" in installs[0], "torch comes first and alone, so that nothing else decides which build is taken"


def test_ci_is_executable_and_reads_the_readme() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert "README.md" in script.read_text(encoding="utf-8")
