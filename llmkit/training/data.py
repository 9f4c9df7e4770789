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
from numpy.typing import NDArray
from torch import Tensor

from llmkit.errors import UsageError
from llmkit.text.chat import encode_chat
from llmkit.text.tokenizer import Tokenizer
from llmkit.training.documents import Document, read_documents
from llmkit.training.recipe import Source

IGNORE = -100  # the label of a slot that is not learned, as everywhere in PyTorch

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Corpus:
    """Encoded documents, end to end in flat arrays."""

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

    def longer_than(self, max_length: int) -> tuple[int, int]:
        """How many documents do not fit into a row: those that go on in further rows, and those that are cut."""
        long = self.offsets[1:] - self.offsets[:-1] - 1 > max_length
        return int((long & self.divisible).sum()), int((long & ~self.divisible).sum())

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


def encode_document(
    document: Document, tokenizer: Tokenizer, chat: bool | None = None, learn: str = "completion"
) -> tuple[list[int], list[bool]]:
    """Token ids of a document and, for each, whether it is a target.

    Prompt and completion go through the chat template where there is one (`chat` overrules it), else they are encoded
    apart and joined, as they are when the model is asked to continue the prompt.

    Raises:
        UsageError: a chat without a chat template.
    """
    has_template = tokenizer.chat_template is not None
    end = list(tokenizer.eos_ids[:1])
    if document.text is not None:
        ids = tokenizer.encode(document.text)
        ids += end if ids[-1:] != end else []  # some tokenizers end a text by themselves
        return ids, [True] * len(ids)
    messages = document.messages
    if messages is None and (has_template if chat is None else chat):
        messages = ({"role": "user", "content": document.prompt}, {"role": "assistant", "content": document.completion})
    if messages is not None:
        if not has_template:
            raise UsageError(
                f"{document.place} is a chat, but the tokenizer has no chat template. "
                "Give it one (tokenizer.chat_template), or use prompt/completion rows with chat: false."
            )
        ids, mask = encode_chat(tokenizer, messages, document.tools)
        return ids, [True] * len(ids) if learn == "all" else mask
    prompt = tokenizer.encode(document.prompt or "")
    prompt = prompt[: -len(end)] if end and prompt[1:][-1:] == end else prompt
    ids = prompt + tokenizer.encode(document.completion or "", bos=False) + end
    return ids, [learn == "all" or index >= len(prompt) for index in range(len(ids))]


Encoded = tuple[NDArray[np.int32], NDArray[np.bool_], int, Document]  # ids, which of them are targets, source, origin


def load_corpora(sources: Sequence[Source], tokenizer: Tokenizer, held_out: float) -> tuple[Corpus, Corpus]:
    """The training and the held-out documents of all sources.

    Raises:
        UsageError: a source cannot be read, or nothing is left to learn from.
    """
    both: tuple[list[Encoded], ...] = ([], [])
    for index, source in enumerate(sources):
        share = held_out if source.held_out is None else source.held_out
        for document in read_documents(source):
            ids, learned = encode_document(document, tokenizer, source.chat, source.learn)
            if any(learned[1:]):
                both[document.is_held_out(share)].append((np.array(ids, np.int32), np.array(learned, np.bool_), index, document))
    if not both[0]:
        raise UsageError("data holds no document to learn from (all are empty or held out). Check data and held_out.")
    return _corpus(both[0]), _corpus(both[1])


def _corpus(rows: list[Encoded]) -> Corpus:
    return Corpus(
        np.concatenate([np.empty(0, np.int32), *(ids for ids, *_ in rows)]),
        np.concatenate([np.empty(0, np.bool_), *(learned for _, learned, *_ in rows)]),
        np.cumsum([0, *(len(ids) for ids, *_ in rows)], dtype=np.int64),
        np.array([source for *_, source, _ in rows], np.int64),
        np.array([document.text is not None for *_, document in rows], np.bool_),
        np.array([len(document.target.encode()) for *_, document in rows], np.int64),
        [document.place for *_, document in rows],
    )


@dataclass(frozen=True)
class Batch:
    """Packed rows: int64 tensors `[rows, length]`, and the documents that lie in them."""

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


def make_batch(corpus: Corpus, rows: Sequence[Ints]) -> Batch:
    """Rows of pieces (each `[pieces, 3]`) as tensors, as long as the fullest row.

    Unused slots at the end of a row form a segment of their own, with nothing to learn.
    """
    length = max(int(row[:, 2].sum()) for row in rows)
    tokens, labels, positions, segments = (np.zeros((len(rows), length), np.int64) for _ in range(4))
    labels[:] = IGNORE
    for r, row in enumerate(rows):
        at = 0
        for segment, (document, start, count) in enumerate(row.tolist()):
            first = int(corpus.offsets[document]) + start
            here = slice(at, at + count)
            targets = slice(first + 1, first + 1 + count)
            tokens[r, here] = corpus.tokens[first : first + count]
            labels[r, here] = np.where(corpus.learned[targets], corpus.tokens[targets], IGNORE)
            positions[r, here] = np.arange(count)
            segments[r, here] = segment
            at += count
        positions[r, at:] = np.arange(length - at)
        segments[r, at:] = len(row)
    documents = tuple(dict.fromkeys(int(d) for row in rows for d in row[:, 0]))
    return Batch(torch.from_numpy(tokens), torch.from_numpy(labels), torch.from_numpy(positions), torch.from_numpy(segments), documents)


class RowStream:
    """The training rows, epoch after epoch. Its whole state is (epoch, row): everything else follows from the seed."""

    def __init__(self, corpus: Corpus, weights: Sequence[float], max_length: int, seed: int, epochs: float | None = None) -> None:
        """`weights`: how often a document of each source is seen per epoch. `epochs`: where the stream ends, None: never."""
        self.corpus, self.max_length, self.seed, self.epochs = corpus, max_length, seed, epochs
        self.weights = np.asarray(weights, np.float64)[corpus.sources]
        if not (self.weights > 0).any():
            raise UsageError("every source of data has the weight 0. Raise one.")
        self.epoch, self.row = 0, 0
        self._rows = self._plan(0)

    def _plan(self, epoch: int) -> list[Ints]:
        """The rows of an epoch, in order."""
        for attempt in range(1000):  # a small corpus with fractional weights may draw an empty epoch
            random = np.random.default_rng([self.seed, epoch, attempt])
            times = np.floor(self.weights + random.random(len(self.weights))).astype(np.int64)
            if times.any():
                break
        documents = random.permutation(np.repeat(np.arange(len(times)), times))
        pieces = pieces_of(self.corpus, documents.tolist(), self.max_length)
        rows = [pieces[indices] for indices in pack(pieces[:, 2], self.max_length)]
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


def sequential_batches(corpus: Corpus, max_length: int, size: int) -> Iterator[Batch]:
    """Every document once, packed, in a fixed order: for evaluation."""
    pieces = pieces_of(corpus, range(len(corpus)), max_length)
    rows = pack(pieces[:, 2], max_length)
    for start in range(0, len(rows), size):
        yield make_batch(corpus, [pieces[indices] for indices in rows[start : start + size]])
