"""A model folder as a config and arrays, quantized or not, all mapped: what the native backend takes. No torch.

A quantized folder is a Hugging Face folder whose config.json has, beside the fields of its family,

    "quantization_config": {"quant_method": "llmkit", "version": 1, "codebook": [16 numbers],
                            "tensors": {NAME: {"scheme": "q4", "group": 32, "shape": [N, K]}, ...}}

and whose safetensors files hold `NAME.codes`, `NAME.scales` and `NAME.row_scale` (see `kernels/format.py`) in the place of each NAME.
All names are our parameter names, whatever the family. Every tensor begins at a multiple of 64 bytes; `padding.N` fills the gaps.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmkit.checkpoint.arrays import check_assignment, log_skipped, misfit, parameter_array, parameter_shapes, stored_array
from llmkit.checkpoint.files import TensorFile, load_config, open_checkpoint
from llmkit.checkpoint.weights import Piece, assign
from llmkit.config import ModelConfig
from llmkit.errors import CheckpointError
from llmkit.families import family
from llmkit.kernels.format import QuantizedMatrix, Weight, check_codebook, stored_shapes
from llmkit.quant.schemes import quantizable

METHOD = "llmkit"
BITSANDBYTES = "bitsandbytes"  # read by `checkpoint/nf4.py`
VERSION = 1
PADDING = "padding."
NUMPY_NAMES = {"uint8": "U8", "int8": "I8", "float32": "F32"}  # numpy dtype -> safetensors dtype
_PARTS = ("codes", "scales", "row_scale")


@dataclass(frozen=True)
class Stored:
    """How one matrix is stored."""

    scheme: str
    group: int
    shape: tuple[int, int]


@dataclass(frozen=True)
class Quantization:
    """What `quantization_config` says."""

    codebook: np.ndarray  # uint8 [16]
    tensors: Mapping[str, Stored]


def is_bitsandbytes(config: ModelConfig) -> bool:
    """Whether a folder is in bitsandbytes' layout, which PyTorch runs and the native kernels do not."""
    said = config.hf.get("quantization_config")
    return isinstance(said, Mapping) and said.get("quant_method") == BITSANDBYTES


def quantization(folder: Path, config: ModelConfig) -> Quantization | None:
    """How a folder is quantized; None: not at all.

    Raises CheckpointError where it is quantized in a way that this version does not read, or its record is damaged.
    """
    said = config.hf.get("quantization_config")
    if not said:
        return None
    if is_bitsandbytes(config):
        raise CheckpointError(f"{folder} is in bitsandbytes' layout, which this does not read. Use the checkpoint it was made from.")
    method = said.get("quant_method") if isinstance(said, dict) else said
    if not isinstance(said, dict) or method != METHOD:
        raise CheckpointError(f"{folder} is quantized ({method!r:.80}), which llmkit does not read. Use the checkpoint it was made from.")
    version = said.get("version")
    if type(version) is int and version > VERSION:
        raise CheckpointError(
            f"{folder} was quantized by a newer llmkit (format {version}; this one reads {VERSION}). "
            "Update llmkit, or quantize the model again."
        )

    def damaged(what: str) -> CheckpointError:
        return CheckpointError(f"{folder / 'config.json'}: {what} in quantization_config. Quantize the model again.")

    if type(version) is not int or version != VERSION:
        raise damaged(f"version cannot be {version!r:.80}")
    codebook, tensors = said.get("codebook"), said.get("tensors")
    if not isinstance(codebook, list) or not all(type(entry) is int and 0 <= entry <= 127 for entry in codebook):
        raise damaged(f"codebook is {codebook!r:.120}, not 16 numbers from 0 to 127,")
    table = np.array(codebook, np.uint8)
    check_codebook(table)
    if not isinstance(tensors, dict) or not tensors:
        raise damaged("there are no tensors")
    return Quantization(table, {name: _stored(name, entry, damaged) for name, entry in tensors.items()})


