"""``docs/integrations.md``: its sections, and the tables that programs write into it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "integrations.md"
SHARED = "What the snippets share"


@dataclass(frozen=True)
class Section:
    """One ``##`` section. ``needs``: packages named in ``<!-- needs: a, b -->`` below its title. ``ranks``: processes
    that run it, those of ``<!-- ranks: 2 -->``.
    """

    title: str
    text: str
    line: int
    needs: tuple[str, ...]
    ranks: int


def sections() -> list[Section]:
    page, found = PAGE.read_text(encoding="utf-8"), []
    starts = [*re.finditer(r"^## (.*)$", page, re.MULTILINE)]
    for match, end in zip(starts, [*(m.start() for m in starts[1:]), len(page)], strict=True):
        text = page[match.start() : end]
        needs = re.search(r"<!-- needs: (.*?) -->", text)
        names = tuple(name.strip() for name in needs[1].split(",")) if needs else ()
        ranks = re.search(r"<!-- ranks: (\d+) -->", text)
        line = page.count("\n", 0, match.start())
        found.append(Section(match[1], text, line, names, int(ranks[1]) if ranks else 1))
    return found


def between(mark: str) -> str:
    """What stands between ``<!-- mark -->`` and ``<!-- end mark -->``."""
    found = re.search(_pattern(mark), PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None, f"{PAGE.name} has no place {mark}"
    return found[2].strip()


def write_between(mark: str, text: str) -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert re.search(_pattern(mark), page, re.DOTALL), f"{PAGE.name} has no place {mark}"
    PAGE.write_text(re.sub(_pattern(mark), lambda m: f"{m[1]}{text}\n{m[3]}", page, flags=re.DOTALL), encoding="utf-8")


def _pattern(mark: str) -> str:
    return rf"(<!-- {mark} -->\n)(.*?)(<!-- end {mark} -->)"
