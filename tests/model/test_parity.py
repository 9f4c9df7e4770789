"""The transformer against transformers, in float32: logits, cached and uncached, packed rows, greedy text and gradients.

The models are tiny and random (`tests/families/tiny.py`); they are saved by transformers and loaded by llmkit, so that
config, family rules, loader and model are all under test.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from llmkit.checkpoint.load import load_model
from llmkit.engine.backend import StepBatch
from llmkit.engine.engine import Engine
from llmkit.engine.sampling import SamplingParams
from llmkit.model.attention import PackedSequences
from llmkit.model.backend import TorchBackend
from llmkit.model.transformer import Transformer
from tests.families.tiny import ORIGINAL, VARIANTS, WINDOW, hf_config, hf_model, raw_config, save

TOLERANCE = 1e-4  # of the largest logit
WINDOWED = [name for name in VARIANTS if hf_config(name).to_dict().get("sliding_window")]
VOCAB = 97
# The dearer tests run for the first variant of each family, and for all of them when asked with -m slow.
FIRST = {cls: name for name, (cls, _) in reversed(VARIANTS.items())}.values()
FIRST_OF_EACH = pytest.mark.parametrize(
    "pair", [pytest.param(name, marks=() if name in FIRST else pytest.mark.slow) for name in VARIANTS], indirect=True
)


@dataclass(frozen=True)
class Pair:
    """One model twice: theirs and ours."""

    theirs: PreTrainedModel
    ours: Transformer

    def expected(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        """Their logits."""
        if "dynamic" in str(self.theirs.config.to_dict().get("rope_parameters")):
            self.theirs(tokens[:, :1])  # the frequencies of an earlier, longer text stay until a short one comes
        return self.theirs(tokens, position_ids=positions).logits

    @property
    def longest(self) -> int:
        """Positions the model has: RoPE goes on for ever, learned ones end."""
        return self.ours.config.max_position_embeddings if self.ours.config.learned_positions else 1 << 20


def make_pair(folder: Path, variant: str, seed: int = 0, **changes: object) -> Pair:
    theirs = hf_model(hf_config(variant, **changes), seed)
    return Pair(theirs, load_model(save(theirs, folder)))


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(autouse=True)
def _no_grad(request: pytest.FixtureRequest) -> Iterator[None]:
    with torch.set_grad_enabled("gradient" in request.node.name):
        yield


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference relative to the largest logit."""
    return float((ours - theirs).abs().max() / theirs.abs().max())


def random_tokens(rows: int, length: int, seed: int = 0, vocab: int = VOCAB) -> Tensor:
    return torch.randint(vocab, (rows, length), generator=torch.Generator().manual_seed(seed))


