"""The parameters of a checkpoint as numpy arrays, mapped in place where their layout allows it, and their fingerprint. No torch."""

from __future__ import annotations

import logging
import mmap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from llmkit.checkpoint.files import TensorFile
from llmkit.checkpoint.weights import EMBEDDING, Assignment, Piece
from llmkit.config import ModelConfig
from llmkit.errors import CheckpointError, UsageError
from llmkit.kernels.format import widen

logger = logging.getLogger(__name__)

# Stored dtypes that weights may have, as numpy reads them; bfloat16 and the 8-bit floats as their bits.
NUMPY_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "F8_E4M3": "u1", "F8_E5M2": "u1"}
# What models run in.
DTYPES: dict[str, np.dtype] = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": np.dtype(np.uint16)}
MAX_LISTED = 1000  # problems in one message


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter of the `Transformer` of a config, in its order: what a checkpoint must give."""
    return {name: param.shape for name, param in config.parameters.items()}


def stored_array(tensor: TensorFile) -> np.ndarray:
    """A stored tensor in its own dtype (bfloat16 as uint16), in the mapped bytes; a copy only where the file does not align it."""
    dtype = np.dtype(NUMPY_DTYPES[tensor.dtype])
    data = tensor.data if tensor.offset % dtype.itemsize == 0 else bytearray(tensor.data)
    return np.frombuffer(data, dtype).reshape(tensor.shape)


def parameter_array(piece: Piece) -> np.ndarray:
    """A parameter in float32, float16 or (uint16) bfloat16, contiguous; mapped unless it is stored transposed or in another dtype."""
    return _runnable(parameter_view(piece), piece.tensor.dtype)


def parameter_view(piece: Piece) -> np.ndarray:
    """A parameter in the mapped bytes, in the dtype and with the strides in which it is stored."""
    array = stored_array(piece.tensor)
    if piece.expert is not None:
        array = array[piece.expert]
    if piece.transpose:
        array = array.T
    if piece.rows is not None:
        array = array[slice(*piece.rows)]
    return array


def parameter_sample(piece: Piece, count: int) -> np.ndarray:
    """The first `count` numbers of the first, the middle and the last row, as `parameter_array` has them: only their pages are read."""
    array = parameter_view(piece)
    if array.ndim > 1 and len(array):
        array = array[[0, len(array) // 2, -1]]
    return _runnable(array[..., :count], piece.tensor.dtype)


def _runnable(array: np.ndarray, dtype: str) -> np.ndarray:
    array = np.ascontiguousarray(array)
    if dtype == "F64":
        return array.astype(np.float32)
    if dtype == "F8_E5M2":  # the upper half of a float16
        return (array.astype(np.uint16) << 8).view(np.float16)
    return _e4m3()[array] if dtype == "F8_E4M3" else array


def dtype_name(dtype: object) -> str:
    """float32, float16 or bfloat16, from that name or torch's dtype; UsageError for any other."""
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise UsageError(f"dtype {name!r} is unknown. Use one of {', '.join(DTYPES)}.")
    return name


def converted(array: np.ndarray, dtype: str, piece: int = 1 << 20) -> np.ndarray:
    """An array of `parameter_array` in another of these dtypes, rounded to the nearest, ties to even; itself where it is that already.

    Works through `piece` numbers at a time, so that no second copy of a large matrix is made on the way.
    """
    if array.dtype == DTYPES[dtype]:
        return array
    out = np.empty(array.shape, DTYPES[dtype])
    source, target = array.reshape(-1), out.reshape(-1)
    with np.errstate(over="ignore"):  # beyond float16: infinite, as in torch
        for start in range(0, source.size, piece):
            part = widen(source[start : start + piece])
            target[start : start + piece] = _bfloat16(part) if dtype == "bfloat16" else part
    return out


def _bfloat16(array: np.ndarray) -> np.ndarray:
    """The bits of float32 numbers as bfloat16, uint16: their upper half, rounded. NaN stays NaN."""
    bits = array.view(np.uint32)
    rounded = (bits + (0x7FFF + (bits >> 16 & 1))) >> 16
    return np.where(np.isnan(array), bits >> 16 | 0x40, rounded).astype(np.uint16)


@cache
def _e4m3() -> np.ndarray:
    """The 256 numbers of the 8-bit float with 4 bits of exponent and no infinities (arXiv:2209.05433), float16."""
    bits = np.arange(256)
    exponent, fraction = bits >> 3 & 15, (bits & 7) / 8
    values = np.where(exponent == 0, fraction * 2.0**-6, (1 + fraction) * 2.0 ** (exponent - 7.0))
    values[bits & 127 == 127] = np.nan
    return np.where(bits < 128, values, -values).astype(np.float16)


