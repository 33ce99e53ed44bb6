"""Contract: every Python block of ``docs/integrations.md`` runs as printed, section by section, and its table says what
``report.json`` holds, which names every comparison.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import budgets
from tests.docs.test_readme_and_docs import blocks, run_page
from tests.integrations import report
from tests.integrations.packages import find_missing
from tests.integrations.page import PAGE, SHARED, Section, between, sections

ELSEWHERE = "<!-- runs in: "  # a package that cannot be installed: its own test module restates the interface
SNIPPETS = [s for s in sections() if blocks(s.text) and s.title != SHARED and ELSEWHERE not in s.text]


@pytest.mark.parametrize("section", SNIPPETS, ids=lambda s: s.title)
def test_section_runs_as_printed(section: Section, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the section that all share, in a namespace and a folder of its own."""
    missing = find_missing(*section.needs)
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")
    (shared,) = (s for s in sections() if s.title == SHARED)
    monkeypatch.chdir(tmp_path)
    text = (shared.text if "transformers" in section.needs else "") + section.text
    assert all(block.skip is None for block in blocks(text))
    if section.ranks > 1:
        script = "\n".join(["import torch", "torch.manual_seed(0)", *(block.code for block in blocks(text))])
        run_by_torchrun(script, section.ranks)
        return
    torch.manual_seed(0)
    run_page(text, f"{PAGE}#{section.title}")


def run_by_torchrun(script: str, ranks: int) -> None:
    """As a user would start it, in the current folder."""
    Path("snippet.py").write_text(script, encoding="utf-8")
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "snippet.py"]
    root = PAGE.parents[1]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), str(root / "kernels")]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(run, capture_output=True, text=True, timeout=120, check=False, env=env)
    assert done.returncode == 0, done.stderr


def test_the_table_is_what_was_measured() -> None:
    assert between(report.MARK) == report.table(report.stored())


def test_every_difference_is_rounding() -> None:
    assert report.stored()
    for row in report.stored():
        assert row.difference <= budgets.TRAINER_STEPS, row
