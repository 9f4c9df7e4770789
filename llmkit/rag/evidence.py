"""Whether a quote supports a sentence: by shared terms, and by an explicit comparison of numbers, names, negations and opposites.

Overlap alone lets "did not rise" support "did rise" and 308 points support 380; so each of these is compared on its own and any
difference is a reason against. The check errs towards "unsupported": a paraphrase in quite other words is marked, not believed.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal

from llmkit.rag.terms import STOP_WORDS, clean, fold, stems, term_list, words

SUPPORTED = 0.6  # share of a sentence's terms that its quote must have
ALIKE = 0.8  # share of terms in common, both ways, from which on two sentences say the same but for what is compared here

_UNITS = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen"
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
_ORDINALS = "zeroth first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth"
NUMBER_WORDS = (
    {word: str(number) for number, word in enumerate(_UNITS.split())}
    | {word: str(10 * number) for number, word in enumerate(_TENS.split(), 2)}
    | {word: str(number) for number, word in enumerate(_ORDINALS.split())}
    | {"hundred": "100", "thousand": "1000", "million": "1000000", "billion": "1000000000", "half": "0.5", "twice": "2", "double": "2"}
)
# "one" and "second" are more often a pronoun or a unit of time.
for _word in ("one", "second", "zeroth"):
    del NUMBER_WORDS[_word]
_NEGATIONS = "not no never none nobody nothing neither nor cannot without hardly unable fails failed fail lacks lacked lack"
NEGATIONS = frozenset(_NEGATIONS.split())
_OPPOSITES = (
    "increase decrease|increased decreased|increases decreases|increasing decreasing|rise fall|rose fell|rises falls|more less|more fewer"
    "|most least|higher lower|high low|highest lowest|before after|above below|over under|true false|enable disable|enabled disabled"
    "|allow forbid|allowed forbidden|allows forbids|minimum maximum|first last|always never|include exclude|included excluded"
    "|includes excludes|win lose|won lost|accept reject|accepted rejected|start end|started ended|open closed|larger smaller"
    "|largest smallest|best worst|better worse|early late|earlier later|north south|east west|northern southern|eastern western"
    "|legal illegal|possible impossible|required optional|inside outside|upper lower|positive negative|import export"
    "|majority minority|agree disagree|safe unsafe"
)
OPPOSITE = {one: other for pair in _OPPOSITES.split("|") for one, other in (pair.split(), pair.split()[::-1])}
_NUMBER = re.compile(r"(?<![\w.])[-−]?\d+(?:[.,]\d+)*(?:st|nd|rd|th|s)?(?![\w])|\d+(?:[.,]\d+)*")
_BESIDE = frozenset({"in", "at", "on", "from", "of", "to", "for", "near", "into", "and", "or", "with"})
SCOPE = 4  # words after a negation that it may be about


@dataclass(frozen=True)
class Support:
    """How well a quote supports a sentence. `problems` say what differs; with any of them it does not."""

    score: float
    problems: tuple[str, ...] = ()

    @property
    def supported(self) -> bool:
        return not self.problems and self.score >= SUPPORTED


def support(claim: str, quote: str, *, similarity: float | None = None, about: str = "") -> Support:
    """Compare a sentence with a quote.

    similarity: the cosine of their vectors, where there is an embedder. about: the headings above the quote; a name that stands
    there need not be said again in it.
    """
    return compare(Facts.of(claim), Facts.of(quote), similarity=similarity, about=frozenset(term_list(about)))


def compare(mine: Facts, theirs: Facts, *, similarity: float | None = None, about: frozenset[str] = frozenset()) -> Support:
    """`support` of facts at hand."""
    if not mine.terms:
        return Support(0.0)
    overlap = sum(1 for term in mine.terms if term in theirs.terms or term in about) / len(mine.terms)
    score = overlap if similarity is None else max(overlap, 0.6 * overlap + 0.4 * max(similarity, 0.0))
    return Support(score, tuple(_problems(mine, theirs, about)))


@dataclass(frozen=True)
class Facts:
    """What is compared of a text."""

    terms: frozenset[str]
    numbers: Counter[str]
    names: Counter[str]  # stems of capitalised words
    first: str  # the stem of the first word, if capitalised: a name or only the beginning of a sentence
    negated: tuple[frozenset[str], ...]  # per negation, the stems it is about
    folded: frozenset[str]  # all words
    actors: tuple[str, ...]  # the names in order, but for those of places and companions ("in Paris", "and Berta")

    @classmethod
    def of(cls, text: str) -> Facts:
        text = clean(text)
        found = words(text)
        folded = [fold(word) for word, _, _ in found]
        names: Counter[str] = Counter()
        first = ""
        actors: list[str] = []
        for number, ((word, start, _), low) in enumerate(zip(found, folded, strict=True)):
            if not word[0].isupper() or low in STOP_WORDS or low in NEGATIONS or low in NUMBER_WORDS:
                continue
            opens = number == 0 or re.search(r"[.!?:;\n\"“(]\s*$", text[max(start - 3, 0) : start]) is not None
            (stem,) = stems([low])
            if opens and not word[1:2].isupper():
                first = first or stem
            names[stem] += 1
            if number == 0 or folded[number - 1] not in _BESIDE:
                actors.append(stem)
        return cls(
            frozenset(term_list(text)),
            numbers(text),
            names,
            first,
            tuple(_negated(text, found, folded)),
            frozenset(folded),
            tuple(dict.fromkeys(actors)),
        )


def _problems(mine: Facts, theirs: Facts, about: frozenset[str]) -> Iterator[str]:
    if missing := mine.numbers - theirs.numbers:
        yield f"the number {min(missing)} is not in the quote"
    strange = any(name not in mine.terms for name in theirs.names)  # the quote has a name that may stand in another's place
    for name in mine.names - theirs.names:
        if name not in theirs.terms and name not in about and (name != mine.first or strange):
            yield f"the name {name!r} is not in the quote"
        elif name != mine.first and strange and name not in about:
            yield f"the name {name!r} stands fewer times in the quote"
    common = len(mine.terms & theirs.terms)
    alike = common >= ALIKE * max(len(mine.terms), len(theirs.terms))
    if alike and len(mine.negated) % 2 != len(theirs.negated) % 2:
        yield "only one of them is negated"
    if alike and ("by" in mine.folded) == ("by" in theirs.folded):  # "A beat B" is "B was beaten by A", and not "B beat A"
        order = [name for name in mine.actors if name in theirs.actors]
        if order != [name for name in theirs.actors if name in mine.actors]:
            yield f"the names {' and '.join(order[:2])} stand in another order in the quote"
    for one, other in ((mine, theirs), (theirs, mine)):
        denied = frozenset().union(*other.negated) if other.negated else frozenset()
        for scope in one.negated:
            shared = scope & other.terms
            if shared and not shared & denied:
                yield f"{min(shared)!r} is negated in only one of them"
                break
    for word in mine.folded & OPPOSITE.keys():
        if word not in theirs.folded and OPPOSITE[word] in theirs.folded and OPPOSITE[word] not in mine.folded:
            yield f"the quote says {OPPOSITE[word]!r} for {word!r}"


def numbers(text: str) -> Counter[str]:
    """The numbers of a text, however written: 1,000 and 1000, 1.5 million and 1500000, twenty-one and 21, sixth and 6th."""
    text = _MINUS.sub("-", text)
    found: Counter[str] = Counter(char for char in text if unicodedata.category(char) == "No")  # ½, ²
    run: list[Decimal] = []  # the words of one number
    written, end = False, 0  # whether the last one stands in digits
    for match in _NUMBER_OR_WORD.finditer(text):
        low, digits = match[0].lower(), match["digits"]
        said = _canonical(digits) if digits else NUMBER_WORDS.get(low) or _LAST_WORDS.get(low)
        if said is None:
            continue
        value = Decimal(said) if re.fullmatch(r"-?\d+(?:\.\d+)?", said, re.ASCII) else None
        between = text[end : match.start()]
        if digits is None and run and value is not None and _goes_on(run[-1], value, between) and (not written or value in _SCALES):
            run.append(value)
        else:
            if run:
                found[_composed(run)] += 1
            run = []
            if value is None:  # a version such as 1.2.3
                found[said] += 1
            elif digits or low in NUMBER_WORDS:
                run = [value]
        written, end = digits is not None, match.end()
    if run:
        found[_composed(run)] += 1
    return found


_MINUS = re.compile(r"\bminus (?=\d)", re.IGNORECASE)
_NUMBER_OR_WORD = re.compile(rf"(?P<digits>{_NUMBER.pattern})|[^\W\d_]+")


_LAST_WORDS = {"one": "1", "second": "2"}  # numbers only behind another one: twenty-one
_SCALES = frozenset(Decimal(10**exponent) for exponent in (2, 3, 6, 9))


def _goes_on(last: Decimal, value: Decimal, between: str) -> bool:
    """Whether a word goes on with the number before it: twenty-one, two hundred and five, 5 million."""
    if last in _SCALES:
        return re.fullmatch(r"[\s-]+(?:and\s+)?", between) is not None
    if not re.fullmatch(r"\s+|-", between):
        return False
    return value in _SCALES or (20 <= last < 100 and last % 10 == 0 and 1 <= value < 10)


def _composed(run: list[Decimal]) -> str:
    """The number that words make together, as `_canonical` writes it."""
    total = part = Decimal(0)
    for value in run:
        if value == 100:
            part = (part or 1) * value
        elif value in _SCALES:
            total, part = total + (part or 1) * value, Decimal(0)
        else:
            part += value
    text = f"{run[0] if len(run) == 1 else total + part:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _canonical(number: str) -> str:
    digits = re.sub(r"(st|nd|rd|th|s)$", "", number.replace("−", "-"))
    digits = re.sub(r",(?=\d{3}(?!\d))", "", digits)
    if re.fullmatch(r"-?\d+\.\d+", digits):
        digits = digits.rstrip("0").rstrip(".")
    return digits


def _negated(text: str, found: list[tuple[str, int, int]], folded: list[str]) -> Iterable[frozenset[str]]:
    """The stems each negation is about: the words after it up to a mark, or those before it where none follow."""
    for number, low in enumerate(folded):
        _, start, end = found[number]
        contracted = low == "t" and number > 0 and folded[number - 1].endswith("n") and text[found[number - 1][2] : start] in ("'", "’")
        if low not in NEGATIONS and not contracted:
            continue
        scope: list[str] = []
        stop = end
        for after, (_, begin, finish) in zip(folded[number + 1 : number + 1 + SCOPE], found[number + 1 :], strict=False):
            if re.search(r"[.,;:!?()]", text[stop:begin]) or after == "but":
                break
            stop = finish
            if after not in STOP_WORDS:
                scope.append(after)
        if not scope:
            scope = [before for before in folded[max(number - SCOPE, 0) : number] if before not in STOP_WORDS and before != "t"]
        yield frozenset(stems(scope))


def coverage(terms: Iterable[str], weight: Mapping[str, float], found: frozenset[str] | set[str]) -> float:
    """The weighed share of terms that are found, 0..1."""
    wanted = set(terms)
    total = sum(weight[term] for term in wanted)
    return sum(weight[term] for term in sorted(wanted & found)) / total if total else 0.0
