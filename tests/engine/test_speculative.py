"""Speculation: whatever is guessed, every request gets exactly the tokens it gets without, in fewer steps where guesses are right."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Mapping
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit.engine import Engine, SamplingParams, Sequence, StepBatch, speculative
from llmkit.engine.cache import BlockPool
from llmkit.engine.sampling import process
from llmkit.engine.speculative import (
    MAX_DRAFT_TOKENS,
    MAX_STEP_TOKENS,
    Drafter,
    ModelDrafter,
    NgramDrafter,
    Speculation,
    StepTimes,
    continuation,
)
from llmkit.errors import LLMKitError, UsageError
from tests.engine.fake import FakeBackend, tiny_config
from tests.engine.test_engine import GREEDY, PROMPT, Request, assert_nothing_leaked, requests, run


class Clock:
    """Seconds that pass only where somebody says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class TimedBackend(FakeBackend):
    """A step takes as long as `seconds` says of its number of rows."""

    clock: Clock
    seconds: Callable[[int], float]

    def step(self, batch: StepBatch, hidden: bool = False) -> np.ndarray:
        self.clock.now += self.seconds(len(batch.tokens))
        return super().step(batch, hidden)


class ScriptDrafter:
    """Knows the replies, and errs where it is told to."""

    def __init__(self, replies: Mapping[tuple[int, ...], list[int]], errs: Callable[[int], bool] = lambda position: False) -> None:
        self.replies = replies
        self.errs = errs
        self.asked: list[int] = []  # guesses wanted, step by step
        self.closed = 0

    def draft(self, wanted: Mapping[Sequence, int]) -> dict[Sequence, int]:
        written = {}
        for sequence, count in wanted.items():
            text = [*sequence.prompt_ids.tolist(), *self.replies[tuple(sequence.prompt_ids.tolist())]]
            guesses = text[sequence.length : sequence.length + count]
            for position, token in enumerate(guesses, sequence.length):
                sequence.ids[position] = (token + 1) % 23 if self.errs(position) else token
            written[sequence] = len(guesses)
            self.asked.append(count)
        return written

    def close(self, sequence: Sequence) -> None:
        self.closed += 1


def always(drafter: Drafter) -> Speculation:
    """Rows cost nothing by a clock that stands still, so that guesses are made wherever possible."""
    return Speculation(drafter, Clock())


def model_drafter(noise: float = 0.0, windows: tuple[int | None, ...] = (None,), *, cache: int = 400, **config: int) -> ModelDrafter:
    backend = FakeBackend(tiny_config(windows, **config), noise=noise)
    return ModelDrafter(backend, 23, max_cache_tokens=cache, prefill_chunk=6)


def assert_no_draft_leaked(drafter: Drafter) -> None:
    if isinstance(drafter, ModelDrafter):
        assert not drafter._mirrors
        for pool in drafter._cache.pools:
            assert pool.num_free == pool.num_blocks
        assert not any(drafter._cache._reserved)


# --- the text as its own draft ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("history", "expected"),
    [
        ([1, 2, 3, 4, 9, 1, 2, 3], [4, 9, 1]),  # three match, three are guessed
        ([1, 2, 3, 8, 1, 2, 4, 9, 1, 2], [4, 9]),  # the latest of several places
        ([7, 1, 2, 3, 9, 8, 1, 2, 4, 9, 7, 1, 2], [3, 9, 8]),  # the longest match before the latest
        ([5, 6, 5, 6, 5, 6], [5, 6, 5, 6]),  # a repetition goes on
        ([4, 4, 4, 4], [4, 4, 4]),
        ([3, 1, 4, 1], []),  # one token is no match
        ([1], []),
        ([1, 2, 3], []),
    ],
)
def test_the_text_goes_on_as_it_did_before(history: list[int], expected: list[int]) -> None:
    assert continuation(np.array(history, dtype=np.int32), 7).tolist() == expected
    assert continuation(np.array(history, dtype=np.int32), 1).tolist() == expected[:1]


@given(st.lists(st.integers(0, 2), min_size=1, max_size=40), st.integers(1, 9))
def test_continuation_finds_the_longest_match(history: list[int], count: int) -> None:
    def matched(end: int) -> int:
        length = 0
        while length < min(end + 1, speculative.MAX_MATCH) and history[end - length] == history[-1 - length]:
            length += 1
        return length

    best = max(((matched(end), end) for end in range(len(history) - 1)), default=(0, 0))
    expected = list(history)
    if best[0] >= 2:
        for index in range(min(count, best[0])):
            expected.append(expected[best[1] + 1 + index])
    assert continuation(np.array(history, dtype=np.int32), count).tolist() == expected[len(history) :]


