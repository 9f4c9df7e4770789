"""The small parts: linear, norm, the feed-forward network and the mixture of experts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmkit.config import MLPConfig, ModelConfig, MoEConfig
from llmkit.errors import ConfigError
from llmkit.model.rope import rotate

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

# Weights widened at a time: 1 MiB of float32 stays in the second-level cache until the product has read it.
_WIDEN_ELEMENTS = 1 << 18
# Up to so many rows a product is bound by reading the matrix.
_FEW_ROWS = 64


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x [..., in] @ weight [out, in].T + bias`, in the dtype of `x`.

    16-bit weights under float32 activations (the CPU case) are widened a slice at a time, so the arithmetic is float32
    and no float32 copy of a large matrix exists while tokens are generated.
    """
    if torch.is_grad_enabled() or x.device.type != "cpu":
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    few = x.numel() <= _FEW_ROWS * x.shape[-1]
    product = _few_rows if few else F.linear
    if weight.dtype == x.dtype:
        out = product(x, weight)
    else:
        out = x.new_empty(*x.shape[:-1], weight.shape[0])
        step = max(1, _WIDEN_ELEMENTS // weight.shape[1]) if few else weight.shape[0]
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
    flat = x.reshape(1, -1, in_features).expand(groups, -1, -1)
    out = torch.bmm(flat, weight.view(groups, size, in_features).mT)  # [groups, rows, size]
    if out.shape[1] > 1:
        out = out.transpose(0, 1)
    return out.reshape(*x.shape[:-1], out_features)


class Linear(nn.Linear):
    """A dense linear map. What the model asks of any linear: in_features, out_features, forward and dequantize()."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight `[out_features, in_features]`, in its own dtype unless another is asked for; quantized linears compute it."""
        return self.weight if dtype is None else self.weight.to(dtype)


class Embedding(nn.Embedding):
    """The rows of token ids. What the model asks of any embedding: forward, and logits where the head is tied to it."""

    def logits(self, x: Tensor) -> Tensor:
        """Final hidden states `[..., embedding_dim]` times the transposed table."""
        return linear(x, self.weight)

    def dequantize(self) -> Tensor:
        """The table `[num_embeddings, embedding_dim]`; quantized embeddings compute it."""
        return self.weight


def autocast_dtype(x: Tensor) -> torch.dtype:
    """What products of x are computed in: autocast's dtype where it is on."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def project(x: Tensor, linears: Sequence[nn.Module]) -> tuple[Tensor, ...]:
    """Several linears on one input: query, key and value, or gate and up."""
    return tuple([proj(x) for proj in linears])


def feed(act: Activation, gate: Tensor | None, up: Tensor, down: nn.Module) -> Tensor:
    """`down(act(gate) * up)`, or `down(act(up))` where nothing gates."""
    return down(act(up) if gate is None else act(gate) * up)


@dataclass(frozen=True)
class Products:
    """How a block's parts are computed: the seam at which they are fused from outside (`lora/fused.py`, `model/native.py`)."""

    project: Callable[[Tensor, Sequence[nn.Module]], tuple[Tensor, ...]] = project
    feed: Callable[[Activation, Tensor | None, Tensor, nn.Module], Tensor] = feed
    rotate: Callable[[Tensor, tuple[Tensor, Tensor]], Tensor] = rotate


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x weight / sqrt(mean(x^2) + eps)` along the last dimension."""
    return F.rms_norm(x, weight.shape, weight, eps)


class RMSNorm(nn.Module):
    """Root-mean-square norm (arXiv:1910.07467). Gemma stores w and means 1 + w: `offset` 1."""

    def __init__(self, dim: int, eps: float, offset: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((dim,), 1.0 - offset))
        self.eps, self.offset = eps, offset
        self.normalise = rms_norm  # training may put a fused one here

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to(x.dtype)
        return self.normalise(x, weight + self.offset if self.offset else weight, self.eps)


class LayerNorm(nn.LayerNorm):
    """Layer norm with weight and bias (GPT-2)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


def make_norm(config: ModelConfig, dim: int) -> nn.Module:
    return RMSNorm(dim, config.norm_eps, config.norm_offset) if config.norm == "rms" else LayerNorm(dim, config.norm_eps)


class MLP(nn.Module):
    """`down(act(gate(x)) * up(x))` (SwiGLU, arXiv:2002.05202), or plain `down(act(up(x)))`."""

    def __init__(self, part: MLPConfig, config: ModelConfig, layer: int) -> None:
        super().__init__()
        if part.hidden_act not in ACTIVATIONS:
            raise ConfigError(f"hidden_act {part.hidden_act!r} is unknown; known are {', '.join(ACTIVATIONS)}.")
        self.act = ACTIVATIONS[part.hidden_act]
        self.products = Products()
        hidden, intermediate_size, bias = config.hidden_size, part.intermediate_size, part.bias
        self.gate_proj = Linear(hidden, intermediate_size, bias) if part.gated else None
        self.up_proj = Linear(hidden, intermediate_size, bias)
        self.down_proj = Linear(intermediate_size, hidden, bias)

    def forward(self, x: Tensor) -> Tensor:
        gate: Tensor | None = None
        if self.gate_proj is None:
            (up,) = self.products.project(x, (self.up_proj,))
        else:
            gate, up = self.products.project(x, (self.gate_proj, self.up_proj))
        return self.products.feed(self.act, gate, up, self.down_proj)


class MixtureOfExperts(nn.Module):
    """Each token goes through its `num_experts_per_tok` best experts, weighted by the router's softmax (Mixtral)."""

    def __init__(self, part: MoEConfig, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.moe = part
        self.gate = Linear(config.hidden_size, part.num_experts, bias=False)
        self.experts = nn.ModuleList(MLP(part.expert, config, layer) for _ in range(part.num_experts))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        probs = self.gate(flat).float().softmax(-1)
        weights, chosen = probs.topk(self.moe.num_experts_per_tok, dim=-1)  # [tokens, k]
        if self.moe.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)
        out = torch.zeros_like(flat)
        for index in chosen.unique().tolist():  # only experts that were hit
            token, slot = (chosen == index).nonzero(as_tuple=True)
            expert_out = self.experts[index](flat[token]) * weights[token, slot, None].to(flat.dtype)
            out = out.index_add(0, token, expert_out)
        return out.view_as(x)
