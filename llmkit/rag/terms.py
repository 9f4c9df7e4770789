"""Text to the terms that full text search compares: words, lower case, without accents, stop words and English endings.

The index stores them, so that a query, an expansion of it and a check of evidence all compare the same terms.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING

from llmkit.errors import naming_extras

if TYPE_CHECKING:
    from Stemmer import Stemmer

# Function words. Negations are among them: retrieval ignores them, the check of evidence compares them on its own.
_STOP_WORDS = (
    "a an and are as at be but by for if in into is it no not of on or such that the their then there these they this to was will with "
    "what which who whom whose when where why how do does did has have had can could should would may might must been being am were i "
    "you he she we us our your his her its from than so very about any some all each other more most also only between through during "
    "before after above below up down out off over under again further once here both few nor own same too s t just don now me my"
)
STOP_WORDS = frozenset(_STOP_WORDS.split())
_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"\d+(?:[.,]\d+)+|[{_CJK}]+|[^\W_{_CJK}]+")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_HUMP = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
FILLER = "\u2060"  # word joiner, invisible: stands where an escape of JSON was longer than its character
MAX_TERM = 64  # characters; a longer "word" is data (base64, a hash list)


@cache
def _stemmer() -> Stemmer:
    with naming_extras("rag"):
        from Stemmer import Stemmer
    return Stemmer("english")


def fold(text: str) -> str:
    """Lower case, without accents and without the commas of thousands."""
    if "," in text:
        text = _THOUSANDS.sub("", text)
    if text.isascii():
        return text.lower()
    return "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c)).lower()


def words(text: str) -> list[tuple[str, int, int]]:
    """The words of a text as they stand, with their characters `[start, end)`; `snake_case` is two, a CJK run one."""
    return [(match[0], match.start(), match.end()) for match in _WORD.finditer(text)]


def term_list(text: str) -> list[str]:
    """All terms of a text, in order. A `camelCase` word gives itself and its parts, a CJK run its pairs of characters."""
    found: list[str] = []
    for word in _WORD.findall(clean(text)):
        if len(word) > MAX_TERM:
            continue
        if word[0] > "\u3000" and re.match(f"[{_CJK}]", word):
            found += [word[i : i + 2] for i in range(max(len(word) - 1, 1))]
            continue
        found.append(fold(word))
        parts = _HUMP.split(word)
        if len(parts) > 1:
            found += [fold(part) for part in parts]
    return stems(word for word in found if word and word not in STOP_WORDS)


def clean(text: str) -> str:
    """Without fillers: for what is read, not for what offsets count in."""
    return text.replace(FILLER, "")


def stems(found: Iterable[str]) -> list[str]:
    """The stems (Snowball's English ones) of folded words."""
    return list(_stemmer().stemWords(list(found)))
