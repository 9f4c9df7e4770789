"""What the terminal does for streamed text: Markdown that grows, and a Ctrl-C that stops the reply and nothing else."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from llmkit.errors import UsageError
from llmkit.llm.outputs import Chunk, Completion

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.segment import Segment

    from llmkit.llm.outputs import Stream


def state_dir() -> Path:
    """Where history lives: $XDG_STATE_HOME, %LOCALAPPDATA% on Windows, else ~/.local/state."""
    base = os.environ.get("XDG_STATE_HOME") or (os.environ.get("LOCALAPPDATA") if sys.platform == "win32" else None)
    folder = (Path(base) if base else Path.home() / ".local" / "state") / "llmkit"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def read_input(name: str) -> str:
    """The text of a file, or of standard input for `-`, without the newline at its very end."""
    data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    try:
        return data.decode("utf-8").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        where = "standard input" if name == "-" else name
        raise UsageError(f"{where} is not UTF-8 text (byte {error.start}). Convert it first, for example with iconv.") from error


def finish(stream: Stream, show: Callable[[Chunk], None] = lambda _: None) -> Completion:
    """Read a stream to its end, or to Ctrl-C, which stops the reply and keeps what was said."""
    with stream:
        try:
            for chunk in stream:
                show(chunk)
        except KeyboardInterrupt:
            stream.close()
    return stream.completion


def write_stream(stream: Stream) -> Completion:
    """Print a reply as it is said, as it is, and a newline at its end."""

    def show(chunk: Chunk) -> None:
        sys.stdout.write(chunk.text)
        sys.stdout.flush()

    completion = finish(stream, show)
    if not completion.text.endswith("\n"):
        sys.stdout.write("\n")
    sys.stdout.flush()
    return completion


class Tail:
    """The last lines of something taller than the terminal: where the text grows."""

    def __init__(self, content: RenderableType) -> None:
        self._content = content

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        from rich.segment import Segment

        for line in console.render_lines(self._content, options.update(height=None), pad=False)[1 - console.height :]:
            yield from line
            yield Segment.line()


def write_markdown(stream: Stream, console: Console) -> Completion:
    """Print a reply as Markdown as it is said.

    Paragraphs that are finished are printed for good; only the one being written is drawn again, so a long reply scrolls
    like any other text and is still there to scroll back to.
    """
    from rich.live import Live
    from rich.markdown import Markdown

    open_text = ""
    with Live(console=console, transient=True, refresh_per_second=12) as live:

        def show(chunk: Chunk) -> None:
            nonlocal open_text
            done, open_text = split_finished(open_text + chunk.text)
            if done.strip():
                live.console.print(Markdown(done), "")
            live.update(Tail(Markdown(open_text)))

        completion = finish(stream, show)
        live.update("")
    if open_text.strip():
        console.print(Markdown(open_text))
    return completion


def split_finished(text: str) -> tuple[str, str]:
    """Cut Markdown at its last blank line outside a code fence or a list: (what can be drawn for good, what may still change)."""
    fence, cut, position = "", 0, 0
    for line in text.splitlines(keepends=True):
        stripped = line.strip()
        position += len(line)
        if fence:
            if stripped.startswith(fence):
                fence = ""
        elif stripped.startswith(("```", "~~~")):
            fence = stripped[:3]
        elif not stripped and line.endswith("\n"):
            rest = text[position:].lstrip("\n")
            # An item or an indented line after the blank one may belong to the list before it, whose numbers go on.
            if rest and not rest.startswith((" ", "\t", "-", "*", "+")) and not rest[0].isdigit():
                cut = position
    return text[:cut], text[cut:]
