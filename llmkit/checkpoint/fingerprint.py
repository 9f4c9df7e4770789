"""A fingerprint of a model's weights, from a sample of them: whether an adapter was trained on this model. No torch.

A few numbers of every parameter, rounded to bfloat16, are hashed with all names and shapes. A copy of a float32 checkpoint in bfloat16
has the same fingerprint, a fine-tuned sibling another one. Rounding to float16 on the way can change the last bit, so a fingerprint
remembers the dtype, and of a float16 copy nothing is claimed. A quantized folder carries that of the checkpoint it was made from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from hashlib import blake2b
from typing import Any

import numpy as np

from llmkit.checkpoint.arrays import DTYPES, converted, parameter_sample
from llmkit.checkpoint.weights import Piece

_SAMPLE = 64  # numbers of the first, the middle and the last row of each parameter


@dataclass(frozen=True)
class Fingerprint:
    """dtype: float32, float16 or bfloat16, of most of the sample."""

    digest: str
    dtype: str

    def differs(self, other: Fingerprint) -> bool:
        """Whether both are proven to be of different weights."""
        halves = (self.dtype == "float16") + (other.dtype == "float16")
        return self.digest != other.digest and halves != 1

    def to_dict(self) -> dict[str, str]:
        return asdict(self)


def parse_fingerprint(found: Any) -> Fingerprint | None:
    """What `to_dict` wrote; None for anything else."""
    if not isinstance(found, Mapping) or set(found) != {"digest", "dtype"}:
        return None
    digest, dtype = found["digest"], found["dtype"]
    return Fingerprint(digest, dtype) if isinstance(digest, str) and isinstance(dtype, str) and dtype in DTYPES else None


def weights_fingerprint(pieces: Mapping[str, Piece]) -> Fingerprint:
    """Return the fingerprint of parameters by our names, as `formats.dense.Dense.pieces` has them. Milliseconds on a mapped checkpoint."""
    digest, sizes = blake2b(digest_size=16), dict.fromkeys(DTYPES, 0)
    names = {dtype: name for name, dtype in DTYPES.items()}
    for name in sorted(pieces):
        piece = pieces[name]
        sample = parameter_sample(piece, _SAMPLE)
        sizes[names[sample.dtype]] += sample.size
        digest.update(repr((name, piece.shape)).encode())
        digest.update(np.ascontiguousarray(converted(sample, "bfloat16"), "<u2").tobytes())
    return Fingerprint(digest.hexdigest(), max(sizes, key=lambda name: sizes[name]))


def text_fingerprint(text: str) -> str:
    """Of a chat template, whatever the spaces around it."""
    return blake2b(text.strip().encode(), digest_size=16).hexdigest()
