"""``xloss demo``: train a small language model on real text, take policy steps, and say what xloss saved."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace

import torch
from rich.console import Console

from xloss.cli import demo_report, demo_verdict, plots
from xloss.cli.calibration import calibrate
from xloss.cli.corpus import Corpus, load_corpus
from xloss.cli.demo_steps import num_ticks, run_steps
from xloss.cli.demo_verdict import DemoResult
from xloss.cli.errors import CannotRun, MeasurementFailed
from xloss.cli.info import busy_machine, environment
from xloss.cli.options import DemoOptions, Sizes, choose_sizes
from xloss.cli.progress import Bars
from xloss.cli.rollouts import batch_shape, roll_out
from xloss.cli.tiny_lm import TinyLM, TrainSettings, train


def demo(*, options: DemoOptions = DemoOptions()) -> int:  # noqa: B008 (frozen)
    """See xloss at work on this machine: no download, under a minute on two cores.

    Trains a tiny language model on Python's standard library, takes GRPO, CISPO and KL steps with eager and with
    xloss (loss, gradients against float64, peak memory, time), and cuts one batch in several ways. Writes demo.json,
    demo.md and plots. Exit status 0 if everything held, 1 if not.
    """
    if options.parallel:
        from xloss.cli.parallel.demo import parallel_demo  # FSDP and checkpoints take a second to import

        return parallel_demo(options)
    sizes, notes = choose_sizes(options)
    notes += busy_machine()
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CannotRun(f"--out {options.out}: {error.strerror}. Give a folder that can be written.") from error
    with Bars() as bars:
        try:
            result = run(options, sizes, notes, bars)
        except MeasurementFailed as error:
            return _failed(options, str(error))
        with bars.stage("Drawing", 1):
            drawn = plots.draw(options.out, result)
    verdict = demo_verdict.judge(result)
    demo_report.write(options.out, result, verdict, drawn)
    if options.json:
        sys.stdout.write(demo_report.to_json(result, verdict, drawn))
        return 0 if verdict.passed else 1
    console = Console()
    demo_report.print_tables(console, result)
    if drawn["reason"]:
        console.print(f"No plots: {drawn['reason']}", highlight=False, markup=False)
    written = ", ".join(["demo.md", "demo.json", *drawn["files"]])
    console.print(f"Written to {options.out}: {written}", highlight=False, markup=False)
    style = "bold green" if verdict.passed else "bold red"
    console.print(verdict.line, style=style, soft_wrap=True, highlight=False, markup=False)
    return 0 if verdict.passed else 1


def run(options: DemoOptions, sizes: Sizes, notes: list[str], bars: Bars) -> DemoResult:
    """All parts of the demo but the writing."""
    with bars.stage("Reading text", None) as tick:
        corpus = load_corpus(options.text, sizes.vocab_size, options.seed, tick)
    text, held_out = corpus.split()
    torch.manual_seed(options.seed)
    model = TinyLM(sizes.vocab_size, sizes.hidden_size).to(sizes.device)
    settings = TrainSettings(num_steps=sizes.steps, seed=options.seed)
    with bars.stage("Training", sizes.steps) as tick:
        training, policies = train(model, text, held_out, settings, tick)
    with bars.stage("Sampling", batch_shape(sizes.tokens)[1]) as tick:
        batch = roll_out(policies, held_out, corpus.words, sizes.tokens, options.seed, tick)
    del policies
    with bars.stage("Policy steps", num_ticks(batch)) as tick:
        steps = run_steps(batch, tick=tick)
    with bars.stage("Calibration", 1):
        cuts = calibrate(model, held_out)
    metrics = steps[-1].metrics
    return DemoResult(
        environment=environment(),
        sizes=replace(sizes, tokens=batch.num_tokens),
        notes=tuple(notes),
        text=_describe(corpus),
        training=training,
        batch={
            "num_tokens": batch.num_tokens,
            "num_prompts": batch.num_prompts,
            "mean_reward": batch.mean_reward,
            **{name: metrics[name] for name in ("ratio_min", "ratio_max", "clip_frac_low", "clip_frac_high")},
        },
        steps=tuple(steps),
        calibration=tuple(cuts),
        seconds=bars.seconds,
    )


def _failed(options: DemoOptions, reason: str) -> int:
    verdict = demo_verdict.Verdict(False, f"FAIL {reason}", (reason,))
    print(json.dumps({"verdict": asdict(verdict)}) if options.json else verdict.line)
    return 1


def _describe(corpus: Corpus) -> dict[str, object]:
    return {
        "source": corpus.source,
        "num_files": corpus.num_files,
        "num_chars": corpus.num_chars,
        "num_tokens": len(corpus.ids),
        "num_types": corpus.num_types,
        "unknown_frac": corpus.unknown_frac,
    }
