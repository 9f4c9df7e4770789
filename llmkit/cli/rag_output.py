"""How `llmkit rag` shows passages, sources and measures."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmkit.rag.answer import Answer
    from llmkit.rag.retrieve import Hit


def as_json_line(data: object) -> str:
    """JSON that standard output can take: in ASCII where its encoding lacks a character, or a name is no text at all."""
    line = json.dumps(data, ensure_ascii=False)
    try:
        line.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return json.dumps(data)
    return line


_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def printable(text: str) -> str:
    """Without control characters, by which a document or a file's name could write to the terminal what it likes."""
    return _CONTROL.sub("", text)


def hit_data(hit: Hit) -> dict[str, Any]:
    from llmkit.rag.terms import clean

    row = hit.row
    about = {
        "file": row.file,
        "line": hit.line,
        "page": row.page,
        "start": hit.start,
        "end": hit.end,
        "heading": row.heading,
        "key": row.key,
    }
    return about | {"score": hit.score, "parts": dict(hit.parts), "terms": list(hit.terms), "text": clean(hit.text)}


def _place(file: str, line: int, page: int = 0) -> str:
    try:
        shown = str(Path(file).relative_to(Path.cwd()))
    except ValueError:
        shown = file
    return printable(f"{shown}, page {page}" if page else f"{shown}:{line}")


def show_hits(hits: list[Hit]) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    if not hits:
        console.print("Nothing found.")
    for number, hit in enumerate(hits, 1):
        heading = f"  {printable(hit.row.heading)}" if hit.row.heading else ""
        console.print(Text(f"{number}. {_place(hit.row.file, hit.line, hit.row.page)}{heading}  ({hit.score:.3f})", style="bold"))
        console.print(_highlighted(hit.text, set(hit.terms)))
        console.print()


def _highlighted(text: str, terms: set[str]) -> Any:
    from rich.text import Text

    from llmkit.rag.terms import clean, term_list, words

    text = printable(clean(text))
    shown = Text(text)
    for word, start, end in words(text):
        if terms.intersection(term_list(word)):
            shown.stylize("bold yellow", start, end)
    return shown


def show_sources(answer: Answer) -> None:
    from rich.console import Console

    from llmkit.rag.terms import clean

    console = Console(highlight=False, soft_wrap=True)
    for number, citation in enumerate(answer.sources, 1):
        quote = printable(" ".join(citation.quote.split()))
        rows = (hit.row for hit in answer.nearest)
        page = next((row.page for row in rows if row.file == citation.file and row.start <= citation.start < row.end), 0)
        console.print(f'[{number}] {_place(citation.file, citation.line, page)} "{quote}"', markup=False, style="dim")
    if answer.abstained and answer.nearest:
        console.print("The nearest passages:", style="dim")
        for hit in answer.nearest[:3]:
            start = printable(" ".join(clean(hit.text).split()))
            console.print(
                f"  {_place(hit.row.file, hit.line, hit.row.page)} {start[:120]}{'...' * (len(start) > 120)}", markup=False, style="dim"
            )


def show_evaluation(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    for name in ("retrieval", "answers"):
        if name not in result:
            continue
        measures = result[name]
        table = Table("measure", "all", "first half", "second half", title=f"{name}, {measures['queries']} queries")
        for measure, value in measures["all"].items():
            halves = (measures[half].get(measure) for half in ("first_half", "second_half"))
            table.add_row(measure, f"{value:.4f}", *("" if half is None else f"{half:.4f}" for half in halves))
        if "abstention_precision" in measures:
            table.add_row("abstention_precision", f"{measures['abstention_precision']:.4f}", "", "")
        Console().print(table)
