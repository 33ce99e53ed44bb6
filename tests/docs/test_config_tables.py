"""Contract: tables of fields in the docs list exactly the fields of the models, in their order, with their defaults;
a table of arguments exactly those of the function.

A table says which model it is about in a comment before it: ``<!-- fields: CELossConfig -->``, or
``<!-- fields: CELossConfig beyond BaseLossConfig -->`` for the fields that the second one does not have;
``<!-- arguments: linear_logprobs -->`` for a function.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
from pydantic import BaseModel

import xloss
from tests.docs.test_readme_and_docs import PAGES, ROOT
from xloss.losses.policies import policy_losses
from xloss.losses.preferences import PreferenceTerm, preference_losses
from xloss.losses.reduced import ReducedLossConfig

TABLE = re.compile(r"^<!-- fields: (?P<model>\w+)(?: beyond (?P<base>\w+))? -->\n+(?P<rows>(?:\|.*\n?)+)", re.MULTILINE)
ROW = re.compile(r"\| `(?P<name>\w+)` \| (?P<default>.+?) \| .+ \|")
TABLES = [(page, match) for page in PAGES for match in TABLE.finditer(page.read_text(encoding="utf-8"))]


def model(name: str) -> type[BaseModel]:
    others = {
        cls.__name__: cls for cls in (*policy_losses().values(), *preference_losses().values(), ReducedLossConfig)
    }
    found = getattr(xloss, name, None) or others[name]
    assert issubclass(found, BaseModel)
    return found


def fields(name: str, base: str | None) -> list[tuple[str, str]]:
    """``(name, default)`` as a table must show them."""
    inherited = model(base).model_fields if base else {}
    return [
        (field, "required" if info.is_required() else f"`{info.default!r}`")
        for field, info in model(name).model_fields.items()
        if field not in inherited
    ]


def rows(table: str) -> list[tuple[str, str]]:
    """``(name, default)`` as a table shows them."""
    header, rule, *body = table.splitlines()
    assert re.match(r"\| (field|argument) \| default \|", header) and set(rule) <= set("|- :")
    shown = [ROW.fullmatch(row) for row in body]
    assert None not in shown, [row for row, match in zip(body, shown, strict=True) if match is None]
    return [(m["name"], m["default"]) for m in shown if m]


@pytest.mark.parametrize(
    ("page", "table"), TABLES, ids=[f"{p.relative_to(ROOT).as_posix()}-{m['model']}" for p, m in TABLES]
)
def test_table_is_the_model(page: Path, table: re.Match[str]) -> None:
    assert rows(table["rows"]) == fields(table["model"], table["base"]), page


def test_arguments_of_linear_logprobs() -> None:
    text = (ROOT / "docs" / "linear-logprobs.md").read_text(encoding="utf-8")
    (table,) = re.findall(r"^<!-- arguments: linear_logprobs -->\n((?:\|.*\n)+)", text, re.MULTILINE)
    signature = inspect.signature(xloss.linear_logprobs)
    assert rows(table) == [
        (p.name, "required" if p.default is p.empty else f"`{p.default!r}`") for p in signature.parameters.values()
    ]


def test_every_model_of_a_user_has_a_table() -> None:
    """Configs of losses, policy losses and preference terms with fields of their own, and the items a user fills in."""
    public = {n for n in xloss.__all__ if n.endswith(("Config", "InputItem"))}
    own = [cls for cls in policy_losses().values() if cls.__module__.startswith("xloss.")]  # others may register too
    public |= {cls.__name__ for cls in own}
    common = {*PreferenceTerm.model_fields, "label_smoothing"}
    public |= {cls.__name__ for cls in preference_losses().values() if set(cls.model_fields) - common}
    without_fields = {n for n in public if not set(model(n).model_fields) - set(xloss.BaseLossConfig.model_fields)}
    tables = {m["model"] for _, m in TABLES}
    assert public - without_fields - tables - {"BaseLossContextInputItem"} == set()
    assert "BaseLossConfig" in tables
