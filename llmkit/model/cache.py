"""What a model keeps of its sequences: keys and values in blocks of `block_size` positions, states in slots.

Layers with the same sliding window form a group; each group has block ids and tables of its own, so that the blocks
behind a window can be given back while full-attention layers keep theirs:

    table of one sequence, full attention:   [ 4  5  6  7  8  9 ]      positions 0..95, block_size 16
    table of the same, window 32:            [-1 -1 -1  2  3  4 ]      only the last positions are still held

A run of consecutive ids is read in place as one view; anything else is gathered. A layer whose memory does not grow with the text
(a recurrence, a convolution) keeps it in slots instead, one state each; which slot is read and which written is said by the step.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from llmkit.config import ModelConfig
from llmkit.model.attention import Recurrence, attention, visible

if TYPE_CHECKING:
    from llmkit.engine.backend import StepBatch

Places = slice | Tensor  # rows of a layer's storage


def state_shapes(config: ModelConfig) -> dict[int, tuple[tuple[int, ...], ...]]:
    """Return the shapes of the states that are not keys and values, by layer; layers without are not in it."""
    shapes = {layer: tuple(state.shape for state in states if state.kind != "kv") for layer, states in enumerate(config.states)}
    return {layer: of_layer for layer, of_layer in shapes.items() if of_layer}


class CacheStorage:
    """The memory of all layers. It grows with the largest block id and the largest slot that are used."""

    def __init__(self, config: ModelConfig, block_size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.config, self.block_size, self.dtype, self.device = config, block_size, dtype, device
        kv = [next((state for state in states if state.kind == "kv"), None) for states in config.states]
        self.group_of = [-1 if state is None else config.cache_windows.index(state.window) for state in kv]  # per layer
        self.blocks = [0] * len(config.cache_windows)  # per group, how many there is memory for
        # Per layer [blocks * block_size, kv_heads, head_dim]; empty for layers without keys.
        self.keys, self.values = (
            [torch.empty(0, *(() if state is None else state.shape[1:]), dtype=dtype, device=device) for state in kv] for _ in range(2)
        )
        # Per layer one tensor [slots, *shape] for each of its states. Float32 whatever the model's dtype: a recurrence adds up
        # thousands of small terms, which 16 bits would lose.
        self.states = {layer: [torch.empty(0, *s, device=device) for s in shapes] for layer, shapes in state_shapes(config).items()}

    def block_bytes(self, group: int) -> int:
        """Return the bytes of one block in all layers of the group."""
        numbers = (tensor.shape[1:].numel() for layer, tensor in enumerate(self.keys) if self.group_of[layer] == group)
        return 2 * self.block_size * self.dtype.itemsize * sum(numbers)

    @property
    def state_bytes(self) -> int:
        """Bytes of one slot in all layers."""
        return sum(4 * tensor.shape[1:].numel() for tensors in self.states.values() for tensor in tensors)

    def reserve(self, group: int, blocks: int) -> None:
        """Make room for block ids below `blocks`; doubling keeps the copying linear."""
        if blocks <= self.blocks[group]:
            return
        self.blocks[group] = max(blocks, 2 * self.blocks[group], 8)
        for layer, of in enumerate(self.group_of):
            if of == group:
                size = self.blocks[group] * self.block_size
                self.keys[layer], self.values[layer] = _grown(self.keys[layer], size), _grown(self.values[layer], size)

    def reserve_slots(self, slots: int) -> None:
        """Make room for state slots below `slots`."""
        for tensors in self.states.values():
            if slots > len(tensors[0]):
                tensors[:] = [_grown(tensor, max(slots, 2 * len(tensor))) for tensor in tensors]

    def places(self, table: np.ndarray, start: int, stop: int) -> Places:
        """Return the storage rows of positions `start..stop` of a sequence with this block table."""
        size = self.block_size
        first = start // size
        blocks = table[first : (stop - 1) // size + 1]
        begin = start - first * size
        if len(blocks) == 1 or (np.diff(blocks) == 1).all():
            origin = int(blocks[0]) * size + begin
            return slice(origin, origin + stop - start)
        rows = (blocks[:, None].astype(np.int64) * size + np.arange(size)).reshape(-1)[begin : begin + stop - start]
        return torch.from_numpy(rows).to(self.device)


def _grown(old: Tensor, size: int) -> Tensor:
    new = torch.empty(size, *old.shape[1:], dtype=old.dtype, device=old.device)
    new[: len(old)] = old
    return new


@dataclass
class _Part:
    """One sequence's share of a step, for the layers of one group."""

    tokens: slice  # its own among those of the step
    written: Places  # where their keys go
    keys: Places  # where the keys it can see are stored, in order of position
    mask: Tensor | None  # [1, tokens, keys], None: all visible, or causal
    causal: bool