# --- the same replies ---------------------------------------------------------------------------------------------------

drafters = st.one_of(
    st.just("ngram"),
    st.tuples(st.sampled_from([0.0, 0.2, 1.0]), st.sampled_from([(None,), (None, 5), (3,)]), st.sampled_from([40, 400])),
    st.integers(1, 5),  # a script that errs at every so manieth position
)


@settings(max_examples=60, deadline=None)
@given(
    asked=st.lists(requests, min_size=1, max_size=5),
    how=drafters,
    windows=st.sampled_from([(None,), (None, 5), (6,), (None, 3, 9)]),
    cache_tokens=st.integers(48, 160),
    chunk=st.sampled_from([1, 3, 8, 512]),
)
def test_every_request_gets_the_tokens_it_gets_without(
    asked: list[Request], how: object, windows: tuple[int | None, ...], cache_tokens: int, chunk: int
) -> None:
    backend = FakeBackend(tiny_config(windows))

    def alone(request: Request, seed: int, sample: int) -> list[int]:
        return backend.reply(request.prompt, request.params, seed=seed, sample_index=sample, adapter=request.adapter, eos=(2,))

    drafter: Drafter
    if how == "ngram":
        drafter = NgramDrafter()
    elif isinstance(how, tuple):
        drafter = model_drafter(*how[:2], cache=how[2])
    else:
        assert isinstance(how, int)
        step = how
        replies = {tuple(r.prompt): [*alone(r, r.params.seed or 0, 0), *[5] * 20] for r in asked}
        drafter = ScriptDrafter(replies, lambda position: position % step == 0)
    engine = Engine(backend, max_cache_tokens=cache_tokens, prefill_chunk=chunk, speculation=always(drafter))
    added: list[tuple[Request, Sequence]] = []
    now = 0
    while engine.busy or any(request.arrives >= now for request in asked):
        for request in asked:
            if request.arrives == now:
                samples = engine.add_samples(request.prompt, request.params, request.adapter, eos_ids=[2])
                added.extend((request, sequence) for sequence in samples)
            if request.aborted is not None and request.arrives + request.aborted == now:
                for owner, sequence in added:
                    if owner is request:
                        engine.abort(sequence)
        engine.step()
        now += 1
    for request, sequence in added:
        expected = alone(request, sequence.seed, sequence.sample_index)
        if sequence.finish_reason == "abort":
            assert sequence.token_ids.tolist() == expected[: sequence.num_generated]
        else:
            assert sequence.token_ids.tolist() == expected
            assert sequence.finish_reason == ("stop" if expected[-1] in {2, *request.params.stop_token_ids} else "length")
        assert 0 <= sequence.accepted <= sequence.drafted
    assert_nothing_leaked(engine)
    assert_no_draft_leaked(drafter)


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_right_guesses_save_steps(temperature: float) -> None:
    """The draft model is the model itself: with the same random numbers it draws the same tokens."""
    backend = FakeBackend(tiny_config())
    drafter = model_drafter()
    engine = Engine(backend, speculation=always(drafter))
    params = SamplingParams(temperature=temperature, max_tokens=60, seed=3)
    sequence = engine.add(PROMPT, params)
    run(engine, sequence)
    assert sequence.token_ids.tolist() == backend.reply(PROMPT, params, seed=3)
    assert sequence.drafted == sequence.accepted > 40
    assert backend.steps < 25  # some to learn what a step costs with one guess, two, ...
    # The next turn: what the draft model has read is found in its cache, replies too.
    steps, computed = backend.steps, drafter._backend.computed  # type: ignore[attr-defined]
    turn = engine.add([*PROMPT, *sequence.token_ids[:10].tolist(), 3], SamplingParams(temperature=0, max_tokens=33, seed=0))
    run(engine, turn)
    assert backend.steps - steps < 8
    assert drafter._backend.computed - computed < 45  # type: ignore[attr-defined]


