"""The KV cache: keys and values of every layer in blocks of `block_size` positions, addressed through block tables.

Layers with the same sliding window form a group; each group has block ids and tables of its own, so that the blocks
behind a window can be given back while full-attention layers keep theirs:

    table of one sequence, full attention:   [ 4  5  6  7  8  9 ]      positions 0..95, block_size 16
    table of the same, window 32:            [-1 -1 -1  2  3  4 ]      only the last positions are still held

A run of consecutive ids is read in place as one view; anything else is gathered.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from llmkit.config import ModelConfig
from llmkit.model.attention import attention, attention_scale, visible

Slots = slice | Tensor  # rows of a layer's storage


@dataclass
class Span:
    """One sequence's share of a step, for the layers of one group."""

    rows: slice  # its tokens among those of the step
    keys: Slots  # where the keys it can see are stored, in order of position
    mask: Tensor | None  # [1, tokens, keys], None: all visible, or causal
    causal: bool


class KVCache:
    """Storage for keys and values; grows with the largest block id that is used."""

    def __init__(self, config: ModelConfig, block_size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.config, self.block_size, self.dtype, self.device = config, block_size, dtype, device
        self.group_of = [config.cache_windows.index(layer.sliding_window) for layer in config.layers]
        self.blocks = [0] * len(config.cache_windows)
        empty = torch.empty(0, config.num_key_value_heads, config.head_dim, dtype=dtype, device=device)
        self.keys: list[Tensor] = [empty] * config.num_hidden_layers  # per layer [blocks * block_size, kv_heads, head_dim]
        self.values: list[Tensor] = [empty] * config.num_hidden_layers

    def block_bytes(self, group: int) -> int:
        """Bytes of one block in all layers of the group."""
        per_position = 2 * self.config.num_key_value_heads * self.config.head_dim * self.dtype.itemsize
        return self.group_of.count(group) * self.block_size * per_position

    def reserve(self, group: int, blocks: int) -> None:
        """Makes room for block ids below `blocks`; doubling keeps the copying linear."""
        if blocks <= self.blocks[group]:
            return
        self.blocks[group] = max(blocks, 2 * self.blocks[group], 8)
        for layer, of in enumerate(self.group_of):
            if of == group:
                self.keys[layer], self.values[layer] = (self._grown(t, self.blocks[group]) for t in (self.keys[layer], self.values[layer]))

    def _grown(self, old: Tensor, blocks: int) -> Tensor:
        new = torch.empty(blocks * self.block_size, *old.shape[1:], dtype=self.dtype, device=self.device)
        new[: len(old)] = old
        return new

    def slots(self, table: np.ndarray, start: int, stop: int) -> Slots:
        """Storage rows of positions `start..stop` of a sequence with this block table."""
        size = self.block_size
        first = start // size
        blocks = table[first : (stop - 1) // size + 1]
        begin = start - first * size
        if len(blocks) == 1 or (np.diff(blocks) == 1).all():
            origin = int(blocks[0]) * size + begin
            return slice(origin, origin + stop - start)
        rows = (blocks[:, None].astype(np.int64) * size + np.arange(size)).reshape(-1)[begin : begin + stop - start]
        return torch.from_numpy(rows).to(self.device)


class CachedAttention:
    """`Attend` for one step: stores the step's keys and values, then lets each sequence see all of its own."""

    def __init__(self, cache: KVCache, positions: np.ndarray, sequences: np.ndarray, tables: Sequence[np.ndarray]) -> None:
        """positions, sequences `[tokens]`, grouped by sequence and ascending within it; tables per group `[sequences, blocks]`."""
        self.cache = cache
        bounds = [0, *(np.flatnonzero(np.diff(sequences)) + 1).tolist(), len(sequences)]
        self.spans: list[list[Span]] = []
        self.writes: list[list[tuple[slice, Slots]]] = []
        for group, window in enumerate(cache.config.cache_windows):
            cache.reserve(group, int(tables[group].max()) + 1)
            spans, writes = [], []
            for begin, end in itertools.pairwise(bounds):
                table = tables[group][sequences[begin]]
                first, last = int(positions[begin]), int(positions[end - 1])
                oldest = 0 if window is None else max(0, first - window + 1)
                rows, causal, mask = slice(begin, end), oldest == first, None
                if end - begin > 1 and (not causal or (window is not None and last - first >= window)):
                    queries = torch.arange(first, last + 1, device=cache.device)
                    mask = visible(queries, torch.arange(oldest, last + 1, device=cache.device), window).unsqueeze(0)
                    causal = False
                spans.append(Span(rows, cache.slots(table, oldest, last + 1), mask, causal))
                writes.append((rows, cache.slots(table, first, last + 1)))
            self.spans.append(spans)
            self.writes.append(writes)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cache = self.cache
        group = cache.group_of[layer]
        keys, values = cache.keys[layer], cache.values[layer]
        for rows, slots in self.writes[group]:
            keys[slots] = k[0, rows]
            values[slots] = v[0, rows]
        scale, softcap = attention_scale(cache.config, layer), cache.config.attn_logit_softcapping
        out = [
            attention(q[:, span.rows], keys[span.keys].unsqueeze(0), values[span.keys].unsqueeze(0), span.mask, span.causal, scale, softcap)
            for span in self.spans[group]
        ]
        return out[0] if len(out) == 1 else torch.cat(out, 1)
