"""Quantized weights as modules: what the model takes in the place of its dense linears and its embedding."""

from __future__ import annotations

import logging
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from llmkit.kernels import reference
from llmkit.kernels.format import QuantizedMatrix
from llmkit.kernels.reference import Packed
from llmkit.kernels.training_ops import dequantize, training_kernels

logger = logging.getLogger(__name__)


class _Quantized(nn.Module):
    """Holds a packed matrix as buffers, so that it moves with the model; codes and scales are never converted or trained."""

    codes: Tensor
    scales: Tensor
    row_scale: Tensor
    codebook: Tensor | None

    def __init__(self, matrix: QuantizedMatrix) -> None:
        super().__init__()
        packed = Packed.of(matrix)  # tensors over the matrix's own memory, which may be a mapped file
        self.group, self.shape = packed.group, packed.shape
        for name in ("codes", "scales", "row_scale", "codebook"):
            self.register_buffer(name, getattr(packed, name))

    @property
    def packed(self) -> Packed:
        return Packed(self.group, self.shape, self.codes, self.scales, self.row_scale, self.codebook)

    @property
    def matrix(self) -> QuantizedMatrix:
        """The same memory as arrays, as the native kernels take it; on a CPU only."""
        return _matrix(self.packed)

    @property
    def qweight(self) -> Tensor:
        """The codes, under the name by which PEFT asks a quantized linear which device it is on."""
        return self.codes

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight `[out_features, in_features]`, float32 unless another dtype is asked for: by the kernels where there are any."""
        return _dense(self.packed, dtype or torch.float32)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """`.to(dtype)` must not round the row scales: they are part of the stored format."""
        scale = self.row_scale  # float32 [rows, padded to 16], before the conversion
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.row_scale.dtype != torch.float32:
            self.row_scale = scale.to(self.row_scale.device)
        return self


class QuantizedLinear(_Quantized):
    """A linear with a quantized weight `[out_features, in_features]`.

    On a CPU the product is that of the native kernels (activations rounded to int8, see `kernels/reference.py`); on CUDA that of
    `kernels/triton` (activations as they are). While gradients flow, and on other devices, the weight is dequantized for the product;
    the gradient reaches the input and the bias, not the weight.
    """

    def __init__(self, matrix: QuantizedMatrix, bias: nn.Parameter | None = None) -> None:
        super().__init__(matrix)
        self.out_features, self.in_features = matrix.shape
        self.bias = bias

    @property
    def quantized(self) -> QuantizedMatrix | None:
        """The codes in place, for the native kernels; None where they are not on a CPU."""
        return self.matrix if self.codes.device.type == "cpu" else None

    def forward(self, x: Tensor) -> Tensor:
        return _product(x, self.packed, self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, group={self.group}"


class QuantizedEmbedding(_Quantized):
    """An embedding with a quantized weight `[num_embeddings, embedding_dim]`; a head too, where the model ties both."""

    def __init__(self, matrix: QuantizedMatrix, dtype: torch.dtype = torch.float32) -> None:
        """dtype: of the rows it gives."""
        super().__init__(matrix)
        self.num_embeddings, self.embedding_dim = matrix.shape
        self.dtype = dtype

    def forward(self, ids: Tensor) -> Tensor:
        kernels = _kernels(ids.device)
        return reference.rows(self.packed, ids).to(self.dtype) if kernels is None else kernels.rows(self.packed, ids, self.dtype)

    def logits(self, x: Tensor) -> Tensor:
        """Final hidden states `[..., embedding_dim]` times the transposed table."""
        return _product(x, self.packed, None)


def _product(x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    # With gradients the product is one that can be turned round: x W^T forwards, g W backwards, by one and the same float W. Rounded
    # activations would make the two disagree.
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        out: Tensor = _Dequantized.apply(x, packed)  # type: ignore[no-untyped-call]
    elif (kernels := _kernels(x.device)) is not None:
        out = kernels.linear(x, packed)
    elif x.device.type == "cpu":
        return reference.linear(x, packed, bias).to(x.dtype)  # the bits of the native kernels, bias included
    else:
        out = x @ _dense(packed, x.dtype).T
    return out if bias is None else out + bias.to(out.dtype)


def _dense(packed: Packed, dtype: torch.dtype) -> Tensor:
    kernels = _kernels(packed.codes.device)
    return _dequantized(packed).to(dtype) if kernels is None else kernels.dequantize(packed, dtype)


def _matrix(packed: Packed) -> QuantizedMatrix:
    codebook = None if packed.codebook is None else packed.codebook.numpy()  # `numpy()` shares memory: nothing is copied
    codes, scales, row_scale = (t.numpy() for t in (packed.codes, packed.scales, packed.row_scale))
    return QuantizedMatrix("q8" if codebook is None else "q4", packed.group, packed.shape, codes, scales, row_scale, codebook)


def _dequantized(packed: Packed) -> Tensor:
    # The same bits either way; the kernels are a hundred times as fast, which counts where a weight is dequantized in every step.
    if packed.codes.device.type != "cpu" or training_kernels() is None:
        return reference.dequantize(packed)
    return torch.from_numpy(dequantize(_matrix(packed), torch.get_num_threads()))


def _kernels(device: torch.device) -> ModuleType | None:
    """What multiplies on this device, where it is not PyTorch."""
    return _triton() if device.type == "cuda" else None


@cache
def _triton() -> ModuleType | None:
    try:
        from llmkit.kernels import triton
    except ImportError as error:
        logger.warning("Quantized weights run in plain PyTorch on this GPU, which is slow: %s. Install it: pip install triton.", error)
        return None
    return triton


class _Dequantized(torch.autograd.Function):
    """`x @ weight.T` with the weight dequantized for each direction: between them only the packed one is held."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Packed) -> Tensor:
        ctx.packed = packed
        return x @ _dense(packed, x.dtype).T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,) = grads
        return grad @ _dense(ctx.packed, grad.dtype), None
