"""Contract: every Python block of the README and of the docs runs as printed.

The blocks of a page run in order in one namespace, with torch's seed 0 and an empty working folder. An HTML comment
right before a block changes that: ``<!-- skip: reason -->`` leaves it out, ``<!-- raises: ErrorName -->`` asks that it
raise exactly that error.
"""

from __future__ import annotations

import re
import sys
import textwrap
import types
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
WITH_PACKAGES = ROOT / "docs" / "integrations.md"  # tests/integrations runs it, where its packages are

BLOCK = re.compile(
    r"(?:^[ \t]*<!--[ \t]*(?P<order>skip|raises):(?P<what>.*?)-->[ \t]*\n(?:[ \t]*\n)?)?"
    r"^(?P<indent>[ \t]*)(?P<fence>`{3,})python\b[^\n]*\n(?P<code>.*?)^[ \t]*(?P=fence)[ \t]*$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """One ```python block: its code, the line of the page it starts on, and what the comment before it asks for."""

    code: str
    line: int
    raises: str | None
    skip: str | None


def blocks(text: str) -> list[Block]:
    found = []
    for match in BLOCK.finditer(text):
        order, what = match["order"], (match["what"] or "").strip()
        if order and not what:
            raise ValueError(f"<!-- {order}: --> says no more")
        line = text.count("\n", 0, match.start("code")) + 1
        raises, skip = (what if order == kind else None for kind in ("raises", "skip"))
        found.append(Block(textwrap.dedent(match["code"]), line, raises, skip))
    return found


def run_page(text: str, name: str) -> None:
    """Runs the blocks in one module, known to ``sys.modules`` so that annotations resolve in it."""
    page = types.ModuleType("page_" + re.sub(r"\W", "_", name))
    sys.modules[page.__name__] = page
    try:
        for block in blocks(text):
            if block.skip is not None:
                continue
            where = f"{name}:{block.line}"
            code = compile("\n" * (block.line - 1) + block.code, name, "exec")  # a traceback names the page's own line
            if block.raises is None:
                exec(code, page.__dict__)
                continue
            with pytest.raises(Exception) as caught:
                exec(code, page.__dict__)
            assert caught.type.__name__ == block.raises, f"{where}: {caught.value!r}, not {block.raises}"
    finally:
        del sys.modules[page.__name__]


@pytest.fixture
def clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)


@pytest.mark.usefixtures("clean")
@pytest.mark.parametrize(
    "page", [page for page in PAGES if page != WITH_PACKAGES], ids=lambda p: p.relative_to(ROOT).as_posix()
)
def test_page_runs_as_printed(page: Path) -> None:
    assert torch.get_default_dtype() == torch.float32
    run_page(page.read_text(encoding="utf-8"), str(page))
    assert torch.get_default_dtype() == torch.float32, "the page changes the default dtype for all that follow"


SAMPLE = """# A page
```python
a = 1
```
<!-- raises: ZeroDivisionError -->

```python
a / 0
```
<!-- skip: needs a GPU -->
```python
raise SystemExit
```
- in a list:
  ```python
  if a:
      b = a + 1
  ```
```sh
not python
```
```python
assert b == 2
```
"""


def test_blocks_are_found_with_their_lines_and_orders() -> None:
    found = blocks(SAMPLE)
    assert [b.line for b in found] == [3, 8, 12, 16, 23]
    assert [b.raises for b in found] == [None, "ZeroDivisionError", None, None, None]
    assert [b.skip for b in found] == [None, None, "needs a GPU", None, None]
    run_page(SAMPLE, "sample")


def test_a_wrong_page_fails() -> None:
    with pytest.raises(AssertionError):
        run_page(SAMPLE.replace("b == 2", "b == 3"), "sample")
    with pytest.raises(AssertionError, match="not KeyError"):
        run_page(SAMPLE.replace("raises: ZeroDivisionError", "raises: KeyError"), "sample")
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        run_page(SAMPLE.replace("a / 0", "a / 1"), "sample")


def test_no_python_block_escapes() -> None:
    """Each opening fence of a Python block is one that the pattern above finds."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert len(blocks(text)) == len(re.findall(r"^[ \t]*`{3,}(?:python|py|python3)\b", text, re.MULTILINE)), page
