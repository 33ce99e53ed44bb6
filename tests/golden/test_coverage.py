"""Every recorded case is somebody's, and the page about peers counts them rightly.

Contract: each case of index.json stands in the CASES of exactly one test module; a case in DIFFERENT is one of them and
says why; docs/peers.md shows the counts and the reasons.
"""

from __future__ import annotations

import importlib
from collections import Counter
from pathlib import Path

from tests.golden import records

HERE = Path(__file__).parent
NO_CASES = ("test_coverage", "test_metric_names", "test_oracle", "test_presets", "test_tinker_client")  # of their own
MODULES = [
    module
    for path in sorted(HERE.glob("test_*.py"))
    if path.stem not in NO_CASES
    for module in [importlib.import_module(f"tests.golden.{path.stem}")]
]
PAGE = HERE.parents[1] / "docs" / "peers.md"


def test_every_case_is_tested_once() -> None:
    counted = Counter(str(entry["id"]) for module in MODULES for entry in module.CASES)
    every = [str(entry["id"]) for entry in records.index()["cases"]]
    assert sorted(counted) == sorted(every)
    assert {name for name, count in counted.items() if count > 1} == set()


def test_differences_are_cases() -> None:
    for module in MODULES:
        assert set(module.DIFFERENT) <= {str(entry["id"]) for entry in module.CASES}, module.__name__


def test_page_counts() -> None:
    text = PAGE.read_text(encoding="utf-8")
    different = {name: why for module in MODULES for name, why in module.DIFFERENT.items()}
    peers = Counter(str(entry["peer"]) for entry in records.index()["cases"])
    apart = Counter(next(p for p in sorted(peers, key=len, reverse=True) if n.startswith(f"{p}-")) for n in different)
    for peer, count in peers.items():
        assert f"| `{peer}` | {count} | {apart[peer]} |" in text, (peer, count, apart[peer])
    for name, why in different.items():
        assert f"| `{name}` | {why} |" in text, name
