"""A model folder as a `Transformer`: built on the meta device, then filled tensor by tensor.

Where dtype and layout are those of the file, a CPU parameter IS the mapped file (private copy-on-write pages, so it can
be trained): loading then takes almost no memory of its own, and the pages are shared with other processes.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from llmkit.checkpoint.arrays import dtype_name, is_mapped
from llmkit.checkpoint.files import AUTO_MAP
from llmkit.checkpoint.source import ModelSource
from llmkit.config import ModelConfig, Param
from llmkit.errors import ConfigError, UsageError
from llmkit.model.transformer import Transformer

if TYPE_CHECKING:
    from llmkit.kernels.format import QuantizedMatrix
    from llmkit.quant.nf4 import Nf4Matrix

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
    model: str | Path | ModelSource,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device = "cpu",
    quantize: str | None = None,
) -> Transformer:
    """Load a model for PyTorch.

    model: an opened source, a folder or a hub id.
    dtype: float32, float16 or bfloat16; by default that of the checkpoint. device: cpu, cuda, mps, ...
    quantize: q4, q8 or nf4, matrix by matrix as they are read, so that the dense model is never in memory as a whole.
    Raises CheckpointError (files that are damaged or do not belong to the config: every name in one message),
    ConfigError (a config that llmkit does not run) or UsageError (unknown dtype or device). Logs what was skipped (as
    info) and that code the folder brings was not run (as a warning, which Python prints by default).
    """
    net, report = load_model_with_report(model, dtype, device, quantize)
    log_report(report)
    return net


def log_report(report: LoadReport) -> None:
    for note in report.notes:
        logger.warning(note)


def load_model_with_report(
    model: str | Path | ModelSource,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device = "cpu",
    quantize: str | None = None,
) -> tuple[Transformer, LoadReport]:
    """As `load_model`, with the report of what was mapped, copied and skipped."""
    wanted, place = None if dtype is None else parse_dtype(dtype), usable_device(device)
    source = ModelSource.open(model)
    weights = source.format
    on_cpu = place.type == "cpu"
    if quantize is not None and weights.quantized:
        raise UsageError(
            f"quantize {quantize!r} has no effect: the weights in {source.folder} are quantized already. "
            "Leave it out (quantize=null takes it out of a recipe)."
        )
    net = empty_model(source.config)
    wanted = parse_dtype(weights.dtype(on_cpu)) if wanted is None else wanted
    # Rows of an embedding in codes: what the kernels compute in where they made the codes, else the dtype of the model.
    rows = torch.float32 if quantize is not None and on_cpu else wanted
    state: dict[str, Tensor] = {}
    schemes: set[str] = set()
    mapped = copied = 0
    for name, param in source.config.parameters.items():
        weight = weights.weight(name)
        made = None if quantize is None or not isinstance(weight, np.ndarray) else _quantized(weight, param, quantize, wanted)
        if made is not None:
            weight = made
            weights.release(name)
        if isinstance(weight, np.ndarray):
            parameter, in_place = _parameter(weight, wanted, place)
            state[name], nbytes = parameter, parameter.nbytes
        else:
            from llmkit.quant.apply import install

            install(net, {name: weight}, rows)
            schemes.add(quantize or weight.scheme)
            in_place, nbytes = on_cpu and made is None, weight.nbytes  # codes are mapped like any array, unless they were made here
        mapped, copied = (mapped + nbytes, copied) if in_place else (mapped, copied + nbytes)
    net.load_state_dict(state, strict=not schemes, assign=True)  # the buffers of quantized modules are there already
    net.to(place)
    count = sum(map(math.prod, source.shapes.values()))
    stored = " and ".join(part for part in (", ".join(sorted(schemes)), str(wanted).removeprefix("torch.")) if part)
    notes = (AUTO_MAP,) if "auto_map" in source.config.hf else ()
    return net, LoadReport(stored, str(place), count, mapped, copied, weights.skipped, notes)


def _quantized(weight: np.ndarray, param: Param, scheme: str, dtype: torch.dtype) -> QuantizedMatrix | Nf4Matrix | None:
    """The matrix in codes; None where the scheme leaves this parameter as it is."""
    from llmkit.quant.apply import quantize_matrix  # a dense model does not wait for what quantizes
    from llmkit.quant.schemes import choose

    choice = choose(scheme, param)
    return None if choice is None else quantize_matrix(_parameter(weight, dtype, torch.device("cpu"))[0], choice)


def _parameter(weight: np.ndarray, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, bool]:
    """The parameter, and whether it is the mapped file itself. weight: as `Format.weight` gives it, bfloat16 as uint16."""
    tensor = torch.from_numpy(weight)
    if weight.dtype == np.uint16:
        tensor = tensor.view(torch.bfloat16)
    if tensor.dtype == dtype and device.type == "cpu":
        return tensor, is_mapped(weight)
    return torch.empty(tensor.shape, dtype=dtype, device=device).copy_(tensor), False  # converts and moves in one copy


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
