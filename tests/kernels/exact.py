"""The native step in PyTorch, every float32 operation in the native order: the same logits, bit for bit.

`TorchBackend` has the integer arithmetic of the native step but PyTorch's own norms, rotations and softmax: their last bits decide how
some activations are rounded to int8, and that spreads. Here nothing differs, so one bit that does is an error on one of the two sides.

Tensors are float32. PyTorch's additions, products and quotients are rounded as IEEE 754 says (its roots are not); `fma` stands for fused
multiply-adds. Sums have the sixteen lanes of the kernels: lane i adds elements i, i + 16, ..., then `hsum` adds the lanes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from llmkit.config import AttentionConfig, MLPConfig, ModelConfig, PartConfig, RopeConfig
from llmkit.kernels import reference
from llmkit.kernels.format import QuantizedMatrix, Weight
from llmkit.rope import inverse_frequencies

LANES, CHUNK, SPLIT = 16, 128, 512  # of kernels.h; chunks and splits are counted in keys
_HALF = 1 << 28  # the low 29 bits of a float64 that lies in the middle between two float32
_PRODUCTS, _ROWS = 1 << 20, 128  # numbers of a dense product, rows of attention held at a time
INFINITY = float("inf")


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """`a * b + c`, rounded once (normal numbers). The product is exact in float64; the sum may not be, and if it then lies in the
    middle between two float32, what was lost says which of them is nearer."""
    a, b, c = a.double(), b.double(), c.double()
    total = torch.addcmul(c, a, b)
    middle = ((total.view(torch.int64) & (2 * _HALF - 1)) == _HALF).nonzero(as_tuple=True)
    if len(middle[0]):
        a, b, c, found = (part.expand_as(total)[middle] for part in (a, b, c, total))
        added = found - a * b
        lost = (a * b - (found - added)) + (c - added)  # Knuth's TwoSum
        total[middle] = torch.where(lost == 0, found, torch.nextafter(found, lost * INFINITY))
    return total.float()


def lanes(x: Tensor) -> Tensor:
    """`[..., n]` as `[..., n / 16, 16]`, padded with zeros."""
    return torch.nn.functional.pad(x, (0, -x.shape[-1] % LANES)).unflatten(-1, (-1, LANES))


def hsum(x: Tensor) -> Tensor:
    """The sum of the lanes `[..., 16]`."""
    for half in (8, 4, 2, 1):
        x = x[..., :half] + x[..., half:]
    return x[..., 0]


def dot(a: Tensor, b: Tensor) -> Tensor:
    """The sum of products over the last dimension; the others are broadcast."""
    a, b = lanes(a), lanes(b)
    total = torch.zeros(())
    for i in range(a.shape[-2]):
        total = fma(a[..., i, :], b[..., i, :], total)
    return hsum(total)


def exp(x: Tensor) -> Tensor:
    limited = x.clamp(-87.3, 88.0)
    n = (limited * 1.44269504).round()
    r = fma(n, torch.tensor(2.12194440e-4), fma(n, torch.tensor(-0.693359375), limited))
    p = torch.tensor(1.9875691500e-4)
    for coefficient in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        p = fma(p, r, torch.tensor(coefficient))
    power = ((n.int() + 127) << 23).view(torch.float32)
    return torch.where(x < torch.tensor(-87.3), 0.0, (fma(r * r, p, r) + 1) * power)


def tanh(x: Tensor) -> Tensor:
    limited = x.clamp(-20, 20)
    return 1 - torch.tensor(2.0) / (exp(limited + limited) + 1)


def softcap(x: Tensor, cap: float | None) -> Tensor:
    return tanh(x / torch.tensor(cap)) * cap if cap else x


def activation(name: str, x: Tensor) -> Tensor:
    if name in ("silu", "swish"):
        return x / (1 + exp(0 - x))
    if name == "relu":
        return x.clamp_min(0)
    assert name != "gelu", "its error function is the C library's"
    inner = fma(x * x * x, torch.tensor(0.044715), x) * 0.7978845608
    return (0.5 * x) * (1 + tanh(inner))


def inverse_root(x: Tensor) -> Tensor:
    return torch.tensor(1.0) / x.double().sqrt().float()  # float64 has more than twice the digits: rounding twice is rounding once


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    factor = inverse_root(dot(x, x) / torch.tensor(float(x.shape[-1])) + eps)
    return x * factor.unsqueeze(-1) * weight


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    n, total = torch.tensor(float(x.shape[-1])), torch.zeros(())
    for part in lanes(x).unbind(-2):
        total = total + part
    centred = x - (hsum(total) / n).unsqueeze(-1)
    factor = inverse_root(dot(centred, centred) / n + eps)
    return fma(centred * factor.unsqueeze(-1), weight, bias)


def linear(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """`x [tokens, in] W^T + bias`."""
    if isinstance(weight, QuantizedMatrix):
        return reference.linear(x, reference.Packed.of(weight), bias)
    rows = floats(weight)
    out = torch.cat([dot(x.unsqueeze(1), part) for part in rows.split(max(1, _PRODUCTS // (len(x) * rows.shape[1])))], 1)
    return out if bias is None else out + bias


def floats(weight: Weight) -> Tensor:
    assert isinstance(weight, np.ndarray)
    bits = torch.from_numpy(weight.copy())
    return bits.view(torch.bfloat16).float() if weight.dtype == np.uint16 else bits.float()


def rotary(rope: RopeConfig, head_dim: int, tokens: int) -> tuple[Tensor, Tensor]:
    """cos and sin, `[tokens, 1, half]`."""
    frequencies, factor = inverse_frequencies(rope, head_dim, tokens if rope.rope_type in ("dynamic", "longrope") else 0)
    angles = (torch.arange(tokens).float().view(-1, 1, 1) * torch.from_numpy(frequencies)).double()
    return angles.cos().float() * factor, angles.sin().float() * factor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x `[tokens, heads, head_dim]`."""
    half = cos.shape[-1]
    a, b = x[..., :half], x[..., half : 2 * half]
    return torch.cat((fma(cos, a, -sin * b), fma(cos, b, sin * a), x[..., 2 * half :]), -1)


