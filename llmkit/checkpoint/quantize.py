"""A checkpoint quantized from folder to folder, a block of rows at a time: the model is never in memory as a whole."""

from __future__ import annotations

import json
import math
import os
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmkit.checkpoint.arrays import parameter_array, release
from llmkit.checkpoint.files import SINGLE, check_target, copy_side_files, replacing, sync, write_json
from llmkit.checkpoint.formats import FINGERPRINT, RECORD
from llmkit.checkpoint.formats.dense import Dense
from llmkit.checkpoint.formats.llmkit import METHOD, NUMPY_NAMES, PADDING, VERSION
from llmkit.checkpoint.quantize_nf4 import record as nf4_record
from llmkit.checkpoint.quantize_nf4 import write_nf4
from llmkit.checkpoint.source import ModelSource
from llmkit.checkpoint.weights import Piece
from llmkit.errors import CheckpointError, UsageError
from llmkit.kernels.format import CODEBOOK, PANEL, QuantizedMatrix, stored_shapes, widen
from llmkit.quant.methods import round_to_nearest
from llmkit.quant.schemes import DEFAULT, NF4, Choice, check_scheme, choose

ALIGNMENT = 64  # bytes: a cache line, and the widest vector register
_BLOCK = 1 << 21  # weights that one thread quantizes at a time

Progress = Callable[[int, int], None]  # weights done, weights in all


@dataclass(frozen=True)
class QuantizeReport:
    """What was written."""

    folder: Path
    scheme: str
    weights: int  # all parameters of the model
    bytes_before: int  # of its tensors, as they were stored
    bytes_after: int  # of its tensors, with padding of matrices and the gaps in the file
    seconds: float

    @property
    def bits_per_weight(self) -> float:
        """Over the whole model: embeddings, head and norms included."""
        return 8 * self.bytes_after / self.weights


