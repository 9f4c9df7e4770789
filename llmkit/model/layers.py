"""The parts of a layer: linear, norm, attention, feed-forward network, mixture of experts; and the operations they are computed with.

A mixer or a feed-forward is a module with `forward(x, context)`. The context carries the operations (`Ops`), the caches and
the rotary tables, so that a model is never changed from outside to be run in another way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmkit.config import AttentionConfig, MLPConfig, ModelConfig, MoEConfig
from llmkit.errors import ConfigError
from llmkit.kernels.format import QuantizedMatrix
from llmkit.model.attention import AttendPacked, LayerCaches, Rotary, attend_packed, rotate

Activation = Callable[[Tensor], Tensor]

ACTIVATIONS: dict[str, Activation] = {
    "silu": F.silu,
    "swish": F.silu,
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}

# Weights upcast at a time: 1 MiB of float32 stays in the second-level cache until the product has read it.
_UPCAST_ELEMENTS = 1 << 18
# Up to so many rows a product is bound by reading the matrix.
_FEW_ROWS = 64


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x [..., in] @ weight [out, in].T + bias`, in the dtype of `x`.

    16-bit weights under float32 activations (the CPU case) are upcast a slice at a time, so the arithmetic is float32
    and no float32 copy of a large matrix exists while tokens are generated.
    """
    # Slices are written into one output in place, which autograd could not follow; a GPU multiplies 16-bit weights as they are.
    if torch.is_grad_enabled() or x.device.type != "cpu":
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    few = x.numel() <= _FEW_ROWS * x.shape[-1]
    product = _few_rows if few else F.linear
    if weight.dtype == x.dtype:
        out = product(x, weight)
    else:
        out = x.new_empty(*x.shape[:-1], weight.shape[0])
        step = max(1, _UPCAST_ELEMENTS // weight.shape[1]) if few else weight.shape[0]
        for start in range(0, weight.shape[0], step):
            out[..., start : start + step] = product(x, weight[start : start + step].to(x.dtype))
    return out if bias is None else out.add_(bias)


def _few_rows(x: Tensor, weight: Tensor) -> Tensor:
    """`F.linear` on a CPU for the rows of a few tokens.

    The matrix is cut into groups of output rows, one batched product of them all: BLAS divides a batch evenly among its
    threads, but a lone product with few rows badly, and reads the matrix at half the memory's speed (measured: 12 GB/s
    against 21 for one token, 7 against 14 for four).
    """
    out_features, in_features = weight.shape
    groups = 2 * torch.get_num_threads()
    size, rest = divmod(out_features, groups)
    if rest:  # an odd vocabulary
        left = F.linear(x, weight[-rest:])
        return torch.cat((_few_rows(x, weight[:-rest]), left), -1) if size else left
    flat = x.reshape(1, -1, in_features).expand(groups, -1, -1)  # [groups, rows, in] of stride 0: no copy
    out = torch.bmm(flat, weight.view(groups, size, in_features).mT)  # [groups, rows, size]
    if out.shape[1] > 1:  # for one row the groups follow each other in memory already
        out = out.transpose(0, 1)
    return out.reshape(*x.shape[:-1], out_features)


def autocast_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype that products of x are computed in: autocast's where it is on."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class LinearLike(Protocol):
    """What the model asks of any linear, whatever its weight is stored in: dense, quantized, with an adapter."""

    @property
    def in_features(self) -> int: ...

    @property
    def out_features(self) -> int: ...

    @property
    def bias(self) -> Tensor | None:
        """`[out_features]`."""
        ...

    @property
    def quantized(self) -> QuantizedMatrix | None:
        """The codes as the native kernels take them, in place; None where there are none, or not on a CPU."""
        ...

    def __call__(self, x: Tensor, /) -> Tensor:
        """Return `x [..., in_features] @ weight.T + bias`."""
        ...

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the weight `[out_features, in_features]`, in the dtype that is natural to it unless another is asked for."""
        ...


# --- what a forward pass computes with ------------------------------------------------------------------------------------------------


def matmuls(x: Tensor, linears: Sequence[LinearLike]) -> tuple[Tensor, ...]:
    """Return several linears of one input `[..., in]`, each `[..., out]`: query, key and value, or gate and up."""
    return tuple([linear(x) for linear in linears])


def gated(act: Activation, gate: Tensor | None, up: Tensor) -> Tensor:
    """Return `act(gate) * up`, or `act(up)` where nothing gates; gate, up `[..., intermediate]`."""
    return act(up) if gate is None else act(gate) * up


def mlp(act: Activation, gate: Tensor | None, up: Tensor, down: LinearLike) -> Tensor:
    """Return `down(act(gate) * up)`, or `down(act(up))` where nothing gates; gate, up `[..., intermediate]`."""
    return down(gated(act, gate, up))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return `x weight / sqrt(mean(x^2) + eps)` along the last dimension; weight in the dtype of x."""
    return F.rms_norm(x, weight.shape, weight, eps)


# `hidden [tokens, hidden] -> logits [tokens, rows]` and back, `d logits -> d hidden`, for some rows of a head.
HeadMatmuls = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]


