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
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmkit.kernels.format import QuantizedMatrix
from llmkit.kernels.training_ops import MatmulWeight
from llmkit.model.autograd import NativeOps, matmul_weight, native_ops, run_checkpointed
from llmkit.model.layers import PLAIN, Activation, LinearLike, Ops, autocast_dtype, gated


def training_ops(device: torch.device, *, adapters: bool, checkpointing: bool = False, integers: bool = False) -> Ops:
    """Return what a training run computes with. Made once for a run and given to the model with every call.

    adapters: fuse them with their frozen linears. checkpointing: compute activations again in the backward pass.
    integers: frozen q4 and q8 linears on a CPU compute forwards as in generating (see `integers_possible`).
    """
    native = native_ops() if device.type == "cpu" else None
    ops = PLAIN if native is None else native.ops()
    if adapters:
        fused = FusedMatmuls(native, integers=integers)
        ops = replace(ops, matmuls=fused, mlp=FusedMLP(fused))
    return replace(ops, run_block=run_checkpointed) if checkpointing else ops


def without_adapters(ops: Ops) -> Ops:
    """Return the same operations on the base model alone: what a preference is compared with."""
    assert isinstance(ops.matmuls, FusedMatmuls), "of a model without adapters, there is nothing to leave out"
    fused = replace(ops.matmuls, adapters=False)
    return replace(ops, matmuls=fused, mlp=FusedMLP(fused))


class LoraLinear(nn.Module):
    """A frozen linear of any storage with one adapter beside it. Who makes its factors says so in a subclass (`inject.py`).

    `forward` is the definition, in PyTorch; training calls it through `FusedMatmuls`.
    """

    base_layer: nn.Module
    in_features: int
    out_features: int
    scale: float
    dropout: nn.Dropout | None
    magnitude: nn.Parameter | None  # [out], of DoRA

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """A `[rank, in]` and B `[out, rank]`, float32."""
        raise NotImplementedError

    @property
    def base(self) -> LinearLike:
        base: Any = self.base_layer
        return base

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    quantized = None  # with the adapter there are no codes for it

    @property
    def fusible(self) -> bool:
        """Whether `x W^T + s (x A^T) B^T` is all there is to it: no dropout in between, no magnitude (DoRA)."""
        return self.magnitude is None and not (self.training and self.dropout is not None)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the weight with its adapter `[out, in]`, float32 unless another dtype is asked for."""
        a, b = self.factors
        weight = self.base.dequantize(torch.float32) + self.scale * b @ a
        if self.magnitude is not None:
            weight = weight * (self.magnitude / torch.linalg.vector_norm(weight, dim=1))[:, None]
        return weight if dtype is None else weight.to(dtype)

    def row_norms(self) -> Tensor:
        """Return the norm of each row of `W + s B A`, float32 `[out]`, without making that matrix."""
        weight = self.base.dequantize(torch.float32)
        a, b = self.factors
        # ||w + s b A||^2 of a row w [in] with its b [rank]: |w|^2 + 2 s (w A^T) b + s^2 b (A A^T) b, which needs [out, rank] at most.
        cross = ((weight @ a.T) * b).sum(1)
        own = ((b @ (a @ a.T)) * b).sum(1)
        return (weight.square().sum(1) + 2 * self.scale * cross + self.scale**2 * own).clamp_min(0).sqrt()

    def forward(self, x: Tensor) -> Tensor:
        """x `[..., in]`; returns `[..., out]`."""
        return self.adapt(x, self.base)

    def adapt(self, x: Tensor, base: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the linear of x `[..., in]` with its adapter, where `base` computes `x W^T + b`."""
        a, b = self.factors
        dropped = x if self.dropout is None else self.dropout(x)  # for the adapter alone: the base sees all of x
        y = base(x)
        added = F.linear(F.linear(dropped, a.to(x.dtype)), b.to(x.dtype)) * self.scale
        if self.magnitude is None:
            return y + added
        # DoRA (arXiv:2402.09353, 4.3): the norm is a constant for the gradient. As in PEFT, what is rescaled passes dropout too.
        factor = (self.magnitude / self.row_norms().detach()).to(y.dtype)
        again = y if dropped is x else base(dropped)
        without_bias = again if self.bias is None else again - self.bias.to(y.dtype)
        return y + (factor - 1) * without_bias + factor * added


@dataclass(frozen=True)
class AdaptedWeight:
    """A frozen linear and what is trained beside it: `W + scale B A`.

    a `[rank, in]`, b `[out, rank]`, both None where this linear has no adapter.
    """

    base: LinearLike
    a: Tensor | None = None
    b: Tensor | None = None
    scale: float = 1.0


