"""The demo's result in its three forms: JSON, Markdown, tables for the terminal."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from xloss.cli.calibration import Cut
from xloss.cli.demo_steps import CHECKED_WORDS, Step
from xloss.cli.demo_verdict import DemoResult, Verdict, memory_ratio, pairs, speedup


def to_json(result: DemoResult, verdict: Verdict, plots: dict[str, Any]) -> str:
    """``demo.json``."""
    content = {**asdict(result), "memory_ratio": memory_ratio(result.steps), "speedup": speedup(result.steps)}
    return json.dumps({**content, "plots": plots, "verdict": asdict(verdict)}, indent=2, default=str) + "\n"


def _count(number: int) -> str:
    return f"{number / 1e6:.1f} million" if number >= 1e6 else f"{number:,}"


def _mib(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def step_rows(steps: tuple[Step, ...]) -> list[tuple[str, ...]]:
    """Cells of the table of policy steps."""
    return [
        (s.loss_name, s.run, f"{s.loss:+.7f}", f"{s.grad_error:.1e}", _mib(s.peak_mib), f"{s.time_ms:,.0f}")
        for s in steps
    ]


def cut_rows(cuts: tuple[Cut, ...]) -> list[tuple[str, ...]]:
    """Cells of the calibration table."""
    return [
        (
            cut.name,
            f"{cut.naive_loss:.4f}",
            f"{100 * cut.naive_grad_drift:.1f} %",
            f"{cut.xloss_loss:.4f}",
            f"{100 * cut.xloss_grad_drift:.5f} %",
        )
        for cut in cuts
    ]


STEP_COLUMNS = ("loss", "run", "value", "gradient error", "peak MiB", "time ms")
CUT_COLUMNS = ("cut", "naive loss", "naive drift", "xloss loss", "xloss drift")


def headlines(result: DemoResult) -> dict[str, str]:
    """One sentence for each part."""
    text, training, batch = result.text, result.training, result.batch
    return {
        "Text": f"{text['source']}: {text['num_files']:,} file{'s' if text['num_files'] > 1 else ''}, "
        f"{_count(text['num_chars'])} characters, {_count(text['num_tokens'])} tokens, "
        f"{text['num_types']:,} different words; vocabulary {result.sizes.vocab_size:,}.",
        "Training": f"{training.num_steps} steps of {training.tokens_per_step} tokens: loss on unseen text "
        f"{training.held_out_before:.2f} -> {training.held_out_after:.2f} nats a token "
        f"(knowing nothing: log V = {training.uniform:.2f}).",
        "Policy steps": f"{batch['num_tokens']:,} sampled tokens, V={result.sizes.vocab_size:,}, "
        f"H={result.sizes.hidden_size}, float32, {result.sizes.device}. Ratios {batch['ratio_min']:.2f} to "
        f"{batch['ratio_max']:.2f}; clipped: {100 * batch['clip_frac_low']:.0f} % low, "
        f"{100 * batch['clip_frac_high']:.0f} % high.",
        "Calibration": "One batch of 8 sequences of uneven length, as micro-batches x sequences; drift is the "
        "gradient's difference from the uncut batch.",
    }


def _step_note(result: DemoResult) -> str:
    return (
        "eager is `log_softmax(hidden @ weight.T)` and plain autograd. Gradient error: |g - g64| / |g64| against "
        "float64, the larger of hidden states (all tokens) and head "
        f"({min(CHECKED_WORDS, result.sizes.vocab_size):,} words). "
        "Peak: memory above what was held before the step, gradients included."
    )


def print_tables(console: Console, result: DemoResult) -> None:
    """The whole result on the terminal, right at 80 columns."""
    lines = headlines(result)
    for note in result.notes:
        console.print(f"[yellow]Note:[/] {escape(note)}", highlight=False)
    for part in ("Text", "Training"):
        console.print(f"[bold]{part}.[/] {escape(lines[part])}", highlight=False)
    tables = (
        ("Policy steps", STEP_COLUMNS, step_rows(result.steps), 2),
        ("Calibration", CUT_COLUMNS, cut_rows(result.calibration), 1),
    )
    for part, columns, rows, left in tables:
        console.print(f"\n[bold]{part}.[/] {escape(lines[part])}", highlight=False)
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for i, column in enumerate(columns):
            table.add_column(column, justify="left" if i < left else "right", no_wrap=True)
        for row in rows:
            table.add_row(*row, style="bold" if row[1] == "xloss" else "")
        console.print(table)


def to_markdown(result: DemoResult, verdict: Verdict, plots: dict[str, Any]) -> str:
    """``demo.md``."""
    lines = headlines(result)
    environment = ", ".join(
        f"{key} {value}" for key, value in result.environment.items() if isinstance(value, str | int)
    )
    parts = ["# xloss demo", f"**{verdict.line}**", f"{environment}; {sum(result.seconds.values()):.0f} s."]
    parts += [f"Note: {note}" for note in result.notes]
    parts += [f"![Summary]({plots['files'][0]})"] if plots["files"] else [f"No plots: {plots['reason']}"]
    parts += ["## Text and training", lines["Text"], lines["Training"]]
    parts += [
        "## Policy steps, eager and xloss",
        lines["Policy steps"],
        _table(STEP_COLUMNS, step_rows(result.steps), 2),
    ]
    parts += [
        _step_note(result),
        "What the engine did, in its own words (GRPO):",
        f"```\n{pairs(result.steps)[0][1].plan}\n```",
    ]
    parts += ["## Calibration", lines["Calibration"], _table(CUT_COLUMNS, cut_rows(result.calibration), 1)]
    parts += [
        "Naive is `loss.mean() / number of micro-batches`: a short sequence alone in its micro-batch counts as much as "
        "a long one. xloss divides every token by the token count of the whole batch, so the cut does not matter."
    ]
    return "\n\n".join(parts) + "\n"


def _table(columns: tuple[str, ...], rows: list[tuple[str, ...]], left: int) -> str:
    rule = ["---" if i < left else "---:" for i in range(len(columns))]
    return "\n".join("| " + " | ".join(row) + " |" for row in [columns, rule, *rows])


def write(folder: Path, result: DemoResult, verdict: Verdict, plots: dict[str, Any]) -> None:
    """``demo.json`` and ``demo.md`` into ``folder``."""
    (folder / "demo.json").write_text(to_json(result, verdict, plots), "utf-8")
    (folder / "demo.md").write_text(to_markdown(result, verdict, plots), "utf-8")