def test_only_accepted_tokens_are_published() -> None:
    backend = FakeBackend(tiny_config())
    params = dataclasses.replace(GREEDY, max_tokens=40)
    turn = [*PROMPT, *backend.reply(PROMPT, GREEDY, seed=0), 3]
    replies = {tuple(prompt): backend.reply(prompt, params, seed=0) for prompt in (PROMPT, turn)}
    for period in (1, 2, 3, 5):
        engine = Engine(backend, speculation=always(ScriptDrafter(replies, lambda position, period=period: position % period == 0)))
        sequence = engine.add(PROMPT, params)
        run(engine, sequence)
        assert sequence.drafted > sequence.accepted
        real = engine.cache.open(sequence.cache.root, sequence.ids[:60], 60).hashes  # the last token was never computed
        assert set(engine.cache.pools[0].known) == set(real)
        again = engine.add(turn, params)
        run(engine, again)
        assert again.cached_tokens > 20
        assert again.token_ids.tolist() == replies[tuple(turn)]


def test_a_run_ends_at_a_stop_token_and_at_max_tokens() -> None:
    backend = FakeBackend(tiny_config())
    params = SamplingParams(temperature=1.0, max_tokens=40, seed=1)
    reply = backend.reply(PROMPT, params, seed=1)
    for length in range(20, 33):
        stop = reply[length]
        first = reply.index(stop)
        drafter = ScriptDrafter({tuple(PROMPT): reply})
        engine = Engine(backend, speculation=always(drafter))
        stopped = engine.add(PROMPT, dataclasses.replace(params, stop_token_ids=(stop,)))
        short = engine.add(PROMPT, dataclasses.replace(params, max_tokens=length))
        run(engine, stopped, short)
        assert (stopped.token_ids.tolist(), stopped.finish_reason) == (reply[: first + 1], "stop")
        assert (short.token_ids.tolist(), short.finish_reason) == (reply[:length], "length")
        assert short.drafted == short.accepted > 0
        assert drafter.closed == 2


def test_log_probabilities_are_those_of_plain_decoding() -> None:
    backend = FakeBackend(tiny_config())
    params = SamplingParams(temperature=0.8, top_k=9, max_tokens=30, seed=4, logprobs=3)
    plain = Engine(backend)
    expected = plain.add(PROMPT, params)
    run(plain, expected)
    engine = Engine(backend, speculation=always(model_drafter(0.2)))
    sequence = engine.add(PROMPT, params)
    run(engine, sequence)
    assert 0 < sequence.accepted < sequence.drafted
    assert sequence.logprobs == expected.logprobs


@pytest.mark.parametrize("broken", range(2, 16))
@pytest.mark.parametrize("where", ["target", "draft"])
def test_a_step_that_is_broken_off_can_be_repeated(broken: int, where: str) -> None:
    backend = FakeBackend(tiny_config((None, 5)))
    drafter = model_drafter(0.2, (None, 4))
    engine = Engine(backend, prefill_chunk=8, speculation=always(drafter))
    params = SamplingParams(temperature=0, max_tokens=40)
    sequence = engine.add(PROMPT, params)
    (backend if where == "target" else drafter._backend).fail_at = broken  # type: ignore[attr-defined]
    with pytest.raises(KeyboardInterrupt):
        run(engine, sequence)
    run(engine, sequence)
    assert sequence.token_ids.tolist() == backend.reply(PROMPT, params, seed=0)
    assert_nothing_leaked(engine)
    assert_no_draft_leaked(drafter)


def test_logits_that_are_no_numbers_after_an_accepted_guess() -> None:
    """What was said before them is kept, and the draft model's own are no harm."""
    backend = FakeBackend(tiny_config())
    reply = backend.reply(PROMPT, dataclasses.replace(GREEDY, max_tokens=40), seed=0)
    bad = next(token for token in reply if reply.index(token) > 8)
    backend.poisoned = {bad}
    engine = Engine(backend, speculation=always(ScriptDrafter({tuple(PROMPT): reply})))
    sequence = engine.add(PROMPT, dataclasses.replace(GREEDY, max_tokens=40))
    run(engine, sequence)
    assert sequence.token_ids.tolist() == reply[: reply.index(bad) + 1]
    assert isinstance(sequence.error, LLMKitError)
    assert_nothing_leaked(engine)
    drafter = model_drafter()
    drafter._backend.poisoned = {bad}  # type: ignore[attr-defined]
    backend.poisoned = set()
    engine = Engine(backend, speculation=always(drafter))
    sequence = engine.add(PROMPT, dataclasses.replace(GREEDY, max_tokens=40))
    run(engine, sequence)
    assert sequence.token_ids.tolist() == reply
    assert sequence.accepted > 0


# --- draft models that are not quite like the target --------------------------------------------------------------------


