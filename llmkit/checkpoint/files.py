"""Checkpoint files: a folder of safetensors as named, memory-mapped tensors; and how a folder is replaced as a whole. No torch.

The format (https://huggingface.co/docs/safetensors, "Format"): 8 bytes little-endian header length, a JSON header
`{name: {"dtype", "shape", "data_offsets": [begin, end]}}`, then the data, to which the offsets are relative. Nothing
in a header is believed before it is checked: a file that is cut off, or lies about itself, is one `CheckpointError`.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import shutil
import struct
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard

from llmkit.config import ModelConfig
from llmkit.errors import CheckpointError, ConfigError, DoesNotFit, UsageError, out_of_memory
from llmkit.families import MODEL_TYPES, read_config

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # of PEFT
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

# Bits of one element. The names are the format's own.
DTYPE_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}

_MAX_HEADER = 100_000_000  # bytes; the limit of the reference implementation
_MAX_JSON = 100_000_000  # bytes; the largest index in use is about 10 MB
_MAX_RANK = 64

REDOWNLOAD = "Download or copy the file again."
GGUF = "GGUF files are not read yet; give the safetensors checkpoint that the file was made from."
AUTO_MAP = "The folder brings its own modelling code (auto_map in config.json), and llmkit never runs code from a checkpoint."
# What belongs to a model besides config.json and weights.
SIDE_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "*.tiktoken",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
)
CONVERT = (
    "Pickle files can run code and are never opened; convert the model once, where you trust it: "
    "transformers.AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER) writes safetensors."
)


@dataclass(frozen=True)
class TensorFile:
    """One stored tensor: where it lies, and its bytes in a private copy-on-write map (writing never reaches the file)."""

    name: str
    dtype: str  # a key of DTYPE_BITS
    shape: tuple[int, ...]
    data: memoryview = field(repr=False, compare=False)  # little-endian, row-major
    file: Path
    offset: int  # of the first byte, from the start of the file

    @property
    def nbytes(self) -> int:
        return self.data.nbytes


class Checkpoint(Mapping[str, TensorFile]):
    """The tensors of a model folder by name, in the order of their files."""

    def __init__(self, folder: Path, tensors: Mapping[str, TensorFile]) -> None:
        self.folder = folder
        self._tensors = dict(tensors)

    def __getitem__(self, name: str) -> TensorFile:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.values())


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; CheckpointError where there is none."""
    try:
        with path.open("rb") as file:
            raw = file.read(_MAX_JSON + 1)
    except OSError as error:
        raise CheckpointError(f"Cannot read {path}: {error.strerror or error}. Is the model folder complete?") from error
    if len(raw) > _MAX_JSON:
        raise CheckpointError(f"{path} is larger than {_MAX_JSON} bytes, which no such file is. {REDOWNLOAD}")
    return _parse_object(raw, str(path))


def load_config(folder: Path) -> ModelConfig:
    """The `ModelConfig` of a model folder, read from its `config.json` (old or transformers 5 spelling)."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder. Give a folder with config.json and safetensors files.")
    hf = read_json(folder / "config.json")
    if "auto_map" in hf and hf.get("model_type") not in MODEL_TYPES:
        try:
            return read_config(hf)
        except ConfigError as error:
            raise ConfigError(f"{error} {AUTO_MAP}") from error
    return read_config(hf)


def open_checkpoint(folder: Path) -> Checkpoint:
    """Maps all tensors of a folder with `model.safetensors`, or shards and their `model.safetensors.index.json`.

    Where both are present both are checked and the single file is used, as in transformers: a damaged file is an
    error even where another could stand in for it.
    """
    single, index = folder / SINGLE, folder / INDEX
    has_single, has_index = os.path.lexists(single), os.path.lexists(index)  # a broken link, too, is a damaged file
    if not has_single and not has_index:
        raise _no_weights(folder)
    sharded = _open_shards(folder) if has_index else {}
    return Checkpoint(folder, open_safetensors(single) if has_single else sharded)


def shard_names(index: Path) -> dict[str, str]:
    """Tensor name -> shard file name, from a `model.safetensors.index.json`."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map with tensor and file names. {REDOWNLOAD}")
    for shard in weight_map.values():
        # A plain printable name: no folder, no "..", no NUL, nothing that could lead out of the model folder.
        if not (isinstance(shard, str) and shard.isprintable() and shard.endswith(".safetensors")) or set(shard) & set("/\\:"):
            raise CheckpointError(f"{index} names the shard {shard!r}, which is not a plain .safetensors file name. {REDOWNLOAD}")
    return weight_map


