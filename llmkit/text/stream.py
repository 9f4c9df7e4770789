"""Ids to text, one at a time: the only decoder there is, so that a stream and a whole text cannot differ."""

from __future__ import annotations

import codecs

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
        """What is left: U+FFFD for a character that never became whole. The decoder then starts anew."""
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