def test_a_draft_model_with_a_shorter_context_falls_silent() -> None:
    backend = FakeBackend(tiny_config())
    drafter = model_drafter(max_positions=30)
    engine = Engine(backend, speculation=always(drafter))
    params = SamplingParams(temperature=0, max_tokens=40)
    short, long = engine.add(PROMPT, params), engine.add(PROMPT * 2, params)
    run(engine, short, long)
    assert short.token_ids.tolist() == backend.reply(PROMPT, params, seed=0)
    assert long.token_ids.tolist() == backend.reply(PROMPT * 2, params, seed=0)
    assert 0 < short.drafted < 12
    assert long.drafted == 0
    assert_no_draft_leaked(drafter)


@pytest.mark.parametrize("vocab", [19, 27])
def test_logits_padded_to_another_length(vocab: int) -> None:
    """Ids that only the target has are neither guessed nor read."""
    backend = FakeBackend(tiny_config())
    drafter = ModelDrafter(FakeBackend(tiny_config(vocab=vocab)), 23, max_cache_tokens=200)
    engine = Engine(backend, speculation=always(drafter))
    params = SamplingParams(temperature=1.5, max_tokens=30, seed=0, logit_bias=dict.fromkeys(range(19, 23), -100.0))
    prompt = [token % 19 for token in PROMPT]
    sequence, unread = engine.add(prompt, params), engine.add([*prompt, 20], params)
    run(engine, sequence, unread)
    assert sequence.token_ids.tolist() == backend.reply(prompt, params, seed=0)
    assert unread.token_ids.tolist() == backend.reply([*prompt, 20], params, seed=0)
    assert (unread.drafted == 0) == (vocab == 19)
    assert sequence.drafted > 0
    assert_no_draft_leaked(drafter)


def test_a_sequence_without_room_in_the_draft_cache_runs_without_guesses() -> None:
    backend = FakeBackend(tiny_config())
    drafter = model_drafter(cache=48)
    engine = Engine(backend, max_cache_tokens=200, speculation=always(drafter))
    params = SamplingParams(temperature=0, max_tokens=20)
    first, second = engine.add(PROMPT, params), engine.add(PROMPT[::-1], params)
    run(engine, first, second)
    assert first.drafted > 0
    assert second.drafted == 0
    assert second.token_ids.tolist() == backend.reply(PROMPT[::-1], params, seed=0)
    third = engine.add(PROMPT[::-1], params)
    run(engine, third)
    assert third.drafted > 0


# --- the distribution ---------------------------------------------------------------------------------------------------

ODDS = SamplingParams(temperature=1.2, top_k=8, top_p=0.95, min_p=0.02, repetition_penalty=1.2, max_tokens=4)


class NeverTheSame:
    """Guesses tokens drawn at random, whatever the model thinks: another q than the model drafts'."""

    def __init__(self) -> None:
        self.random = np.random.default_rng(5)

    def draft(self, wanted: Mapping[Sequence, int]) -> dict[Sequence, int]:
        for sequence, count in wanted.items():
            sequence.ids[sequence.length : sequence.length + count] = self.random.integers(0, 5, count)
        return dict(wanted)

    def close(self, sequence: Sequence) -> None:
        pass


@pytest.mark.parametrize("make", [lambda: model_drafter(0.1), NeverTheSame], ids=["draft model", "fixed guesses"])
def test_the_distribution_is_the_models_own(make: Callable[[], Drafter]) -> None:
    """Chi-square over many seeds of the third token, whose exact distribution is summed over the two before it."""
    backend = FakeBackend(tiny_config(max_positions=30))
    prompt = PROMPT[:2]

    def probabilities(ids: list[int]) -> dict[int, float]:
        plain = Engine(backend)
        captured = []

        class Stop(Exception):
            pass

        step = backend.step

        def capture(batch: StepBatch) -> None:
            captured.append(step(batch)[0])
            raise Stop

        backend.step = capture  # type: ignore[method-assign]
        plain.add(ids, GREEDY)
        with pytest.raises(Stop):
            plain.step()
        del backend.step
        logits = process(captured[0], ODDS, np.array(ids, dtype=np.int32), len(prompt))
        weights = np.exp(logits.astype(np.float64) - logits.max())
        return {int(token): float(weights[token] / weights.sum()) for token in np.flatnonzero(weights)}

    expected: Counter[int] = Counter()
    for first, p in probabilities(prompt).items():
        for second, q in probabilities([*prompt, first]).items():
            for third, r in probabilities([*prompt, first, second]).items():
                expected[third] += p * q * r
    engine = Engine(backend, speculation=always(make()))
    seen: Counter[int] = Counter()
    drafted = accepted = 0
    count = 400
    for seed in range(count):
        sequence = engine.add(prompt, dataclasses.replace(ODDS, seed=seed))
        run(engine, sequence)
        seen[int(sequence.token_ids[2])] += 1
        drafted += sequence.drafted
        accepted += sequence.accepted
    assert 0.02 * drafted < accepted < 0.98 * drafted
    assert set(seen) <= set(expected)
    chi_square = sum((seen[token] - count * p) ** 2 / (count * p) for token, p in expected.items())
    freedom = len(expected) - 1
    assert chi_square < freedom + 3.1 * math.sqrt(2 * freedom) + 3  # about the 99.9th percentile


