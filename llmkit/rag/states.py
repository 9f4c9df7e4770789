"""Hidden states and logits of a batch of texts, straight from the backend: what embedding and reranking read of a decoder."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from llmkit.engine.backend import Backend
from llmkit.engine.forward import forward_all

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
    """Return of each sequence the result at its last token, or the mean of all its results: float32 `[sequences, hidden or vocab]`.

    hidden: final normed hidden states, else logits. The backend's cache is overwritten. More than BATCH_TOKENS tokens take several steps.
    """
    lengths = [len(one) for one in ids]
    wanted = [[length - 1] for length in lengths] if last else None
    sums = np.zeros((len(ids), backend.config.hidden_size if hidden else backend.config.vocab_size), np.float32)
    for owners, _, results in forward_all(backend, ids, wanted=wanted, step_tokens=BATCH_TOKENS, hidden=hidden):
        np.add.at(sums, owners, results)
    return sums if last else (sums / np.array(lengths)[:, None]).astype(np.float32)
