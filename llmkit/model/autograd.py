"""The operations of training: native kernels under PyTorch's autograd, in float32 on a CPU, and activation checkpointing.

Everything here has a PyTorch form in `layers.py` or `attention.py` that defines it; tests hold both equal.
"""

from __future__ import annotations

import weakref
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Sequence
from functools import partial
from math import prod
from threading import Lock
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from llmkit.compat import fused_attention_ops
from llmkit.kernels.format import QuantizedMatrix
from llmkit.kernels.training_ops import MatmulWeight, TrainingKernels, training_kernels
from llmkit.model.attention import PackedLayout, Rotary, attend_packed, rotate
from llmkit.model.layers import ForwardContext, HeadMatmuls, Ops, frozen_head, rms_norm, run_block


def run_checkpointed(block: nn.Module, x: Tensor, context: ForwardContext) -> Tensor:
    """Run a layer, but keep its input alone for the backward pass, which computes the rest again (arXiv:1604.06174).

    A step takes about a quarter longer in a fraction of the memory. Attention's work grows with the square of the length, so what
    PyTorch's fused attention gave is kept too. That of the native kernels is none of PyTorch's operations and is computed again,
    as attention with soft caps is.
    """
    if not torch.is_grad_enabled():
        return run_block(block, x, context)
    kept = partial(create_selective_checkpoint_contexts, fused_attention_ops())
    out: Tensor = checkpoint(block, x, context, use_reentrant=False, context_fn=kept)
    return out


