"""Which backend runs a model, and its weights read for it: the native kernels on a CPU, else PyTorch.

torch is imported only where PyTorch runs the model, or may be needed to find a GPU.
"""

from __future__ import annotations

import filecmp
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from llmkit.checkpoint.arrays import DTYPES, converted, dtype_name
from llmkit.checkpoint.files import AUTO_MAP
from llmkit.checkpoint.source import ModelSource
from llmkit.compat import default_device
from llmkit.errors import DoesNotFit, UsageError, out_of_memory
from llmkit.kernels import NativeBackend, native_problem
from llmkit.kernels.format import QuantizedMatrix, Weight

if TYPE_CHECKING:
    from llmkit.engine.backend import Backend
    from llmkit.lora.adapter import Adapter

logger = logging.getLogger(__name__)

KV_BITS = (32, 16, 8)
SPECULATE = ("auto", "ngram", "off")
MAX_THREADS = 1024  # of the native kernels' pool


@dataclass(frozen=True)
class Options:
    """How a model is to be run, by the names of `llmkit.load`; None leaves the choice to the backend."""

    dtype: str | None = None
    device: str | None = None
    threads: int | None = None
    kv_bits: int | None = None

    @classmethod
    def checked(cls, dtype: str | None, device: str | None, threads: int | None, kv_bits: int | None) -> Options:
        """UsageError for a value that no model can have. LLMKIT_THREADS stands for `threads` where it is None."""
        name = "threads"
        if threads is None and (given := os.environ.get("LLMKIT_THREADS")):
            name, threads = "LLMKIT_THREADS", int(given) if given.isascii() and given.isdigit() else given  # type: ignore[assignment]
        if threads is not None and (type(threads) is not int or not 1 <= threads <= MAX_THREADS):
            raise UsageError(f"{name} is {threads!r}; it must be an integer from 1 to {MAX_THREADS}.")
        if kv_bits is not None and (type(kv_bits) is not int or kv_bits not in KV_BITS):
            raise UsageError(f"kv_bits is {kv_bits!r}; a cached number has {', '.join(map(str, KV_BITS[:-1]))} or {KV_BITS[-1]} bits.")
        return cls(None if dtype is None else dtype_name(dtype), device, threads, kv_bits)

    def for_draft(self, draft: ModelSource) -> Options:
        """The same for a draft model: the dtype was given for the model, and is left out where the draft is quantized."""
        return replace(self, dtype=None) if draft.quantized else self


@dataclass(frozen=True)
class Runner:
    """A model ready to run.

    Attributes:
        new_backend: the same weights with an empty cache of its own.
        device: cpu, cuda, ...
        parameters: how many there are.
        nbytes: bytes of each tensor of weights in memory, by our names.
        stored: dtype or scheme of the weights, in words.
        exact: whether the logits of a token are the same bits however many are computed at once.
        problem: why PyTorch runs it on this CPU, else None.
    """

    new_backend: Callable[[], Backend]
    device: str
    parameters: int
    nbytes: Mapping[str, int]
    stored: str
    exact: bool
    problem: str | None = None


def prepare(source: ModelSource, options: Options, adapters: Sequence[Adapter] = ()) -> Runner:
    """Chooses what runs a model, with these adapters at hand, and maps or reads its weights.

    Raises CheckpointError (damaged, or not of this config), UsageError (an option that is wrong or without effect here) and DoesNotFit.
    """
    device = default_device() if options.device is None else str(options.device)
    on_cpu = re.fullmatch(r"cpu(:\d+)?", device) is not None
    if on_cpu and source.quantized and options.dtype is not None:
        raise UsageError(
            f"dtype {options.dtype!r} has no effect on a CPU where the weights are quantized, as in {source.folder}. Leave it out."
        )
    problem = pytorch_reason(source) if on_cpu else None
    if on_cpu and problem is None:
        problem = next(filter(None, (adapter.native_problem(source.config) for adapter in adapters)), None)
    try:
        if on_cpu and problem is None:
            return _native(source, options, adapters)
        return _torch(source, device, options, problem, adapters)
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        raise DoesNotFit(f"{source.folder} does not fit in the memory of {device}. Take a smaller model or dtype.") from error


def pytorch_reason(source: ModelSource) -> str | None:
    """Why PyTorch runs a model on this CPU: what the native kernels lack, here or for its weights; None: they run it."""
    return native_problem(source.config) or source.format.native_problem


