"""What a model weighs, read from config.json and the headers of its safetensors files: no weight is loaded. No torch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llmkit.checkpoint.arrays import parameter_shapes
from llmkit.checkpoint.source import ModelSource
from llmkit.checkpoint.weights import EMBEDDING, HEAD
from llmkit.config import ModelConfig, PartConfig, State
from llmkit.families import read_config
from llmkit.kernels.format import stored_shapes
from llmkit.quant.schemes import NF4, Choice, choose

SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}  # bytes of a number by its safetensors dtype
CODES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
LINEAR_ROLES = ("linear", "expert")
Storage = str | Choice  # a safetensors dtype, or codes


@dataclass(frozen=True)
class Facts:
    """A model in numbers."""

    name: str
    config: ModelConfig
    shapes: Mapping[str, tuple[int, ...]]  # of every parameter, by our names
    storage: Mapping[str, Storage]
    stored_bytes: int  # of its tensors, in its files, to the byte
    copied_bytes: int = 0  # of those that are not used as they lie in the file (transposed, float64, 8-bit floats), as they will be
    tokenizer_bytes: int = 0  # of tokenizer.json
    native_problem: str | None = None  # why the native kernels do not take weights stored like this
    notes: tuple[str, ...] = field(default=())

    @property
    def parameters(self) -> int:
        return sum(map(math.prod, self.shapes.values()))

    @property
    def quantized(self) -> bool:
        return any(isinstance(storage, Choice) for storage in self.storage.values())

    @property
    def linears(self) -> dict[str, tuple[int, ...]]:
        """The linears of the blocks, `[out, in]`: what an adapter may stand beside."""
        return {name: param.shape for name, param in self.config.parameters.items() if param.role in LINEAR_ROLES}

    @property
    def head(self) -> tuple[int, ...]:
        return self.shapes.get(HEAD, self.shapes[EMBEDDING])

    @property
    def active_parameters(self) -> int:
        """Parameters that a token is multiplied with: without the embedding table, with the head, and of experts only the chosen."""
        roles = ("linear", "expert", "router", "conv")
        return math.prod(self.head) + sum(param.active for param in self.config.parameters.values() if param.role in roles)

    def bytes_as(self, dtype: str) -> int:
        """All parameters in a dtype; what is in codes stays so."""
        size = SIZES[CODES[dtype]]
        return sum(
            storage_bytes(storage, self.shapes[name]) if isinstance(storage, Choice) else size * math.prod(self.shapes[name])
            for name, storage in self.storage.items()
        )

    def quantized_as(self, scheme: str, dtype: str | None = None) -> Facts:
        """The model after quantizing. dtype: of what stays dense; by default float32 for our own schemes, as stored for nf4."""
        dense = CODES[dtype] if dtype is not None else None if scheme == NF4 else "F32"
        storage: dict[str, Storage] = {
            name: choose(scheme, param) or dense or self.storage[name] for name, param in self.config.parameters.items()
        }
        size = sum(storage_bytes(kind, self.shapes[name]) for name, kind in storage.items())
        return Facts(self.name, self.config, self.shapes, storage, size, 0, self.tokenizer_bytes)


def storage_bytes(storage: Storage, shape: tuple[int, ...]) -> int:
    """Bytes of one parameter."""
    count = math.prod(shape)
    if isinstance(storage, str):
        return count * SIZES[storage]
    if storage.scheme != NF4:
        parts = stored_shapes(storage.scheme, storage.group, _matrix(shape))
        return sum(math.prod(size) * dtype.itemsize for dtype, size in parts.values())
    blocks = -(-count // storage.group)
    return -(-count // 2) + blocks + 4 * -(-blocks // 256) + 4 * (256 + 16)


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    rows, columns = shape
    return rows, columns


def read_facts(source: ModelSource) -> Facts:
    """The facts of a model. One with config.json alone (a hub cache before the download) is taken as config.json's dtype.

    Raises CheckpointError and ConfigError as loading would.
    """
    tokenizer = source.folder / "tokenizer.json"
    size = tokenizer.stat().st_size if tokenizer.is_file() else 0
    if not source.has_weights and (source.folder / "config.json").is_file():
        note = "its weights are not here: sizes follow from config.json"
        return config_facts(source.config, source.name, tokenizer_bytes=size, notes=(note,))
    stored = source.format
    return Facts(
        source.name, source.config, source.shapes, stored.storage, stored.stored_bytes, stored.copied_bytes, size, stored.native_problem
    )


def config_facts(config: ModelConfig, name: str, **rest: Any) -> Facts:
    """The facts of a model that is only a configuration."""
    shapes = parameter_shapes(config)
    dtype = CODES[config.dtype]
    return Facts(name, config, shapes, dict.fromkeys(shapes, dtype), sum(map(math.prod, shapes.values())) * SIZES[dtype], **rest)


def mapping_facts(hf: Mapping[str, Any], vocab_size: int, max_length: int) -> Facts:
    """The facts of a recipe's model from scratch: a config.json mapping."""
    given = {"vocab_size": vocab_size, "max_position_embeddings": max_length, **hf}
    return config_facts(read_config({key: value for key, value in given.items() if value is not None}), str(hf.get("model_type")))


def tokenizer_entries(folder: Path) -> int:
    """Entries of a folder's tokenizer.json, the largest id plus one; 0 where there is none that can be read."""
    try:
        said = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        vocab = said["model"]["vocab"]
        ids = list(vocab.values()) if isinstance(vocab, dict) else list(range(len(vocab)))
        return int(np.max([*ids, *(token["id"] for token in said.get("added_tokens", []))])) + 1
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def kv_positions(state: State, positions: int, step: int) -> int:
    """Return how many positions of one sequence the cache of a layer holds at once: in a sliding window the last ones, and those of a
    step."""
    return positions if state.window is None else min(positions, state.window + step)


def made(part: PartConfig, config: ModelConfig) -> dict[str, int]:
    """Return the numbers that a token has of every activation which linears make within a mixer or feed-forward (one expert of it)."""
    linears = [param for param in part.params(config) if param.role in LINEAR_ROLES and param.output != "residual"]
    return {param.output: param.shape[0] for param in linears}


def widths(part: PartConfig, config: ModelConfig) -> dict[str, int]:
    """Return the same of all activations between the part's input and its result: what its linears make, and what they read."""
    linears = [param for param in part.params(config) if param.role in LINEAR_ROLES and param.input != "hidden"]
    return made(part, config) | {param.input: param.shape[1] for param in linears}
