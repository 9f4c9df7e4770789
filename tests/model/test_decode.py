"""Decoding in fixed shapes against the ordinary step. Without a GPU the step that would be captured runs eagerly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from llmkit.checkpoint.load import load_model
from llmkit.engine.backend import StepBatch
from llmkit.model.backend import TorchBackend
from llmkit.model.decode import MAX_BATCH, MAX_KEYS, StaticDecode, capturable
from llmkit.model.transformer import Transformer
from tests.families.tiny import VARIANTS, hf_config, our_config, tiny_folder
from tests.tiny import quantize_model

BLOCK = TorchBackend.block_size
NAMES = [
    "llama",
    "llama-biases-tied",
    "mistral",
    "gemma2",
    "gemma3",
    "qwen2-layer-types",
    "phi3-partial",
    "gpt2",
    "smollm3-window",
    "granite",
]


class Captured:
    """In the place of CUDA graphs: runs what was captured anew, and counts."""

    def __init__(self) -> None:
        self.captures = self.replays = 0

    def __call__(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        self.captures += 1

        def replay() -> Tensor:
            self.replays += 1
            return run()

        return replay


def tables(lengths: list[int], seed: int) -> list[np.ndarray]:
    """Blocks scattered over the storage, -1 where a sequence ends."""
    order = np.random.default_rng(seed).permutation(sum(-(-length // BLOCK) for length in lengths)).astype(np.int32)
    out, at = np.full((len(lengths), -(-max(lengths) // BLOCK)), -1, np.int32), 0
    for row, length in enumerate(lengths):
        blocks = -(-length // BLOCK)
        out[row, :blocks] = order[at : at + blocks]
        at += blocks
    return [out]


def run(backend: TorchBackend, texts: list[np.ndarray], table: list[np.ndarray], prompts: list[int]) -> list[np.ndarray]:
    """Reads the prompts, then decodes all texts side by side, each to its end; the logits of every step."""
    groups = table * len(backend.cache_windows)
    out = []
    for row, (text, length) in enumerate(zip(texts, prompts, strict=True)):
        at = np.arange(length, dtype=np.int32)
        out.append(
            backend.step(StepBatch(text[:length], at, at * 0, [t[[row]] for t in groups], np.array([length], np.int32), [None], at[-1:]))
        )
    for done in range(max(len(text) - length for text, length in zip(texts, prompts, strict=True))):
        alive = np.array([row for row, text in enumerate(texts) if prompts[row] + done < len(text)])
        at = np.array([prompts[row] + done for row in alive], np.int32)
        rows = np.arange(len(alive), dtype=np.int32)
        tokens = np.array([texts[row][position] for row, position in zip(alive, at, strict=True)], np.int32)
        out.append(backend.step(StepBatch(tokens, at, rows, [t[alive] for t in groups], at + 1, [None] * len(alive), rows)))
    return out


def compare(model: Transformer, captured: Captured, *, poison: bool = False) -> None:
    vocabulary, lengths = model.config.vocab_size, [40, 9, 61]
    texts = [np.random.default_rng(row).integers(0, vocabulary, length).astype(np.int32) for row, length in enumerate(lengths)]
    table = tables(lengths, seed=7)
    static, plain = TorchBackend(model, captured), TorchBackend(model)
    if poison:
        for group in range(len(model.config.cache_windows)):
            static.cache.reserve(group, 64)
        for storage in (*static.cache.keys, *static.cache.values):
            storage.fill_(float("nan"))
    for found, expected in zip(run(static, texts, table, [30, 1, 50]), run(plain, texts, table, [30, 1, 50]), strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * float(np.abs(expected).max()))
    assert captured.replays == 1 + 11  # the prompt of one token, and every step after the prompts


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_the_ordinary_step(tmp_path: Path, name: str) -> None:
    captured = Captured()
    compare(load_model(tiny_folder(tmp_path, name)), captured, poison=True)
    assert captured.captures == 3  # batches of one, of three and of two


def test_quantized_models_decode_alike(tmp_path: Path) -> None:
    model = load_model(tiny_folder(tmp_path, "llama", tie_word_embeddings=True))
    quantize_model(model, model.config.parameters)
    compare(model, Captured())


def test_a_step_is_captured_anew_when_the_cache_has_moved(tmp_path: Path) -> None:
    model = load_model(tiny_folder(tmp_path))
    captured = Captured()
    backend = TorchBackend(model, captured)
    one, zero = np.ones(1, np.int32), np.zeros(1, np.int32)
    for block in (0, 0, 1, 200, 3):
        backend.step(StepBatch(one, zero, zero, [np.full((1, 1), block, np.int32)], one, [None], zero))
    assert (captured.captures, captured.replays) == (2, 5)


def test_what_is_not_captured(tmp_path: Path) -> None:
    refused = {name for name in VARIANTS if not capturable(our_config(hf_config(name)))}
    assert refused == {"mixtral", "qwen3-moe", "qwen3-moe-window", "llama-dynamic", "phi3-longrope"}
    assert StaticDecode.fits(MAX_BATCH, 100)
    assert not StaticDecode.fits(MAX_BATCH + 1, 100)
    assert StaticDecode.fits(1, MAX_KEYS)
    assert not StaticDecode.fits(3, MAX_KEYS // 2)

    model = load_model(tiny_folder(tmp_path))
    captured = Captured()
    backend = TorchBackend(model, captured)
    two, zero = np.arange(2, dtype=np.int32), np.zeros(2, np.int32)
    table = [np.zeros((1, 1), np.int32)]
    backend.step(StepBatch(two, two, zero, table, np.array([2], np.int32), [None], two))  # two tokens of one sequence
    backend.step(StepBatch(two[:1], two[:1], zero[:1], table, np.array([1], np.int32), [None], zero[:1]), hidden=True)
    assert captured.replays == 0


@pytest.mark.gpu
@pytest.mark.parametrize("quantized", [False, True])
def test_cuda_graphs(tmp_path: Path, quantized: bool) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    model = load_model(tiny_folder(tmp_path, "gemma2", tie_word_embeddings=True))
    if quantized:
        quantize_model(model, model.config.parameters)
    model.cuda()
    lengths = [300, 9, 61]
    texts = [np.random.default_rng(row).integers(0, 97, length).astype(np.int32) for row, length in enumerate(lengths)]
    table = tables(lengths, seed=3)
    graphs, plain = TorchBackend(model), TorchBackend(model)
    assert graphs.decode is not None
    plain.decode = None
    for found, expected in zip(run(graphs, texts, table, [250, 1, 50]), run(plain, texts, table, [250, 1, 50]), strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * float(np.abs(expected).max()))