class ActivationMemory:
    """Float32 tensors in memory that is used again when they are gone.

    Activations come and go in the same sizes at every step. The system's allocator gives large pieces back and takes them
    again, which costs a fault for every page, or keeps them and leaves holes; here a piece waits for the next tensor that it fits.

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
        if count < self.SMALL:  # the allocator keeps small pieces itself
            return torch.empty(shape)
        piece = self._fitting(count)
        if piece is None:
            piece = np.empty(count + count // 4, np.float32)  # for a longer batch; it takes memory when it is written to
        # The tensor's storage holds `lent`, a view of the piece: it goes with the last tensor on that storage, views and all.
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
            # Only here, under the lock: a finalizer may run in the middle of the bisection below, and must not move what it looks at.
            while self._returned:
                insort(self._free, self._returned.popleft(), key=len)
            place = bisect_left(self._free, count, key=len)
            if place < len(self._free) and len(self._free[place]) <= 2 * count:
                return self._free.pop(place)
            # None fits: as many numbers as will be allocated are given back to the system, the largest pieces first.
            while count > 0 and self._free:
                count -= len(self._free.pop())
        return None


def matmul_weight(
    weight: Tensor, bias: Tensor | None = None, factors: tuple[Tensor, Tensor] | None = None, scale: float = 1.0
) -> MatmulWeight:
    """Return `W + scale B A` for `NativeOps.matmul`. weight `[out, in]` in a float format; factors: A `[rank, in]` and B `[out, rank]`."""
    weight = weight.detach()
    stored = weight.view(torch.uint16) if weight.dtype == torch.bfloat16 else weight  # numpy has no bfloat16: its bits travel
    a, b = (None, None) if factors is None else (_array(factors[0]), _array(factors[1]))
    return MatmulWeight(np.from_dlpack(stored.contiguous()), None if bias is None else _array(bias), a, b, scale)


def _array(x: Tensor) -> NDArray[np.float32]:
    """Return x to be read. By DLPack: `numpy()` would forbid for ever that the storage is resized, which FSDP does."""
    array: NDArray[Any] = np.from_dlpack(x.detach().float().contiguous())
    return array


def native_ops() -> NativeOps | None:
    """Return the native operations of this machine with memory of their own, or None where there are no kernels for it."""
    kernels = training_kernels()
    return None if kernels is None else NativeOps(kernels)


class NativeOps:
    """What the native kernels compute for training. One object serves one run: activations live in its memory.

    `rms_norm`, `rotate`, `attend_packed` and `frozen_head` are operations of a model (`ops`) and carry gradients; what they are not made
    for they leave to PyTorch. The others are parts of fused functions with gradients (`lora/fused.py`): float32 on a CPU.
    """

    def __init__(self, kernels: TrainingKernels) -> None:
        self.kernels, self.memory = kernels, ActivationMemory()

    def ops(self) -> Ops:
        """Return what a model computes with."""
        return Ops(rms_norm=self.rms_norm, rotate=self.rotate, attend_packed=self.attend_packed, frozen_head=self.frozen_head)

    @staticmethod
    def takes(x: Tensor) -> bool:
        """Return whether x is float32 on a CPU, and not traced: torch.compile cannot look into kernels, and writes its own."""
        return x.device.type == "cpu" and x.dtype == torch.float32 and not torch.compiler.is_compiling()

    # -- without gradients ---------------------------------------------------------------------------------------------

    def matmul(self, x: Tensor, weights: Sequence[MatmulWeight]) -> list[Tensor]:
        """Return `x U^T + bias`, `[tokens, out]`, for each weight U; x `[tokens, in]`."""
        out = [self.memory.empty(len(x), len(one.weight)) for one in weights]
        self.kernels.matmuls(weights, [_array(x)], [y.numpy() for y in out], back=False, threads=torch.get_num_threads())
        return out

    def matmul_back(self, grads: Sequence[Tensor], weights: Sequence[MatmulWeight]) -> Tensor:
        """Return the gradient of x `[tokens, in]` from those of the outputs, each `[tokens, out]`."""
        dx = self.memory.empty(len(grads[0]), weights[0].weight.shape[1])
        arrays = [_array(grad) for grad in grads]
        self.kernels.matmuls(weights, arrays, [dx.numpy()], back=True, threads=torch.get_num_threads())
        return dx

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def quantized_matmul(self, x: Tensor, weight: QuantizedMatrix, bias: Tensor | None) -> Tensor:
        """Return `x W^T + bias` with the arithmetic of generation, activations rounded to int8; x `[tokens, in]`."""
        y = self.memory.empty(len(x), weight.shape[0])
        self.kernels.linear(weight, None if bias is None else _array(bias), _array(x), torch.get_num_threads(), y.numpy())
        return y

    def adapter_gradients(self, x: Tensor, xa: Tensor, parts: Sequence[tuple[Tensor, float, Tensor]]) -> tuple[Tensor, list[Tensor]]:
        """Return the gradients of A `[sum of ranks, in]`, of all parts one below the other, and of each B `[out, rank]`.

        x `[tokens, in]`; xa `[tokens, sum of ranks]`, `x A^T` of all A. parts: B, the scale and the gradient of the output `[tokens, out]`.
        """
        # Gradients live until the optimizer's step, so they are PyTorch's own and not of the activations' memory.
        da, dbs = x.new_empty(xa.shape[1], x.shape[1]), [torch.empty_like(b, memory_format=torch.contiguous_format) for b, _, _ in parts]
        if not len(x):  # an expert that no token was sent to
            return da.zero_(), [db.zero_() for db in dbs]
        factors = [(_array(b), scale) for b, scale, _ in parts]
        dys = [_array(grad) for _, _, grad in parts]
        outputs = da.numpy(), [db.numpy() for db in dbs]
        self.kernels.adapter_gradients(factors, _array(x), _array(xa), dys, *outputs, torch.get_num_threads())
        return da, dbs

    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        """Return `silu(gate) * up`, of any shape."""
        h = self.memory.like(up)
        self.kernels.gate(_array(gate), _array(up), h.numpy(), torch.get_num_threads())
        return h

    def gated_back(self, gate: Tensor, up: Tensor, dh: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients of gate and up from that of `gated`."""
        dgate, dup = self.memory.like(gate), self.memory.like(up)
        self.kernels.gate_back(_array(gate), _array(up), _array(dh), dgate.numpy(), dup.numpy(), torch.get_num_threads())
        return dgate, dup

    # -- with gradients ------------------------------------------------------------------------------------------------

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Return `layers.rms_norm`; the kernel gives x a gradient and the weight none, so a weight that is trained goes through PyTorch."""
        if weight.requires_grad or not self.takes(x):
            return rms_norm(x, weight, eps)
        out: Tensor = _RMSNorm.apply(x, weight, eps, self)  # type: ignore[no-untyped-call]
        return out

    def rotate(self, x: Tensor, tables: Rotary) -> Tensor:
        """Return `attention.rotate`."""
        if not self.takes(x):
            return rotate(x, tables)
        out: Tensor = _Rotate.apply(x, *tables, self)  # type: ignore[no-untyped-call]
        return out

    def attend_packed(
        self, q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout | None, window: int | None, scale: float, softcap: float | None
    ) -> Tensor:
        """Return `attention.attend_packed`; the kernel has no soft caps."""
        if softcap is not None or not self.takes(q):
            return attend_packed(q, k, v, layout, window, scale, softcap)
        if layout is None:  # the rows of a batch are sequences one behind the other, too
            rows = (q.shape[1],) * q.shape[0]
            layout = PackedLayout(rows, rows)
        k, v = layout.gather_keys(k), layout.gather_keys(v)
        out: Tensor = _AttendPacked.apply(q, k, v, layout, window or 0, scale, self)  # type: ignore[no-untyped-call]
        return out

    def frozen_head(self, hidden: Tensor, weight: Tensor) -> HeadMatmuls:
        """Return `layers.frozen_head`: a 16-bit head is upcast tile by tile, while it is multiplied."""
        if not self.takes(hidden):
            return frozen_head(hidden, weight)
        head = [matmul_weight(weight)]
        return lambda h: self.matmul(h, head)[0], lambda logits: self.matmul_back([logits], head)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, native: NativeOps) -> Tensor:
        x, y = x.contiguous(), native.memory.like(x)
        native.kernels.rms_norm(_array(x), _array(weight), eps, y.numpy(), torch.get_num_threads())
        ctx.eps, ctx.native = eps, native
        ctx.save_for_backward(x, weight)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, weight = ctx.saved_tensors
        dx = ctx.native.memory.like(x)
        ctx.native.kernels.rms_norm_back(_array(x), _array(weight), ctx.eps, _array(grads[0]), dx.numpy(), torch.get_num_threads())
        return dx, None, None, None


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, native: NativeOps) -> Tensor:
        cos, sin = (t.expand(*x.shape[:2], *t.shape[2:]) for t in (cos, sin))  # one row of positions may serve the whole batch
        y = native.memory.like(x)
        native.kernels.rotate(_array(x), _array(cos), _array(sin), y.numpy(), torch.get_num_threads())
        ctx.native = native
        ctx.save_for_backward(cos, sin)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        cos, sin = ctx.saved_tensors
        dx = ctx.native.memory.like(grads[0])
        # A rotation's gradient is turned back by the same angle.
        ctx.native.kernels.rotate(_array(grads[0]), _array(cos), _array(sin), dx.numpy(), torch.get_num_threads(), back=True)
        return dx, None, None, None


class _AttendPacked(torch.autograd.Function):
    """As FlashAttention-2 (arXiv:2307.08691): the scores are made again in the backward pass, from the logarithm of each row's sum."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, window: int, scale: float, native: NativeOps) -> Tensor:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        out, lse = native.memory.like(q), torch.empty(q.shape[:-1])  # lse [batch, seq, heads]
        ctx.sizes, ctx.layout, ctx.native = (q.shape[-2], k.shape[-2], q.shape[-1], window, scale), layout, native
        arrays = _array(q), _array(k), _array(v), out.numpy(), lse.numpy()
        native.kernels.varlen_attention(ctx.sizes, layout.lengths, layout.key_lengths, arrays, None, torch.get_num_threads())
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        memory = ctx.native.memory
        dq, dk, dv = memory.like(q), memory.like(k), memory.like(v)
        arrays = _array(q), _array(k), _array(v), _array(out), _array(lse)
        gradients = _array(grads[0]), dq.numpy(), dk.numpy(), dv.numpy()
        lengths = ctx.layout.lengths, ctx.layout.key_lengths
        ctx.native.kernels.varlen_attention(ctx.sizes, *lengths, arrays, gradients, torch.get_num_threads())
        return dq, dk, dv, None, None, None, None
