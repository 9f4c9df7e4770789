"""Samplers against transformers' processors, element by element, and against the probabilities they should have."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from llmkit.engine import sampling
from llmkit.engine.sampling import SamplingParams, process, sample, token_logprobs
from llmkit.errors import LLMKitError, UsageError

NOTHING = np.empty(0, dtype=np.int32)


def random_logits(seed: int, vocab: int = 500, scale: float = 3.0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=vocab) * scale).astype(np.float32)


def theirs(processor: Any, logits: np.ndarray, history: np.ndarray = NOTHING) -> np.ndarray:
    return processor(torch.from_numpy(history).long()[None], torch.from_numpy(logits)[None])[0].numpy()


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), value=st.floats(0.01, 20))
def test_temperature_is_transformers(seed: int, value: float) -> None:
    logits = random_logits(seed)
    np.testing.assert_allclose(sampling.temperature(logits, value), theirs(TemperatureLogitsWarper(value), logits), rtol=1e-6)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), k=st.integers(1, 600), rounded=st.booleans())
def test_top_k_is_transformers(seed: int, k: int, rounded: bool) -> None:
    logits = random_logits(seed)
    if rounded:  # many equal logits
        logits = np.round(logits)
    np.testing.assert_array_equal(sampling.top_k(logits, k), theirs(TopKLogitsWarper(k), logits))


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32), p=st.floats(0, 1), scale=st.sampled_from([0.1, 1.0, 3.0, 20.0]), removed=st.booleans())
def test_top_p_is_transformers(seed: int, p: float, scale: float, removed: bool) -> None:
    logits = random_logits(seed, scale=scale)
    if removed:
        logits[::3] = -np.inf
    ours, reference = sampling.top_p(logits, p), theirs(TopPLogitsWarper(p), logits)
    different = ours != reference
    if different.any():
        # Only a token whose cumulative probability is the threshold itself, within float32, may fall on either side.
        weights = np.exp(logits.astype(np.float64) - logits.max())
        weights /= weights.sum()
        for token in np.flatnonzero(different):
            assert abs(weights[logits <= logits[token]].sum() - (1 - p)) < 2e-6 or weights[token] < 1e-7


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), p=st.floats(1e-4, 1))
def test_min_p_is_transformers(seed: int, p: float) -> None:
    logits = random_logits(seed)
    ours, reference = sampling.min_p(logits, p), theirs(MinPLogitsWarper(p), logits)
    for token in np.flatnonzero(ours != reference):  # at the threshold itself, within float32
        assert math.exp(logits[token] - logits.max()) == pytest.approx(p, rel=1e-5)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), penalty=st.floats(0.1, 5), history=st.lists(st.integers(0, 499), min_size=1, max_size=80))
def test_repetition_penalty_is_transformers(seed: int, penalty: float, history: list[int]) -> None:
    logits, ids = random_logits(seed), np.array(history, dtype=np.int32)
    reference = theirs(RepetitionPenaltyLogitsProcessor(penalty), logits, ids)
    np.testing.assert_allclose(sampling.repetition_penalty(logits, ids, penalty), reference, rtol=1e-6)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_the_whole_chain_is_transformers_in_its_order(seed: int) -> None:
    logits, history = random_logits(seed), np.random.default_rng(seed).integers(0, 500, 40).astype(np.int32)
    params = SamplingParams(temperature=0.7, top_k=30, top_p=0.9, min_p=0.05, repetition_penalty=1.2)
    chain = LogitsProcessorList(
        [
            RepetitionPenaltyLogitsProcessor(1.2),
            TemperatureLogitsWarper(0.7),
            TopKLogitsWarper(30),
            TopPLogitsWarper(0.9),
            MinPLogitsWarper(0.05),
        ]
    )
    ours, reference = process(logits, params, history, 10), theirs(chain, logits, history)
    np.testing.assert_array_equal(ours > -np.inf, reference > -np.inf)
    kept = ours > -np.inf
    # Ours is shifted by a constant, which a softmax does not see.
    np.testing.assert_allclose(ours[kept] - ours.max(), reference[kept] - reference.max(), atol=1e-4)


def test_presence_and_frequency_count_the_reply_alone() -> None:
    logits, history = np.zeros(6, dtype=np.float32), np.array([0, 0, 1, 2, 2, 2, 3], dtype=np.int32)
    params = SamplingParams(temperature=0, presence_penalty=0.5, frequency_penalty=0.25)
    np.testing.assert_allclose(process(logits, params, history, 2), [0, -0.75, -1.25, -0.75, 0, 0])
    np.testing.assert_array_equal(logits, 0)


def test_logit_bias_comes_first_and_min_tokens_bans_what_ends_the_reply() -> None:
    logits, history = np.array([1, 2, 3, 4], dtype=np.float32), np.array([0, 1], dtype=np.int32)
    params = SamplingParams(temperature=0, logit_bias={0: 5.0}, repetition_penalty=2.0, min_tokens=2)
    np.testing.assert_array_equal(process(logits, params, history, 1, end_ids=[3, 77]), [3, 1, 3, -np.inf])
    np.testing.assert_array_equal(process(logits, params, np.array([0, 1, 1], np.int32), 1, end_ids=[3]), [3, 1, 3, 4])
    with pytest.raises(LLMKitError, match="No token is left"):
        sample(logits, params, history, 1, 0, end_ids=[0, 1, 2, 3])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.5},
        {"top_k": 5},
        {"top_p": 0.8},
        {"min_p": 0.2},
        {"temperature": 1.3, "top_k": 12, "top_p": 0.9, "min_p": 0.02},
    ],
)
def test_draws_follow_the_distribution(options: dict[str, float]) -> None:
    """Chi-square over 4,000 positions of one seed, and over as many seeds: below the 99.9% quantile."""
    logits, params = random_logits(3, vocab=20, scale=1.0), SamplingParams(**options)  # type: ignore[arg-type]
    processed = process(logits, params, NOTHING, 0).astype(np.float64)
    expected = np.exp(processed - processed.max())
    expected *= 4_000 / expected.sum()
    kept = expected > 0
    positions = np.bincount([sampling.choose(processed, sampling.uniform(11, 0, i)) for i in range(4_000)], minlength=20)
    seeds = np.bincount([sample(logits, params, NOTHING, 0, seed) for seed in range(4_000)], minlength=20)
    for counts in (positions, seeds):
        assert counts[~kept].sum() == 0
        freedom = kept.sum() - 1
        quantile = freedom * (1 - 2 / (9 * freedom) + 3.09 * math.sqrt(2 / (9 * freedom))) ** 3  # Wilson and Hilferty
        assert ((counts - expected)[kept] ** 2 / expected[kept]).sum() < quantile


def test_a_draw_depends_on_seed_sample_and_position_alone() -> None:
    draws = {
        (seed, index, position): sampling.uniform(seed, index, position)
        for seed in (0, 1, 2**64 - 1)
        for index in (0, 1)
        for position in (0, 1)
    }
    assert len(set(draws.values())) == len(draws)
    for arguments in reversed(list(draws)):
        assert sampling.uniform(*arguments) == draws[arguments]
    # The stream is part of the product: a seed replays a reply in later versions too.
    assert sampling.uniform(1234, 0, 5) == 0.13291970430737443


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32), vocab=st.integers(1, 3000), draw=st.floats(0, 1, exclude_max=True), scale=st.sampled_from([1.0, 30.0]))
def test_choose_is_the_inverse_of_the_cdf(seed: int, vocab: int, draw: float, scale: float) -> None:
    logits = random_logits(seed, vocab, scale)
    logits[np.random.default_rng(seed).random(vocab) < 0.5] = -np.inf
    logits[vocab // 2] = 1.0
    weights = np.exp(logits.astype(np.float64) - logits.max())
    cdf = np.cumsum(weights) / weights.sum()
    token = sampling.choose(logits, draw)
    assert weights[token] > 0
    assert cdf[token] >= draw - 1e-6
    assert cdf[token] - weights[token] / weights.sum() <= draw + 1e-6


@pytest.mark.parametrize("vocab", [1, 511, 512, 513, 1025])
def test_choose_never_runs_off_the_end(vocab: int) -> None:
    logits = np.full(vocab, -np.inf, dtype=np.float32)
    logits[vocab // 2] = 0.0
    for draw in (0.0, 0.5, 1 - 2**-53, 1.0):
        assert sampling.choose(logits, draw) == vocab // 2


def test_a_tiny_temperature_is_greedy_and_a_huge_one_flat() -> None:
    logits = random_logits(1, vocab=10)
    assert {sample(logits, SamplingParams(temperature=value), NOTHING, 0, seed) for seed in range(20) for value in (1e-45, 1e-300)} == {
        int(logits.argmax())
    }
    assert len({sample(logits, SamplingParams(temperature=1e30), NOTHING, 0, seed) for seed in range(200)}) == 10


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_an_error(wrong: float, temperature: float) -> None:
    logits = random_logits(1)
    logits[7] = wrong
    with pytest.raises(LLMKitError, match=r"largest logit at position 0 is (nan|inf)"):
        sample(logits, SamplingParams(temperature=temperature), NOTHING, 0, 0)
    with pytest.raises(LLMKitError, match="is -inf"):
        sample(np.full(9, -np.inf, dtype=np.float32), SamplingParams(temperature=temperature), NOTHING, 0, 0)


def test_logprobs_are_the_models_own() -> None:
    logits = random_logits(5)
    reference = torch.log_softmax(torch.from_numpy(logits).double(), 0)
    result = token_logprobs(logits, 17, 4)
    assert result.logprob == pytest.approx(float(reference[17]), rel=1e-6)
    top = torch.topk(reference, 4)
    assert [token for token, _ in result.top] == top.indices.tolist()
    np.testing.assert_allclose([logprob for _, logprob in result.top], top.values.numpy(), rtol=1e-6)
    assert token_logprobs(logits, 17, 0).top == ()
    assert len(token_logprobs(logits, 17, 9999).top) == 500
    assert [token for token, _ in token_logprobs(np.zeros(4, np.float32), 0, 4).top] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1), ("temperature", math.nan), ("temperature", "1"), ("top_k", -1), ("top_k", 1.5), ("top_k", True),
        ("top_p", 1.1), ("top_p", -0.1), ("min_p", 2), ("repetition_penalty", 0), ("repetition_penalty", -1), ("presence_penalty", 2.5),
        ("frequency_penalty", -3), ("seed", -1), ("seed", 2**64), ("max_tokens", 0), ("min_tokens", -1), ("stop", ("",)), ("stop", (3,)),
        ("stop_token_ids", (-1,)), ("logprobs", -1), ("n", 0), ("logit_bias", {-1: 1.0}), ("logit_bias", {1: math.inf}),
        ("logit_bias", {"a": 1.0}), ("logit_bias", {1: 1e308}), ("logit_bias", {2**70: 1.0}), ("logit_bias", [1]), ("stop", 3),
        ("stop_token_ids", 3), ("ignore_eos", "no"),
    ],
)  # fmt: skip
def test_wrong_values_are_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(UsageError, match=rf"^{name}.* is "):
        SamplingParams(**{name: value})  # type: ignore[arg-type]


def test_an_id_that_no_token_has_bans_nothing() -> None:
    logits = random_logits(2, vocab=10)
    np.testing.assert_array_equal(sampling.ban(logits, (-1, 10)), logits)  # -1 stands for "none" in some configurations


def test_parameters_are_normalised_and_compared_with_each_other() -> None:
    assert SamplingParams(stop="a").stop == ("a",)  # type: ignore[arg-type]
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")  # type: ignore[arg-type]
    assert SamplingParams(temperature=np.float32(0.5), top_k=np.int64(3)).top_k == 3  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="min_tokens is 5 but max_tokens only 4"):
        SamplingParams(min_tokens=5, max_tokens=4)
