"""A model folder as a `Transformer`: built on the meta device, then filled tensor by tensor.

Where dtype and layout are those of the file, a CPU parameter IS the mapped file (private copy-on-write pages, so it can
be trained): loading then takes almost no memory of its own, and the pages are shared with other processes.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from llmkit.checkpoint.arrays import check_assignment, dtype_name, log_skipped, release
from llmkit.checkpoint.files import AUTO_MAP, Checkpoint, TensorFile, load_config, open_checkpoint
from llmkit.checkpoint.formats.bitsandbytes import open_nf4
from llmkit.checkpoint.formats.llmkit import is_bitsandbytes, quantization, read_quantized
from llmkit.checkpoint.weights import Piece, assign
from llmkit.config import ModelConfig
from llmkit.errors import ConfigError, UsageError
from llmkit.families import family
from llmkit.kernels.format import QuantizedMatrix
from llmkit.model.transformer import Transformer
from llmkit.quant.apply import install, quantize_matrix
from llmkit.quant.schemes import choose

logger = logging.getLogger(__name__)

# Stored dtypes that weights may have.
TORCH_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class LoadReport:
    """What loading did: `mapped_bytes` are used in place from the file, `copied_bytes` were converted, moved or re-laid."""

    dtype: str
    device: str
    num_parameters: int
    mapped_bytes: int
    copied_bytes: int
    skipped: tuple[str, ...]  # stored tensors that the family does not need
    notes: tuple[str, ...]


def load_model(
    folder: str | Path, dtype: str | torch.dtype | None = None, device: str | torch.device = "cpu", quantize: str | None = None
) -> Transformer:
    """The model in a Hugging Face folder.

    dtype: float32, float16 or bfloat16; by default that of the checkpoint. device: cpu, cuda, mps, ...
    quantize: q4, q8 or nf4: what `quant.apply.quantize_model` would make of it, matrix by matrix, so that it is never there as a whole.
    Raises CheckpointError (files that are damaged or do not belong to the config: every name in one message),
    ConfigError (a config that llmkit does not run) or UsageError (unknown dtype or device). Logs what was skipped (as
    info) and that code the folder brings was not run (as a warning, which Python prints unless told otherwise).
    """
    model, report = load_model_with_report(folder, dtype, device, quantize)
    log_report(report)
    return model


def log_report(report: LoadReport) -> None:
    for note in report.notes:
        logger.warning(note)
    log_skipped(report.skipped)


def load_model_with_report(
    folder: str | Path, dtype: str | torch.dtype | None = None, device: str | torch.device = "cpu", quantize: str | None = None
) -> tuple[Transformer, LoadReport]:
    """As `load_model`, with the report of what was mapped, copied and skipped."""
    folder = Path(folder)
    wanted, place = None if dtype is None else parse_dtype(dtype), usable_device(device)
    config = load_config(folder)
    notes = (AUTO_MAP,) if "auto_map" in config.hf else ()
    if quantize is not None and config.hf.get("quantization_config"):
        raise UsageError(
            f"quantize {quantize!r} has no effect: the weights in {folder} are quantized already. "
            "Leave it out (quantize=null takes it out of a recipe)."
        )
    if is_bitsandbytes(config):
        return _load_nf4(folder, config, wanted, place, notes)
    record = quantization(folder, config)
    if record is not None:
        return _load_quantized(folder, wanted, place, notes)

    model = empty_model(config)
    checkpoint = open_checkpoint(folder)
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assignment = assign(checkpoint, family(config.model_type), config, expected)
    check_assignment(folder, assignment)
    if wanted is None:
        wanted = _checkpoint_dtype(config, checkpoint)

    packed = 0 if quantize is None else _quantize(model, assignment.pieces, quantize, wanted, place)
    state, mapped, copied = _realise_all(assignment.pieces, wanted, place)
    model.load_state_dict(state, strict=quantize is None, assign=True)
    if quantize is not None:
        model.to(place)
    count = sum(math.prod(shape) for shape in expected.values())
    said = str(wanted).removeprefix("torch.") if quantize is None else f"{quantize} and {str(wanted).removeprefix('torch.')}"
    report = LoadReport(said, str(place), count, mapped, copied + packed, tuple(assignment.skipped), notes)
    return model, report


def _quantize(model: Transformer, pieces: dict[str, Piece], scheme: str, dtype: torch.dtype, device: torch.device) -> int:
    """Takes the matrices that the scheme stores in codes out of the pieces and puts them into the model (CPU); returns their bytes."""
    packed = 0
    for name in list(pieces):
        choice = choose(scheme, name, pieces[name].shape)
        if choice is None:
            continue
        piece = pieces.pop(name)
        weight, _ = _realise(piece, dtype, torch.device("cpu"))
        matrix = quantize_matrix(weight, choice)
        install(model, {name: matrix}, torch.float32 if device.type == "cpu" else dtype)
        packed += matrix.nbytes
        release(piece.tensor)
    return packed


def _load_quantized(
    folder: Path, dtype: torch.dtype | None, device: torch.device, notes: tuple[str, ...]
) -> tuple[Transformer, LoadReport]:
    """A quantized folder: codes and scales stay as they are; norms and biases, and what flows between layers, have the dtype.

    By default that is float32 on a CPU, and the dtype of the original checkpoint elsewhere.
    """
    config, weights = read_quantized(folder)
    if dtype is None:
        dtype = torch.float32 if device.type == "cpu" else parse_dtype(config.dtype)
    model = empty_model(config)
    matrices = {name: weight for name, weight in weights.items() if isinstance(weight, QuantizedMatrix)}
    install(model, matrices, dtype)
    state = {name: _float_tensor(weight).to(device, dtype) for name, weight in weights.items() if not isinstance(weight, QuantizedMatrix)}
    model.load_state_dict(state, strict=False, assign=True)  # the buffers of quantized modules are there already
    model.to(device)
    mapped = sum(matrix.nbytes for matrix in matrices.values()) if device.type == "cpu" else 0
    copied = sum(tensor.nbytes for tensor in state.values()) + (0 if mapped else sum(matrix.nbytes for matrix in matrices.values()))
    count = sum(tensor.numel() for tensor in state.values()) + sum(rows * columns for rows, columns in (m.shape for m in matrices.values()))
    schemes = ", ".join(sorted({matrix.scheme for matrix in matrices.values()}))
    return model, LoadReport(f"{schemes} and {str(dtype).removeprefix('torch.')}", str(device), count, mapped, copied, (), notes)


def _load_nf4(
    folder: Path, config: ModelConfig, dtype: torch.dtype | None, device: torch.device, notes: tuple[str, ...]
) -> tuple[Transformer, LoadReport]:
    """A folder in the Hugging Face 4-bit layout: codes and scales stay as they are, everything else has the dtype.

    By default that is the dtype of the checkpoint, as for one that is not quantized.
    """
    dtype = parse_dtype(config.dtype) if dtype is None else dtype
    assignment, matrices = open_nf4(folder, config)
    model = empty_model(config)
    install(model, matrices)
    state, mapped, copied = _realise_all(assignment.pieces, dtype, device)
    model.load_state_dict(state, strict=False, assign=True)  # the buffers of quantized modules are there already
    model.to(device)
    packed = sum(matrix.nbytes for matrix in matrices.values())
    mapped, copied = (mapped + packed, copied) if device.type == "cpu" else (mapped, copied + packed)
    count = sum(tensor.numel() for tensor in state.values()) + sum(math.prod(matrix.shape) for matrix in matrices.values())
    kinds = " and ".join(sorted({matrix.kind for matrix in matrices.values()}))
    said = f"{kinds} and {str(dtype).removeprefix('torch.')}"
    return model, LoadReport(said, str(device), count, mapped, copied, tuple(assignment.skipped), notes)


def _float_tensor(array: np.ndarray) -> Tensor:
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if array.dtype == np.uint16 else tensor


def empty_model(config: ModelConfig) -> Transformer:
    """The model on the meta device: shapes without memory."""
    try:
        with torch.device("meta"), NoInit():
            return Transformer(config)
    except RuntimeError as error:  # sizes whose product no machine can address
        raise ConfigError(f"config.json asks for a model that cannot be built: {error}. Is the file damaged?") from error


class NoInit(TorchFunctionMode):
    """Leaves out random initialisation: `normal_` on the meta device would first import torch's compiler, for 3 seconds."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        return None if func in (nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_) else func(*args, **(kwargs or {}))


