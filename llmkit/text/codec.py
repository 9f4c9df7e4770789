"""What every kind of vocabulary offers the tokenizer: text to ids, and one id to bytes."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from tempfile import TemporaryFile
from typing import Protocol

from llmkit.errors import TokenizerError
from llmkit.text.settings import AddedToken

Span = tuple[int, int]  # [start, end) in characters


class Codec(Protocol):
    """A vocabulary of one of the three kinds (tokenizer.json, sentencepiece, tiktoken ranks).

    Decoding is byte by byte so that it can be streamed: the text of some ids is the UTF-8 reading of their
    bytes, less the leading spaces that the tokenizer itself put there.
    """

    vocab_size: int  # every id is below it
    special_ids: frozenset[int]
    roles: Mapping[str, int]  # bos_token, eos_token, ... as the vocabulary itself says; settings override it
    prefix: tuple[int, ...]  # what the vocabulary's own rules put before a text
    suffix: tuple[int, ...]  # and after it
    strip_leading: int  # so many spaces at the beginning of a decoded text are not the text's
    replace_each_byte: bool  # malformed UTF-8: one U+FFFD for each byte (sentencepiece) or for each broken sequence

    def encode(self, text: str, special: bool) -> list[int]:
        """Ids of a text, with nothing added; `special`: special tokens written in the text become their ids."""

    def encode_spans(self, text: str) -> tuple[list[int], list[Span]]:
        """As `encode` with special tokens parsed, and which characters each id stands for."""

    def encode_batch(self, texts: Sequence[str], special: bool) -> list[list[int]]:
        """`encode` of each text."""

    def encode_spans_batch(self, texts: Sequence[str]) -> list[tuple[list[int], list[Span]]]:
        """`encode_spans` of each text."""

    def piece(self, token_id: int, first: bool) -> bytes | None:
        """The bytes an id adds to a text (`first`: as its first token); None for an id that has none."""

    def token_id(self, token: str) -> int | None:
        """The id of a whole token, None if it is not one."""


class OneByOne:
    """The batch methods of a codec whose library has none."""

    def encode_batch(self: Codec, texts: Sequence[str], special: bool) -> list[list[int]]:
        return [self.encode(text, special) for text in texts]

    def encode_spans_batch(self: Codec, texts: Sequence[str]) -> list[tuple[list[int], list[Span]]]:
        return [self.encode_spans(text) for text in texts]


@contextmanager
def library_errors(cause: str, remedy: str) -> Iterator[None]:
    """Turns whatever a tokenizer library raises into a TokenizerError.

    They are written in Rust and C++: bare Exception is common, and a Rust panic derives from BaseException only and
    has no importable name.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
        raise
    except BaseException as error:
        raise TokenizerError(f"{cause} ({error}); {remedy}") from error


@contextmanager
def panics_unreported() -> Iterator[None]:
    """Keeps a Rust panic's report off the terminal: the library writes it to file descriptor 2 before Python hears of it.

    What anybody else writes there meanwhile comes out at the end, unless this ends with an error.
    """
    try:
        stderr = os.dup(2)
    except OSError:  # closed: nothing can be seen there
        yield
        return
    with TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
        held.seek(0)
        for line in held:
            os.write(2, line)


class Splitter:
    """Cuts a text at its added tokens, longest first, honouring lstrip, rstrip and single_word."""

    def __init__(self, tokens: Iterable[AddedToken]) -> None:
        self.tokens = {token.content: token for token in tokens}
        alternatives = []
        for number, content in enumerate(sorted(self.tokens, key=len, reverse=True)):
            token = self.tokens[content]
            inner = f"(?P<t{number}>{re.escape(content)})"
            if token.single_word:
                inner = rf"(?<!\w){inner}(?!\w)"
            # The possessive quantifier keeps a long run of spaces without a token after it from being quadratic.
            alternatives.append((r"(?<!\s)\s*+" if token.lstrip else "") + inner + (r"\s*" if token.rstrip else ""))
        pattern = "|".join(alternatives)
        if self.tokens and all(self.tokens) and not any(token.lstrip for token in self.tokens.values()):
            # Mistral has 771 alternatives; without this each would be tried at every character.
            pattern = f"(?=[{re.escape(''.join(sorted({content[0] for content in self.tokens})))}])(?:{pattern})"
        self._pattern = re.compile(pattern) if alternatives else None

    def split(self, text: str) -> Iterator[tuple[str, Span, bool]]:
        """(text or the token's content, its span in the text, whether it is a token); empty pieces are left out."""
        end = 0
        for match in self._pattern.finditer(text) if self._pattern else ():
            if match.start() > end:
                yield text[end : match.start()], (end, match.start()), False
            assert match.lastgroup is not None
            yield match[match.lastgroup], match.span(), True
            end = match.end()
        if end < len(text):
            yield text[end:], (end, len(text)), False
