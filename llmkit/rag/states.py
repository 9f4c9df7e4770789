"""Hidden states and logits of a batch of texts, straight from the backend: what embedding and reranking read of a decoder."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from llmkit.engine.backend import Backend, StepBatch

BATCH_TOKENS = 4096  # of one forward pass, padding included


def batches(lengths: Sequence[int], tokens: int = BATCH_TOKENS) -> list[list[int]]:
    """Indices grouped by length, the longest first, so that little is padding; each group has at most `tokens` with its padding."""
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if groups and (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= tokens:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def pooled_states(backend: Backend, ids: Sequence[Sequence[int]], *, last: bool, hidden: bool = True) -> NDArray[np.float32]:
    """Of each sequence the result at its last token, or the mean of all its results: float32 `[sequences, hidden or vocab]`.

    hidden: final normed hidden states, else logits. The backend's cache is overwritten. More than BATCH_TOKENS tokens take several steps.
    """
    lengths = np.array([len(one) for one in ids])
    blocks = -(-lengths // backend.block_size)
    table = np.full((len(ids), blocks.max()), -1, np.int32)
    for row, (first, count) in enumerate(zip(np.cumsum(blocks) - blocks, blocks, strict=True)):
        table[row, :count] = np.arange(first, first + count)
    tables = [table] * len(backend.cache_windows)
    tokens = np.concatenate([np.asarray(one, np.int32) for one in ids])
    positions = np.concatenate([np.arange(length, dtype=np.int32) for length in lengths])
    sequences = np.repeat(np.arange(len(ids), dtype=np.int32), lengths)
    sums: NDArray[np.float32] | None = None
    for start in range(0, len(tokens), BATCH_TOKENS):
        part = slice(start, start + BATCH_TOKENS)
        here, own = np.unique(sequences[part], return_inverse=True)  # a step takes only sequences that have tokens in it
        at = positions[part]
        rows = np.flatnonzero(at == lengths[here][own] - 1) if last else np.arange(len(at))
        if not len(rows):
            rows = np.array([len(at) - 1])
            taken = np.zeros(1, np.float32)
        else:
            taken = np.ones(len(rows), np.float32)
        contexts, block_tables = lengths[here].astype(np.int32), [one[here] for one in tables]
        batch = StepBatch(tokens[part], at, own.astype(np.int32), block_tables, contexts, [None] * len(here), rows.astype(np.int32))
        out = backend.step(batch, hidden)
        if sums is None:
            sums = np.zeros((len(ids), out.shape[1]), np.float32)
        np.add.at(sums, here[own[rows]], out * taken[:, None])
    assert sums is not None
    return sums if last else (sums / lengths[:, None]).astype(np.float32)
