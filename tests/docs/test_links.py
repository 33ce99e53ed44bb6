"""Contract: links between pages, and from pages to files of the tree, lead somewhere; every page can be reached."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docs.test_readme_and_docs import PAGES, ROOT

LINK = re.compile(r"(?<!!)\[[^\]]+\]\((?P<target>[^)#\s]+)?(?:#(?P<anchor>[^)\s]+))?\)")
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def links(page: Path) -> list[tuple[Path, str | None]]:
    """``(file, anchor)`` of every link into the tree."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    return [
        ((page.parent / (m["target"] or page.name)).resolve(), m["anchor"])
        for m in LINK.finditer(text)
        if not (m["target"] or "").startswith(("http://", "https://"))
    ]


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as code hosts make them."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in links(page):
        assert target.exists(), f"{page.name} links to {target}"
        assert anchor is None or anchor in anchors(target), f"{page.name} links to {target.name}#{anchor}"


def test_every_page_can_be_reached_from_the_readme() -> None:
    seen, todo = set(), [ROOT / "README.md"]
    while todo:
        page = todo.pop()
        if page not in seen and page.suffix == ".md":
            seen.add(page)
            todo += [target for target, _ in links(page)]
    assert set(PAGES) - seen == set()
