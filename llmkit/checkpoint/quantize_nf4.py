"""A checkpoint written in the Hugging Face 4-bit layout (see `formats/bitsandbytes.py`), some rows at a time."""

from __future__ import annotations

import json
import logging
import math
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmkit.checkpoint.arrays import DTYPES, converted, parameter_array, release
from llmkit.checkpoint.files import sync
from llmkit.checkpoint.formats.bitsandbytes import METHOD, STATE
from llmkit.checkpoint.weights import Piece, stored_layout
from llmkit.config import ModelConfig
from llmkit.errors import CheckpointError
from llmkit.families import family
from llmkit.quant.nf4 import BLOCK, NESTED_BLOCK, Quantizer
from llmkit.quant.schemes import Choice

logger = logging.getLogger(__name__)

_CHUNK = 1 << 22  # weights quantized at a time
_ALIGNMENT = 64  # bytes; a matrix and what belongs to it take a multiple of it, so that every float is aligned
_CODES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}  # dtype -> safetensors dtype

Progress = Callable[[int, int], None]  # weights done, weights in all


def record(dtype: str) -> dict[str, Any]:
    """The quantization_config, as `BitsAndBytesConfig.to_dict` gives it; products are computed in the dtype of the checkpoint."""
    return {
        "quant_method": METHOD,
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": None,
        "llm_int8_threshold": 6.0,
        "load_in_4bit": True,
        "load_in_8bit": False,
    }


@dataclass(frozen=True)
class _Tensor:
    """One tensor of the family's layout: our parameters, one below the other, as arrays [out, in] that are read when they are asked for."""

    name: str
    pieces: tuple[Piece, ...]
    transpose: bool
    packed: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """As our parameters have it, [out, in]."""
        return sum(piece.shape[0] for piece in self.pieces), *self.pieces[0].shape[1:]

    @property
    def dtype(self) -> str:
        """Of the numbers: that of the checkpoint, or what holds it exactly."""
        return {"BF16": "bfloat16", "F16": "float16", "F8_E4M3": "float16", "F8_E5M2": "float16"}.get(
            self.pieces[0].tensor.dtype, "float32"
        )

    def chunks(self, rows: int) -> Iterator[np.ndarray]:
        """The rows, so many at a time, across the bounds of the parameters."""
        arrays = [converted(parameter_array(piece), self.dtype) for piece in self.pieces]
        left: list[np.ndarray] = []
        for array in arrays:
            start = 0
            while start < len(array):
                take = min(rows - sum(map(len, left)), len(array) - start)
                left.append(array[start : start + take])
                start += take
                if sum(map(len, left)) == rows:
                    yield left[0] if len(left) == 1 else np.concatenate(left)
                    left = []
        if left:
            yield left[0] if len(left) == 1 else np.concatenate(left)

    def release(self) -> None:
        for piece in self.pieces:
            release(piece.tensor)


def write_nf4(
    path: Path,
    config: ModelConfig,
    pieces: Mapping[str, Piece],
    choices: Mapping[str, Choice | None],
    threads: int | None,
    progress: Progress | None,
) -> int:
    """The safetensors file, in one pass over the checkpoint; returns the bytes of its tensors."""
    if config.sparse:
        logger.warning("The experts stay in %s, as in transformers' 4-bit layout; --scheme q4 quantizes them too.", config.dtype)
    tensors = [
        _Tensor(stored.name, tuple(pieces[name] for name in stored.ours), stored.transpose, choices[stored.ours[0]] is not None)
        for stored in stored_layout(pieces, family(config.model_type))
    ]
    if narrow := {tensor.shape[1] for tensor in tensors if tensor.packed and tensor.shape[1] % BLOCK and not tensor.shape[1] % 16}:
        logger.warning(
            "Rows of %s weights are not whole blocks of %d, and bitsandbytes 0.50 misreads them on CPUs with AVX-512; llmkit does not.",
            " and ".join(map(str, sorted(narrow))),
            BLOCK,
        )
    # Packed ones first, each a multiple of 64 bytes; then floats, the wider ones first: all are aligned without gaps.
    tensors.sort(key=lambda tensor: (not tensor.packed, -DTYPES[tensor.dtype].itemsize))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        for name, (dtype, shape, size) in _entries(tensor).items():
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
            end += size
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-(len(encoded) + 8) % _ALIGNMENT)
    done, total = 0, sum(math.prod(tensor.shape) for tensor in tensors)
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        with path.open("wb") as file:
            file.write(struct.pack("<Q", len(encoded)) + encoded)
            for tensor in tensors:
                for data, count in _packed(tensor) if tensor.packed else _plain(tensor):
                    if data is not None:
                        file.write(data)
                    done += count
                    if progress is not None and count:
                        progress(done, total)
                tensor.release()
            sync(file)
    finally:
        torch.set_num_threads(before)
    return end