def quantize_folder(
    model: str | Path | ModelSource,
    target: str | Path,
    scheme: str = DEFAULT,
    *,
    overwrite: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> QuantizeReport:
    """Write a model as a quantized folder, which `load_model` and, but for nf4, the native backend map.

    model: an opened source, a folder or a hub id.
    scheme: q4 or q8 (see `quant/schemes.py`), or nf4 in the Hugging Face layout (see `checkpoint/formats/bitsandbytes.py`).
    threads: torch's choice by default; the result is the same for any number.
    Raises UsageError for a target that may not be replaced or an unknown scheme, CheckpointError for a source that is damaged or
    quantized already, or where writing fails (nothing is left behind).
    """
    began = time.perf_counter()
    check_scheme(scheme)
    opened = ModelSource.open(model)
    source = opened.folder
    # os.path, because pathlib raises where there is no such ~user, where links go round in a circle, or a name is too long.
    folder = Path(os.path.realpath(os.path.expanduser(target)))
    real = Path(os.path.realpath(source))
    if folder in (real, *real.parents):  # replacing a folder removes what is in it
        raise UsageError(f"{source} would be replaced while it is read. Choose another output folder.")
    check_target(folder, overwrite)
    if opened.quantized:
        raise CheckpointError(f"{source} is quantized already, and quantizing again only loses more. Use the checkpoint it was made from.")
    assert isinstance(opened.format, Dense)
    config, pieces = opened.config, opened.format.pieces
    choices = {name: choose(scheme, config.parameters[name]) for name in pieces}
    # The code that auto_map points to is not part of what we read, and so not of what we write.
    hf = {name: value for name, value in config.hf.items() if name != "auto_map"}
    with replacing(folder) as partial:
        copy_side_files(source, partial)
        if scheme == NF4:
            record = nf4_record(config.dtype)
            size = write_nf4(partial / SINGLE, config, pieces, choices, threads, progress)
        else:
            record = _record(pieces, choices)
            size = _write(partial / SINGLE, pieces, choices, threads, progress)
        assert opened.fingerprint is not None  # numbers always have one
        write_json(partial / "config.json", {**hf, FINGERPRINT: opened.fingerprint.to_dict(), RECORD: record})
    before = {(piece.tensor.file, piece.tensor.name): piece.tensor.nbytes for piece in pieces.values()}
    weights = sum(math.prod(piece.shape) for piece in pieces.values())
    return QuantizeReport(folder, scheme, weights, sum(before.values()), size, time.perf_counter() - began)


def _record(pieces: Mapping[str, Piece], choices: Mapping[str, Choice | None]) -> dict[str, Any]:
    """The quantization_config of our own layout."""
    tensors = {
        name: {"scheme": choice.scheme, "group": choice.group, "shape": list(pieces[name].shape)}
        for name, choice in choices.items()
        if choice is not None
    }
    return {"quant_method": METHOD, "version": VERSION, "codebook": list(CODEBOOK), "tensors": tensors}


@dataclass(frozen=True)
class _Entry:
    """A tensor of the file to be."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


def _layout(pieces: Mapping[str, Piece], choices: Mapping[str, Choice | None]) -> list[_Entry]:
    """All tensors in their order in the file, with fillers so that each begins at a multiple of `ALIGNMENT`."""
    entries: list[_Entry] = []
    end = fillers = 0

    def add(name: str, dtype: np.dtype, shape: tuple[int, ...]) -> None:
        nonlocal end, fillers
        if gap := -end % ALIGNMENT:
            entries.append(_Entry(f"{PADDING}{fillers}", "U8", (gap,), gap))
            fillers, end = fillers + 1, end + gap
        entries.append(_Entry(name, NUMPY_NAMES[dtype.name], shape, math.prod(shape) * dtype.itemsize))
        end += entries[-1].nbytes

    for name, piece in pieces.items():
        choice = choices[name]
        if choice is None:
            add(name, np.dtype(np.float32), piece.shape)
        else:
            for part, (dtype, shape) in stored_shapes(choice.scheme, choice.group, (piece.shape[0], piece.shape[1])).items():
                add(f"{name}.{part}", dtype, shape)
    return entries


def _write(
    path: Path, pieces: Mapping[str, Piece], choices: Mapping[str, Choice | None], threads: int | None, progress: Progress | None
) -> int:
    """The safetensors file, in one pass; returns the bytes of its tensors."""
    entries = _layout(pieces, choices)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in entries:
        header[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [end, end + entry.nbytes]}
        end += entry.nbytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-(len(encoded) + 8) % ALIGNMENT)
    done, total = 0, sum(math.prod(piece.shape) for piece in pieces.values())
    before = torch.get_num_threads()
    # Each thread works on rows of its own: one core each, for PyTorch too.
    with path.open("wb") as file, ThreadPoolExecutor(threads or before, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        try:
            for name, piece in pieces.items():
                for chunk, starts, count in _chunks(pool, name, piece, choices[name]):
                    if starts:
                        file.write(bytes(-file.tell() % ALIGNMENT))
                    file.write(chunk)
                    done += count
                    if progress is not None:
                        progress(done, total)
                release(piece.tensor)
        finally:
            torch.set_num_threads(before)
            pool.shutdown(cancel_futures=True)
        sync(file)
    return end


_Chunk = tuple[memoryview, bool, int]  # bytes to write next, whether a tensor begins with them, and the weights done then


def _chunks(pool: ThreadPoolExecutor, name: str, piece: Piece, choice: Choice | None) -> Iterator[_Chunk]:
    """The bytes of a parameter in the order of the file: codes block by block, then the small rest."""
    array = parameter_array(piece)
    if choice is None:
        yield _bytes(widen(array)), True, array.size
        return

    def quantize(start: int) -> QuantizedMatrix:
        rows = torch.from_numpy(array[start : start + step])
        try:
            return round_to_nearest(rows.view(torch.bfloat16) if rows.dtype == torch.uint16 else rows, choice.scheme, choice.group)
        except ValueError as error:
            raise CheckpointError(f"{name} cannot be quantized: {error}. Is the checkpoint damaged?") from error

    # Panels of rows lie one after the other, so a matrix is its blocks of rows put together.
    step = max(1, _BLOCK // array.shape[1] // PANEL) * PANEL
    scales: list[np.ndarray] = []
    row_scales: list[np.ndarray] = []
    for matrix in pool.map(quantize, range(0, len(array), step)):
        yield _bytes(matrix.codes), not scales, matrix.shape[0] * matrix.shape[1]
        scales.append(matrix.scales)
        row_scales.append(matrix.row_scale)
    yield _bytes(np.concatenate(scales)), True, 0
    yield _bytes(np.concatenate(row_scales)), True, 0


def _bytes(array: np.ndarray) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
