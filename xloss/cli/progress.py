"""Progress bars on stderr, so that stdout holds results only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

Tick = Callable[..., None]
"""``tick()`` or ``tick("note")``: one unit is done, and what there is to say about it."""


class Bars:
    """A stack of bars, one a stage. ``seconds`` keeps how long each stage took."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self.seconds: dict[str, float] = {}
        self._progress = Progress(
            TextColumn("{task.description:<22}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("[dim]{task.fields[note]}"),
            console=self.console,
        )

    def __enter__(self) -> Bars:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    @contextmanager
    def stage(self, name: str, total: int | None) -> Iterator[Tick]:
        """A bar while the block runs; it is full when the block ends well."""
        task = self._progress.add_task(name, total=total, note="")

        def tick(note: str = "") -> None:
            self._progress.update(task, advance=1, note=note)

        yield tick
        done = int(self._progress.tasks[task].completed)
        self._progress.update(task, total=max(done, 1) if total is None else total, note="")
        self._progress.update(task, completed=self._progress.tasks[task].total)
        self._progress.stop_task(task)
        self.seconds[name] = round(self._progress.tasks[task].elapsed or 0.0, 2)