def stored(x: Tensor, kv_bits: int) -> tuple[Tensor, Tensor]:
    """Heads `[..., head_dim]` as the cache gives them back: numbers, and a scale for each head."""
    if kv_bits == 8:
        most = x.abs().amax(-1, keepdim=True)
        return (x * torch.where(most > 0, torch.tensor(127.0) / most, 0.0)).round(), (most / torch.tensor(127.0)).squeeze(-1)
    return x.clamp(-65504, 65504).half().float() if kv_bits == 16 else x, torch.ones(x.shape[:-1])


def attend(q: Tensor, k: Tensor, v: Tensor, part: AttentionConfig, kv_bits: int) -> Tensor:
    """q `[tokens, heads, head_dim]`, k and v `[tokens, kv_heads, head_dim]`, of one sequence from its beginning."""
    (k, k_scale), (v, v_scale) = stored(k, kv_bits), stored(v, kv_bits)
    factors = k_scale * part.score_scale
    # [kv_heads, heads of each, tokens, ...]
    k, v, factors, v_scale = (part.transpose(0, 1).unsqueeze(1) for part in (k, v, factors, v_scale))
    q, positions = q.unflatten(1, (len(k), -1)).permute(1, 2, 0, 3), torch.arange(len(q))
    out = []
    for rows in positions.split(_ROWS):
        tokens = int(rows[-1]) + 1
        scores = torch.zeros(())
        for d in range(q.shape[-1]):
            scores = fma(q[..., rows, d].unsqueeze(-1), k[..., :tokens, d].unsqueeze(-2), scores)
        scores = softcap(scores * factors[..., None, :tokens], part.softcap)
        behind = rows[:, None] - positions[:tokens]  # query position - key position
        hidden = (behind < 0) | (behind >= (part.sliding_window or tokens))
        out.append(attend_scored(scores.masked_fill(hidden, -INFINITY), v[..., :tokens, :], v_scale[..., :tokens]))
    return torch.cat(out, 2).permute(2, 0, 1, 3).flatten(1)


def attend_scored(scores: Tensor, v: Tensor, v_scale: Tensor) -> Tensor:
    """scores `[..., rows, keys]`; returns `[..., rows, head_dim]`. Split after split, and within it chunk after chunk."""
    best, total, out = torch.full(scores.shape[:-1], -INFINITY), torch.zeros(()), torch.zeros(())
    for start in range(0, scores.shape[-1], SPLIT):
        keys = slice(start, start + SPLIT)
        found, found_total, found_out = attend_split(scores[..., keys], v[..., keys, :], v_scale[..., keys])
        now, seen = torch.maximum(best, found), found > -INFINITY
        a, b = exp(best - now), exp(found - now)
        total = torch.where(seen, fma(found_total, b, total * a), total)
        a, b, seen = (part.unsqueeze(-1) for part in (a, b, seen))
        best, out = now, torch.where(seen, fma(found_out, b, out * a), out)
    return out * (torch.tensor(1.0) / total).unsqueeze(-1)