def _open_shards(folder: Path) -> dict[str, TensorFile]:
    weight_map = shard_names(folder / INDEX)
    shards = sorted(set(weight_map.values()))
    if missing := [shard for shard in shards if not _is_file(folder / shard)]:
        raise CheckpointError(f"{folder} lacks {len(missing)} of {len(shards)} shards: {', '.join(missing)}. Download or copy them again.")
    tensors: dict[str, TensorFile] = {}
    problems = []
    for shard in shards:
        for name, tensor in open_safetensors(folder / shard).items():
            if name in tensors:
                problems.append(f"{name!r} is in {tensors[name].file.name} and in {shard}")
            tensors[name] = tensor
    for name, shard in weight_map.items():
        if name not in tensors:
            problems.append(f"{name!r} is not in {shard}")
        elif tensors[name].file.name != shard:
            problems.append(f"{name!r} is in {tensors[name].file.name}, not in {shard}")
    if problems:
        raise CheckpointError(f"The shards of {folder} do not agree with {INDEX}: {'; '.join(problems)}. Download or copy them again.")
    return tensors


def open_safetensors(path: Path) -> dict[str, TensorFile]:
    """Maps one safetensors file and checks its header against its size, to the last byte."""
    try:
        with path.open("rb") as file:
            # Private and writable: torch may train in place, and the file stays as it is.
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except (OSError, ValueError) as error:  # ValueError: an empty file
        if out_of_memory(error):
            raise DoesNotFit(f"{path} has {path.stat().st_size} bytes, more than there is memory to map. Take a smaller model.") from error
        raise CheckpointError(f"Cannot map {path}: {error}. {REDOWNLOAD}") from error
    header, start = _read_header(path, mapped)
    data = memoryview(mapped)[start:]
    header.pop("__metadata__", None)
    tensors = {name: _read_tensor(path, name, entry, data, start) for name, entry in header.items()}
    _check_coverage(path, list(tensors.values()), start, len(mapped))
    return tensors


