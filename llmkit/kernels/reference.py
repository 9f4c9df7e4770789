"""The product with quantized weights in PyTorch: the definition, the oracle of the native kernels, and the fallback without a compiler.

The arithmetic, per token: activations are rounded to int8 in groups of 32 with a power of two for a scale; codes times activations are
added as integers, group by group; float32 comes in once per group, in ascending order of the groups:

    isum = sum over the group of (codebook[code] - 64) * q                exact
    acc  = fma(isum, scale * x_scale, acc)                                one rounding: the factor is exact
    y    = fma(acc, row_scale, bias)

That order depends on K alone, so a token's result does not depend on the tokens beside it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from llmkit.kernels.format import BLOCK, OFFSET, PANEL, QuantizedMatrix

LEAST_EXPONENT = -100  # of a group's scale: smaller numbers are 0
_PRODUCTS = 1 << 22  # group sums held at a time: 16 MiB of float32
_WEIGHTS = 1 << 20  # weights unpacked at a time


@dataclass(frozen=True, eq=False)
class Packed:
    """A `QuantizedMatrix` as tensors, on any device; see there for shapes."""

    group: int
    shape: tuple[int, int]
    codes: Tensor
    scales: Tensor
    row_scale: Tensor
    codebook: Tensor | None

    @classmethod
    def of(cls, matrix: QuantizedMatrix) -> Packed:
        """The same memory."""
        codebook = None if matrix.codebook is None else torch.from_numpy(matrix.codebook.copy())
        codes, scales, row_scale = (_tensor(array) for array in (matrix.codes, matrix.scales, matrix.row_scale))
        return cls(matrix.group, matrix.shape, codes, scales, row_scale, codebook)


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array if array.flags.writeable else array.copy())  # torch warns of memory it may not write


def whole_values(packed: Packed, panels: slice = slice(None)) -> Tensor:
    """What the codes of some panels stand for before scaling: whole numbers as float32 `[16 * panels, Kp]`."""
    codes = packed.codes[panels]
    count, blocks, _ = codes.shape
    if packed.codebook is None:
        values = codes.view(count, blocks, 8, PANEL, 4).permute(0, 3, 1, 2, 4).float()
    else:
        runs = codes.view(count, blocks, 4, PANEL, 4)
        both = torch.stack((runs & 15, runs >> 4), 2).permute(0, 4, 1, 2, 3, 5)  # [panel, row, block, half, run, column]
        values = (packed.codebook.float() - OFFSET)[both.int()]
    return values.reshape(count * PANEL, blocks * BLOCK)


def dequantize(packed: Packed) -> Tensor:
    """The weight, float32 `[N, K]`."""
    rows, columns = packed.shape
    scales = packed.scales.transpose(1, 2).reshape(len(packed.row_scale), -1, 1).float()
    values = whole_values(packed).view(len(packed.row_scale), -1, packed.group) * scales
    return values.flatten(1)[:rows, :columns] * packed.row_scale[:rows, None]


def rows(packed: Packed, ids: Tensor) -> Tensor:
    """Some rows of the weight, float32 `[*ids.shape, K]`."""
    flat = ids.reshape(-1)
    panel, lane = flat // PANEL, flat % PANEL
    count, blocks, _ = packed.codes.shape
    if packed.codebook is None:
        values = packed.codes.view(count, blocks, 8, PANEL, 4)[panel, :, :, lane].float()
    else:
        runs = packed.codes.view(count, blocks, 4, PANEL, 4)[panel, :, :, lane]
        values = (packed.codebook.float() - OFFSET)[torch.stack((runs & 15, runs >> 4), 2).int()]
    scales = packed.scales[panel, :, lane].float()
    scaled = values.reshape(*scales.shape, packed.group) * scales.unsqueeze(-1)
    out = scaled.flatten(1)[:, : packed.shape[1]] * packed.row_scale[flat, None]
    return out.view(*ids.shape, packed.shape[1])


def quantize_activations(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows `[tokens, K]` float32 as whole numbers -127..127 times powers of two.

    Returns the numbers, held as float32, `[tokens, Kp / 32, 32]`, and the powers `[tokens, Kp / 32]`.
    """
    padding = -x.shape[-1] % BLOCK
    groups = torch.nn.functional.pad(x, (0, padding)).view(len(x), -1, BLOCK)
    mantissa, exponent = torch.frexp(groups.abs().amax(-1))  # largest = mantissa * 2^exponent, 0.5 <= mantissa < 1
    exponent = (exponent - 7 + (mantissa > 127 / 128)).clamp_min(LEAST_EXPONENT)  # so that it comes to lie between 64 and 127
    return torch.ldexp(groups, -exponent.unsqueeze(-1)).round(), torch.ldexp(torch.ones_like(mantissa), exponent)  # round: half to even


def linear(x: Tensor, packed: Packed, bias: Tensor | None = None) -> Tensor:
    """`x [..., K] @ weight.T + bias`, float32 `[..., N]`, in the integer arithmetic above."""
    features, columns = packed.shape
    flat = x.reshape(-1, columns).float()
    tokens = len(flat)
    if tokens == 0:
        return flat.new_empty(*x.shape[:-1], features)
    q, x_scale = quantize_activations(flat)
    groups = packed.scales.shape[1]
    q = q.view(tokens, groups, packed.group).transpose(0, 1)  # [groups, tokens, group]
    x_scale = x_scale.repeat_interleave(BLOCK // packed.group, 1).t().unsqueeze(-1)  # [groups, tokens, 1]
    out = flat.new_empty(tokens, len(packed.row_scale))
    panels = max(1, min(_PRODUCTS // (groups * tokens), _WEIGHTS // (groups * packed.group)) // PANEL)
    for start in range(0, len(packed.codes), panels):
        part = slice(start, start + panels)
        values = whole_values(packed, part).view(-1, groups, packed.group)
        # Whole numbers: a float32 product of them is exact in any order, since no sum reaches 2^24.
        sums = torch.bmm(q, values.permute(1, 2, 0)).double()  # [groups, tokens, rows]
        scales = packed.scales[part].transpose(0, 1).reshape(groups, 1, -1).float()
        factors = (scales * x_scale).double()
        total = torch.zeros_like(sums[0])
        for group in range(groups):
            # A product of two float32 is exact in float64: this rounds once, like a fused multiply-add.
            total = torch.addcmul(total, sums[group], factors[group]).float().double()
        out[:, start * PANEL : (start + panels) * PANEL] = total.float()
    out, row_scale = out[:, :features], packed.row_scale[:features]
    out = out * row_scale if bias is None else torch.addcmul(bias.double(), out.double(), row_scale.double()).float()
    return out.reshape(*x.shape[:-1], features)
