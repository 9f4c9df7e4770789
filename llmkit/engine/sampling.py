"""From logits to a token: small pure functions on one row of logits, and the randomness behind a draw.

The order is that of `transformers` (`GenerationMixin._get_logits_processor`): logit_bias, repetition
penalty, presence and frequency penalty, min_tokens, then temperature, top_k, top_p, min_p. A mask of
structured decoding belongs before all of them. Every function takes float logits `[vocab]` and returns a
new array; a removed token is -inf.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from llmkit.errors import LLMKitError, UsageError

Logits = NDArray[np.float32]
Tokens = NDArray[np.int32]


@dataclass(frozen=True)
class SamplingParams:
    """How one request is sampled; a value out of range raises UsageError with its name."""

    temperature: float = 1.0  # 0: greedy
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off
    min_p: float = 0.0  # 0: off
    repetition_penalty: float = 1.0  # 1: off; over prompt and reply
    presence_penalty: float = 0.0  # over the reply
    frequency_penalty: float = 0.0  # over the reply
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # token id -> added to its logit
    seed: int | None = None  # None: a fresh one, recorded in `Sequence.seed`
    max_tokens: int | None = None  # None: until the context is full
    min_tokens: int = 0  # until then no token that ends the reply is drawn
    stop: tuple[str, ...] = ()  # acted on where there is text (`llm.py`), not in the engine
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None  # None: off; k: the chosen token and the k likeliest
    n: int = 1  # replies to one prompt

    def __post_init__(self) -> None:
        stop: Any = self.stop  # one string is what OpenAI's API allows too
        object.__setattr__(self, "stop", (stop,) if isinstance(stop, str) else _as_tuple("stop", stop))
        object.__setattr__(self, "stop_token_ids", _as_tuple("stop_token_ids", self.stop_token_ids))
        _check_number("temperature", self.temperature, 0.0, None)
        _check_integer("top_k", self.top_k, 0)
        _check_number("top_p", self.top_p, 0.0, 1.0)
        _check_number("min_p", self.min_p, 0.0, 1.0)
        _check_number("repetition_penalty", self.repetition_penalty, 0.0, None)
        if self.repetition_penalty == 0:
            raise UsageError("repetition_penalty is 0, which would divide by zero; 1 switches it off.")
        _check_number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        if not isinstance(self.logit_bias, Mapping):
            raise UsageError(f"logit_bias is {self.logit_bias!r}; it must map token ids to numbers.")
        for token, bias in self.logit_bias.items():
            _check_integer("logit_bias (a token id)", token, 0, 2**31 - 1)
            _check_number(f"logit_bias[{token}]", bias, -1e30, 1e30)  # sums stay finite in float32
        if self.seed is not None:
            _check_integer("seed", self.seed, 0, 2**64 - 1)
        if self.max_tokens is not None:
            _check_integer("max_tokens", self.max_tokens, 1)
        _check_integer("min_tokens", self.min_tokens, 0)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise UsageError(
                f"min_tokens is {self.min_tokens} but max_tokens only {self.max_tokens}; lower min_tokens or raise max_tokens."
            )
        if not all(isinstance(text, str) and text for text in self.stop):
            raise UsageError(f"stop is {self.stop!r}; give one or several strings, none of them empty.")
        for token in self.stop_token_ids:
            _check_integer("stop_token_ids (a token id)", token, 0)
        if not isinstance(self.ignore_eos, bool | np.bool_):
            raise UsageError(f"ignore_eos is {self.ignore_eos!r}; it must be True or False.")
        if self.logprobs is not None:
            _check_integer("logprobs", self.logprobs, 0)
        _check_integer("n", self.n, 1)

    @property
    def changes_logits(self) -> bool:
        """Whether the likeliest token may not be the one with the largest raw logit."""
        return bool(self.logit_bias or self.repetition_penalty != 1.0 or self.presence_penalty or self.frequency_penalty or self.min_tokens)


class TokenLogprobs(NamedTuple):
    """Natural log probabilities under the model's own distribution (temperature 1, nothing removed), as OpenAI reports them."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]  # (token, logprob), likeliest first


def logit_bias(logits: Logits, bias: Mapping[int, float]) -> Logits:
    """Adds to the logits of single tokens. Source: OpenAI API reference, `logit_bias`."""
    logits = logits.copy()
    for token, value in bias.items():
        logits[token] += value
    return logits


def repetition_penalty(logits: Logits, history: Tokens, penalty: float) -> Logits:
    """Divides positive and multiplies negative logits of the tokens in `history` (prompt and reply).

    Source: CTRL, arXiv:1909.05858, section 4.1, in the sign-aware form of `RepetitionPenaltyLogitsProcessor`.
    """
    logits = logits.copy()
    seen = logits[history]
    logits[history] = np.where(seen < 0, seen * np.float32(penalty), seen / np.float32(penalty))
    return logits


