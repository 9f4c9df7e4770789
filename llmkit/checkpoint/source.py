"""A model on disk, opened once: `ModelSource` is what a command passes to everything that reads the model. No torch.

Nothing is read before it is asked for, and nothing is read twice: config.json, generation_config.json, the index and the header of each
safetensors file are parsed on first use and kept. Tensors are mapped, not read, so an opened source takes almost no memory.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from llmkit.checkpoint.arrays import parameter_shapes
from llmkit.checkpoint.files import INDEX, SINGLE, Checkpoint, load_config, open_checkpoint, read_json
from llmkit.checkpoint.formats import FORMATS, RECORD
from llmkit.config import ModelConfig
from llmkit.errors import CheckpointError
from llmkit.kernels.format import Weight

if TYPE_CHECKING:
    from llmkit.checkpoint.arrays import Fingerprint
    from llmkit.checkpoint.formats import FormatEntry
    from llmkit.checkpoint.formats.dense import Dense
    from llmkit.text.tokenizer import Tokenizer

# Any of these in a folder means that there is a tokenizer to load.
_TOKENIZER_FILES = ("tokenizer.json", "*.model", "*.tiktoken", "merges.txt")


class ModelSource:
    """One model on disk.

    Attributes:
        folder: where its files are; of a hub id, in the Hugging Face cache.
        name: as it was given, for messages.

    Every property raises CheckpointError for files that are damaged or do not belong together.
    """

    def __init__(self, folder: Path, name: str | None = None, formats: Mapping[str, FormatEntry] = FORMATS) -> None:
        self.folder = folder
        self.name = str(folder) if name is None else name
        self._formats = formats

    @classmethod
    def open(
        cls,
        model: str | Path | ModelSource,
        revision: str | None = None,
        *,
        download: bool = True,
        formats: Mapping[str, FormatEntry] = FORMATS,
    ) -> ModelSource:
        """Resolve a name: a folder, a hub id or HUB_ID@REVISION; a source that is open already is returned as it is.

        download: False takes what the hub cache has, perhaps config.json alone, and asks no network.
        formats: the formats that may be read, by the quantization method that config.json names.
        Raises UsageError for a name that cannot be one, CheckpointError where the model cannot be had.
        """
        if isinstance(model, ModelSource):
            return model
        if revision is None and os.path.isdir(folder := os.path.expanduser(model)):
            return cls(Path(folder), str(model), formats)
        from llmkit.checkpoint.hub import locate, resolve  # and every name that is wrong is named there

        return cls((resolve if download else locate)(model, revision), str(model), formats)

    def __repr__(self) -> str:
        return f"<ModelSource {self.name}>"

    @cached_property
    def config(self) -> ModelConfig:
        return load_config(self.folder)

    @cached_property
    def generation_config(self) -> Mapping[str, Any]:
        """generation_config.json; empty where there is none."""
        path = self.folder / "generation_config.json"
        return read_json(path) if os.path.lexists(path) else {}

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """None where there is none of the files a tokenizer can be in; a damaged one is an error."""
        try:
            names = os.listdir(self.folder)
        except OSError as error:
            raise CheckpointError(f"The folder {self.folder} cannot be listed ({error.strerror}). Check its permissions.") from error
        if not any(fnmatch(name, pattern) for name in names for pattern in _TOKENIZER_FILES):
            return None
        from llmkit.text.tokenizer import load_tokenizer  # the tokenizers library, which a conversion does not wait for

        return load_tokenizer(self.folder)

    @cached_property
    def special_ids(self) -> tuple[tuple[int, ...], int | None]:
        """The ids that end a text (all that generation_config.json, config.json and the tokenizer name) and the one that begins it."""
        tokenizer = self.tokenizer
        eos = [] if tokenizer is None else list(tokenizer.eos_ids)
        bos = [] if tokenizer is None or tokenizer.bos_id is None else [tokenizer.bos_id]
        for file in (self.generation_config, self.config.hf):
            eos += self._ids("eos_token_id", file.get("eos_token_id"))
            bos += self._ids("bos_token_id", file.get("bos_token_id"))
        return tuple(dict.fromkeys(eos)), next(iter(bos), None)

    def _ids(self, name: str, given: Any) -> list[int]:
        """A token id, or a list of them, or null."""
        ids = given if isinstance(given, list) else [] if given is None else [given]
        if any(isinstance(token, bool) or not isinstance(token, int) for token in ids):
            raise CheckpointError(
                f"{self.folder} has a value in generation_config.json or config.json that cannot be: "
                f"{name} is {given!r:.80}; it must be a token id or a list of them."
            )
        return ids

    # --- weights --------------------------------------------------------------------------------------------------

    @property
    def has_weights(self) -> bool:
        """False where config.json is all there is, as in a hub cache before the download."""
        return any(os.path.lexists(self.folder / name) for name in (SINGLE, INDEX))

    @cached_property
    def tensors(self) -> Checkpoint:
        """The tensors as they are stored, mapped."""
        return open_checkpoint(self.folder)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every parameter by our names, in the order of the model."""
        return parameter_shapes(self.config)

    @cached_property
    def format(self) -> Dense:
        """How the weights are stored, and what reads them; CheckpointError for a format that is not among those given."""
        record = self.config.hf.get(RECORD) or {"quant_method": ""}
        method = record.get("quant_method") if isinstance(record, Mapping) else record
        entry = self._formats.get(method) if isinstance(record, Mapping) and isinstance(method, str) else None
        if entry is None:
            raise CheckpointError(
                f"{self.folder} is quantized ({method!r:.80}), which llmkit does not read. Use the checkpoint it was made from."
            )
        if isinstance(entry, str):
            module, _, name = entry.partition(":")
            entry = cast("type[Dense]", getattr(importlib.import_module(module), name))
        return entry(self)

    @property
    def quantized(self) -> bool:
        """Whether some weights are stored as codes, which are not trained, saved or quantized again."""
        return self.format.quantized

    def weights(self) -> dict[str, Weight]:
        """Every parameter by our names, as the native kernels take it: mapped where the file has it in that layout.

        Arrays are float32, float16, or bfloat16 as its bits in uint16. Only where `format.native_problem` is None.
        """
        return {name: cast(Weight, self.format.weight(name)) for name in self.shapes}

    @cached_property
    def fingerprint(self) -> Fingerprint | None:
        """The fingerprint of the weights; of quantized ones what is recorded of those they were made from, None where that is nothing."""
        return self.format.fingerprint

    def unmap(self) -> None:
        """Forget the mapped tensors, where the model now has copies of its own; whoever asks for them maps them again."""
        self.__dict__.pop("tensors", None)
        self.__dict__.pop("format", None)
