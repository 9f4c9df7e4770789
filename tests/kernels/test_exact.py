"""The native step against `exact.py`, its PyTorch reference in the same order of operations: every bit is the same."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import llmkit
from llmkit.checkpoint.load import load_model
from llmkit.checkpoint.quantize import quantize_folder
from llmkit.checkpoint.source import ModelSource
from llmkit.config import ModelConfig
from llmkit.engine.backend import StepBatch
from llmkit.kernels import NativeBackend, native_problem, reference
from llmkit.kernels.format import Weight, pack
from llmkit.kernels.training_ops import TrainingKernels
from llmkit.model.transformer import Transformer
from llmkit.quant.methods import round_to_nearest
from tests.conftest import ROOT
from tests.families.tiny import rope, tiny_folder
from tests.kernels import exact
from tests.kernels.exact import Exact
from tests.kernels.test_native import DENSE, logits, quantized_weights, random_ids, weights_of

pytestmark = pytest.mark.skipif(native_problem() is not None, reason=f"no native kernels: {native_problem()}")

Numbers = Callable[..., Tensor]


@pytest.fixture
def numbers() -> Numbers:
    """Normally distributed float32 of a shape."""
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(shape, generator=generator)


def equal(found: np.ndarray, expected: Tensor | np.ndarray) -> None:
    np.testing.assert_array_equal(found, np.asarray(expected))


def kl_per_token(found: np.ndarray, expected: np.ndarray) -> Tensor:
    p, q = (torch.from_numpy(one).double().log_softmax(-1) for one in (expected, found))
    return (p.exp() * (p - q)).sum(-1)


# -- one operation at a time -------------------------------------------------------------------------------------------


def nearest(exactly: Fraction) -> float:
    """The float32 next to a number between 2^-100 and 2^100, of two the even one."""
    unit = Fraction(2) ** (abs(exactly.numerator).bit_length() - exactly.denominator.bit_length() - 24)
    unit *= 2 if abs(exactly) / unit >= 2**24 else 1
    return float(round(exactly / unit) * unit)


def test_a_fused_multiply_add_is_rounded_once(numbers: Numbers) -> None:
    a, b, c = numbers(3, 3000).unbind()
    c = c * torch.logspace(-12, 12, 3000)  # on either side of the product
    # (1 + 2^-12)^2 lies in the middle between two float32, and float64 forgets 2^-60.
    a, b = (torch.cat((part, torch.full((4,), 1 + 2**-12))) for part in (a, b))
    c = torch.cat((c, torch.tensor([2**-60, -(2**-60), 0.0, 2**-40])))
    expected = [nearest(Fraction(x) * Fraction(y) + Fraction(z)) for x, y, z in zip(*(part.tolist() for part in (a, b, c)), strict=True)]
    equal(exact.fma(a, b, c).double().numpy(), np.array(expected))
    assert expected[3000] != expected[3001]


@pytest.mark.parametrize("n", [1, 7, 16, 40, 160, 1000])
def test_norms(n: int, numbers: Numbers) -> None:
    x, weight = numbers(200, n) * torch.logspace(-3, 3, 200).unsqueeze(1), numbers(n)
    found = np.empty((200, n), np.float32)
    TrainingKernels().rms_norm(x.numpy(), weight.numpy(), 1e-5, found, 1)
    equal(found, exact.rms_norm(x, weight, 1e-5))


def test_silu_and_its_exponential(numbers: Numbers) -> None:
    gate = torch.cat((numbers(5000), torch.linspace(-100, 100, 5000), torch.tensor([0.0, -0.0, 87.3, 88.0, -87.3, 1e-30, 1e30, -1e30])))
    up, found = numbers(len(gate)), np.empty(len(gate), np.float32)
    TrainingKernels().gate(gate.numpy(), up.numpy(), found, 1)
    equal(found, exact.activation("silu", gate) * up)


def test_activations_are_rounded_to_int8(numbers: Numbers) -> None:
    """Times the identity, the rounded numbers themselves come out."""
    x = numbers(300, 64) * torch.logspace(-36, 36, 300).unsqueeze(1)
    x[7, :32] = 0
    identity = pack(np.eye(64, dtype=np.int8), np.ones((64, 2), np.int8), np.ones(64, np.float32), "q8")
    q, scale = reference.quantize_activations(x)
    equal(TrainingKernels().linear(identity, None, x.numpy(), 1), (q * scale.unsqueeze(-1)).flatten(1))


@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16", "q4", "q4 in groups of 16", "q8"])
@pytest.mark.parametrize("shape", [(37, 45), (20, 1600)])
def test_products(kind: str, shape: tuple[int, int], numbers: Numbers) -> None:
    values, bias = numbers(*shape), numbers(shape[0])
    if kind.startswith("q"):
        weight: Weight = round_to_nearest(values, kind[:2], 16 if kind.endswith("16") else 32)
    else:
        weight = values.to(getattr(torch, kind)).view(torch.uint16 if kind == "bfloat16" else getattr(torch, kind)).numpy()
    for tokens in (1, 3, 50):
        x = numbers(tokens, shape[1])
        equal(TrainingKernels().linear(weight, bias.numpy(), x.numpy(), 1), exact.linear(x, weight, bias))
        equal(TrainingKernels().linear(weight, None, x.numpy(), 2), exact.linear(x, weight))


# -- whole steps -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", DENSE)
def test_every_family(family: str, tmp_path: Path) -> None:
    """Norms, biases, rotations, windows and caps; float32 products hide no bit behind a rounding to int8."""
    model = load_model(tiny_folder(tmp_path, family))
    ids = random_ids(model, 60)
    for scheme, kv_bits in ((None, 32), (None, 8), ("q4", 16), ("q8", 32)):
        weights = weights_of(model) | (quantized_weights(model, scheme) if scheme else {})
        equal(logits(NativeBackend(model.config, weights, kv_bits=kv_bits), ids), Exact(model.config, weights, kv_bits).logits(ids))


def test_angles_of_far_positions(tmp_path: Path) -> None:
    """Frequencies a million times as high stand for positions of up to 60 million."""
    model = load_model(tiny_folder(tmp_path, "llama", **rope("linear", factor=1e-6)))
    weights, ids = weights_of(model), random_ids(model, 60)
    equal(logits(NativeBackend(model.config, weights), ids), Exact(model.config, weights).logits(ids))


@pytest.fixture(scope="module")
def grouped(tmp_path_factory: pytest.TempPathFactory) -> Transformer:
    """Six heads share two of keys and values; every second layer sees 600 positions, more than a split."""
    changes: dict[str, Any] = {"sliding_window": 600, "layer_types": ["full_attention", "sliding_attention"], "use_sliding_window": True}
    changes |= {"num_hidden_layers": 2, "hidden_size": 60, "num_attention_heads": 6, "num_key_value_heads": 2}
    return load_model(tiny_folder(tmp_path_factory.mktemp("grouped"), "qwen2", **changes))


@pytest.mark.parametrize("kv_bits", [32, 16, 8])
def test_attention_over_chunks_and_splits(grouped: Transformer, kv_bits: int) -> None:
    weights, ids = weights_of(grouped), random_ids(grouped, 1300)
    expected = Exact(grouped.config, weights, kv_bits).logits(ids)
    equal(logits(NativeBackend(grouped.config, weights, kv_bits=kv_bits, threads=1), ids), expected)
    backend = NativeBackend(grouped.config, weights, kv_bits=kv_bits, threads=2)  # splits of one row are taken by two threads
    equal(logits(backend, ids, [1150, *[1] * 20, 130]), expected)


@pytest.mark.parametrize("kv_bits", [16, 8])
def test_keys_and_values_at_the_ends_of_what_a_cache_holds(grouped: Transformer, kv_bits: int) -> None:
    """Heads of zeros have no scale, and no half holds a million."""
    weights, ids = weights_of(grouped), random_ids(grouped, 20)
    for name, factor in (("0.self_attn.k_proj", 0), ("1.self_attn.v_proj", 10**6)):
        for part in ("weight", "bias"):
            weights[f"model.layers.{name}.{part}"] = np.asarray(weights[f"model.layers.{name}.{part}"]) * np.float32(factor)
    equal(logits(NativeBackend(grouped.config, weights, kv_bits=kv_bits), ids), Exact(grouped.config, weights, kv_bits).logits(ids))


@pytest.fixture(scope="module", params=["q4", "q8"])
def stories(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model, quantized."""
    folder = tmp_path_factory.mktemp("stories") / request.param
    quantize_folder(llmkit.embedded_model(), folder, request.param)
    return folder


