"""How the codes and scales of a quantized matrix are chosen. Round to nearest: no data but the weights."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from llmkit.kernels.format import BLOCK, CODEBOOK, OFFSET, QuantizedMatrix, pack

# Where the largest weight of a group may land, in codebook units: near either end, or beyond it, where it is clipped so that the others
# are met more finely. The finer the steps, the lower the error: twice as many gain 1%.
_LANDINGS = (-53.0, -59.0, -65.0, -72.0, -80.0, 44.0, 49.0, 55.0, 61.0, 68.0)
_CHUNK = 1 << 16  # weights searched at a time: the buffers stay in the second-level cache
_STEPS = 512  # of the table from a scaled weight to the nearest entry


def round_to_nearest(weight: Tensor, scheme: str = "q4", group: int = 32, importance: Tensor | None = None) -> QuantizedMatrix:
    """Return a matrix `[out, in]` (any float dtype) in codes with searched scales.

    For each group the signed scale with the least square error is sought; the scales are then rounded to 8 bits against the largest of
    their row, and the codes are chosen again for the scales as they will be. importance: float32 `[in]`, how much an error in this
    column counts (the mean square of what flows in); None: all the same.
    Raises ValueError for weights that are not finite.
    """
    rows, columns = weight.shape
    padded = -(-columns // BLOCK) * BLOCK
    step = max(1, _CHUNK // padded)
    parts = []
    counts = torch.zeros(padded)
    counts[:columns] = 1 if importance is None else importance.float()
    for start in range(0, rows, step):
        part = weight[start : start + step].to(torch.float32)
        if not bool(torch.isfinite(part).all()):
            raise ValueError(f"row {start + int((~torch.isfinite(part)).any(1).nonzero()[0, 0])} has values that are not finite")
        # Padded with zeros, which no scale depends on: a group that reaches beyond the last column is like the others.
        padded_rows = torch.zeros(len(part), padded)
        padded_rows[:, :columns] = part
        # A power of two brings each row near 1, where squares neither overflow nor vanish.
        power = torch.frexp(padded_rows.abs().amax(1)).exponent.clamp_(-126, 126)
        padded_rows *= torch.ldexp(torch.ones(len(part)), -power).unsqueeze(1)
        choose = _choose_q4 if scheme == "q4" else _choose_q8
        codes, scales, row_scale = choose(padded_rows, group, None if importance is None else counts)
        parts.append((codes[:, :columns], scales[:, : -(-columns // group)], torch.ldexp(row_scale, power)))
    all_codes, all_scales, all_row_scales = (torch.cat(found).numpy() for found in zip(*parts, strict=True))
    return pack(all_codes, all_scales, all_row_scales, scheme, group)


@cache
def _tables(device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """Return the codebook, and the value and the code nearest to each half of a codebook unit.

    A look-up in a table of 512 takes the place of a search among 16 entries for each weight and each scale that is tried.
    """
    codebook = torch.tensor(CODEBOOK, dtype=torch.float32) - OFFSET
    grid = (torch.arange(_STEPS) - _STEPS // 2 + 0.5) / 2  # bounds between entries are halves, so a step has one nearest entry
    codes = (grid[:, None] - codebook).abs().argmin(1)
    return codebook, codebook[codes], codes.to(torch.uint8)


def _index(groups: Tensor, scale: Tensor, scaled: Tensor, index: Tensor) -> Tensor:
    """The step of the table that each weight falls on, into the buffers `scaled` and `index`."""
    inverse = torch.where(scale != 0, 2 / scale, 0.0).unsqueeze(1)
    torch.mul(groups, inverse, out=scaled)
    # Numbers far beyond the table, even infinite ones, are clipped like the others; nan_to_num because 0 * inf is NaN.
    scaled.add_(_STEPS // 2).nan_to_num_(_STEPS // 2).clamp_(0, _STEPS - 1)
    return index.copy_(scaled)


def _choose_q4(rows: Tensor, group: int, importance: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Codes uint8, scales int8 `[rows, groups]`, row_scale float32."""
    _, values, codes = _tables()
    groups = rows.view(-1, group)
    counts = None if importance is None else importance.view(-1, group).repeat(len(rows), 1)  # [groups of all rows, group]
    weighted = groups if counts is None else groups * counts
    magnitude, place = groups.abs().max(1)
    largest = torch.where(groups.gather(1, place.unsqueeze(1)).squeeze(1) < 0, -magnitude, magnitude)
    gain, scale = torch.full_like(largest, -1.0), torch.zeros_like(largest)  # of the best scale so far, by group
    # Buffers of one chunk, used again by every attempt: they stay in the second-level cache.
    scaled, index, value = torch.empty_like(groups), torch.empty_like(groups, dtype=torch.int32), torch.empty_like(groups)

    def attempt(candidate: Tensor) -> None:
        torch.index_select(values, 0, _index(groups, candidate, scaled, index).view(-1), out=value.view(-1))
        product = torch.mul(weighted, value, out=scaled).sum(1)
        power = (value.square_() if counts is None else value.square_().mul_(counts)).sum(1)
        fitted = product / power.clamp_min(1e-30)
        # For fixed codes c the error sum n (w - s c)^2 is least at s = product / power, with product = sum n w c and power = sum n c^2;
        # it is then less by product^2 / power than without any code, which is what candidates are compared by.
        found = product * fitted
        better = found > gain
        gain.copy_(torch.where(better, found, gain))
        scale.copy_(torch.where(better, fitted, scale))

    for landing in _LANDINGS:
        attempt(largest / landing)
    attempt(scale.clone())  # the codes of the best scale have a best scale of their own

    # Rounding the scales to 8 bits moved them, so the codes are chosen again for what they are now.
    scales, row_scale = _round_scales(scale.view(len(rows), -1))
    _index(groups, (scales * row_scale.unsqueeze(1)).view(-1), scaled, index)
    return codes.index_select(0, index.view(-1)).view_as(rows), scales.to(torch.int8), row_scale


def _choose_q8(rows: Tensor, group: int, importance: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Codes int8: the largest weight of a group becomes about 127."""
    groups = rows.view(-1, group)
    scales, row_scale = _round_scales(groups.abs().amax(1).view(len(rows), -1) / 127)
    real = (scales * row_scale.unsqueeze(1)).view(-1, 1)
    # A group of zeros has the scale 0, and any code times it is 0.
    codes = (groups / torch.where(real > 0, real, 1.0)).round_().clamp_(-127, 127)
    return codes.to(torch.int8).view_as(rows), scales.to(torch.int8), row_scale


def _round_scales(scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return scales of groups `[rows, groups]` as whole numbers up to 127 times one number for each row."""
    row_scale = scale.abs().amax(1) / 127
    inverse = torch.where(row_scale > 0, 1 / row_scale, 0.0)
    return (scale * inverse.unsqueeze(1)).round_().clamp_(-127, 127), row_scale
