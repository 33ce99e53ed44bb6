"""Examples in the documentation for two processes print what their pages say, started by torchrun."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.pages import shown_and_printed

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("name", ["calibration.md", "sequence-parallel.md"])
def test_page_shows_what_two_ranks_print(name: str, tmp_path: Path) -> None:
    page, printed = shown_and_printed(name, "tests/distributed/test_pages.py", tmp_path)
    assert f"```\n```text\n{printed}```" in page, printed
