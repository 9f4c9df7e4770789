"""Rotary frequencies (RoFormer, arXiv:2104.09864) and the ways they are stretched to longer contexts. No torch.

Powers are taken in float64 and rounded to float32 once; everything after is float32 in the order of the published
implementations: at position 100,000 a last-bit change of a frequency can be 0.006 radians.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from llmkit.config import RopeConfig
from llmkit.errors import ConfigError

Floats = NDArray[np.float32]
ONE = np.float32(1)


def rotary_dim(rope: RopeConfig, head_dim: int) -> int:
    """How many of a head's dimensions are rotated; the rest pass through."""
    return int(head_dim * rope.partial_rotary_factor)


@lru_cache(maxsize=256)
def inverse_frequencies(rope: RopeConfig, head_dim: int, length: int) -> tuple[Floats, float]:
    """Radians per position, float32 `[rotary_dim / 2]`, and the factor on cos and sin.

    `length` is the length of the whole sequence; only dynamic and longrope look at it.
    """
    dim = rotary_dim(rope, head_dim)
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)

    def powers(base: float) -> Floats:
        return (base ** exponents.astype(np.float64)).astype(np.float32)

    original = rope.original_max_position_embeddings

    if rope.rope_type == "default":
        return ONE / powers(rope.rope_theta), 1.0
    if rope.rope_type == "linear":
        return ONE / powers(rope.rope_theta) / np.float32(rope.factor), 1.0

    if original is None:
        raise ConfigError(
            f"rope type {rope.rope_type!r} has no original_max_position_embeddings; add it to rope_parameters in config.json."
        )
    if rope.rope_type == "dynamic":
        # NTK-aware: the base grows with the length so that the slowest frequency always spans it.
        stretch = rope.factor * max(length, original) / original - (rope.factor - 1)
        return ONE / powers(rope.rope_theta * stretch ** (dim / (dim - 2))), 1.0
    if rope.rope_type == "longrope":
        factors = np.array(rope.long_factor if length > original else rope.short_factor, np.float32)
        scale = rope.attention_factor
        if scale is None:
            scale = 1.0 if rope.factor <= 1 else math.sqrt(1 + math.log(rope.factor) / math.log(original))
        return ONE / (factors * powers(rope.rope_theta)), scale
    if rope.rope_type == "llama3":
        return _llama3(rope, ONE / powers(rope.rope_theta), original), 1.0
    if rope.rope_type == "yarn":
        return _yarn(rope, powers(rope.rope_theta), dim, original)
    raise ConfigError(f"rope type {rope.rope_type!r} is unknown; known are default, linear, dynamic, llama3, yarn, longrope.")


def _llama3(rope: RopeConfig, inv_freq: Floats, original: int) -> Floats:
    """Llama 3.1: slow frequencies are divided by `factor`, fast ones kept, those between blended."""
    factor, spread = np.float32(rope.factor), np.float32(rope.high_freq_factor - rope.low_freq_factor)
    wavelength = np.float32(2 * math.pi) / inv_freq
    slow = wavelength > original / rope.low_freq_factor
    fast = wavelength < original / rope.high_freq_factor
    scaled = np.where(slow, inv_freq / factor, inv_freq)
    smooth = (np.float32(original) / wavelength - np.float32(rope.low_freq_factor)) / spread
    blended = (ONE - smooth) * scaled / factor + smooth * scaled
    return np.where(slow | fast, scaled, blended)


def _yarn(rope: RopeConfig, periods: Floats, dim: int, original: int) -> tuple[Floats, float]:
    """YaRN (arXiv:2309.00071): interpolate slow dimensions, keep fast ones, a linear ramp between, and a temperature."""

    def dimension_of(rotations: float) -> float:  # the dimension that turns so often within the original context
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(rope.rope_theta))

    def temperature(weight: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * weight * math.log(rope.factor) + 1.0

    low, high = dimension_of(rope.beta_fast), dimension_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = ((np.arange(dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low or 0.001)).clip(0, 1)
    keep = ONE - ramp
    inv_freq = ONE / (np.float32(rope.factor) * periods) * (ONE - keep) + ONE / periods * keep

    scale = rope.attention_factor
    if scale is None:
        both = rope.mscale and rope.mscale_all_dim
        scale = temperature(rope.mscale or 1) / temperature(rope.mscale_all_dim or 1) if both else temperature(1)
    return inv_freq, scale