def _stored(name: str, entry: Any, damaged: Callable[[str], CheckpointError]) -> Stored:
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
    return Stored(scheme, group, (shape[0], shape[1]))


def read_quantized(folder: str | Path) -> tuple[ModelConfig, dict[str, Weight]]:
    """The config of a folder and its parameters by our names, quantized ones as `QuantizedMatrix`, others as they are stored.

    Floats are float32, float16, or bfloat16 as its bits in uint16. All is mapped in place, except what is stored transposed (GPT-2) or
    in another dtype. Works for every folder, quantized or not. Raises CheckpointError, naming every tensor that does not fit.
    """
    folder = Path(folder)
    config = load_config(folder)
    record = quantization(folder, config)
    if record is None:
        return config, {name: parameter_array(piece) for name, piece in open_parameters(folder, config).items()}
    return config, _read(folder, config, record)


def open_parameters(folder: Path, config: ModelConfig) -> dict[str, Piece]:
    """Where each parameter of an unquantized folder lies, checked and not yet read, in the order of the model."""
    shapes = parameter_shapes(config)
    assignment = assign(open_checkpoint(folder), family(config.model_type), config, shapes)
    check_assignment(folder, assignment)
    log_skipped(assignment.skipped)
    return {name: assignment.pieces[name] for name in shapes}


def _read(folder: Path, config: ModelConfig, record: Quantization) -> dict[str, Weight]:
    shapes = parameter_shapes(config)
    checkpoint = dict(open_checkpoint(folder))
    problems = [f"surplus: {name!r} in quantization_config" for name in record.tensors if name not in shapes]
    problems += [f"never quantized: {name!r} in quantization_config" for name in record.tensors if name in shapes and not quantizable(name)]
    out: dict[str, Weight] = {}
    for name, shape in shapes.items():
        entry = record.tensors.get(name)
        if entry is None:
            tensor = _take(checkpoint, name, ("F32", "F16", "BF16"), shape, problems)
            if tensor is not None:
                out[name] = parameter_array(Piece(tensor, shape))
        elif entry.shape != shape:
            problems.append(f"wrong shape: {name} needs {list(shape)}, quantization_config has {list(entry.shape)}")
            for part in _PARTS:
                checkpoint.pop(f"{name}.{part}", None)
        else:
            parts = {}
            for part, (dtype, size) in stored_shapes(entry.scheme, entry.group, entry.shape).items():
                tensor = _take(checkpoint, f"{name}.{part}", (NUMPY_NAMES[dtype.name],), size, problems)
                if tensor is not None:
                    parts[part] = _raw(tensor, dtype)
            if len(parts) == len(_PARTS):
                codebook = record.codebook if entry.scheme == "q4" else None
                out[name] = QuantizedMatrix(entry.scheme, entry.group, entry.shape, codebook=codebook, **parts)
    problems += [
        f"surplus: {name!r} {list(tensor.shape)}" for name, tensor in checkpoint.items() if not re.fullmatch(r"padding\.\d+", name)
    ]
    if problems:
        raise misfit(folder, problems)
    return out


def _take(
    checkpoint: dict[str, TensorFile], name: str, dtypes: tuple[str, ...], shape: tuple[int, ...], problems: list[str]
) -> TensorFile | None:
    tensor = checkpoint.pop(name, None)
    if tensor is None:
        problems.append(f"missing: {name} {list(shape)}")
    elif tensor.dtype not in dtypes or tensor.shape != shape:
        problems.append(f"wrong shape or dtype: {name} is {tensor.dtype} {list(tensor.shape)}, not {' or '.join(dtypes)} {list(shape)}")
    else:
        return tensor
    return None


def _raw(tensor: TensorFile, dtype: np.dtype) -> np.ndarray:
    if dtype == np.float32:
        return stored_array(tensor)
    return np.frombuffer(tensor.data, dtype).reshape(tensor.shape)
