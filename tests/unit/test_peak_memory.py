"""``explain()`` promises memory, and a step keeps to it.

Contract: on a CPU, in ``mode="chunk"``, the resident memory of a process grows during forward and backward by no more
than ``Plan.peak_bytes`` and a small constant (tests/budgets.py), and by not much less: the promise is not padded. In
every plan, float32 and low precision, with and without tokens left out, a softcap, statistics that take scratch.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import budgets
from xloss.cli.memory import start_peak

ROOT = Path(__file__).parents[2]
MIB = 1 << 20
SHAPE = {"tokens": 384, "hidden": 256, "vocab": 20000}
RUNS: dict[str, dict[str, Any]] = {
    "one-pass": {"loss": "grpo", "live": 384, "plan": "one_pass"},
    "one-pass, one chunk": {"loss": "ce", "live": 384, "logits_budget": 64 * MIB},
    "one-pass, entropy": {"loss": "grpo", "live": 384, "return_entropy": True},
    "one-pass, softcap, ignored": {"loss": "ce", "live": 300, "softcap": 20.0},
    "one-pass, retained": {"loss": "ce", "live": 384, "allow_retain_graph": True},
    "one-pass, smoothed": {"loss": "ce", "live": 384, "label_smoothing": 0.1, "chunk_size": 50},
    "two-pass": {"loss": "ce", "live": 384, "plan": "two_pass"},
    "two-pass, some kept": {"loss": "grpo", "live": 384, "plan": "two_pass", "chunk_size": 64, "entropy_coef": 0.1},
    "two-pass, all kept": {"loss": "ce", "live": 384, "plan": "two_pass", "logits_budget": 64 * MIB},
    "two-pass, kept, ignored": {"loss": "ce", "live": 300, "plan": "two_pass", "logits_budget": 64 * MIB},
    "distillation": {"loss": "distill", "live": 300, "divergence": "jsd"},
    "distillation, two-pass": {"loss": "distill", "live": 384, "divergence": "jsd", "plan": "two_pass"},
    "one-pass, adapter": {"loss": "ce", "live": 300, "rank": 64},
    "two-pass, adapter": {"loss": "ce", "live": 384, "rank": 64, "plan": "two_pass"},
    "forward-only": {"loss": "logprob", "live": 384},
    "forward-only, entropy": {"loss": "logprob", "live": 300, "return_entropy": True},
}
STEPS = {
    f"{name}, {dtype}": {"logits_budget": 16 * MIB, **SHAPE, "dtype": dtype, **run}
    for name, run in RUNS.items()
    for dtype in ("float32", "bfloat16")
}


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, Any]]:
    """All steps, one after the other, in one process."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH")) if p)
    call = [sys.executable, "-m", "tests.unit.peak_memory_steps", json.dumps(list(STEPS.values()))]
    done = subprocess.run(call, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return dict(zip(STEPS, json.loads(done.stdout), strict=True))


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists() or start_peak("cpu")() is None, reason="no high-water mark to reset"
)
@pytest.mark.parametrize("name", STEPS)
def test_a_step_keeps_to_its_plan(name: str, found: dict[str, dict[str, Any]]) -> None:
    step = found[name]
    measured, promised = step["measured"], step["promised"]
    said = f"{measured / MIB:.2f} MiB measured, {promised / MIB:.2f} promised\n{step['plan']}"
    assert measured <= promised + budgets.RESIDENT_SLACK_BYTES, said
    assert measured >= budgets.LEAST_OF_A_PROMISE * promised, said
