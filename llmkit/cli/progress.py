"""The progress bar of the commands that go through a whole model or text."""

from __future__ import annotations

import time
from collections.abc import Callable

QUIET_SECONDS = 2.0  # no bar before


class Bar:
    """A progress bar on stderr, if that is a terminal, for what takes longer than two seconds.

    `with Bar("quantizing") as progress:` gives a function of what is done and of all there is to do.
    """

    def __init__(self, what: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        columns = TextColumn(what), BarColumn(), TextColumn("{task.percentage:.0f}%"), TimeRemainingColumn()
        self._bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._bar.add_task("")
        self._shown = False

    def __enter__(self) -> Callable[[int, int], None]:
        began = time.monotonic()

        def progress(done: int, total: int) -> None:
            if not self._shown and time.monotonic() - began > QUIET_SECONDS:
                self._bar.start()
                self._shown = True
            self._bar.update(self._task, completed=done, total=total)

        return progress

    def __exit__(self, *_: object) -> None:
        if self._shown:
            self._bar.stop()
