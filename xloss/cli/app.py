"""The ``xloss`` command: its help, its version, where its options come from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import App, CycloptsPanel, Parameter
from rich.console import Console

from xloss import __version__
from xloss.cli.demo import demo
from xloss.cli.errors import CannotRun
from xloss.cli.info import info
from xloss.cli.losses import losses
from xloss.cli.settings import sources
from xloss.cli.verify import verify

HELP = """Language-model losses from hidden states and an lm_head, without the logits.

Options come from the command line, then XLOSS_* variables (XLOSS_DEMO_STEPS=5), then --config FILE
(TOML or JSON, {demo: {steps: 5}}), then [tool.xloss.demo] of pyproject.toml in this folder.
"""

app = App(
    name="xloss",
    help=HELP,
    help_format="markdown",
    version=__version__,
    default_parameter=Parameter(show_env_var=False),
)
app.command(demo)
app.command(info)
app.command(losses)
app.command(verify)
app.meta.help_flags = []
app.meta.version_flags = []


@app.meta.default
def _launch(
    *tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
    config: Annotated[Path | None, Parameter(env_var="XLOSS_CONFIG")] = None,
) -> object:
    """Parse the options that belong to every command, then run the command.

    Parameters
    ----------
    config
        TOML or JSON file with options.
    """
    try:
        app.config = sources(app, config)
        return app(tokens)
    except CannotRun as error:
        Console(stderr=True).print(CycloptsPanel(str(error)))
        return 2
    finally:
        app.config = None


def main() -> None:
    """Entry point of the ``xloss`` command. Exit status: 0 well, 1 a check failed, 2 the call was wrong."""
    app.meta()
