"""A tiny attention model in numpy behind the engine's Backend, and the same model without any cache as the oracle.

Keys and values really live in blocks found through the tables: a wrong table, position, prefix hit or a block let go too
early changes the logits, reads NaN, or fails an assertion. A stateful one also keeps a number that runs along with every
sequence, in slots: a wrong slot fails an assertion or changes the logits. Arithmetic is float64, one token at a time, so that a token's
logits are the same bits in any batch.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from llmkit.config import AttentionConfig, LayerConfig, MLPConfig, ModelConfig, RopeConfig
from llmkit.engine.backend import StepBatch
from llmkit.engine.sampling import SamplingParams, sample

DIM = 8


def tiny_config(
    windows: tuple[int | None, ...] = (None,), *, vocab: int = 23, max_positions: int = 96, rope_type: str = "default"
) -> ModelConfig:
    rope = RopeConfig(rope_type=rope_type, original_max_position_embeddings=24)
    mixers = [AttentionConfig(num_heads=1, num_kv_heads=1, head_dim=DIM, rope=rope, sliding_window=window) for window in windows]
    layers = tuple(LayerConfig(mixer, MLPConfig(intermediate_size=DIM)) for mixer in mixers)
    return ModelConfig("fake", vocab, DIM, max_positions, layers)


class FakeBackend:
    def __init__(self, config: ModelConfig, block_size: int = 4, noise: float = 0.0, *, stateful: bool = False) -> None:
        """noise: how far the weights are from those of the model without, for drafts that are sometimes right."""
        self.config = config
        self.block_size = block_size
        self.cache_windows = config.cache_windows
        random = np.random.default_rng(7)
        self.embedding = random.normal(size=(config.vocab_size, DIM))
        self.place = random.normal(size=(config.max_position_embeddings, DIM))
        self.weights = random.normal(size=(len(self.cache_windows), 3, DIM, DIM)) / DIM**0.5
        self.head = random.normal(size=(DIM, config.vocab_size))
        self.head += noise * random.normal(size=self.head.shape)
        self.storage = [np.full((0, block_size, 2, DIM), np.nan) for _ in self.cache_windows]
        self.state_bytes = 64 if stateful else 0
        self.slots: dict[int, tuple[int, int]] = {}  # slot -> the state in it, and after how many tokens
        self.computed = 0  # tokens that went through `step`
        self.steps = 0
        self.fail_at: int | None = None  # number of the step that is broken off half-way
        self.poisoned: set[int] = set()  # a last token that makes the logits NaN
        self.tables: list[NDArray[np.int32]] = []  # of the last step

    def block_bytes(self, group: int) -> int:
        return self.block_size * 2 * DIM * 8

    def embed(self, token: int, position: int, context: int, adapter: str | None) -> NDArray[np.float64]:
        shift = 0.0 if adapter is None else 0.1 * sum(adapter.encode())
        stretch = 1.0
        for rope, _ in self.config.rotaries:
            if rope.rope_type == "dynamic":
                stretch = max(context, 24) / 24
            elif rope.rope_type == "longrope":
                stretch = 1.0 if context <= 24 else 4.0
        return self.embedding[token] + self.place[position] * stretch + shift

    @staticmethod
    def next_state(state: int, token: int) -> int:
        """The order of the tokens counts, and every one before."""
        return (5 * state + 3 * token + 1) % 1009

    def mix(self, x: NDArray[np.float64], state: int) -> NDArray[np.float64]:
        return x + self.embedding[state % len(self.embedding)] if self.state_bytes else x

    def attend(self, x: NDArray[np.float64], group: int, past: NDArray[np.float64]) -> NDArray[np.float64]:
        """past: `[keys, 2, DIM]`, the token's own included."""
        scores = past[:, 0] @ (self.weights[group, 0] @ x)
        weights = np.exp(scores - scores.max())
        return np.tanh(x + weights @ past[:, 1] / weights.sum())

    def key_value(self, x: NDArray[np.float64], group: int) -> NDArray[np.float64]:
        return np.stack([self.weights[group, 1] @ x, self.weights[group, 2] @ x])

    def step(self, batch: StepBatch, hidden: bool = False) -> NDArray[np.float32]:
        self._check(batch)
        tokens, positions, sequences, block_tables = batch.tokens, batch.positions, batch.sequences, batch.block_tables
        contexts, adapters, rows = batch.contexts, batch.adapters, batch.logits_indices
        self.tables = [table.copy() for table in block_tables]
        self.steps += 1
        self.computed += len(tokens)
        outputs = []
        state = 0
        for n, (token, position, row) in enumerate(zip(tokens, positions, sequences, strict=True)):
            if self.steps == self.fail_at and n == len(tokens) // 2:
                raise KeyboardInterrupt
            if self.state_bytes:
                if n == 0 or sequences[n - 1] != row:
                    state = self._read(batch, int(row), int(position))
                state = self.next_state(state, int(token))
                if batch.state_out is not None and batch.state_out[n] >= 0:
                    self.slots[int(batch.state_out[n])] = state, int(position) + 1
            x = self.mix(self.embed(token, position, contexts[row], adapters[row]), state)
            for group, window in enumerate(self.cache_windows):
                table = block_tables[group][row]
                self._store(group, table[position // self.block_size], position % self.block_size, self.key_value(x, group))
                visible = np.arange(0 if window is None else max(0, position - window + 1), position + 1)
                blocks = table[visible // self.block_size]
                assert (blocks >= 0).all(), f"position {position} sees a block that is not there: {table}"
                past = self.storage[group][blocks, visible % self.block_size]
                assert not np.isnan(past).any(), f"position {position} reads keys that were never written"
                x = self.attend(x, group, past)
            outputs.append(np.full(DIM, np.nan) if int(token) in self.poisoned else x)
        return np.array([outputs[n] @ self.head for n in rows], dtype=np.float32).reshape(len(rows), self.config.vocab_size)

    def _read(self, batch: StepBatch, row: int, position: int) -> int:
        assert batch.state_in is not None
        slot = int(batch.state_in[row])
        state, tokens = (0, 0) if slot < 0 else self.slots[slot]
        assert tokens == position, f"the state in slot {slot} is that after {tokens} tokens, not {position}"
        return state

    def _store(self, group: int, block: int, offset: int, key_value: NDArray[np.float64]) -> None:
        if block >= len(self.storage[group]):
            more = np.full((block + 1 - len(self.storage[group]), self.block_size, 2, DIM), np.nan)
            self.storage[group] = np.concatenate([self.storage[group], more])
        self.storage[group][block, offset] = key_value

    def _check(self, batch: StepBatch) -> None:
        """The contract of `Backend.step`."""
        tokens, positions, sequences, block_tables = batch.tokens, batch.positions, batch.sequences, batch.block_tables
        contexts, adapters, rows = batch.contexts, batch.adapters, batch.logits_indices
        count = len(contexts)
        assert all(array.dtype == np.int32 and array.flags.c_contiguous for array in (tokens, positions, sequences, contexts, rows))
        assert all(table.dtype == np.int32 and table.flags.c_contiguous and len(table) == count for table in block_tables)
        assert len(block_tables) == len(self.cache_windows)
        assert len(tokens) == len(positions) == len(sequences) > 0
        assert len(adapters) == count
        assert sorted(set(sequences.tolist())) == list(range(count))
        assert (np.diff(sequences) >= 0).all()
        same = np.diff(sequences) == 0
        assert (np.diff(positions)[same] == 1).all()
        assert all(0 <= row < len(tokens) for row in rows)
        if not self.state_bytes:
            assert batch.state_in is batch.state_out is None
            return
        assert batch.state_in is not None
        assert batch.state_out is not None
        assert batch.state_in.dtype == batch.state_out.dtype == np.int32
        assert len(batch.state_in) == count
        assert len(batch.state_out) == len(tokens)
        written = batch.state_out[batch.state_out >= 0].tolist()
        assert len(set(written)) == len(written)
        assert not set(written) & set(batch.state_in.tolist()), "a slot is read and written in one step"

    def reply(
        self,
        prompt: list[int],
        params: SamplingParams,
        *,
        seed: int,
        sample_index: int = 0,
        adapter: str | None = None,
        eos: tuple[int, ...] = (),
    ) -> list[int]:
        """The oracle: the reply to one prompt, alone; no blocks, no batch, every key is kept."""
        ids = list(prompt)
        ends = {*params.stop_token_ids, *(() if params.ignore_eos else eos)}
        total = self.config.max_position_embeddings if params.max_tokens is None else len(prompt) + params.max_tokens
        past = [np.empty((total, 2, DIM)) for _ in self.cache_windows]
        position = state = 0
        while True:
            for token in ids[position:]:
                state = self.next_state(state, token)
                x = self.mix(self.embed(token, position, total, adapter), state)
                for group, window in enumerate(self.cache_windows):
                    past[group][position] = self.key_value(x, group)
                    x = self.attend(x, group, past[group][max(0, position + 1 - (window or total)) : position + 1])
                position += 1
            row = (x @ self.head).astype(np.float32)
            ids.append(sample(row, params, np.array(ids, dtype=np.int32), len(prompt), seed, sample_index, ends))
            if ids[-1] in ends or len(ids) == total:
                return ids[len(prompt) :]
