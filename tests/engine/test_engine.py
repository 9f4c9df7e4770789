"""The engine over a real (tiny) attention model: whatever else runs, every request gets exactly the tokens it gets alone."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit.engine import Engine, SamplingParams, Sequence
from llmkit.engine.cache import AHEAD, most_held
from llmkit.errors import ContextOverflow, UsageError
from tests.engine.fake import FakeBackend, tiny_config

GREEDY = SamplingParams(temperature=0, max_tokens=6)
PROMPT = [(7 * i) % 23 for i in range(21)]


def run(engine: Engine, *sequences: Sequence) -> None:
    while any(sequence.finish_reason is None for sequence in sequences):
        assert engine.busy
        engine.step()


def assert_nothing_leaked(engine: Engine) -> None:
    assert not engine.busy
    for pool in engine.cache.pools:
        assert pool.num_free == pool.num_blocks
        assert not any(pool.references)
    assert not any(engine.cache._reserved)
    assert engine.cache._admitted == 0
    if engine.cache.states is not None:
        assert not any(engine.cache.states.references)
        assert engine.cache.states.num_free == engine.cache.states.num_blocks


def held(engine: Engine, sequence: Sequence, group: int) -> int:
    return sequence.cache.stop[group] - sequence.cache.first[group]


@dataclasses.dataclass
class Request:
    prompt: list[int]
    params: SamplingParams
    adapter: str | None
    arrives: int
    aborted: int | None


requests = st.builds(
    lambda stem, tail, params, adapter, arrives, aborted: Request(PROMPT[:stem] + tail, params, adapter, arrives, aborted),
    stem=st.sampled_from([0, 4, 9, 16, 20]),
    tail=st.lists(st.integers(0, 3), min_size=1, max_size=6),
    params=st.builds(
        SamplingParams,
        temperature=st.sampled_from([0, 1.5]),
        repetition_penalty=st.sampled_from([1.0, 1.3]),
        min_tokens=st.sampled_from([0, 1]),
        stop_token_ids=st.sampled_from([(), (1, 5)]),
        max_tokens=st.integers(1, 12),
        seed=st.integers(0, 2**64 - 1),
        n=st.integers(1, 3),
    ),
    adapter=st.sampled_from([None, None, "a"]),
    arrives=st.integers(0, 12),
    aborted=st.sampled_from([None, None, 0, 3, 9]),
)


scenarios = given(
    asked=st.lists(requests, min_size=1, max_size=6),
    windows=st.sampled_from([(None,), (None, 5), (6,), (None, 3, 9)]),
    cache_tokens=st.integers(40, 160),
    chunk=st.integers(1, 30),
    rope_type=st.sampled_from(["default", "default", "dynamic", "longrope"]),
    stateful=st.booleans(),
)


@settings(max_examples=40, deadline=None)
@scenarios
def test_every_request_gets_the_tokens_it_gets_alone(
    asked: list[Request], windows: tuple[int | None, ...], cache_tokens: int, chunk: int, rope_type: str, stateful: bool
) -> None:
    check_scenario(asked, windows, cache_tokens, chunk, rope_type, stateful)


@pytest.mark.slow
@settings(max_examples=1000, deadline=None)
@scenarios
def test_every_request_gets_the_tokens_it_gets_alone_at_length(
    asked: list[Request], windows: tuple[int | None, ...], cache_tokens: int, chunk: int, rope_type: str, stateful: bool
) -> None:
    check_scenario(asked, windows, cache_tokens, chunk, rope_type, stateful)


def check_scenario(
    asked: list[Request], windows: tuple[int | None, ...], cache_tokens: int, chunk: int, rope_type: str, stateful: bool
) -> None:
    backend = FakeBackend(tiny_config(windows, rope_type=rope_type), stateful=stateful)
    engine = Engine(backend, max_cache_tokens=cache_tokens, prefill_chunk=chunk, state_interval=8)
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
        for group, (pool, window) in enumerate(zip(engine.cache.pools, engine.cache.windows, strict=True)):
            assert pool.num_free >= 0
            for sequence in engine.scheduler.running:
                if window is not None:
                    assert held(engine, sequence, group) <= most_held(window, backend.block_size, chunk)
    for request, sequence in added:
        alone = backend.reply(
            request.prompt, request.params, seed=sequence.seed, sample_index=sequence.sample_index, adapter=request.adapter, eos=(2,)
        )
        if sequence.finish_reason == "abort":
            assert sequence.token_ids.tolist() == alone[: sequence.num_generated]
        else:
            assert sequence.token_ids.tolist() == alone
            assert sequence.finish_reason == ("stop" if alone[-1] in {2, *request.params.stop_token_ids} else "length")
    started = [sequence.started_at for _, sequence in added if sequence.started_at is not None]
    assert started == sorted(started), "a request overtook an earlier one"
    assert_nothing_leaked(engine)


@pytest.mark.parametrize("stateful", [False, True])
@pytest.mark.parametrize("windows", [(None,), (None, 6), (6,)])
def test_a_prefix_is_computed_once(windows: tuple[int | None, ...], stateful: bool) -> None:
    backend = FakeBackend(tiny_config(windows), stateful=stateful)
    engine = Engine(backend, state_interval=8)
    first = engine.add(PROMPT, GREEDY)
    run(engine, first)
    assert first.cached_tokens == 0
    before = backend.computed
    again = engine.add(PROMPT, GREEDY)
    run(engine, again)
    assert again.cached_tokens == 20  # the 21st token is computed for its logits
    assert backend.computed - before == 1 + GREEDY.max_tokens - 1
    assert again.token_ids.tolist() == first.token_ids.tolist()
    # The next turn of a chat: the reply is in the cache too, but for its last token and the block it stands in.
    turn = [*PROMPT, *first.token_ids.tolist(), 3, 4, 5]
    following = engine.add(turn, GREEDY)
    run(engine, following)
    assert following.cached_tokens == 24
    assert following.token_ids.tolist() == backend.reply(turn, GREEDY, seed=0)


@pytest.mark.parametrize("stateful", [False, True])
def test_samples_of_one_prompt_share_its_blocks(stateful: bool) -> None:
    backend = FakeBackend(tiny_config(), stateful=stateful)
    engine = Engine(backend, state_interval=8)
    params = SamplingParams(temperature=2.0, max_tokens=5, n=3)
    samples = engine.add_samples(PROMPT, params)
    run(engine, *samples)
    assert [sequence.cached_tokens for sequence in samples] == [0, 20, 20]
    assert len({sequence.seed for sequence in samples}) == 1
    assert len({tuple(sequence.token_ids.tolist()) for sequence in samples}) == 3
    replay = engine.add(PROMPT, dataclasses.replace(params, seed=samples[2].seed), sample=2)
    run(engine, replay)
    assert replay.token_ids.tolist() == samples[2].token_ids.tolist()


def test_a_fresh_seed_is_drawn_for_every_request_without_one() -> None:
    engine = Engine(FakeBackend(tiny_config()))
    assert engine.add(PROMPT, SamplingParams()).seed != engine.add(PROMPT, SamplingParams()).seed


def test_another_adapter_shares_no_blocks() -> None:
    engine = Engine(FakeBackend(tiny_config()))
    run(engine, engine.add(PROMPT, GREEDY))
    other = engine.add(PROMPT, GREEDY, adapter="a")
    run(engine, other)
    same = engine.add(PROMPT, GREEDY, adapter="a")
    run(engine, same)
    assert (other.cached_tokens, same.cached_tokens) == (0, 20)


@pytest.mark.parametrize(
    ("rope_type", "first", "second", "cached"),
    [
        ("longrope", 2, 3, 20),
        ("longrope", 3, 4, 0),
        ("longrope", 5, 9, 20),
        ("dynamic", 1, 3, 20),
        ("dynamic", 4, 5, 0),
        ("default", 2, 40, 20),
    ],
)
def test_blocks_are_shared_only_under_equal_rotary_frequencies(rope_type: str, first: int, second: int, cached: int) -> None:
    """The prompt has 21 tokens and the original context 24: one request may stay within it and the other not."""
    backend = FakeBackend(tiny_config(rope_type=rope_type))
    engine = Engine(backend)
    run(engine, engine.add(PROMPT, SamplingParams(temperature=0, max_tokens=first)))
    params = SamplingParams(temperature=0, max_tokens=second)
    sequence = engine.add(PROMPT, params)
    run(engine, sequence)
    assert sequence.cached_tokens == cached
    assert sequence.token_ids.tolist() == backend.reply(PROMPT, params, seed=0)


def test_aborting_keeps_the_prefix_and_the_engine() -> None:
    backend = FakeBackend(tiny_config())
    engine = Engine(backend, prefill_chunk=8)
    sequence = engine.add(PROMPT, GREEDY)
    waiting = engine.add([5, 5], GREEDY)
    engine.step()
    engine.step()
    engine.abort(sequence)
    engine.abort(sequence)
    engine.abort(waiting)
    assert sequence.finish_reason == waiting.finish_reason == "abort"
    assert sequence.num_generated == 0
    assert_nothing_leaked(engine)
    again = engine.add(PROMPT, GREEDY)
    run(engine, again)
    assert again.cached_tokens == 16
    assert again.token_ids.tolist() == backend.reply(PROMPT, GREEDY, seed=0)


@pytest.mark.parametrize("stateful", [False, True])
@pytest.mark.parametrize("broken", range(1, 8))
def test_a_step_that_is_broken_off_can_be_repeated(broken: int, stateful: bool) -> None:
    backend = FakeBackend(tiny_config((None, 5)), stateful=stateful)
    engine = Engine(backend, prefill_chunk=8)
    sequence = engine.add(PROMPT, GREEDY)
    backend.fail_at = broken
    with pytest.raises(KeyboardInterrupt):
        run(engine, sequence)
    run(engine, sequence)
    assert sequence.token_ids.tolist() == backend.reply(PROMPT, GREEDY, seed=0)
    assert_nothing_leaked(engine)


def test_logits_that_are_no_numbers_end_their_own_sequence_only() -> None:
    backend = FakeBackend(tiny_config())
    engine = Engine(backend)
    backend.poisoned = {22}
    bad, good = engine.add([1, 22], GREEDY), engine.add([1, 2], GREEDY)
    engine.step()
    assert [(sequence.finish_reason, sequence.num_generated) for sequence in (bad, good)] == [("error", 0), (None, 1)]
    assert "position 2 is nan" in str(bad.error)
    run(engine, good)
    assert_nothing_leaked(engine)


def test_what_never_fits_is_refused_with_the_numbers() -> None:
    engine = Engine(FakeBackend(tiny_config(max_positions=24)))
    with pytest.raises(ContextOverflow, match=r"prompt has 24 tokens and the model's context holds 24.*: 1 too many"):
        engine.add([1] * 24, SamplingParams())
    with pytest.raises(
        ContextOverflow, match=r"max_tokens 10 it needs 30 and the model's context holds 24: 6 too many. Lower max_tokens to 4"
    ):
        engine.add([1] * 20, SamplingParams(max_tokens=10))
    engine = Engine(FakeBackend(tiny_config(max_positions=24)), max_cache_tokens=17)
    with pytest.raises(ContextOverflow, match=r"max_tokens 10 it needs 20 and the KV cache holds 16: 4 too many. Lower max_tokens to 6"):
        engine.add([1] * 10, SamplingParams(max_tokens=10))
    assert not engine.busy


def test_windows_alone_hold_any_length() -> None:
    """A model without full attention needs no more cache for a longer text."""
    backend = FakeBackend(tiny_config((6,)))
    engine = Engine(backend, max_cache_tokens=16, prefill_chunk=3)
    params = SamplingParams(temperature=0, max_tokens=60)
    sequence = engine.add(PROMPT, params)
    run(engine, sequence)
    assert sequence.token_ids.tolist() == backend.reply(PROMPT, params, seed=0)


def test_nobody_waits_for_a_prefix_that_a_window_has_left_behind() -> None:
    backend = FakeBackend(tiny_config((6,)))
    engine = Engine(backend, max_cache_tokens=24, prefill_chunk=4)
    first = engine.add(PROMPT, SamplingParams(temperature=0, max_tokens=60))
    while first.num_generated < 30:
        engine.step()
    second = engine.add(PROMPT, GREEDY)
    engine.step()
    assert second in engine.scheduler.running
    assert second.cached_tokens == 0
    run(engine, first, second)
    assert second.token_ids.tolist() == backend.reply(PROMPT, GREEDY, seed=0)


def test_without_max_tokens_the_reply_fills_the_context() -> None:
    engine = Engine(FakeBackend(tiny_config(max_positions=32)))
    sequence = engine.add(PROMPT, SamplingParams(temperature=0))
    run(engine, sequence)
    assert (sequence.length, sequence.finish_reason) == (32, "length")


def test_what_does_not_fit_now_waits_and_is_not_overtaken() -> None:
    engine = Engine(FakeBackend(tiny_config()), max_cache_tokens=40)
    running = engine.add([1] * 20, SamplingParams(temperature=0, max_tokens=8))
    large = engine.add([2] * 20, SamplingParams(temperature=0, max_tokens=8))
    small = engine.add([3], SamplingParams(temperature=0, max_tokens=2))
    engine.step()
    assert engine.scheduler.running == [running]
    run(engine, running)
    assert large.started_at is None
    run(engine, large, small)
    assert large.started_at is not None
    assert small.started_at is not None
    assert large.started_at < small.started_at
    assert_nothing_leaked(engine)


def test_shared_blocks_make_room_for_more_requests() -> None:
    """Three requests of 28 tokens in a cache of 48: they fit at once because they share 20."""
    engine = Engine(FakeBackend(tiny_config()), max_cache_tokens=48)
    samples = engine.add_samples(PROMPT, SamplingParams(temperature=0, max_tokens=7, n=3))
    engine.step()
    engine.step()
    assert engine.scheduler.running == samples
    run(engine, *samples)
    assert_nothing_leaked(engine)


def test_only_the_last_prompt_token_is_asked_for_logits_and_replies_go_on_meanwhile() -> None:
    backend = FakeBackend(tiny_config())
    engine = Engine(backend, prefill_chunk=8)
    early = engine.add([1, 2], SamplingParams(temperature=0, max_tokens=30))
    engine.step()
    assert early.num_generated == 1
    late = engine.add(PROMPT, GREEDY)
    computed = []
    lengths = []
    for _ in range(4):
        before = backend.computed
        engine.step()
        computed.append(backend.computed - before)
        lengths.append((early.num_generated, late.num_generated))
    assert computed == [9, 9, 6, 2]
    assert lengths == [(2, 0), (3, 0), (4, 1), (5, 2)]


def test_ids_stay_consecutive_while_sequences_grow_side_by_side() -> None:
    backend = FakeBackend(tiny_config(max_positions=400))
    engine = Engine(backend)
    sequences = [engine.add([token], SamplingParams(temperature=0, max_tokens=4 * AHEAD)) for token in (1, 2)]
    run(engine, *sequences)
    for row in backend.tables[0]:
        assert (np.diff(row) == 1).all()


def test_cache_bytes_are_a_bound_on_all_groups() -> None:
    backend = FakeBackend(tiny_config((None, 5)))
    engine = Engine(backend, cache_bytes=20_000, prefill_chunk=4)
    used = sum(pool.num_blocks * backend.block_bytes(group) for group, pool in enumerate(engine.cache.pools))
    assert 20_000 - 2 * backend.block_bytes(0) < used <= 20_000
    with pytest.raises(UsageError, match="less than one block"):
        Engine(backend, cache_bytes=100)
    with pytest.raises(UsageError, match="give one"):
        Engine(backend, cache_bytes=100, max_cache_tokens=100)


def test_ids_outside_the_vocabulary_and_empty_prompts_are_refused() -> None:
    engine = Engine(FakeBackend(tiny_config()))
    for prompt in ([], np.array([], dtype=np.int32)):
        with pytest.raises(UsageError, match="no tokens"):
            engine.add(prompt, GREEDY)
    with pytest.raises(UsageError, match="23 in the prompt is not in the model's vocabulary of 23"):
        engine.add([1, 23], GREEDY)
    with pytest.raises(UsageError, match="-1 in the prompt"):
        engine.add(np.array([-1]), GREEDY)
    with pytest.raises(UsageError, match="flat list of integers"):
        engine.add([0.5], GREEDY)  # type: ignore[list-item]
    with pytest.raises(UsageError, match="99 in logit_bias"):
        engine.add([1], SamplingParams(logit_bias={99: 1.0}))


def test_eos_ends_a_reply_unless_ignored_or_too_early() -> None:
    backend = FakeBackend(tiny_config())
    engine = Engine(backend)
    reply = backend.reply(PROMPT, GREEDY, seed=0)
    eos = reply[2]
    stopped = engine.add(PROMPT, GREEDY, eos_ids=[eos])
    ignored = engine.add(PROMPT, dataclasses.replace(GREEDY, ignore_eos=True), eos_ids=[eos])
    later = engine.add(PROMPT, dataclasses.replace(GREEDY, min_tokens=5), eos_ids=[eos])
    run(engine, stopped, ignored, later)
    assert (stopped.token_ids.tolist(), stopped.finish_reason) == (reply[: reply.index(eos) + 1], "stop")
    assert (ignored.token_ids.tolist(), ignored.finish_reason) == (reply, "length")
    assert eos not in later.token_ids[:5].tolist()


def test_times_and_logprobs_are_kept() -> None:
    engine = Engine(FakeBackend(tiny_config()))
    sequence = engine.add(PROMPT, SamplingParams(temperature=0, max_tokens=4, logprobs=3))
    assert sequence.time_to_first_token is None
    assert sequence.decode_seconds is None
    run(engine, sequence)
    assert sequence.started_at is not None
    assert sequence.time_to_first_token is not None
    assert sequence.decode_seconds is not None
    assert 0 < sequence.started_at - sequence.added_at < sequence.time_to_first_token
    assert sequence.decode_seconds > 0
    assert sequence.logprobs is not None
    assert [entry.token for entry in sequence.logprobs] == sequence.token_ids.tolist()
    assert all(entry.top[0] == (entry.token, entry.logprob) and len(entry.top) == 3 for entry in sequence.logprobs)


def test_states_are_kept_at_intervals_at_the_end_of_a_prompt_and_of_a_reply() -> None:
    backend = FakeBackend(tiny_config(), stateful=True)
    engine = Engine(backend, max_cache_tokens=400, prefill_chunk=13, state_interval=8)
    first = engine.add(PROMPT, SamplingParams(temperature=0, max_tokens=12))
    run(engine, first)
    assert engine.cache.states is not None
    hashes = engine.cache.open(first.cache.root, first.ids[:32], 32).hashes
    assert set(engine.cache.states.known) == {hashes[blocks - 1] for blocks in (2, 4, 5, 6, 8)}
    for length, cached in [(9, 8), (15, 8), (18, 16), (21, 20)]:  # a prompt that shares so many tokens
        prompt = [*PROMPT[:length], 22]
        sequence = engine.add(prompt, GREEDY)
        run(engine, sequence)
        assert sequence.cached_tokens == cached
        assert sequence.token_ids.tolist() == backend.reply(prompt, GREEDY, seed=0)


def test_the_state_used_longest_ago_is_forgotten_first() -> None:
    backend = FakeBackend(tiny_config(), stateful=True)
    engine = Engine(backend, max_cache_tokens=396, state_interval=400)  # four slots
    one = SamplingParams(temperature=0, max_tokens=1)
    prompts = [[token] * 9 for token in range(4)]
    cached = []
    for index in (0, 1, 2, 0, 3, 0, 1):
        sequence = engine.add(prompts[index], one)
        run(engine, sequence)
        cached.append(sequence.cached_tokens)
    # A prompt leaves the state at its 8th token. With the slots of its own step, two or three others are kept.
    assert cached == [0, 0, 0, 8, 0, 8, 0]
    assert_nothing_leaked(engine)


def test_state_slots_bound_how_many_run_and_count_among_the_bytes() -> None:
    backend = FakeBackend(tiny_config(), stateful=True)
    engine = Engine(backend, max_cache_tokens=400)
    sequences = [engine.add([token], GREEDY) for token in range(3)]
    engine.step()
    assert engine.scheduler.running == sequences[:2]
    run(engine, *sequences)
    assert [sequence.token_ids.tolist() for sequence in sequences] == [backend.reply([token], GREEDY, seed=0) for token in range(3)]
    backend.state_bytes = 4000
    engine = Engine(backend, cache_bytes=20_000)
    used = engine.cache.pools[0].num_blocks * backend.block_bytes(0)
    assert 20_000 - 16_000 - backend.block_bytes(0) < used <= 20_000 - 16_000