def parts(folder: Path) -> tuple[ModelConfig, dict[str, Weight]]:
    return llmkit.load(folder, device="cpu").config, ModelSource.open(folder).weights()


def text(folder: Path, tokens: int) -> np.ndarray:
    """Ids of real stories, or random ones where there are none."""
    file = Path(os.environ.get("LLMKIT_TEST_DATA", ROOT.parent / "shared" / "data")) / "text" / "tinystories_2MB.txt"
    llm = llmkit.load(folder, device="cpu")
    if not file.is_file():
        return np.random.default_rng(0).integers(0, llm.config.vocab_size, tokens)
    with file.open(encoding="utf-8") as lines:
        return np.array(llm.tokenizer.encode(lines.read(8 * tokens))[:tokens])


@pytest.mark.parametrize(
    ("tokens", "kv_bits"), [(500, 16), *(pytest.param(2000, kv_bits, marks=pytest.mark.slow) for kv_bits in (32, 16, 8))]
)
def test_logits_of_a_trained_model(stories: Path, tokens: int, kv_bits: int) -> None:
    config, weights = parts(stories)
    ids = text(stories, tokens)
    assert len(ids) == tokens
    for start in range(0, tokens, 500):
        part = ids[start : start + 500]
        found, expected = logits(NativeBackend(config, weights, kv_bits=kv_bits), part), Exact(config, weights, kv_bits).logits(part)
        assert kl_per_token(found, expected).max() < 1e-6
        equal(found, expected)


