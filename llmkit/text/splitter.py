"""What a codec does itself where its library does not: cut a text at its added tokens, and encode many texts."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence

from llmkit.text.codec import AddedToken, CharSpan, Codec, TokenizerSettings


class OneByOne:
    """The batch methods of a codec whose library has none."""

    def encode_batch(self: Codec, texts: Sequence[str], special: bool) -> list[list[int]]:
        return [self.encode(text, special) for text in texts]

    def encode_spans_batch(self: Codec, texts: Sequence[str]) -> list[tuple[list[int], list[CharSpan]]]:
        return [self.encode_spans(text) for text in texts]


def tokens_by_id(settings: TokenizerSettings, token_id: Callable[[str], int | None], size: int) -> dict[int, AddedToken]:
    """Return the tokens that the files beside a vocabulary name, by their ids.

    token_id: finds a token of the vocabulary itself. size: its number of ids; a token without an id that it does not have takes the
    next one after all that are declared.
    """
    found = {token.id: token for token in settings.added if token.id is not None}
    following = max([size, *(number + 1 for number in found)])
    for token in settings.named:
        number = token_id(token.content)
        if number is None:
            number, following = following, following + 1
        found[number] = token
    return found


class Splitter:
    """Cut a text at its added tokens, longest first, honouring lstrip, rstrip and single_word."""

    def __init__(self, tokens: Iterable[AddedToken]) -> None:
        self.tokens = {token.content: token for token in tokens}
        alternatives = []
        for number, content in enumerate(sorted(self.tokens, key=len, reverse=True)):
            token = self.tokens[content]
            inner = f"(?P<t{number}>{re.escape(content)})"
            if token.single_word:
                inner = rf"(?<!\w){inner}(?!\w)"
            # From the first space of a run on, and possessive: a long run without a token after it would else be quadratic. A run that
            # the token before has swallowed is none.
            alternatives.append((r"(?:(?<!\s)\s++)?" if token.lstrip else "") + inner + (r"\s*" if token.rstrip else ""))
        pattern = "|".join(alternatives)
        if self.tokens and all(self.tokens) and not any(token.lstrip for token in self.tokens.values()):
            # Mistral has 771 alternatives; without this each would be tried at every character.
            pattern = f"(?=[{re.escape(''.join(sorted({content[0] for content in self.tokens})))}])(?:{pattern})"
        self._pattern = re.compile(pattern) if alternatives else None

    def split(self, text: str) -> Iterator[tuple[str, CharSpan, bool]]:
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
