"""What a model answers with: small typed results, and one reply in the making. No torch.

Streams and whole replies go through one state machine (`Reply`), so they cannot differ: characters are complete, stop strings are held
back and cut, token ids go out together with their text.
"""

from __future__ import annotations

import html
import math
from bisect import bisect_left
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from llmkit.text.stream import StopScanner

if TYPE_CHECKING:
    from llmkit.engine.backend import Sequence
    from llmkit.engine.engine import Engine
    from llmkit.text.tokenizer import Tokenizer

PRIMER = 64  # last tokens of the prompt, enough to tell the decoder whether a text has begun

# "stop": an end-of-text token, a stop token or a stop string; "length": max_tokens or the end of the context;
# "interrupted": the reader closed the stream or pressed Ctrl-C.
FinishReason = Literal["stop", "length", "interrupted"]


@dataclass(frozen=True)
class Usage:
    """How many tokens a request took. `cached_tokens` are those of the prompt that were not computed again."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    drafted_tokens: int = 0  # draft tokens of speculation
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
            counts += f", {usage.accepted_tokens} of {usage.drafted_tokens} draft tokens right"
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


class Reply:
    """Reads the tokens off `sequence` as the engine makes them; what may be shown waits in `chunks` until a reader takes it.

    tokenizer: None for a model without one; the reply is then token ids only.
    continues: the reply goes on with the prompt's text, so that a space at its beginning belongs to it; otherwise it is a
        text of its own, as in a chat.
    """

    def __init__(self, sequence: Sequence, tokenizer: Tokenizer | None, *, continues: bool) -> None:
        self.sequence = sequence
        self.chunks: deque[Chunk] = deque()
        self.finish_reason: FinishReason | None = None
        self._decoder = None if tokenizer is None else tokenizer.stream()
        if continues and self._decoder is not None:
            for token in sequence.prompt_ids[-PRIMER:].tolist():
                self._decoder.push(token)
        self._scanner = StopScanner(sequence.params.stop)
        self._ids: list[int] = []  # every token sampled
        self._logprobs: list[TokenLogprob] = []
        self._decoded: list[int] = []  # characters decoded up to each token, those the scanner holds back included
        self._shown: list[str] = []
        self._length = 0  # characters shown
        self._sent = 0  # tokens that went out

    def advance(self, engine: Engine) -> None:
        """Take the tokens that are new, at most one step of the engine's; a stop string ends the sequence.

        Several replies may advance on one engine in turn, from several threads too: a step that one of them asks for serves
        all of them. Raises the sequence's error where the engine gave it up.
        """
        with engine.lock:
            self._advance(engine)

    def _advance(self, engine: Engine) -> None:
        if len(self._ids) == self.sequence.num_generated and self.sequence.finish_reason is None:
            engine.step()
        if self.sequence.error is not None:
            raise self.sequence.error
        for index in range(len(self._ids), self.sequence.num_generated):
            self._push(index)
            if self.finish_reason is not None:
                engine.abort(self.sequence, "stop")
                return

    def _push(self, index: int) -> None:
        sequence = self.sequence
        token = int(sequence.token_ids[index])
        reason = sequence.finish_reason if index + 1 == sequence.num_generated else None
        self._ids.append(token)
        if sequence.logprobs is not None:
            self._logprobs.append(TokenLogprob(token, sequence.logprobs[index].logprob, sequence.logprobs[index].top))
        text, stopped = "", False
        if self._decoder is not None and reason != "stop":  # the token that ends a reply is no text
            decoded = self._decoder.push(token)
            self._decoded.append(len(decoded) + (self._decoded[-1] if self._decoded else 0))
            text, stopped = self._scanner.push(decoded)
        self._show(text)
        if stopped:
            self._finish("stop", cut=True)
        elif reason is not None:
            self._end("length" if reason == "length" else "stop")

    def interrupt(self) -> None:
        """End the reply here; what was generated is kept."""
        if self.finish_reason is None:
            self._end("interrupted")

    def completion(self) -> Completion:
        """The reply as far as it went."""
        sequence = self.sequence
        prefill = decode = None
        if sequence.started_at is not None and sequence.first_token_at is not None:
            seconds = sequence.first_token_at - sequence.started_at
            prefill = (sequence.prompt_length - sequence.cached_tokens) / seconds if seconds else None
        if sequence.decode_seconds and sequence.num_generated > 1:
            decode = (sequence.num_generated - 1) / sequence.decode_seconds
        return Completion(
            text="".join(self._shown),
            token_ids=tuple(self._ids[: self._sent]),
            finish_reason=self.finish_reason or "interrupted",
            usage=Usage(sequence.prompt_length, self._sent, sequence.cached_tokens, sequence.drafted, sequence.accepted),
            timings=Timings(
                time_to_first_token=sequence.time_to_first_token,
                total=sequence.finished_at - sequence.added_at if sequence.finished_at is not None else None,
                prefill_tok_s=prefill,
                decode_tok_s=decode,
            ),
            seed=None if sequence.params.temperature == 0 else sequence.seed,
            logprobs=None if sequence.params.logprobs is None else tuple(self._logprobs[: self._sent]),
        )

    def _end(self, reason: FinishReason) -> None:
        """No more tokens come: what decoder and scanner still hold goes out, up to a stop string in it."""
        if self._decoder is not None:
            text, _ = self._scanner.push(self._decoder.flush())
            self._show(text + self._scanner.flush())
        self._finish("stop" if self._scanner.stopped else reason, cut=self._scanner.stopped)

    def _finish(self, reason: FinishReason, cut: bool) -> None:
        """cut: a stop string ended the reply, and the tokens behind the last character shown are not part of it."""
        self.finish_reason = reason
        sent = self._sent
        if not cut:
            self._sent = len(self._ids)
        self.chunks.append(Chunk("", tuple(self._ids[sent : self._sent]), reason))

    def _show(self, text: str) -> None:
        """Let text out, and with it the tokens up to the one that holds its last character."""
        sent = self._sent
        if text:
            self._shown.append(text)
            self._length += len(text)
        if self._decoder is None:
            self._sent = len(self._ids)
        elif text:
            self._sent = min(bisect_left(self._decoded, self._length) + 1, len(self._ids))
        if self._sent > sent or text:
            self.chunks.append(Chunk(text, tuple(self._ids[sent : self._sent])))


class Stream(Iterator[Chunk]):
    """The chunks of one reply as they are generated. Also a context manager that stops the reply when left."""

    def __init__(self, engine: Engine, reply: Reply) -> None:
        self._engine, self._reply = engine, reply

    @property
    def completion(self) -> Completion:
        """Return what was generated so far; the whole reply once the stream has ended."""
        return self._reply.completion()

    def __next__(self) -> Chunk:
        reply = self._reply
        try:
            while not reply.chunks:
                if reply.finish_reason is not None:
                    raise StopIteration
                reply.advance(self._engine)
        except BaseException:  # Ctrl-C too: a sequence must not go on without a reader
            self.close()
            raise
        return reply.chunks.popleft()

    def close(self) -> None:
        """End the reply now, from any thread; `completion` keeps what was generated."""
        with self._engine.lock:
            self._engine.abort(self._reply.sequence)
            self._reply.interrupt()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()
