"""Documents to chunks that follow their structure: headings, paragraphs, tables with their header, code, rows.

A chunk is a span of its document, `document.text[start:end]`, so a quote out of it has offsets in the file. What it needs to
be understood alone (the path of headings, the header of its table) is kept beside it.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from llmkit.rag.read import Document, encodable
from llmkit.rag.sentences import sentences
from llmkit.rag.terms import FILLER

CHUNK_TOKENS = 220  # with a heading path it stays within the 256 tokens of MiniLM
MIN_SHARE = 4  # a chunk of at least a quarter of the size ends where a section ends; a smaller one takes the next section too

Count = Callable[[str], int]  # the number of tokens of a text


@dataclass(frozen=True)
class Chunk:
    """A span of a document.

    Attributes:
        start, end: characters `[start, end)` of the document's text.
        line: 1-based line of `start`; page: 1-based page of a PDF, else 0.
        heading: the headings above it, "A > B"; for a JSONL row its title.
        context: the header of the table it continues, else empty.
        plain: `text[start:end]` as it is to be read, character for character (JSON's escapes are spaced out).
        key: what relevance judgements name: a JSONL row's `_id` or `id`, else the file.
        fields: "name=value" of a JSONL row, for filters.
    """

    start: int
    end: int
    line: int
    page: int
    heading: str
    context: str
    plain: str
    key: str
    fields: tuple[str, ...] = ()


@dataclass(frozen=True)
class Block:
    """A piece of a document that is better not cut: a paragraph, a table row, a definition."""

    start: int
    end: int
    heading: str = ""
    context: str = ""
    key: str = ""
    fields: tuple[str, ...] = ()
    alone: bool = False  # shares no chunk with blocks of another key


def chunk(document: Document, count: Count, size: int = CHUNK_TOKENS) -> list[Chunk]:
    """The chunks of a document, each of at most `size` tokens (the heading path and a table's header not counted)."""
    plain = spaced_json(document.text) if document.kind == "jsonl" else document.text
    lines = [match.start() + 1 for match in re.finditer("\n", plain)]
    chunks: list[Chunk] = []
    unmarked = re.sub("^\ufeff", "\n", document.text)  # a byte order mark is no part of the first heading or row
    for block in _pack(plain, _BLOCKS.get(document.kind, _paragraphs)(unmarked), count, size, document.pages):
        chunks.append(
            Chunk(
                start=block.start,
                end=block.end,
                line=bisect_right(lines, block.start) + 1,
                page=bisect_right(document.pages, block.start) if document.pages else 0,
                heading=block.heading,
                context=block.context,
                plain=plain[block.start : block.end],
                key=block.key or document.path,
                fields=block.fields,
            )
        )
    return chunks


def _pack(text: str, blocks: Iterator[Block], count: Count, size: int, pages: Sequence[int] = ()) -> Iterator[Block]:
    """Neighbouring blocks joined up to `size` tokens, longer ones cut. A chunk stands on one page, which is where its quotes are."""
    held: Block | None = None
    tokens = 0
    for block in (part for whole in blocks for part in _cut(text, whole, count, size)):
        more = count(text[block.start : block.end])
        if held is not None:
            new_section = block.heading != held.heading and tokens * MIN_SHARE >= size
            new_page = bisect_right(pages, block.start) != bisect_right(pages, held.start)
            apart = block.key != held.key or block.context != held.context or new_page
            if tokens + more > size or new_section or apart:
                yield held
                held = None
        if held is None:
            held, tokens = block, more
        else:
            held, tokens = replace(held, end=block.end, heading=held.heading or block.heading), tokens + more
    if held is not None:
        yield held


def _cut(text: str, block: Block, count: Count, size: int) -> Iterator[Block]:
    """The block, or if it has more than `size` tokens its lines or sentences, or in the end pieces of them."""
    if block.end - block.start <= size or count(text[block.start : block.end]) <= size:  # a token is at least a character
        yield block
        return
    for start, end in _pieces(text, block.start, block.end):
        if end - start == block.end - block.start:  # one sentence: halve it, at a space if there is one
            middle = (start + end) // 2
            space = text.find(" ", middle, end - 1)
            middle = space + 1 if 0 <= space < middle + 200 else middle
            yield from _cut(text, replace(block, end=middle), count, size)
            yield from _cut(text, replace(block, start=middle), count, size)
        else:
            yield from _cut(text, replace(block, start=start, end=end), count, size)


def _pieces(text: str, start: int, end: int) -> list[tuple[int, int]]:
    lines = [(start + match.start(), start + match.end()) for match in re.finditer(r"[^\n]*\S[^\n]*", text[start:end])]
    if len(lines) > 1:
        return lines
    return sentences(text, start, end) or [(start, end)]


# --- blocks of each kind ----------------------------------------------------------------------------------------------

_HEADING = re.compile(r"(#{1,6})[ \t]+(.+?)[ \t#]*$")
_FENCE = re.compile(r"[ \t]*(```+|~~~+)")
_RULE = re.compile(r"[ \t]*\|?[ \t:|-]*-[ \t:|-]*\|[ \t:|-]*$")


def _lines(text: str) -> Iterator[tuple[int, int]]:
    start = 0
    while start < len(text):
        end = text.find("\n", start)
        end = len(text) if end < 0 else end
        yield start, end
        start = end + 1


def _markdown(text: str) -> Iterator[Block]:
    """Paragraphs, lists, fenced code and table rows under their headings."""
    path: list[tuple[int, str]] = []
    begin: int | None = None
    last = 0
    fence = ""
    table: list[tuple[int, int]] = []

    def heading() -> str:
        return " > ".join(title for _, title in path)

    def flush() -> Iterator[Block]:
        nonlocal begin
        if begin is not None:
            yield Block(begin, last, heading())
        begin = None
        if table:
            yield from _table_rows(text, table, heading())
            table.clear()

    for start, end in _lines(text):
        line = text[start:end]
        marker = _FENCE.match(line)
        if fence:
            last = end
            if marker and marker[1].startswith(fence):
                fence = ""
                yield from flush()
            continue
        found = _HEADING.match(line)
        if marker:
            if begin is None or table:
                yield from flush()
                begin = start
            fence, last = marker[1], end
        elif found:
            yield from flush()
            level = len(found[1])
            path[:] = [(depth, title) for depth, title in path if depth < level] + [(level, found[2].strip())]
            begin, last = start, end
        elif line.lstrip().startswith("|"):
            if begin is not None:
                yield from flush()
            table.append((start, end))
        elif not line.strip():
            # A heading, or a paragraph that announces what follows, stays with it.
            if table or (begin is not None and not _HEADING.match(text[begin:last]) and not text[begin:last].rstrip().endswith(":")):
                yield from flush()
        else:
            if table:
                yield from flush()
            begin, last = (start if begin is None else begin), end
    yield from flush()


def _table_rows(text: str, rows: list[tuple[int, int]], heading: str) -> Iterator[Block]:
    """The header with the first rows, then the other rows, which carry the header beside them."""
    header = len(rows) > 1 and _RULE.match(text[slice(*rows[1])]) is not None
    skip = 2 if header else 0
    context = text[rows[0][0] : rows[1][1]] if header else ""
    if len(rows) <= skip + 8:  # small: one block
        yield Block(rows[0][0], rows[-1][1], heading)
        return
    for start in range(skip, len(rows), 4):
        part = rows[start : start + 4]
        yield Block(rows[0][0] if start == skip and skip else part[0][0], part[-1][1], heading, "" if start == skip else context)


def _paragraphs(text: str) -> Iterator[Block]:
    for match in re.finditer(r"[^\n]*\S[^\n]*(?:\n[^\n]*\S[^\n]*)*", text):
        yield Block(match.start(), match.end())


_DEFINITION = re.compile(
    r"(?:@|(?:export|public|private|protected|static|async|pub|abstract|final|default)\s+)*"
    r"(?:def|class|function|fn|func|struct|enum|interface|trait|impl|module|namespace|type|CREATE|create)\b\s*([\w.:<>]*)"
)


def _code(text: str) -> Iterator[Block]:
    """Top-level definitions, and what stands between them, parted at blank lines before an unindented line."""
    begin, last, blank, name = None, 0, False, ""
    for start, end in _lines(text):
        line = text[start:end]
        if not line.strip():
            blank = True
            continue
        if begin is not None and blank and not line[0].isspace() and line[0] not in ")]}":
            yield Block(begin, last, name)
            begin = None
        if begin is None:
            begin, name = start, ""
        if not name and (found := _DEFINITION.match(line)):
            name = found[0].strip(" \t:<")
        last, blank = end, False
    if begin is not None:
        yield Block(begin, last, name)


def _csv(text: str) -> Iterator[Block]:
    """Rows (a quoted cell may hold newlines), each with the header line beside it."""
    rows, begin, quotes = [], None, 0
    for start, end in _lines(text):
        begin = start if begin is None else begin
        quotes += text.count('"', start, end)
        if quotes % 2 == 0:
            rows.append((begin, end))
            begin = None
    if begin is not None:
        rows.append((begin, len(text)))
    rows = [(start, end) for start, end in rows if text[start:end].strip()]
    header = text[slice(*rows[0])] if rows else ""
    for number, (start, end) in enumerate(rows[1:] or rows):
        yield Block(rows[0][0], end) if number == 0 else Block(start, end, context=header)


_STRING = re.compile(r'"((?:[^"\\\n]|\\.)*)"(\s*:)?')
_ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|(.))")
_TEXT_KEYS = ("text", "content", "contents", "body", "passage", "abstract", "answer", "completion", "output")
_TITLE_KEYS = ("title", "heading", "chunk_heading", "name", "question", "prompt", "instruction")
_ID_KEYS = ("_id", "id", "doc_id", "docid", "chunk_link", "url")


def _jsonl(text: str) -> Iterator[Block]:
    """The text of each row, without its other members; a row that has none of the usual names is one block."""
    for start, end in _lines(text):
        if not text[start:end].strip():
            continue
        try:
            row = json.loads(text[start:end])
        except (ValueError, RecursionError):
            yield Block(start, end)
            continue
        if not isinstance(row, dict):
            yield Block(start, end)
            continue
        title = encodable(next((str(row[name]) for name in _TITLE_KEYS if row.get(name)), ""))
        key = encodable(next((str(row[name]) for name in _ID_KEYS if row.get(name) is not None), ""))
        name = next((name for name in _TEXT_KEYS if isinstance(row.get(name), str) and row[name].strip()), None)
        fields = tuple(
            encodable(f"{name}={value}") for name, value in row.items() if isinstance(value, str | int | float) and len(str(value)) <= 200
        )
        span = None if name is None else _value_span(text, start, end, name)
        yield Block(*(span or (start, end)), heading=title, key=key, fields=fields)


def _value_span(text: str, start: int, end: int, name: str) -> tuple[int, int] | None:
    """Where a member's string stands in a row, without its quotation marks."""
    wanted = False
    for match in _STRING.finditer(text, start, end):
        if match[2]:
            wanted = match[1] == name
        elif wanted:
            return match.start(1), match.end(1)
    return None


def spaced_json(text: str) -> str:
    r"""JSON as text of the same length: escapes become the character they mean, filled up (`\n` is a space and a newline)."""

    def plain(match: re.Match[str]) -> str:
        if match[1]:
            code = int(match[1], 16)
            return " " * 6 if 0xD800 <= code < 0xE000 or code < 32 else chr(code) + FILLER * 5
        return {"n": " \n", "t": "  ", "r": "  ", "b": "  ", "f": "  "}.get(match[2], FILLER + match[2])

    return _ESCAPE.sub(plain, text)


_BLOCKS: dict[str, Callable[[str], Iterator[Block]]] = {
    "markdown": _markdown,
    "html": _markdown,
    "docx": _markdown,
    "code": _code,
    "csv": _csv,
    "jsonl": _jsonl,
}
