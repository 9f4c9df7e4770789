"""Whole token sequences through a backend, each token given the true ones before it (teacher forcing): logits, scores, embeddings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, repeat

import numpy as np
from numpy.typing import ArrayLike, NDArray

from llmkit.engine.backend import Backend, Int32, StepBatch
from llmkit.engine.cache import ABSENT

Results = tuple[Int32, Int32, NDArray[np.float32]]


def forward_all(
    backend: Backend,
    prompts: Sequence[ArrayLike],
    *,
    wanted: Sequence[ArrayLike] | None = None,
    adapters: Sequence[str | None] | None = None,
    step_tokens: int | Sequence[int] = 512,
    hidden: bool = False,
) -> Iterator[Results]:
    """Compute token sequences one behind the other, as many tokens in a step as are said, and yield the results of each step.

    A step may end within a sequence and take up several. The backend's cache is overwritten: it must not be an engine's.

    Args:
        prompts: token ids of each, at least one.
        wanted: of each prompt the positions whose results are wanted, ascending; by default all. What follows the last is not computed.
        adapters: of each prompt, None for the base model.
        step_tokens: most tokens of a step; or of one step after another, the last number for all that follow.
        hidden: final normed hidden states instead of logits.

    Yields:
        int32 `[R]` and `[R]`, which prompt and which position each result is of; float32 `[R, vocab]`, or `[R, hidden_size]`. R may be 0.
    """
    ids = [np.asarray(prompt, dtype=np.int32) for prompt in prompts]
    lengths = np.array([len(one) for one in ids], dtype=np.int32)
    asked = [np.arange(length) for length in lengths] if wanted is None else [np.asarray(one, dtype=np.int64) for one in wanted]
    computed = [int(one[-1]) + 1 if len(one) else 0 for one in asked]
    # All tokens behind one another: a step is a slice of these four.
    tokens = np.concatenate([one[:count] for one, count in zip(ids, computed, strict=True)])
    places = np.concatenate([np.arange(count, dtype=np.int32) for count in computed])
    owners = np.repeat(np.arange(len(ids), dtype=np.int32), computed)
    is_wanted = np.concatenate([np.isin(np.arange(count), one) for count, one in zip(computed, asked, strict=True)])
    table = _block_table(computed, backend.block_size)
    sizes = [step_tokens] if isinstance(step_tokens, int) else step_tokens
    # state: the slot, 0 or 1, with the state of the sequence that the last step ended within; no more than one is ever unfinished.
    start = state = 0
    for size in chain(sizes, repeat(sizes[-1])):
        if start >= len(tokens):
            return
        part = slice(start, start + size)
        here, rows = np.unique(owners[part], return_inverse=True)  # a step takes only sequences that have tokens in it
        state_in = state_out = None
        if backend.state_bytes:
            state_in, state_out = np.full(len(here), ABSENT, np.int32), np.full(len(rows), ABSENT, np.int32)
            if places[start] > 0:
                state_in[0] = state
            state = 1 - state
            state_out[-1] = state
        indices = np.flatnonzero(is_wanted[part]).astype(np.int32)
        tables = [table[here]] * len(backend.cache_windows)
        names = [None if adapters is None else adapters[owner] for owner in here]
        batch = StepBatch(
            tokens[part], places[part], rows.astype(np.int32), tables, lengths[here], names, indices, state_in=state_in, state_out=state_out
        )
        yield owners[part][indices], places[part][indices], backend.step(batch, hidden)
        start += size


def _block_table(lengths: Sequence[int], block_size: int) -> Int32:
    """Return int32 `[sequences, blocks]`: each sequence has blocks of its own in one run of ids, -1 behind them."""
    counts = [-(-length // block_size) for length in lengths]
    table = np.full((len(counts), max(counts)), ABSENT, np.int32)
    first = 0
    for row, count in enumerate(counts):
        table[row, :count] = np.arange(first, first + count)
        first += count
    return table
