"""bitsandbytes' 4 bits (NF4 and FP4), as transformers' BitsAndBytesConfig(load_in_4bit=True) saves them.

config.json has a `quantization_config` with the method "bitsandbytes". A linear's `NAME.weight` holds packed codes, and next to it stand

    NAME.weight.absmax            uint8 [blocks] where the scales are quantized themselves, else float32
    NAME.weight.quant_map         float32 [16], what the codes stand for
    NAME.weight.nested_absmax     float32 [ceil(blocks / 256)]
    NAME.weight.nested_quant_map  float32 [256]
    NAME.weight.quant_state.bitsandbytes__nf4   the bytes of a JSON object: shape, dtype, blocksize, nested_offset, ...

(bitsandbytes, `QuantState.as_dict(packed=True)`). Names are the family's own, its fused tensors stay fused, and a Conv1D of GPT-2 is
stored as [out, in]. torch is imported where a matrix is built.
Embeddings, head, norms, biases and experts stay in the dtype of the checkpoint.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, NoReturn

import numpy as np

from llmkit.checkpoint.arrays import NUMPY_DTYPES, mismatch, stored_array
from llmkit.checkpoint.files import Checkpoint, TensorFile
from llmkit.checkpoint.formats.dense import Dense
from llmkit.checkpoint.weights import Piece, Rules, is_transposed, reading_rules
from llmkit.errors import CheckpointError
from llmkit.families import family
from llmkit.quant.schemes import NF4, Choice, choose

if TYPE_CHECKING:
    from torch import Tensor

    from llmkit.checkpoint.formats import StoredWeight
    from llmkit.quant.nf4 import Nf4Matrix

METHOD = "bitsandbytes"
STATE = "quant_state.bitsandbytes__"
_PARTS = re.compile(rf"(?P<weight>.+\.weight)\.(?P<part>absmax|quant_map|nested_absmax|nested_quant_map|{re.escape(STATE)}[a-z0-9]+)")
_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)


class Bitsandbytes(Dense):
    """NF4 and FP4, with and without double quantization, in any block size, under the family's own names.

    Raises CheckpointError for 8 bits, and where anything in the folder does not match.
    """

    quantized = True
    native_problem = "they do not run bitsandbytes' 4 bits; a folder of `llmkit quantize --scheme q4` is faster"

    @cached_property
    def _opened(self) -> tuple[Checkpoint, dict[str, Nf4Matrix]]:
        """The tensors with what is packed as if it were dense, and the matrices by the family's names."""
        source, record = self.source, self.record
        if record.get("load_in_8bit") or record.get("_load_in_8bit"):
            raise CheckpointError(
                f"{source.folder} is in bitsandbytes' 8 bits (load_in_8bit), of which llmkit reads 4 bits only. "
                "Use the checkpoint it was made from; --scheme q8 writes it in 8 bits."
            )
        tensors = dict(source.tensors)
        rules = reading_rules(family(source.config.model_type), source.config)
        parts: dict[str, dict[str, TensorFile]] = {}
        for name in list(tensors):
            if found := _PARTS.fullmatch(name):
                parts.setdefault(found["weight"], {})[found["part"]] = tensors.pop(name)
        if not parts:
            raise CheckpointError(
                f"{source.folder} says that it is in 4 bits, but none of its tensors is. Download or copy the folder again."
            )
        matrices, problems = {}, []
        for name, states in parts.items():
            try:
                matrices[name] = _matrix(tensors, name, states)
                tensors[name] = _unpacked(tensors[name], matrices[name], rules)
            except CheckpointError as error:
                problems.append(str(error))
                tensors.pop(name, None)
        if problems:
            raise mismatch(source.folder, problems)
        return Checkpoint(source.folder, tensors), matrices

    def family_tensors(self) -> Checkpoint:
        return self._opened[0]

    @cached_property
    def pieces(self) -> dict[str, Piece]:
        pieces = super().pieces
        if embeddings := [name for name, piece in pieces.items() if "embed" in name and piece.tensor.name in self._opened[1]]:
            raise mismatch(self.source.folder, [f"never in 4 bits: {name}" for name in embeddings])
        return pieces

    @property
    def storage(self) -> Mapping[str, str | Choice]:
        # By what transformers packs, so that the planner needs no torch to look into each matrix.
        dense = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[self.source.config.dtype]
        return {name: choose(NF4, param) or dense for name, param in self.source.config.parameters.items()}

    @property
    def stored_bytes(self) -> int:
        return self.source.tensors.nbytes

    copied_bytes = 0

    def weight(self, name: str) -> StoredWeight:
        piece = self.pieces[name]
        matrix = self._opened[1].get(piece.tensor.name)
        if matrix is None:
            return super().weight(name)
        return matrix if piece.rows is None else matrix.rows(*piece.rows)

    def dtype(self, on_cpu: bool) -> str:
        return self.source.config.dtype


