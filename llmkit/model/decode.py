"""Decoding in fixed shapes: one token for each sequence, so that a step can be captured in a CUDA graph and replayed.

A small model on a fast GPU takes longer to launch its few hundred kernels than to run them; a graph is one launch. A captured step
reads its inputs from the same memory every time and its shapes never change, so batches and contexts are rounded up to a few sizes:

    batch    1, 2, 4, ... MAX_BATCH     the last sequence fills the empty rows: it writes the same values to the same place
    keys     256, 512, 1024, ...        positions back from the query, fewer in a sliding window; those before the text are masked

What is captured is ordinary PyTorch: without a GPU the same step runs eagerly in the tests. Not yet measured on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from llmkit.config import ModelConfig
from llmkit.model.attention import Recurrence, attention
from llmkit.model.cache import CacheStorage, state_shapes
from llmkit.model.transformer import Transformer

MAX_BATCH = 32
MAX_KEYS = 1 << 16  # of all sequences: attention that gathers more than that is slower than reading in place
_LEAST_KEYS = 256

Run = Callable[[], Tensor]
Capture = Callable[[Run], Run]  # makes a function that repeats another on the same memory


def capturable(config: ModelConfig) -> bool:
    """Return whether the kernels of a step depend on nothing but shapes.

    Not so for routed experts and for frequencies chosen by length. Recurrent states are left out too: their slots change from step
    to step, and nothing here copies them into fixed memory yet.
    """
    return not config.rope_depends_on_length and not state_shapes(config) and not config.sparse


def cuda_graphs(device: torch.device) -> Capture:
    """Captures the kernels that a function launches; what it returns is the same memory after every replay, shared by all graphs."""
    pool = torch.cuda.graph_pool_handle()

    def capture(run: Run) -> Run:
        with torch.cuda.device(device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # kernels are compiled, and libraries set up, before capturing
                run()
                run()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                out = run()

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay

    return capture


class StaticCaches:
    """`LayerCaches` for one token of each sequence, with shapes that do not depend on how long the sequences are."""

    rope_lengths = (0,)  # no frequencies by length: see `capturable`

    def __init__(self, cache: CacheStorage, positions: Tensor, tables: list[Tensor]) -> None:
        """positions int64 `[batch]`; tables per group int64 `[batch, blocks]`, for at least the blocks up to the positions."""
        self.cache = cache
        size = cache.block_size
        self.write: list[Tensor] = []  # per group [batch]: the row of the storage for the new key
        self.read: list[Tensor] = []  # per group [batch, keys]: rows of the storage by position, the query's own the last
        self.mask: list[Tensor] = []  # per group [batch, 1, keys]
        for table, window in zip(tables, cache.config.cache_windows, strict=True):
            keys = table.shape[1] * size
            if window is not None:
                keys = min(keys, window)
            seen = positions.unsqueeze(1) - torch.arange(keys - 1, -1, -1, device=positions.device)  # negative: before the text
            visible = seen >= 0
            # What is not visible reads the query's own key: unused memory may hold NaN, which no mask keeps out of the sum.
            seen = torch.where(visible, seen, positions.unsqueeze(1))
            rows = table.gather(1, seen // size) * size + seen % size
            self.write.append(rows[:, -1])
            self.read.append(rows)
            self.mask.append(visible.unsqueeze(1))

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cache = self.cache
        group = cache.group_of[layer]
        keys, values = cache.keys[layer], cache.values[layer]
        keys[self.write[group]] = k[0].to(keys.dtype)
        values[self.write[group]] = v[0].to(values.dtype)
        read = self.read[group]
        own, mask = cache.config.attention(layer), self.mask[group]
        out = attention(q.transpose(0, 1), keys[read], values[read], mask, scale=own.score_scale, softcap=own.softcap)
        return out.transpose(0, 1)

    def recur(self, layer: int, inputs: Tensor, recurrence: Recurrence) -> Tensor:
        raise NotImplementedError("steps with recurrent states are not captured: see `capturable`")


class StaticDecode:
    """Steps of one token for each sequence, captured once for each size of batch and context."""

    def __init__(self, model: Transformer, cache: CacheStorage, capture: Capture) -> None:
        self.model, self.cache, self.capture = model, cache, capture
        self._steps: dict[tuple[int, int], _Step] = {}
        self._storage = list(cache.blocks)

    @staticmethod
    def fits(batch: int, length: int) -> bool:
        """Whether that many sequences, the longest with so many tokens, are decoded here."""
        return 0 < batch <= MAX_BATCH and _up(batch) * max(_LEAST_KEYS, _up(length)) <= MAX_KEYS

    def __call__(self, tokens: np.ndarray, positions: np.ndarray, tables: list[np.ndarray]) -> Tensor:
        """Logits `[batch, vocab]`, valid until the next call. tokens, positions `[batch]`, tables per group `[batch, blocks]`."""
        cache = self.cache
        for group, table in enumerate(tables):
            cache.reserve(group, int(table.max()) + 1)
        if cache.blocks != self._storage:  # it grew and lies elsewhere now
            self._steps.clear()
            self._storage = list(cache.blocks)
        size = _up(len(tokens)), max(_LEAST_KEYS, _up(int(positions.max()) + 1)) // cache.block_size
        if size not in self._steps:
            self._steps[size] = _Step(self.model, cache, *size)
        step = self._steps[size]
        step.fill(tokens, positions, tables)
        if step.replay is None:
            step.replay = self.capture(step.run)
        return step.replay()[: len(tokens)]


class _Step:
    """A step of one size, and the memory that it reads its inputs from."""

    def __init__(self, model: Transformer, cache: CacheStorage, batch: int, blocks: int) -> None:
        self.model, self.cache, self.blocks = model, cache, blocks
        # token, position, tables: one copy to the device
        self.staging = np.zeros((batch, 2 + len(cache.config.cache_windows) * blocks), np.int64)
        self.inputs = torch.zeros(self.staging.shape, dtype=torch.int64, device=cache.device)
        self.replay: Run | None = None

    def fill(self, tokens: np.ndarray, positions: np.ndarray, tables: list[np.ndarray]) -> None:
        used, at = len(tokens), 2
        self.staging[:used, 0], self.staging[:used, 1] = tokens, positions
        for table in tables:
            width = min(table.shape[1], self.blocks)  # what is left over of an earlier table lies behind the positions
            self.staging[:used, at : at + width] = table[:, :width]
            at += self.blocks
        self.staging[used:] = self.staging[used - 1]
        self.inputs.copy_(torch.from_numpy(self.staging))

    def run(self) -> Tensor:
        tokens, positions = self.inputs[:, 0], self.inputs[:, 1]
        caches = StaticCaches(self.cache, positions, list(self.inputs[:, 2:].split(self.blocks, 1)))
        logits: Tensor = self.model(tokens.unsqueeze(0), positions.unsqueeze(0), caches=caches)[0]
        return logits


def _up(number: int) -> int:
    """The next power of two."""
    return 1 << (number - 1).bit_length()
