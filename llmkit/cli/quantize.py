"""`llmkit quantize`: a model in 4 or 8 bits."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from llmkit.cli.options import model_name, option

if TYPE_CHECKING:
    from llmkit.checkpoint.quantize import Progress

SCHEMES = ("q4", "q8")
QUIET_SECONDS = 2.0  # no progress bar before


@click.command(short_help="Write a model in 4 or 8 bits.")
@click.argument("model", required=False, default=None)
@option("-m", "--model", "model_option", metavar="MODEL", help="The same as MODEL: a folder, a hub id or HUB_ID@REV.")
@option("--revision", metavar="REV", help="Branch, tag or commit of a hub id.")
@option("-o", "--output", type=click.Path(path_type=Path), required=True, metavar="FOLDER", help="The folder to write.")
@option("--scheme", type=click.Choice(SCHEMES), default="q4", show_default=True, help="About 4.5 or 8.3 bits for each weight.")
@option("-t", "--threads", type=click.IntRange(min=1), help="CPU threads [default: torch's choice].")
@option("--overwrite", is_flag=True, help="Replace a model folder that is there.")
def quantize(revision: str | None, output: Path, scheme: str, threads: int | None, overwrite: bool, **_: object) -> int:
    """Write MODEL as a folder with quantized weights, which chat, generate and the Python API open like any other.

    The checkpoint is read and written matrix by matrix, so even a model larger than the memory can be quantized.
    """
    from llmkit.checkpoint.hub import resolve

    folder = resolve(str(model_name()), revision)
    from llmkit.checkpoint.quantize import quantize_folder

    with _Bar() as progress:
        report = quantize_folder(folder, output, scheme, overwrite=overwrite, threads=threads, progress=progress)
    print(
        f"{report.folder}: {report.scheme}, {report.bits_per_weight:.2f} bits per weight over the whole model, "
        f"{report.bytes_before / 1e6:.1f} MB before, {report.bytes_after / 1e6:.1f} MB after, {report.seconds:.1f} s"
    )
    return 0


class _Bar:
    """A progress bar on stderr for what takes longer than two seconds."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        columns = TextColumn("quantizing"), BarColumn(), TextColumn("{task.percentage:.0f}%"), TimeRemainingColumn()
        self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
        self._task = self._bar.add_task("")
        self._shown = False

    def __enter__(self) -> Progress:
        import time

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
