"""Examples in the documentation for two processes print what their pages say, started by torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.test_readme_and_docs import blocks

pytestmark = pytest.mark.distributed
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", ["calibration.md", "sequence-parallel.md"])
def test_page_shows_what_two_ranks_print(name: str, tmp_path: Path) -> None:
    page = (ROOT / "docs" / name).read_text(encoding="utf-8")
    (block,) = [b for b in blocks(page) if b.skip is not None and "tests/distributed/test_pages.py" in b.skip]
    script = tmp_path / "two_ranks.py"
    script.write_text(block.code, encoding="utf-8")
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(run, capture_output=True, text=True, timeout=90, check=False, env=env)
    assert done.returncode == 0, done.stderr
    assert f"```\n```text\n{done.stdout}```" in page, done.stdout
