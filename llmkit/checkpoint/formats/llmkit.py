"""llmkit's own 4 and 8 bits, mapped as the native kernels take them. No torch.

A folder in this format is a Hugging Face folder whose config.json has, next to the fields of its family,

    "quantization_config": {"quant_method": "llmkit", "version": 1, "codebook": [16 numbers],
                            "tensors": {NAME: {"scheme": "q4", "group": 32, "shape": [N, K]}, ...}}

and whose safetensors files hold `NAME.codes`, `NAME.scales` and `NAME.row_scale` (see `kernels/format.py`) in the place of each NAME.
All names are our parameter names, whatever the family. Every tensor begins at a multiple of 64 bytes; `padding.N` fills the gaps.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmkit.checkpoint.arrays import mismatch, parameter_array, release, stored_array
from llmkit.checkpoint.files import TensorFile
from llmkit.checkpoint.formats.dense import Dense
from llmkit.checkpoint.weights import Piece
from llmkit.config import ModelConfig
from llmkit.errors import CheckpointError
from llmkit.kernels.format import QuantizedMatrix, Weight, check_codebook, stored_shapes
from llmkit.quant.schemes import Choice

if TYPE_CHECKING:
    from llmkit.checkpoint.formats import StoredWeight

METHOD = "llmkit"
VERSION = 1
PADDING = "padding."
NUMPY_NAMES = {"uint8": "U8", "int8": "I8", "float32": "F32"}  # numpy dtype -> safetensors dtype
_PARTS = ("codes", "scales", "row_scale")


@dataclass(frozen=True)
class PackedEntry:
    """How one matrix is packed."""

    scheme: str
    group: int
    shape: tuple[int, int]


@dataclass(frozen=True)
class Quantization:
    """The `quantization_config`, checked."""

    codebook: np.ndarray  # uint8 [16]
    tensors: Mapping[str, PackedEntry]


def parse_record(folder: Path, record: Mapping[str, Any]) -> Quantization:
    """The quantization_config of a folder; CheckpointError where it is of a later version, or damaged."""
    version = record.get("version")
    if type(version) is int and version > VERSION:
        raise CheckpointError(
            f"{folder} was quantized by a newer llmkit (format {version}; this one reads {VERSION}). "
            "Update llmkit, or quantize the model again."
        )

    def damaged(what: str) -> CheckpointError:
        return CheckpointError(f"{folder / 'config.json'}: {what} in quantization_config. Quantize the model again.")

    if type(version) is not int or version != VERSION:
        raise damaged(f"version cannot be {version!r:.80}")
    codebook, tensors = record.get("codebook"), record.get("tensors")
    if not isinstance(codebook, list) or not all(type(entry) is int and 0 <= entry <= 127 for entry in codebook):
        raise damaged(f"codebook is {codebook!r:.120}, not 16 numbers from 0 to 127,")
    table = np.array(codebook, np.uint8)
    check_codebook(table)
    if not isinstance(tensors, dict) or not tensors:
        raise damaged("there are no tensors")
    return Quantization(table, {name: _parse_entry(name, entry, damaged) for name, entry in tensors.items()})


def _parse_entry(name: str, entry: Any, damaged: Callable[[str], CheckpointError]) -> PackedEntry:
    if not isinstance(entry, dict):
        raise damaged(f"the entry of {name!r:.120} is {entry!r:.80}")
    scheme: Any = entry.get("scheme")
    group: Any = entry.get("group")
    shape = entry.get("shape")
    if not isinstance(shape, list) or not all(type(size) is int for size in shape):
        raise damaged(f"the shape of {name!r:.120} is {shape!r:.80}")
    try:
        stored_shapes(scheme, group, tuple(shape))
    except CheckpointError as error:
        raise damaged(f"{name!r:.120} cannot be: {error}") from error
    return PackedEntry(scheme, group, (shape[0], shape[1]))


class Packed(Dense):
    """Codes and scales by our own parameter names; what is not packed stays in the dtype it had."""

    quantized = True
    transformers_reads = False
    copied_bytes = 0
    skipped = ()

    @cached_property
    def quantization(self) -> Quantization:
        return parse_record(self.source.folder, self.record)

    @cached_property
    def _weights(self) -> dict[str, Weight]:
        """All parameters, mapped and checked against config.json."""
        return _read(self.source.folder, self.source.config, dict(self.source.tensors), self.quantization)

    @property
    def storage(self) -> Mapping[str, str | Choice]:
        packed = {name: Choice(entry.scheme, entry.group) for name, entry in self.quantization.tensors.items()}
        return {name: packed[name] if name in packed else self.source.tensors[name].dtype for name in self._weights}

    @property
    def stored_bytes(self) -> int:
        return sum(tensor.nbytes for name, tensor in self.source.tensors.items() if not name.startswith(PADDING))

    def weight(self, name: str) -> StoredWeight:
        return self._weights[name]

    def release(self, name: str) -> None:
        for part in (name, *(f"{name}.{part}" for part in _PARTS)):
            if part in self.source.tensors:
                release(self.source.tensors[part])

    def dtype(self, on_cpu: bool) -> str:
        # The kernels take float32 activations, whatever dtype the weights had before they were packed.
        return "float32" if on_cpu else self.source.config.dtype


def _read(folder: Path, config: ModelConfig, tensors: dict[str, TensorFile], record: Quantization) -> dict[str, Weight]:
    """Every parameter out of the tensors, which are used up; CheckpointError with everything that does not match."""
    params = config.parameters
    problems = [f"surplus: {name!r} in quantization_config" for name in record.tensors if name not in params]
    never = [name for name in record.tensors if name in params and not params[name].quantizable]
    problems += [f"never quantized: {name!r} in quantization_config" for name in never]
    out: dict[str, Weight] = {}
    for name, (_, shape, *_) in params.items():
        entry = record.tensors.get(name)
        if entry is None:
            tensor = _take(tensors, name, ("F32", "F16", "BF16"), shape, problems)
            if tensor is not None:
                out[name] = parameter_array(Piece(tensor, shape))
        elif entry.shape != shape:
            problems.append(f"wrong shape: {name} needs {list(shape)}, quantization_config has {list(entry.shape)}")
            for part in _PARTS:
                tensors.pop(f"{name}.{part}", None)
        else:
            parts = {}
            for part, (dtype, size) in stored_shapes(entry.scheme, entry.group, entry.shape).items():
                tensor = _take(tensors, f"{name}.{part}", (NUMPY_NAMES[dtype.name],), size, problems)
                if tensor is not None:
                    parts[part] = _mapped(tensor, dtype)
            if len(parts) == len(_PARTS):
                codebook = record.codebook if entry.scheme == "q4" else None
                out[name] = QuantizedMatrix(entry.scheme, entry.group, entry.shape, codebook=codebook, **parts)
    problems += [f"surplus: {name!r} {list(tensor.shape)}" for name, tensor in tensors.items() if not re.fullmatch(r"padding\.\d+", name)]
    if problems:
        raise mismatch(folder, problems)
    return out


def _take(
    tensors: dict[str, TensorFile], name: str, dtypes: tuple[str, ...], shape: tuple[int, ...], problems: list[str]
) -> TensorFile | None:
    tensor = tensors.pop(name, None)
    if tensor is None:
        problems.append(f"missing: {name} {list(shape)}")
    elif tensor.dtype not in dtypes or tensor.shape != shape:
        problems.append(f"wrong shape or dtype: {name} is {tensor.dtype} {list(tensor.shape)}, not {' or '.join(dtypes)} {list(shape)}")
    else:
        return tensor
    return None


def _mapped(tensor: TensorFile, dtype: np.dtype) -> np.ndarray:
    if dtype == np.float32:
        return stored_array(tensor)
    return np.frombuffer(tensor.data, dtype).reshape(tensor.shape)
