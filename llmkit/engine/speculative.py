"""Speculative decoding: tokens are drafted cheaply and checked together, one backend step for several tokens of a sequence.

Draft tokens come from the text itself (prompt lookup, https://github.com/apoorvumang/prompt-lookup-decoding) or from a small
*draft model*. The step computes logits after the last token and after every draft token; one by one the engine draws the token
that belongs there, from all the same processors and the same (seed, position) as without speculation. A draft token that equals
the draw is accepted and the next logits are valid too; at the first that differs the draw takes its place and the rest is
dropped. The reply is therefore the very one of plain decoding, greedy or sampled, whatever is drafted and however much,
as far as the logits of a token do not depend on what else is in the batch.

For a draft token that is certain this is the rejection sampling of Leviathan et al. (arXiv:2211.17192): token x is accepted with
probability p(x), and otherwise the token is distributed as p without x. A draft model's own sampling q would be accepted
more often with their rule (1 - TV(p, q), the most any rule can reach), but then a seeded reply depends on where tokens
were drafted, which here depends on measured times. Instead both models draw with the same random number ("drafter-invariant
speculative decoding", arXiv:2408.07978), and agree where their distributions do. With the inverse CDF of `sampling.choose`
that is less often than with Gumbel noise, which costs a random number for each token of the vocabulary. Measured on
stories260K at temperature 1, drafts being its own logits with noise of deviation 0.3 and 0.6: Leviathan's rule accepts 94%
and 88%, shared Gumbel noise 93% and 86%, this 83% and 75%, and the draft's likeliest token 64% and 63%.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from llmkit.engine.backend import Backend, BatchBuilder, Sequence, Work, prefix_root
from llmkit.engine.cache import CacheManager
from llmkit.errors import LLMKitError, UsageError

MAX_DRAFT_TOKENS = 7  # for one sequence and step; with the row of its last token 8 rows, a usual tile of matrix kernels
MAX_STEP_TOKENS = 32  # of a step with draft tokens: where more sequences than that run at once, arithmetic is the limit, none is cheap
MAX_MATCH = 8  # tokens of the text's end that are looked for; a longer match says no more
PROBE = 2  # draft tokens now and then where they do not pay, to see whether they would now
FIRST_PAUSE, LONGEST_PAUSE = 8, 128  # steps of a sequence between two probes; each that changes nothing doubles the pause
COST_MEMORY = 256  # decode steps after which a measured time is no longer believed


class Drafter(Protocol):
    """Where draft tokens come from."""

    def draft(self, wanted: Mapping[Sequence, int]) -> dict[Sequence, int]:
        """Write draft tokens behind the last token of each sequence, `ids[length:]`, at most as many as wanted; return how many."""
        ...

    def close(self, sequence: Sequence) -> None:
        """Forget a sequence that has ended; also called for those never seen."""
        ...


class NgramDrafter:
    """Drafts what followed an earlier place like the end of the text."""

    def draft(self, wanted: Mapping[Sequence, int]) -> dict[Sequence, int]:
        written = {}
        for sequence, count in wanted.items():
            tokens = continuation(sequence.ids[: sequence.length], count)
            sequence.ids[sequence.length : sequence.length + len(tokens)] = tokens
            written[sequence] = len(tokens)
        return written

    def close(self, sequence: Sequence) -> None:
        pass


def continuation(history: NDArray[np.int32], count: int) -> NDArray[np.int32]:
    """Return what followed the last earlier place where the longest end of `history` `[length]` stood before.

    Two tokens must match, and no more are drafted than matched, nor more than `count`: in held-out English text the token
    after a match of two is right in a third of the cases, after one of eight in nine of ten. A match that overlaps the end
    is a repetition, and is taken to go on.
    """
    ends = np.flatnonzero(history[:-1] == history[-1])
    matched = place = 0
    while len(ends) and matched < MAX_MATCH:
        place, matched = int(ends[-1]), matched + 1
        ends = ends[ends >= matched]
        ends = ends[history[ends - matched] == history[-1 - matched]]
    if matched < 2:
        return history[:0]
    following = np.arange(min(count, matched)) % (len(history) - 1 - place)
    return history[place + 1 + following]


@dataclass(slots=True, eq=False)
class _Mirror:
    """A sequence as the draft model has it: the same tokens, with draft tokens behind them, and other blocks."""

    own: Sequence
    confirmed: int  # tokens of `own` known to be those of the sequence it follows


class ModelDrafter:
    """Drafts what a smaller model with the same vocabulary would say; it has a KV cache of its own.

    Args:
        backend: the draft model. Its logits may be padded to another length than the target's.
        vocab_size: of the target model.
        max_cache_tokens: size of its KV cache; a sequence that finds no room in it is decoded without drafts.
        prefill_chunk: most tokens that are read in one call, while the target model waits.
    """

    def __init__(self, backend: Backend, vocab_size: int, *, max_cache_tokens: int, prefill_chunk: int = 512):
        if backend.state_bytes:
            raise UsageError(
                f"The draft model ({backend.config.model_type}) keeps a recurrent state, which cannot be taken back where its tokens are "
                "refused. Take one without, or --speculate ngram."
            )
        self._backend = backend
        self._vocab_size = vocab_size
        self._prefill_chunk = prefill_chunk
        self._cache = CacheManager(backend.cache_windows, backend.block_size, max_cache_tokens, prefill_chunk + MAX_DRAFT_TOKENS)
        self._batch = BatchBuilder(self._cache, rewind=MAX_DRAFT_TOKENS)
        self._mirrors: dict[Sequence, _Mirror] = {}

    def draft(self, wanted: Mapping[Sequence, int]) -> dict[Sequence, int]:
        mirrors = {sequence: mirror.own for sequence in wanted if (mirror := self._follow(sequence)) is not None}
        budget = self._prefill_chunk
        work = []
        for own in mirrors.values():
            end = min(own.length, own.computed + budget)
            if end > own.computed:
                budget -= end - own.computed
                work.append(Work(own, own.computed, end))
        last = {own: min(sequence.length + wanted[sequence], own.context) for sequence, own in mirrors.items()}
        while work:  # what is unread, and then draft token after draft token
            growing = self._extend(work)
            work = [Work(own, own.length - 1, own.length) for own in growing if own.length < last[own]]
        for sequence, own in mirrors.items():
            sequence.ids[sequence.length : own.length] = own.ids[sequence.length : own.length]
        return {sequence: own.length - sequence.length for sequence, own in mirrors.items()}

    def close(self, sequence: Sequence) -> None:
        mirror = self._mirrors.pop(sequence, None)
        if mirror is not None:
            self._confirm(mirror, sequence)
            self._cache.close(mirror.own.cache)

    def _extend(self, work: list[Work]) -> list[Sequence]:
        """Compute one step; return those that have got a draft token by it and may get another."""
        batch = self._batch
        logits = self._backend.step(batch.fill(work))
        for own, _, end in work:
            own.computed = end
        growing = []
        for (own, _, end), row in zip(batch.asked, logits, strict=True):
            try:
                token = own.draw(self._as_target(row), end)
            except LLMKitError:  # the target's draw will say what is wrong, if it is
                continue
            own.ids[end] = token
            own.length = end + 1
            if token not in own.end_ids:
                growing.append(own)
        return growing

    def _as_target(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the logits `[vocab]` over the ids of the target model."""
        missing = self._vocab_size - len(logits)
        return np.pad(logits, (0, missing), constant_values=-np.inf) if missing > 0 else logits[: self._vocab_size]

    def _follow(self, sequence: Sequence) -> _Mirror | None:
        """Return the mirror, with the tokens the sequence has by now; None where the draft model cannot read them or has no room."""
        mirror = self._mirrors.get(sequence) or self._open(sequence)
        if mirror is None or sequence.length >= mirror.own.context or not self._reads(sequence.ids[mirror.confirmed : sequence.length]):
            return None
        self._confirm(mirror, sequence)
        return mirror

    def _open(self, sequence: Sequence) -> _Mirror | None:
        config, cache, prompt = self._backend.config, self._cache, sequence.prompt_ids
        context = min(sequence.context, config.max_position_embeddings, cache.capacity or sequence.context)
        if len(prompt) >= context or not self._reads(prompt):
            return None
        blocks = cache.open(prefix_root(config, None, context), prompt, context)
        found = cache.match(blocks)
        if not cache.admit(blocks, found):
            return None
        computed = found * cache.block_size
        ids = np.empty(context, dtype=np.int32)
        ids[:computed] = prompt[:computed]
        own = replace(sequence, ids=ids, adapter=None, context=context, cache=blocks, length=computed, computed=computed)
        mirror = self._mirrors[sequence] = _Mirror(own, confirmed=computed)
        return mirror

    def _reads(self, ids: NDArray[np.int32]) -> bool:
        """Return whether the draft model has embeddings for all of them: the target's may be padded further."""
        return int(ids.max(initial=0)) < self._backend.config.vocab_size

    def _confirm(self, mirror: _Mirror, sequence: Sequence) -> None:
        """Take over the tokens that are new; keys and values of draft tokens that were not among them are forgotten."""
        own, start, length = mirror.own, mirror.confirmed, min(sequence.length, mirror.own.context)
        drafted = own.ids[start : min(own.length, length)]
        wrong = np.flatnonzero(drafted != sequence.ids[start : start + len(drafted)])
        agreed = start + (int(wrong[0]) if len(wrong) else len(drafted))
        own.ids[start:length] = sequence.ids[start:length]
        # The last token is computed in any case: its logits are where drafting starts.
        own.computed = min(own.computed, agreed, length - 1)
        own.length = mirror.confirmed = length
        if own.computed // self._cache.block_size > own.cache.published:
            self._cache.publish(own.cache, own.ids[: own.computed])


