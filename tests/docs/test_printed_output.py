"""Contract: what a page shows as output is what its code prints.

A ```text block with the comment ``<!-- prints -->`` right before it holds what the Python block before it printed, or
the message of the error that it raised.
"""

from __future__ import annotations

import contextlib
import io
import re
import sys
import types
from pathlib import Path

import pytest
import torch

from tests.docs.test_readme_and_docs import BLOCK, PAGES, ROOT, blocks

OUTPUT = re.compile(r"^<!-- prints -->\n```text\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
SHOWING = [page for page in PAGES if OUTPUT.search(page.read_text(encoding="utf-8"))]


def outputs(text: str, name: str) -> list[tuple[int, str, str]]:
    """``(line, shown, printed)`` of every output block; the page's code runs in order in one module."""
    starts = [match.start("code") for match in BLOCK.finditer(text)]
    code = list(zip(starts, blocks(text), strict=True))
    shown = [(match.start(), match["text"]) for match in OUTPUT.finditer(text)]
    page = types.ModuleType("printed_" + re.sub(r"\W", "_", name))
    sys.modules[page.__name__] = page
    found, printed = [], ""
    try:
        for at, part in sorted([*code, *shown], key=lambda pair: pair[0]):
            if isinstance(part, str):
                found.append((text.count("\n", 0, at) + 1, part, printed))
            elif part.skip is None:
                printed = _run(part.code, page, part.raises is not None)
    finally:
        del sys.modules[page.__name__]
    return found


def _run(code: str, page: types.ModuleType, raises: bool) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        try:
            exec(compile(code, page.__name__, "exec"), page.__dict__)
        except Exception as error:
            if not raises:
                raise
            return f"{error}\n"
    return out.getvalue()


@pytest.mark.parametrize("page", SHOWING, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_page_shows_what_it_prints(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    for line, shown, printed in outputs(page.read_text(encoding="utf-8"), str(page)):
        assert printed == shown, f"{page.name}:{line}"


SAMPLE = """
```python
print(1 + 1)
```
<!-- prints -->
```text
2
```
<!-- raises: ValueError -->
```python
raise ValueError("no")
```
<!-- prints -->
```text
yes
```
"""


def test_a_wrong_output_is_seen() -> None:
    assert outputs(SAMPLE, "sample") == [(5, "2\n", "2\n"), (13, "yes\n", "no\n")]