class StepCaches:
    """`LayerCaches` of one step: everything that its sequences have kept, read and written through the step's tables and slots."""

    def __init__(self, cache: CacheStorage, batch: StepBatch) -> None:
        self.cache = cache
        sequences = batch.sequences
        self.rope_lengths = batch.contexts[sequences].tolist() if cache.config.rope_depends_on_length else (0,)
        self.bounds = [0, *(np.flatnonzero(np.diff(sequences)) + 1).tolist(), len(sequences)]  # sequence i has tokens [i], [i + 1]
        self.parts: list[list[_Part]] = []  # per group
        for group, window in enumerate(cache.config.cache_windows):
            cache.reserve(group, int(batch.block_tables[group].max()) + 1)
            self.parts.append([self._part(batch, group, window, *ends) for ends in itertools.pairwise(self.bounds)])
        if cache.states:
            self._prepare_states(batch)

    def _part(self, batch: StepBatch, group: int, window: int | None, begin: int, end: int) -> _Part:
        cache, table = self.cache, batch.block_tables[group][batch.sequences[begin]]
        first, last = int(batch.positions[begin]), int(batch.positions[end - 1])
        oldest = 0 if window is None else max(0, first - window + 1)
        causal, mask = oldest == first, None
        if end - begin > 1 and (not causal or (window is not None and last - first >= window)):
            queries = torch.arange(first, last + 1, device=cache.device)
            mask = visible(queries, torch.arange(oldest, last + 1, device=cache.device), window).unsqueeze(0)
            causal = False
        return _Part(slice(begin, end), cache.places(table, first, last + 1), cache.places(table, oldest, last + 1), mask, causal)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cache, group = self.cache, self.cache.group_of[layer]
        keys, values = cache.keys[layer], cache.values[layer]
        for part in self.parts[group]:
            keys[part.written] = k[0, part.tokens]
            values[part.written] = v[0, part.tokens]
        own = cache.config.attention(layer)
        scale, softcap = own.score_scale, own.softcap
        out = [
            attention(
                q[:, part.tokens], keys[part.keys].unsqueeze(0), values[part.keys].unsqueeze(0), part.mask, part.causal, scale, softcap
            )
            for part in self.parts[group]
        ]
        return out[0] if len(out) == 1 else torch.cat(out, 1)

    def _prepare_states(self, batch: StepBatch) -> None:
        count, device = len(self.bounds) - 1, self.cache.device
        read = np.full(count, -1) if batch.state_in is None else batch.state_in.astype(np.int64)
        write = np.full(len(batch.tokens), -1) if batch.state_out is None else batch.state_out.astype(np.int64)
        self.cache.reserve_slots(max(1, int(max(read.max(), write.max())) + 1))
        self.starts_from = torch.from_numpy(read).to(device)  # [S]
        self.kept_in = write  # [N]
        # A sequence's tokens are cut behind each whose state is kept: a recurrence gives the state after its last token only.
        cuts = (np.flatnonzero(write >= 0) + 1).tolist()
        self.runs = [
            (row, ends)
            for row, (begin, end) in enumerate(itertools.pairwise(self.bounds))
            for ends in itertools.pairwise(sorted({begin, end, *(cut for cut in cuts if begin < cut < end)}))
        ]

    def recur(self, layer: int, inputs: Tensor, recurrence: Recurrence) -> Tensor:
        storage = self.cache.states[layer]
        known = self.starts_from >= 0
        initial = []  # [S, *shape], copies: a slot may be written below
        for tensor in storage:
            state = tensor[self.starts_from.clamp(min=0)]
            state[~known] = 0  # assigned, not multiplied: memory that was never written may hold NaN
            initial.append(state)
        if inputs.shape[1] == len(initial[0]):  # one token of each sequence: the sequences become the batch
            outputs, states = recurrence(inputs.transpose(0, 1), tuple(initial))
            kept = np.flatnonzero(self.kept_in >= 0)
            self._keep(storage, self.kept_in[kept], [state[torch.from_numpy(kept).to(state.device)] for state in states])
            return outputs.transpose(0, 1)
        parts = []
        for row, (begin, end) in self.runs:
            if begin == self.bounds[row]:
                states = tuple(state[row : row + 1] for state in initial)
            output, states = recurrence(inputs[:, begin:end], states)
            if self.kept_in[end - 1] >= 0:
                self._keep(storage, self.kept_in[end - 1 : end], states)
            parts.append(output)
        return torch.cat(parts, 1)

    def _keep(self, storage: list[Tensor], slots: np.ndarray, states: Sequence[Tensor]) -> None:
        places = torch.from_numpy(slots).to(self.cache.device)
        for tensor, state in zip(storage, states, strict=True):
            tensor[places] = state.to(tensor.dtype)