def release(tensor: TensorFile) -> None:
    """Lets go of a tensor's pages: they are read again where they are needed. Keeps a pass over a large model small."""
    mapped = tensor.data.obj
    if isinstance(mapped, mmap.mmap) and hasattr(mapped, "madvise"):  # not on Windows
        begin = -(-tensor.offset // mmap.PAGESIZE) * mmap.PAGESIZE
        length = (tensor.offset + tensor.nbytes - begin) // mmap.PAGESIZE * mmap.PAGESIZE
        if length > 0:
            mapped.madvise(mmap.MADV_DONTNEED, begin, length)


def log_skipped(names: Sequence[str]) -> None:
    if names:
        logger.info("%d stored tensors are not needed and were skipped: %s", len(names), ", ".join(names))


def check_assignment(folder: Path, assignment: Assignment) -> None:
    """One CheckpointError with everything that does not match, as far as names, shapes and dtypes tell: no weight is read."""
    problems = list(assignment.problems)
    for piece in assignment.pieces.values():
        if piece.tensor.dtype not in NUMPY_DTYPES:
            problems.append(f"wrong dtype: {piece.tensor.name!r} is {piece.tensor.dtype}, weights are {', '.join(NUMPY_DTYPES)}")
    if problems:
        raise mismatch(folder, problems)


def check_tied_head(folder: Path, assignment: Assignment) -> None:
    """CheckpointError where a head is stored although it is tied, and differs from the embedding. Reads both."""
    head, embedding = assignment.tied_head, assignment.pieces.get(EMBEDDING)
    if head is not None and embedding is not None and not _equal(head, embedding.tensor):
        raise mismatch(
            folder, [f"not tied: {head.name!r} differs from {embedding.tensor.name!r}, but config.json has tie_word_embeddings true"]
        )


def is_mapped(array: np.ndarray) -> bool:
    """Whether the numbers of an array are the mapped file itself, not a copy."""
    base: object = array
    while isinstance(base, np.ndarray):
        base = base.base
    return isinstance(base, memoryview) and isinstance(base.obj, mmap.mmap)


def mismatch(folder: Path, problems: list[str]) -> CheckpointError:
    """The error that names all tensors that do not match a config."""
    if len(problems) > MAX_LISTED:  # a damaged number of layers, not names to go through
        problems = [*problems[:MAX_LISTED], f"and {len(problems) - MAX_LISTED} more"]
    listed = "\n  ".join(problems)
    return CheckpointError(
        f"The tensors in {folder} do not fit its config.json:\n  {listed}\n"
        "Do both files belong to one model? Download or copy the folder again, or correct config.json."
    )


def _equal(head: TensorFile, embedding: TensorFile) -> bool:
    if head.shape != embedding.shape or head.dtype not in NUMPY_DTYPES:
        return False
    if head.dtype == embedding.dtype:  # nothing is copied, and a NaN equals itself
        return bool(np.array_equal(np.frombuffer(head.data, np.uint8), np.frombuffer(embedding.data, np.uint8)))
    return bool(np.array_equal(_double(head), _double(embedding)))


def _double(tensor: TensorFile) -> np.ndarray:
    if tensor.dtype == "F64":
        return stored_array(tensor)
    return widen(parameter_array(Piece(tensor, tensor.shape))).astype(np.float64)


# --- fingerprints --------------------------------------------------------------------------------------------------------------------
#
# Whether an adapter was trained on this model, from a sample of its weights: a few numbers of every parameter, rounded to bfloat16, are
# hashed with all names and shapes. A copy of a float32 checkpoint in bfloat16 has the same fingerprint, a fine-tuned sibling another one.
# Rounding to float16 on the way can change the last bit, so a fingerprint remembers the dtype, and of a float16 copy nothing is claimed.
# A quantized folder carries that of the checkpoint it was made from.

_SAMPLE = 64  # numbers of the first, the middle and the last row of each parameter


@dataclass(frozen=True)
class Fingerprint:
    """dtype: float32, float16 or bfloat16, of most of the sample."""

    digest: str
    dtype: str

    def differs(self, other: Fingerprint) -> bool:
        """Whether both are proven to be of different weights."""
        halves = (self.dtype == "float16") + (other.dtype == "float16")
        return self.digest != other.digest and halves != 1

    def to_dict(self) -> dict[str, str]:
        return asdict(self)


def parse_fingerprint(found: Any) -> Fingerprint | None:
    """What `to_dict` wrote; None for anything else."""
    if not isinstance(found, Mapping) or set(found) != {"digest", "dtype"}:
        return None
    digest, dtype = found["digest"], found["dtype"]
    return Fingerprint(digest, dtype) if isinstance(digest, str) and isinstance(dtype, str) and dtype in DTYPES else None


def weights_fingerprint(pieces: Mapping[str, Piece]) -> Fingerprint:
    """Return the fingerprint of parameters by our names, as `formats.dense.Dense.pieces` has them. Milliseconds on a mapped checkpoint."""
    digest, sizes = blake2b(digest_size=16), dict.fromkeys(DTYPES, 0)
    names = {dtype: name for name, dtype in DTYPES.items()}
    for name in sorted(pieces):
        piece = pieces[name]
        sample = parameter_sample(piece, _SAMPLE)
        sizes[names[sample.dtype]] += sample.size
        digest.update(repr((name, piece.shape)).encode())
        digest.update(np.ascontiguousarray(converted(sample, "bfloat16"), "<u2").tobytes())
    return Fingerprint(digest.hexdigest(), max(sizes, key=lambda name: sizes[name]))


def text_fingerprint(text: str) -> str:
    """Of a chat template, whatever the spaces around it."""
    return blake2b(text.strip().encode(), digest_size=16).hexdigest()
