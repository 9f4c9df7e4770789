"""Continuous batching: many requests, one backend step after another (Orca, OSDI 2022).

`Engine.step()` is schedule, run, sample: every running sequence gets the tokens it needs computed, one for a reply under way, a
chunk for a prompt still to be read (chunked prefill, arXiv:2308.16369); the backend computes them together; each sequence that
reached its last token gets one more. A sequence does not know the others, and its tokens do not depend on them.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from llmkit.engine import sampling
from llmkit.engine.backend import Backend, BatchBuilder, EndReason, Sequence, Work, prefix_root
from llmkit.engine.cache import STATE_INTERVAL, CacheManager, blocks_for, pool_sizes, state_slots
from llmkit.engine.sampling import SamplingParams, TokenLogprobs
from llmkit.engine.speculative import MAX_DRAFT_TOKENS, Speculation
from llmkit.errors import ContextOverflow, LLMKitError, UsageError

PromptIds = Iterable[int] | NDArray[np.integer]
Drawn = tuple[int, TokenLogprobs | None]  # a token, and its log probabilities where the request asks for them


class Scheduler:
    """Decides which sequences run, in the order they came: one that does not fit now waits, and those behind it wait too."""

    def __init__(self, cache: CacheManager, prefill_chunk: int):
        self.cache = cache
        self.prefill_chunk = prefill_chunk
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        # Nothing fits until a sequence ends: without this the head of the queue would be matched against the cache in every step.
        self._no_room = False

    def plan(self) -> list[Work]:
        """Return the next step: one token for every reply under way, and prompt tokens up to `prefill_chunk` in all."""
        budget = self.prefill_chunk
        work = []
        for sequence in self.running:
            start, end = sequence.computed, sequence.length
            if end - start > 1:  # a prompt still to be read; a reply under way lacks its last token alone, and never waits
                end = min(end, start + budget)
                budget -= end - start
            if end > start:
                work.append(Work(sequence, start, end))
        while self.waiting and budget > 0 and self._start(self.waiting[0]):
            sequence = self.waiting.popleft()
            self.running.append(sequence)
            start = sequence.computed
            end = min(sequence.length, start + budget)
            budget -= end - start
            work.append(Work(sequence, start, end))
        return work

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out of the queue or the batch and free its blocks."""
        if sequence.started_at is None:
            self.waiting.remove(sequence)
        else:
            self.running.remove(sequence)
            self.cache.close(sequence.cache)
        self._no_room = False

    def _start(self, sequence: Sequence) -> bool:
        if self._no_room:
            return False
        found = self.cache.match(sequence.cache)
        # Samples of one prompt and questions to one document come together: the first computes what the others then find.
        if any(self.cache.coming(sequence.cache, found, other.cache) for other in self.running):
            return False
        if not self.cache.admit(sequence.cache, found):
            self._no_room = True
            return False
        sequence.computed = sequence.cached_tokens = found * self.cache.block_size
        sequence.started_at = time.perf_counter()
        return True


class _LostLock:
    """In the place of a lock that another thread held when this process was forked off: a fork takes no other thread along."""

    def __enter__(self) -> None:
        raise LLMKitError("The process was forked while this model computed. Load it again in the new process.")

    def __exit__(self, *_: object) -> None: ...


