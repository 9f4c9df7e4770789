"""NF4 matrices: what bitsandbytes means by them, in plain PyTorch; rows of a matrix; gradients; and its kernels on the same weights."""

from __future__ import annotations

import copy

import bitsandbytes.functional as bnb
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from llmkit.quant import nf4
from llmkit.quant.nf4 import BLOCK, Nested, Nf4Linear, Nf4Matrix, Quantizer
from tests.tiny import quantize_model


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def theirs(weight: Tensor, kind: str = "nf4", double: bool = True, block: int = BLOCK) -> tuple[Nf4Matrix, Tensor]:
    """A matrix that bitsandbytes quantized, and the weight that it stands for."""
    codes, state = bnb.quantize_4bit(weight, quant_type=kind, compress_statistics=double, blocksize=block)
    nested, absmax = None, state.absmax
    if double:
        nested = Nested(state.state2.code, state.state2.absmax, state.offset)
        absmax = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
    # By the definition: bitsandbytes' kernel for CPUs misreads rows that are not whole blocks.
    each = torch.stack((codes.view(-1) >> 4, codes.view(-1) & 15), 1).view(-1)[: weight.numel()].long()
    dense = (state.code[each] * absmax.repeat_interleave(block)[: weight.numel()]).view(weight.shape)
    return Nf4Matrix(tuple(weight.shape), codes.view(-1), state.absmax, state.code, nested, block, scheme=kind), dense


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 150)),
    kind=st.sampled_from(["nf4", "fp4"]),
    double=st.booleans(),
    block=st.sampled_from([32, 64, 128]),
    data=st.data(),
)
def test_dequantizing(shape: tuple[int, int], kind: str, double: bool, block: int, data: st.DataObject) -> None:
    matrix, dense = theirs(normal(*shape), kind, double, block)
    assert torch.equal(matrix.dequantize(), dense)
    start = data.draw(st.integers(0, shape[0] - 1))
    stop = data.draw(st.integers(start + 1, shape[0]))
    assert torch.equal(matrix.rows(start, stop).dequantize(), dense[start:stop])


def test_large_matrices_are_dequantized_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, dense = theirs(normal(300, 100))
    monkeypatch.setattr(nf4, "_CHUNK", 7 * BLOCK)
    assert torch.equal(matrix.dequantize(), dense)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_quantizing_in_parts_is_quantizing_at_once(dtype: torch.dtype) -> None:
    weight = normal(70, 96).to(dtype)
    quantizer = Quantizer()
    for start in range(0, 70, 2):
        quantizer.add(weight[start : start + 2])
    expected, _ = theirs(weight)
    for matrix in (quantizer.matrix((70, 96)), nf4.quantize(weight)):
        assert torch.equal(matrix.dequantize(), expected.dequantize())
        assert torch.equal(matrix.codes, expected.codes)
    with pytest.raises(ValueError, match="not finite"):
        quantizer.add(torch.tensor([[1.0, float("inf")]]))


def test_bits_and_error() -> None:
    weight = normal(512, 1024)
    matrix = nf4.quantize(weight)
    assert 4.12 < 8 * matrix.nbytes / weight.numel() < 4.15
    error = (matrix.dequantize() - weight).square().mean() / weight.square().mean()
    assert 0.007 < error < 0.0105  # the error of NF4 on normal weights (0.0095 in blocks of 64)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("part", [False, True])
def test_products_and_gradients(bias: bool, part: bool) -> None:
    matrix = nf4.quantize(normal(48, 40))
    if part:
        matrix = matrix.rows(5, 30)
    module = Nf4Linear(matrix, nn.Parameter(normal(matrix.shape[0], seed=2)) if bias else None)
    assert (module.out_features, module.in_features) == matrix.shape
    x, dense = normal(3, 7, 40, seed=1).requires_grad_(), module.dequantize()
    expected = nn.functional.linear(x, dense, module.bias)
    out = module(x)
    torch.testing.assert_close(out, expected)
    with torch.no_grad():
        assert torch.equal(module(x), out)
    weight = normal(*out.shape, seed=3)
    parameters = [x] if module.bias is None else [x, module.bias]
    for ours, theirs_ in zip(
        torch.autograd.grad((out * weight).sum(), parameters), torch.autograd.grad((expected * weight).sum(), parameters), strict=True
    ):
        torch.testing.assert_close(ours, theirs_)
    assert [name for name, _ in module.named_parameters()] == (["bias"] if bias else [])


@pytest.mark.parametrize("double", [False, True])
def test_bitsandbytes_kernels_take_the_same_matrix(double: bool) -> None:
    """What runs on CUDA; here its kernels for a CPU."""
    matrix, dense = theirs(normal(32, 128), double=double)
    assert torch.equal(nf4.bitsandbytes_dense(matrix, torch.float32), dense)
    assert torch.equal(nf4.bitsandbytes_dense(matrix, torch.bfloat16), dense.bfloat16())
    x = normal(5, 128, seed=1).requires_grad_()
    out = nf4.bitsandbytes_product(x, matrix)
    torch.testing.assert_close(out, x @ dense.T)
    assert not out.requires_grad


def test_a_linear_is_dequantized_by_what_is_fastest_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA by bitsandbytes' kernel: in training every product asks for the weight."""
    matrix, dense = theirs(normal(32, 128), double=True)
    module = nf4.Nf4Linear(matrix)
    assert torch.equal(module.dequantize(), dense)
    monkeypatch.setattr(nf4, "_dense", lambda matrix, dtype: nf4.bitsandbytes_dense(matrix, dtype) + 1)
    assert torch.equal(module.dequantize(), dense + 1)


def test_conversions_leave_codes_and_scales() -> None:
    module = Nf4Linear(nf4.quantize(normal(16, 64)), nn.Parameter(normal(16)))
    dense = module.dequantize()
    for changed in (copy.deepcopy(module).bfloat16(), copy.deepcopy(module).to("cpu", torch.float16)):
        assert changed.bias is not None
        assert changed.bias.dtype != torch.float32
        assert torch.equal(changed.dequantize(), dense)


def test_a_model_in_memory() -> None:
    from llmkit.checkpoint.load import load_model
    from llmkit.llm.api import embedded_model

    model = load_model(embedded_model(), "float32")
    dense = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    quantize_model(model, model.config.parameters, "nf4")
    modules = {name: module for name, module in model.named_modules() if isinstance(module, Nf4Linear)}
    assert len(modules) == 7 * model.config.num_hidden_layers
    for name, module in modules.items():
        assert torch.equal(module.dequantize(), nf4.quantize(dense[f"{name}.weight"]).dequantize())
    assert {name for name, _ in model.named_parameters()} == dense.keys() - {f"{name}.weight" for name in modules}
