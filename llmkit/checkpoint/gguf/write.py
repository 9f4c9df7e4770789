"""A model folder as one GGUF file, the format of llama.cpp (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).

The file holds the configuration in llama.cpp's terms, the tokenizer and the weights under llama.cpp's names. Where its graph of an
architecture lacks what a configuration asks for, that is an error: a file that loads and says something else would be worse than none.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import gguf
from gguf import GGUFWriter

from llmkit.checkpoint.gguf.metadata import check_model, write_metadata
from llmkit.checkpoint.gguf.tensors import FILE_TYPES, layout
from llmkit.checkpoint.gguf.vocabulary import Vocabulary, placeholder, read_vocabulary
from llmkit.checkpoint.load import load_model
from llmkit.errors import CheckpointError, UsageError


@dataclass(frozen=True)
class GGUFReport:
    """What was written. notes: what a person should know about the file (an unknown pre-tokenizer, windows that are not kept)."""

    path: Path
    nbytes: int
    tensors: int
    types: Mapping[str, int]  # GGML type -> number of tensors
    notes: tuple[str, ...]


def write_gguf(
    folder: str | Path,
    path: str | Path,
    file_type: str = "f16",
    *,
    tokenizer: bool = True,
    overwrite: bool = False,
    progress: bool = False,
) -> GGUFReport:
    """Writes the model of a folder to one GGUF file, tensor by tensor, to a hidden file beside it that is renamed at the end.

    file_type: f16, q8_0 or q4_0, of the matrices; norms, biases, routers and learned positions are float32. In q4_0 the output matrix,
        or the embedding that serves as one, is q8_0 (llama.cpp's own tool would make it q6_K). A matrix whose rows are not a
        multiple of 32 long stays f16.
    tokenizer: False writes placeholder tokens instead of the folder's tokenizer.
    overwrite: replace a file that is there. progress: a bar on stderr after two seconds.
    Raises UsageError (a target that may not be written), ConfigError (a model that llama.cpp's architecture cannot express),
    TokenizerError, CheckpointError (a damaged folder, no room on the disk; nothing is left behind).
    """
    if file_type not in FILE_TYPES:
        raise UsageError(f"file type {file_type!r} is unknown. Use one of {', '.join(FILE_TYPES)}.")
    target = check_target(path, overwrite)
    folder = Path(folder)
    model = load_model(folder)
    config = model.config
    architecture, notes = check_model(config)
    vocabulary = read_vocabulary(folder, config.vocab_size, config.hf) if tokenizer else placeholder(config.vocab_size)
    tensors = layout(model, architecture, file_type)
    if short := [tensor.name for tensor in tensors if tensor.narrow]:
        notes.append(f"{len(short)} matrices have rows that {file_type} cannot hold ({short[0]}, ...) and stay f16.")
    with _replacing(target) as partial:
        writer = GGUFWriter(partial, architecture.name)
        try:
            writer.add_type("model")
            writer.add_name(folder.resolve().name)
            writer.add_file_type(FILE_TYPES[file_type][1])
            if file_type != "f16":
                writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
            write_metadata(writer, config, architecture)
            _write_vocabulary(writer, vocabulary)
            for tensor in tensors:
                writer.add_tensor_info(tensor.name, tensor.stored_shape, tensor.stored_dtype, tensor.nbytes, tensor.type)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            with _bar(sum(tensor.nbytes for tensor in tensors), progress) as bar:
                for tensor in tensors:
                    writer.write_tensor_data(tensor.encode())
                    bar(tensor.nbytes)
            writer.flush()
        finally:
            writer.close()
        _sync(partial)
    types: dict[str, int] = {}
    for tensor in tensors:
        types[tensor.type.name] = types.get(tensor.type.name, 0) + 1
    return GGUFReport(target, target.stat().st_size, len(tensors), types, (*notes, *vocabulary.notes))


def check_target(path: str | Path, overwrite: bool) -> Path:
    """The real path of a file to be written; UsageError where it may not be."""
    # os.path, because pathlib raises where there is no such ~user, where links go round in a circle, or a name is too long.
    target = Path(os.path.realpath(os.path.expanduser(path)))
    if os.path.isdir(target):
        raise UsageError(f"{target} is a folder, and a GGUF model is one file. Choose another name, such as {target.name}/model.gguf.")
    if os.path.exists(target) and not overwrite:
        raise UsageError(f"{target} exists. Choose another name, or replace it (overwrite, --overwrite).")
    return target


@contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    """A hidden file beside `target` that becomes `target` at the end, or vanishes whatever happens."""
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        partial.replace(target)
    except OSError as error:
        raise CheckpointError(
            f"Cannot write {target}: {error.strerror or error}. Nothing was written; free space, or choose another place."
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """A disk may report only here that it is full, and a rename must not come before the bytes."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


@contextmanager
def _bar(total: int, show: bool) -> Iterator[Callable[[int], object]]:
    from tqdm.auto import tqdm

    with tqdm(total=total, unit="B", unit_scale=True, delay=2, leave=False, disable=not show) as bar:
        yield bar.update


def _write_vocabulary(writer: GGUFWriter, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.scores is not None:
        writer.add_token_scores(vocabulary.scores)
    if vocabulary.merges is not None:
        writer.add_token_merges(vocabulary.merges)
    add = {
        "bos": writer.add_bos_token_id,
        "eos": writer.add_eos_token_id,
        "unk": writer.add_unk_token_id,
        "pad": writer.add_pad_token_id,
    }
    for role, number in vocabulary.special.items():
        add[role](number)
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(vocabulary.add_eos)
    if vocabulary.add_space_prefix is not None:
        writer.add_add_space_prefix(vocabulary.add_space_prefix)
    if vocabulary.templates:
        writer.add_chat_template([{"name": name, "template": source} for name, source in vocabulary.templates.items()])