def frozen_head(hidden: Tensor, weight: Tensor) -> HeadMatmuls:
    """Return `h -> h W^T` and `logits -> logits W` for rows W `[rows, hidden]` of a head that is not trained, in the dtype of `hidden`."""
    upcast = weight.to(hidden.dtype)
    return lambda h: h @ upcast.T, lambda logits: logits @ upcast


def run_block(block: nn.Module, x: Tensor, context: ForwardContext) -> Tensor:
    """Run one layer on x `[batch, seq, hidden]`."""
    out: Tensor = block(x, context)
    return out


@dataclass(frozen=True)
class Ops:
    """The operations of a forward pass: by default PyTorch's; training takes others (`lora/fused.py`, `model/autograd.py`) that agree.

    Whoever calls the model gives them, so a model knows nothing of how it is run. Every linear of a layer is called through `matmuls` or
    `mlp`: there an adapter is fused with its base, or left out.
    """

    matmuls: Callable[[Tensor, Sequence[LinearLike]], tuple[Tensor, ...]] = matmuls
    mlp: Callable[[Activation, Tensor | None, Tensor, LinearLike], Tensor] = mlp
    rotate: Callable[[Tensor, Rotary], Tensor] = rotate
    rms_norm: Callable[[Tensor, Tensor, float], Tensor] = rms_norm
    attend_packed: AttendPacked = attend_packed
    frozen_head: Callable[[Tensor, Tensor], HeadMatmuls] = frozen_head
    run_block: Callable[[nn.Module, Tensor, ForwardContext], Tensor] = run_block


PLAIN = Ops()


@dataclass(frozen=True)
class ForwardContext:
    """What a layer is given beside its input.

    rotary: cos and sin of the tokens (`attention.rotary_tables`), None where this layer does not rotate. logits_indices: int64, the rows of
    the flattened batch that leave this layer; only the last one has any, for nothing looks at the others once it has their keys and values.
    """

    ops: Ops
    caches: LayerCaches
    rotary: Rotary | None = None
    logits_indices: Tensor | None = None

    def matmul(self, x: Tensor, linear: LinearLike) -> Tensor:
        """Return one linear of x."""
        return self.ops.matmuls(x, (linear,))[0]

    def select(self, x: Tensor) -> Tensor:
        """Return the rows of x `[batch, seq, ...]` that leave this layer: `[len(logits_indices), ...]`, or x itself where all do."""
        return x if self.logits_indices is None else x.flatten(0, 1).index_select(0, self.logits_indices)


# --- modules --------------------------------------------------------------------------------------------------------------------------


