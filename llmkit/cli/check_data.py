"""What `llmkit finetune RECIPE --check-data` prints."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from llmkit.training.data.preview import DataCheck, Sample

LONGEST_PIECE = 600  # characters of a piece that are shown; its middle is left out
WIDTH = 40  # of the longest bar
PIPE_WIDTH = 160


def print_check(check: DataCheck, console: Console | None = None) -> None:
    """Sample rows, what became of every source, lengths, packing and problems."""
    console = console or Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else PIPE_WIDTH)
    if console.is_terminal:
        console.print(Text.assemble(("green: learned", "green"), "   ", ("dim: only seen", "dim")))
    else:
        console.print("[[ ]]: learned; the rest is only seen", markup=False)
    for sample in check.samples:
        console.print()
        console.print(Text(sample.place, style="bold"))
        console.print(_marked(sample, console.is_terminal))
    console.print()
    console.print(_table(check))
    for line in check.report.lines():
        console.print(line, markup=False)
    console.print()
    console.print("tokens per document:")
    most = max(count for *_, count in check.lengths)
    for low, high, count in check.lengths:
        bar = "█" * -(-count * WIDTH // most)
        console.print(f"{low:>8,} to {high:<8,} {bar} {count:,}", markup=False)
    console.print(f"longest: {check.longest:,} tokens; {check.held_out:,} documents are held out")
    console.print(f"packed: {check.rows:,} rows of {check.max_length:,} tokens for each pass over the data, {check.fill:.1%} full")


def _marked(sample: Sample, colour: bool) -> Text:
    shown = Text()
    for piece, learned in sample.pieces:
        half = LONGEST_PIECE // 2
        text = piece if len(piece) <= LONGEST_PIECE else f"{piece[:half]} ... {piece[-half:]}"
        text = "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)  # no control codes on the terminal
        shown.append(text if colour or not learned else f"[[{text}]]", style="green" if learned else "dim")
    return shown


def _table(check: DataCheck) -> Table:
    table = Table(box=None, pad_edge=False, header_style="")
    for name in ("source", "rows", "documents", "held out", "tokens", "targets", "end learned"):
        table.add_column(name, justify="left" if name == "source" else "right", overflow="fold")
    for source in check.report.sources:
        share = f"{source.ended / source.documents:.1%}" if source.documents else "-"
        counts = (source.rows, source.documents, source.held_out, source.tokens, source.targets)
        table.add_row(Text(source.path), *(f"{count:,}" for count in counts), share)
    return table