def cached_logits(model: Transformer, tokens: list[int], chunks: list[int]) -> Tensor:
    """Logits of one sequence, fed through the paged cache in chunks of these lengths."""
    backend = TorchBackend(model)
    blocks = -(-len(tokens) // backend.block_size)
    tables = [np.arange(blocks, dtype=np.int32)[None]] * len(backend.cache_windows)
    contexts = np.array([len(tokens)], dtype=np.int32)
    out, start = [], 0
    for size in chunks:
        positions = np.arange(start, start + size, dtype=np.int32)
        sequence, rows = np.zeros(size, dtype=np.int32), np.arange(size, dtype=np.int32)
        ids = np.array(tokens[start : start + size], dtype=np.int32)
        out.append(torch.from_numpy(backend.step(StepBatch(ids, positions, sequence, tables, contexts, [None], rows))))
        start += size
    assert start == len(tokens)
    return torch.cat(out)


@pytest.mark.parametrize("offset", [0, 3 * ORIGINAL, 5000])
def test_logits_at_short_and_long_positions(pair: Pair, offset: int) -> None:
    length = 40
    if offset + length > pair.longest:
        offset = pair.longest - length
    tokens = random_tokens(2, length)
    positions = torch.arange(offset, offset + length).expand(2, -1)
    theirs = pair.expected(tokens, positions)
    assert difference(pair.ours(tokens, positions), theirs) < TOLERANCE


@pytest.mark.parametrize("length", [ORIGINAL, ORIGINAL + 1])
def test_whole_sequence_around_the_original_context(pair: Pair, length: int) -> None:
    tokens = random_tokens(1, length, seed=length)
    assert difference(pair.ours(tokens), pair.expected(tokens)) < TOLERANCE


@pytest.mark.parametrize("variant", WINDOWED)
def test_window_edges(variant: str, tmp_path: Path) -> None:
    pair = make_pair(tmp_path, variant)
    assert WINDOW in pair.ours.config.cache_windows
    for length in (1, WINDOW - 1, WINDOW, WINDOW + 1, 3 * WINDOW):
        tokens = random_tokens(2, length, seed=length)
        theirs = pair.expected(tokens)
        assert difference(pair.ours(tokens), theirs) < TOLERANCE, length
        assert difference(cached_logits(pair.ours, tokens[0].tolist(), [1] * length), theirs[0]) < TOLERANCE, length


@FIRST_OF_EACH
@pytest.mark.parametrize("length", [ORIGINAL + 5, pytest.param(2 * ORIGINAL, marks=pytest.mark.slow)])
def test_cached_logits_token_by_token_and_in_chunks(pair: Pair, length: int) -> None:
    tokens = random_tokens(1, length, seed=length)
    theirs = pair.expected(tokens)[0]
    whole, half = [length], length // 2 + 4
    for chunks in (whole, [half, *[1] * (length - half)], [3, WINDOW, 1, length - 4 - WINDOW]):
        assert difference(cached_logits(pair.ours, tokens[0].tolist(), chunks), theirs) < TOLERANCE, chunks


def test_packed_documents_equal_documents_alone(pair: Pair) -> None:
    sizes = [5, WINDOW + 6, 1, 14]
    tokens = random_tokens(1, sum(sizes))
    positions = torch.cat([torch.arange(size) for size in sizes])[None]
    ids = torch.cat([torch.full((size,), i) for i, size in enumerate(sizes)])[None]
    packed = pair.ours(tokens, positions, packed=PackedSequences(ids))
    for document, logits in zip(tokens.split(sizes, 1), packed.split(sizes, 1), strict=True):
        assert difference(logits, pair.expected(document)) < TOLERANCE


def test_some_rows_and_hidden_states(pair: Pair) -> None:
    tokens = random_tokens(2, 9)
    indices = torch.tensor([17, 3])
    theirs = pair.theirs(tokens, output_hidden_states=True)
    assert difference(pair.ours(tokens, logits_indices=indices), theirs.logits.flatten(0, 1)[indices]) < TOLERANCE
    assert difference(pair.ours(tokens, hidden=True), theirs.hidden_states[-1]) < TOLERANCE


def greedy(model: Transformer, prompt: list[int], count: int) -> list[int]:
    """Greedy continuation by the engine, with the cache and chunked prefill."""
    engine = Engine(TorchBackend(model), max_cache_tokens=1024, prefill_chunk=32)
    sequence = engine.add(prompt, SamplingParams(temperature=0, max_tokens=count))
    while sequence.finish_reason is None:
        engine.step()
    return [int(token) for token in sequence.token_ids]


@FIRST_OF_EACH
def test_64_greedy_tokens_equal_transformers(pair: Pair) -> None:
    prompt = random_tokens(1, ORIGINAL + 3)
    ours = greedy(pair.ours, prompt[0].tolist(), 64)
    if any(rope.rope_type == "dynamic" for rope, _ in pair.ours.config.rotaries):
        # generate would choose new frequencies at every token; with the set of the whole request, their forward agrees.
        tokens = torch.cat((prompt, torch.tensor([ours])), 1)
        theirs = pair.expected(tokens)[0].argmax(-1)[prompt.shape[1] - 1 : -1].tolist()
    else:
        theirs = pair.theirs.generate(prompt, max_new_tokens=64, do_sample=False)[0, prompt.shape[1] :].tolist()
    assert ours == theirs


@pytest.mark.parametrize("variant", ["llama-dynamic", "phi3-longrope"])
def test_greedy_within_the_original_context(variant: str, tmp_path: Path) -> None:
    """Dynamic and longrope with the short set throughout: generate itself agrees."""
    changes = {"original_max_position_embeddings": 128} if variant == "phi3-longrope" else {"max_position_embeddings": 128}
    pair = make_pair(tmp_path, variant, **changes)
    prompt = random_tokens(1, 20)
    theirs = pair.theirs.generate(prompt, max_new_tokens=64, do_sample=False)[0, 20:].tolist()
    assert greedy(pair.ours, prompt[0].tolist(), 64) == theirs


@pytest.mark.parametrize("variant", ["llama-biases-tied", "qwen3-moe", "gemma2", "gpt2", "olmo2", "granite"])
def test_gradients(variant: str, tmp_path: Path) -> None:
    pair = make_pair(tmp_path / "weights", variant)
    tokens = random_tokens(2, 25)
    losses = []
    for model, logits in ((pair.theirs, pair.expected(tokens)), (pair.ours, pair.ours(tokens))):
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        losses.append(float(loss.detach()))
        assert all(parameter.grad is not None for parameter in model.parameters()) or variant == "qwen3-moe"
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    # Their gradients take the way of weights: saved under their names, loaded under ours.
    with torch.no_grad():
        for parameter in pair.theirs.parameters():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    expected = dict(load_model(save(pair.theirs, tmp_path / "gradients")).named_parameters())
    largest = max(float(gradient.detach().abs().max()) for gradient in expected.values())
    for name, parameter in pair.ours.named_parameters():
        ours = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad  # an expert that no token chose
        assert (ours - expected[name]).abs().max() < TOLERANCE * largest, name


@pytest.mark.slow
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_sizes_and_seeds(data: st.DataObject) -> None:
    variant = data.draw(st.sampled_from(sorted(VARIANTS)))
    kv_heads, groups, half = (data.draw(st.integers(1, 4)) for _ in range(3))
    heads, layers, seed = kv_heads * groups, data.draw(st.integers(1, 6)), data.draw(st.integers(0, 1 << 20))
    changes: dict[str, object] = {"vocab_size": data.draw(st.integers(2, 200))}
    if variant.startswith("gpt2"):
        changes |= {"n_head": heads, "n_embd": heads * half, "n_layer": layers}
    else:
        # Two dimensions leave a dynamic or yarn RoPE nothing to stretch; longrope has a factor for each pair of its eight.
        head_dim = 8 if variant == "phi3-longrope" else 10 if variant == "phi3-partial-odd" else 2 * half + 2
        changes |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "hidden_size": heads * head_dim}
        changes |= {"num_hidden_layers": layers, "intermediate_size": data.draw(st.integers(1, 70))}
        changes |= {"head_dim": head_dim} if "head_dim" in raw_config(hf_config(variant)) else {}
        for name in ("layer_types", "no_rope_layers"):
            if name in VARIANTS[variant][1]:
                changes[name] = (VARIANTS[variant][1][name] * 2)[:layers]
        if variant in WINDOWED:
            changes["sliding_window"] = data.draw(st.integers(1, 30))
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        pair = make_pair(Path(folder), variant, seed, **changes)
        tokens = random_tokens(2, data.draw(st.integers(2, 100)), seed, vocab=int(str(changes["vocab_size"])))
        theirs = pair.expected(tokens)
        assert difference(pair.ours(tokens), theirs) < TOLERANCE
        ids = tokens[0].tolist()
        assert difference(cached_logits(pair.ours, ids, [len(ids) // 2, len(ids) - len(ids) // 2]), theirs[0]) < TOLERANCE
