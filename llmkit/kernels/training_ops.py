"""The native kernels that training calls one by one: numpy arrays in, numpy arrays out, written in place. No torch.

`model/autograd.py` gives them to PyTorch's autograd; what each computes is defined there by a PyTorch form that tests hold it equal to.
All arrays are float32 and C-contiguous unless said otherwise: C++ is given their addresses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmkit.compat import openmp_functions
from llmkit.kernels.backend import chosen_kernels, native_problem
from llmkit.kernels.format import QuantizedMatrix, Weight
from llmkit.kernels.plan import Floats, linear


@dataclass(frozen=True)
class MatmulWeight:
    """`U = W + scale B A`: weight `[out, in]` in float32, float16 or bfloat16 (its bits in uint16), a `[rank, in]`, b `[out, rank]`.

    U is never in memory as a whole: its tiles are made while they are multiplied.
    """

    weight: NDArray[Any]
    bias: Floats | None = None  # [out]
    a: Floats | None = None
    b: Floats | None = None
    scale: float = 1.0


@dataclass(frozen=True)
class TrainingKernels:
    """The training operations of one instruction set: its name, or None for the best of this processor.

    The name is chosen once (`backend.chosen_kernels`) and carried here, so that no call reads the environment.
    """

    name: str | None = None

    def linear(self, weight: Weight, bias: Floats | None, x: Floats, threads: int, out: Floats | None = None) -> Floats:
        """Return `x W^T + bias` with the arithmetic of a generation step (integers, for a quantized W).

        x `[tokens, in]`; returns out `[tokens, out]`, made where none is given.
        """
        from llmkit.kernels.cpu import _native

        out = np.empty((len(x), weight.shape[0]), np.float32) if out is None else out
        _native.product(self.name, threads, linear(weight, bias), x, out)
        return out

    def matmuls(self, weights: Sequence[MatmulWeight], x: Sequence[Floats], y: Sequence[Floats], *, back: bool, threads: int) -> None:
        """Multiply by all weights U at once.

        Forward: `y[p] [tokens, out of p] = x[0] [tokens, in] U_p^T + bias`.
        Back: `y[0] [tokens, in] = sum over p of x[p] [tokens, out of p] U_p`.
        """
        from llmkit.kernels.cpu import _native

        parts = tuple((linear(one.weight, one.bias), one.a, one.b, one.scale) for one in weights)
        _native.matmul(self.name, threads, back, parts, tuple(x), tuple(y))

    def adapter_gradients(
        self,
        factors: Sequence[tuple[Floats, float]],
        x: Floats,
        xa: Floats,
        dy: Sequence[Floats],
        da: Floats,
        db: Sequence[Floats],
        threads: int,
    ) -> None:
        """Write the gradients of adapters on one input.

        factors: B `[out, rank]` and the scale of each. x `[tokens, in]`; xa `[tokens, sum of ranks]`, `x A^T` of all A; dy
        `[tokens, out]` of each. Written are da `[sum of ranks, in]`, `scale (dy B)^T x` one below the other, and each db, `scale dy^T xa`.
        """
        from llmkit.kernels.cpu import _native

        parts = tuple((b, *b.shape, scale) for b, scale in factors)
        _native.learn(self.name, threads, parts, x, xa, tuple(dy), da, tuple(db))

    def varlen_attention(
        self,
        sizes: tuple[int, int, int, int, float],
        lengths: tuple[int, ...],
        key_lengths: tuple[int, ...],
        arrays: tuple[Floats, Floats, Floats, Floats, Floats],
        gradients: tuple[Floats, Floats, Floats, Floats] | None,
        threads: int,
    ) -> None:
        """Attend causally within each of several packed sequences, forward or (with gradients) backward.

        sizes: heads, kv_heads, head_dim, window (0: none), scale. lengths, key_lengths: how many rows of q and of k each sequence has;
        its queries are at its last positions. arrays: q `[tokens, heads, head_dim]`, k and v `[keys, kv_heads, head_dim]`, and
        written forward, read backward: the result as q, and lse `[tokens, heads]`, the logarithm of each row's sum of exponentials.
        gradients: that of the result, which is read, and those of q, k, v, which are written.
        """
        from llmkit.kernels.cpu import _native

        _native.attend(self.name, threads, sizes, lengths, key_lengths, *arrays, gradients)

    def rms_norm(self, x: Floats, weight: Floats, eps: float, y: Floats, threads: int) -> None:
        """Write the root-mean-square norm of the rows of x `[..., n]` into y; weight `[n]`."""
        from llmkit.kernels.cpu import _native

        _native.norm(self.name, threads, x, weight, eps, y)

    def rms_norm_back(self, x: Floats, weight: Floats, eps: float, dy: Floats, dx: Floats, threads: int) -> None:
        """Write the gradient of x from that of the result."""
        from llmkit.kernels.cpu import _native

        _native.norm_back(self.name, threads, x, weight, eps, dy, dx)

    def rotate(self, x: Floats, cos: Floats, sin: Floats, y: Floats, threads: int, *, back: bool = False) -> None:
        """Write `model.attention.rotate` of x `[..., heads, head_dim]` into y; cos, sin `[..., rotary_dim]`. back: its transpose."""
        from llmkit.kernels.cpu import _native

        heads, head_dim = x.shape[-2:]
        _native.rotate(self.name, threads, heads, head_dim, x, cos, sin, back, y)

    def gate(self, gate: Floats, up: Floats, h: Floats, threads: int) -> None:
        """Write `silu(gate) * up`, `[..., n]`, into h."""
        from llmkit.kernels.cpu import _native

        _native.gate(self.name, threads, gate.shape[-1], gate, up, h)

    def gate_back(self, gate: Floats, up: Floats, dh: Floats, dgate: Floats, dup: Floats, threads: int) -> None:
        """Write the gradients of gate and up from that of the result."""
        from llmkit.kernels.cpu import _native

        _native.gate_back(self.name, threads, gate.shape[-1], gate, up, dh, dgate, dup)


def dequantize(weight: QuantizedMatrix, threads: int) -> Floats:
    """Return `weight.dequantize()`, `[out, in]`: the same bits with every instruction set, a hundred times as fast."""
    from llmkit.kernels.cpu import _native

    out = np.empty(weight.shape, np.float32)
    _native.dequantize(threads, linear(weight, None), out)
    return out


@cache
def training_kernels() -> TrainingKernels | None:
    """Return the native kernels of training, or None where they do not run here.

    Asked once in a process: LLMKIT_KERNELS is not read again, and from then on the kernels run on the threads of PyTorch's OpenMP
    runtime. Two pools whose threads spin while they wait would take turns on the cores; where that runtime is not GCC's, the kernels
    keep threads of their own.
    """
    if native_problem() is not None:
        return None
    from llmkit.kernels.cpu import _native

    functions = openmp_functions()
    if functions is not None:
        _native.lend(*functions)
    return TrainingKernels(chosen_kernels())
