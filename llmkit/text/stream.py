"""What happens to a reply's ids on their way to the reader: bytes become characters, and stop strings end the text. No torch."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import TYPE_CHECKING

from llmkit.errors import UsageError

if TYPE_CHECKING:
    from llmkit.text.codec import Codec


class StreamDecoder:
    """Turns ids into text as they come; the pushes and the flush together are `Tokenizer.decode` of all ids.

    A character is given out once all its bytes are there, and never taken back. A push costs the length of its
    token, not of the text so far.
    """

    def __init__(self, codec: Codec, skip: frozenset[int] = frozenset()) -> None:
        self._codec = codec
        self._skip = skip
        self._pending = b""  # the beginning of a character: at most three bytes
        self._first = True
        self._strip = codec.strip_leading

    def push(self, token_id: int) -> str:
        """The text that this id completes, often empty."""
        if token_id in self._skip:
            return ""
        piece = self._codec.piece(token_id, self._first)
        if piece is None:
            return ""
        self._first = False
        self._pending += piece
        return self._take(final=False)

    def flush(self) -> str:
        """What is left: U+FFFD for a character that never became whole. The decoder then starts again."""
        text = self._take(final=True)
        self._first, self._strip = True, self._codec.strip_leading
        return text

    def _take(self, final: bool) -> str:
        text = ""
        while self._pending:
            try:
                whole, used = codecs.utf_8_decode(self._pending, "strict", final)
            except UnicodeDecodeError as error:
                broken = error.end - error.start if self._codec.replace_each_byte else 1
                text += self._pending[: error.start].decode("utf-8") + "\N{REPLACEMENT CHARACTER}" * broken
                self._pending = self._pending[error.end :]
            else:
                text += whole
                self._pending = self._pending[used:]
                break
        while self._strip and text:
            if text[0] != " ":
                self._strip = 0
            else:
                text, self._strip = text[1:], self._strip - 1
        return text


class StopScanner:
    """Passes text on until a stop string is complete, and holds back what may still become one.

    Of several stop strings the one that begins first in the text wins; everything from its beginning on is dropped.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if any(not isinstance(stop, str) or not stop for stop in stops):
            raise UsageError(f"Stop strings {list(stops)!r} hold one that is empty or no text; leave it out.")
        self._stops = tuple(stops)
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> tuple[str, bool]:
        """(text that is safe to show, whether a stop string was met); after a stop nothing more comes out."""
        if self.stopped:
            return "", True
        self._held += text
        found = [at for at in (self._held.find(stop) for stop in self._stops) if at >= 0]
        first_open = self._first_open()
        # A stop that is complete has not won while one that began before it may still be completed.
        if found and min(found) <= first_open:
            shown, self._held, self.stopped = self._held[: min(found)], "", True
            return shown, True
        shown, self._held = self._held[:first_open], self._held[first_open:]
        return shown, False

    def flush(self) -> str:
        """The text held back, once no more is to come; a stop string in it still ends it."""
        held, self._held = self._held, ""
        found = [at for at in (held.find(stop) for stop in self._stops) if at >= 0]
        if found and not self.stopped:
            self.stopped = True
            return held[: min(found)]
        return held

    def _first_open(self) -> int:
        """Where the text begins to be a proper prefix of a stop string; its length if nowhere."""
        for at in range(max(0, len(self._held) - self._longest + 1), len(self._held)):
            tail = self._held[at:]
            if any(stop.startswith(tail) and len(stop) > len(tail) for stop in self._stops):
                return at
        return len(self._held)
