"""NF4 (QLoRA, arXiv:2305.14314) as bitsandbytes stores it: 4-bit codes into 16 numbers, a scale for each block of weights.

The weights of a matrix `[N, K]` are one run, row after row, in blocks of 64: a block may begin in one row and end in the next. With
double quantization the scales are 8-bit codes themselves, in blocks of 256 with a float32 scale each, about their mean:

    weight = values[code] * absmax[block]         absmax[block] = nested_map[code] * nested_absmax[block / 256] + nested_offset

4.13 bits a weight. Dequantizing needs PyTorch alone; quantizing, and products on CUDA, are bitsandbytes'.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmkit.compat import bitsandbytes

BLOCK = 64  # weights with one scale, of what is written; other sizes are read
NESTED_BLOCK = 256  # scales with one scale
_CHUNK = 1 << 16  # weights dequantized at a time: what stands between codes and weights stays in the second-level cache


@dataclass(frozen=True)
class Nested:
    """Scales of scales."""

    map: Tensor  # float32 [256]
    absmax: Tensor  # float32 [ceil(blocks / 256)]
    offset: Tensor  # float32 []


@dataclass(frozen=True, eq=False)
class Nf4Matrix:
    """A matrix in the layout above, or some rows of one."""

    shape: tuple[int, int]  # [N, K]
    codes: Tensor  # uint8 [ceil((skip + N K) / 2)]: the first of two weights in the upper half
    absmax: Tensor  # float32 [blocks], or uint8 where nested
    values: Tensor  # float32 [16]
    nested: Nested | None = None
    block: int = BLOCK
    skip: int = 0  # weights in the first block that belong to the rows before
    scheme: str = "nf4"  # or fp4: the same with other values

    @property
    def nbytes(self) -> int:
        nested = () if self.nested is None else (self.nested.map, self.nested.absmax, self.nested.offset)
        return sum(tensor.nbytes for tensor in (self.codes, self.absmax, self.values, *nested))

    def rows(self, start: int, stop: int) -> Nf4Matrix:
        """Rows of it, for a tensor that holds several matrices; the scales of a part are float32."""
        columns = self.shape[1]
        if (start, stop) == (0, self.shape[0]):
            return self
        first, last = start * columns, stop * columns
        blocks = slice(first // self.block, -(-last // self.block))
        codes = self.codes[blocks.start * self.block // 2 : -(-last // 2)].clone()
        absmax = _scales(self)[blocks].clone()
        shape = stop - start, columns
        return replace(self, shape=shape, codes=codes, absmax=absmax, nested=None, skip=first - blocks.start * self.block)

    def dequantize(self) -> Tensor:
        """Return the matrix, float32 `[N, K]`."""
        count = self.skip + prod(self.shape)
        scales = _scales(self)
        # A byte is two codes, so one look-up in a table [256, 2] gives two weights.
        byte = torch.arange(256, device=self.codes.device)
        pairs = torch.stack((self.values[byte >> 4], self.values[byte & 15]), 1)
        out = torch.empty(self.codes.numel() * 2, device=self.codes.device)
        step = max(1, _CHUNK // self.block) * self.block
        for begin in range(0, count, step):
            part = out[begin : begin + step]
            part.copy_(F.embedding(self.codes[begin // 2 : (begin + step) // 2].int(), pairs).view(-1))
            whole = len(part) // self.block * self.block
            own = scales[begin // self.block : (begin + step) // self.block]  # one for each block of this part
            part[:whole].view(-1, self.block).mul_(own[: whole // self.block, None])
            part[whole:].mul_(own[-1])  # the last block of the matrix may be a short one; nothing where all are whole
        return out[self.skip : count].view(self.shape)


def _scales(matrix: Nf4Matrix) -> Tensor:
    """float32 `[blocks]`."""
    nested = matrix.nested
    if nested is None:
        return matrix.absmax
    blocks = matrix.absmax.numel()
    scales = nested.map[matrix.absmax.int()] * nested.absmax.repeat_interleave(NESTED_BLOCK)[:blocks]
    return scales.add_(nested.offset)


class Quantizer:
    """Quantizes the rows of a matrix as they come; all but the last part must be whole blocks."""

    def __init__(self) -> None:
        self.codes: list[Tensor] = []
        self.absmax: list[Tensor] = []

    def add(self, rows: Tensor) -> None:
        """rows: `[rows, K]`, float32, float16 or bfloat16. ValueError for numbers that are not finite."""
        if not bool(torch.isfinite(rows).all()):
            raise ValueError("it has values that are not finite")
        codes, state = bitsandbytes().functional.quantize_4bit(rows.contiguous(), blocksize=BLOCK, quant_type="nf4")
        self.codes.append(codes.view(-1))
        self.absmax.append(state.absmax)
        self.values = state.code

    def matrix(self, shape: tuple[int, int]) -> Nf4Matrix:
        """The matrix, with double quantization over all of it."""
        absmax = torch.cat(self.absmax)
        offset = absmax.mean()  # scales are positive: about their mean they use both signs of the 8-bit code
        codes, state = bitsandbytes().functional.quantize_blockwise(absmax - offset, blocksize=NESTED_BLOCK)
        return Nf4Matrix(shape, torch.cat(self.codes), codes, self.values, Nested(state.code, state.absmax, offset))


def quantize(weight: Tensor) -> Nf4Matrix:
    """A matrix `[N, K]` (float32, float16 or bfloat16) in NF4 with double quantization."""
    quantizer = Quantizer()
    quantizer.add(weight.detach())
    return quantizer.matrix((weight.shape[0], weight.shape[1]))


class Nf4Linear(nn.Module):
    """A linear with an NF4 weight `[out_features, in_features]`.

    On CUDA bitsandbytes multiplies, elsewhere the weight is dequantized for the product. The gradient reaches the input and the bias.
    """

    codes: Tensor
    absmax: Tensor
    values: Tensor
    nested_map: Tensor | None
    nested_absmax: Tensor | None
    nested_offset: Tensor | None

    def __init__(self, matrix: Nf4Matrix, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = matrix.shape
        self.block, self.skip, self.kind = matrix.block, matrix.skip, matrix.scheme
        self.bias = bias
        nested = matrix.nested
        for name in ("codes", "absmax", "values"):
            self.register_buffer(name, getattr(matrix, name))
        for name in ("map", "absmax", "offset"):
            self.register_buffer(f"nested_{name}", None if nested is None else getattr(nested, name))

    quantized = None  # in no format of the native kernels

    @property
    def shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    @property
    def qweight(self) -> Tensor:
        """The codes, under the name by which PEFT asks a quantized linear where it is."""
        return self.codes

    @property
    def matrix(self) -> Nf4Matrix:
        nested = None
        if self.nested_map is not None and self.nested_absmax is not None and self.nested_offset is not None:
            nested = Nested(self.nested_map, self.nested_absmax, self.nested_offset)
        return Nf4Matrix(self.shape, self.codes, self.absmax, self.values, nested, self.block, self.skip, self.kind)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight `[out_features, in_features]`, float32 unless another dtype is asked for."""
        return _dense(self.matrix, dtype or torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and (x.requires_grad or (self.bias is not None and self.bias.requires_grad)):
            out: Tensor = _Product.apply(x, self.matrix)  # type: ignore[no-untyped-call]
        else:
            out = product(x, self.matrix)
        return out if self.bias is None else out + self.bias.to(out.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, {self.kind}"

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """`.to(dtype)` must not round the scales: they are part of the stored format."""
        # Scales that are float32 (absmax without double quantization, the nested ones); codes are uint8, which no conversion touches.
        kept = {name: buffer for name, buffer in self.named_buffers() if buffer.dtype == torch.float32}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in kept.items():
            if getattr(self, name).dtype != torch.float32:
                setattr(self, name, buffer.to(getattr(self, name).device))
        return self


def product(x: Tensor, matrix: Nf4Matrix) -> Tensor:
    """`x @ weight.T`, in the dtype of `x`."""
    if x.device.type == "cuda" and not matrix.skip:
        return bitsandbytes_product(x, matrix)
    return x @ _dense(matrix, x.dtype).T


def bitsandbytes_product(x: Tensor, matrix: Nf4Matrix) -> Tensor:
    """The same by bitsandbytes' kernels, which know no part of a block."""
    with torch.no_grad():
        out: Tensor = bitsandbytes().matmul_4bit(x, matrix.codes.view(-1, 1), quant_state=_state(matrix, x.dtype))
    return out


def bitsandbytes_dense(matrix: Nf4Matrix, dtype: torch.dtype) -> Tensor:
    weight: Tensor = bitsandbytes().functional.dequantize_4bit(matrix.codes.view(-1, 1), _state(matrix, dtype))
    return weight


def _dense(matrix: Nf4Matrix, dtype: torch.dtype) -> Tensor:
    if matrix.codes.device.type == "cuda" and not matrix.skip:
        return bitsandbytes_dense(matrix, dtype)
    return matrix.dequantize().to(dtype)


def _state(matrix: Nf4Matrix, dtype: torch.dtype) -> Any:
    state = bitsandbytes().functional.QuantState
    nested, more = matrix.nested, {}
    if nested is not None:
        state2 = state(absmax=nested.absmax, blocksize=NESTED_BLOCK, code=nested.map, dtype=torch.float32)
        more = {"offset": nested.offset, "state2": state2}
    return state(matrix.absmax, torch.Size(matrix.shape), matrix.values, matrix.block, matrix.scheme, dtype, **more)


class _Product(torch.autograd.Function):
    """The product with the weight dequantized for each direction: between them only the packed one is held."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: Nf4Matrix) -> Tensor:
        ctx.matrix = matrix
        return product(x, matrix)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,) = grads
        return grad @ _dense(ctx.matrix, grad.dtype), None