def as_tensor(stored: TensorFile) -> Tensor:
    """A stored tensor as torch sees it, in the mapped bytes; a copy only where the file does not align it."""
    dtype = TORCH_DTYPES[stored.dtype]
    if not stored.nbytes:
        return torch.empty(stored.shape, dtype=dtype)
    data = stored.data if stored.offset % dtype.itemsize == 0 else bytearray(stored.data)
    return torch.frombuffer(data, dtype=dtype).view(stored.shape)


def _realise_all(pieces: Mapping[str, Piece], dtype: torch.dtype, device: torch.device) -> tuple[dict[str, Tensor], int, int]:
    """All dense parameters, the bytes of them that are the mapped file, and the others."""
    state, mapped, copied = {}, 0, 0
    for name, piece in pieces.items():
        state[name], in_place = _realise(piece, dtype, device)
        if in_place:
            mapped += state[name].nbytes
        else:
            copied += state[name].nbytes
    return state, mapped, copied


def _realise(piece: Piece, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, bool]:
    """The parameter, and whether it is the mapped file itself."""
    source = as_tensor(piece.tensor)
    if piece.expert is not None:
        source = source[piece.expert]
    if piece.transpose:
        source = source.t()
    if piece.rows is not None:
        source = source[slice(*piece.rows)]
    if source.dtype == dtype and device.type == "cpu" and source.is_contiguous():
        return source, piece.tensor.offset % dtype.itemsize == 0
    # One copy does it all: convert, lay out, move.
    return torch.empty(source.shape, dtype=dtype, device=device).copy_(source), False


def _checkpoint_dtype(config: ModelConfig, checkpoint: Checkpoint) -> torch.dtype:
    """The dtype config.json states, as in transformers; without one, that of the largest tensor."""
    if config.hf.get("dtype") is not None or config.hf.get("torch_dtype") is not None:
        return parse_dtype(config.dtype)
    largest = max(checkpoint.values(), key=lambda tensor: tensor.nbytes)
    stored = TORCH_DTYPES.get(largest.dtype, torch.float32)
    return stored if stored in DTYPES.values() else torch.float32


def parse_dtype(dtype: str | torch.dtype) -> torch.dtype:
    return DTYPES[dtype_name(dtype)]


def usable_device(device: str | torch.device) -> torch.device:
    """A device by its name; UsageError where there is none of that name, or torch cannot use it here."""
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError, TypeError) as error:  # AssertionError: a torch built without CUDA
        first = (str(error) or type(error).__name__).splitlines()[0].partition(". ")[0].rstrip(".")  # torch goes on for pages
        raise UsageError(f"device {str(device)!r} cannot be used: {first}. Use cpu, or cuda or mps where the machine has it.") from error
    return place