def attend_split(scores: Tensor, v: Tensor, v_scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The maximum of the scores `[..., rows, keys]`, the sum of their exponentials, and the values so weighted."""
    best, sums, out = torch.full(scores.shape[:-1], -INFINITY), torch.zeros(LANES), torch.zeros(())
    for start in range(0, scores.shape[-1], CHUNK):
        part, values = scores[..., start : start + CHUNK], v[..., start : start + CHUNK, :]
        now = torch.maximum(best, part.amax(-1))
        correction = torch.where(now > best, exp(best - now), 1.0).unsqueeze(-1)
        weights = torch.where(now.unsqueeze(-1) > -INFINITY, exp(part - now.unsqueeze(-1)), 0.0)
        best, sums, out = now, sums * correction, out * correction
        for lane in lanes(weights).unbind(-2):
            sums = sums + lane
        weights = weights * v_scale[..., None, start : start + CHUNK]
        for j in range(part.shape[-1]):
            out = fma(weights[..., j].unsqueeze(-1), values[..., j, :].unsqueeze(-2), out)
    return best, hsum(sums), out


@dataclass(frozen=True)
class Exact:
    """A model as `NativeBackend` takes it."""

    config: ModelConfig
    weights: Mapping[str, Weight]
    kv_bits: int = 32

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """Of every token of a text, `[tokens, vocab]`."""
        x = self._linear("model.embed_tokens" if self.config.tie_word_embeddings else "lm_head", self.hidden(ids))
        x = x if self.config.logits_scaling == 1 else x / torch.tensor(self.config.logits_scaling)
        return softcap(x, self.config.final_logit_softcapping).numpy()

    def hidden(self, ids: np.ndarray) -> Tensor:
        """The final normed states `[tokens, hidden]`."""
        c = self.config
        x = self._embedded(torch.from_numpy(ids)) * c.embedding_multiplier
        if c.learned_positions:
            x = x + floats(self.weights["model.embed_positions.weight"])[: len(ids)]
        for index, layer in enumerate(c.layers):
            prefix = f"model.layers.{index}"
            norms = [name and f"{prefix}.{name}" for name in layer.norm_names]
            for place, part in ((0, layer.mixer), (2, layer.feed_forward)):
                delta = self._norm(norms[place + 1], self._part(part, f"{prefix}.{part.name}.", self._norm(norms[place], x)))
                x = fma(torch.tensor(c.residual_multiplier), delta, x)
        return self._norm("model.norm", x)

    def _part(self, part: PartConfig, prefix: str, x: Tensor) -> Tensor:
        """A mixer or a feed-forward on x `[tokens, hidden]`: its linears and norms by what they make, as it describes them."""
        params = [param for param in part.params(self.config) if param.name.endswith(".weight")]
        linears = {param.output: prefix + param.name.removesuffix(".weight") for param in params if param.role == "linear"}
        norms = {param.output: prefix + param.name.removesuffix(".weight") for param in params if param.role == "norm"}
        made = {name: self._linear(linear, x) for name, linear in linears.items() if name != "residual"}
        if isinstance(part, AttentionConfig):
            inner = self._attended(part, norms, made)
        else:
            assert isinstance(part, MLPConfig)
            inner = activation(part.hidden_act, made["gate"]) * made["up"] if part.gated else activation(part.hidden_act, made["up"])
        return self._linear(linears["residual"], inner)

    def _attended(self, part: AttentionConfig, norms: Mapping[str, str], made: Mapping[str, Tensor]) -> Tensor:
        heads = part.qk_norm != "full"  # OLMo 2 normalizes all heads at once
        turned = []
        for name in ("query", "key"):
            x = made[name].unflatten(1, (-1, part.head_dim)) if heads else made[name]
            x = self._norm(norms.get(name), x).reshape(len(x), -1, part.head_dim)
            turned.append(x if part.rope is None else rotate(x, *rotary(part.rope, part.head_dim, len(x))))
        return attend(*turned, made["value"].unflatten(1, (-1, part.head_dim)), part, self.kv_bits)

    def _embedded(self, ids: Tensor) -> Tensor:
        weight = self.weights["model.embed_tokens.weight"]
        return reference.rows(reference.Packed.of(weight), ids) if isinstance(weight, QuantizedMatrix) else floats(weight)[ids]

    def _linear(self, name: str, x: Tensor) -> Tensor:
        bias = self.weights.get(f"{name}.bias")
        return linear(x, self.weights[f"{name}.weight"], None if bias is None else floats(bias))

    def _norm(self, name: str | None, x: Tensor) -> Tensor:
        if name is None:
            return x
        weight, eps = floats(self.weights[f"{name}.weight"]) + self.config.norm_offset, self.config.norm_eps
        return rms_norm(x, weight, eps) if self.config.norm == "rms" else layer_norm(x, weight, floats(self.weights[f"{name}.bias"]), eps)
