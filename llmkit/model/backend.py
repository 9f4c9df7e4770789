"""The torch backend of the engine: one `step` of many sequences on CPU, CUDA or MPS."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from llmkit.compat import keep_freed_memory
from llmkit.config import ModelConfig
from llmkit.errors import UsageError
from llmkit.model.cache import CacheStorage, StepCaches
from llmkit.model.decode import Capture, StaticDecode, capturable, cuda_graphs
from llmkit.model.transformer import Transformer

if TYPE_CHECKING:
    from llmkit.engine.backend import StepBatch


class TorchBackend:
    """Runs the `Transformer` over a paged KV cache; see `llmkit.engine.backend.Backend` for the contract.

    All tokens of a step, whatever their sequences, pass through the linears as one flat batch without padding;
    attention runs per sequence. A row's logits agree with those of the row alone within 1e-5 (matrix products of
    different sizes round differently).
    On CUDA, steps with one token for each sequence are captured in graphs (`model/decode.py`).

    An adapter is a model of its own that shares the weights it does not change. A step runs once for each that its sequences name,
    every time with the rows of those sequences alone, and without a graph.
    """

    block_size = 16

    def __init__(self, model: Transformer, capture: Capture | None = None, adapters: Mapping[str, Transformer] | None = None) -> None:
        """capture: what captures such steps; by default CUDA graphs on CUDA, nothing elsewhere. adapters: models by adapter name."""
        self.model = model.eval()
        self.adapters = {name: adapted.eval() for name, adapted in (adapters or {}).items()}
        weight = next(model.model.norm.parameters())  # norms are never quantized
        self.device = weight.device
        if self.device.type == "cpu":
            keep_freed_memory()
        # On a CPU all arithmetic is float32, whatever the weights are stored in.
        self.dtype = torch.float32 if self.device.type == "cpu" else weight.dtype
        self.cache = CacheStorage(model.config, self.block_size, self.dtype, self.device)
        # A small model on a fast GPU spends most of a step on launching kernels; a captured graph is one launch.
        if capture is None and self.device.type == "cuda":
            capture = cuda_graphs(self.device)
        self.decode = StaticDecode(model, self.cache, capture) if capture is not None and capturable(model.config) else None

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    @property
    def path(self) -> str:
        """What computes, in words."""
        threads = f", {self.threads} thread{'s' * (self.threads > 1)}" if self.device.type == "cpu" else ""
        return f"PyTorch on {self.device}{threads}, {self.kv_bits}-bit cache"

    @property
    def threads(self) -> int:
        return torch.get_num_threads()

    @property
    def kv_bits(self) -> int:
        """Bits of a number in the KV cache."""
        return 8 * self.dtype.itemsize

    @property
    def cache_windows(self) -> tuple[int | None, ...]:
        return self.config.cache_windows

    def block_bytes(self, group: int) -> int:
        return self.cache.block_bytes(group)

    @property
    def state_bytes(self) -> int:
        return self.cache.state_bytes

    @torch.inference_mode()
    def step(self, batch: StepBatch, hidden: bool = False) -> np.ndarray:
        """Store the tokens' keys and values; return float32 logits (or final hidden states) `[R, vocab]`."""
        chosen = set(batch.adapters)
        if unknown := [name for name in chosen if name is not None and name not in self.adapters]:
            raise UsageError(f"adapter {unknown[0]!r} is not loaded; loaded are {', '.join(self.adapters) or 'none'}.")
        if chosen <= {None}:
            return self._step(self.model, batch, hidden)
        # One pass for each adapter of the step, with the rows of its own sequences; results go where these stand in the batch.
        out = np.empty((len(batch.logits_indices), self.config.hidden_size if hidden else self.config.vocab_size), np.float32)
        owners = batch.sequences[batch.logits_indices]
        for name in chosen:
            own = np.array([adapter == name for adapter in batch.adapters])  # bool [S], of the sequences
            out[own[owners]] = self._step(self.model if name is None else self.adapters[name], _only(batch, own), hidden)
        return out

    def _step(self, model: Transformer, batch: StepBatch, hidden: bool) -> np.ndarray:
        tokens, positions, sequences = batch.tokens, batch.positions, batch.sequences
        one_each = model is self.model and len(tokens) == len(batch.contexts)  # every sequence has at least one
        if self.decode is not None and one_each and not hidden and self.decode.fits(len(tokens), int(positions.max()) + 1):
            logits = self.decode(tokens, positions, [table[sequences] for table in batch.block_tables])
            return logits[self._int64(batch.logits_indices)].float().cpu().numpy()
        out = model(
            self._int64(tokens).unsqueeze(0),
            self._int64(positions).unsqueeze(0),
            caches=StepCaches(self.cache, batch),
            logits_indices=self._int64(batch.logits_indices),
            hidden=hidden,
        )
        return out.float().cpu().numpy()

    def _int64(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device, torch.int64)


def _only(batch: StepBatch, own: np.ndarray) -> StepBatch:
    """Return the part of a step that concerns some sequences: own bool `[S]`."""
    numbers = np.cumsum(own, dtype=np.int32) - 1  # their rows among themselves
    picked, wanted = own[batch.sequences], own[batch.sequences[batch.logits_indices]]
    return replace(
        batch,
        tokens=batch.tokens[picked],
        positions=batch.positions[picked],
        sequences=numbers[batch.sequences[picked]],
        block_tables=[table[own] for table in batch.block_tables],
        contexts=batch.contexts[own],
        adapters=[name for name, one in zip(batch.adapters, own, strict=True) if one],
        # Rows are renumbered among those that are left: a running count of what was picked.
        logits_indices=(np.cumsum(picked, dtype=np.int32) - 1)[batch.logits_indices[wanted]],
        state_in=None if batch.state_in is None else batch.state_in[own],
        state_out=None if batch.state_out is None else batch.state_out[picked],
    )
