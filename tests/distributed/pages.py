"""An example of the documentation for two processes, started by torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.docs.test_readme_and_docs import blocks

DOCS = Path(__file__).resolve().parents[2] / "docs"


def shown_and_printed(name: str, marker: str, folder: Path) -> tuple[str, str]:
    """A page, and what two ranks print that run its one block which is skipped elsewhere with ``marker``."""
    page = (DOCS / name).read_text(encoding="utf-8")
    (block,) = [b for b in blocks(page) if b.skip is not None and marker in b.skip]
    script = folder / "two_ranks.py"
    script.write_text(block.code, encoding="utf-8")
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    path = os.pathsep.join([str(DOCS.parent), str(DOCS.parent / "kernels")])
    env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(run, capture_output=True, text=True, timeout=90, check=False, env=env)
    assert done.returncode == 0, done.stderr
    return page, done.stdout