@dataclass(slots=True)
class _Times:
    """The seconds of steps of one shape."""

    recent: deque[float] = field(default_factory=lambda: deque(maxlen=5))
    usual: float | None = None  # their median
    measured: int = 0  # the step of the last one


class StepTimes:
    """Measures what a decode step of S sequences with N tokens takes, as the median of the last few."""

    def __init__(self) -> None:
        self._times: dict[int, dict[int, _Times]] = {}
        self._steps = 0

    def add(self, sequences: int, tokens: int, seconds: float) -> None:
        """Count a step."""
        self._steps += 1
        of_tokens = self._times.setdefault(sequences, {})
        times = of_tokens.get(tokens)
        if times is None:
            times = of_tokens[tokens] = _Times()  # the first one is not counted: it may have had to take memory or compile
        else:
            if self._old(times):
                times.recent.clear()
            times.recent.append(max(seconds, 1e-9))  # a coarse clock may not have moved
            times.usual = median(times.recent)
        times.measured = self._steps

    def curve(self, sequences: int) -> list[float]:
        """Return the seconds of a step with 0, 1, 2, ... draft tokens.

        It ends one token beyond what was measured, and that one is taken to cost nothing more, so that it is tried. Empty while
        the plain step, which all is compared with, is unknown.
        """
        of_tokens = self._times.get(sequences, {})
        known = {tokens: times.usual for tokens, times in of_tokens.items() if times.usual is not None and not self._old(times)}
        if sequences not in known:
            return []
        measured = sorted(known)
        wanted = range(sequences, min(measured[-1] + 1, MAX_STEP_TOKENS) + 1)
        return np.interp(wanted, measured, [known[tokens] for tokens in measured]).tolist()

    def _old(self, times: _Times) -> bool:
        return self._steps - times.measured > COST_MEMORY


