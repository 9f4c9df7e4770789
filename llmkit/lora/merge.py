"""An adapter added to the weights of its base: a model folder like any other, written weight by weight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from llmkit.checkpoint.arrays import dtype_name
from llmkit.checkpoint.formats import plain_config
from llmkit.checkpoint.load import DTYPES
from llmkit.checkpoint.save import save_weights
from llmkit.checkpoint.source import ModelSource
from llmkit.checkpoint.weights import EMBEDDING, HEAD
from llmkit.config import ModelConfig
from llmkit.errors import CheckpointError, UsageError
from llmkit.kernels.format import widen
from llmkit.lora.adapter import Adapter, check_base, read_adapter

if TYPE_CHECKING:
    from llmkit.checkpoint.formats import StoredWeight

Progress = Callable[[int, int], None]  # weights done, weights in all


@dataclass(frozen=True)
class MergeReport:
    """What was written. quantized: the schemes of the base, in words; empty where it was not quantized."""

    folder: Path
    dtype: str
    nbytes: int
    quantized: str


def merge(
    model: str | Path | ModelSource,
    adapter: str | Path,
    output: str | Path,
    *,
    dtype: str | None = None,
    any_base: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> MergeReport:
    """Write the model with the adapter in its weights; the sum is made in float32 and rounded once.

    model, adapter: folders or hub ids. dtype: float32, float16 or bfloat16; by default that of the base, and for a quantized base, which
    is dequantized, the 16-bit dtype of the checkpoint it was made from (bfloat16 where that had 32 bits).
    any_base: merge an adapter that is proven to have been trained on other weights.
    Raises CheckpointError for what is damaged or does not fit, UsageError for an output that may not be replaced.
    """
    opened = ModelSource.open(model)
    source, config = opened.folder, opened.config
    weights = {name: opened.format.weight(name) for name in opened.shapes}
    # Weights stay mapped until they are asked for; what is in memory is one matrix at a time.
    wanted = read_adapter(adapter, config)
    if not any_base:
        check_base(wanted, opened)
    target = Path(output).expanduser()
    if target.exists() and any(target.resolve() in (one.resolve(), *one.resolve().parents) for one in (source, wanted.folder)):
        raise UsageError(f"{target} would be replaced while it is read. Choose another output folder.")
    schemes = sorted({weight.scheme for weight in weights.values() if not isinstance(weight, np.ndarray)})
    kind = DTYPES[_dtype(config, weights, bool(schemes)) if dtype is None else dtype_name(dtype)]
    merger = _Merger(config, weights, wanted, progress)
    template = wanted.folder / "chat_template.jinja"  # the one it was trained with, in place of the model's
    more = (template,) if template.is_file() else ()
    save_weights(merger.config, target, merger.meta(kind), merger.materialize, source=source, more=more, dtype=kind, overwrite=overwrite)
    nbytes = sum(tensor.nbytes for tensor in merger.meta(kind).values())
    return MergeReport(target, str(kind).removeprefix("torch."), nbytes, " and ".join(schemes))


def _dense(weight: StoredWeight) -> Tensor:
    """A weight, float32, in memory of its own."""
    dense = widen(weight) if isinstance(weight, np.ndarray) else weight.dequantize()
    return dense if isinstance(dense, Tensor) else torch.from_numpy(np.array(dense, np.float32))


def _dtype(config: ModelConfig, weights: dict[str, StoredWeight], quantized: bool) -> str:
    if quantized:
        # Not requantized: rounding once more on top of the adapter would undo small changes. 16 bits, as before it was quantized.
        return config.dtype if config.dtype in ("float16", "bfloat16") else "bfloat16"
    largest = max((weight for weight in weights.values() if isinstance(weight, np.ndarray)), key=lambda weight: weight.nbytes)
    return {"float32": "float32", "float16": "float16", "uint16": "bfloat16"}[largest.dtype.name]


class _Merger:
    """The merged weights, each made when it is asked for."""

    def __init__(self, config: ModelConfig, weights: dict[str, StoredWeight], adapter: Adapter, progress: Progress | None) -> None:
        self.weights, self.adapter, self.progress = weights, adapter, progress
        self.shapes = {name: weight.shape for name, weight in weights.items()}
        self.done, self.config = 0, config
        hf = plain_config(config.hf)
        # One matrix cannot be both any more: the merged model has a head of its own, and its config.json says so.
        if config.tie_word_embeddings and self._parts_head():
            self.shapes[HEAD] = self.shapes[EMBEDDING]
            hf["tie_word_embeddings"] = False
        self.config = replace(config, tie_word_embeddings=bool(config.tie_word_embeddings and HEAD not in self.shapes), hf=hf)

    def _parts_head(self) -> bool:
        """Whether the adapter makes head and embedding, which are one in the base, two."""
        changed = {EMBEDDING, HEAD} & {*self.adapter.replaced, *(f"{path}.weight" for path in self.adapter.linears)}
        alike = changed == {EMBEDDING, HEAD} and not {"model.embed_tokens", "lm_head"} & self.adapter.linears.keys()
        return bool(changed) and not (alike and np.array_equal(self.adapter.replaced[EMBEDDING], self.adapter.replaced[HEAD]))

    def meta(self, dtype: torch.dtype) -> dict[str, Tensor]:
        return {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in self.shapes.items()}

    def materialize(self, name: str) -> Tensor:
        """Return one weight, float32."""
        base = EMBEDDING if name == HEAD and HEAD not in self.weights else name
        out = _dense(self.adapter.replaced[name] if name in self.adapter.replaced else self.weights[base])
        path = name.removesuffix(".weight")
        term = self.adapter.linears.get(path) if name.endswith(".weight") else None
        # In float32 and in the order of training: W + s B A first (the scale is in B), then DoRA's rescaling of its rows.
        if term is not None:
            out += torch.from_numpy(term.b) @ torch.from_numpy(term.a)
            magnitude = self.adapter.magnitudes.get(path)
            if magnitude is not None:
                out *= (torch.from_numpy(magnitude) / torch.linalg.vector_norm(out, dim=1))[:, None]
        if not torch.isfinite(out).all():
            raise CheckpointError(f"{name} has values that are not finite after merging. Is the adapter or the base damaged?")
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, len(self.shapes))
        return out