class Linear(nn.Linear):
    """A dense linear map."""

    quantized = None

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the weight `[out_features, in_features]`, in its own dtype unless another is asked for."""
        return self.weight if dtype is None else self.weight.to(dtype)


class Embedding(nn.Embedding):
    """The rows of token ids. What the model asks of any embedding: forward, and logits where the head is tied to it."""

    def logits(self, x: Tensor) -> Tensor:
        """Return final hidden states `[..., embedding_dim]` times the transposed table."""
        return linear(x, self.weight)

    def dequantize(self) -> Tensor:
        """Return the table `[num_embeddings, embedding_dim]`; quantized embeddings compute it."""
        return self.weight


class RMSNorm(nn.Module):
    """Root-mean-square norm (arXiv:1910.07467). Gemma stores w and means 1 + w: `offset` 1."""

    def __init__(self, dim: int, eps: float, offset: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((dim,), 1.0 - offset))  # [dim]; a new norm changes nothing
        self.eps, self.offset = eps, offset

    def forward(self, x: Tensor, ops: Ops = PLAIN) -> Tensor:
        weight = self.weight.to(x.dtype)  # 16-bit weights under float32 activations on a CPU
        return ops.rms_norm(x, weight + self.offset if self.offset else weight, self.eps)


class LayerNorm(nn.LayerNorm):
    """Layer norm with weight and bias (GPT-2)."""

    def forward(self, x: Tensor, ops: Ops = PLAIN) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


def make_norm(config: ModelConfig, dim: int) -> nn.Module:
    return RMSNorm(dim, config.norm_eps, config.norm_offset) if config.norm == "rms" else LayerNorm(dim, config.norm_eps)


class Attention(nn.Module):
    """The attention block of one layer: query, key and value, norms of their heads, rotation, attention, output."""

    def __init__(self, part: AttentionConfig, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = part.head_dim
        q_size, kv_size = part.query_size, part.kv_size
        self.q_proj = Linear(config.hidden_size, q_size, part.qkv_bias)
        self.k_proj = Linear(config.hidden_size, kv_size, part.qkv_bias)
        self.v_proj = Linear(config.hidden_size, kv_size, part.qkv_bias)
        self.o_proj = Linear(q_size, config.hidden_size, part.o_bias)
        self.norm_before_heads = part.qk_norm == "full"  # OLMo 2 normalizes all heads at once
        self.q_norm: nn.Module | None = None
        self.k_norm: nn.Module | None = None
        if part.qk_norm is not None:
            self.q_norm = make_norm(config, q_size if part.qk_norm == "full" else part.head_dim)
            self.k_norm = make_norm(config, kv_size if part.qk_norm == "full" else part.head_dim)

    def forward(self, x: Tensor, context: ForwardContext) -> Tensor:
        """x `[batch, seq, hidden]`; returns those of its rows that leave the layer (`ForwardContext.select`)."""
        ops = context.ops
        q, k, v = ops.matmuls(x, (self.q_proj, self.k_proj, self.v_proj))  # [batch, seq, heads * head_dim], kv_heads * head_dim
        if self.q_norm is not None and self.k_norm is not None and self.norm_before_heads:
            q, k = self.q_norm(q, ops), self.k_norm(k, ops)
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)) for t in (q, k, v))  # [batch, seq, heads, head_dim]
        if self.q_norm is not None and self.k_norm is not None and not self.norm_before_heads:
            q, k = self.q_norm(q, ops), self.k_norm(k, ops)
        if context.rotary is not None:  # keys are cached rotated: a position is known once, when its token comes
            q, k = ops.rotate(q, context.rotary), ops.rotate(k, context.rotary)
        attended = context.caches.attend(self.layer, q, k, v).flatten(-2)  # [batch, seq, heads * head_dim]
        # All tokens have given their keys and values; from here on only those that leave the layer cost anything.
        return context.matmul(context.select(attended), self.o_proj)


class MLP(nn.Module):
    """`down(act(gate(x)) * up(x))` (SwiGLU, arXiv:2002.05202), or plain `down(act(up(x)))`."""

    def __init__(self, part: MLPConfig, config: ModelConfig, layer: int) -> None:
        super().__init__()
        if part.hidden_act not in ACTIVATIONS:
            raise ConfigError(f"hidden_act {part.hidden_act!r} is unknown; known are {', '.join(ACTIVATIONS)}.")
        self.act = ACTIVATIONS[part.hidden_act]
        hidden, intermediate_size, bias = config.hidden_size, part.intermediate_size, part.bias
        self.gate_proj = Linear(hidden, intermediate_size, bias) if part.gated else None
        self.up_proj = Linear(hidden, intermediate_size, bias)
        self.down_proj = Linear(intermediate_size, hidden, bias)

    def forward(self, x: Tensor, context: ForwardContext) -> Tensor:
        """x `[..., hidden]`; returns its shape."""
        ops = context.ops
        if self.gate_proj is None:
            return ops.mlp(self.act, None, context.matmul(x, self.up_proj), self.down_proj)
        gate, up = ops.matmuls(x, (self.gate_proj, self.up_proj))  # [..., intermediate]
        return ops.mlp(self.act, gate, up, self.down_proj)


class MixtureOfExperts(nn.Module):
    """Each token goes through its `num_experts_per_tok` best experts, weighted by the router's softmax (Mixtral, arXiv:2401.04088)."""

    def __init__(self, part: MoEConfig, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.moe = part
        self.gate = Linear(config.hidden_size, part.num_experts, bias=False)
        self.experts = nn.ModuleList(MLP(part.expert, config, layer) for _ in range(part.num_experts))

    def forward(self, x: Tensor, context: ForwardContext) -> Tensor:
        """x `[..., hidden]`; returns its shape."""
        flat = x.reshape(-1, x.shape[-1])
        # Float32 whatever the model's dtype: near ties must be decided as in the checkpoint's own training.
        probs = context.matmul(flat, self.gate).float().softmax(-1)  # [tokens, experts]
        weights, chosen = probs.topk(self.moe.num_experts_per_tok, dim=-1)  # [tokens, k]
        if self.moe.norm_topk_prob:  # else the weights of the chosen ones add up to less than 1, as a checkpoint may have learned
            weights = weights / weights.sum(-1, keepdim=True)
        out = torch.zeros_like(flat)
        # An expert that is trained and got no token has a gradient of zeros, not none: processes that share gradients wait for one of
        # every weight from each of them, and optimizers of several and of one process must do the same.
        trained = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self.experts.parameters())
        for index in range(len(self.experts)) if trained else chosen.unique().tolist():
            token, slot = (chosen == index).nonzero(as_tuple=True)  # [tokens of this expert] each
            expert_out = self.experts[index](flat[token], context) * weights[token, slot, None].to(flat.dtype)
            out = out.index_add(0, token, expert_out)
        return out.view_as(x)