_Chunk = tuple[memoryview | bytes | None, int]  # what to write next, and the weights done then


def _plain(tensor: _Tensor) -> Iterator[_Chunk]:
    if tensor.transpose:
        whole = np.concatenate(list(tensor.chunks(tensor.shape[0])))
        yield _bytes(whole.T), whole.size
        return
    for chunk in tensor.chunks(max(1, _CHUNK // math.prod(tensor.shape[1:]))):
        yield _bytes(chunk), chunk.size


def _packed(tensor: _Tensor) -> Iterator[_Chunk]:
    """A matrix and what belongs to it, in the order of `_entries`."""
    rows, columns = tensor.shape
    quantizer = Quantizer()
    unit = BLOCK // math.gcd(BLOCK, columns)  # rows that are whole blocks
    for chunk in tensor.chunks(max(1, _CHUNK // columns // unit) * unit):
        part = torch.from_numpy(chunk)
        try:
            quantizer.add(part.view(torch.bfloat16) if part.dtype == torch.uint16 else part)
        except ValueError as error:
            raise CheckpointError(f"{tensor.name} cannot be quantized: {error}. Is the checkpoint damaged?") from error
        yield None, chunk.size
    matrix = quantizer.matrix((rows, columns))
    assert matrix.nested is not None
    for array in (matrix.nested.absmax, matrix.nested.map, matrix.values, matrix.codes, matrix.absmax):
        yield _bytes(array.numpy()), 0
    state = _state(tensor, float(matrix.nested.offset))
    yield state + b" " * (_entries(tensor)[f"{tensor.name}.{STATE}nf4"][2] - len(state)), 0


def _state(tensor: _Tensor, offset: float) -> bytes:
    said = {"quant_type": "nf4", "blocksize": BLOCK, "dtype": tensor.dtype, "shape": list(tensor.shape), "nested_blocksize": NESTED_BLOCK}
    return json.dumps({**said, "nested_dtype": "float32", "nested_offset": offset}).encode()


def _entries(tensor: _Tensor) -> dict[str, tuple[str, tuple[int, ...], int]]:
    """Name, safetensors dtype, shape and bytes of all that is stored of a tensor."""
    name, dtype, count = tensor.name, _CODES[tensor.dtype], math.prod(tensor.shape)
    if not tensor.packed:
        shape = tensor.shape[::-1] if tensor.transpose else tensor.shape
        return {name: (dtype, shape, count * DTYPES[tensor.dtype].itemsize)}
    blocks, half = -(-count // BLOCK), -(-count // 2)
    nested = -(-blocks // NESTED_BLOCK)
    floats, rest = 4 * (nested + 256 + 16), half + blocks
    state = len(_state(tensor, 0.0)) + 24  # a float has at most 24 characters; JSON may end in spaces
    state += -(floats + rest + state) % _ALIGNMENT
    return {
        f"{name}.nested_absmax": ("F32", (nested,), 4 * nested),
        f"{name}.nested_quant_map": ("F32", (256,), 1024),
        f"{name}.quant_map": ("F32", (16,), 64),
        name: ("U8", (half, 1), half),
        f"{name}.absmax": ("U8", (blocks,), blocks),
        f"{name}.{STATE}nf4": ("U8", (state,), state),
    }


def _bytes(array: np.ndarray) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
