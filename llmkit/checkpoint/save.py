"""A `Transformer` as a Hugging Face folder: the family's own tensor names and layouts, the config.json it was read from.

All is written to a hidden folder next to the target and renamed at the end: the target is either as it was or complete.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmkit.checkpoint.arrays import parameter_shapes
from llmkit.checkpoint.files import INDEX, SINGLE, check_target, copy_side_files, replacing, sync, write_json
from llmkit.checkpoint.load import TORCH_DTYPES, parse_dtype
from llmkit.checkpoint.weights import OutputTensor, stored_layout
from llmkit.config import ModelConfig
from llmkit.errors import ConfigError, UsageError
from llmkit.families import family
from llmkit.model.transformer import Transformer

MAX_SHARD_BYTES = 5_000_000_000
_CODES = {dtype: code for code, dtype in TORCH_DTYPES.items()}


def save_model(
    model: Transformer,
    folder: str | Path,
    *,
    source: str | Path | None = None,
    dtype: str | torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
) -> None:
    """Writes a folder that `load_model` and transformers open.

    source: a model folder whose tokenizer, chat templates and generation_config.json are copied.
    dtype: float32, float16 or bfloat16 to convert to, tensor by tensor; by default the weights' own.
    max_shard_bytes: weights beyond it are split into shards with an index; a larger tensor has a shard to itself.
    overwrite: replace a model folder that is there; without it, only a new or an empty folder is written.
    Raises UsageError for a target that may not be replaced, CheckpointError where writing fails (nothing is left behind).
    """
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    if not parameter_shapes(model.config).keys() <= weights.keys():
        raise UsageError("a quantized model is not saved from memory. Copy its folder, or save the checkpoint it was made from.")
    wanted = None if dtype is None else parse_dtype(dtype)
    save_weights(
        model.config,
        folder,
        weights,
        weights.__getitem__,
        source=source,
        dtype=wanted,
        max_shard_bytes=max_shard_bytes,
        overwrite=overwrite,
    )


def save_weights(
    config: ModelConfig,
    folder: str | Path,
    weights: Mapping[str, Tensor],
    materialize: Callable[[str], Tensor],
    *,
    source: str | Path | None = None,
    more: Sequence[Path] = (),
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
) -> None:
    """As `save_model`, of weights that are made one by one: `weights` give shapes and dtypes (meta tensors will do), `materialize` numbers.

    more: files that are copied, too, in the place of those of `source`.
    """
    if max_shard_bytes < 1:
        raise UsageError(f"max_shard_bytes is {max_shard_bytes}, but a shard holds at least one byte. Leave it out for 5 GB.")
    if source is not None and not Path(source).is_dir():
        raise UsageError(f"source {source} is not a folder, so there is no tokenizer to copy. Give the folder the model came from.")
    # os.path, because pathlib raises where there is no such ~user, where links go round in a circle, or a name is too long.
    target = Path(os.path.realpath(os.path.expanduser(folder)))
    check_target(target, overwrite)
    layout = stored_layout(weights, family(config.model_type))
    hf = _config_json(config, {dtype or tensor.dtype for tensor in weights.values()})
    with replacing(target) as partial:
        write_json(partial / "config.json", hf)
        if source is not None:
            copy_side_files(Path(source), partial)
        for file in more:
            shutil.copyfile(file, partial / file.name)
        _write_weights(partial, [_Entry(stored, weights, materialize, dtype) for stored in layout], max_shard_bytes)


def _config_json(config: ModelConfig, dtypes: set[torch.dtype]) -> dict[str, Any]:
    """The config.json as it was read, in its old or new spelling, with the dtype that is really written."""
    if not config.hf:
        raise ConfigError("The model's configuration was not read from a config.json, so none can be written. Build it with read_config.")
    # The code that auto_map points to is not part of what we read, and so not of what we write.
    hf = {name: value for name, value in config.hf.items() if name != "auto_map"}
    for name in {"dtype", "torch_dtype"} & hf.keys():
        if len(dtypes) == 1:
            hf[name] = str(*dtypes).removeprefix("torch.")
    return hf


def _write_weights(folder: Path, entries: Sequence[_Entry], max_shard_bytes: int) -> None:
    shards: list[list[_Entry]] = [[]]
    size = 0
    for entry in entries:
        if shards[-1] and size + entry.nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.nbytes
    if len(shards) == 1:
        return _write_safetensors(folder / SINGLE, shards[0])
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write_safetensors(folder / name, shard)
        weight_map |= {entry.stored.name: name for entry in shard}
    write_json(folder / INDEX, {"metadata": {"total_size": sum(entry.nbytes for entry in entries)}, "weight_map": weight_map})


class _Entry:
    """A tensor to be written. Its shape is known before its bytes are put together, so only one is ever in memory."""

    def __init__(
        self, stored: OutputTensor, weights: Mapping[str, Tensor], materialize: Callable[[str], Tensor], dtype: torch.dtype | None
    ) -> None:
        self.stored, self.materialize = stored, materialize
        parts = [weights[name] for name in stored.ours]
        self.dtype = parts[0].dtype if dtype is None else dtype
        shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
        self.shape = shape[::-1] if stored.transpose else shape
        self.nbytes = sum(part.numel() for part in parts) * self.dtype.itemsize

    def tensor(self) -> Tensor:
        parts = [self.materialize(name) for name in self.stored.ours]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        return (whole.t() if self.stored.transpose else whole).to("cpu", self.dtype).contiguous()


def _write_safetensors(path: Path, entries: Sequence[_Entry]) -> None:
    # Wider elements first, and a header padded to 8 bytes: every tensor is aligned, so that it can be mapped in place.
    entries = sorted(entries, key=lambda entry: -entry.dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
    end = 0
    for entry in entries:
        begin, end = end, end + entry.nbytes
        header[entry.stored.name] = {"dtype": _CODES[entry.dtype], "shape": list(entry.shape), "data_offsets": [begin, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for entry in entries:
            file.write(entry.tensor().flatten().view(torch.uint8).numpy().data)
        sync(file)
