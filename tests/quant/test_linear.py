"""Quantized modules: the products of the reference, gradients to inputs and biases, and codes that no conversion touches."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from llmkit.kernels import reference
from llmkit.kernels.format import BLOCK
from llmkit.quant.linears import QuantizedEmbedding, QuantizedLinear
from llmkit.quant.methods import round_to_nearest

KINDS = [("q4", 32), ("q4", 16), ("q8", 32)]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def linear(rows: int = 40, columns: int = 72, kind: tuple[str, int] = ("q4", 32), bias: bool = True) -> QuantizedLinear:
    return QuantizedLinear(round_to_nearest(normal(rows, columns), *kind), nn.Parameter(normal(rows, seed=1)) if bias else None)


def product_by_definition(x: Tensor, module: QuantizedLinear) -> Tensor:
    """Activations rounded to int8 in groups of 32 by the least power of two with which they fit, the rest in float64."""
    padded = torch.nn.functional.pad(x, (0, -x.shape[-1] % BLOCK)).view(len(x), -1, BLOCK)
    largest = padded.abs().amax(-1, keepdim=True)
    scale = torch.where(largest > 0, 2.0 ** (largest.double() / 127).log2().ceil(), 1.0)
    rounded = (padded / scale).round() * scale
    weight = torch.nn.functional.pad(module.dequantize().double(), (0, -x.shape[-1] % BLOCK))
    out = rounded.flatten(1) @ weight.T
    return out if module.bias is None else out + module.bias.double()


@settings(max_examples=50, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    shape=st.tuples(st.integers(1, 50), st.integers(1, 150)),
    tokens=st.integers(1, 9),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_products(kind: tuple[str, int], shape: tuple[int, int], tokens: int, bias: bool, seed: int) -> None:
    module, x = linear(*shape, kind, bias), normal(tokens, shape[1], seed=seed)
    with torch.no_grad():
        out = module(x)
        assert torch.equal(out, reference.linear(x, module.packed, module.bias))
        expected = product_by_definition(x, module)
        assert (out - expected).abs().max() <= 2e-6 * max(1.0, float(expected.abs().max())) * max(1, shape[1] // 32)
        for token in range(tokens):  # a token alone has the same bits
            assert torch.equal(module(x[token : token + 1])[0], out[token])


@pytest.mark.parametrize("kind", KINDS)
def test_products_are_near_those_of_the_dense_weight(kind: tuple[str, int]) -> None:
    module, x = linear(kind=kind), normal(5, 72)
    with torch.no_grad():
        dense = torch.nn.functional.linear(x, module.dequantize(), module.bias)
        assert (module(x) - dense).norm() < 0.01 * dense.norm()


def test_shapes_of_inputs() -> None:
    module = linear()
    with torch.no_grad():
        assert module(normal(2, 3, 72)).shape == (2, 3, 40)
        assert module(normal(72)).shape == (40,)
        assert module(torch.empty(0, 72)).shape == (0, 40)
        assert not module(torch.zeros(1, 72)).sub(module.bias).any()
    assert (module.in_features, module.out_features) == (72, 40)
    assert "in_features=72, out_features=40, bias=True, group=32" in repr(module)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_input_and_bias(kind: tuple[str, int]) -> None:
    module, x = linear(kind=kind), normal(5, 72).requires_grad_()
    out = module(x)
    dense = torch.nn.functional.linear(x.detach(), module.dequantize(), module.bias)
    torch.testing.assert_close(out, dense)
    weight = normal(5, 40, seed=3)
    (out * weight).sum().backward()
    torch.testing.assert_close(x.grad, weight @ module.dequantize())
    assert module.bias is not None
    torch.testing.assert_close(module.bias.grad, weight.sum(0))
    assert [name for name, _ in module.named_parameters()] == ["bias"]


def test_a_bias_alone_can_be_trained() -> None:
    module, x = linear(), normal(5, 72)
    module(x).sum().backward()
    assert module.bias is not None
    torch.testing.assert_close(module.bias.grad, torch.full((40,), 5.0))


def test_gradients_against_finite_differences() -> None:
    module, x = linear(6, 20).double(), normal(3, 20).double().requires_grad_()
    assert torch.autograd.gradcheck(module, x, eps=1e-6, atol=1e-4)  # the weight is float32: about 1e-7 of it is noise


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_conversion_leaves_the_weight_alone(dtype: torch.dtype) -> None:
    module = linear()
    before, bits = module.dequantize(), {name: buffer.clone() for name, buffer in module.named_buffers()}
    module.to(dtype)
    assert module.bias is not None
    assert module.bias.dtype == dtype
    for name, buffer in module.named_buffers():
        assert buffer.dtype == bits[name].dtype
        assert torch.equal(buffer, bits[name])
    assert torch.equal(module.dequantize(), before)
    x = normal(3, 72).to(dtype)
    with torch.no_grad():
        assert module(x).dtype == dtype
        torch.testing.assert_close(module(x).float(), linear()(x.float()), rtol=2e-2, atol=5e-2)
    assert module(x.requires_grad_()).dtype == dtype


def test_moving_and_copying() -> None:
    module, x = linear(), normal(2, 72)
    moved = copy.deepcopy(module).to("meta")
    assert all(tensor.device.type == "meta" for tensor in [*moved.buffers(), *moved.parameters()])
    again = linear(kind=("q4", 32))
    again.load_state_dict(module.state_dict())
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(module)(x), module(x))
        assert torch.equal(again(x), module(x))


def test_a_mapped_matrix_is_not_copied() -> None:
    matrix = round_to_nearest(normal(32, 64))
    assert QuantizedLinear(matrix).codes.data_ptr() == matrix.codes.ctypes.data


@pytest.mark.parametrize("kind", KINDS)
def test_embeddings(kind: tuple[str, int]) -> None:
    matrix = round_to_nearest(normal(50, 72), *kind)
    ids = torch.tensor([[0, 49, 17], [17, 16, 15]])
    table = QuantizedEmbedding(matrix)
    assert torch.equal(table(ids), table.dequantize()[ids])
    assert QuantizedEmbedding(matrix, torch.bfloat16)(ids).dtype == torch.bfloat16
    x = normal(3, 72)
    with torch.no_grad():
        assert torch.equal(table.logits(x), QuantizedLinear(matrix)(x))
    assert (table.num_embeddings, table.embedding_dim) == (50, 72)
