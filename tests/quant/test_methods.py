"""How codes and scales are chosen: close to the best there is, whatever the weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal
from torch import Tensor

from llmkit.kernels.format import CODEBOOK, OFFSET, QuantizedMatrix
from llmkit.quant.methods import round_to_nearest

KINDS = [("q4", 32), ("q4", 16), ("q8", 32)]


def square_error(weight: Tensor, matrix: QuantizedMatrix) -> float:
    """Mean square error of a quantized matrix relative to the mean square of the weights."""
    difference = weight.float().numpy() - matrix.dequantize()
    return float(np.square(difference).mean() / max(float(weight.float().square().mean()), 1e-30))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def same(a: QuantizedMatrix, b: QuantizedMatrix) -> bool:
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in ("codes", "scales", "row_scale"))


# Mean square errors relative to the weights'. Measured 0.00541, 0.00408 and 2.95e-5 (seed 0); 4.5-bit Q4_0 has 0.0088.
@pytest.mark.parametrize(("kind", "bound"), list(zip(KINDS, (0.0055, 0.00415, 3.05e-5), strict=True)))
def test_error_on_normal_weights(kind: tuple[str, int], bound: float) -> None:
    weight = normal(256, 1024)
    matrix = round_to_nearest(weight, *kind)
    assert 0.9 * bound < square_error(weight, matrix) < bound
    assert square_error(weight * 1e-3, round_to_nearest(weight * 1e-3, *kind)) == pytest.approx(square_error(weight, matrix), rel=1e-3)


def best_by_brute_force(group: np.ndarray, importance: np.ndarray) -> float:
    """The least weighted square error over 4,000 scales of either sign, each with the nearest codes and then refitted."""
    entries = np.array(CODEBOOK, np.float64) - OFFSET
    largest = np.abs(group).max()
    scales = largest / np.linspace(20, 200, 2000)
    scales = np.concatenate([scales, -scales])
    values = entries[np.searchsorted((entries[1:] + entries[:-1]) / 2, group / scales[:, None])]
    fitted = (values * group * importance).sum(1) / (values**2 * importance).sum(1)
    return float((importance * (group - fitted[:, None] * values) ** 2).sum(1).min())


@pytest.mark.parametrize("weighted", [False, True])
def test_scales_are_near_the_best_of_a_brute_force_search(weighted: bool) -> None:
    """One group of 16 for each row, so that its scale is met exactly."""
    weight = normal(200, 16)
    importance = normal(16, seed=1).exp() if weighted else torch.ones(16)
    found = round_to_nearest(weight, "q4", 16, importance if weighted else None).dequantize()
    errors = (importance.numpy() * (weight.numpy() - found) ** 2).sum(1)
    best = np.array([best_by_brute_force(row, importance.numpy()) for row in weight.double().numpy()])
    assert (errors > best * 0.999).all()
    assert errors.sum() < 1.05 * best.sum()
    assert np.median(errors / best) < 1.02


def test_three_weights_find_the_best_codes_and_scale() -> None:
    """Over all 16^3 codes with their best scale."""
    entries = np.array(CODEBOOK, np.float64) - OFFSET
    codes = np.stack(np.meshgrid(entries, entries, entries), -1).reshape(-1, 3)
    codes = codes[codes.any(1)]
    weight = normal(100, 3)
    found = ((weight.numpy() - round_to_nearest(weight, "q4", 16).dequantize()) ** 2).sum(1)
    products = weight.double().numpy() @ codes.T
    best = (weight.double().numpy() ** 2).sum(1) - (products**2 / (codes**2).sum(1)).max(1)
    assert (found >= best * 0.99 - 1e-9).all()
    relative = found / (weight.double().numpy() ** 2).sum(1)
    assert relative.max() < 0.01  # three weights always have some good scale
    assert relative.mean() < 1.5e-3


def test_importance_moves_the_error_to_where_it_does_not_count() -> None:
    weight, importance = normal(128, 256), normal(256, seed=1).mul(2).exp()
    plain, weighted = (torch.from_numpy(round_to_nearest(weight, "q4", 32, i).dequantize()) for i in (None, importance))
    assert ((weighted - weight) ** 2 * importance).sum() < 0.9 * ((plain - weight) ** 2 * importance).sum()
    assert ((weighted - weight) ** 2).sum() > ((plain - weight) ** 2).sum()
    assert same(round_to_nearest(weight, "q4", 32, torch.ones(256)), round_to_nearest(weight))
    # columns that do not count at all, even whole groups
    importance[:40] = 0
    assert np.isfinite(round_to_nearest(weight, "q4", 32, importance).dequantize()).all()


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_stay_zeros(kind: tuple[str, int]) -> None:
    weight = normal(20, 70)
    weight[3], weight[:, 32:64] = 0, 0
    weight[7, 65] = -0.0
    found = round_to_nearest(weight, *kind).dequantize()
    assert not found[3].any()
    assert not found[:, 32:64].any()
    assert not round_to_nearest(torch.zeros(5, 40), *kind).dequantize().any()


def test_a_single_weight_in_a_group_is_met_almost_exactly() -> None:
    weight = torch.zeros(4, 64)
    weight[0, 5], weight[1, 6], weight[2, 40], weight[3, 0] = 3.0, -3.0, 1e-30, -1e30
    found = round_to_nearest(weight).dequantize()
    np.testing.assert_allclose(found, weight.numpy(), rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_outliers(kind: tuple[str, int]) -> None:
    """One weight a thousand times the others: it is met, and groups of other rows do not notice."""
    weight = normal(32, 128)
    spoilt = weight.clone()
    spoilt[5, 17] = 1000.0
    found, plain = round_to_nearest(spoilt, *kind).dequantize(), round_to_nearest(weight, *kind).dequantize()
    assert found[5, 17] == pytest.approx(1000.0, rel=0.01)
    rest = np.arange(32) != 5
    assert_array_equal(found[rest], plain[rest])
    assert square_error(spoilt, round_to_nearest(spoilt, *kind)) < 1e-3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite(kind: tuple[str, int], bad: float) -> None:
    weight = normal(3000, 64)
    weight[2345, 63] = bad
    with pytest.raises(ValueError, match="row 2345 has values that are not finite"):
        round_to_nearest(weight, *kind)


@settings(max_examples=100, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    shape=st.tuples(st.integers(1, 40), st.integers(1, 80)),
    exponents=st.tuples(st.integers(-45, 37), st.integers(-45, 37)),
    seed=st.integers(0, 2**31),
)
def test_any_magnitudes(kind: tuple[str, int], shape: tuple[int, int], exponents: tuple[int, int], seed: int) -> None:
    """From denormal numbers to the largest: finite, and of no more error than the coarsest rounding of the largest weight of a row."""
    rng = np.random.default_rng(seed)
    magnitudes = 10.0 ** rng.uniform(min(exponents), max(exponents), shape)
    weight = torch.from_numpy((magnitudes * rng.uniform(-1, 1, shape)).astype(np.float32))
    found = round_to_nearest(weight, *kind).dequantize()
    assert np.isfinite(found).all()
    largest = weight.abs().amax(1, keepdim=True).double().numpy()
    # row scales below the smallest normal number lose bits of their own
    assert (np.abs(found - weight.double().numpy()) <= 0.15 * largest + 1e-36).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_narrow_weights_are_their_float32_values(kind: tuple[str, int], dtype: torch.dtype) -> None:
    weight = normal(40, 100).to(dtype)
    assert same(round_to_nearest(weight, *kind), round_to_nearest(weight.float(), *kind))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_do_not_depend_on_each_other(kind: tuple[str, int]) -> None:
    weight = normal(2000, 96)
    whole = round_to_nearest(weight, *kind).dequantize()
    for start, end in ((0, 1), (31, 1999), (1024, 1100)):
        assert_array_equal(round_to_nearest(weight[start:end], *kind).dequantize(), whole[start:end])


def test_quantizing_what_is_quantized_changes_little() -> None:
    """8-bit weights are met again; 4-bit ones nearly (the search may find another scale that fits as well)."""
    for kind, bound in zip(KINDS, (2e-4, 2e-4, 1e-5), strict=True):
        once = torch.from_numpy(round_to_nearest(normal(64, 256), *kind).dequantize())
        assert square_error(once, round_to_nearest(once, *kind)) < bound


@pytest.mark.real
def test_error_on_the_matrices_of_gpt2(data_dir: Path) -> None:
    """Real weights with outliers; the largest errors measured are 0.0064, 0.0046 and 4.0e-5 (llmkit's), 0.0096 for Q4_0."""
    from llmkit.checkpoint.arrays import stored_array
    from llmkit.checkpoint.files import open_safetensors

    for name, tensor in open_safetensors(data_dir / "models/gpt2-small-attn/attn_l0_l11_fp16.safetensors").items():
        if len(tensor.shape) == 2:
            weight = torch.from_numpy(np.ascontiguousarray(stored_array(tensor).T.astype(np.float32)))
            for kind, bound in zip(KINDS, (0.0067, 0.0048, 4.2e-5), strict=True):
                assert square_error(weight, round_to_nearest(weight, *kind)) < bound, name
