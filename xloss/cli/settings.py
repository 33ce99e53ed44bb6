"""Options from elsewhere than the command line: ``XLOSS_*`` variables, ``--config FILE``, ``pyproject.toml``.

The command line wins over the environment, that over ``--config``, that over the table ``[tool.xloss]`` of
pyproject.toml. A key that no command knows is an error with a suggestion, wherever it stands.
"""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from cyclopts import App, ArgumentCollection, CycloptsError
from cyclopts.config import Dict, Env

from xloss.cli.errors import CannotRun

PREFIX = "XLOSS_"


@dataclass(frozen=True)
class CheckedEnv:
    """``XLOSS_DEMO_STEPS=5`` is ``xloss demo --steps 5``."""

    root: App

    def __call__(self, app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
        """Called by cyclopts while it parses."""
        prefix = PREFIX + "".join(f"{command.upper()}_" for command in commands)
        known = [prefix + name.upper().replace("-", "_") for name in option_names(arguments)]
        others = tuple(f"{prefix}{name.upper()}_" for name in command_names(app)) if commands else ()
        for name in sorted(os.environ) if commands else ():
            if name.startswith(prefix) and not name.startswith(others) and name not in known:
                raise CycloptsError(msg=f"Unknown environment variable {name}.{_near(name, known)}")
            word = name.removeprefix(PREFIX).split("_")[0].lower()
            names = command_names(self.root)
            if name.startswith(PREFIX) and word not in names and (near := get_close_matches(word, names, n=1)):
                meant = name.replace(word.upper(), near[0].upper(), 1)
                raise CycloptsError(msg=f"Unknown environment variable {name}. Did you mean {meant}?")
        Env(PREFIX)(app, commands, arguments)


@dataclass(frozen=True)
class CheckedTable:
    """A table of tables, ``{command: {option: value}}``, read from ``source``."""

    table: dict[str, Any]
    source: str
    root: App

    def __call__(self, app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
        """Called by cyclopts while it parses."""
        self._check(self.table, self.root, ())
        Dict(self.table, source=self.source)(app, commands, arguments)

    def _check(self, table: dict[str, Any], app: App, path: tuple[str, ...]) -> None:
        """Raise unless every key is a command under ``app``, with a table of its own, or one of its options."""
        names = command_names(app)
        known = option_names(app.assemble_argument_collection()) if path else []
        for key, value in table.items():
            section = ".".join([*path, key])
            if key in names:
                if not isinstance(value, dict):
                    raise CycloptsError(msg=f"[{section}] in {self.source} must be a table of options, not {value!r}.")
                self._check(value, app[key], (*path, key))
            elif not path:
                raise CycloptsError(msg=f"Unknown command [{section}] in {self.source}.{_near(key, names)}")
            elif key.replace("_", "-") not in known:
                where = ".".join(path)
                near = _near(key, [*known, *names])
                raise CycloptsError(msg=f"Unknown option {key!r} of [{where}] in {self.source}.{near}")


def command_names(root: App) -> list[str]:
    """What can follow ``xloss``."""
    return sorted(name for name in root if not name.startswith("-"))


def option_names(arguments: ArgumentCollection) -> list[str]:
    """Long option names without dashes in front."""
    return sorted(name.removeprefix("--") for argument in arguments for name in argument.names)


def sources(root: App, config: Path | None) -> list[CheckedEnv | CheckedTable]:
    """All places options come from, the strongest first.

    Raises:
        CannotRun: a file is missing, cannot be parsed or is neither TOML nor JSON.
    """
    found: list[CheckedEnv | CheckedTable] = [CheckedEnv(root)]
    if config is not None:
        found.append(CheckedTable(read_table(config), str(config), root))
    project = Path("pyproject.toml")
    if project.is_file():
        table = read_table(project).get("tool", {}).get("xloss", {})
        found.append(CheckedTable(table, "[tool.xloss] of pyproject.toml", root))
    return found


def read_table(path: Path) -> dict[str, Any]:
    """The content of a TOML or JSON file. Raises CannotRun where there is none."""
    parse = {".toml": tomllib.loads, ".json": json.loads}.get(path.suffix.lower())
    if parse is None:
        raise CannotRun(f"{path} ends in {path.suffix or 'nothing'!r}; a config file is .toml or .json.")
    try:
        table = parse(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CannotRun(f"Cannot read {path}: {error}") from error
    if not isinstance(table, dict):
        raise CannotRun(f"{path} must hold a table {{command: {{option: value}}}}, not a {type(table).__name__}.")
    return table


def _near(given: str, known: Iterable[str]) -> str:
    near = get_close_matches(given, list(known), n=1)
    return f" Did you mean {near[0]}?" if near else f" Accepted: {', '.join(known)}."
