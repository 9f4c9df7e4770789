"""Rotary position embeddings (RoFormer, arXiv:2104.09864): queries and keys turn by an angle that grows with the position."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from llmkit.config import RopeConfig
from llmkit.rope import inverse_frequencies

Rotary = tuple[Tensor, Tensor]  # cos and sin, each [batch, seq, 1, rotary_dim]


def rotary_tables(rope: RopeConfig, head_dim: int, positions: Tensor, lengths: Sequence[int]) -> Rotary:
    """cos and sin for every token, float32 `[batch, seq, 1, rotary_dim]`, ready for `rotate`.

    positions: `[batch, seq]`. lengths: one for all, or one per token of the flattened batch: the sequence lengths for
    which frequencies are chosen. The first half of `sin` is negated, so that rotating is one roll and one multiply-add.
    """
    distinct = tuple(sorted(set(lengths)))
    inv_freq, factor = _frequencies(rope, head_dim, distinct, positions.device)
    if len(distinct) > 1:  # sequences of one step may have frequency sets of their own
        which = torch.tensor([distinct.index(length) for length in lengths], device=positions.device)
        inv_freq = inv_freq[which].view(*positions.shape, -1)
    angles = positions.unsqueeze(-1).float() * inv_freq
    cos, sin = angles.cos() * factor, angles.sin() * factor
    return torch.cat((cos, cos), -1).unsqueeze(-2), torch.cat((-sin, sin), -1).unsqueeze(-2)


@lru_cache(maxsize=64)
def _frequencies(rope: RopeConfig, head_dim: int, lengths: tuple[int, ...], device: torch.device) -> tuple[Tensor, float]:
    """Radians per position, float32 `[lengths, rotary_dim / 2]`. Kept on the device: nothing may be copied to it in a captured step."""
    chosen = [inverse_frequencies(rope, head_dim, length) for length in lengths]
    with torch.inference_mode(False):  # training takes them too
        return torch.stack([torch.from_numpy(frequencies) for frequencies, _ in chosen]).to(device), chosen[0][1]


def rotate(x: Tensor, tables: Rotary) -> Tensor:
    """Rotate each pair (i, i + rotary_dim/2) of the leading dimensions of `x` `[batch, seq, heads, head_dim]`."""
    cos, sin = tables
    dim = cos.shape[-1]
    if dim == x.shape[-1]:
        return torch.addcmul(x * cos, x.roll(dim // 2, -1), sin)
    rotated = x[..., :dim]  # partial rotary: the dimensions behind are left as they are
    return torch.cat((torch.addcmul(rotated * cos, rotated.roll(dim // 2, -1), sin), x[..., dim:]), -1)
