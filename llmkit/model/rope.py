"""Rotary position embeddings (RoFormer, arXiv:2104.09864) and the ways they are stretched to longer contexts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from llmkit.config import RopeConfig
from llmkit.errors import ConfigError


def rotary_dim(rope: RopeConfig, head_dim: int) -> int:
    """How many of a head's dimensions are rotated; the rest pass through."""
    return int(head_dim * rope.partial_rotary_factor)


@lru_cache(maxsize=256)
def inverse_frequencies(rope: RopeConfig, head_dim: int, length: int) -> tuple[Tensor, float]:
    """Radians per position, float32 `[rotary_dim / 2]`, and the factor on cos and sin.

    `length` is the length of the whole sequence; only dynamic and longrope look at it. The order of the float32
    operations is that of the published implementations: at position 100,000 a last-bit change is 0.006 radians.
    """
    dim = rotary_dim(rope, head_dim)
    exponents = torch.arange(0, dim, 2, dtype=torch.int64).float() / dim
    original = rope.original_max_position_embeddings

    if rope.rope_type == "default":
        return 1.0 / rope.rope_theta**exponents, 1.0
    if rope.rope_type == "linear":
        return 1.0 / rope.rope_theta**exponents / rope.factor, 1.0

    if original is None:
        raise ConfigError(
            f"rope type {rope.rope_type!r} has no original_max_position_embeddings; add it to rope_parameters in config.json."
        )
    if rope.rope_type == "dynamic":
        # NTK-aware: the base grows with the length so that the slowest frequency always spans it.
        stretch = rope.factor * max(length, original) / original - (rope.factor - 1)
        return 1.0 / (rope.rope_theta * stretch ** (dim / (dim - 2))) ** exponents, 1.0
    if rope.rope_type == "longrope":
        factors = torch.tensor(rope.long_factor if length > original else rope.short_factor, dtype=torch.float32)
        scale = rope.attention_factor
        if scale is None:
            scale = 1.0 if rope.factor <= 1 else math.sqrt(1 + math.log(rope.factor) / math.log(original))
        return 1.0 / (factors * rope.rope_theta**exponents), scale
    if rope.rope_type == "llama3":
        return _llama3(rope, 1.0 / rope.rope_theta**exponents, original), 1.0
    if rope.rope_type == "yarn":
        return _yarn(rope, rope.rope_theta**exponents, dim, original)
    raise ConfigError(f"rope type {rope.rope_type!r} is unknown; known are default, linear, dynamic, llama3, yarn, longrope.")


def _llama3(rope: RopeConfig, inv_freq: Tensor, original: int) -> Tensor:
    """Llama 3.1: slow frequencies are divided by `factor`, fast ones kept, those between blended."""
    wavelength = 2 * math.pi / inv_freq
    slow = wavelength > original / rope.low_freq_factor
    fast = wavelength < original / rope.high_freq_factor
    scaled = torch.where(slow, inv_freq / rope.factor, inv_freq)
    smooth = (original / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blended = (1 - smooth) * scaled / rope.factor + smooth * scaled
    return torch.where(slow | fast, scaled, blended)


def _yarn(rope: RopeConfig, periods: Tensor, dim: int, original: int) -> tuple[Tensor, float]:
    """YaRN (arXiv:2309.00071): interpolate slow dimensions, keep fast ones, a linear ramp between, and a temperature."""

    def dimension_of(rotations: float) -> float:  # the dimension that turns so often within the original context
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(rope.rope_theta))

    def temperature(weight: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * weight * math.log(rope.factor) + 1.0

    low, high = dimension_of(rope.beta_fast), dimension_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low or 0.001)).clamp(0, 1)
    keep = 1 - ramp
    inv_freq = 1.0 / (rope.factor * periods) * (1 - keep) + 1.0 / periods * keep

    scale = rope.attention_factor
    if scale is None:
        both = rope.mscale and rope.mscale_all_dim
        scale = temperature(rope.mscale or 1) / temperature(rope.mscale_all_dim or 1) if both else temperature(1)
    return inv_freq, scale


def rotary_tables(rope: RopeConfig, head_dim: int, positions: Tensor, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """cos and sin for every token, float32 `[batch, seq, 1, rotary_dim]`, ready for `rotate`.

    positions: `[batch, seq]`. lengths: one for all, or one per token of the flattened batch: the sequence lengths for
    which frequencies are chosen. The first half of `sin` is negated, so that rotating is one roll and one multiply-add.
    """
    distinct = sorted(set(lengths))
    chosen = [inverse_frequencies(rope, head_dim, length) for length in distinct]
    inv_freq = torch.stack([frequencies for frequencies, _ in chosen]).to(positions.device)
    if len(distinct) > 1:  # sequences of one step may have frequency sets of their own
        which = torch.tensor([distinct.index(length) for length in lengths], device=positions.device)
        inv_freq = inv_freq[which].view(*positions.shape, -1)
    angles = positions.unsqueeze(-1).float() * inv_freq
    cos, sin = angles.cos() * chosen[0][1], angles.sin() * chosen[0][1]
    return torch.cat((cos, cos), -1).unsqueeze(-2), torch.cat((-sin, sin), -1).unsqueeze(-2)


def rotate(x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Rotates each pair (i, i + rotary_dim/2) of the leading dimensions of `x` `[batch, seq, heads, head_dim]`."""
    cos, sin = tables
    dim = cos.shape[-1]
    if dim == x.shape[-1]:
        return torch.addcmul(x * cos, x.roll(dim // 2, -1), sin)
    turned = x[..., :dim]
    return torch.cat((torch.addcmul(turned * cos, turned.roll(dim // 2, -1), sin), x[..., dim:]), -1)
