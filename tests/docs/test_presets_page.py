"""Contract: docs/presets.md lists every preset, in tables that say what they say, and options by names that exist.

A table after ``<!-- presets: trl -->`` is of that framework's presets (``methods``: of papers), one after
``<!-- options -->`` maps a framework's options to fields of ours. ``python -m tests.docs.test_presets_page`` prints the
tables as they should be.
"""

from __future__ import annotations

import re

import xloss
from tests.docs.test_readme_and_docs import ROOT
from xloss.losses.catalog import entry_of
from xloss.losses.policies import policy_losses
from xloss.losses.preferences import preference_losses
from xloss.losses.presets import Preset, presets

PAGE = ROOT / "docs" / "presets.md"
TABLE = re.compile(r"^<!-- presets: (?P<framework>\w+) -->\n(?P<rows>(?:\|.*\n)+)", re.MULTILINE)
OPTIONS = re.compile(r"^<!-- options -->\n(?P<rows>(?:\|.*\n)+)", re.MULTILINE)
HEAD = "| preset | loss | what it is | stands for |\n|---|---|---|---|\n"


def of_xloss() -> list[Preset]:
    """Those that no test registered."""
    return [found for found in presets().values() if found.framework != "mine"]


def table(framework: str) -> str:
    rows = []
    for found in of_xloss():
        if (found.framework or "methods") == framework:
            needs = "".join(f", `{name}=`" for name in found.required)
            entry = entry_of(found.example())
            rows.append(f"| `{found.name}`{needs} | `{entry.name}` | {found.summary} | {found.source} |\n")
    return HEAD + "".join(rows)


def test_tables_list_the_presets() -> None:
    shown = {match["framework"]: match["rows"] for match in TABLE.finditer(PAGE.read_text(encoding="utf-8"))}
    assert set(shown) == {found.framework or "methods" for found in of_xloss()}
    for framework, rows in shown.items():
        assert rows == table(framework), framework


def test_options_are_fields() -> None:
    models = [getattr(xloss, name) for name in xloss.__all__ if name.endswith(("Config", "InputItem"))]
    models += [*policy_losses().values(), *preference_losses().values(), xloss.RolloutCorrection]
    known = {field for model in models for field in model.model_fields}
    tables = [match["rows"] for match in OPTIONS.finditer(PAGE.read_text(encoding="utf-8"))]
    assert len(tables) >= 7
    for row in "".join(tables).splitlines():
        here = row.split("|")[2]
        names = {re.match(r"\w*", code)[0] for code in re.findall(r"`([^`]+)`", here)}  # type: ignore[index]
        assert names - known - {""} == set(), row


if __name__ == "__main__":
    for name in dict.fromkeys(found.framework or "methods" for found in of_xloss()):
        print(f"<!-- presets: {name} -->\n{table(name)}")