def _unpacked(tensor: TensorFile, matrix: Nf4Matrix, rules: Rules) -> TensorFile:
    """The tensor with the shape it had before it was packed, by which it is assigned; a Conv1D's, which is stored as [out, in], too."""
    shape = matrix.shape[::-1] if is_transposed(tensor.name, rules) else matrix.shape
    return replace(tensor, dtype="F32", shape=shape)


def _matrix(checkpoint: Mapping[str, TensorFile], name: str, parts: Mapping[str, TensorFile]) -> Nf4Matrix:
    """One matrix from its tensors; CheckpointError for whatever does not match."""
    import torch

    from llmkit.quant.nf4 import NESTED_BLOCK, Nested, Nf4Matrix

    def wrong(what: str) -> NoReturn:
        raise CheckpointError(f"not in bitsandbytes' 4 bits: {name!r} {what}")

    def take(part: str, dtype: str, size: int) -> Tensor:
        tensor = parts.get(part)
        if tensor is None or tensor.dtype != dtype or math.prod(tensor.shape) != size:
            has = "is missing" if tensor is None else f"is {tensor.dtype} {list(tensor.shape)}"
            wrong(f"needs {part} {dtype} [{size}], which {has}")
        return _mapped(tensor)

    kinds = [part.removeprefix(STATE) for part in parts if part.startswith(STATE)]
    if len(kinds) != 1 or kinds[0] not in ("nf4", "fp4"):
        wrong(f"has the quant_state of {', '.join(kinds) or 'nothing'}, not of nf4 or fp4")
    try:
        state = json.loads(bytes(parts[STATE + kinds[0]].data))
        shape, block, nested = state["shape"], state["blocksize"], "nested_offset" in state
        offset = float(state["nested_offset"]) if nested else 0.0
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        wrong(f"has a quant_state that cannot be read ({type(error).__name__}: {error})")
    if not isinstance(shape, list) or len(shape) != 2 or not all(type(size) is int and 0 < size < 2**31 for size in shape):
        wrong(f"has the shape {shape!r:.80}")
    if type(block) is not int or block not in _BLOCKS or (nested and state.get("nested_blocksize") != NESTED_BLOCK):
        wrong(f"has blocks of {block!r:.80}, and scales in blocks of {state.get('nested_blocksize')!r:.80}")
    if not math.isfinite(offset):
        wrong(f"has the nested_offset {offset}")
    count = math.prod(shape)
    blocks, packed = -(-count // block), checkpoint.get(name)
    if packed is None or packed.nbytes != -(-count // 2):
        wrong(f"has {0 if packed is None else packed.nbytes} bytes of codes, not {-(-count // 2)} for {shape}")
    codes = torch.frombuffer(packed.data, dtype=torch.uint8)
    values, scales = take("quant_map", "F32", 16), take("absmax", "U8" if nested else "F32", blocks)
    inner = None
    if nested:
        inner = Nested(take("nested_quant_map", "F32", 256), take("nested_absmax", "F32", -(-blocks // NESTED_BLOCK)), torch.tensor(offset))
    return Nf4Matrix((shape[0], shape[1]), codes, scales, values, inner, block, scheme=kinds[0])


def _mapped(tensor: TensorFile) -> Tensor:
    import torch

    array = stored_array(tensor) if tensor.dtype in NUMPY_DTYPES else np.frombuffer(tensor.data, np.uint8)
    return torch.from_numpy(array).view(-1)
