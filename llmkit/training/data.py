"""Documents to packed rows of token ids.

A *slot* of a row holds an input token and the token to be predicted from it, so a document of n tokens fills n - 1
slots. Several documents share a row; `segments` keeps them apart in attention and `positions` begin again at 0:

    tokens     <s> Once upon a | <s> The cat sat   .
    labels     Once upon a </s>| The cat sat   . </s>      -100 where nothing is learned
    positions    0   1   2   3 |  0   1   2   3   4
    segments     0   0   0   0 |  1   1   1   1   1
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from llmkit.errors import UsageError
from llmkit.training.corpus import Corpus, Ints

IGNORE = -100  # the label of a slot that is not learned, as everywhere in PyTorch


@dataclass(frozen=True)
class Batch:
    """Packed rows: int64 tensors `[rows, length]`, and the documents that lie in them. Each slot has a token."""

    tokens: Tensor
    labels: Tensor  # the token to predict at each slot; IGNORE: none
    positions: Tensor
    segments: Tensor
    documents: tuple[int, ...]

    @property
    def target_count(self) -> int:
        return int((self.labels != IGNORE).sum())

    def to(self, device: torch.device) -> Batch:
        tokens, labels, positions, segments = (t.to(device) for t in (self.tokens, self.labels, self.positions, self.segments))
        return Batch(tokens, labels, positions, segments, self.documents)


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
    """Rows of pieces (each `[pieces, 3]`) as tensors. Rows of different lengths become one row, one behind the other: no slot is unused.

    Every piece is a segment of its own, numbered through the batch.
    """
    lengths = [int(row[:, 2].sum()) for row in rows]
    shape = (len(rows), lengths[0]) if len(set(lengths)) == 1 else (1, sum(lengths))
    tokens, labels, positions, segments = (np.empty(sum(lengths), np.int64) for _ in range(4))
    at = 0
    for segment, (document, start, count) in enumerate(np.concatenate(rows).tolist()):
        first = int(corpus.offsets[document]) + start
        here = slice(at, at + count)
        targets = slice(first + 1, first + 1 + count)
        tokens[here] = corpus.tokens[first : first + count]
        labels[here] = np.where(corpus.learned[targets], corpus.tokens[targets], IGNORE)
        positions[here] = np.arange(count)
        segments[here] = segment
        at += count
    documents = tuple(dict.fromkeys(int(d) for row in rows for d in row[:, 0]))
    whole = [torch.from_numpy(array.reshape(shape)) for array in (tokens, labels, positions, segments)]
    return Batch(whole[0], whole[1], whole[2], whole[3], documents)


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
