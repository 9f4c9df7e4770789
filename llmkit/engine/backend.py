"""The one interface between the engine and whatever runs a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from llmkit.config import ModelConfig

Int32 = NDArray[np.int32]


@dataclass(frozen=True, slots=True, eq=False)
class StepBatch:
    """What one step computes: N tokens of S sequences, results for R of the tokens. All arrays are int32.

    Attributes:
        tokens: `[N]`; those of one sequence are consecutive and in order, and every sequence has at least one.
        positions: `[N]`, of each token in its sequence.
        sequences: `[N]`, the token's row in the block tables, `contexts`, `adapters` and `state_in`; ascending.
        block_tables: per cache group `[S, max_blocks]`. Entry j is the id of the block with positions
            j * block_size and following; -1 where a sliding window has left it behind or it is not yet taken.
        contexts: `[S]`, the length for which rotary frequencies are chosen (dynamic, longrope).
        adapters: S names, None for the base model.
        logits_indices: `[R]`, indices into the N tokens: those whose result is wanted.
        state_in: `[S]`, the slot with the state that the sequence has before its first token of this step, -1: all zeros.
            None where no layer keeps a state besides keys and values.
        state_out: `[N]`, the slot that receives the sequence's state after that token, -1: it is not kept. A step reads all of
            `state_in` before it writes, so a slot may be both.
    """

    tokens: Int32
    positions: Int32
    sequences: Int32
    block_tables: Sequence[Int32]
    contexts: Int32
    adapters: Sequence[str | None]
    logits_indices: Int32
    state_in: Int32 | None = None
    state_out: Int32 | None = None


class Backend(Protocol):
    """What runs a model: token ids in, float32 logits out. All arrays are numpy.

    Attributes:
        config: what the model is.
        block_size: tokens per block of the KV cache.
        threads: of the CPU that it uses.
        path: what computes, in words: kernels, device, threads, bits of the cache.
        cache_windows: `config.cache_windows`; each is one group of KV blocks, shared by all layers with that sliding window.
    """

    @property
    def config(self) -> ModelConfig: ...

    @property
    def block_size(self) -> int: ...

    @property
    def threads(self) -> int: ...

    @property
    def path(self) -> str: ...

    @property
    def cache_windows(self) -> tuple[int | None, ...]: ...

    def block_bytes(self, group: int) -> int:
        """Return the bytes of one KV block of that group, over all its layers."""
        ...

    def step(self, batch: StepBatch, hidden: bool = False) -> NDArray[np.float32]:
        """Write keys and values of the batch's tokens into their blocks and attend to what is there.

        Running a step again with the same batch writes the same values: the engine may repeat one that was interrupted.

        Args:
            batch: the tokens, where their keys and values go, and whose results are wanted.
            hidden: final normed hidden states instead of logits.

        Returns:
            float32 `[R, vocab]`, or `[R, hidden_size]` if `hidden`. The engine reads it before the next step and keeps nothing.
        """
        ...