class Engine:
    """Runs requests on a backend: `add` them, `step` until each has a `finish_reason`, read the tokens off the sequences.

    Several threads may add, step and abort; each step serves all of them. Who reads a sequence while another thread may step holds `lock`.

    Args:
        backend: what computes; see Backend.
        max_cache_tokens: size of the KV cache in tokens; defaults to one whole context of the model.
        cache_bytes: size of the KV cache in bytes, instead of in tokens.
        prefill_chunk: most prompt tokens in one step.
        speculation: drafts tokens that a step then checks; the replies stay the same.
        state_interval: tokens of a prompt from one kept state to the next, for models with recurrent states.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        max_cache_tokens: int | None = None,
        cache_bytes: int | None = None,
        prefill_chunk: int = 512,
        speculation: Speculation | None = None,
        state_interval: int = STATE_INTERVAL,
    ):
        if max_cache_tokens is not None and cache_bytes is not None:
            raise UsageError(f"Both max_cache_tokens ({max_cache_tokens}) and cache_bytes ({cache_bytes}) limit the KV cache; give one.")
        if prefill_chunk < 1:
            raise UsageError(f"prefill_chunk is {prefill_chunk}; it must be at least 1.")
        longest_step = prefill_chunk if speculation is None else max(prefill_chunk, MAX_DRAFT_TOKENS + 1)
        if cache_bytes is not None:
            max_cache_tokens = tokens_within(backend, cache_bytes, longest_step, state_interval)
        elif max_cache_tokens is None:
            max_cache_tokens = blocks_for(backend.config.max_position_embeddings, backend.block_size) * backend.block_size
        if max_cache_tokens < backend.block_size:
            raise UsageError(
                f"The KV cache limit is {max_cache_tokens} tokens, less than one block of {backend.block_size}; raise the limit."
            )
        self.backend = backend
        self.cache = CacheManager(
            backend.cache_windows,
            backend.block_size,
            max_cache_tokens,
            longest_step,
            state_slots=state_slots(max_cache_tokens, state_interval) if backend.state_bytes else 0,
            state_interval=state_interval,
        )
        self.scheduler = Scheduler(self.cache, prefill_chunk)
        self.speculation = speculation
        self._batch = BatchBuilder(self.cache)
        self._lock = threading.RLock()
        self._lost = False  # the lock: another thread of the parent held it at a fork
        self._process = os.getpid()

    @property
    def lock(self) -> AbstractContextManager[bool | None]:
        """The lock of whoever changes the engine, or reads a sequence that another thread may change.

        In a process forked off while another thread held it, entering it is an LLMKitError and not a wait for ever.
        """
        if self._process != os.getpid() and not self._lost:
            # The first use after a fork. Half a second: another thread of this process may be checking, too, at this very moment.
            if self._lock.acquire(timeout=0.5):
                self._process = os.getpid()
                self._lock.release()
            elif self._process != os.getpid():
                self._lost = True
        return _LostLock() if self._lost else self._lock

    @property
    def busy(self) -> bool:
        """Whether a sequence is running or waiting."""
        return bool(self.scheduler.running or self.scheduler.waiting)

    def add(
        self,
        prompt_ids: PromptIds,
        params: SamplingParams,
        adapter: str | None = None,
        *,
        eos_ids: Iterable[int] = (),
        sample: int = 0,
    ) -> Sequence:
        """Queue one sample of the reply to a prompt.

        Args:
            prompt_ids: at least one token id.
            params: `n` is for `add_samples`, `stop` for whoever turns tokens into text.
            adapter: name of the adapter the backend applies; None for the base model.
            eos_ids: tokens that end the reply unless `params.ignore_eos`.
            sample: index of the sample among those of one seed.

        Raises:
            UsageError: an empty prompt, or a token id that the vocabulary does not have.
            ContextOverflow: prompt and `max_tokens` can never fit into the context or the KV cache.
        """
        prompt = self._check_ids("the prompt", _as_array(prompt_ids))
        if len(prompt) == 0:
            raise UsageError("The prompt has no tokens; give at least one, such as the beginning-of-text token.")
        # Beyond the vocabulary numpy would add the bias to another token (negative ids count from the end) or fail in the first step.
        self._check_ids("logit_bias", np.array(list(params.logit_bias), dtype=np.int64))
        total = self._total(len(prompt), params.max_tokens)  # checked now, so that no sequence runs out of room half-way
        ids = np.empty(total, dtype=np.int32)
        ids[: len(prompt)] = prompt
        root = prefix_root(self.backend.config, adapter, total)
        sequence = Sequence(
            ids=ids,
            prompt_length=len(prompt),
            params=params,
            seed=sampling.fresh_seed() if params.seed is None else params.seed,
            sample_index=sample,
            adapter=adapter,
            context=total,
            end_ids=frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else frozenset(eos_ids)),
            cache=self.cache.open(root, ids[: len(prompt)], total),
            greedy=params.temperature == 0 and not params.changes_logits,
            added_at=time.perf_counter(),
            length=len(prompt),
            logprobs=None if params.logprobs is None else [],
        )
        with self.lock:
            self.scheduler.waiting.append(sequence)
        return sequence

    def add_samples(
        self, prompt_ids: PromptIds, params: SamplingParams, adapter: str | None = None, *, eos_ids: Iterable[int] = ()
    ) -> list[Sequence]:
        """Queue `params.n` samples of one prompt; they share its blocks and one seed, and differ in `sample_index`."""
        if params.seed is None:
            params = replace(params, seed=sampling.fresh_seed())
        prompt, eos_ids = _as_array(prompt_ids), tuple(eos_ids)
        return [self.add(prompt, params, adapter, eos_ids=eos_ids, sample=index) for index in range(params.n)]

    def step(self) -> None:
        """Compute one batch and append its new tokens to their sequences: schedule, run, sample. Nothing to do is no error.

        If the backend raises, or Ctrl-C comes, no sequence has advanced: step again, or abort.
        """
        with self.lock:
            self._step()

    def _step(self) -> None:
        work = self.scheduler.plan()
        if not work:
            return
        if self.speculation is not None:
            work = self._with_states(self.speculation.extend(work))
        batch = self._batch
        logits = self.backend.step(batch.fill(work))
        drawn = []
        for item in batch.asked:  # those that have reached their last token; the others' prompts go on in the next step
            count = item.end - item.sequence.length + 1  # logits after the last token and after each draft token
            drawn.append(self._draw(item.sequence, logits[:count]))
            logits = logits[count:]
        if self.speculation is not None:
            self.speculation.observe(batch.asked, [[token for token, _ in tokens] for tokens, _ in drawn])
        # Nothing above has changed a sequence: where the backend raises or Ctrl-C comes, the step can be repeated.
        now = time.perf_counter()
        for item in work:
            item.sequence.computed = item.end
        for item, (tokens, _) in zip(batch.asked, drawn, strict=True):  # keys of refused draft tokens do not count; they are overwritten
            item.sequence.computed = item.sequence.length + max(len(tokens), 1) - 1
        for item in work:
            cache, computed = item.sequence.cache, item.sequence.computed
            # Before the tokens are committed: that may end the sequence, and what it leaves in the cache must be findable.
            if computed // self.cache.block_size > cache.published:
                self.cache.publish(cache, item.sequence.ids[:computed])
            if self.cache.states is not None:
                self.cache.commit_states(cache, computed)
        for item, (tokens, error) in zip(batch.asked, drawn, strict=True):
            self._commit(item.sequence, tokens, error, now)

    def _with_states(self, work: list[Work]) -> list[Work]:
        """Return the work without the draft tokens for whose states there is no room."""
        if self.cache.states is None:
            return work
        left = self.cache.draft_states([item.sequence.cache for item in work])
        out = []
        for item in work:
            drafted = min(max(item.end - item.sequence.length, 0), left)
            left -= drafted
            out.append(item._replace(end=min(item.end, item.sequence.length + drafted)))
        return out

    def abort(self, sequence: Sequence, reason: EndReason = "abort") -> None:
        """End a sequence now, with what it has (`reason` "stop" where a stop string was met); one that has ended stays as it is."""
        with self.lock:
            if sequence.finish_reason is None:
                self._finish(sequence, reason, time.perf_counter())

    def _draw(self, sequence: Sequence, rows: NDArray[np.float32]) -> tuple[list[Drawn], LLMKitError | None]:
        """Return the next tokens of a sequence, from the logits `[1 + drafted, vocab]` after its last token and after each draft token.

        The first row always counts, one after a draft token only if that is the token drawn there. An error concerns this sequence
        alone.
        """
        drawn: list[Drawn] = []
        count = sequence.params.logprobs
        for position, logits in enumerate(rows, sequence.length):
            try:
                token = sequence.draw(logits, position)
            except LLMKitError as error:
                return drawn, error
            drawn.append((token, None if count is None else sampling.token_logprobs(logits, token, count)))
            if token != sequence.ids[position] or token in sequence.end_ids:
                break
        return drawn, None

    def _commit(self, sequence: Sequence, tokens: list[Drawn], error: LLMKitError | None, now: float) -> None:
        """Append the tokens drawn for a sequence, and end it where one of them does or drawing failed."""
        for token, logprobs in tokens:
            sequence.ids[sequence.length] = token
            sequence.length += 1
            if logprobs is not None and sequence.logprobs is not None:
                sequence.logprobs.append(logprobs)
            if sequence.first_token_at is None:
                sequence.first_token_at = now
            if token in sequence.end_ids:
                self._finish(sequence, "stop", now)
            elif sequence.length == sequence.context:
                self._finish(sequence, "length", now)
        if error is not None:
            sequence.error = error
            self._finish(sequence, "error", now)

    def _finish(self, sequence: Sequence, reason: EndReason, now: float) -> None:
        self.scheduler.remove(sequence)
        if self.speculation is not None:
            self.speculation.close(sequence)
        sequence.finish_reason = reason
        sequence.finished_at = now

    def _total(self, prompt_length: int, max_tokens: int | None) -> int:
        """Return how many tokens prompt and reply have together at most; ContextOverflow where they cannot fit."""
        limit, what, remedy = self.backend.config.max_position_embeddings, "the model's context", "choose a model with a longer one"
        capacity = self.cache.capacity
        if capacity is not None and capacity < limit:
            limit, what, remedy = capacity, "the KV cache", "raise its limit"
        room = limit - prompt_length
        if room < 1:
            raise ContextOverflow(
                f"The prompt has {prompt_length} tokens and {what} holds {limit}, of which the reply needs at least 1: "
                f"{1 - room} too many. Shorten the prompt or {remedy}."
            )
        if max_tokens is not None and max_tokens > room:
            total = prompt_length + max_tokens
            raise ContextOverflow(
                f"The prompt of {prompt_length} tokens fits, but with max_tokens {max_tokens} it needs {total} and {what} holds "
                f"{limit}: {max_tokens - room} too many. Lower max_tokens to {room} or less, shorten the prompt or {remedy}."
            )
        return prompt_length + (room if max_tokens is None else max_tokens)

    def _check_ids(self, where: str, ids: NDArray[np.integer]) -> NDArray[np.int32]:
        vocab = self.backend.config.vocab_size
        if ids.size and not (np.issubdtype(ids.dtype, np.integer) and ids.ndim == 1):
            raise UsageError(f"Token ids in {where} must be a flat list of integers (found {ids.dtype}, {ids.ndim} dimensions).")
        if ids.size and (ids.min() < 0 or ids.max() >= vocab):
            wrong = ids[(ids < 0) | (ids >= vocab)][0]
            raise UsageError(f"Token id {wrong} in {where} is not in the model's vocabulary of {vocab}; was it made by another tokenizer?")
        return ids.astype(np.int32)


def _as_array(ids: PromptIds) -> NDArray[np.integer]:
    return ids if isinstance(ids, np.ndarray) else np.array(list(ids) or np.empty(0, np.int32))


def tokens_within(backend: Backend, cache_bytes: int, max_step_tokens: int, state_interval: int = STATE_INTERVAL) -> int:
    """Return the most tokens whose cache, over all groups and with its state slots, stays within `cache_bytes`; whole blocks."""
    costs = [backend.block_bytes(group) for group in range(len(backend.cache_windows))]

    def fits(blocks: int) -> bool:
        sizes = pool_sizes(backend.cache_windows, backend.block_size, blocks * backend.block_size, max_step_tokens)
        states = state_slots(blocks * backend.block_size, state_interval) * backend.state_bytes
        return states + sum(size * cost for size, cost in zip(sizes, costs, strict=True)) <= cache_bytes

    # Windowed groups and state slots stop growing, so the bytes of a token are no constant: bisect over whole blocks.
    low, high = 0, cache_bytes // max(1, min(costs, default=1)) + 1  # fits(low), not fits(high)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low * backend.block_size