@dataclass(slots=True)
class _Record:
    """How the draft tokens of one sequence fared, the later ones counting more; it starts with a little confidence."""

    accepted: float = 2.0
    tried: float = 3.0
    idle: int = 0  # steps without draft tokens
    pause: int = FIRST_PAUSE
    probing: bool = False

    @property
    def rate(self) -> float:
        """The chance that a draft token is accepted if those before it are."""
        return self.accepted / self.tried

    def add(self, accepted: int, tried: int) -> None:
        keep = 0.5 if self.probing else 0.9  # what a probe finds is news
        self.accepted = keep * self.accepted + accepted
        self.tried = keep * self.tried + tried
        if self.probing:
            self.idle = 0
            self.pause = min(2 * self.pause, LONGEST_PAUSE)


class Speculation:
    """Decides how many tokens are drafted in a step, from what it measures: how often they are accepted and what a longer step costs.

    Steps that read a prompt are left as they are.

    Args:
        drafter: where draft tokens come from.
        clock: seconds.
    """

    def __init__(self, drafter: Drafter, clock: Callable[[], float] = time.perf_counter):
        self._drafter = drafter
        self._clock = clock
        self._step_times = StepTimes()
        self._draft_times: deque[float] = deque(maxlen=5)  # of one draft token for each sequence
        self._records: dict[Sequence, _Record] = {}
        self._timed = False
        self._began = 0.0

    def extend(self, work: list[Work]) -> list[Work]:
        """Return the step with draft tokens in it: they are in `ids` behind the last token, and `end` goes beyond `length`."""
        self._timed = all(start == sequence.length - 1 for sequence, start, _ in work)
        if self._timed:
            wanted = self._wanted([item.sequence for item in work])
            if wanted:
                began = self._clock()
                written = self._drafter.draft(wanted)
                if most := max(written.values(), default=0):
                    self._draft_times.append((self._clock() - began) / most)
                work = [item._replace(end=item.end + written.get(item.sequence, 0)) for item in work]
        self._began = self._clock()
        return work

    def observe(self, asked: list[Work], drawn: list[list[int]]) -> None:
        """Learn from a step, before its tokens are written: per sequence the tokens drawn, the last one after the last agreement."""
        if self._timed:
            self._step_times.add(len(asked), sum(item.end - item.start for item in asked), self._clock() - self._began)
        for (sequence, _, end), tokens in zip(asked, drawn, strict=True):
            drafted = sequence.ids[sequence.length : end][: len(tokens)]
            if len(drafted):
                accepted = int(np.count_nonzero(drafted == tokens[: len(drafted)]))
                sequence.drafted += end - sequence.length
                sequence.accepted += accepted
                self._records[sequence].add(accepted, len(drafted))

    def close(self, sequence: Sequence) -> None:
        """The sequence has ended."""
        self._records.pop(sequence, None)
        self._drafter.close(sequence)

    def _wanted(self, sequences: list[Sequence]) -> dict[Sequence, int]:
        """Return how many draft tokens each sequence should get; those that get none are left out.

        The j-th draft token of a sequence is worth rate**j tokens. In the order of their worth they are added to the step, and as
        many are taken as give the most tokens per second.
        """
        if len(sequences) >= MAX_STEP_TOKENS:
            return {}
        seconds = self._step_times.curve(len(sequences))
        records = [self._records.setdefault(sequence, _Record()) for sequence in sequences]
        room = [min(MAX_DRAFT_TOKENS, sequence.context - sequence.length - 1) for sequence in sequences]
        # A draft token counts only if all before it are accepted, hence the power.
        worth = [(record.rate**j, index) for index, record in enumerate(records) for j in range(1, room[index] + 1)]
        worth.sort(key=lambda pair: -pair[0])
        draft_seconds = median(self._draft_times) if self._draft_times else 0.0
        tokens, deepest = float(len(sequences)), 0
        fastest = tokens / seconds[0] if seconds else 0.0
        counts, best = [0] * len(sequences), [0] * len(sequences)
        for cost, (gain, index) in zip(seconds[1:], worth, strict=False):
            tokens += gain
            counts[index] += 1
            deepest = max(deepest, counts[index])
            speed = tokens / (cost + deepest * draft_seconds)
            if speed > fastest:
                fastest, best = speed, list(counts)
        total = len(sequences) + sum(best)
        for index, record in enumerate(records):
            record.probing = False
            if best[index]:
                record.idle, record.pause = 0, FIRST_PAUSE
                continue
            record.idle += 1
            if seconds and record.idle > record.pause and room[index] and total + PROBE <= MAX_STEP_TOKENS:
                best[index] = min(PROBE, room[index])
                record.probing = True
                total += best[index]
        return {sequence: count for sequence, count in zip(sequences, best, strict=True) if count > 0}