def presence_frequency_penalty(logits: Logits, generated: Tokens, presence: float, frequency: float) -> Logits:
    """Subtracts `presence` once and `frequency` per occurrence for tokens in `generated` (the reply alone).

    Source: OpenAI API guide, "Frequency and presence penalties".
    """
    logits = logits.copy()
    tokens, counts = np.unique(generated, return_counts=True)
    logits[tokens] -= (presence + frequency * counts).astype(logits.dtype)
    return logits


def ban(logits: Logits, tokens: Iterable[int]) -> Logits:
    """Removes `tokens` (ids beyond the vocabulary are no token of this model and are passed over)."""
    logits = logits.copy()
    logits[[token for token in tokens if 0 <= token < len(logits)]] = -np.inf
    return logits


def temperature(logits: Logits, value: float) -> Logits:
    """Divides by the temperature, as `TemperatureLogitsWarper`; a quotient beyond float32 becomes infinite."""
    divisor = max(value, float(np.finfo(np.float32).tiny))  # one that float32 rounds to zero would make 0 / 0 of the likeliest
    with np.errstate(over="ignore"):
        return (logits / divisor).astype(logits.dtype, copy=False)


def top_k(logits: Logits, k: int) -> Logits:
    """Keeps the k largest, and whatever equals the smallest of them, as `TopKLogitsWarper`.

    Source: Hierarchical Neural Story Generation, arXiv:1805.04833, section 5.4.
    """
    if k >= len(logits):
        return logits
    return _keep_from(logits, np.partition(logits, len(logits) - k)[len(logits) - k])


def top_p(logits: Logits, p: float) -> Logits:
    """Keeps the likeliest tokens that together reach probability p, as `TopPLogitsWarper`; equals of the last one stay too.

    Only tokens that could survive are sorted: those of at most (1 - p) / vocab each weigh at most 1 - p together.
    Source: The Curious Case of Neural Text Degeneration, arXiv:1904.09751, section 3.1.
    """
    largest = logits.max()
    weights = _weights(logits, largest)
    removable = (1.0 - p) * float(weights.sum(dtype=np.float64))
    large = weights > removable / len(weights)
    candidates = np.sort(logits[large])
    below = float(weights.sum(where=~large, dtype=np.float64))
    reached = below + np.cumsum(_weights(candidates, largest), dtype=np.float64)
    first_kept = int(np.searchsorted(reached, removable, side="right"))
    return _keep_from(logits, candidates[first_kept] if first_kept < len(candidates) else largest)


def min_p(logits: Logits, p: float) -> Logits:
    """Keeps tokens at least p times as likely as the likeliest, as `MinPLogitsWarper`. Source: arXiv:2407.01082."""
    return _keep_from(logits, logits.max() + math.log(p))


def process(logits: Logits, params: SamplingParams, history: Tokens, prompt_length: int, end_ids: Iterable[int] = ()) -> Logits:
    """All processors that `params` asks for, in order.

    Args:
        logits: float32 `[vocab]`, raw.
        history: int32 `[length]`, prompt and reply so far.
        prompt_length: how much of `history` is prompt.
        end_ids: tokens that would end the reply; removed until `min_tokens` are there.
    """
    generated = history[prompt_length:]
    if params.logit_bias:
        logits = logit_bias(logits, params.logit_bias)
    if params.repetition_penalty != 1.0:
        logits = repetition_penalty(logits, history, params.repetition_penalty)
    if (params.presence_penalty or params.frequency_penalty) and len(generated):
        logits = presence_frequency_penalty(logits, generated, params.presence_penalty, params.frequency_penalty)
    if len(generated) < params.min_tokens:
        logits = ban(logits, end_ids)
    if params.temperature == 0:
        return logits
    if params.temperature != 1.0:
        # The shift leaves the distribution as it is and lets a tiny temperature underflow instead of overflow.
        logits = temperature(logits - logits.max(), params.temperature)
    if params.top_k:
        logits = top_k(logits, params.top_k)
    if params.top_p < 1.0:
        logits = top_p(logits, params.top_p)
    if params.min_p:
        logits = min_p(logits, params.min_p)
    return logits


def uniform(seed: int, sample_index: int, position: int) -> float:
    """The uniform draw in [0, 1) for one token: a function of its arguments alone, so batch and order do not matter.

    The first 64-bit word of numpy's Philox4x64-10 with key (seed, sample_index) and counter (position, 0, 0, 0), its
    upper 53 bits over 2**53. Source: Parallel Random Numbers: As Easy as 1, 2, 3 (SC 2011).
    """
    key = np.array([seed, sample_index], dtype=np.uint64)
    counter = np.array([position, 0, 0, 0], dtype=np.uint64)
    word = np.random.Philox(counter=counter, key=key).random_raw()
    return (int(word) >> 11) * 2.0**-53


def fresh_seed() -> int:
    """A seed nobody asked for; small enough to be typed again."""
    return int.from_bytes(os.urandom(4), "little")


