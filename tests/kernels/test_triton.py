"""The Triton kernels against `dequantize() @ x`: on a GPU where there is one, else in Triton's interpreter (see conftest.py)."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from llmkit.kernels import reference
from llmkit.kernels.format import QuantizedMatrix, pack
from llmkit.kernels.reference import Packed
from llmkit.quant import linears as quantized
from llmkit.quant.linears import QuantizedEmbedding, QuantizedLinear

pytest.importorskip("triton", reason="triton is not installed (pip install 'llmkit[gpu]'; Linux only)")

from llmkit.kernels import triton as kernels
from llmkit.kernels.triton import matmul

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMATS = [("q4", 32), ("q4", 16), ("q8", 32)]
# Largest error of a product by dtype, as a share of the largest result: a rounding of the weights and one of the result. A bfloat16 has
# 8 bits, and the interpreter cuts off the rest where a GPU rounds.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
ULP = {torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


def matrix(shape: tuple[int, int], scheme: str, group: int, seed: int = 0) -> QuantizedMatrix:
    rng, (rows, columns) = np.random.default_rng(seed), shape
    codes = rng.integers(0, 16, shape).astype(np.uint8) if scheme == "q4" else rng.integers(-127, 128, shape).astype(np.int8)
    scales = rng.integers(-127, 128, (rows, -(-columns // group))).astype(np.int8)
    return pack(codes, scales, rng.uniform(0.5, 1.5, rows).astype(np.float32) * 1e-4, scheme, group)


def packed(shape: tuple[int, int], scheme: str, group: int, seed: int = 0) -> tuple[Packed, Tensor]:
    """A random matrix on the device, and its weights in float32 on the CPU."""
    stored = matrix(shape, scheme, group, seed)
    host = Packed.of(stored)
    tensors = (host.codes, host.scales, host.row_scale, host.codebook)
    return Packed(group, shape, *(None if t is None else t.to(DEVICE) for t in tensors)), torch.from_numpy(stored.dequantize())


def inputs(tokens: int, columns: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(tokens, columns, generator=torch.Generator().manual_seed(tokens)).to(dtype)


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.cpu().double() - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("tokens", [1, 2, 16, 17])
@pytest.mark.parametrize(("scheme", "group"), FORMATS)
def test_products_of_odd_shapes(scheme: str, group: int, tokens: int, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(tokens)
    shapes = [(1, 1), (16, 32), (33, 65), (int(rng.integers(2, 60)), int(rng.integers(2, 700)))]
    for seed, shape in enumerate(shapes):
        weight, dense = packed(shape, scheme, group, seed)
        x = inputs(tokens, shape[1], dtype)
        found = kernels.linear(x.to(DEVICE), weight)
        assert (found.dtype, found.shape) == (dtype, (tokens, shape[0]))
        assert error(found, x.double() @ dense.double().T) < TOLERANCE[dtype], shape


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize(("scheme", "group"), FORMATS)
def test_split_columns_sum_to_the_same_and_always_to_the_same_bits(scheme: str, group: int, tokens: int) -> None:
    shape = (20, 1300)
    weight, dense = packed(shape, scheme, group)
    x = inputs(tokens, shape[1], torch.float32)
    for splits in (1, 2, 100):
        found = [matmul.linear(x.to(DEVICE), weight, splits) for _ in range(2)]
        assert error(found[0], x.double() @ dense.double().T) < TOLERANCE[torch.float32]
        assert torch.equal(*found)


def test_leading_dimensions_and_no_tokens() -> None:
    weight, dense = packed((40, 70), "q4", 32)
    x = inputs(6, 70, torch.float32)
    strided = torch.stack((x, x), -1).to(DEVICE)[..., 0].view(2, 3, 70)
    assert error(kernels.linear(strided, weight).reshape(6, 40), x.double() @ dense.double().T) < TOLERANCE[torch.float32]
    assert kernels.linear(x[:0].to(DEVICE), weight).shape == (0, 40)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("scheme", "group"), FORMATS)
@pytest.mark.parametrize("shape", [(1, 1), (35, 70), (50, 600)])
def test_weights_and_rows_as_floats(shape: tuple[int, int], scheme: str, group: int, dtype: torch.dtype) -> None:
    weight, dense = packed(shape, scheme, group)
    torch.testing.assert_close(kernels.dequantize(weight, dtype).cpu().float(), dense, rtol=ULP[dtype], atol=0)
    ids = torch.randint(0, shape[0], (2, 3), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(kernels.rows(weight, ids.to(DEVICE), dtype).cpu().float(), dense[ids], rtol=ULP[dtype], atol=0)
    assert kernels.rows(weight, ids[:0].to(DEVICE), dtype).shape == (0, 3, shape[1])


def test_large_matrices_become_floats_a_band_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, dense = packed((100, 90), "q4", 16)
    monkeypatch.setattr(matmul, "_SCRATCH", 90 * 33)
    x = inputs(20, 90, torch.float32)
    assert error(kernels.linear(x.to(DEVICE), weight), x.double() @ dense.double().T) < TOLERANCE[torch.float32]


@pytest.fixture
def on_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Quantized modules take the kernels for CUDA on the device of these tests."""
    if DEVICE == "cpu":
        monkeypatch.setattr(quantized, "_kernels", lambda device: kernels)


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("tokens", [1, 4, 30])
def test_modules_take_these_kernels(tokens: int) -> None:
    stored = matrix((50, 70), "q4", 32)
    dense, bias = torch.from_numpy(stored.dequantize()), torch.randn(50)
    module = QuantizedLinear(stored, nn.Parameter(bias)).to(DEVICE)
    embedding = QuantizedEmbedding(stored).to(DEVICE)
    x = inputs(tokens, 70, torch.float32)
    with torch.no_grad():
        # On a CPU activations would be rounded to 8 bits, a hundred times further away.
        assert error(module(x.to(DEVICE)), x.double() @ dense.double().T + bias) < TOLERANCE[torch.float32]
        assert error(embedding.logits(x.to(DEVICE)), x.double() @ dense.double().T) < TOLERANCE[torch.float32]
        ids = torch.arange(tokens) % 50
        torch.testing.assert_close(embedding(ids.to(DEVICE)).cpu(), dense[ids])


