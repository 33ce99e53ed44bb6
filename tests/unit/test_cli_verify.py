"""``xloss verify`` without ranks: options, words, the table, a loss of one's own.

Contract: a wrong name is exit status 2 with the nearest one; skipped layouts never count as passed; an error is told
with the parameter and the factor; a loss is found by import path, as a config, a class or a function; what is wrong
with it is named by the check that it fails; the table fits 80 columns.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from xloss import CELossConfig, PreferenceLossConfig
from xloss.cli import app
from xloss.cli.errors import CannotRun
from xloss.cli.spawn import World
from xloss.cli.verify.cases import STANDARD, every_case, find_cases
from xloss.cli.verify.compare import allowed_error, compare, explain
from xloss.cli.verify.layouts import LAYOUTS
from xloss.cli.verify.options import VerifyOptions
from xloss.cli.verify.own import own_case
from xloss.cli.verify.problem import Shape, build_batch
from xloss.cli.verify.report import Report, print_table, to_json
from xloss.cli.verify.run import choose_world
from xloss.cli.verify.step import Outcome
from xloss.cli.verify.verdict import Row, row_of, skipped_row
from xloss.cli.verify.world import Seen
from xloss.losses.policies import policy_losses
from xloss.losses.preferences import preference_losses


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


def run(arguments: str) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as stop:
        app.meta(arguments.split())
    return int(stop.value.code or 0), out.getvalue(), err.getvalue()


# -- the call ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--layouts fsdp-root", "Did you mean 'fsdp2-root'?"),
        ("--losses grp", "Did you mean 'grpo'?"),
        ("--nproc 0", "--nproc"),
        ("--loss nowhere.to:be_found", "No module named 'nowhere'"),
        ("--layout chunks", "Did you mean --layouts?"),
        ("--dtype float16", "float16"),
    ],
)
def test_a_wrong_call_names_the_right_one(arguments: str, says: str) -> None:
    status, out, err = run(f"verify {arguments}")
    assert (status, out) == (2, "")
    assert says in " ".join(err.replace("│", " ").split())


def test_torchrun_decides_how_many(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_world(VerifyOptions(device="cpu")) == World(2)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert choose_world(VerifyOptions(device="cpu")).nproc == 4
    with pytest.raises(CannotRun, match="torchrun started 4 processes"):
        choose_world(VerifyOptions(device="cpu", nproc=2))


def test_single_process_layouts_need_no_world() -> None:
    status, out, _ = run("verify --nproc 1 --layouts chunks,eager --losses ce-sample dpo --bias --softcap 5 --json")
    report = json.loads(out)
    assert status == 0 and [row["verdict"] for row in report["rows"]] == ["PASS", "PASS"]
    assert report["shape"]["bias"] is True and report["shape"]["softcap"] == 5


# -- losses ------------------------------------------------------------------------------------------------------------


def test_all_losses_are_those_of_the_registries() -> None:
    known = every_case()
    assert set(preference_losses()) - set(known) == {"aot", "aot_unpaired"}  # rank the sequences of a micro-batch
    assert len(set(policy_losses()) - set(known)) <= 6  # those that rank the tokens of a micro-batch
    assert [case.name for case in find_cases(STANDARD)] == list(STANDARD)


OWN = """
from typing import Annotated

import torch

from xloss import BaseLossConfig, BaseLossContext, BaseLossKwargs, CELossConfig, CELossContextInputItem, PerToken
from xloss import PolicyLossConfig

made = CELossConfig(focal_gamma=1.0)
number = 3


def smoothed():
    return CELossConfig(label_smoothing=0.2)


class Needs(BaseLossConfig):
    strength: float


class Kwargs(BaseLossKwargs):
    loss_weight: Annotated[torch.Tensor | None, PerToken(pad=0.0, weight=True)] = None


