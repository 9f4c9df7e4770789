"""Documents to token ids: the corpus a run learns from, and the account of what became of every row. No torch."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from llmkit.errors import UsageError
from llmkit.text.tokenizer import Tokenizer
from llmkit.text.turns import Example
from llmkit.training.data.documents import is_held_out, read_documents
from llmkit.training.data.formats import Document
from llmkit.training.data.tokenize import Draft, draft_document, encode_texts
from llmkit.training.recipe import Source

Ints = NDArray[np.int64]
_CHUNK = 512  # documents that are encoded together
_CHUNK_TEXT = 1 << 19  # characters of texts after which there are enough of them: some seconds of a slow machine


@dataclass(frozen=True)
class Corpus:
    """Encoded documents, end to end in flat arrays. With pairs: the chosen answer at an even index, the rejected one after it."""

    tokens: NDArray[np.int32]  # [all tokens]
    learned: NDArray[np.bool_]  # [all tokens]: is it a target?
    offsets: Ints  # [documents + 1]
    sources: Ints  # [documents]: index of the source
    divisible: NDArray[np.bool_]  # [documents]: plain text, which may go on in another row
    target_bytes: Ints  # [documents]: UTF-8 bytes of the learned text
    places: list[str]  # [documents]: file and line

    def __len__(self) -> int:
        return len(self.places)

    @property
    def target_count(self) -> int:
        """Tokens that are learned in one pass over every document."""
        first = np.zeros(len(self.tokens), bool)
        first[self.offsets[:-1]] = True  # nothing comes before a document's first token to predict it from
        return int((self.learned & ~first).sum())

    def select(self, documents: Ints) -> Corpus:
        """The corpus of some of the documents."""
        spans = [slice(self.offsets[d], self.offsets[d + 1]) for d in documents]
        lengths = (self.offsets[1:] - self.offsets[:-1])[documents]
        return Corpus(
            np.concatenate([self.tokens[s] for s in spans]) if spans else self.tokens[:0],
            np.concatenate([self.learned[s] for s in spans]) if spans else self.learned[:0],
            np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            self.sources[documents],
            self.divisible[documents],
            self.target_bytes[documents],
            [self.places[d] for d in documents],
        )


@dataclass
class SourceReport:
    """What became of the rows of one source."""

    path: str
    rows: int = 0  # read
    documents: int = 0  # to learn from; a row may give several
    held_out: int = 0
    tokens: int = 0  # of the documents to learn from, and so the rest
    targets: int = 0
    ended: int = 0  # documents whose last target is an end token
    continued: int = 0  # texts that go on in further rows
    cut: int = 0  # chats and prompts that end at max_length
    cut_away: int = 0  # rows dropped because their targets begin after max_length
    overlong: int = 0  # rows dropped by overlong: drop
    no_target: int = 0  # rows dropped because nothing in them is learned
    equal: int = 0  # pairs dropped because both answers are the same
    bad: int = 0  # rows dropped by bad_rows: drop
    first_bad: str = ""
    split: int = 0  # conversations that gave one document per turn
    written: int = 0  # texts in which special tokens stand that are read as plain text
    duplicates: int = 0  # documents that were there before
    seen_in_training: int = 0  # held-out documents that stand in the training data, too

    def notes(self, max_length: int | None) -> list[str]:
        """What a person should know about, most of all what was left out."""
        told = [
            (self.no_target, "rows have nothing to learn (no answer) and are dropped"),
            (self.equal, "pairs have two equal answers and are dropped"),
            (self.bad, f"bad rows are dropped; the first: {self.first_bad}"),
            (self.cut_away, f"rows have their whole answer past max_length={max_length} and are dropped"),
            (self.overlong, f"rows are longer than max_length={max_length} and are dropped"),
            (self.cut, f"documents are cut at max_length={max_length}"),
            (self.continued, f"texts are longer than max_length={max_length} and go on in further rows"),
            (self.split, "chats become one document per turn, because the chat template shows earlier turns differently"),
            (self.written, "texts hold special tokens, as <|im_end|>, that are learned as plain text; special_tokens: true parses them"),
            (not self.ended and self.documents, "documents, none of which ends with a learned end token"),
            (self.duplicates, "documents are duplicates"),
            (self.seen_in_training, "held-out documents stand in the training data, too"),
        ]
        return [f"{self.path}: {count:,} {what}" for count, what in told if count]


@dataclass
class DataReport:
    """What became of every row, source by source."""

    sources: list[SourceReport] = field(default_factory=list)
    max_length: int | None = None

    def lines(self) -> list[str]:
        """Notes for people, one a line; none where there is nothing to tell."""
        return [line for source in self.sources for line in source.notes(self.max_length)]


@dataclass(frozen=True)
class _Row:
    """An encoded document."""

    ids: NDArray[np.int32]
    learned: NDArray[np.bool_]
    source: int
    divisible: bool
    target_bytes: int
    place: str


def load_corpora(
    sources: Sequence[Source],
    tokenizer: Tokenizer,
    held_out: float,
    max_length: int | None = None,
    preference: bool = False,
) -> tuple[Corpus, Corpus, DataReport]:
    """The training and the held-out documents of all sources, and what became of every row.

    max_length: slots of a row; what is longer is treated as the source's `overlong` says. preference: pairs, each as two
    documents one after the other, the chosen answer first; both begin with the same ids.

    Raises:
        UsageError: a source cannot be read, a row is no document, or nothing is left to learn from.
    """
    report = DataReport(max_length=max_length)
    sides: tuple[list[_Row], list[_Row]] = ([], [])
    seen: set[int] = set()
    special = _special_pattern(tokenizer)
    with _progress() as advance:
        for index, source in enumerate(sources):
            written = None if source.special_tokens else special
            loading = _Loading(index, source, tokenizer, max_length, preference, SourceReport(source.path), written)
            report.sources.append(loading.report)
            read = 0
            documents = loading.documents()
            for chunk in _chunks(documents):
                read += len(chunk)
                advance(len(chunk))
                for document, rows in loading.encode(chunk):
                    side = is_held_out(document, source, held_out)
                    sides[side].extend(rows)
                    loading.count(rows, side, seen)
            if not read:
                bad = f" (all {loading.report.bad:,} rows are bad; the first: {loading.report.first_bad})" if loading.report.bad else ""
                raise UsageError(f"{source.path} in data holds no document{bad}. Check the file, or take it out of data.")
    held_hashes = [(row.source, hash(row.ids.tobytes())) for row in sides[1]]
    for index, digest in held_hashes:
        report.sources[index].seen_in_training += digest in seen
    if not sides[0]:
        notes = "".join(f" {line}." for line in report.lines())
        raise UsageError(f"data holds no document to learn from (all are empty or held out).{notes} Check data and held_out.")
    return _corpus(sides[0]), _corpus(sides[1]), report


def _special_pattern(tokenizer: Tokenizer) -> re.Pattern[str] | None:
    tokens = [token for token in map(tokenizer.token, tokenizer.special_ids) if len(token) > 2]
    if not tokens:
        return None
    first = re.escape("".join({token[0] for token in tokens}))
    return re.compile(f"(?=[{first}])(?:{'|'.join(map(re.escape, tokens))})")


def _chunks(documents: Iterable[Document]) -> Iterator[list[Document]]:
    chunk: list[Document] = []
    size = 0
    for document in documents:
        chunk.append(document)
        size += len(document.text or "")
        if len(chunk) == _CHUNK or size >= _CHUNK_TEXT:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


@contextmanager
def _progress() -> Iterator[Callable[[int], object]]:
    """A bar on a terminal for what takes longer than two seconds."""
    from tqdm import tqdm

    with tqdm(desc="reading data", unit=" rows", delay=2, leave=False, disable=not sys.stderr.isatty()) as bar:
        yield bar.update


@dataclass(frozen=True)
class _Loading:
    """One source on its way into the corpus."""

    index: int
    source: Source
    tokenizer: Tokenizer
    max_length: int | None
    preference: bool
    report: SourceReport
    written: re.Pattern[str] | None  # finds special tokens in text that is not parsed for them

    def documents(self) -> Iterator[Document]:
        dropped: list[UsageError] = []
        for document in read_documents(self.source, self.preference, dropped):
            self._drop(dropped)
            self.report.rows += 1
            yield document
        self._drop(dropped)

    def _drop(self, errors: list[UsageError]) -> None:
        self.report.bad += len(errors)
        self.report.rows += len(errors)
        self.report.first_bad = self.report.first_bad or (str(errors[0]) if errors else "")
        errors.clear()

    def encode(self, documents: Iterable[Document]) -> Iterator[tuple[Document, list[_Row]]]:
        """The rows of each document; with pairs those of both answers. Texts of one kind are encoded together."""
        drafts: list[tuple[Document, list[tuple[Document, Draft]]]] = []
        for document in documents:
            try:
                drafts.append((document, [(part, draft_document(part, self.tokenizer, self.source)) for part in self._parts(document)]))
            except UsageError as error:
                if self.source.bad_rows == "error":
                    raise
                self.report.bad += 1
                self.report.first_bad = self.report.first_bad or str(error)
        flat = [draft for _, parts in drafts for _, draft in parts]
        if self.written is not None:
            self.report.written += sum(draft.kind != "chat" and any(map(self.written.search, draft.texts)) for draft in flat)
        encoded = {
            kind: iter(
                encode_texts(
                    self.tokenizer, kind, [t for draft in flat if draft.kind == kind for t in draft.texts], self.source.special_tokens
                )
            )
            for kind in ("text", "plain", "chat")
        }
        for document, parts in drafts:
            pieces = [(part, draft.finish([next(encoded[draft.kind]) for _ in draft.texts])) for part, draft in parts]
            if pieces:
                yield document, self._pair(pieces) if self.preference else self._rows(*pieces[0])

    def _parts(self, document: Document) -> list[Document]:
        """The documents that are encoded: the row itself, or both answers; none where there is nothing to learn."""
        if self.preference:
            chosen, rejected = document.pair()
            if chosen == rejected:
                self.report.equal += 1
                return []
        elif document.rejected is not None and self.source.learn != "chosen":
            raise UsageError(
                f"{document.place} has a chosen and a rejected answer. "
                "Compare them with loss: dpo, or learn the chosen one with learn: chosen."
            )
        else:
            chosen = document
        if not document.target.strip():
            self.report.no_target += 1
            return []
        return [chosen, rejected] if self.preference else [chosen]

    def _rows(self, document: Document, examples: list[Example]) -> list[_Row]:
        """The examples of a document that have something to learn within max_length."""
        rows = []
        limit = None if self.max_length is None else self.max_length + 1  # a row's slots hold one id less
        for number, (ids, learned) in enumerate(examples, 1):
            divisible, size = document.text is not None, len(document.target.encode())
            place = document.place if len(examples) == 1 else f"{document.place} (turn {number})"
            if limit is not None and len(ids) > limit:
                if self.source.overlong == "error":
                    raise UsageError(
                        f"{place} has {len(ids):,} tokens, more than max_length={self.max_length}. Raise max_length, or set overlong: cut."
                    )
                if self.source.overlong == "drop":
                    self.report.overlong += 1
                    continue
                self.report.continued += divisible
                if not divisible:
                    ids, learned = ids[:limit], learned[:limit]
                    if not any(learned[1:]):
                        self.report.cut_away += 1
                        continue
                    self.report.cut += 1
            if not any(learned[1:]):
                self.report.no_target += 1
                continue
            if len(examples) > 1 or (limit == len(ids) and not divisible):  # the target is a part of the document's
                size = len(self.tokenizer.decode([i for i, target in zip(ids, learned, strict=True) if target]).encode())
            rows.append(_Row(np.array(ids, np.int32), np.array(learned, np.bool_), self.index, divisible, size, place))
        if not examples:
            self.report.no_target += 1
        self.report.split += len(examples) > 1
        return rows

    def _pair(self, pieces: list[tuple[Document, list[Example]]]) -> list[_Row]:
        """The chosen and the rejected row; none where one of them has nothing to learn."""
        (chosen, good), (rejected, bad) = pieces
        if len(good) > 1 or len(bad) > 1:
            raise UsageError(
                f"{chosen.place} has an answer of several turns, which the chat template does not show as they were said. "
                "Give pairs whose answers are one turn."
            )
        rows = [*self._rows(chosen, good), *self._rows(rejected, bad)]
        return rows if len(rows) == 2 else []

    def count(self, rows: list[_Row], held: bool, seen: set[int]) -> None:
        if held:
            self.report.held_out += len(rows)
            return
        for row in rows:
            digest = hash(row.ids.tobytes())
            self.report.duplicates += digest in seen
            seen.add(digest)
            self.report.documents += 1
            self.report.tokens += len(row.ids)
            self.report.targets += int(row.learned[1:].sum())
            last = int(row.ids[row.learned.nonzero()[0][-1]])
            self.report.ended += last in self.tokenizer.eos_ids or last in self.tokenizer.special_ids


def _corpus(rows: list[_Row]) -> Corpus:
    return Corpus(
        np.concatenate([np.empty(0, np.int32), *(row.ids for row in rows)]),
        np.concatenate([np.empty(0, np.bool_), *(row.learned for row in rows)]),
        np.cumsum([0, *(len(row.ids) for row in rows)], dtype=np.int64),
        np.array([row.source for row in rows], np.int64),
        np.array([row.divisible for row in rows], np.bool_),
        np.array([row.target_bytes for row in rows], np.int64),
        [row.place for row in rows],
    )
