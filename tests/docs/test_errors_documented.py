"""Contract: ``docs/errors.md`` has a section for every error code and for no other, with an example that raises it.

`rank` needs several processes; tests/distributed/test_failures.py runs its example.
"""

from __future__ import annotations

import re

import pytest

from tests.docs.test_readme_and_docs import ROOT, blocks
from xloss import errors

TEXT = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## `([\w-]+)`.*?$(.*?)(?=^## |\Z)", TEXT, re.MULTILINE | re.DOTALL))
CLASSES = {cls.code: cls for cls in (errors.XlossError, *errors.XlossError.__subclasses__())}


def test_classes_and_codes_are_the_same() -> None:
    assert sorted(CLASSES) == sorted(errors.CODES)


def test_every_code_has_a_section() -> None:
    assert list(SECTIONS) == list(errors.CODES)


@pytest.mark.parametrize("code", [c for c in errors.CODES if c != "xloss"])
def test_section_shows_the_error(code: str) -> None:
    section, cls = SECTIONS[code], CLASSES[code]
    assert f"`{cls.__name__}`" in section, "the section names the class"
    if code != "rank":
        assert cls.__name__ in {b.raises for b in blocks(section)}, "the section has a block that raises it"
    assert f"\n[{code}] " in section, "the section shows the message"