# --- adapting -----------------------------------------------------------------------------------------------------------


def timed(seconds: Callable[[int], float], errs: Callable[[int], bool], length: int = 600) -> tuple[Sequence, ScriptDrafter, float]:
    """A long reply with a drafter that errs at some positions, on a machine whose steps take `seconds(rows)`."""
    backend = TimedBackend(tiny_config(max_positions=length + 30))
    clock = backend.clock = Clock()
    backend.seconds = seconds
    params = SamplingParams(temperature=0, max_tokens=length)
    reply = backend.reply(PROMPT, params, seed=0)
    drafter = ScriptDrafter({tuple(PROMPT): reply}, errs)
    engine = Engine(backend, speculation=Speculation(drafter, clock))
    sequence = engine.add(PROMPT, params)
    run(engine, sequence)
    assert sequence.token_ids.tolist() == reply
    return sequence, drafter, clock.now


def test_where_rows_are_free_and_guesses_right_it_guesses_as_much_as_it_may() -> None:
    _, drafter, seconds = timed(lambda rows: 1.0, lambda position: False)
    assert drafter.asked[-20] == MAX_DRAFT_TOKENS
    assert all(after - before <= 1 for before, after in pairwise(drafter.asked)), "one row more at a time"
    assert seconds < 600 / 6


def test_as_many_guesses_as_pay() -> None:
    """Rows are free up to a tile of four."""
    _, drafter, seconds = timed(lambda rows: 1.0 if rows <= 4 else 3.0, lambda position: False)
    assert Counter(drafter.asked).most_common(1)[0][0] == 3
    assert seconds < 600 / 3.5


def test_guesses_that_are_wrong_are_given_up() -> None:
    sequence, _, seconds = timed(lambda rows: 1.0 + 0.2 * (rows - 1), lambda position: True)
    assert sequence.accepted == 0
    assert sequence.drafted < 40
    assert seconds < 600 * 1.02


def test_rows_that_cost_as_much_as_steps_are_not_taken() -> None:
    _, drafter, seconds = timed(lambda rows: float(rows), lambda position: False)
    assert len(drafter.asked) < 600 / 8
    assert seconds < (600 + 21) * 1.01


def test_it_comes_back_where_the_text_changes() -> None:
    _, drafter, seconds = timed(lambda rows: 1.0 + 0.1 * (rows - 1), lambda position: position < 300)
    assert drafter.asked[-20] >= 5
    assert seconds < 300 * 1.05 + 200


def test_it_comes_back_where_the_machine_changes() -> None:
    """Rows become free after a while, as they do when another process ends."""
    steps = 0

    def seconds(rows: int) -> float:
        nonlocal steps
        steps += 1
        return float(rows) if steps < 200 else 1.0

    _, drafter, _ = timed(seconds, lambda position: False, 1200)
    assert drafter.asked[-20] == MAX_DRAFT_TOKENS


def test_a_slow_draft_model_is_given_up() -> None:
    def seconds(draft: float) -> tuple[float, Sequence]:
        target, small = TimedBackend(tiny_config(max_positions=400)), TimedBackend(tiny_config(max_positions=400))
        target.clock = small.clock = Clock()
        target.seconds, small.seconds = lambda rows: 1.0, lambda rows: draft
        drafter = ModelDrafter(small, 23, max_cache_tokens=400)
        engine = Engine(target, speculation=Speculation(drafter, target.clock))
        sequence = engine.add(PROMPT, SamplingParams(temperature=0, max_tokens=300))
        run(engine, sequence)
        return target.clock.now, sequence

    assert seconds(0.1)[0] < 100
    slow, sequence = seconds(1.5)
    assert slow < 300 * 1.25
    assert sequence.drafted < 60