@dataclass(frozen=True)
class FusedMatmuls:
    """`Ops.matmuls` in which frozen linears of one input are one function, with their adapters or without.

    native: the kernels that multiply float32 on a CPU. adapters: False for the base model alone. integers: frozen q4 and q8
    linears compute forwards as in generating.
    """

    native: NativeOps | None = None
    adapters: bool = True
    integers: bool = False

    def __call__(self, x: Tensor, linears: Sequence[LinearLike]) -> tuple[Tensor, ...]:
        weights = [self.weight(linear) for linear in linears]
        # All or none: a group with one linear of another kind is computed one by one.
        fusible = [weight for weight in weights if weight is not None]
        if len(fusible) == len(linears):
            return self.fused(x, fusible)
        return tuple([self._single(x, linear) for linear in linears])

    def weight(self, linear: LinearLike) -> AdaptedWeight | None:
        """Return what a linear is in the fused function; None where it is computed apart: one that is trained, dropout, DoRA."""
        if not isinstance(linear, LoraLinear):
            # The fused function gives a base no gradient, so one that is trained (modules_to_save) must not get into it.
            trained = isinstance(linear, nn.Module) and any(parameter.requires_grad for parameter in linear.parameters())
            return None if trained else AdaptedWeight(linear)
        if not self.adapters:
            return AdaptedWeight(linear.base)
        return AdaptedWeight(linear.base, *linear.factors, linear.scale) if linear.fusible else None

    def fused(self, x: Tensor, weights: Sequence[AdaptedWeight]) -> tuple[Tensor, ...]:
        """Return the linears of x `[..., in]`, each `[..., out]`."""
        out: tuple[Tensor, ...] = _Matmuls.apply(x, self, tuple(weights), *_factors(weights))  # type: ignore[no-untyped-call]
        return out

    def _single(self, x: Tensor, linear: LinearLike) -> Tensor:
        weight = self.weight(linear)
        if weight is not None:
            return self.fused(x, (weight,))[0]
        if isinstance(linear, LoraLinear):
            return linear.adapt(x, lambda x: self.fused(x, (AdaptedWeight(linear.base),))[0])
        return linear(x)

    # -- the arithmetic of the two directions, on x [tokens, in] ---------------------------------------------------------

    def forward(
        self, x: Tensor, weights: Sequence[AdaptedWeight], factors: Sequence[Tensor | None], trained: bool
    ) -> tuple[list[Tensor], Tensor | None]:
        """Return the outputs `[tokens, out]`; and `x A^T` of all A, `[tokens, sum of ranks]`, where the backward pass will ask for it."""
        pairs = _pairs(factors, x.dtype)
        a = _stack(pair[0] for pair in pairs if pair is not None)
        codes = self._codes(x, weights)
        if codes is None and self.native is not None and self.native.takes(x):
            # x A^T is one more panel of the same product: x is packed and read once for all of them.
            out = self.native.matmul(x, [*_native(weights, pairs), *([matmul_weight(a)] if trained and a is not None else [])])
            return out[: len(weights)], out[len(weights)] if len(out) > len(weights) else None
        if codes is not None and self.native is not None:
            out = [self.native.quantized_matmul(x, matrix, one.base.bias) for matrix, one in zip(codes, weights, strict=True)]
        else:
            out = _dense_matmuls(x, weights, pairs)
        # Where U = W + s B A is not what was multiplied with, s (x A^T) B^T is added to each output.
        apart = codes is not None or x.dtype != torch.float32
        xa = x @ a.T if a is not None and (trained or apart) else None
        if xa is not None and apart:
            at = 0
            for weight, pair, y in zip(weights, pairs, out, strict=True):
                if pair is not None:
                    y.addmm_(xa[:, at : at + len(pair[0])], pair[1].T, alpha=weight.scale)
                    at += len(pair[0])
        return out, xa

    def _codes(self, x: Tensor, weights: Sequence[AdaptedWeight]) -> list[QuantizedMatrix] | None:
        """Return the bases in codes where all of them are, and are to compute in integers."""
        if not self.integers or self.native is None or x.dtype != torch.float32 or x.device.type != "cpu":
            return None
        found = [weight.base.quantized for weight in weights]
        codes = [matrix for matrix in found if matrix is not None]
        return codes if len(codes) == len(weights) else None

    def backward(
        self,
        x: Tensor | None,
        xa: Tensor | None,
        weights: Sequence[AdaptedWeight],
        factors: Sequence[Tensor | None],
        grads: Sequence[Tensor],
        wanted: bool,
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """Return the gradient of x (None unless wanted), and of every A and B; grads are those of the outputs `[tokens, out]`."""
        native = self.native if self.native is not None and self.native.takes(grads[0]) else None
        dtype = grads[0].dtype  # that of the products
        pairs = _pairs(factors, dtype)
        dx: Tensor | None = None
        # Not wanted below the first adapter: nothing under it is trained, and its input is no leaf.
        if wanted and native is not None:
            dx = native.matmul_back(grads, _native(weights, pairs))
        elif wanted:
            dx = _dense_matmuls_back(weights, pairs, grads)
        present = [(weight.scale, pair, grad) for weight, pair, grad in zip(weights, pairs, grads, strict=True) if pair is not None]
        if x is None or xa is None or not present:
            return dx, [None] * len(factors)
        ranks = [len(pair[0]) for _, pair, _ in present]
        if native is not None:
            stacked_da, all_db = native.adapter_gradients(x, xa, [(pair[1], scale, grad) for scale, pair, grad in present])
        else:
            dxa = torch.cat([(grad @ pair[1]).mul_(scale) for scale, pair, grad in present], 1)  # [tokens, sum of ranks]
            if dx is not None and dtype != torch.float32:  # in float32 it is in dx already, by U
                dx.addmm_(dxa, torch.cat([pair[0] for _, pair, _ in present]))
            stacked_da = dxa.T @ x  # [sum of ranks, in]
            all_db = [(grad.T @ own).mul_(scale) for (scale, _, grad), own in zip(present, xa.split(ranks, 1), strict=True)]
        das, dbs = iter(stacked_da.split(ranks)), iter(all_db)
        found: list[Tensor | None] = []
        for pair, own_a, own_b in zip(pairs, factors[::2], factors[1::2], strict=True):
            if pair is None or own_a is None or own_b is None:
                found += [None, None]
            else:
                found += [next(das).to(own_a.dtype), next(dbs).to(own_b.dtype)]
        return dx, found


@dataclass(frozen=True)
class FusedMLP:
    """`Ops.mlp` with the last product fused as in `FusedMatmuls`."""

    matmuls: FusedMatmuls

    def __call__(self, act: Activation, gate: Tensor | None, up: Tensor, down: LinearLike) -> Tensor:
        """gate, up `[..., intermediate]`; returns `[..., hidden]`."""
        weight = self.matmuls.weight(down)
        return self.matmuls(gated(act, gate, up), (down,))[0] if weight is None else self.fused(act, gate, up, weight)

    def fused(self, act: Activation, gate: Tensor | None, up: Tensor, weight: AdaptedWeight) -> Tensor:
        """Return the MLP's result for a `down` that is fused."""
        out: Tensor = _MLP.apply(gate, up, self, act, weight, *_factors((weight,)))  # type: ignore[no-untyped-call]
        return out

    def gated(self, act: Activation, gate: Tensor | None, up: Tensor) -> Tensor:
        """Return what goes into the last product, in its dtype; no gradients."""
        native = self.native_gate(act, gate, up)
        return gated(act, gate, up).to(autocast_dtype(up)) if native is None or gate is None else native.gated(gate, up)

    def native_gate(self, act: Activation, gate: Tensor | None, up: Tensor) -> NativeOps | None:
        """Return the kernels that compute `silu(gate) * up`, where they do."""
        native = self.matmuls.native
        if native is None or gate is None or act is not F.silu or autocast_dtype(up) != torch.float32:
            return None
        return native if native.takes(up) else None


def _factors(weights: Sequence[AdaptedWeight]) -> list[Tensor | None]:
    return [factor for weight in weights for factor in (weight.a, weight.b)]


def _pairs(factors: Sequence[Tensor | None], dtype: torch.dtype) -> list[tuple[Tensor, Tensor] | None]:
    """A and B of each linear, None where it has none."""
    pairs = zip(factors[::2], factors[1::2], strict=True)
    return [None if a is None or b is None else (a.detach().to(dtype), b.detach().to(dtype)) for a, b in pairs]


def _stack(matrices: Iterable[Tensor]) -> Tensor | None:
    """All of them below each other."""
    found = list(matrices)
    return None if not found else found[0] if len(found) == 1 else torch.cat(found)


def _native(weights: Sequence[AdaptedWeight], pairs: Sequence[tuple[Tensor, Tensor] | None]) -> list[MatmulWeight]:
    return [matmul_weight(one.base.dequantize(), one.base.bias, pair, one.scale) for one, pair in zip(weights, pairs, strict=True)]


def _merged(weights: Sequence[AdaptedWeight], pairs: Sequence[tuple[Tensor, Tensor] | None], device: torch.device) -> Tensor:
    """`W + s B A` of all linears below each other, float32 `[sum of out, in]`."""
    if len(weights) == 1 and pairs[0] is None:
        return weights[0].base.dequantize(torch.float32).detach()
    sizes = [one.base.out_features for one in weights]
    # One buffer for all: `torch.cat` would need the parts and the whole at the same time.
    merged = torch.empty(sum(sizes), weights[0].base.in_features, device=device)
    for one, pair, own in zip(weights, pairs, merged.split(sizes), strict=True):
        own.copy_(one.base.dequantize(torch.float32).detach())
        if pair is not None:
            own.addmm_(pair[1], pair[0], alpha=one.scale)
    return merged


def _dense_matmuls(x: Tensor, weights: Sequence[AdaptedWeight], pairs: Sequence[tuple[Tensor, Tensor] | None]) -> list[Tensor]:
    """Return the outputs `[tokens, out]` of x: with the adapters in float32, of the bases alone in 16 bits."""
    if x.dtype == torch.float32:
        out = list((x @ _merged(weights, pairs, x.device).T).split([one.base.out_features for one in weights], 1))
    else:  # one W in memory at a time, and no result that keeps the others
        out = [x @ one.base.dequantize(x.dtype).detach().T for one in weights]
    for one, y in zip(weights, out, strict=True):
        if one.base.bias is not None:
            y += one.base.bias.detach()
    return out


def _dense_matmuls_back(weights: Sequence[AdaptedWeight], pairs: Sequence[tuple[Tensor, Tensor] | None], grads: Sequence[Tensor]) -> Tensor:
    """Return the gradient of x `[tokens, in]` from those of the outputs, by what `_dense_matmuls` multiplied with."""
    dtype = grads[0].dtype
    if dtype == torch.float32:
        stacked = grads[0] if len(grads) == 1 else torch.cat(list(grads), 1)
        return stacked @ _merged(weights, pairs, stacked.device)
    dx: Tensor | None = None
    for one, grad in zip(weights, grads, strict=True):
        weight = one.base.dequantize(dtype).detach()
        dx = grad @ weight if dx is None else dx.addmm_(grad, weight)
        del weight  # before the next one
    assert dx is not None
    return dx


class _Matmuls(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, fused: FusedMatmuls, weights: tuple[AdaptedWeight, ...], *factors: Tensor | None
    ) -> tuple[Tensor, ...]:
        flat = x.reshape(-1, x.shape[-1]).to(autocast_dtype(x))  # [tokens, in]
        out, xa = fused.forward(flat, weights, factors, any(ctx.needs_input_grad[3:]))
        ctx.fused, ctx.weights, ctx.shape, ctx.dtype = fused, weights, x.shape, x.dtype
        # Frozen linears without an adapter do not need their input for its gradient, and one saved tensor [tokens, in] less is kept.
        ctx.save_for_backward(None if xa is None else flat, xa, *factors)
        return tuple([y.view(*x.shape[:-1], y.shape[-1]) for y in out])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, xa, *factors = ctx.saved_tensors
        flat = [grad.reshape(-1, grad.shape[-1]) for grad in grads]
        dx, found = ctx.fused.backward(x, xa, ctx.weights, factors, flat, ctx.needs_input_grad[0])
        return None if dx is None else dx.view(ctx.shape).to(ctx.dtype), None, None, *found


class _MLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        gate: Tensor | None,
        up: Tensor,
        fused: FusedMLP,
        act: Activation,
        weight: AdaptedWeight,
        a: Tensor | None,
        b: Tensor | None,
    ) -> Tensor:
        h = fused.gated(act, gate, up)  # [..., intermediate]; not saved: it is made again from gate and up
        (y,), xa = fused.matmuls.forward(h.reshape(-1, h.shape[-1]), (weight,), (a, b), any(ctx.needs_input_grad[5:]))
        ctx.fused, ctx.act, ctx.weight = fused, act, weight
        ctx.save_for_backward(gate, up, xa, a, b)
        return y.view(*up.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        gate, up, ha, a, b = ctx.saved_tensors
        grad = grads[0].reshape(-1, grads[0].shape[-1])
        matmuls = ctx.fused.matmuls
        native = ctx.fused.native_gate(ctx.act, gate, up)
        if native is not None:
            h = native.gated(gate, up)
            dh, found = matmuls.backward(h.view(-1, h.shape[-1]), ha, (ctx.weight,), (a, b), [grad], True)
            return *native.gated_back(gate, up, dh), None, None, None, *found
        # The activation once more, with its graph: whatever function it is, autograd knows its gradient.
        with torch.enable_grad():
            inputs = [t.detach().requires_grad_() for t in (gate, up) if t is not None]
            h = gated(ctx.act, None if gate is None else inputs[0], inputs[-1])
        flat = h.detach().reshape(-1, h.shape[-1]).to(grad.dtype)
        dh, found = matmuls.backward(flat, ha, (ctx.weight,), (a, b), [grad], True)
        found_inputs = torch.autograd.grad(h, inputs, dh.view_as(h).to(h.dtype))
        return None if gate is None else found_inputs[0], found_inputs[-1], None, None, None, *found