def test_every_layer_of_a_trained_model(stories: Path) -> None:
    """The model cut off behind each of its layers."""
    config, weights = parts(stories)
    ids = text(stories, 100)
    for count in range(1, config.num_hidden_layers + 1):
        cut = replace(config, layers=config.layers[:count])
        positions = np.arange(len(ids), dtype=np.int32)
        table, length = np.arange(len(ids) // NativeBackend.block_size + 1, dtype=np.int32)[None], np.array([len(ids)], np.int32)
        found = NativeBackend(cut, weights).step(
            StepBatch(ids.astype(np.int32), positions, 0 * positions, [table], length, [None], positions), hidden=True
        )
        expected = Exact(cut, weights).hidden(ids)
        assert float(np.abs(found - expected.numpy()).max()) < 1e-4 * float(expected.abs().max())
        equal(found, expected)


def test_greedy_text_of_a_trained_model(stories: Path) -> None:
    """200 tokens, one step each. The reference computes the whole text at once and chooses each of its tokens from those before."""
    config, weights = parts(stories)
    llm = llmkit.load(stories, device="cpu", kv_bits=16, speculate="off")
    prompt = [int(token) for token in llm.tokenizer.encode("Once upon a time")]
    found = llm.generate(prompt, temperature=0, max_tokens=200, ignore_eos=True)
    ids = np.array([*prompt, *found.token_ids])
    chosen = Exact(config, weights, 16).logits(ids[:-1]).argmax(-1)
    assert len(found.token_ids) == 200
    assert chosen[len(prompt) - 1 :].tolist() == list(found.token_ids)