def test_each_sequence_is_judged_by_itself() -> None:
    """One is copied, the other is not: only the first gets guesses, and a step with both is as long as its rows."""
    backend = TimedBackend(tiny_config(max_positions=700))
    clock = backend.clock = Clock()
    backend.seconds = lambda rows: 1.0 + 0.05 * rows
    params = SamplingParams(temperature=0, max_tokens=300)
    good, bad = PROMPT, PROMPT[::-1]
    replies = {tuple(p): backend.reply(p, params, seed=0) for p in (good, bad)}
    wrong = {tuple(good): replies[tuple(good)], tuple(bad): [(token + 1) % 23 for token in replies[tuple(bad)]]}
    engine = Engine(backend, speculation=Speculation(ScriptDrafter(wrong), clock))
    sequences = [engine.add(p, params) for p in (good, bad)]
    run(engine, *sequences)
    assert [sequence.token_ids.tolist() for sequence in sequences] == list(replies.values())
    assert sequences[0].accepted > 200
    assert sequences[1].drafted < 30


@pytest.mark.parametrize("slots", [4, 5, 6, 64])
def test_states_go_back_to_where_draft_tokens_were_refused(slots: int) -> None:
    """With 4 slots two sequences have none left for drafts; more slots, more draft tokens in a step."""
    backend = FakeBackend(tiny_config(max_positions=140), stateful=True)
    params = SamplingParams(temperature=0, max_tokens=40)
    prompts = [PROMPT, PROMPT[3:]]
    replies = [backend.reply(prompt, params, seed=0) for prompt in prompts]
    known = {tuple(prompt): reply for prompt, reply in zip(prompts, replies, strict=True)}
    engine = Engine(backend, speculation=always(ScriptDrafter(known, errs=lambda position: position % 5 == 0)))
    engine.cache.states = BlockPool(slots)
    sequences = [engine.add(prompt, params) for prompt in prompts]
    run(engine, *sequences)
    assert [sequence.token_ids.tolist() for sequence in sequences] == replies
    accepted = sum(sequence.accepted for sequence in sequences)
    assert accepted == 0 if slots == 4 else accepted > 10
    assert_nothing_leaked(engine)
    following = [*PROMPT, *replies[0]]
    known[tuple(following)] = backend.reply(following, params, seed=0)
    again = engine.add(following, params)
    run(engine, again)
    assert slots < 64 or again.cached_tokens == 60  # the state of accepted tokens was kept under their hash
    assert again.token_ids.tolist() == known[tuple(following)]


def test_a_draft_model_with_a_state_is_refused() -> None:
    with pytest.raises(UsageError, match="keeps a recurrent state, which cannot be taken back"):
        ModelDrafter(FakeBackend(tiny_config(), stateful=True), 23, max_cache_tokens=400)


def test_a_step_has_no_more_rows_than_pay() -> None:
    backend = FakeBackend(tiny_config(max_positions=60))
    drafter = ScriptDrafter({(token,): backend.reply([token], GREEDY, seed=0) for token in range(23)})
    engine = Engine(backend, max_cache_tokens=4000, speculation=always(drafter))
    rows = []
    step = backend.step

    def count(batch: StepBatch) -> np.ndarray:
        rows.append(len(batch.tokens))
        return step(batch)

    backend.step = count  # type: ignore[method-assign]
    params = SamplingParams(temperature=0, max_tokens=50)
    drafter.replies = {(token,): backend.reply([token], params, seed=0) for token in range(23)}
    run(engine, *[engine.add([token % 23], params) for token in range(20)])
    assert max(rows) == MAX_STEP_TOKENS
    rows.clear()
    run(engine, *[engine.add([token % 23], params) for token in range(MAX_STEP_TOKENS + 1)])
    assert rows == [MAX_STEP_TOKENS + 1] * 50


def test_the_first_time_of_a_shape_does_not_count_and_old_ones_are_forgotten() -> None:
    times = StepTimes()
    times.add(1, 1, 100.0)
    assert times.curve(1) == []
    for seconds in (1.0, 1.0, 9.0, 1.0):
        times.add(1, 1, seconds)
    assert times.curve(1) == [1.0, 1.0]  # the row that is not known is said to be free
    times.add(1, 4, 50.0)
    times.add(1, 4, 2.5)
    assert times.curve(1) == [1.0, 1.5, 2.0, 2.5, 2.5]
    assert times.curve(2) == []
    for _ in range(speculative.COST_MEMORY + 1):
        times.add(1, 1, 1.0)
    assert times.curve(1) == [1.0, 1.0]
