"""The table of ``docs/integrations.md``: ``python -m tests.integrations.report`` runs every comparison and writes it.

Modules whose packages are not installed keep the rows that they have. ``report.json`` beside this file has the numbers.
"""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from tests.integrations.comparisons import Comparison
from tests.integrations.page import write_between

HERE = Path(__file__).parent
NUMBERS = HERE / "report.json"
MARK = "comparisons"
_WIDE = 80  # characters of a cell


@dataclass(frozen=True)
class Row:
    """A comparison with its result."""

    module: str
    adapter: str
    package: str
    version: str
    what: str
    difference: float


def measure(module: str, of: Comparison) -> Row:
    torch.manual_seed(20260826)
    return Row(module, of.name, of.package, version(of.package), of.what, of.run())


def stored() -> list[Row]:
    return [Row(**row) for row in json.loads(NUMBERS.read_text())] if NUMBERS.exists() else []


def table(rows: list[Row]) -> str:
    """Rows of one adapter that differ after the first comma of ``what`` share a line, with the largest difference.

    Where they are many, the line counts them, and a list below the table names them.
    """
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        what = row.what.partition(", ")[0]
        groups.setdefault((row.adapter, f"{row.package} {row.version}", what), []).append(row)
    lines = ["| adapter | package | what was run | largest relative gradient difference |", "|---|---|---|---|"]
    below = []
    for (adapter, package, what), members in groups.items():
        variants = [variant for row in members if (variant := row.what.partition(", ")[2])]
        told = f"{what}: {'; '.join(variants)}" if variants else what
        if len(told) > _WIDE:
            below.append(f"- `{adapter}`, {told}")
            told = f"{what}: {len(variants)} cases"
        lines.append(f"| `{adapter}` | {package} | {told} | {max(row.difference for row in members):.1e} |")
    return "\n".join([*lines, *(["", "The cases:", "", *below] if below else [])])


def main(asked: list[str]) -> None:
    """Run the modules ``asked``, or all."""
    torch.set_num_threads(1)
    rows = stored()
    for path in sorted(HERE.glob("test_*.py")):
        if asked and path.stem not in asked:
            continue
        try:
            module = importlib.import_module(f"tests.integrations.{path.stem}")
        except pytest.skip.Exception as skipped:
            print(f"{path.stem}: {skipped}")
            continue
        found = [measure(path.stem, of) for of in getattr(module, "COMPARISONS", ())]
        rows = [row for row in rows if row.module != path.stem] + found
        print(f"{path.stem}: {len(found)} comparisons")
    rows.sort(key=lambda row: row.module)
    NUMBERS.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    write_between(MARK, table(rows))


if __name__ == "__main__":
    main(sys.argv[1:])
