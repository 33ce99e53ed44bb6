"""Contract: the blocks of ``docs/tinker.md`` that need other packages run as printed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.docs.test_readme_and_docs import ROOT, blocks
from tests.integrations.packages import need

need("tinker", "transformers")


def test_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = [b.code for b in blocks((ROOT / "docs" / "tinker.md").read_text()) if "test_tinker_docs" in (b.skip or "")]
    assert len(found) == 1
    for code in found:
        exec(compile(code, "docs/tinker.md", "exec"), {})
