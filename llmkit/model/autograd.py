"""Training on a CPU in float32: the products, the attention and the memory that native kernels give to PyTorch's autograd.

Everything here has a PyTorch form elsewhere that defines it (`F.linear`, `model.attention.attention`); tests hold both equal.
"""

from __future__ import annotations

import weakref
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from math import prod
from threading import Lock
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmkit.kernels.training_ops import MatmulWeight, TrainingKernels, training_kernels
from llmkit.model.attention import Attention, Documents
from llmkit.model.layers import RMSNorm, rms_norm
from llmkit.model.rope import rotate
from llmkit.model.transformer import Transformer


def kernels_for(x: Tensor) -> TrainingKernels | None:
    """Return what computes with x natively: float32 on a CPU. torch.compile cannot look into them, and writes kernels of its own."""
    if x.device.type != "cpu" or x.dtype != torch.float32 or torch.compiler.is_compiling():
        return None
    return training_kernels()


def speed_up(model: Transformer) -> None:
    """Norms, rotations and the attention of whole documents by the native kernels, in training on a CPU that has them."""
    if next(model.model.norm.parameters()).device.type != "cpu" or training_kernels() is None:
        return
    model.of_documents = document_attention
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.normalise = normalised
        elif isinstance(module, Attention):
            module.products = replace(module.products, rotate=rotated)