def read_metadata(path: Path) -> dict[str, Any]:
    """The free text entries in the header of a safetensors file, which `open_safetensors` leaves aside."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        found = _read_header(path, mapped)[0].get("__metadata__")
    return found if isinstance(found, dict) else {}


def _read_header(path: Path, mapped: mmap.mmap) -> tuple[dict[str, Any], int]:
    if len(mapped) < 8:
        raise CheckpointError(f"{path} is cut off after {len(mapped)} bytes, within the header length. {REDOWNLOAD}")
    if mapped[:23] == b"version https://git-lfs":
        raise CheckpointError(f"{path} is only a Git LFS pointer, not the weights. Fetch the file itself with `git lfs pull`.")
    (length,) = struct.unpack_from("<Q", mapped)
    if length > min(_MAX_HEADER, len(mapped) - 8):
        raise CheckpointError(
            f"{path} claims a header of {length} bytes, but the file has {len(mapped)} and a header at most {_MAX_HEADER}. {REDOWNLOAD}"
        )
    return _parse_object(mapped[8 : 8 + length], f"The header of {path}"), 8 + length


def _parse_object(raw: bytes, what: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            name, _ = Counter(name for name, _ in pairs).most_common(1)[0]
            raise CheckpointError(f"{what} has {name!r} twice. {REDOWNLOAD}")
        return found

    try:
        found = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, a number of thousands of digits, bottomless nesting
        raise CheckpointError(f"{what} is not JSON: {error}. {REDOWNLOAD}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{what} holds a JSON {type(found).__name__}, not an object. {REDOWNLOAD}")
    return found


def _read_tensor(path: Path, name: str, entry: Any, data: memoryview, start: int) -> TensorFile:
    def lie(what: str) -> CheckpointError:
        return CheckpointError(f"{path}: the header entry of {name!r} {what}. {REDOWNLOAD}")

    if not isinstance(entry, dict):
        raise lie("is not an object")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise lie(f"has the unknown dtype {dtype!r} (known: {', '.join(DTYPE_BITS)})")
    if not _are_sizes(shape) or len(shape) > _MAX_RANK:
        raise lie(f"has no usable shape ({str(shape)[:80]})")
    if not _are_sizes(offsets) or len(offsets) != 2 or not offsets[0] <= offsets[1] <= len(data):
        raise lie(f"points outside the file's {len(data)} data bytes (data_offsets {str(offsets)[:80]})")
    begin, end = offsets
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    if bits != 8 * (end - begin):
        raise lie(f"claims shape {shape} in {dtype}, {bits // 8} bytes, but has {end - begin}")
    return TensorFile(name, dtype, tuple(shape), data[begin:end], path, start + begin)


def _are_sizes(found: Any) -> TypeGuard[list[int]]:
    # bool is an int to Python; sizes beyond 64 bits are none.
    return isinstance(found, list) and all(type(size) is int and 0 <= size < 2**63 for size in found)


def _check_coverage(path: Path, tensors: list[TensorFile], start: int, size: int) -> None:
    """The tensors must fill the data section without gap or overlap, as the format demands."""
    end = start
    for tensor in sorted(tensors, key=lambda t: (t.offset, t.nbytes)):
        if tensor.offset != end:
            what = "overlaps the one before it" if tensor.offset < end else f"leaves a gap of {tensor.offset - end} bytes before it"
            raise CheckpointError(f"{path}: the tensor {tensor.name!r} {what}. {REDOWNLOAD}")
        end += tensor.nbytes
    if end != size:
        raise CheckpointError(f"{path} has {size - end} bytes after its last tensor. {REDOWNLOAD}")


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name longer than the file system allows
        return False


def _no_weights(folder: Path) -> CheckpointError:
    try:
        names = sorted(path.name for path in folder.iterdir())
    except OSError as error:
        return CheckpointError(f"Cannot read the folder {folder}: {error.strerror}. Give a folder with config.json and {SINGLE}.")
    pickles = [name for name in names if name.endswith(PICKLES)]
    if pickles:
        return CheckpointError(f"{folder} has only pickle files ({', '.join(pickles)}) and no {SINGLE}. {CONVERT}")
    if ggufs := [name for name in names if name.endswith(".gguf")]:
        return CheckpointError(f"{folder} has {', '.join(ggufs)} and no {SINGLE}. {GGUF}")
    others = [name for name in names if name.endswith(".safetensors")]
    found = f"it has {', '.join(others)}, but no {INDEX}" if others else "it has no safetensors file at all"
    return CheckpointError(f"{folder} has no {SINGLE}; {found}. Download or copy the folder again.")


# --- writing ----------------------------------------------------------------------------------------------------


def check_target(target: Path, overwrite: bool) -> None:
    if not os.path.exists(target):
        return
    if not target.is_dir():
        raise UsageError(f"{target} is a file, and a model is saved as a folder. Choose another name.")
    try:
        if not os.listdir(target):
            return
    except OSError as error:
        raise UsageError(f"{target} cannot be listed ({error.strerror}). Check its permissions, or choose another folder.") from error
    if not overwrite:
        raise UsageError(f"{target} exists and is not empty. Choose another folder, or replace it (overwrite, --overwrite).")
    if not (target / "config.json").is_file():
        # Replacing means deleting all that is in it; a home folder given by mistake must survive that.
        raise UsageError(f"{target} is not a model folder (it has no config.json), so it is not overwritten. Choose another folder.")


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A hidden folder next to `target` that becomes `target` at the end, or vanishes whatever happens."""
    suffix = uuid.uuid4().hex[:8]
    partial, old = target.with_name(f".{target.name}.{suffix}.partial"), target.with_name(f".{target.name}.{suffix}.old")
    new_parents = [parent for parent in target.parents if not os.path.exists(parent)]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
        yield partial
        if target.exists():
            target.rename(old)
        partial.rename(target)
    except BaseException as error:  # Ctrl-C too
        if os.path.exists(old) and not target.exists():
            old.rename(target)
        shutil.rmtree(partial, ignore_errors=True)
        for parent in new_parents:
            with suppress(OSError):
                parent.rmdir()
        if isinstance(error, OSError):
            raise CheckpointError(
                f"Cannot save to {target}: {error.strerror or error}. Nothing was written; free space, or choose another folder."
            ) from error
        raise
    finally:
        if os.path.exists(target):
            shutil.rmtree(old, ignore_errors=True)


def copy_side_files(source: Path, folder: Path) -> None:
    for pattern in SIDE_FILES:
        for file in source.glob(pattern):
            copy = folder / file.relative_to(source)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, copy)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    with path.open("wb") as file:
        file.write((json.dumps(value, indent=2) + "\n").encode())
        sync(file)


def sync(file: BinaryIO) -> None:
    """A disk may report only here that it is full, and a rename must not come before the bytes."""
    file.flush()
    os.fsync(file.fileno())
