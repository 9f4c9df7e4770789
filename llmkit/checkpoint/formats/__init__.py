"""How weights are stored: one file for each format, and the list of them. No torch is imported before a matrix is built from it.

A new format is a subclass of `Format` in a file of its own and a line in `FORMATS`. It says how each parameter is stored (`storage`,
which the memory planner adds up) and gives a parameter by our name (`weight`): as an array, dequantized where the file has codes, or
packed, where something computes with the codes as they are.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from llmkit.errors import CheckpointError

if TYPE_CHECKING:
    import numpy as np

    from llmkit.checkpoint.fingerprint import Fingerprint
    from llmkit.checkpoint.source import ModelSource
    from llmkit.kernels.format import QuantizedMatrix
    from llmkit.quant.nf4 import Nf4Matrix
    from llmkit.quant.schemes import Choice

    StoredWeight = np.ndarray | QuantizedMatrix | Nf4Matrix  # an array, or a matrix [out, in] in codes

RECORD = "quantization_config"  # the key of config.json by which all of Hugging Face's formats are told apart
FINGERPRINT = "llmkit_source"  # where config.json keeps the fingerprint of the checkpoint that the codes were made from


class Format:
    """The parameters of one checkpoint in one format. What is wrong with the files is one CheckpointError, on first use.

    Attributes:
        quantized: whether weights are codes, so that the model is not trained, saved or quantized again.
        native_problem: why the native kernels do not take these weights, or None.
        transformers_reads: whether transformers computes with the folder as it is.
        copied_bytes: bytes of the parameters that are not used as they lie in the file, as they are in memory.
    """

    quantized: ClassVar[bool] = True
    native_problem: ClassVar[str | None] = None
    transformers_reads: ClassVar[bool] = True
    copied_bytes: int = 0

    def __init__(self, source: ModelSource) -> None:
        self.source = source

    @property
    def record(self) -> Any:
        """What config.json says of the format."""
        return self.source.config.hf.get(RECORD)

    @property
    def storage(self) -> Mapping[str, str | Choice]:
        """How each parameter is stored: a safetensors dtype, or the scheme and group of its codes."""
        raise NotImplementedError

    @property
    def stored_bytes(self) -> int:
        """Bytes of the tensors in the files, without padding."""
        return self.source.tensors.nbytes

    @property
    def skipped(self) -> tuple[str, ...]:
        """Stored tensors that the family does not need."""
        return ()

    def weight(self, name: str) -> StoredWeight:
        """A parameter by our name: float32, float16 or (as uint16) bfloat16, contiguous, mapped where that is possible; or packed."""
        raise NotImplementedError

    def release(self, name: str) -> None:
        """Let go of the pages of a parameter that will not be read again, so that a pass over a large model takes little memory."""

    def dtype(self, on_cpu: bool) -> str:
        """The dtype in which a model runs where nobody chooses: float32, float16 or bfloat16, of everything that is not in codes."""
        return self.source.config.dtype

    @property
    def fingerprint(self) -> Fingerprint | None:
        """The fingerprint of the weights before they were quantized, as recorded; None where nothing is."""
        from llmkit.checkpoint.fingerprint import parse_fingerprint

        return parse_fingerprint(self.source.config.hf.get(FINGERPRINT))


FormatEntry = str | type[Format]

# By `quant_method` of config.json; "" is a checkpoint that is not quantized. A text is MODULE:CLASS, imported when it is met.
FORMATS: Mapping[str, FormatEntry] = {
    "": "llmkit.checkpoint.formats.dense:Dense",
    "llmkit": "llmkit.checkpoint.formats.llmkit:Packed",
    "bitsandbytes": "llmkit.checkpoint.formats.bitsandbytes:Bitsandbytes",
}


def find_format(source: ModelSource, formats: Mapping[str, FormatEntry] = FORMATS) -> Format:
    """The format of a source; CheckpointError for one that none of these reads."""
    record = source.config.hf.get(RECORD) or {"quant_method": ""}
    method = record.get("quant_method") if isinstance(record, Mapping) else record
    entry = formats.get(method) if isinstance(record, Mapping) and isinstance(method, str) else None
    if entry is None:
        raise CheckpointError(
            f"{source.folder} is quantized ({method!r:.80}), which llmkit does not read. Use the checkpoint it was made from."
        )
    if isinstance(entry, str):
        module, _, name = entry.partition(":")
        entry = getattr(importlib.import_module(module), name)
        assert isinstance(entry, type)
    return entry(source)


def plain_config(hf: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json without what a format says in it: that of the dequantized model."""
    return {name: value for name, value in hf.items() if name not in (RECORD, FINGERPRINT)}
