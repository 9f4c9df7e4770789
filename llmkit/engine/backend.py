"""The interface between the engine and whatever runs a model: the backend, the batch of one step, and the sequences it is made from."""

from __future__ import annotations

from collections import abc
from dataclasses import dataclass
from hashlib import blake2b
from typing import Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from llmkit.config import ModelConfig
from llmkit.engine import sampling
from llmkit.engine.cache import ABSENT, CacheManager, SequenceCache, blocks_for
from llmkit.engine.sampling import SamplingParams, TokenLogprobs
from llmkit.errors import LLMKitError

EndReason = Literal["stop", "length", "abort", "error"]  # of a sequence; `llm.outputs.FinishReason` is what a reader is told

Int32 = NDArray[np.int32]


@dataclass(frozen=True, slots=True, eq=False)
class StepBatch:
    """What one step computes: N tokens of S sequences, results for R of the tokens. All arrays are int32.

    Attributes:
        tokens: `[N]`; those of one sequence are consecutive and in order, and every sequence has at least one.
        positions: `[N]`, of each token in its sequence.
        sequences: `[N]`, the token's row in the block tables, `contexts`, `adapters` and `state_in`; ascending.
        block_tables: per cache group `[S, max_blocks]`. Entry j is the id of the block with positions
            j * block_size and following; -1 where a sliding window has left it behind or it is not yet taken.
        contexts: `[S]`, the length for which rotary frequencies are chosen (dynamic, longrope).
        adapters: S names, None for the base model.
        logits_indices: `[R]`, indices into the N tokens: those whose result is wanted.
        state_in: `[S]`, the slot with the state that the sequence has before its first token of this step, -1: all zeros.
            None where no layer keeps a state besides keys and values.
        state_out: `[N]`, the slot that receives the sequence's state after that token, -1: it is not kept. No slot is both read
            and written in a step, so that a step can be repeated.
    """

    tokens: Int32
    positions: Int32
    sequences: Int32
    block_tables: abc.Sequence[Int32]
    contexts: Int32
    adapters: abc.Sequence[str | None]
    logits_indices: Int32
    state_in: Int32 | None = None
    state_out: Int32 | None = None


class Backend(Protocol):
    """What runs a model: token ids in, float32 logits out. All arrays are numpy.

    Attributes:
        config: what the model is.
        block_size: tokens per block of the KV cache.
        threads: of the CPU that it uses.
        path: what computes, in words: kernels, device, threads, bits of the cache.
        cache_windows: `config.cache_windows`; each is one group of KV blocks, shared by all layers with that sliding window.
        state_bytes: of one state slot, over all layers; 0 where no layer keeps a state besides keys and values.
    """

    @property
    def config(self) -> ModelConfig: ...

    @property
    def block_size(self) -> int: ...

    @property
    def threads(self) -> int: ...

    @property
    def path(self) -> str: ...

    @property
    def cache_windows(self) -> tuple[int | None, ...]: ...

    @property
    def state_bytes(self) -> int: ...

    def block_bytes(self, group: int) -> int:
        """Return the bytes of one KV block of that group, over all its layers."""
        ...

    def step(self, batch: StepBatch, hidden: bool = False) -> NDArray[np.float32]:
        """Write keys and values of the batch's tokens into their blocks and attend to what is there.

        Running a step again with the same batch writes the same values: the engine may repeat one that was interrupted.

        Args:
            batch: the tokens, where their keys and values go, and whose results are wanted.
            hidden: final normed hidden states instead of logits.

        Returns:
            float32 `[R, vocab]`, or `[R, hidden_size]` if `hidden`. The engine reads it before the next step and keeps nothing.
        """
        ...


@dataclass(slots=True, eq=False)
class Sequence:
    """One prompt and the reply to it: everything about one request, and about it alone."""

    ids: NDArray[np.int32]  # [prompt + max_tokens]; the first `length` are there, draft tokens (speculative.py) may stand behind them
    prompt_length: int
    params: SamplingParams
    seed: int  # params.seed or the fresh one drawn for it: with it the reply can be had again
    sample_index: int
    adapter: str | None
    context: int  # prompt + max_tokens
    end_ids: frozenset[int]  # tokens that end the reply
    cache: SequenceCache
    greedy: bool  # the token is the argmax of the raw logits
    added_at: float  # seconds, time.perf_counter
    length: int
    computed: int = 0  # tokens whose keys and values are in the cache
    cached_tokens: int = 0  # of the prompt, found in the cache
    drafted: int = 0  # draft tokens, and how many of them were accepted: see speculative.py
    accepted: int = 0
    logprobs: list[TokenLogprobs] | None = None  # one per reply token where params.logprobs asks for them
    finish_reason: EndReason | None = None
    error: LLMKitError | None = None
    started_at: float | None = None  # when it left the queue
    first_token_at: float | None = None
    finished_at: float | None = None

    @property
    def prompt_ids(self) -> NDArray[np.int32]:
        return self.ids[: self.prompt_length]

    @property
    def token_ids(self) -> NDArray[np.int32]:
        """The reply so far."""
        return self.ids[self.prompt_length : self.length]

    @property
    def num_generated(self) -> int:
        return self.length - self.prompt_length

    @property
    def time_to_first_token(self) -> float | None:
        """Seconds from `add`, waiting included; None before there is one."""
        return None if self.first_token_at is None else self.first_token_at - self.added_at

    @property
    def decode_seconds(self) -> float | None:
        """Seconds from the first token to the end, in which num_generated - 1 tokens were made; None before the end."""
        return None if self.first_token_at is None or self.finished_at is None else self.finished_at - self.first_token_at

    def draw(self, logits: NDArray[np.float32], position: int) -> int:
        """Return the token at `position`, given those before it in `ids`, from its logits `[vocab]`. Changes nothing.

        Raises LLMKitError where the logits are no numbers or no token is left.
        """
        if self.greedy:
            token = int(logits.argmax())
            sampling.check_finite(float(logits[token]), position)
            return token
        history = self.ids[:position]
        return sampling.sample(logits, self.params, history, self.prompt_length, self.seed, self.sample_index, self.end_ids)


