"""How weights are stored: one file for each format, and the list of them.

A new format is a subclass of `formats.dense.Dense` in a file of its own and a line in `FORMATS`. It says how each parameter is stored
(`storage`, which the memory planner adds up) and gives a parameter by our name (`weight`): as an array, dequantized where the file has
codes, or packed, where something computes with the codes as they are. No torch is imported before a matrix is built from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from llmkit.checkpoint.formats.dense import Dense
    from llmkit.kernels.format import QuantizedMatrix
    from llmkit.quant.nf4 import Nf4Matrix

    FormatEntry = str | type[Dense]
    StoredWeight = np.ndarray | QuantizedMatrix | Nf4Matrix  # an array, or a matrix [out, in] in codes

RECORD = "quantization_config"  # the key of config.json by which all of Hugging Face's formats are told apart
FINGERPRINT = "llmkit_source"  # where config.json keeps the fingerprint of the checkpoint that the codes were made from

# By `quant_method` of config.json; "" is a checkpoint that is not quantized. A text is MODULE:CLASS, imported when it is met.
FORMATS: Mapping[str, FormatEntry] = {
    "": "llmkit.checkpoint.formats.dense:Dense",
    "llmkit": "llmkit.checkpoint.formats.llmkit:Packed",
    "bitsandbytes": "llmkit.checkpoint.formats.bitsandbytes:Bitsandbytes",
}


def plain_config(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config.json without what a format says in it: that of the dequantized model."""
    return {name: value for name, value in hf.items() if name not in (RECORD, FINGERPRINT)}