def choose(logits: Logits, draw: float) -> int:
    """The token at quantile `draw` of softmax(logits), tokens in the order of their ids: the inverse CDF.

    Weights are float32, their sums float64. Sums over runs of tokens find the run, so that only one run is summed up token by token.
    """
    run = 512
    weights = _weights(logits, logits.max())
    ends = np.cumsum(np.add.reduceat(weights, np.arange(0, len(weights), run), dtype=np.float64))
    target = draw * ends[-1]
    # The minimum: draw * total may round up to the total, and then the first place that reaches it is the last with any weight.
    which = min(int(np.searchsorted(ends, target, side="right")), int(np.searchsorted(ends, ends[-1])))
    start = which * run
    cdf = np.cumsum(weights[start : start + run], dtype=np.float64)
    target -= ends[which - 1] if which else 0.0
    return start + min(int(np.searchsorted(cdf, target, side="right")), int(np.searchsorted(cdf, cdf[-1])))


def check_finite(largest: float, position: int) -> None:
    """Raises LLMKitError for a row whose largest logit is not a number (numpy's argmax finds NaN first), or infinite."""
    if not math.isfinite(largest):
        raise LLMKitError(
            f"The model's largest logit at position {position} is {largest}, so no token can be chosen. "
            "The weights may be damaged or overflow in this dtype: check them with `llmkit verify` or load with dtype float32."
        )


def sample(
    logits: Logits,
    params: SamplingParams,
    history: Tokens,
    prompt_length: int,
    seed: int,
    sample_index: int = 0,
    end_ids: Iterable[int] = (),
) -> int:
    """Draws the token that follows `history`. The reference for backends that sample on their own device.

    Args:
        logits: float32 `[vocab]`, raw.
        history: int32 `[length]`; its length is the position of the new token and the counter of the draw.
        prompt_length: how much of `history` is prompt.
        seed: the request's seed (`params.seed`, or the fresh one it was given).
        sample_index: which of the n samples this is.
        end_ids: tokens that would end the reply (for min_tokens).

    Raises:
        LLMKitError: the logits are NaN or +inf, or no token is left to draw.
    """
    position = len(history)
    check_finite(float(logits[logits.argmax()]), position)
    processed = process(logits, params, history, prompt_length, end_ids)
    likeliest = int(processed.argmax())
    if not math.isfinite(processed[likeliest]):
        raise LLMKitError(f"No token is left to draw at position {position}. Loosen logit_bias, min_tokens or the penalties.")
    if params.temperature == 0:
        return likeliest
    return choose(processed, uniform(seed, sample_index, position))


def token_logprobs(logits: Logits, token: int, k: int) -> TokenLogprobs:
    """Log probability of `token` and of the k likeliest tokens under softmax of the raw `logits` `[vocab]`."""
    largest = logits.max()
    log_total = float(largest) + math.log(_weights(logits, largest).sum(dtype=np.float64))
    k = min(k, len(logits))
    ids = np.argpartition(logits, len(logits) - k)[len(logits) - k :] if k else np.empty(0, dtype=np.int64)
    ids = ids[np.lexsort((ids, -logits[ids]))]
    return TokenLogprobs(token, float(logits[token]) - log_total, tuple((int(i), float(logits[i]) - log_total) for i in ids))


def log_softmax(logits: Logits) -> NDArray[np.float64]:
    """Return the natural log probabilities of logits `[..., vocab]`, in float64: what texts are scored with."""
    wide = logits.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(-1, keepdims=True))


def _weights(logits: Logits, largest: np.floating[Any]) -> Logits:
    """Probabilities up to their sum; in one new array, because fresh memory costs more than the arithmetic."""
    weights: Logits = logits - largest
    return np.exp(weights, out=weights)


def _keep_from(logits: Logits, smallest: float | np.floating[Any]) -> Logits:
    return np.where(logits >= smallest, logits, logits.dtype.type(-np.inf))


def _as_tuple(name: str, values: Any) -> tuple[Any, ...]:
    try:
        return tuple(values)
    except TypeError:
        raise UsageError(f"{name} is {values!r}; it must be a list.") from None


def _check_integer(name: str, value: object, low: int, high: int | None = None) -> None:
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not (whole and _within(value, low, high)):
        raise UsageError(
            f"{name} is {value!r}; it must be an integer" + (f" from {low} up." if high is None else f" from {low} to {high}.")
        )


def _check_number(name: str, value: object, low: float | None, high: float | None) -> None:
    number = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    if not (number and math.isfinite(cast(float, value)) and _within(value, low, high)):
        bounds = ("" if low is None else f" from {low:g}") + ("" if high is None else f" to {high:g}")
        raise UsageError(f"{name} is {value!r}; it must be a finite number{bounds}.")


def _within(value: Any, low: float | None, high: float | None) -> bool:
    return (low is None or value >= low) and (high is None or value <= high)
