"""States that are no keys and values: a recurrence in steps, batches and packed texts is the one over the whole text."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from llmkit.config import AttentionConfig, LayerConfig, MLPConfig, ModelConfig, State
from llmkit.engine.backend import StepBatch
from llmkit.errors import UsageError
from llmkit.model.attention import NoCache, PackedSequences
from llmkit.model.cache import CacheStorage, StepCaches

WIDTH = 3


class Summing(LayerConfig):
    """A layer that keeps the sum of what it has seen, and its last two inputs."""

    def state(self, config: ModelConfig) -> tuple[State, ...]:
        return State("recurrent", (WIDTH,)), State("conv", (2, WIDTH))


FULL, MLP = AttentionConfig(num_heads=1, num_kv_heads=1, head_dim=WIDTH), MLPConfig(intermediate_size=WIDTH)
LAYERS = LayerConfig(FULL, MLP), Summing(FULL, MLP), LayerConfig(replace(FULL, sliding_window=4), MLP)
CONFIG = ModelConfig("test", 8, WIDTH, 64, LAYERS)


def recurrence(inputs: Tensor, states: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """y[t] = x[0] + ... + x[t] + 10 x[t - 2]."""
    total, last = states
    seen = torch.cat((last, inputs), 1)
    sums = total.unsqueeze(1) + inputs.cumsum(1)
    return sums + 10 * seen[:, : inputs.shape[1]], (sums[:, -1], seen[:, -2:])


def whole(inputs: Tensor) -> Tensor:
    return recurrence(inputs, (torch.zeros(len(inputs), WIDTH), torch.zeros(len(inputs), 2, WIDTH)))[0]


def text(length: int, seed: int) -> Tensor:
    return torch.randint(-9, 10, (1, length, WIDTH), generator=torch.Generator().manual_seed(seed)).float()


def batch(parts: list[tuple[int, int, int, dict[int, int]]]) -> StepBatch:
    """parts: per sequence its first position, how many tokens, the slot it starts from, and index of a token -> slot that keeps it."""
    counts = [count for _, count, _, _ in parts]
    table = np.arange(len(parts) * 16, dtype=np.int32).reshape(len(parts), 16)
    return StepBatch(
        tokens=np.zeros(sum(counts), np.int32),
        positions=np.concatenate([np.arange(first, first + count) for first, count, _, _ in parts]).astype(np.int32),
        sequences=np.repeat(np.arange(len(parts)), counts).astype(np.int32),
        block_tables=[table, table],
        contexts=np.full(len(parts), 64, np.int32),
        adapters=[None] * len(parts),
        logits_indices=np.zeros(1, np.int32),
        state_in=np.array([read for _, _, read, _ in parts], np.int32),
        state_out=np.array([kept.get(i, -1) for _, count, _, kept in parts for i in range(count)], np.int32),
    )


def storage() -> CacheStorage:
    cache = CacheStorage(CONFIG, 4, torch.float32, torch.device("cpu"))
    cache.reserve_slots(16)
    for tensor in cache.states[1]:
        tensor.fill_(float("nan"))  # what nobody wrote
    return cache


def test_steps_of_several_sequences() -> None:
    cache, first, second = storage(), text(9, 1), text(7, 2)
    run = [
        # A chunk of each, states kept within it and at its end; then one token of each; then both, the second from a state kept early.
        ([(0, 5, -1, {2: 3, 4: 0}), (0, 3, -1, {0: 5, 2: 1})], torch.cat((first[:, :5], second[:, :3]), 1)),
        ([(5, 1, 0, {0: 2}), (3, 1, 1, {0: 4})], torch.cat((first[:, 5:6], second[:, 3:4]), 1)),
        ([(6, 3, 2, {2: 0}), (1, 6, 5, {5: 1})], torch.cat((first[:, 6:], second[:, 1:]), 1)),
        ([(3, 6, 3, {})], first[:, 3:]),
    ]
    found = [StepCaches(cache, batch(parts)).recur(1, inputs, recurrence) for parts, inputs in run]
    one, two = whole(first), whole(second)
    expected = [
        torch.cat((one[:, :5], two[:, :3]), 1),
        torch.cat((one[:, 5:6], two[:, 3:4]), 1),
        torch.cat((one[:, 6:], two[:, 1:]), 1),
        one[:, 3:],
    ]
    for got, wanted in zip(found, expected, strict=True):
        assert torch.equal(got, wanted)


def test_what_a_slot_takes() -> None:
    cache = storage()
    assert cache.state_bytes == 4 * (WIDTH + 2 * WIDTH)
    assert [cache.block_bytes(group) for group in range(2)] == [2 * 4 * 4 * WIDTH] * 2
    assert cache.group_of == [0, -1, 1]
    assert CacheStorage(replace(CONFIG, layers=LAYERS[:1]), 4, torch.float32, torch.device("cpu")).state_bytes == 0


def test_a_repeated_step_gives_the_same() -> None:
    cache, inputs = storage(), text(6, 3)
    StepCaches(cache, batch([(0, 4, -1, {3: 0})])).recur(1, inputs[:, :4], recurrence)
    for _ in range(2):
        found = StepCaches(cache, batch([(4, 2, 0, {1: 1})])).recur(1, inputs[:, 4:], recurrence)
        assert torch.equal(found, whole(inputs)[:, 4:])


def test_packed_texts_start_anew_and_go_on_from_their_parent() -> None:
    first, second = text(5, 4), text(4, 5)
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 5, 6]])
    packed = PackedSequences(torch.tensor([[0] * 5 + [1] * 4 + [2] * 2]), {2: 0})
    child = text(2, 6)
    caches = NoCache(CONFIG, positions, packed)
    found = caches.recur(1, torch.cat((first, second, child), 1), recurrence)
    expected = torch.cat((whole(first), whole(second), whole(torch.cat((first, child), 1))[:, 5:]), 1)
    assert torch.equal(found, expected)
    rows = torch.cat((first[:, :4], second), 0)
    plain = NoCache(CONFIG, torch.arange(4).expand(2, 4)).recur(1, rows, recurrence)
    assert torch.equal(plain, whole(rows))
    with pytest.raises(UsageError, match="positions jump"):
        NoCache(CONFIG, torch.tensor([[0, 2, 3]])).recur(1, text(3, 7), recurrence)
