"""Weights as numbers, in the family's own tensors: what most checkpoints are, and what the other formats are made from. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from llmkit.checkpoint.arrays import NUMPY_DTYPES, check_assignment, check_tied_head, log_skipped, parameter_array, release
from llmkit.checkpoint.files import Checkpoint
from llmkit.checkpoint.formats import FINGERPRINT, RECORD
from llmkit.checkpoint.weights import Assignment, Piece, assign
from llmkit.families import family

if TYPE_CHECKING:
    from llmkit.checkpoint.arrays import Fingerprint
    from llmkit.checkpoint.formats import StoredWeight
    from llmkit.checkpoint.source import ModelSource
    from llmkit.quant.schemes import Choice

# What parameters may be in memory, as they are stored; the others (float64, 8-bit floats) are converted.
_RUN_AS_STORED = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class Dense:
    """The parameters of one checkpoint, cut out of its tensors by the rules of the family; the interface of every format.

    A format that packs some of a family's tensors, each with others next to it, overrides `family_tensors`, `weight` and what is said of
    sizes. What is wrong with the files is one CheckpointError, on first use.

    Attributes:
        quantized: whether weights are codes, so that the model is not trained, saved or quantized again.
        native_problem: why the native kernels do not take these weights, or None.
        transformers_reads: whether transformers computes with the folder as it is.
    """

    quantized: ClassVar[bool] = False
    native_problem: ClassVar[str | None] = None
    transformers_reads: ClassVar[bool] = True

    def __init__(self, source: ModelSource) -> None:
        self.source = source

    @property
    def record(self) -> Any:
        """What config.json says of the format."""
        return self.source.config.hf.get(RECORD)

    def family_tensors(self) -> Checkpoint:
        """The tensors by the family's names, with the shapes of the numbers they stand for."""
        return self.source.tensors

    @cached_property
    def assignment(self) -> Assignment:
        """Which part of which tensor is which parameter; no weight is read for it."""
        source = self.source
        found = assign(self.family_tensors(), family(source.config.model_type), source.config, source.shapes)
        check_assignment(source.folder, found)
        log_skipped(found.skipped)
        return found

    @cached_property
    def pieces(self) -> dict[str, Piece]:
        """The assignment in the order of the model. A head that is stored although it is tied is compared with the embedding first."""
        check_tied_head(self.source.folder, self.assignment)
        return {name: self.assignment.pieces[name] for name in self.source.shapes}

    @property
    def storage(self) -> Mapping[str, str | Choice]:
        """How each parameter is stored: a safetensors dtype, or the scheme and group of its codes; the dtype it has in memory where codes
        are dequantized on reading."""
        return {name: piece.tensor.dtype for name, piece in self.assignment.pieces.items()}

    @property
    def stored_bytes(self) -> int:
        """Bytes of the parameters in the files, without padding."""
        return sum(
            math.prod(piece.shape) * np.dtype(NUMPY_DTYPES[piece.tensor.dtype]).itemsize for piece in self.assignment.pieces.values()
        )

    @property
    def copied_bytes(self) -> int:
        """Bytes, as they are in memory, of the parameters that are not used as they lie in the file."""
        # As `parameter_array` makes them: float16 out of 8-bit floats, float32 out of float64, the same dtype where only transposed.
        return sum(
            math.prod(piece.shape) * (2 if _itemsize(piece) < 4 else 4)
            for piece in self.assignment.pieces.values()
            if piece.transpose or piece.tensor.dtype not in _RUN_AS_STORED
        )

    @property
    def skipped(self) -> tuple[str, ...]:
        """Stored tensors that the family does not need."""
        return tuple(self.assignment.skipped)

    def weight(self, name: str) -> StoredWeight:
        """A parameter by our name: float32, float16 or (as uint16) bfloat16, contiguous, mapped where that is possible; or packed."""
        return parameter_array(self.pieces[name])

    def release(self, name: str) -> None:
        """Let go of the pages of a parameter that will not be read again, so that a pass over a large model takes little memory."""
        release(self.pieces[name].tensor)

    def dtype(self, on_cpu: bool) -> str:
        """The dtype in which PyTorch runs the model where nobody chooses: what config.json states, else that of the largest tensor."""
        hf = self.source.config.hf
        if hf.get("dtype") is not None or hf.get("torch_dtype") is not None:
            return self.source.config.dtype
        largest = max(self.source.tensors.values(), key=lambda tensor: tensor.nbytes)
        return _RUN_AS_STORED.get(largest.dtype, "float32")

    @property
    def fingerprint(self) -> Fingerprint | None:
        """The fingerprint of the weights before they were quantized, as recorded; None where nothing is."""
        from llmkit.checkpoint.arrays import parse_fingerprint, weights_fingerprint

        return parse_fingerprint(self.source.config.hf.get(FINGERPRINT)) if self.quantized else weights_fingerprint(self.pieces)


def _itemsize(piece: Piece) -> int:
    """Bytes of one number as it is stored."""
    return np.dtype(NUMPY_DTYPES[piece.tensor.dtype]).itemsize
