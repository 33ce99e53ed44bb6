"""`python -m xloss_kernels.report`: compile every kernel for each GPU generation and show what it costs. Needs no GPU.

Without options it prints a table; `--json` prints the same as JSON; `--write docs/kernels.md` puts it between the
markers of that page. A word limits it to kernels whose name contains it. Exit status 2 where it cannot compile.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from xloss_kernels.compiled import CompiledKernel

BLOCK = re.compile(
    r"(?P<begin><!-- compiled: python -m xloss_kernels\.report --write -->\n)(?P<table>.*?)(?P<end><!-- /compiled -->)",
    re.DOTALL,
)
"""The part of a page that `--write` replaces."""

_ARCH_COLUMNS = (80, 90, 100)
_SHORT = {"wgmma.mma_async": "wgmma", "tcgen05.mma": "tcgen05"}


def lines(rows: Sequence[CompiledKernel], versions: str) -> Iterator[str]:
    """The table for a terminal: at most 80 columns."""
    yield versions
    yield f"{'':<31} {'sm':>3} {'warps':>5} {'regs':>4} {'spill':>5} {'shared':>6}  matrix"
    for kernel, group in groupby(rows, lambda row: row.kernel):
        yield kernel
        shown = ""
        for row in group:
            name = "" if row.case == shown else row.case
            shown = row.case
            yield (
                f"  {name:<29} {row.arch:>3} {row.warps:>5} {row.registers:>4} {row.spill_bytes:>5}"
                f" {row.shared_bytes:>6}  {_instruction(row)}"
            )
    yield "regs, spill: registers and spilled bytes per thread; shared: bytes per block."


def markdown(rows: Sequence[CompiledKernel], versions: str) -> str:
    """The tables for a page: one for each kernel, a row for each case, a column for each architecture."""
    out = [f"Compiled by {versions}.\n"]
    for kernel, group in groupby(rows, lambda row: row.kernel):
        out.append(f"**{kernel}**\n")
        out.append("| case | warps | " + " | ".join(f"sm_{arch}" for arch in _ARCH_COLUMNS) + " |")
        out.append("| --- | --- |" + " --- |" * len(_ARCH_COLUMNS))
        for case, same in groupby(group, lambda row: row.case):
            by_arch = {row.arch: row for row in same}
            warps = "/".join(str(n) for n in sorted({row.warps for row in by_arch.values()}))
            cells = [_cell(by_arch[arch]) if arch in by_arch else "-" for arch in _ARCH_COLUMNS]
            out.append(f"| {case} | {warps} | " + " | ".join(cells) + " |")
        out.append("")
    return "\n".join(out)


def replace_table(page: str, table: str) -> str:
    """`page` with `table` between its markers; ValueError where they are missing."""
    if not BLOCK.search(page):
        raise ValueError("has no '<!-- compiled: ... -->' and '<!-- /compiled -->' markers to write between")
    return BLOCK.sub(lambda found: found["begin"] + "\n" + table + "\n" + found["end"], page)


def main(words: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m xloss_kernels.report", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("kernel", nargs="?", default="", help="only kernels whose name contains this")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--json", action="store_true", help="print JSON")
    how.add_argument("--write", type=Path, metavar="PAGE", help="refresh the tables of this Markdown page")
    given = parser.parse_args(words)
    if find_spec("triton") is None:
        parser.error("triton is not installed (it has packages for Linux only); docs/kernels.md holds the last result")
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 replaces the compiler by the interpreter; unset it")
    if given.write is not None:
        _check_page(parser, given.write, given.kernel)
    from xloss_kernels.compiled import toolchain

    rows = list(_compile(parser, given.kernel))
    if given.json:
        print(json.dumps({"versions": toolchain(), "kernels": [asdict(row) for row in rows]}, indent=2))
    elif given.write is not None:
        page = given.write.read_text(encoding="utf-8")
        given.write.write_text(replace_table(page, markdown(rows, toolchain())), encoding="utf-8")
        print(f"Written: {given.write}")
    else:
        print("\n".join(lines(rows, toolchain())))
    return 0


def _check_page(parser: argparse.ArgumentParser, page: Path, kernel: str) -> None:
    """Find out before the work what would fail after it."""
    if kernel:
        parser.error(f"--write puts down every kernel; leave out {kernel!r}")
    if not page.is_file():
        parser.error(f"--write {page}: no such file")
    try:
        replace_table(page.read_text(encoding="utf-8"), "")
    except ValueError as error:
        parser.error(f"--write {page}: {error}")


def _compile(parser: argparse.ArgumentParser, kernel: str) -> Iterator[CompiledKernel]:
    """Compile and say how far it is, on stderr: in place on a terminal, else once for each kernel."""
    from xloss_kernels.compiled import compile_points
    from xloss_kernels.compiled_cases import CASES, points

    wanted, shown = points(kernel), ""
    if not wanted:
        _unknown(parser, kernel, list(dict.fromkeys(case.kernel for case in CASES)))
    in_place = sys.stderr.isatty()
    for index, (case, arch) in enumerate(wanted, 1):
        if in_place:
            note = f"{index}/{len(wanted)} {case.kernel}, {case.name}, sm_{arch}"
            print(f"\r\x1b[K{note[:79]}", end="", file=sys.stderr, flush=True)
        elif case.kernel != shown:
            shown = case.kernel
            print(f"{index}/{len(wanted)} {shown}", file=sys.stderr, flush=True)
        yield from compile_points([(case, arch)])
    if in_place:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def _unknown(parser: argparse.ArgumentParser, kernel: str, names: list[str]) -> NoReturn:
    parser.error(f"no kernel's name contains {kernel!r}; there are {', '.join(names)}")


def _instruction(row: CompiledKernel) -> str:
    return _SHORT.get(row.instruction, row.instruction)


def _cell(row: CompiledKernel) -> str:
    numbers = f"{row.registers} / {row.spill_bytes} / {row.shared_bytes}"
    return numbers if row.instruction == "-" else f"{numbers} {_instruction(row)}"


if __name__ == "__main__":
    raise SystemExit(main())
