"""The compile report: the table of docs/kernels.md is what the compiler makes, and the command says what is wrong.

Registers depend on the compiler. So the page says which it was made by; under that one every figure is compared, under
another the kernels, cases and architectures are.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.compile.compiling import described
from xloss_kernels import report
from xloss_kernels.compiled import toolchain
from xloss_kernels.compiled_cases import points

PAGE = Path(__file__).parents[2] / "docs" / "kernels.md"
REMEDY = "refresh it: python -m xloss_kernels.report --write docs/kernels.md"


def without_figures(table: str) -> str:
    """The table with every figure, warps and matrix instruction of a case as `#`."""
    return re.sub(r"\d+ / \d+ / \d+( [\w.]+)?|(?<=\| )[\d/]+(?= \|)", "#", table.split("\n", 1)[1])


def test_the_page_holds_the_table():
    found = report.BLOCK.search(PAGE.read_text(encoding="utf-8"))
    assert found, f"{PAGE.name} has lost its markers"
    committed, fresh = found["table"].strip(), report.markdown([described(*p) for p in points()], toolchain()).strip()
    assert without_figures(committed) == without_figures(fresh), REMEDY
    if toolchain() in committed:
        assert committed == fresh, REMEDY


def test_figures_are_what_is_masked():
    assert without_figures("by triton 3\n| a, 4 labels | 8 | 1 / 0 / 2 wgmma | - |") == "| a, 4 labels | # | # | - |"


def test_write_replaces_what_is_between_the_markers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    page = tmp_path / "page.md"
    head, _, tail = re.split(r"(?<=--write -->\n)|(?=<!-- /compiled)", PAGE.read_text(encoding="utf-8"))
    page.write_text(head + "old\n" + tail, encoding="utf-8")
    monkeypatch.setattr(report, "_compile", lambda *_: iter([described(*p) for p in points()]))
    assert report.main(["--write", str(page)]) == 0
    text = page.read_text(encoding="utf-8")
    assert text.startswith(head) and text.endswith(tail) and "old\n" not in text
    assert report.main(["--write", str(page)]) == 0
    assert page.read_text(encoding="utf-8") == text, "the same figures make the same page"


def test_terminal_and_json(capsys: pytest.CaptureFixture[str]):
    assert report.main(["scale"]) == 0
    seen = capsys.readouterr()
    assert "scale_kernel" in seen.out and max(map(len, seen.out.splitlines())) <= 80
    assert "1/3 scale_kernel" in seen.err, "progress stays out of the result"
    assert report.main(["scale", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"] == toolchain() and [row["arch"] for row in found["kernels"]] == [80, 90, 100]
    every = report.lines([described(*p) for p in points()], toolchain())
    assert max(map(len, every)) <= 80


@pytest.mark.parametrize(
    "words,said",
    [
        (["nothing"], "no kernel's name contains 'nothing'"),
        (["--write", "nowhere.md"], "nowhere.md: no such file"),
        (["--write", str(PAGE.parent / "index.md")], "markers"),
        (["scale", "--write", str(PAGE)], "every kernel"),
    ],
)
def test_a_wrong_call_is_named(words: list[str], said: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as caught:
        report.main(words)
    assert caught.value.code == 2 and said in capsys.readouterr().err


def test_where_it_cannot_compile(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit):
        report.main([])
    assert "TRITON_INTERPRET=1" in capsys.readouterr().err
    monkeypatch.setattr(report, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        report.main([])
    assert "triton is not installed" in capsys.readouterr().err
