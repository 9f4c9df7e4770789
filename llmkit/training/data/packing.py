"""Documents to packed rows of token ids.

A *slot* of a row holds an input token and the token to be predicted from it, so a document of n tokens fills n - 1
slots. Several documents share a row; `segments` keeps them apart in attention and `positions` begin again at 0:

    tokens     <s> Once upon a | <s> The cat sat   .
    labels     Once upon a </s>| The cat sat   . </s>      -100 where nothing is learned
    positions    0   1   2   3 |  0   1   2   3   4
    segments     0   0   0   0 |  1   1   1   1   1

What documents of a batch have in common at their beginnings, and do not learn there (a system prompt, the prompt of a pair of
answers), stands in it once, as a segment that others go on from:

    tokens     <s> You are a helpful assistant . | What is | 2 + 2 ? | pi ? | Hello !
    segments    3                                |  4      |  0      |  1   |  2            follows: {4: 3, 0: 4, 1: 4, 2: 3}
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from llmkit.errors import UsageError
from llmkit.training.data.sources import Corpus, Ints

SHORTEST = 4  # slots that documents have in common to be worth a segment
IGNORE = -100  # the label of a slot that is not learned, as everywhere in PyTorch


@dataclass(frozen=True)
class Batch:
    """Packed rows: int64 tensors `[rows, length]`, and the documents that lie in them. Each slot has a token."""

    tokens: Tensor
    labels: Tensor  # the token to predict at each slot; IGNORE: none
    positions: Tensor
    segments: Tensor  # numbered as the pieces of documents are, and behind those what several begin with
    documents: tuple[int, ...]
    follows: Mapping[int, int] = field(default_factory=dict)  # segments that go on from another one

    @property
    def target_count(self) -> int:
        return int((self.labels != IGNORE).sum())

    def to(self, device: torch.device) -> Batch:
        tokens, labels, positions, segments = (t.to(device) for t in (self.tokens, self.labels, self.positions, self.segments))
        return Batch(tokens, labels, positions, segments, self.documents, self.follows)


# Pieces of documents: int64 `[pieces, 3]` of document, first slot, number of slots.
def pieces_of(corpus: Corpus, documents: Iterable[int], max_length: int) -> Ints:
    """The documents as pieces of at most `max_length` slots: plain text goes on in a next piece, a chat is cut."""
    slots = corpus.offsets[1:] - corpus.offsets[:-1] - 1
    pieces = [
        (d, start, min(max_length, slots[d] - start))
        for d in documents
        for start in range(0, slots[d] if corpus.divisible[d] else min(slots[d], 1), max_length)
    ]
    return np.array(pieces, np.int64).reshape(-1, 3)


def pack(lengths: Ints, max_length: int) -> list[list[int]]:
    """Indices of pieces grouped into rows of at most `max_length` slots: best fit, longest first.

    Each piece goes into the row whose free space it fills best; pieces longer than a row are the caller's error.
    """
    rows: list[list[int]] = []
    by_space: list[list[int]] = [[] for _ in range(max_length + 1)]  # rows with that many free slots
    spaces: list[int] = []  # the sizes for which by_space is not empty, sorted
    for piece in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[piece])
        at = bisect_left(spaces, length)
        if at < len(spaces):
            space = spaces[at]
            row = by_space[space].pop()
            if not by_space[space]:
                spaces.pop(at)
        else:
            space, row = max_length, len(rows)
            rows.append([])
        rows[row].append(piece)
        left = space - length
        if left > 0:
            if not by_space[left]:
                insort(spaces, left)
            by_space[left].append(row)
    return rows


def rows_of(corpus: Corpus, documents: Iterable[int], max_length: int, group: int = 1) -> list[Ints]:
    """Documents packed into rows. group: so many documents that follow each other share a row, of `group * max_length` slots (pairs)."""
    pieces = pieces_of(corpus, documents, max_length)
    if group == 1:
        return [pieces[indices] for indices in pack(pieces[:, 2], max_length)]
    units = pieces.reshape(-1, group, 3)  # nothing that stands in a group is divisible
    return [units[indices].reshape(-1, 3) for indices in pack(units[:, :, 2].sum(1), group * max_length)]


def make_batch(corpus: Corpus, rows: Sequence[Ints]) -> Batch:
    """Rows of pieces (each `[pieces, 3]`) as tensors. Every piece is a segment of its own, numbered through the batch.

    Rows of different lengths, or with beginnings in common, become one row, one behind the other: no slot is unused.
    """
    pieces = np.concatenate(rows)
    parts, follows = _segments(corpus, pieces)
    lengths = [int(row[:, 2].sum()) for row in rows]
    total = sum(part.count for part in parts)
    shape = (1, total) if follows or len(set(lengths)) > 1 else (len(rows), lengths[0])
    tokens, labels, positions, segments = (np.empty(total, np.int64) for _ in range(4))
    at = 0
    for part in parts:
        document, start, _ = pieces[part.piece].tolist()
        first, count = int(corpus.offsets[document]) + start + part.start, part.count
        here = slice(at, at + count)
        targets = slice(first + 1, first + 1 + count)
        tokens[here] = corpus.tokens[first : first + count]
        labels[here] = np.where(corpus.learned[targets], corpus.tokens[targets], IGNORE)
        positions[here] = np.arange(part.start, part.start + count)
        segments[here] = part.number
        at += count
    documents = tuple(dict.fromkeys(pieces[:, 0].tolist()))
    made = [torch.from_numpy(array.reshape(shape)) for array in (tokens, labels, positions, segments)]
    return Batch(made[0], made[1], made[2], made[3], documents, follows)


@dataclass(frozen=True)
class Segment:
    """Slots `[start, start + count)` of a piece, which stand in a batch under a number."""

    number: int
    piece: int
    start: int
    count: int


def _segments(corpus: Corpus, pieces: Ints) -> tuple[list[Segment], dict[int, int]]:
    """The segments of a batch in order, and which ones go on from which: the pieces are the leaves of a tree of what they begin with."""
    begins: list[tuple[list[int], int]] = []  # what a piece could share, and its number
    for piece, (document, start, count) in enumerate(pieces.tolist()):
        first = int(corpus.offsets[document]) + start
        learned = corpus.learned[first + 1 : first + count]
        free = int(learned.argmax()) if learned.any() else count - 1  # a piece keeps a slot of its own
        begins.append(([] if start else corpus.tokens[first : first + free].tolist(), piece))
    begins.sort()
    common = [_common(left, right) for (left, _), (right, _) in pairwise(begins)]
    segments: list[Segment] = []
    follows: dict[int, int] = {}

    def add(number: int, piece: int, start: int, count: int, parent: int | None) -> None:
        segments.append(Segment(number, piece, start, count))
        if parent is not None:
            follows[number] = parent

    waiting: list[tuple[int, int, int, int | None]] = [(0, len(begins), 0, None)]  # a range of begins, slots they share, in which segment
    while waiting:
        low, high, shared, parent = waiting.pop()
        piece = begins[low][1]
        if high - low == 1:
            add(piece, piece, shared, int(pieces[piece, 2]) - shared, parent)
            continue
        here = min(common[low : high - 1])
        if here - shared >= SHORTEST:
            number = len(pieces) + len(segments)
            add(number, piece, shared, here - shared, parent)
            shared, parent = here, number
        bounds = [low, *(i + 1 for i in range(low, high - 1) if common[i] == here), high]
        waiting += [(*bound, shared, parent) for bound in reversed(list(pairwise(bounds)))]
    if not follows:
        segments.sort(key=lambda segment: segment.number)
    return segments, follows


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    """How many items two sequences have in common at their beginnings."""
    shorter = min(len(left), len(right))
    return next((i for i in range(shorter) if left[i] != right[i]), shorter)


class RowStream:
    """The training rows, epoch after epoch. Its whole state is (epoch, row): everything else follows from the seed."""

    def __init__(
        self, corpus: Corpus, weights: Sequence[float], max_length: int, seed: int, epochs: float | None = None, group: int = 1
    ) -> None:
        """weights: how often a document of each source is seen per epoch. epochs: where the stream ends, None: never.

        group: documents that stay together, as in `rows_of`.
        """
        self.corpus, self.max_length, self.seed, self.epochs, self.group = corpus, max_length, seed, epochs, group
        self.weights = np.asarray(weights, np.float64)[corpus.sources]
        if not (self.weights > 0).any():
            raise UsageError("every source of data has the weight 0. Raise one.")
        self.epoch, self.row = 0, 0
        self._rows = self._plan(0)

    def _plan(self, epoch: int) -> list[Ints]:
        """The rows of an epoch, in order."""
        for attempt in range(1000):  # a small corpus with fractional weights may draw an empty epoch
            random = np.random.default_rng([self.seed, epoch, attempt])
            weights = self.weights[:: self.group]
            times = np.floor(weights + random.random(len(weights))).astype(np.int64)
            if times.any():
                break
        firsts = random.permutation(np.repeat(np.arange(len(times)), times)) * self.group
        documents = (firsts[:, None] + np.arange(self.group)).flatten()
        rows = rows_of(self.corpus, documents.tolist(), self.max_length, self.group)
        return [rows[i] for i in random.permutation(len(rows))]

    @property
    def fingerprint(self) -> str:
        """A hash of everything that decides the rows."""
        digest = hashlib.blake2b(repr((self.max_length, self.seed)).encode(), digest_size=16)
        for array in (self.corpus.tokens, self.corpus.learned, self.corpus.offsets, self.weights):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    @property
    def progress(self) -> float:
        """Epochs done, with the share of the current one."""
        return self.epoch + self.row / len(self._rows)

    @property
    def rows_per_epoch(self) -> int:
        return len(self._rows)

    def seek(self, epoch: int, row: int) -> None:
        """Continue as if every row before (`epoch`, `row`) had been read."""
        if epoch != self.epoch:
            self._rows = self._plan(epoch)
        self.epoch, self.row = epoch, row

    def next_batch(self, size: int) -> Batch | None:
        """The next `size` rows (fewer at the very end), None when there are no more."""
        rows: list[Ints] = []
        while len(rows) < size:
            if self.row == len(self._rows):
                self.seek(self.epoch + 1, 0)
            if self.epochs is not None and self.progress >= self.epochs:
                break
            rows.append(self._rows[self.row])
            self.row += 1
        return make_batch(self.corpus, rows) if rows else None


def sequential_batches(corpus: Corpus, max_length: int, size: int, group: int = 1) -> Iterator[Batch]:
    """Every document once, packed, in a fixed order: for evaluation."""
    rows = rows_of(corpus, range(len(corpus)), max_length, group)
    for start in range(0, len(rows), size):
        yield make_batch(corpus, rows[start : start + size])