class Context(BaseLossContext[CELossContextInputItem]):
    loss_kwargs: Kwargs

    @classmethod
    def calibrate(cls, kwargs_list, loss_cfg, cu_seq_lens_list, ranks):
        masks = [kwargs.shifted_labels != loss_cfg.ignore_idx for kwargs in kwargs_list]
        factor = ranks.gradient_factor(loss_cfg.grad_reduce) / ranks.sum(masks).divisor()
        for kwargs, mask in zip(kwargs_list, masks):
            kwargs.loss_weight = mask * factor

    def token_loss(self, stats, loss_kwargs):
        return -stats.logprobs * loss_kwargs.loss_weight


class Right(BaseLossConfig):
    loss_ctx_cls = property(lambda self: Context)


class PerBatch(Context):
    @classmethod
    def calibrate(cls, kwargs_list, loss_cfg, cu_seq_lens_list, ranks):
        for kwargs in kwargs_list:
            mask = kwargs.shifted_labels != loss_cfg.ignore_idx
            kwargs.loss_weight = mask / mask.sum().clamp(min=1)


class MeanOfMicroBatch(BaseLossConfig):
    loss_ctx_cls = property(lambda self: PerBatch)


class Liar(Context):
    token_local = True

    def token_loss(self, stats, loss_kwargs):
        return -(stats.logprobs - stats.logprobs.mean()) ** 2 * loss_kwargs.loss_weight


class FalselyLocal(BaseLossConfig):
    loss_ctx_cls = property(lambda self: Liar)


class ByPlace(Context):
    def token_loss(self, stats, loss_kwargs):
        return -stats.logprobs * loss_kwargs.loss_weight * torch.arange(len(stats.logprobs))


class ReadsPlaces(BaseLossConfig):
    loss_ctx_cls = property(lambda self: ByPlace)


class Raises(Context):
    def token_loss(self, stats, loss_kwargs):
        raise RuntimeError("not today")


class Raising(BaseLossConfig):
    loss_ctx_cls = property(lambda self: Raises)


class Vanishes(Context):
    def token_loss(self, stats, loss_kwargs):
        return stats.logprobs * 0 * loss_kwargs.loss_weight


class WithoutGradient(BaseLossConfig):
    loss_ctx_cls = property(lambda self: Vanishes)
