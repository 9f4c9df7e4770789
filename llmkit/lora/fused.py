"""LoRA (arXiv:2106.09685) for training: `y = x W^T + b + s (x A^T) B^T` with a frozen W, in few products and with few saved tensors.

Linears with one input go through one function. It saves x, once, and x A^T; its gradient is one product, and W has none. W may be
stored in any form: it is asked for as a matrix, forwards and backwards, and not kept between the two.

    in float32      U = W + s B A, of all the linears below each other: making it costs what `rank` more tokens would (on a CPU
                    the native kernels make it while they multiply)
                    y = x U^T      dx = dy U      dB = s dy^T (x A^T)      dA = s (dy B)^T x
    in 16 bits      U would round B A away, so its part is computed beside W:
                    y = x W^T + s (x A^T) B^T                              dx = dy W + s (dy B) A
    in integers     y as in 16 bits, x W^T by the native kernels as in generating; gradients as in float32

The last product of an MLP takes `act(gate) * up` apart: gate and up are saved, their product is made again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmkit.kernels.training_ops import MatmulWeight
from llmkit.model import autograd as native
from llmkit.model.layers import Activation, autocast_dtype, feed


class Frozen(Protocol):
    """What is asked of a linear that is not trained itself; see `model.layers.Linear` and `quant.linear.QuantizedLinear`."""

    in_features: int
    out_features: int
    bias: Tensor | None

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor: ...


@dataclass(frozen=True)
class LowRank:
    """A frozen linear and what is learned beside it.

    base: the linear. a: `[rank, in]`, b: `[out, rank]`, both None where this linear has no adapter; scale: s.
    integer: `x W^T + b` by the kernels that generate, float32 `[tokens, in]` to `[tokens, out]`, where they are to run forwards.
    """

    base: Frozen
    a: Tensor | None = None
    b: Tensor | None = None
    scale: float = 1.0
    integer: Callable[[Tensor], Tensor] | None = None


def project_fused(x: Tensor, parts: Sequence[LowRank]) -> tuple[Tensor, ...]:
    """Several linears on `x [..., in]`."""
    out: tuple[Tensor, ...] = _Project.apply(x, tuple(parts), *_factors(parts))  # type: ignore[no-untyped-call]
    return out


def feed_fused(act: Activation, gate: Tensor | None, up: Tensor, part: LowRank) -> Tensor:
    """`down(act(gate) * up)`, or `down(act(up))` without a gate."""
    out: Tensor = _Feed.apply(gate, up, act, part, *_factors((part,)))  # type: ignore[no-untyped-call]
    return out


def _factors(parts: Sequence[LowRank]) -> list[Tensor | None]:
    return [factor for part in parts for factor in (part.a, part.b)]


def _pairs(factors: Sequence[Tensor | None], dtype: torch.dtype) -> list[tuple[Tensor, Tensor] | None]:
    """A and B of each part, None where it has none."""
    pairs = zip(factors[::2], factors[1::2], strict=True)
    return [None if a is None or b is None else (a.detach().to(dtype), b.detach().to(dtype)) for a, b in pairs]


def _merged(parts: Sequence[LowRank], pairs: Sequence[tuple[Tensor, Tensor] | None], device: torch.device) -> Tensor:
    """`W + s B A` of all parts below each other, float32 `[sum of out, in]`."""
    if len(parts) == 1 and pairs[0] is None:
        return parts[0].base.dequantize(torch.float32).detach()
    whole = torch.empty(sum(part.base.out_features for part in parts), parts[0].base.in_features, device=device)
    for part, pair, own in zip(parts, pairs, whole.split([part.base.out_features for part in parts]), strict=True):
        own.copy_(part.base.dequantize(torch.float32).detach())
        if pair is not None:
            own.addmm_(pair[1], pair[0], alpha=part.scale)
    return whole


def _native(parts: Sequence[LowRank], pairs: Sequence[tuple[Tensor, Tensor] | None]) -> list[MatmulWeight]:
    return [native.matmul_weight(part.base.dequantize(), part.base.bias, pair, part.scale) for part, pair in zip(parts, pairs, strict=True)]


def _forward(x: Tensor, parts: Sequence[LowRank], factors: Sequence[Tensor | None], learns: bool) -> tuple[list[Tensor], Tensor | None]:
    """What each part makes of x `[tokens, in]`; and `x A^T` of all A, `[tokens, sum of ranks]`, where learning will ask for it."""
    pairs = _pairs(factors, x.dtype)
    a = _below(pair[0] for pair in pairs if pair is not None)
    integer = x.dtype == torch.float32 and all(part.integer is not None for part in parts)
    if not integer and native.kernels_for(x) is not None:
        out = native.matmuls(x, [*_native(parts, pairs), *([native.matmul_weight(a)] if learns and a is not None else [])])
        return out[: len(parts)], out[len(parts)] if len(out) > len(parts) else None
    if integer:
        out = [part.integer(x) for part in parts]  # type: ignore[misc]
    else:
        if x.dtype == torch.float32:
            out = list((x @ _merged(parts, pairs, x.device).T).split([part.base.out_features for part in parts], 1))
        else:  # one W in memory at a time, and no result that keeps the others
            out = [x @ part.base.dequantize(x.dtype).detach().T for part in parts]
        for part, y in zip(parts, out, strict=True):
            if part.base.bias is not None:
                y += part.base.bias.detach()
    apart = integer or x.dtype != torch.float32
    xa = x @ a.T if a is not None and (learns or apart) else None
    if xa is not None and apart:
        at = 0
        for part, pair, y in zip(parts, pairs, out, strict=True):
            if pair is not None:
                y.addmm_(xa[:, at : at + len(pair[0])], pair[1].T, alpha=part.scale)
                at += len(pair[0])
    return out, xa


def _below(matrices: Iterable[Tensor]) -> Tensor | None:
    """All of them below each other."""
    found = list(matrices)
    return None if not found else found[0] if len(found) == 1 else torch.cat(found)


def _backward(
    x: Tensor, xa: Tensor | None, parts: Sequence[LowRank], factors: Sequence[Tensor | None], grads: Sequence[Tensor], wanted: bool
) -> tuple[Tensor | None, list[Tensor | None]]:
    """The gradient of x `[tokens, in]` (None unless wanted), and of every A and B; grads are those of the outputs `[tokens, out]`."""
    dtype, fast = x.dtype, native.kernels_for(x) is not None
    pairs = _pairs(factors, dtype)
    dx: Tensor | None = None
    if wanted and fast:
        dx = native.matmuls_back(grads, _native(parts, pairs))
    elif wanted and dtype == torch.float32:
        dx = (grads[0] if len(grads) == 1 else torch.cat(list(grads), 1)) @ _merged(parts, pairs, x.device)
    elif wanted:
        for part, grad in zip(parts, grads, strict=True):
            weight = part.base.dequantize(dtype).detach()
            dx = grad @ weight if dx is None else dx.addmm_(grad, weight)
            del weight  # before the next one
    present = [(part.scale, pair, grad) for part, pair, grad in zip(parts, pairs, grads, strict=True) if pair is not None]
    if xa is None or not present:
        return dx, [None] * len(factors)
    ranks = [len(pair[0]) for _, pair, _ in present]
    if fast:
        whole_da, all_db = native.adapter_gradients(x, xa, [(pair[1], scale, grad) for scale, pair, grad in present])
    else:
        dxa = torch.cat([(grad @ pair[1]).mul_(scale) for scale, pair, grad in present], 1)
        if dx is not None and dtype != torch.float32:
            dx.addmm_(dxa, torch.cat([pair[0] for _, pair, _ in present]))
        whole_da = dxa.T @ x
        all_db = [(grad.T @ own).mul_(scale) for (scale, _, grad), own in zip(present, xa.split(ranks, 1), strict=True)]
    das, dbs = iter(whole_da.split(ranks)), iter(all_db)
    found: list[Tensor | None] = []
    for pair, own_a, own_b in zip(pairs, factors[::2], factors[1::2], strict=True):
        if pair is None or own_a is None or own_b is None:
            found += [None, None]
        else:
            found += [next(das).to(own_a.dtype), next(dbs).to(own_b.dtype)]
    return dx, found


def _gated(act: Activation, up: Tensor) -> bool:
    return act is F.silu and autocast_dtype(up) == torch.float32 and native.kernels_for(up) is not None


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, parts: tuple[LowRank, ...], *factors: Tensor | None) -> tuple[Tensor, ...]:
        flat = x.reshape(-1, x.shape[-1]).to(autocast_dtype(x))
        out, xa = _forward(flat, parts, factors, any(ctx.needs_input_grad[2:]))
        ctx.parts, ctx.shape, ctx.dtype = parts, x.shape, x.dtype
        ctx.save_for_backward(flat, xa, *factors)
        return tuple([y.view(*x.shape[:-1], -1) for y in out])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, xa, *factors = ctx.saved_tensors
        flat = [grad.reshape(-1, grad.shape[-1]) for grad in grads]
        dx, found = _backward(x, xa, ctx.parts, factors, flat, ctx.needs_input_grad[0])
        return None if dx is None else dx.view(ctx.shape).to(ctx.dtype), None, *found


class _Feed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor | None, up: Tensor, act: Activation, part: LowRank, a: Tensor | None, b: Tensor | None) -> Tensor:
        h = native.gated(gate, up) if gate is not None and _gated(act, up) else feed(act, gate, up, nn.Identity()).to(autocast_dtype(up))
        (y,), xa = _forward(h.reshape(-1, h.shape[-1]), (part,), (a, b), any(ctx.needs_input_grad[4:]))
        ctx.act, ctx.part = act, part
        ctx.save_for_backward(gate, up, xa, a, b)
        return y.view(*up.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        gate, up, ha, a, b = ctx.saved_tensors
        grad = grads[0].reshape(-1, grads[0].shape[-1])
        if gate is not None and _gated(ctx.act, up):
            h = native.gated(gate, up)
            dh, found = _backward(h.view(-1, h.shape[-1]), ha, (ctx.part,), (a, b), [grad], True)
            assert dh is not None
            return *native.gated_back(gate, up, dh), None, None, *found
        with torch.enable_grad():
            inputs = [t.detach().requires_grad_() for t in (gate, up) if t is not None]
            h = feed(ctx.act, None if gate is None else inputs[0], inputs[-1], nn.Identity())
        flat = h.detach().reshape(-1, h.shape[-1]).to(grad.dtype)
        dh, found = _backward(flat, ha, (ctx.part,), (a, b), [grad], True)
        assert dh is not None
        found_inputs = torch.autograd.grad(h, inputs, dh.view_as(h).to(h.dtype))
        return None if gate is None else found_inputs[0], found_inputs[-1], None, None, *found
