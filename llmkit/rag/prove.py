"""The quote that supports a sentence, found among passages and checked against the file it stands in."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llmkit.rag import fence
from llmkit.rag.embed import Embedder
from llmkit.rag.evidence import Facts, compare
from llmkit.rag.index import Index
from llmkit.rag.read import Unreadable, decode
from llmkit.rag.retrieve import Hit
from llmkit.rag.terms import clean, term_list

WINDOW = 3  # sentences of a quote at most
TRIED = 8  # quotes that are looked at for a sentence, the likeliest first


@dataclass(frozen=True)
class Citation:
    """A quote that stands in `file` at the characters `[start, end)` (of the extracted text for HTML, PDF and docx)."""

    file: str
    line: int
    start: int
    end: int
    quote: str
    score: float


@dataclass(frozen=True)
class _Window:
    """One to three neighbouring sentences of a passage: what a citation may quote."""

    hit: Hit
    start: int
    end: int
    text: str
    facts: Facts


class Prover:
    """Finds the quote that supports a sentence, and checks that it stands in its file."""

    def __init__(self, index: Index, hits: Sequence[Hit], embedder: Embedder | None) -> None:
        self.index, self.hits, self.embedder = index, hits, embedder
        self.stale: list[str] = []
        self._windows: list[_Window] | None = None
        self._texts: dict[str, str | None] = {}

    def prove(self, sentence: str) -> Citation | None:
        """The shortest quote that supports a sentence best; None if none does."""
        claim = Facts.of(sentence)
        judged = sorted(
            ((compare(claim, window.facts, about=self._about(window.hit)), window) for window in self._all_windows()),
            key=lambda pair: (bool(pair[0].problems), -pair[0].score, pair[1].end - pair[1].start),
        )
        for support, window in judged[:TRIED]:
            if support.supported and (citation := self.checked(window.hit, window.start, window.end, support.score)) is not None:
                return citation
        open_ones = [window for support, window in judged[:TRIED] if not support.supported and not support.problems]
        if self.embedder is None or not open_ones:
            return None
        vectors = self.embedder.documents([sentence, *(window.text for window in open_ones)])
        for cosine, window in sorted(zip(vectors[1:] @ vectors[0], open_ones, strict=True), key=lambda pair: -pair[0]):
            support = compare(claim, window.facts, similarity=float(cosine), about=self._about(window.hit))
            if support.supported and (citation := self.checked(window.hit, window.start, window.end, support.score)) is not None:
                return citation
        return None

    def checked(self, hit: Hit, start: int, end: int, score: float) -> Citation | None:
        """A citation of characters `[start, end)` of the hit's document, if its text is still there; found again if it has moved."""
        offset = start - hit.row.start
        whole = hit.row.text if hit.row.start <= start and end <= hit.row.end else hit.text
        quote = whole[offset : offset + end - start] if whole is hit.row.text else hit.text[start - hit.start : end - hit.start]
        source = self._source(hit)
        if source is None or source[start:end] != quote:
            moved = None if source is None else locate(quote, source)
            if moved is None or source is None:
                if hit.row.file not in self.stale:
                    self.stale.append(hit.row.file)
                return None
            start, end = moved
            quote = source[start:end]
        return Citation(hit.row.file, source.count("\n", 0, start) + 1, start, end, quote, round(score, 4))

    def _about(self, hit: Hit) -> frozenset[str]:
        return frozenset(term_list(f"{hit.row.heading} {Path(hit.row.file).stem}"))

    def _all_windows(self) -> list[_Window]:
        if self._windows is None:
            self._windows = []
            for hit in self.hits:
                parts = fence.trusted_sentences(hit.text, hit.row.kind)
                for first in range(len(parts)):
                    for last in range(first, min(first + WINDOW, len(parts))):
                        start, end = parts[first][0], parts[last][1]
                        if last > first and re.search(r"\w", hit.text[parts[last - 1][1] : parts[last][0]]):
                            break  # something that may not be quoted stands between
                        text = clean(hit.text[start:end])
                        self._windows.append(_Window(hit, hit.start + start, hit.start + end, text, Facts.of(text)))
        return self._windows

    def _source(self, hit: Hit) -> str | None:
        """The text that offsets count in: kept in the index where it was extracted, else the file as it is now."""
        file = hit.row.file
        if file not in self._texts:
            text = self.index.source(file)
            if text is None:
                try:
                    text = decode(Path(file).read_bytes())[0]
                except (OSError, Unreadable):
                    text = None
            self._texts[file] = text
        return self._texts[file]


def locate(quote: str, text: str) -> tuple[int, int] | None:
    """Where a quote stands in a text, however its white space is laid out; None if nowhere or at several places."""
    pattern = r"\s+".join(re.escape(word) for word in quote.split())
    places = [match.span() for _, match in zip(range(2), re.finditer(pattern, text), strict=False)] if pattern else []
    return places[0] if len(places) == 1 else None
