"""Where options come from.

Contract: command line, then XLOSS_* variables, then --config FILE, then [tool.xloss] of pyproject.toml; a name that
nobody knows ends with exit status 2 and the name that was meant, wherever it stands.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from xloss.cli import app
from xloss.cli.options import DemoOptions
from xloss.cli.settings import sources


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")  # messages on one line
    return tmp_path


def parse(arguments: str, config: Path | None = None) -> DemoOptions:
    app.config = sources(app, config)
    try:
        _, bound, _ = app.parse_args(arguments, exit_on_error=False, print_error=False)
    finally:
        app.config = None
    return bound.arguments.get("options", DemoOptions())


def test_precedence(empty_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (empty_folder / "pyproject.toml").write_text(
        "[tool.xloss.demo]\nsteps = 1\ntokens = 101\nseed = 11\nquick = true\n"
    )
    config = empty_folder / "some.json"
    config.write_text(json.dumps({"demo": {"steps": 2, "tokens": 102, "hidden_size": 12, "text": [str(config)]}}))
    monkeypatch.setenv("XLOSS_DEMO_STEPS", "3")
    monkeypatch.setenv("XLOSS_DEMO_VOCAB_SIZE", "300")
    options = parse("demo --steps 4", config)
    assert (options.steps, options.vocab_size, options.tokens, options.seed) == (4, 300, 102, 11)
    assert (options.hidden_size, options.quick, options.text) == (12, True, (config,))
    assert parse("demo", config).steps == 3


def test_toml_config(empty_folder: Path) -> None:
    config = empty_folder / "some.toml"
    config.write_text('[demo]\ndevice = "cpu"\nvocab-size = 512\n')
    assert parse("demo", config) == DemoOptions(device="cpu", vocab_size=512)


def test_pyproject_of_somebody_else_is_left_alone(empty_folder: Path) -> None:
    (empty_folder / "pyproject.toml").write_text("[tool.ruff]\nline-length = 100\n")
    assert parse("demo") == DemoOptions()


TYPOS = {
    "option": ("demo --stepz 3", {}, "", "--steps"),
    "command": ("dmo", {}, "", "demo"),
    "choice": ("demo --device cud", {}, "", "cuda"),
    "variable": ("demo", {"XLOSS_DEMO_STEPZ": "3"}, "", "XLOSS_DEMO_STEPS"),
    "variable's command": ("demo", {"XLOSS_DMO_STEPS": "3"}, "", "XLOSS_DEMO_STEPS"),
    "config option": ("demo --config c.toml", {}, "[demo]\nstepz = 3\n", "steps"),
    "config command": ("info --config c.toml", {}, "[dmo]\nsteps = 3\n", "demo"),
    "config by variable": ("info", {"XLOSS_CONFIG": "c.toml"}, "[demo]\nstepz = 3\n", "steps"),
}


@pytest.mark.parametrize("name", TYPOS)
def test_typo_is_status_2_with_a_suggestion(
    name: str, empty_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, variables, config, meant = TYPOS[name]
    (empty_folder / "c.toml").write_text(config)
    for key, value in variables.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(SystemExit) as stop:
        app.meta(arguments.split())
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert f"Did you mean {meant}?" in captured.err.replace('"', "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("demo --tokens 0", "Must be >= 64"),
        ("demo --steps many", "unable to convert"),
        ("demo --text missing.txt", "does not exist"),
        ("demo --config missing.toml", "Cannot read missing.toml"),
        ("demo --config options.yaml", "a config file is .toml or .json"),
    ],
)
def test_bad_value_is_status_2(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        app.meta(arguments.split())
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", ["", "demo", "info", "losses", "losses show"])
def test_help_fits_80_columns(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    app.meta.help_print(command.split(), console=Console(width=80))
    printed = capsys.readouterr().out
    assert "--config" in printed
    assert max(map(len, printed.splitlines())) <= 80
