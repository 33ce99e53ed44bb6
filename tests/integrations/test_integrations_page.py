"""Contract: every Python block of ``docs/integrations.md`` runs as printed, section by section, and its table says what
``report.json`` holds, which names every comparison.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests import budgets
from tests.docs.test_readme_and_docs import blocks, run_page
from tests.integrations import report
from tests.integrations.packages import find_missing
from tests.integrations.page import PAGE, SHARED, Section, between, sections
from xloss.cli.spawn import Rank, World, run_ranks

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
        run_ranks(on_rank, text, section.title, world=World(section.ranks, timeout=120.0))
    else:
        on_rank(None, text, section.title)


def on_rank(_: Rank | None, text: str, title: str) -> None:
    torch.manual_seed(0)
    run_page(text, f"{PAGE}#{title}")


def test_the_table_is_what_was_measured() -> None:
    assert between(report.MARK) == report.table(report.stored())


def test_every_difference_is_rounding() -> None:
    assert report.stored()
    for row in report.stored():
        assert row.difference <= budgets.TRAINER_STEPS, row
