"""What a model weighs, read from config.json and the headers of its safetensors files: no weight is loaded. No torch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llmkit.checkpoint.arrays import misfit, parameter_shapes
from llmkit.checkpoint.files import INDEX, SINGLE, load_config, open_checkpoint
from llmkit.checkpoint.formats.llmkit import PADDING, is_bitsandbytes, quantization
from llmkit.checkpoint.weights import EMBEDDING, HEAD, assign
from llmkit.config import LayerConfig, ModelConfig
from llmkit.families import family, read_config
from llmkit.kernels.format import stored_shapes
from llmkit.quant.schemes import EMBEDDINGS, NF4, PROJECTIONS, Choice, choose

SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}  # bytes of a number by its safetensors dtype
CODES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
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
        return {name: shape for name, shape in self.shapes.items() if name.endswith(PROJECTIONS)}

    @property
    def head(self) -> tuple[int, ...]:
        return self.shapes.get(HEAD, self.shapes[EMBEDDING])

    @property
    def active_parameters(self) -> int:
        """Parameters that a token is multiplied with: without the embedding table, with the head, and of experts only the chosen."""
        count = math.prod(self.head)
        for name, shape in self.shapes.items():
            if name in EMBEDDINGS or len(shape) != 2 or "embed_positions" in name:
                continue
            if ".experts." in name:
                moe = self.config.layers[int(name.split(".")[2])].moe
                assert moe is not None
                count += math.prod(shape) * moe.num_experts_per_tok // moe.num_experts
            else:
                count += math.prod(shape)
        return count

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
            name: choose(scheme, name, shape) or dense or self.storage[name] for name, shape in self.shapes.items()
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


def read_facts(folder: Path, name: str | None = None) -> Facts:
    """The facts of a model folder. One with config.json alone (a hub cache before the download) is taken as config.json's dtype.

    Raises CheckpointError and ConfigError as loading would.
    """
    config = load_config(folder)
    shapes = parameter_shapes(config)
    tokenizer = folder / "tokenizer.json"
    rest: dict[str, Any] = {"tokenizer_bytes": tokenizer.stat().st_size if tokenizer.is_file() else 0}
    name = str(folder) if name is None else name
    if not (folder / SINGLE).exists() and not (folder / INDEX).exists() and (folder / "config.json").is_file():
        return config_facts(config, name, notes=("its weights are not here: sizes follow from config.json",), **rest)
    if is_bitsandbytes(config):
        dense = CODES[config.dtype]
        storage: dict[str, Storage] = {name: choose(NF4, name, shape) or dense for name, shape in shapes.items()}
        size = sum(tensor.nbytes for tensor in open_checkpoint(folder).values())
        return Facts(name, config, shapes, storage, size, **rest)
    record = quantization(folder, config)
    if record is not None:
        tensors = open_checkpoint(folder)
        size = sum(tensor.nbytes for key, tensor in tensors.items() if not key.startswith(PADDING))
        storage = {key: tensors[key].dtype for key in shapes if key in tensors}
        storage |= {key: Choice(entry.scheme, entry.group) for key, entry in record.tensors.items()}
        return Facts(name, config, shapes, storage, size, **rest)
    assignment = assign(open_checkpoint(folder), family(config.model_type), config, shapes)
    if assignment.problems:
        raise misfit(folder, assignment.problems)
    pieces = assignment.pieces
    copied = sum(
        math.prod(piece.shape) * (2 if SIZES[piece.tensor.dtype] < 4 else 4)
        for piece in pieces.values()
        if piece.transpose or piece.tensor.dtype not in CODES.values()
    )
    size = sum(math.prod(piece.shape) * SIZES[piece.tensor.dtype] for piece in pieces.values())
    return Facts(name, config, shapes, {key: piece.tensor.dtype for key, piece in pieces.items()}, size, copied, **rest)


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


def kv_positions(layer: LayerConfig, positions: int, step: int) -> int:
    """Positions of one sequence that the cache of a layer holds at once: in a sliding window only the last ones, and those of a step."""
    return positions if layer.sliding_window is None else min(positions, layer.sliding_window + step)
