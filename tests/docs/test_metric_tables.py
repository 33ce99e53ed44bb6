"""Contract: the tables of docs/metrics.md are what ``rename_metrics`` does, row by row; every figure of ours in them is
documented on some page.

A table says which framework it is about in a comment before it: ``<!-- names: trl -->``.
"""

from __future__ import annotations

import re

import pytest

from tests.docs.test_readme_and_docs import PAGES, ROOT
from xloss.losses.metric_names import PEERS, Framework

PAGE = ROOT / "docs" / "metrics.md"
TABLE = re.compile(r"^<!-- names: (?P<to>[\w-]+) -->\n\| theirs \| ours \|\n\|---\|---\|\n(?P<rows>(?:\|.*\n)+)", re.M)
ROW = re.compile(r"\| `([^`]+)` \| `([^`]+)` \|")
TABLES = {m["to"]: ROW.findall(m["rows"]) for m in TABLE.finditer(PAGE.read_text(encoding="utf-8"))}


def test_every_framework_has_a_table() -> None:
    assert TABLES.keys() == PEERS.keys()


@pytest.mark.parametrize("to", PEERS)
def test_table_is_the_code(to: Framework) -> None:
    assert TABLES[to] == [(peer.name, peer.formula) for peer in PEERS[to]]


def test_our_names_are_documented() -> None:
    pages = "".join(page.read_text(encoding="utf-8") for page in PAGES if page != PAGE)
    named = set(re.findall(r"`(\w+)`", pages))
    assert {name for rows in PEERS.values() for peer in rows for name in peer.ours} - named == set()