@pytest.mark.usefixtures("on_device")
def test_gradients_flow_through_the_dequantized_weight() -> None:
    stored = matrix((20, 40), "q8", 32)
    module = QuantizedLinear(stored).to(DEVICE)
    x = inputs(3, 40, torch.float32).to(DEVICE).requires_grad_()
    module(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad.cpu(), torch.from_numpy(stored.dequantize()).sum(0).expand(3, -1))


def test_without_triton_pytorch_takes_over_and_says_so_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, "llmkit.kernels.triton", None)
    monkeypatch.delattr("llmkit.kernels.triton")
    quantized._triton.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            assert quantized._kernels(torch.device("cuda")) is None
            assert quantized._kernels(torch.device("cuda")) is None
        assert [record.message for record in caplog.records if "pip install triton" in record.message] == [caplog.messages[-1]]
    finally:
        quantized._triton.cache_clear()
    assert quantized._kernels(torch.device("mps")) is None
    weight, dense = packed((20, 40), "q4", 32)
    assert torch.equal(quantized._dense(weight, torch.float32).cpu(), reference.dequantize(Packed.of(matrix((20, 40), "q4", 32))))
    assert torch.equal(quantized._dense(weight, torch.float32).cpu(), dense)


COMPILE = """
import sys
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from llmkit.kernels.triton import matmul

POINTERS = {"ids": "*i64", "words": "*i32", "scales": "*i8", "row_scale": "*fp32", "table": "*fp32"}

def compile(kernel, x, out, **constants):
    names = kernel.arg_names
    types = {**POINTERS, "x": x, "out": out}
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    aligned = {(index,): [["tt.divisibility", 16]] for index, name in enumerate(names) if name in types or name in ("N", "K", "blocks")}
    source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()}, aligned)
    return triton.compile(source, target=GPUTarget("cuda", int(sys.argv[1]), 32), options={"num_stages": 1})

for q4, halves, blocks in ((True, 1, 16), (True, 2, 16), (False, 1, 8)):
    shared = {"Q4": q4, "HALVES": halves, "BLOCKS": blocks}
    one = compile(matmul._product_kernel, "*bf16", "*fp32", TOKENS=1, OPERAND=tl.bfloat16, ROWS=16, TILES=3, **shared)
    compile(matmul._product_kernel, "*bf16", "*fp32", TOKENS=16, OPERAND=tl.bfloat16, ROWS=32, TILES=3, **shared)
    for listed, rows in ((False, 16), (True, 1)):
        compile(matmul._rows_kernel, "*bf16", "*bf16", LISTED=listed, ROWS=rows, **shared)
    loop = one.asm["ttgir"].split("scf.for")[1].split("scf.yield")[0]
    assert "convert_layout" not in loop, "codes move between threads"
    assert "ld.global.v4.b32" in one.asm["ptx"], "codes are not read 16 bytes at a time"
"""


@pytest.mark.parametrize("capability", [pytest.param(80, marks=pytest.mark.slow), 90])
def test_kernels_compile_for_cuda(capability: int, tmp_path: Path) -> None:
    """Ahead of time, no GPU is needed. The layouts that a decoded token's speed rests on are those that were meant."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    program = [sys.executable, "-c", COMPILE, str(capability)]
    done = subprocess.run(program, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
