"""The product of a few tokens with packed weights, and packed weights as floats.

A panel's codes are read as 32-bit words, in the order in which they lie: one word has four columns (a run) of one row, and in q4 the
nibbles above them are the columns 16 further on (see `kernels/format.py`).

    block of a panel, q4:      row 0   row 1   ...   row 15          word of run 1, row r, from its lowest bits:
    run 0                      word    word    ...   word            column 4 | 20 | 5 | 21 | 6 | 22 | 7 | 23
    run 1                      word    word    ...   word
    run 2, run 3               ...                                   q8 has eight runs, a byte for each of four columns

A tile of words is then a matrix `[runs, rows]`, and one column of every run gives a tile of weights `[runs, rows]` that meets the same
columns of the activations `[tokens, runs]`: no code moves between threads. Unlike on a CPU, activations are not rounded: the weights
become floats in registers. Sums are float32 and their order depends on shapes alone, so that results are reproducible.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmkit.kernels.format import BLOCK, OFFSET, PANEL
from llmkit.kernels.reference import Packed

MAX_TOKENS = 16  # up to so many tokens reading the weights is what takes time; more take a dense product
_RUNS = 64  # of a tile: four 32-bit words on their way for each of 128 threads, or eight
_PROGRAMS = 4  # wanted for each multiprocessor, to keep its loads under way
_SCRATCH = 1 << 26  # weights that are floats at a time: 128 MiB in 16 bits


@triton.jit
def _weights(words, table, half: tl.constexpr, column: tl.constexpr, Q4: tl.constexpr):
    """float32: what one column (0..3) of each word stands for, before scaling."""
    if Q4:
        # 16 floats are one line of the first-level cache.
        return tl.load(table + ((words >> (8 * column + 4 * half)) & 15))
    else:
        return ((words << (24 - 8 * column)) >> 24).to(tl.float32)


@triton.jit
def _product_kernel(
    x,  # [tokens, K]
    words,  # int32 [panels, blocks, RUNS, 16]
    scales,  # int8 [panels, groups, 16]
    row_scale,  # float32 [16 * panels]
    table,  # float32 [16], q4
    out,  # float32 [splits, tokens, N]
    tokens,
    K,
    N,
    blocks,
    TILES: tl.constexpr,  # of a split
    Q4: tl.constexpr,
    HALVES: tl.constexpr,  # groups in a block that have scales of their own
    TOKENS: tl.constexpr,  # 1, or 16: padded for the tensor cores
    OPERAND: tl.constexpr,  # dtype of the matrices that tensor cores multiply
    ROWS: tl.constexpr,  # of a program
    BLOCKS: tl.constexpr,  # of a tile
):
    """One program: ROWS outputs of every token, over one split of the columns."""
    RUNS: tl.constexpr = 4 if Q4 else 8
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    panel, lane = row // 16, row % 16
    inside_row = panel < tl.cdiv(N, 16)  # panels are padded: 16 rows share one answer, so that their loads stay one access
    run = tl.arange(0, BLOCKS * RUNS)
    token = tl.arange(0, TOKENS)
    first = tl.program_id(1) * TILES * BLOCKS
    acc = tl.zeros([TOKENS if TOKENS > 1 else BLOCKS * RUNS, ROWS], tl.float32)
    for index in range(TILES):
        start = first + index * BLOCKS
        block = start + run // RUNS
        inside = (block < blocks)[:, None] & inside_row[None, :]
        tile = tl.load(words + ((panel * blocks + start) * RUNS * 16 + lane)[None, :] + (run * 16)[:, None], mask=inside, other=0)
        for half in tl.static_range(2 if Q4 else 1):
            group = (panel * blocks)[None, :] * HALVES + block[:, None] * HALVES + (half if HALVES == 2 else 0)
            scale = tl.load(scales + group * 16 + lane[None, :], mask=inside, other=0).to(tl.float32)
            for column in tl.static_range(4):
                k = block * 32 + half * 16 + (run % RUNS) * 4 + column
                known = k < K
                weights = _weights(tile, table, half, column, Q4) * scale
                if TOKENS == 1:
                    acc += weights * tl.load(x + k, mask=known, other=0.0).to(tl.float32)[:, None]
                else:
                    values = tl.load(x + token[:, None] * K + k[None, :], mask=(token < tokens)[:, None] & known[None, :], other=0.0)
                    acc = tl.dot(values.to(OPERAND), weights.to(values.dtype).to(OPERAND), acc, input_precision="ieee")
    factor = tl.load(row_scale + row, mask=inside_row, other=0.0)
    if TOKENS == 1:
        tl.store(out + tl.program_id(1) * N + row, tl.sum(acc, 0) * factor, mask=row < N)
    else:
        place = (tl.program_id(1) * tokens + token[:, None]) * N + row[None, :]
        tl.store(out + place, acc * factor[None, :], mask=(token < tokens)[:, None] & (row < N)[None, :])


@triton.jit
def _rows_kernel(
    ids,  # int64 [count]; unused where LISTED is false
    words,
    scales,
    row_scale,
    table,
    out,  # [count, K]
    first,
    count,
    K,
    blocks,
    Q4: tl.constexpr,
    HALVES: tl.constexpr,
    LISTED: tl.constexpr,  # the rows `ids`, else the rows from `first` on
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """One program: BLOCKS blocks of ROWS rows as floats."""
    RUNS: tl.constexpr = 4 if Q4 else 8
    index = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    wanted = index < count
    row = tl.load(ids + index, mask=wanted, other=0) if LISTED else first + index
    panel, lane = (row // 16).to(tl.int64), row % 16
    run = tl.arange(0, BLOCKS * RUNS)
    start = tl.program_id(1) * BLOCKS
    block = start + run // RUNS
    inside = wanted[:, None] & (block < blocks)[None, :]
    tile = tl.load(words + ((panel * blocks + start) * RUNS * 16 + lane)[:, None] + (run * 16)[None, :], mask=inside, other=0)
    factor = tl.load(row_scale + row, mask=wanted, other=0.0)[:, None]
    for half in tl.static_range(2 if Q4 else 1):
        group = (panel * blocks)[:, None] * HALVES + block[None, :] * HALVES + (half if HALVES == 2 else 0)
        scale = tl.load(scales + group * 16 + lane[:, None], mask=inside, other=0).to(tl.float32)
        even = tl.join(_weights(tile, table, half, 0, Q4) * scale, _weights(tile, table, half, 2, Q4) * scale)
        odd = tl.join(_weights(tile, table, half, 1, Q4) * scale, _weights(tile, table, half, 3, Q4) * scale)
        weights = tl.reshape(tl.join(even, odd), [ROWS, BLOCKS * RUNS * 4]) * factor  # columns of a run side by side
        at = tl.arange(0, BLOCKS * RUNS * 4)
        k = (start + at // (RUNS * 4)) * 32 + half * 16 + at % (RUNS * 4)
        place = index.to(tl.int64)[:, None] * K + k[None, :]
        tl.store(out + place, weights.to(out.dtype.element_ty), mask=wanted[:, None] & (k < K)[None, :])


def linear(x: Tensor, packed: Packed, splits: int | None = None) -> Tensor:
    """`x [..., K] @ weight.T`, in the dtype of x (float32, float16, bfloat16), `[..., N]`.

    splits: parts of the columns that run side by side where the rows alone leave multiprocessors idle; by default as many as it takes.
    """
    features, columns = packed.shape
    flat = x.reshape(-1, columns).contiguous()
    tokens = len(flat)
    if tokens > MAX_TOKENS:
        out = _dense(flat, packed)
    elif tokens == 0:
        out = flat.new_empty(0, features)
    else:
        out = _few_tokens(flat, packed, splits)
    return out.view(*x.shape[:-1], features)


def _few_tokens(x: Tensor, packed: Packed, splits: int | None) -> Tensor:
    tokens, columns = x.shape
    features, blocks = packed.shape[0], packed.codes.shape[1]
    rows = PANEL * (1 if tokens == 1 else 2)
    programs = triton.cdiv(features, rows)
    if splits is None:
        splits = triton.cdiv(_PROGRAMS * _multiprocessors(x.device), programs)
    constants = _constants(packed)
    tiles = triton.cdiv(blocks, constants["BLOCKS"])
    per_split = triton.cdiv(tiles, splits)
    splits = triton.cdiv(tiles, per_split)
    out = x.new_empty(splits, tokens, features, dtype=torch.float32)
    _product_kernel[(programs, splits)](
        x, *_pointers(packed), out, tokens, columns, features, blocks,
        TILES=per_split, TOKENS=1 if tokens == 1 else MAX_TOKENS, OPERAND=_operand(x.dtype), ROWS=rows, **constants, num_stages=1,
    )  # fmt: skip
    return (out[0] if splits == 1 else out.sum(0)).to(x.dtype)


def _dense(x: Tensor, packed: Packed) -> Tensor:
    """Weights as floats in a scratch buffer, a band of rows at a time."""
    features, columns = packed.shape
    band = max(1, _SCRATCH // columns)
    if band >= features:
        return x @ dequantize(packed, x.dtype).T
    out = x.new_empty(len(x), features)
    for first in range(0, features, band):
        count = min(band, features - first)
        out[:, first : first + count] = x @ _expand(packed, x.dtype, first, count).T
    return out


def dequantize(packed: Packed, dtype: torch.dtype) -> Tensor:
    """The weight `[N, K]`."""
    return _expand(packed, dtype, 0, packed.shape[0])


def rows(packed: Packed, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Some rows of the weight, `[*ids.shape, K]`; ids int64."""
    out = _expand(packed, dtype, 0, ids.numel(), ids.reshape(-1).contiguous())
    return out.view(*ids.shape, packed.shape[1])