def _native(source: ModelSource, options: Options, adapters: Sequence[Adapter]) -> Runner:
    if "auto_map" in source.config.hf:
        logger.warning(AUTO_MAP)
    weights = source.weights()
    if options.dtype is not None:
        weights = {name: converted(array, options.dtype) for name, array in weights.items() if isinstance(array, np.ndarray)}
    parameters, stored = _measure(weights)
    # A float32 checkpoint is as exact as its cache; weights that were rounded themselves lose nothing by one of 16 bits.
    kv_bits = options.kv_bits or (32 if stored == "float32" else 16)

    def new_backend() -> Backend:
        backend = NativeBackend(source.config, weights, threads=options.threads, kv_bits=kv_bits)
        for adapter in adapters:
            backend.add_adapter(adapter.name, adapter.linears)
        return backend

    sizes = {name: weight.nbytes for name, weight in weights.items()}
    return Runner(new_backend, "cpu", parameters, sizes, stored, exact=True)


def _measure(weights: Mapping[str, Weight]) -> tuple[int, str]:
    """The number of parameters, and how they are stored, in words: the schemes and their bits, or the dtype of most bytes."""
    count = sum(prod(weight.shape) for weight in weights.values())
    schemes = sorted({weight.scheme for weight in weights.values() if isinstance(weight, QuantizedMatrix)})
    if schemes:
        bits = 8 * sum(weight.nbytes for weight in weights.values()) / count
        return count, f"{' and '.join(schemes)}, {bits:.2f} bits per weight"
    sizes: Counter[np.dtype] = Counter()
    for weight in weights.values():
        assert isinstance(weight, np.ndarray)
        sizes[weight.dtype] += weight.nbytes
    most = sizes.most_common(1)[0][0]
    return count, next(name for name, dtype in DTYPES.items() if dtype == most)


def _torch(source: ModelSource, device: str, options: Options, problem: str | None, adapters: Sequence[Adapter]) -> Runner:
    import torch

    from llmkit.checkpoint.load import load_model_with_report, log_report
    from llmkit.lora.apply import adapted
    from llmkit.model.backend import TorchBackend

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    model, report = load_model_with_report(source, options.dtype, device)
    log_report(report)
    source.unmap()  # parameters that are used in place keep their map
    backend = TorchBackend(model)
    if options.kv_bits not in (None, backend.kv_bits):
        raise UsageError(
            f"kv_bits {options.kv_bits} needs the native kernels, and {problem or f'on {device} PyTorch runs the model'}: "
            f"its cache has {backend.kv_bits} bits. Leave kv_bits out."
        )
    sizes = {name: tensor.nbytes for name, tensor in model.state_dict().items()}
    models = {adapter.name: adapted(model, adapter) for adapter in adapters}
    return Runner(
        partial(TorchBackend, model, adapters=models),
        report.device,
        report.num_parameters,
        sizes,
        report.dtype,
        exact=False,
        problem=problem,
    )


# --- speculation -----------------------------------------------------------------------------------------------


def check_speculation(speculate: str, model: ModelSource, draft: ModelSource | None) -> None:
    """Raises UsageError for an unknown mode, for one that a draft model contradicts, and for a draft model with another vocabulary."""
    if speculate not in SPECULATE:
        raise UsageError(f"speculate is {speculate!r}; it must be one of {', '.join(SPECULATE)}.")
    if draft is None:
        return
    if speculate != "auto":
        raise UsageError(f"speculate {speculate!r} leaves the draft model {draft.folder} without effect. Give one of the two.")
    difference = _difference(model, draft)
    if difference is not None:
        raise UsageError(
            f"the draft model {draft.folder} has another vocabulary than the model: {difference}. "
            "Take a smaller model of the same family, or speculate 'ngram', which needs no draft model."
        )


def _difference(model: ModelSource, draft: ModelSource) -> str | None:
    """Where two vocabularies first differ; None where every id stands for the same token."""
    ours, theirs = model.tokenizer, draft.tokenizer
    if ours is None or theirs is None:
        if ours is not theirs:
            return "only one of them has a tokenizer"
        sizes = model.config.vocab_size, draft.config.vocab_size
    else:
        sizes = ours.vocab_size, theirs.vocab_size  # the models' own may be padded
    if sizes[0] != sizes[1]:
        return f"{sizes[1]} tokens, not {sizes[0]}"
    file, other = (source.folder / "tokenizer.json" for source in (model, draft))
    if ours is None or theirs is None or (file.is_file() and other.is_file() and filecmp.cmp(file, other, shallow=False)):
        return None  # equal files are the usual case: no need to look at every token
    for token_id in range(sizes[0]):
        if ours.token_bytes(token_id) != theirs.token_bytes(token_id):
            return f"token {token_id} is {theirs.token(token_id)!r}, not {ours.token(token_id)!r}"
    return None
