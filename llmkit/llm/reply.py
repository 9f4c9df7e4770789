"""One reply in the making: the tokens of one sequence become text. No torch.

Streams and whole replies go through this one state machine, so they cannot differ: characters are complete, stop strings
are held back and cut, token ids go out together with their text.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque

from llmkit.engine.backend import Sequence
from llmkit.engine.engine import Engine
from llmkit.llm.outputs import Chunk, Completion, FinishReason, Timings, TokenLogprob, Usage
from llmkit.text.stream import StopScanner
from llmkit.text.tokenizer import Tokenizer

PRIMER = 64  # last tokens of the prompt, enough to tell the decoder whether a text has begun


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
        """End the reply here; what was said is kept."""
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