def _expand(packed: Packed, dtype: torch.dtype, first: int, count: int, ids: Tensor | None = None) -> Tensor:
    columns, blocks = packed.shape[1], packed.codes.shape[1]
    out = torch.empty(count, columns, dtype=dtype, device=packed.codes.device)
    rows = PANEL if ids is None else 1
    if count:
        constants = _constants(packed)
        _rows_kernel[(triton.cdiv(count, rows), triton.cdiv(blocks, constants["BLOCKS"]))](
            out if ids is None else ids, *_pointers(packed), out, first, count, columns, blocks,
            LISTED=ids is not None, ROWS=rows, **constants,
        )  # fmt: skip
    return out


def _pointers(packed: Packed) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Words, scales, row scales and the codebook as floats; q8 has none, and any pointer does."""
    table = packed.row_scale if packed.codebook is None else packed.codebook.float() - OFFSET
    return packed.codes.view(torch.int32), packed.scales, packed.row_scale, table


def _constants(packed: Packed) -> dict[str, Any]:
    q4 = packed.codebook is not None
    return {"Q4": q4, "HALVES": BLOCK // packed.group, "BLOCKS": _RUNS // (4 if q4 else 8)}


def _operand(dtype: torch.dtype) -> tl.dtype:
    """That of the activations; but Triton's interpreter multiplies the bits of bfloat16 as if they were integers."""
    if dtype == torch.bfloat16:
        return tl.float32 if triton.knobs.runtime.interpret else tl.bfloat16
    return tl.float16 if dtype == torch.float16 else tl.float32


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
