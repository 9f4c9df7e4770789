"""Documents to packed rows of token ids.

A *slot* of a row holds an input token and the token to be predicted from it, so a document of n tokens fills n - 1
slots. Several documents share a row; sequence ids keep them apart in attention and positions begin again at 0:

    tokens     <s> Once upon a | <s> The cat sat   .
    labels     Once upon a </s>| The cat sat   . </s>      -100 where nothing is learned
    positions    0   1   2   3 |  0   1   2   3   4
    ids          0   0   0   0 |  1   1   1   1   1

A prefix that documents of a batch share, and do not learn (a system prompt, the prompt of a pair of answers), stands in it once, as a
sequence that others have as their parent:

    tokens     <s> You are a helpful assistant . | What is | 2 + 2 ? | pi ? | Hello !
    ids         3                                |  4      |  0      |  1   |  2            parents: {4: 3, 0: 4, 1: 4, 2: 3}
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from llmkit.errors import UsageError
from llmkit.model.attention import PackedSequences
from llmkit.training.data.sources import Corpus, Ints

SHORTEST = 4  # slots that documents share to be worth a sequence of their own
USUAL_LENGTH = 2048  # slots of a row where neither the recipe nor the model's context says otherwise
IGNORE = -100  # the label of a slot that is not learned, as everywhere in PyTorch


@dataclass(frozen=True)
class Batch:
    """Packed rows: int64 tensors `[rows, length]`. Each slot has a token.

    labels: the token to predict at each slot; IGNORE: none. packed: the ids of sequences are numbered as the pieces of documents are, and
    behind those the prefixes that several share. documents: those that lie in the rows.
    """

    tokens: Tensor
    labels: Tensor
    positions: Tensor
    packed: PackedSequences
    documents: tuple[int, ...] = ()

    @property
    def num_supervised(self) -> int:
        return int((self.labels != IGNORE).sum())

    def to(self, device: torch.device) -> Batch:
        tokens, labels, positions, ids = (t.to(device) for t in (self.tokens, self.labels, self.positions, self.packed.ids))
        return Batch(tokens, labels, positions, PackedSequences(ids, self.packed.parents), self.documents)


def row_length(max_length: int | None, context: int | None) -> int:
    """Return the tokens of a row: the recipe's `max_length`, or the smaller of 2,048 and the model's context."""
    return max_length or min(USUAL_LENGTH, context or USUAL_LENGTH)


# Pieces of documents: int64 `[pieces, 3]` of document, first slot, number of slots.
def pieces_of(corpus: Corpus, documents: Iterable[int], max_length: int) -> Ints:
    """Return documents as pieces of at most `max_length` slots: plain text goes on in a next piece, a chat is cut."""
    slots = corpus.offsets[1:] - corpus.offsets[:-1] - 1  # [documents]; the last token of one is a label only
    pieces = [
        (d, start, min(max_length, slots[d] - start))
        for d in documents
        for start in range(0, slots[d] if corpus.divisible[d] else min(slots[d], 1), max_length)
    ]
    return np.array(pieces, np.int64).reshape(-1, 3)


def pack(lengths: Ints, max_length: int) -> list[list[int]]:
    """Return indices of pieces grouped into rows of at most `max_length` slots: best fit, longest first.

    Each piece goes into the row whose free space it fills best; pieces longer than a row are the caller's error.
    """
    # Best-fit decreasing needs at most 11/9 of the fewest rows, and a piece is placed in the time of a bisection.
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
    """Return documents packed into rows.

    group: so many documents that follow each other share a row, of `group * max_length` slots (pairs).
    """
    pieces = pieces_of(corpus, documents, max_length)
    if group == 1:
        return [pieces[indices] for indices in pack(pieces[:, 2], max_length)]
    groups = pieces.reshape(-1, group, 3)  # nothing that stands in a group is divisible, so each document is one piece
    return [groups[indices].reshape(-1, 3) for indices in pack(groups[:, :, 2].sum(1), group * max_length)]


def make_batch(corpus: Corpus, rows: Sequence[Ints]) -> Batch:
    """Return rows of pieces (each `[pieces, 3]`) as tensors. Every piece is a sequence of its own, numbered through the batch.

    Rows of different lengths, or with prefixes in common, become one row, one behind the other: no slot is unused.
    """
    pieces = np.concatenate(rows)
    spans, parents = _share_prefixes(corpus, pieces)
    lengths = [int(row[:, 2].sum()) for row in rows]
    # Padding would be computed and thrown away; attention goes by sequence, so one long row costs what several short ones do.
    total = sum(span.count for span in spans)
    shape = (1, total) if parents or len(set(lengths)) > 1 else (len(rows), lengths[0])
    tokens, labels, positions, ids = (np.empty(total, np.int64) for _ in range(4))
    at = 0
    for span in spans:
        document, start, _ = pieces[span.piece].tolist()
        first, count = int(corpus.offsets[document]) + start + span.start, span.count
        here = slice(at, at + count)
        targets = slice(first + 1, first + 1 + count)  # of the corpus: the label of a slot is the token behind its own
        tokens[here] = corpus.tokens[first : first + count]
        labels[here] = np.where(corpus.learned[targets], corpus.tokens[targets], IGNORE)
        positions[here] = np.arange(span.start, span.start + count)
        ids[here] = span.id
        at += count
    documents = tuple(dict.fromkeys(pieces[:, 0].tolist()))
    made = [torch.from_numpy(array.reshape(shape)) for array in (tokens, labels, positions, ids)]
    return Batch(made[0], made[1], made[2], PackedSequences(made[3], parents), documents)


@dataclass(frozen=True)
class SequenceSpan:
    """Slots `[start, start + count)` of a piece, which stand in a batch under an id."""

    id: int
    piece: int
    start: int
    count: int


def _share_prefixes(corpus: Corpus, pieces: Ints) -> tuple[list[SequenceSpan], dict[int, int]]:
    """The sequences of a batch in order, and their parents: the pieces are the leaves of a tree of the prefixes they share."""
    prefixes: list[tuple[list[int], int]] = []  # what a piece could share, and its number
    for piece, (document, start, count) in enumerate(pieces.tolist()):
        first = int(corpus.offsets[document]) + start
        learned = corpus.learned[first + 1 : first + count]
        # Slots before the first label can be shared: what they compute serves several pieces, and what they would learn, none.
        free = int(learned.argmax()) if learned.any() else count - 1  # a piece keeps a slot of its own
        prefixes.append(([] if start else corpus.tokens[first : first + free].tolist(), piece))
    # Sorted, pieces that share a prefix stand together, and what a range of them shares is the least of what neighbours do.
    prefixes.sort()
    common = [_common(left, right) for (left, _), (right, _) in pairwise(prefixes)]
    spans: list[SequenceSpan] = []
    parents: dict[int, int] = {}

    def add(id_: int, piece: int, start: int, count: int, parent: int | None) -> None:
        spans.append(SequenceSpan(id_, piece, start, count))
        if parent is not None:
            parents[id_] = parent

    # A range of the sorted prefixes, the slots that they are known to share, and the sequence that holds those.
    waiting: list[tuple[int, int, int, int | None]] = [(0, len(prefixes), 0, None)]
    while waiting:
        low, high, shared, parent = waiting.pop()
        piece = prefixes[low][1]
        if high - low == 1:
            add(piece, piece, shared, int(pieces[piece, 2]) - shared, parent)
            continue
        here = min(common[low : high - 1])
        if here - shared >= SHORTEST:
            id_ = len(pieces) + len(spans)
            add(id_, piece, shared, here - shared, parent)
            shared, parent = here, id_
        bounds = [low, *(i + 1 for i in range(low, high - 1) if common[i] == here), high]
        waiting += [(*bound, shared, parent) for bound in reversed(list(pairwise(bounds)))]
    if not parents:
        spans.sort(key=lambda span: span.id)
    return spans, parents


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    """Return the length of the longest common prefix."""
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
        # Drawn from (seed, epoch, attempt) alone, so that a resumed run finds its place without the epochs before.
        for attempt in range(1000):  # a small corpus with fractional weights may draw an empty epoch
            random = np.random.default_rng([self.seed, epoch, attempt])
            weights = self.weights[:: self.group]
            # A weight of 2.5 is two or three times, which of them by chance.
            times = np.floor(weights + random.random(len(weights))).astype(np.int64)
            if times.any():
                break
        firsts = random.permutation(np.repeat(np.arange(len(times)), times)) * self.group
        documents = (firsts[:, None] + np.arange(self.group)).flatten()
        rows = rows_of(self.corpus, documents.tolist(), self.max_length, self.group)
        return [rows[i] for i in random.permutation(len(rows))]

    @property
    def fingerprint(self) -> str:
        """Return a hash of everything that decides the rows: with another, a place in the stream means nothing."""
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
