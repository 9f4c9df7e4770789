"""The best supported sentences of the passages found, and whether they are evidence enough to answer at all."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from llmkit.rag.embed import Embedder
from llmkit.rag.evidence import coverage, numbers
from llmkit.rag.fence import tainted, trusted_sentences
from llmkit.rag.retrieve import Hit, Question
from llmkit.rag.sentences import in_code
from llmkit.rag.terms import STOP_WORDS, clean, fold, stems, term_list, words

PASSAGES = 8  # that sentences are taken from
SENTENCES = 3  # of an extractive answer at most
CLOSE = 0.88  # share of the best sentence's score that a further one must have


@dataclass(frozen=True)
class Span:
    """A sentence of a passage: characters `[start, end)` of the document, and of the passage's own text."""

    hit: Hit
    start: int
    end: int
    text: str
    score: float


def spans(hits: Sequence[Hit], question: Question, embedder: Embedder | None = None) -> list[Span]:
    """All sentences of the passages that speak to the reader and not to a model, the best first.

    Without an embedder those that have no term of the question in them or above them are left out.
    """
    found: list[tuple[Hit, int, int, str]] = []
    scores: list[float] = []
    best = max((hit.score for hit in hits), default=0.0)
    for hit in hits[:PASSAGES]:
        code = in_code(hit.text)
        for start, end in trusted_sentences(hit.text, hit.row.kind):
            text = clean(hit.text[start:end])
            if _is_heading(hit.text, start, end) or _asks(text, question):
                continue
            score = _score(question, hit, text, _header(hit, start), any(begin <= start < stop for begin, stop in code))
            if score is not None or embedder is not None:
                found.append((hit, start, end, text))
                scores.append((score or 0.0) + 0.4 * (hit.score / best if best > 0 else 0.0))
    if not found:
        return []
    if embedder is not None and question.vector is not None:
        # Only the sentences that may win are embedded: it is what takes the time.
        likely = np.argsort(-np.array(scores), kind="stable")[:16]
        vectors = embedder.documents([found[i][3] for i in likely])
        for i, cosine in zip(likely, vectors @ question.vector, strict=True):
            scores[i] += 0.8 * float(cosine)
    order = np.argsort(-np.array(scores), kind="stable")
    return [Span(found[i][0], found[i][0].start + found[i][1], found[i][0].start + found[i][2], found[i][3], scores[i]) for i in order]


_RULE = re.compile(r"[ \t]*\|?[ \t:|-]*-[ \t:|-]*\|?[ \t]*$", re.MULTILINE)  # between a table's header and its rows
_HEADER = re.compile(r"^[ \t]*(\|[^\n]*)\n" + _RULE.pattern, re.MULTILINE)


def _is_heading(text: str, start: int, end: int) -> bool:
    """Whether a sentence is a Markdown heading, or a table's header or rule: it says what follows is about, and nothing by itself."""
    line = text.rfind("\n", 0, start) + 1
    if "|" in text[line:start]:
        rule = text.find("\n", end) + 1
        return _RULE.match(text, line) is not None or (rule > 0 and _RULE.match(text, rule) is not None)
    return re.match(r"#{1,6}\s", text[line:start]) is not None


def _header(hit: Hit, start: int) -> str:
    """The header of the table that the sentence beginning there is a row of, which says what its cells are; empty for what is none."""
    if hit.row.kind == "csv":
        return hit.row.context or hit.text.partition("\n")[0]
    if "|" not in hit.text[hit.text.rfind("\n", 0, start) + 1 : start]:
        return ""
    above = [match[1] for match in _HEADER.finditer(hit.text, max(hit.text.rfind("\n\n", 0, start), 0), start)]
    return above[-1] if above else hit.row.context


def _asks(text: str, question: Question) -> bool:
    """Whether a sentence is a question, or quotes the one that is asked: either has its words and answers nothing."""
    asked = " ".join(fold(question.text).split())
    return text.rstrip("\"'”’)*_`").endswith("?") or (asked.endswith("?") and asked in " ".join(fold(text).split()))


def choose(found: Sequence[Span]) -> list[Span]:
    """The sentences that make the answer: the best, and others nearly as good that say something else, in the order of the documents."""
    chosen: list[Span] = []
    for span in found:
        if len(chosen) == SENTENCES or span.score < CLOSE * found[0].score:
            break
        terms = set(term_list(span.text))
        if terms and all(len(terms & set(term_list(other.text))) < 0.6 * len(terms) for other in chosen):
            chosen.append(span)
    return chosen


_WANTED = (
    (re.compile(r"^(?:when|what (?:year|date|day|month|century|decade)|in (?:what|which) (?:year|century))\b", re.I), "number"),
    (
        re.compile(r"\bhow (?:many|much|long|old|far|often|high|large|big|tall)\b|\bwhat (?:percentage|percent|number|amount)\b", re.I),
        "number",
    ),
    (
        re.compile(
            r"^(?:who|whom|whose|where)\b|\bwhich (?:person|city|country|team)\b|\bwhat (?:is the name|city|country|person)\b", re.I
        ),
        "name",
    ),
)


