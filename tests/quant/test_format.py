"""The layout of quantized matrices: what is packed is unpacked, and every reader sees the same weights."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from llmkit.errors import CheckpointError
from llmkit.kernels import reference
from llmkit.kernels.format import CODEBOOK, OFFSET, QuantizedMatrix, check_codebook, pack, stored_shapes, widen

KINDS = st.sampled_from([("q4", 16), ("q4", 32), ("q8", 32)])
SIZES = st.tuples(st.integers(1, 70), st.integers(1, 100))
Parts = tuple[np.ndarray, np.ndarray, np.ndarray]


def random_parts(scheme: str, group: int, shape: tuple[int, int], seed: int) -> Parts:
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 16, shape).astype(np.uint8) if scheme == "q4" else rng.integers(-127, 128, shape).astype(np.int8)
    scales = rng.integers(-127, 128, (shape[0], -(-shape[1] // group))).astype(np.int8)
    return codes, scales, rng.normal(size=shape[0]).astype(np.float32)


def weights_by_definition(parts: Parts, scheme: str, group: int) -> np.ndarray:
    """(codebook[code] - 64) * scale[group] * row_scale, weight by weight."""
    codes, scales, row_scale = parts
    values = codes.astype(np.float32) if scheme == "q8" else np.array(CODEBOOK, np.float32)[codes] - OFFSET
    return values * scales.astype(np.float32)[:, np.arange(codes.shape[1]) // group] * row_scale[:, None]


@settings(deadline=None)
@given(kind=KINDS, shape=SIZES, seed=st.integers(0, 2**31))
def test_what_is_packed_is_unpacked(kind: tuple[str, int], shape: tuple[int, int], seed: int) -> None:
    parts = random_parts(*kind, shape, seed)
    matrix = pack(*parts, *kind)
    assert matrix.shape == shape
    for found, expected in zip(matrix.unpack(), parts, strict=True):
        assert_array_equal(found, expected)
        assert found.dtype == expected.dtype


@settings(deadline=None)
@given(kind=KINDS, shape=SIZES, seed=st.integers(0, 2**31), data=st.data())
def test_all_readers_see_the_same_weights(kind: tuple[str, int], shape: tuple[int, int], seed: int, data: st.DataObject) -> None:
    parts = random_parts(*kind, shape, seed)
    matrix, expected = pack(*parts, *kind), weights_by_definition(parts, *kind)
    packed = reference.Packed.of(matrix)
    ids = np.array(data.draw(st.lists(st.integers(0, shape[0] - 1), max_size=9)), np.int64)
    assert_array_equal(matrix.dequantize(), expected)
    assert_array_equal(reference.dequantize(packed).numpy(), expected)
    assert_array_equal(matrix.rows(ids), expected[ids])
    assert_array_equal(reference.rows(packed, torch.from_numpy(ids)).numpy(), expected[ids])
    assert reference.rows(packed, torch.from_numpy(ids).view(-1, 1)).shape == (len(ids), 1, shape[1])


@settings(deadline=None)
@given(row=st.integers(0, 31), column=st.integers(0, 63), code=st.integers(1, 15))
def test_where_a_code_of_4_bits_lies(row: int, column: int, code: int) -> None:
    """By the drawing in kernels/format.py: 64 bytes for four columns of 16 rows; columns 16 to 31 of a block in the high nibbles."""
    codes = np.zeros((32, 64), np.uint8)
    codes[row, column] = code
    packed = pack(codes, np.ones((32, 2), np.int8), np.ones(32, np.float32)).codes
    within = column % 32
    byte = within % 16 // 4 * 64 + row % 16 * 4 + within % 4
    expected = np.zeros_like(packed)
    expected[row // 16, column // 32, byte] = code << 4 if within >= 16 else code
    assert_array_equal(packed, expected)


@settings(deadline=None)
@given(row=st.integers(0, 31), column=st.integers(0, 63), code=st.integers(-127, 127))
def test_where_a_code_of_8_bits_lies(row: int, column: int, code: int) -> None:
    codes = np.zeros((32, 64), np.int8)
    codes[row, column] = code
    packed = pack(codes, np.ones((32, 2), np.int8), np.ones(32, np.float32), "q8").codes
    expected = np.zeros_like(packed)
    expected[row // 16, column // 32, column % 32 // 4 * 64 + row % 16 * 4 + column % 4] = code
    assert_array_equal(packed, expected)


def test_padding_stands_for_zeros() -> None:
    parts = random_parts("q4", 32, (17, 33), 0)
    matrix = pack(*parts, "q4", 32)
    whole = dataclasses.replace(matrix, shape=(32, 64)).dequantize()
    assert_array_equal(whole[:17, :33], matrix.dequantize())
    assert not whole[17:].any()
    assert not whole[:, 33:].any()


def test_bits_per_weight_count_scales_and_padding() -> None:
    def bits(scheme: str, group: int, shape: tuple[int, int]) -> float:
        return pack(*random_parts(scheme, group, shape, 0), scheme, group).bits_per_weight

    assert bits("q4", 32, (64, 1024)) == 4.25 + 32 / 1024
    assert bits("q4", 16, (64, 1024)) == 4.5 + 32 / 1024
    assert bits("q8", 32, (64, 1024)) == 8.25 + 32 / 1024
    assert bits("q4", 32, (1, 1)) == 8 * (256 + 16 + 64)


def test_the_codebook() -> None:
    assert list(CODEBOOK) == sorted(set(CODEBOOK))
    assert len(CODEBOOK) == 16
    assert OFFSET in CODEBOOK
    assert min(CODEBOOK) >= 0
    assert max(CODEBOOK) <= 127


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("q5", 32, (16, 32)), "The scheme 'q5' is unknown; known are q4, q8"),
        (("q4", 64, (16, 32)), "q4 has groups of 16 or 32, not 64"),
        (("q8", 16, (16, 32)), "q8 has groups of 32, not 16"),
        (("q4", "32", (16, 32)), "not '32'"),
        (("q4", True, (16, 32)), "not True"),
        (("q4", 32, (0, 32)), "cannot have the shape"),
        (("q4", 32, (16, -1)), "cannot have the shape"),
        (("q4", 32, (16, 2**40)), "cannot have the shape"),
        (("q4", 32, (16,)), "cannot have the shape"),
    ],
)
def test_what_there_is_not(arguments: tuple, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        stored_shapes(*arguments)


def test_arrays_that_do_not_fit() -> None:
    matrix = pack(*random_parts("q4", 32, (16, 64), 0))

    def changed(**parts: np.ndarray | None) -> None:
        dataclasses.replace(matrix, **parts)  # type: ignore[arg-type]

    with pytest.raises(CheckpointError, match=r"needs codes uint8 \[1, 2, 256\], found uint8 \[1, 1, 256\]"):
        changed(codes=matrix.codes[:, :1])
    with pytest.raises(CheckpointError, match=r"needs scales int8 \[1, 2, 16\], found uint8"):
        changed(scales=matrix.scales.view(np.uint8))
    with pytest.raises(CheckpointError, match="row_scale float32"):
        changed(row_scale=matrix.row_scale.astype(np.float64))
    with pytest.raises(CheckpointError, match="found list"):
        changed(row_scale=matrix.row_scale.tolist())  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="needs a codebook"):
        changed(codebook=None)
    with pytest.raises(CheckpointError, match="not contiguous"):
        changed(row_scale=np.repeat(matrix.row_scale, 2)[::2])
    eight = pack(*random_parts("q8", 32, (16, 64), 0), "q8")
    with pytest.raises(CheckpointError, match="has no codebook"):
        dataclasses.replace(eight, codebook=matrix.codebook)


@pytest.mark.parametrize("book", [np.arange(15, dtype=np.uint8), np.full(16, 128, np.uint8), np.arange(16, dtype=np.int8)])
def test_damaged_codebooks(book: np.ndarray) -> None:
    with pytest.raises(CheckpointError, match="16 numbers from 0 to 127"):
        check_codebook(book)


def test_any_codes_and_scales_will_do() -> None:
    """Values are not checked: whatever bytes a damaged file has, reading them is no fault."""
    rng = np.random.default_rng(0)
    for scheme in ("q4", "q8"):
        arrays = {
            name: np.frombuffer(rng.bytes(dtype.itemsize * int(np.prod(shape))), dtype).reshape(shape)
            for name, (dtype, shape) in stored_shapes(scheme, 32, (20, 40)).items()
        }
        book = np.array(CODEBOOK, np.uint8) if scheme == "q4" else None
        matrix = QuantizedMatrix(scheme, 32, (20, 40), **arrays, codebook=book)
        with np.errstate(all="ignore"):
            assert matrix.dequantize().shape == (20, 40)
        assert reference.linear(torch.ones(3, 40), reference.Packed.of(matrix)).shape == (3, 20)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_widen(dtype: torch.dtype) -> None:
    values = torch.randn(50, generator=torch.Generator().manual_seed(0)).to(dtype)
    array = values.view(torch.uint16).numpy() if dtype == torch.bfloat16 else values.numpy()
    assert_array_equal(widen(array), values.float().numpy())
