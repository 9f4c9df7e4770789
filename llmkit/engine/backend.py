"""The one door between the engine and whatever runs a model."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from llmkit.config import ModelConfig


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
        """Bytes of one KV block of that group, over all its layers."""
        ...

    def step(
        self,
        tokens: NDArray[np.int32],
        positions: NDArray[np.int32],
        sequences: NDArray[np.int32],
        block_tables: list[NDArray[np.int32]],
        contexts: NDArray[np.int32],
        adapters: list[str | None],
        rows: NDArray[np.int32],
        hidden: bool = False,
    ) -> NDArray[np.float32]:
        """Writes keys and values of N tokens of S sequences into their blocks and attends to what is there.

        Running a step again with the same arguments writes the same values: the engine may repeat one that was interrupted.

        Args:
            tokens: int32 `[N]`; those of one sequence are consecutive and in order, and every sequence has at least one.
            positions: int32 `[N]`, of each token in its sequence.
            sequences: int32 `[N]`, the token's row in the block tables, `contexts` and `adapters`.
            block_tables: per group int32 `[S, max_blocks]`. Entry j is the id of the block with positions
                j * block_size and following; -1 where a sliding window has left it behind or it is not yet taken.
            contexts: int32 `[S]`, the length for which rotary frequencies are chosen (dynamic, longrope).
            adapters: S names, None for the base model.
            rows: int32 `[R]`, indices into the N tokens: those whose result is wanted.
            hidden: final normed hidden states instead of logits.

        Returns:
            float32 `[R, vocab]`, or `[R, hidden_size]` if `hidden`. The engine reads it before the next step and keeps nothing.
        """
        ...