class Memory:
    """Float32 tensors in memory that is used again when they are gone.

    Activations come and go in the same sizes at every step. The system's allocator gives large pieces back and takes them
    anew, which costs a fault for every page, or keeps them and leaves holes; here a piece waits for the next tensor that it fits.

    Tensors come and go in any thread. The last reference may also go, by the garbage collector's hand, while `empty` looks for a
    piece: what comes back is only put down, and sorted in by whoever asks next.
    """

    SMALL = 1 << 16  # numbers; smaller tensors are PyTorch's own

    def __init__(self) -> None:
        self._free: list[NDArray[np.float32]] = []  # the smallest first
        self._returned: deque[NDArray[np.float32]] = deque()
        self._lock = Lock()  # of _free

    def empty(self, *shape: int) -> Tensor:
        count = prod(shape)
        if count < self.SMALL:
            return torch.empty(shape)
        piece = self._fitting(count)
        if piece is None:
            piece = np.empty(count + count // 4, np.float32)  # for a longer batch; it takes memory when it is written to
        lent = piece[:count].reshape(shape)
        weakref.finalize(lent, self._returned.append, piece).atexit = False  # PyTorch drops it with the storage of the tensor
        return torch.from_numpy(lent)

    def like(self, x: Tensor) -> Tensor:
        return self.empty(*x.shape)

    @property
    def waiting(self) -> int:
        """Numbers that wait for a tensor."""
        return sum(map(len, (*self._free, *self._returned)))

    def _fitting(self, count: int) -> NDArray[np.float32] | None:
        """A waiting piece of `count` to twice as many numbers. Without one, what waits in sizes that are not asked for makes room.

        So in all no more is held than was once in use.
        """
        with self._lock:
            while self._returned:
                insort(self._free, self._returned.popleft(), key=len)
            place = bisect_left(self._free, count, key=len)
            if place < len(self._free) and len(self._free[place]) <= 2 * count:
                return self._free.pop(place)
            while count > 0 and self._free:
                count -= len(self._free.pop())
        return None


memory = Memory()


def matmul_weight(
    weight: Tensor, bias: Tensor | None = None, pair: tuple[Tensor, Tensor] | None = None, scale: float = 1.0
) -> MatmulWeight:
    """Return `W + scale B A` for the matmuls below. weight `[out, in]` in a float format; pair: A `[rank, in]` and B `[out, rank]`."""
    weight = weight.detach()
    stored = weight.view(torch.uint16) if weight.dtype == torch.bfloat16 else weight  # numpy has no bfloat16: its bits travel
    a, b = (None, None) if pair is None else (_array(pair[0]), _array(pair[1]))
    return MatmulWeight(np.from_dlpack(stored.contiguous()), None if bias is None else _array(bias), a, b, scale)


def _array(x: Tensor) -> NDArray[np.float32]:
    """Return x to be read. By DLPack: `numpy()` would forbid for ever that the storage is resized, which FSDP does."""
    array: NDArray[Any] = np.from_dlpack(x.detach().float().contiguous())
    return array


def _kernels() -> TrainingKernels:
    kernels = training_kernels()
    assert kernels is not None, "asked for without kernels_for"
    return kernels


def matmuls(x: Tensor, weights: Sequence[MatmulWeight]) -> list[Tensor]:
    """Return `x U^T + bias` for each weight U; x float32 `[tokens, in]`."""
    out = [memory.empty(len(x), len(one.weight)) for one in weights]
    _kernels().matmuls(weights, [_array(x)], [y.numpy() for y in out], back=False, threads=torch.get_num_threads())
    return out


def matmuls_back(grads: Sequence[Tensor], weights: Sequence[MatmulWeight]) -> Tensor:
    """Return the gradient of x `[tokens, in]` from those of the outputs, float32 `[tokens, out]`."""
    dx = memory.empty(len(grads[0]), weights[0].weight.shape[1])
    arrays = [_array(grad) for grad in grads]
    _kernels().matmuls(weights, arrays, [dx.numpy()], back=True, threads=torch.get_num_threads())
    return dx


def adapter_gradients(x: Tensor, xa: Tensor, parts: Sequence[tuple[Tensor, float, Tensor]]) -> tuple[Tensor, list[Tensor]]:
    """Return the gradients of A `[sum of ranks, in]`, of all parts one below the other, and of each B.

    x `[tokens, in]` and xa, `x A^T` of all A; parts: B `[out, rank]`, the scale and the gradient of the output `[tokens, out]`.
    """
    da, dbs = x.new_empty(xa.shape[1], x.shape[1]), [torch.empty_like(b, memory_format=torch.contiguous_format) for b, _, _ in parts]
    if not len(x):
        return da.zero_(), [db.zero_() for db in dbs]
    factors = [(_array(b), scale) for b, scale, _ in parts]
    dys = [_array(grad) for _, _, grad in parts]
    _kernels().adapter_gradients(factors, _array(x), _array(xa), dys, da.numpy(), [db.numpy() for db in dbs], torch.get_num_threads())
    return da, dbs


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """Return `silu(gate) * up`, float32 of any shape; no gradients."""
    h = memory.like(up)
    _kernels().gate(_array(gate), _array(up), h.numpy(), torch.get_num_threads())
    return h


def gated_back(gate: Tensor, up: Tensor, dh: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of gate and up from that of `gated`."""
    dgate, dup = memory.like(gate), memory.like(up)
    _kernels().gate_back(_array(gate), _array(up), _array(dh), dgate.numpy(), dup.numpy(), torch.get_num_threads())
    return dgate, dup


def normalised(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`layers.rms_norm` with a gradient for x alone; where the weight is trained, that function itself."""
    if weight.requires_grad or kernels_for(x) is None:
        return rms_norm(x, weight, eps)
    out: Tensor = _Normalised.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return out


def rotated(x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """`rope.rotate`."""
    if kernels_for(x) is None:
        return rotate(x, tables)
    out: Tensor = _Rotated.apply(x, *tables)  # type: ignore[no-untyped-call]
    return out


class _Normalised(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x, y = x.contiguous(), memory.like(x)
        _kernels().rms_norm(_array(x), _array(weight), eps, y.numpy(), torch.get_num_threads())
        ctx.eps = eps
        ctx.save_for_backward(x, weight)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, weight = ctx.saved_tensors
        dx = memory.like(x)
        _kernels().rms_norm_back(_array(x), _array(weight), ctx.eps, _array(grads[0]), dx.numpy(), torch.get_num_threads())
        return dx, None, None


class _Rotated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        cos, sin = (t.expand(*x.shape[:2], *t.shape[2:]) for t in (cos, sin))
        y = memory.like(x)
        _kernels().rotate(_array(x), _array(cos), _array(sin), y.numpy(), torch.get_num_threads())
        ctx.save_for_backward(cos, sin)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        cos, sin = ctx.saved_tensors
        dx = memory.like(grads[0])
        _kernels().rotate(_array(grads[0]), _array(cos), _array(sin), dx.numpy(), torch.get_num_threads(), back=True)
        return dx, None, None


def document_attention(q: Tensor, k: Tensor, v: Tensor, documents: Documents, window: int | None, scale: float) -> Tensor:
    """Causal attention within documents, with gradients; see `attention.DocumentAttention`.

    q `[batch, seq, heads, head_dim]`, k and v `[batch, seq, kv_heads, head_dim]`, float32; returns the shape of q.
    window: so many positions are seen, the query's own among them; None: all.
    """
    k, v = documents.keys(k), documents.keys(v)
    out: Tensor = _DocumentAttention.apply(q, k, v, documents, window or 0, scale)  # type: ignore[no-untyped-call]
    return out


class _DocumentAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, documents: Documents, window: int, scale: float) -> Tensor:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        out, lse = memory.like(q), torch.empty(q.shape[:-1])
        ctx.sizes, ctx.documents = (q.shape[-2], k.shape[-2], q.shape[-1], window, scale), documents
        arrays = _array(q), _array(k), _array(v), out.numpy(), lse.numpy()
        _kernels().varlen_attention(ctx.sizes, documents.lengths, documents.key_lengths, arrays, None, torch.get_num_threads())
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        dq, dk, dv = memory.like(q), memory.like(k), memory.like(v)
        arrays = _array(q), _array(k), _array(v), _array(out), _array(lse)
        gradients = _array(grads[0]), dq.numpy(), dk.numpy(), dv.numpy()
        lengths = ctx.documents.lengths, ctx.documents.key_lengths
        _kernels().varlen_attention(ctx.sizes, *lengths, arrays, gradients, torch.get_num_threads())
        return dq, dk, dv, None, None, None