"""


@pytest.fixture
def own(empty_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (empty_folder / "own_losses_of_a_test.py").write_text(OWN)
    monkeypatch.delitem(sys.modules, "own_losses_of_a_test", raising=False)


@pytest.mark.usefixtures("own")
def test_a_loss_of_ones_own_is_a_config_a_class_or_a_function() -> None:
    def found(name: str) -> Any:
        return own_case(name).config

    assert found("own_losses_of_a_test:made") == CELossConfig(focal_gamma=1.0)
    assert found("own_losses_of_a_test.smoothed") == CELossConfig(label_smoothing=0.2)
    assert type(found("own_losses_of_a_test:Right")).__name__ == "Right"
    (policy,) = (cls for name, cls in policy_losses().items() if name == "ppo")
    assert found(f"{policy.__module__}:{policy.__name__}").policy_loss_cfg.loss_type == "ppo"
    term = preference_losses()["ipo"]
    assert found(f"{term.__module__}:{term.__name__}") == PreferenceLossConfig(loss_type="ipo")  # type: ignore[arg-type]
    with pytest.raises(CannotRun, match="Needs needs values for strength"):
        found("own_losses_of_a_test:Needs")
    with pytest.raises(CannotRun, match=r"is 3\. Accepted: a BaseLossConfig"):
        found("own_losses_of_a_test:number")


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize(
    ("name", "failing", "says"),
    [
        ("Right", [], ""),
        ("MeanOfMicroBatch", ["micro-batches"], "denominator of the whole optimizer step"),
        ("FalselyLocal", ["chunks", "micro-batches"], "token_local=True each token's loss must depend on that token"),
        ("ReadsPlaces", ["packing", "micro-batches"], "must follow cu_seq_lens"),
        ("Raising", ["chunks", "packing", "micro-batches", "eager"], "one process raised RuntimeError: not today"),
        ("WithoutGradient", ["chunks", "packing", "micro-batches", "eager"], "is 0 on the made-up batch"),
    ],
)
def test_what_is_wrong_with_a_loss_of_ones_own(name: str, failing: list[str], says: str) -> None:
    """Each wrong loss fails the checks that its fault shows in, and no other."""
    arguments = f"verify --loss own_losses_of_a_test:{name} --nproc 1 --layouts chunks packing micro-batches eager"
    status, out, _ = run(arguments)
    assert status == bool(failing)
    told = " ".join(out.split())
    assert says in told
    verdicts = {
        line.split()[0]: line.split()[-1] for line in out.splitlines() if line.split()[-1:] in (["PASS"], ["FAIL"])
    }
    assert [layout for layout, verdict in verdicts.items() if verdict == "FAIL"] == failing


# -- words -------------------------------------------------------------------------------------------------------------


GRADS = {"norm.weight": torch.ones(4), "lm_head.weight": torch.arange(6.0).view(2, 3)}


def outcome(factor: float = 1.0, **more: Any) -> Outcome:
    grads = GRADS | {"lm_head.weight": factor * GRADS["lm_head.weight"]}
    fields: dict[str, Any] = {
        "loss": 1.0,
        "scale": 2.0,
        "grads": grads,
        "logprobs": -torch.arange(5.0),
        "metrics": {"kl": 0.5},
    }
    return Outcome(**(fields | more))


@pytest.mark.parametrize(
    ("found", "says"),
    [
        (outcome(2.0), "the gradient of lm_head.weight is 2x too large: added over ranks where one counts"),
        (outcome(1 / 3), "the gradient of lm_head.weight is 3x too small: divided by the number of micro-batches"),
        (outcome(-1.0), "the gradient of lm_head.weight is -1x what it should be"),
        (outcome(0.0), "the gradient of lm_head.weight is 0: nothing reaches it"),
        (outcome(grads=GRADS | {"lm_head.weight": torch.ones(2, 3)}), "off by 7.5e-01, and by no common factor"),
        (outcome(grads=GRADS | {"lm_head.weight": torch.full((2, 3), torch.nan)}), "not finite"),
        (outcome(grads=GRADS | {"lm_head.weight": torch.ones(3, 3)}), "not of the parameter's shape"),
        (outcome(grads={"lm_head.weight": GRADS["lm_head.weight"]}), "norm.weight is not finite, or not of"),
        (outcome(loss=1.5), "the loss differs by 2.5e-01"),
        (outcome(logprobs=torch.full((5,), torch.nan)), "log-probs differs by nan"),
        (outcome(metrics={}), "metric kl differs by nan"),
    ],
)
def test_errors_in_words(found: Outcome, says: str) -> None:
    errors = compare([outcome(), found], [outcome()] * 2, [outcome()] * 2)
    assert not errors.worst <= 1e-6
    assert says in explain(errors, 1e-6, {"ranks": 2, "micro-batches": 3})


def test_the_bar_gives_way_to_rounding_alone() -> None:
    assert allowed_error(torch.float32, 9e-7) == allowed_error(torch.float32, 0.0) == 1e-6
    assert allowed_error(torch.float32, 3e-6) == 6e-6
    assert allowed_error(torch.float32, 0.3) == 1e-4  # one process that is wrong excuses nothing


def test_equal_outcomes_have_no_error() -> None:
    assert compare([outcome()], [outcome()], [outcome()]).worst == 0


# -- the table ---------------------------------------------------------------------------------------------------------


def report(rows: list[Row], losses: tuple[str, ...] = STANDARD) -> Report:
    shape = {"hidden_size": 4096, "vocab_size": 151936, "tokens": 8192, "dtype": "float32"}
    world = {"ranks": 4, "backend": "gloo", "device": "cpu"}
    return Report({}, world, shape, losses, None, tuple(rows), {})


def rows() -> list[Row]:
    found = []
    for layout in LAYOUTS.values():
        errors = {"gradient": 1.25e-07, "gradient64": 2.5e-07, "values": 3e-08, "allowed": 1e-6}
        found.append(Row(layout.name, layout.what, 4, STANDARD[3:], "PASS", note="refused", **errors))  # type: ignore[arg-type]
    return [*found, skipped_row(next(iter(LAYOUTS.values())), "needs a multiple of 4 processes")]


def test_the_table_fits_80_columns() -> None:
    console = Console(file=io.StringIO(), width=80, highlight=False, markup=False)
    print_table(console, report(rows()))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    table = [line for line in lines if line.split()[:1] and line.split()[0] in LAYOUTS]
    assert max(map(len, lines)) <= 80
    assert len(table) == len(LAYOUTS) + 1
    assert table[-1].split() == [next(iter(LAYOUTS)), "skipped"]
    assert f"Skipped: {next(iter(LAYOUTS))}: needs a multiple of 4 processes." in lines
    assert lines[-1].startswith("PASS") and "1 skipped" in lines[-1]


def test_nothing_that_was_skipped_passes() -> None:
    nothing = report(rows()[-1:])
    assert not nothing.passed and nothing.line.startswith("FAIL no layout could run")
    wrong = report([*rows(), Row("ddp", "", 2, ("ce",), "FAIL", failures=("all of it",))])
    assert not wrong.passed and json.loads(to_json(wrong))["verdict"]["failed"] == ["ddp"]


def test_the_batch_is_uneven_and_has_prompts_without_labels() -> None:
    batch = build_batch(Shape(8, 31, 96))
    dead = [
        i for i in range(len(batch.lengths)) if bool((batch.by_token["shifted_labels"][batch.places(i)] == -100).all())
    ]
    assert {5, len(batch.lengths) - 2, len(batch.lengths) - 1} <= set(dead) and len(dead) < 8
    assert len(set(batch.lengths)) > 4 and min(batch.lengths) == 1


def test_refused_in_part_and_wrong_in_part_fails() -> None:
    layout = LAYOUTS["around-ddp"]
    wrong = compare([outcome(2.0)], [outcome()], [outcome()])
    refusal = Seen("around-ddp", "ce", "", None, refusal="[unsupported] no")
    row = row_of(layout, [refusal, Seen("around-ddp", "gspo", "", wrong)], torch.float32, 2)
    assert (row.verdict, row.note, len(row.failures)) == ("FAIL", "", 1)
    row = row_of(layout, [refusal], torch.float32, 2)
    assert (row.verdict, row.note, row.gradient) == ("PASS", "refused", None)


# -- docs/verify.md ----------------------------------------------------------------------------------------------------

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "verify.md").read_text("utf-8")


def test_the_page_lists_every_layout() -> None:
    found = re.findall(r"^\| `([\w-]+)` \| (.*?) \| (\d)(, even)? \|$", PAGE, re.MULTILINE)
    ordered = sorted(LAYOUTS.values(), key=lambda layout: layout.refused)
    assert found == [(x.name, x.what, str(max(x.ranks, 1)), ", even" * (x.multiple == 2)) for x in ordered]


def test_the_page_shows_what_its_own_loss_prints(empty_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    command, shown = re.findall(r"```sh\nxloss (verify --loss .*?)\n```\n```text\n(.*?)```", PAGE, re.DOTALL)[0]
    (empty_folder / "my_losses.py").write_text(code)
    monkeypatch.delitem(sys.modules, "my_losses", raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    status, out, _ = run(command)
    printed = [line.rstrip() for line in out[out.index("FAIL micro") :].splitlines()]

    def figures_left_out(lines: list[str]) -> str:
        return re.sub(r"[\d.]+(e-\d+)?", "#", " ".join(" ".join(lines).split()))

    assert status == 1
    assert figures_left_out(printed) == figures_left_out(shown.splitlines())
