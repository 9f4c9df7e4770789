"""One request's state, and how several of them become the arrays of one backend step."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmkit.config import ModelConfig
from llmkit.engine import sampling
from llmkit.engine.backend import StepBatch
from llmkit.engine.blocks import ABSENT, BlockTables, KVCache, blocks_for
from llmkit.engine.sampling import SamplingParams, TokenLogprobs
from llmkit.errors import LLMKitError

FinishReason = Literal["stop", "length", "abort", "error"]


class Event(NamedTuple):
    """One new token of a sequence, or its end without one (finish_reason "error": see `Sequence.error`)."""

    sequence: Sequence
    token: int | None  # a token that ends the reply (eos, stop_token_ids) is included
    logprobs: TokenLogprobs | None
    finish_reason: FinishReason | None  # None: more to come


@dataclass(slots=True, eq=False)
class Sequence:
    """One prompt and the reply to it: the state of one request, and of it alone."""

    ids: NDArray[np.int32]  # [prompt + max_tokens]; the first `length` are there, guesses (speculative.py) may stand behind them
    prompt_length: int
    params: SamplingParams
    seed: int  # params.seed or the fresh one drawn for it: with it the reply can be had again
    sample_index: int
    adapter: str | None
    context: int  # prompt + max_tokens
    end_ids: frozenset[int]  # tokens that end the reply
    blocks: BlockTables
    greedy: bool  # the token is the argmax of the raw logits
    added_at: float  # seconds, time.perf_counter
    length: int
    computed: int = 0  # tokens whose keys and values are in the cache
    cached_tokens: int = 0  # of the prompt, found in the cache
    drafted: int = 0  # tokens guessed, and how many of them were right: see speculative.py
    accepted: int = 0
    logprobs: list[TokenLogprobs] | None = None  # one per reply token where params.logprobs asks for them
    finish_reason: FinishReason | None = None
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
        """The token at `position`, given those before it in `ids`, from its logits `[vocab]`. Changes nothing.

        Raises LLMKitError where the logits are no numbers or no token is left.
        """
        if self.greedy:
            token = int(logits.argmax())
            sampling.check_finite(float(logits[token]), position)
            return token
        history = self.ids[:position]
        return sampling.sample(logits, self.params, history, self.prompt_length, self.seed, self.sample_index, self.end_ids)


class Work(NamedTuple):
    """What one sequence computes in one step: tokens [start, end), those from `sequence.length` being guesses."""

    sequence: Sequence
    start: int
    end: int


class Batch:
    """The arrays of a step. They are kept from step to step, and only what changed is written again.

    Args:
        cache: of the sequences.
        rewind: how many computed tokens a sequence may take back: as far behind, sliding windows keep their blocks.
    """

    def __init__(self, cache: KVCache, rewind: int = 0):
        self._cache = cache
        self._rewind = rewind
        self._members: list[Sequence] = []
        self._tables = [np.full((0, 0), ABSENT, dtype=np.int32) for _ in cache.windows]
        self._tokens = self._positions = self._sequences = np.empty(0, dtype=np.int32)
        self._contexts = np.empty(0, dtype=np.int32)
        self._adapters: list[str | None] = []
        self.asked: list[Work] = []  # those that reach their last token, whose rows are wanted; in the order of the rows

    def fill(self, work: list[Work]) -> StepBatch:
        """Take the blocks that the step needs and return its arrays.

        Results are wanted of the last token and of the guesses of each sequence in `asked`.

        The arrays are overwritten by the next call.
        """
        self._match_members([item.sequence for item in work])
        total = sum(item.end - item.start for item in work)
        if total > len(self._tokens):
            self._tokens, self._positions, self._sequences = (np.empty(2 * total, dtype=np.int32) for _ in range(3))
        size = longest = 0
        rows: list[int] = []
        self.asked = []
        for row, item in enumerate(work):
            sequence, start, end = item
            if self._cache.prepare(sequence.blocks, start - self._rewind, end):
                self._write_tables(row, sequence)
            stop = size + end - start
            self._tokens[size:stop] = sequence.ids[start:end]
            self._positions[size:stop] = start if end - start == 1 else np.arange(start, end)
            self._sequences[size:stop] = row
            size = stop
            longest = max(longest, end)
            if end >= sequence.length:
                rows.extend(range(size - (end - sequence.length) - 1, size))
                self.asked.append(item)
        width = blocks_for(longest, self._cache.block_size)
        return StepBatch(
            tokens=self._tokens[:size],
            positions=self._positions[:size],
            sequences=self._sequences[:size],
            block_tables=[np.ascontiguousarray(table[: len(work), :width]) for table in self._tables],
            contexts=self._contexts,
            adapters=self._adapters,
            logits_indices=np.array(rows, dtype=np.int32),
        )

    def _match_members(self, members: list[Sequence]) -> None:
        if members == self._members:
            return
        width = max(len(table) for sequence in members for table in sequence.blocks.tables)
        self._tables = [np.full((len(members), width), ABSENT, dtype=np.int32) for _ in self._tables]
        self._members = members
        self._contexts = np.array([sequence.context for sequence in members], dtype=np.int32)
        self._adapters = [sequence.adapter for sequence in members]
        for row, sequence in enumerate(members):
            self._write_tables(row, sequence)

    def _write_tables(self, row: int, sequence: Sequence) -> None:
        for table, own in zip(self._tables, sequence.blocks.tables, strict=True):
            table[row, : len(own)] = own


def cache_root(config: ModelConfig, adapter: str | None, context: int) -> bytes:
    """What the hashes of a request's blocks start from: requests with equal roots and equal tokens may share blocks.

    Rotary frequencies may depend on the length of the request: dynamic ones change with every length beyond the original
    context; longrope has one set up to it and one beyond.
    """
    key: list[object] = []
    for rope in {layer.rope for layer in config.layers if layer.rope is not None}:
        original = min(rope.original_max_position_embeddings or config.max_position_embeddings, config.max_position_embeddings)
        if rope.rope_type == "dynamic":
            key.append(max(context, original))
        elif rope.rope_type == "longrope":
            key.append(context > original)
    return blake2b(repr((adapter, tuple(key))).encode(), digest_size=16).digest()
