"""Sentences of a text, as spans of its characters."""

from __future__ import annotations

import re
from collections.abc import Iterator

# An end: a mark, what closes a quotation or a footnote, then space; or a blank line, a list item, a table row, or a
# heading with its line.
_END = re.compile(
    r"""(?P<mark>[.!?…]+["'”’)\]*_`]*|[。！？])(?=\s|$|(?<=[。！？]))|\n(?=\s*\n|\s*[|>#]|\s*(?:[-*+]|\d+[.)])\s)|(?<=\|)\n|(?<=:)\n
|^\#{1,6}[ \t][^\n]*\n""",
    re.MULTILINE | re.VERBOSE,
)
_FENCE = re.compile(r"^[ \t]*(?:```+|~~~+)([^\n`]*)$", re.MULTILINE)
_ABBREVIATION = re.compile(
    r"(?:\b(?:[A-Za-z]|Mr|Mrs|Ms|Dr|Prof|St|Jr|Sr|Gen|Lt|Col|Capt|Sgt|Rev|vs|etc|cf|ca|approx|Fig|fig|No|no|Vol|vol|pp|al|Inc|Ltd|Co|Corp"
    r"|Jan|Feb|Mar|Apr|Jun|Jul|Aug|Sep|Sept|Oct|Nov|Dec|Mt|Ft|Gov|Sen|Rep|Pres|dept|est)|\b(?:[A-Za-z]\.)+[A-Za-z])\.$"
)
_MARKUP = " \t\n#>*+-|`"


def sentences(text: str, start: int = 0, end: int | None = None) -> list[tuple[int, int]]:
    """Spans `[start, end)` of the sentences within a span of a text, without the space and list marks around them.

    Each line of fenced code is one, and each row of a table.
    """
    spans: list[tuple[int, int]] = []
    for begin, stop, code in _regions(text, start, len(text) if end is None else end):
        spans += lines(text, begin, stop) if code else _prose(text, begin, stop)
    return spans


def lines(text: str, start: int = 0, end: int | None = None) -> list[tuple[int, int]]:
    """Spans `[start, end)` of the lines that are not blank, without the space around them."""
    return [match.span() for match in re.compile(r"[^\s](?:[^\n]*[^\s])?").finditer(text, start, len(text) if end is None else end)]


def in_code(text: str) -> list[tuple[int, int]]:
    """Where fenced code stands in a text; its fences may be those of a chunk, which can begin or end within the code."""
    return [(begin, stop) for begin, stop, code in _regions(text, 0, len(text)) if code]


def _regions(text: str, start: int, end: int) -> Iterator[tuple[int, int, bool]]:
    """Prose and code (True) in turn, without the lines of the fences."""
    code = False
    for number, fence in enumerate(_FENCE.finditer(text, start, end)):
        if number == 0 and text[start : fence.start()].strip() and not fence[1].strip():
            following = text[fence.end() : end].split("\n", 2)
            code = len(following) < 2 or not following[1].strip()  # what no code begins with: the code began before this span
        yield start, fence.start(), code
        start, code = fence.end(), not code
    yield start, end, code


def _prose(text: str, start: int, end: int) -> list[tuple[int, int]]:
    spans: list[tuple[int, int]] = []
    begin = start
    for match in _END.finditer(text, start, end):
        if match["mark"] and not _ends(text, begin, match):
            continue
        _append(spans, text, begin, match.end())
        begin = match.end()
    _append(spans, text, begin, end)
    return spans


def _ends(text: str, begin: int, match: re.Match[str]) -> bool:
    """Whether a mark ends a sentence: not after an abbreviation or an initial, unless what follows can only be a new one."""
    if match["mark"] != ".":
        return True
    following = text[match.end() : match.end() + 40].lstrip()
    if following and following[0].islower():
        return False
    return _ABBREVIATION.search(text[max(begin, match.end() - 16) : match.end()]) is None


def _append(spans: list[tuple[int, int]], text: str, start: int, end: int) -> None:
    row = False
    while start < end and text[start] in _MARKUP:
        row |= text[start] == "|"
        if text[start] == "*" and text[start : start + 2] == "**":
            break
        if text[start] in "-+" and start + 1 < end and not text[start + 1].isspace():  # a minus, a flag
            break
        if text[start] == "`":
            break
        start += 1
    while end > start and (text[end - 1].isspace() or (row and text[end - 1] == "|")):
        end -= 1
    if end > start:
        spans.append((start, end))