class Work(NamedTuple):
    """What one sequence computes in one step: tokens [start, end), those from `sequence.length` on being draft tokens."""

    sequence: Sequence
    start: int
    end: int


class BatchBuilder:
    """Makes the `StepBatch` of a step. Its arrays are kept from step to step, and only what changed is written again.

    Args:
        cache: of the sequences.
        rewind: how many computed tokens a sequence may take back: so far behind its start, sliding windows keep their blocks.
    """

    def __init__(self, cache: CacheManager, rewind: int = 0):
        self._cache = cache
        self._rewind = rewind
        self._members: list[Sequence] = []
        self._tables = [np.full((0, 0), ABSENT, dtype=np.int32) for _ in cache.windows]
        self._tokens = self._positions = self._sequences = np.empty(0, dtype=np.int32)
        self._contexts = np.empty(0, dtype=np.int32)
        self._adapters: list[str | None] = []
        self.asked: list[Work] = []  # those that reach their last token, in the order of their results

    def fill(self, work: list[Work]) -> StepBatch:
        """Take the blocks that the step needs and return its arrays.

        Results are wanted of the last token and of the draft tokens of each sequence in `asked`. The arrays are overwritten by the
        next call.
        """
        self._match_members([item.sequence for item in work])
        total = sum(item.end - item.start for item in work)
        if total > len(self._tokens):
            # Twice what is needed: a step that grows by a token must not allocate each time.
            self._tokens, self._positions, self._sequences = (np.empty(2 * total, dtype=np.int32) for _ in range(3))
        size = longest = 0
        wanted: list[int] = []
        self.asked = []
        for row, item in enumerate(work):
            sequence, start, end = item
            if self._cache.prepare(sequence.cache, start - self._rewind, end):
                self._write_tables(row, sequence)
            stop = size + end - start
            self._tokens[size:stop] = sequence.ids[start:end]
            self._positions[size:stop] = start if end - start == 1 else np.arange(start, end)
            self._sequences[size:stop] = row
            size = stop
            longest = max(longest, end)
            if end >= sequence.length:
                wanted.extend(range(size - (end - sequence.length) - 1, size))
                self.asked.append(item)
        # Cut to the blocks in use, or a request with a long reply ahead of it would send its whole table in every step.
        width = blocks_for(longest, self._cache.block_size)
        state_in, state_out = self._states(work, size)
        return StepBatch(
            tokens=self._tokens[:size],
            positions=self._positions[:size],
            sequences=self._sequences[:size],
            block_tables=[np.ascontiguousarray(table[: len(work), :width]) for table in self._tables],
            contexts=self._contexts,
            adapters=self._adapters,
            logits_indices=np.array(wanted, dtype=np.int32),
            state_in=state_in,
            state_out=state_out,
        )

    def _states(self, work: list[Work], size: int) -> tuple[Int32 | None, Int32 | None]:
        """Take the slots that the step needs and return its `state_in` and `state_out`; None for models without recurrent states."""
        if self._cache.states is None:
            return None, None
        self._cache.prepare_states([(item.sequence.cache, item.start, item.end, item.sequence.length) for item in work])
        state_out = np.full(size, ABSENT, dtype=np.int32)
        offset = 0  # of the sequence's tokens in the batch
        for item in work:
            for tokens, slot in item.sequence.cache.written.items():
                state_out[offset + tokens - item.start - 1] = slot
            offset += item.end - item.start
        return np.array([item.sequence.cache.state for item in work], dtype=np.int32), state_out

    def _match_members(self, members: list[Sequence]) -> None:
        if members == self._members:  # the usual case: the same sequences decode step after step
            return
        width = max((len(table) for sequence in members for table in sequence.cache.tables), default=0)
        self._tables = [np.full((len(members), width), ABSENT, dtype=np.int32) for _ in self._tables]
        self._members = members
        self._contexts = np.array([sequence.context for sequence in members], dtype=np.int32)
        self._adapters = [sequence.adapter for sequence in members]
        for row, sequence in enumerate(members):
            self._write_tables(row, sequence)

    def _write_tables(self, row: int, sequence: Sequence) -> None:
        for table, own in zip(self._tables, sequence.cache.tables, strict=True):
            table[row, : len(own)] = own


def prefix_root(config: ModelConfig, adapter: str | None, context: int) -> bytes:
    """Return what the hashes of a request's blocks start from: requests with equal roots and equal tokens may share blocks.

    Rotary frequencies may depend on the length of the request: dynamic ones change with every length beyond the original
    context; longrope has one set up to it and one beyond.
    """
    key: list[object] = []
    for rope in {rope for rope, _ in config.rotaries}:
        original = min(rope.original_max_position_embeddings or config.max_position_embeddings, config.max_position_embeddings)
        if rope.rope_type == "dynamic":
            key.append(max(context, original))
        elif rope.rope_type == "longrope":
            key.append(context > original)
    return blake2b(repr((adapter, tuple(key))).encode(), digest_size=16).digest()