def _score(question: Question, hit: Hit, text: str, header: str, code: bool) -> float | None:
    """How much of the question a sentence covers, alone and with its heading, and whether it has the kind of answer asked for.

    header: of its table, whose words count half. None where nothing is covered.
    """
    alone = set(term_list(text))
    terms = alone | set(term_list(header))
    own = (coverage(question.idf, question.idf, alone) + coverage(question.idf, question.idf, terms)) / 2
    around = coverage(question.idf, question.idf, terms | set(term_list(hit.row.heading)))
    if not around:
        return None
    wanted = next((kind for pattern, kind in _WANTED if pattern.search(question.text)), None)
    asked = set(term_list(question.text))
    fits = (wanted == "number" and bool(numbers(text) - numbers(question.text))) or (
        wanted == "name" and any(name not in asked for name in names(text))
    )
    fragment = 0.3 if code else 0.2 if header or text.count("|") > 1 or text.startswith("![") else 0.0  # not read as a sentence
    return own + 0.2 * around + (0.15 if fits else 0.0) - fragment


def names(text: str) -> list[str]:
    """The stems of capitalised words that do not open the text."""
    found = [fold(word) for word, start, _ in words(text) if word[0].isupper() and start > 0]
    return stems(word for word in found if word not in STOP_WORDS)


# --- whether to answer at all -----------------------------------------------------------------------------------------


def features(question: Question, hits: Sequence[Hit]) -> dict[str, float]:
    """What tells a question that the documents answer from one that they do not, each about 0..1.

    similarity: the nearest passage's cosine, from that of unrelated chunks (0) to that of the same text (1), which makes embedders
    comparable whose cosines differ; 0 without vectors.
    """
    mean = question.background
    nearest = max((hit.cosine for hit in hits if hit.cosine is not None), default=mean)
    similarity = (nearest - mean) / max(1 - mean, 1e-6)
    if not hits or not question.idf:
        return {"sentence": 0.0, "passage": 0.0, "rarest": 0.0, "names": 0.0, "pairs": 0.0, "similarity": similarity}
    said = [_terms(hit) for hit in hits[:PASSAGES]]
    passages = [set(terms) for terms in said]
    windows: list[set[str]] = []
    for hit in hits[:PASSAGES]:
        parts = [set(term_list(hit.text[start:end])) for start, end in trusted_sentences(hit.text, hit.row.kind)]
        windows += [parts[i] | (parts[i + 1] if i + 1 < len(parts) else set()) for i in range(len(parts))]
    covered = [coverage(question.idf, question.idf, one) for one in passages]
    top = passages[int(np.argmax(covered))]
    asked = [name for name in names(question.text) if name in question.idf]
    pairs = set(pairwise(question.terms))
    together = max((len(pairs & set(pairwise(terms))) for terms in said), default=0)
    ranked = sorted(question.idf, key=lambda term: (-question.idf[term], term))
    return {
        "sentence": max((coverage(question.idf, question.idf, one) for one in windows), default=0.0),
        "passage": max(covered),
        "rarest": sum(term in top for term in ranked[:2]) / len(ranked[:2]),
        "names": sum(name in top for name in asked) / len(asked) if asked else 0.5,
        "pairs": together / len(pairs) if pairs else 0.5,
        "similarity": similarity,
    }


def _terms(hit: Hit) -> Sequence[str]:
    """The terms of what may be quoted of a passage: an order to a model is no evidence that there is an answer."""
    if not tainted(hit.text):
        return hit.row.terms
    return term_list("\n".join(hit.text[start:end] for start, end in trusted_sentences(hit.text, hit.row.kind)))


_CODE = re.compile(r"([a-z]+)(\d+)")  # E7, H100, T101


def _unknown_code(question: Question, hits: Sequence[Hit]) -> bool:
    """Whether the question names something by letters and digits that no passage does: what is said of E7 is not said of E9."""
    passages = [set(_terms(hit)) for hit in hits[:PASSAGES]]
    codes = [match for term in question.idf if (match := _CODE.fullmatch(term))]
    return any(not any(code[0] in terms or {code[1], code[2]} <= terms for terms in passages) for code in codes)


# Logistic regression on half of the questions of the README's collections (recipes/rag_data.py), without and with vectors; the
# bias is moved so that an answerable question is seldom refused.
BIAS, BIAS_VECTORS = -6.3, -8.7
COEFFICIENTS: Mapping[str, float] = {"sentence": 6.0, "passage": 5.0, "rarest": 0.7, "names": 2.3, "pairs": 4.7}
COEFFICIENTS_VECTORS: Mapping[str, float] = {
    **{"sentence": 3.5, "passage": 2.9, "rarest": 0.6, "names": 0.8, "pairs": 5.1},
    "similarity": 14.0,
}


def sufficiency(question: Question, hits: Sequence[Hit]) -> float:
    """The probability that the passages answer the question, 0..1."""
    if _unknown_code(question, hits):
        return 0.0
    found = features(question, hits)
    coefficients, bias = (COEFFICIENTS, BIAS) if question.vector is None else (COEFFICIENTS_VECTORS, BIAS_VECTORS)
    return 1 / (1 + math.exp(-(bias + sum(weight * found[name] for name, weight in coefficients.items()))))
