"""What a model answers with: small typed results. Plain data, no torch."""

from __future__ import annotations

import html
import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

# "stop": an end-of-text token, a stop token or a stop string; "length": max_tokens or the end of the context;
# "interrupted": the reader closed the stream or pressed Ctrl-C.
FinishReason = Literal["stop", "length", "interrupted"]


@dataclass(frozen=True)
class Usage:
    """How many tokens a request took. `cached_tokens` are those of the prompt that were not computed again."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    drafted_tokens: int = 0  # guessed ahead by speculation
    accepted_tokens: int = 0  # of those, how many were right

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True)
class Timings:
    """Seconds, and tokens per second. A rate is None where nothing was measured (one token has no decode rate)."""

    time_to_first_token: float | None = None
    total: float | None = None  # from the request to its last token; None while it runs
    prefill_tok_s: float | None = None  # computed (not cached) prompt tokens / time to first token
    decode_tok_s: float | None = None  # tokens after the first / the time they took

    def __str__(self) -> str:
        parts = []
        if self.time_to_first_token is not None:
            parts.append(f"first token {self.time_to_first_token:.2f} s")
        if self.prefill_tok_s is not None:
            parts.append(f"prefill {self.prefill_tok_s:.0f} tok/s")
        if self.decode_tok_s is not None:
            parts.append(f"decode {self.decode_tok_s:.1f} tok/s")
        return ", ".join(parts)


@dataclass(frozen=True)
class TokenLogprob:
    """The natural-log probability of one token under the model, and of its most likely alternatives."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # (token id, logprob), the most likely first


@dataclass(frozen=True)
class Chunk:
    """One piece of a streamed reply; `print(chunk, end="")` writes its text."""

    text: str
    token_ids: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None  # set on the last chunk only

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Completion:
    """One reply. `token_ids` are the new tokens only, a closing end-of-text or stop token included; `text` is without it.

    Where a stop string cut the text, `token_ids` ends with the token that holds the last character kept.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage
    timings: Timings
    seed: int | None = None  # None: greedy
    logprobs: tuple[TokenLogprob, ...] | None = None  # one per token of token_ids, where asked for

    def __str__(self) -> str:
        return self.text

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON-ready data."""
        return asdict(self) | {"token_ids": list(self.token_ids)}

    def summary(self) -> str:
        """Counts and speed in one line."""
        usage = self.usage
        counts = f"{usage.prompt_tokens} prompt tokens ({usage.cached_tokens} cached), {usage.completion_tokens} new ({self.finish_reason})"
        if usage.drafted_tokens:
            counts += f", {usage.accepted_tokens} of {usage.drafted_tokens} guesses right"
        return f"{counts}, {self.timings}" if str(self.timings) else counts

    def _repr_html_(self) -> str:
        return (
            f'<div style="white-space: pre-wrap">{html.escape(self.text)}</div>'
            f'<div style="color: gray; font-size: smaller">{html.escape(self.summary())}</div>'
        )


@dataclass(frozen=True)
class Score:
    """How likely a text is. The first token has no predecessor and is not scored (with a BOS that is the BOS itself)."""

    token_ids: tuple[int, ...]
    token_logprobs: tuple[float, ...]  # natural log, of token_ids[1:]
    num_bytes: int | None  # UTF-8 bytes that the scored tokens stand for; None without a tokenizer

    @property
    def log_likelihood(self) -> float:
        """Sum of the token log probabilities, in nats."""
        return math.fsum(self.token_logprobs)

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log probability of a scored token."""
        return math.exp(-self.log_likelihood / len(self.token_logprobs)) if self.token_logprobs else math.nan

    @property
    def bits_per_byte(self) -> float | None:
        """Bits needed for one byte of the text; comparable between tokenizers. None without a tokenizer."""
        if not self.num_bytes:
            return None
        return -self.log_likelihood / math.log(2) / self.num_bytes

    def __repr__(self) -> str:
        bits = "" if self.bits_per_byte is None else f", bits_per_byte={self.bits_per_byte:.4f}"
        return f"Score({len(self.token_logprobs)} tokens, log_likelihood={self.log_likelihood:.4f}, perplexity={self.perplexity:.4f}{bits})"
