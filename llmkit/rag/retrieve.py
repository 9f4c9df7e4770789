"""From a question to passages: full text and vectors give candidates, and one score with few parts puts them in order.

LanceDB finds the candidates (BM25 over the terms, nearest vectors). Their terms and vectors are then at hand, so the parts of the
score are computed exactly, however large the index is:
  - BM25 (Robertson and Zaragoza 2009) with frequencies over the whole index,
  - pairs: neighbouring terms of the question that are neighbours in the passage too (the ordered pairs of Metzler and Croft 2005),
  - similarity: the cosine of the vectors,
  - feedback: the same once more for the question expanded by its best passages (RM3, Lavrenko and Croft 2001; Rocchio for vectors).
Each part is scaled to 0..1 over the candidates before they are weighed.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from llmkit.errors import UsageError
from llmkit.rag.embed import Embedder, check_embedder
from llmkit.rag.index import Index, Row, quoted
from llmkit.rag.read import KINDS
from llmkit.rag.terms import term_list

if TYPE_CHECKING:
    from llmkit.rag.rerank import Reranker

Scores = NDArray[np.floating]

POOL = 100  # candidates of each kind
MAX_TERMS = 64  # different terms of a question that are searched for: the rarest that the index knows
NEAR = 0.9  # share of terms that two passages have in common when one is left out as a duplicate
RERANKED = 20  # candidates that a reranker reads
PROBES = 20  # cells of a large vector index that a search looks into


@dataclass(frozen=True)
class Weights:
    """How much each part of the score counts, and the constants of the parts. Chosen on half of the queries of three collections."""

    k1: float = 1.2
    b: float = 0.75
    pairs: float = 0.4
    similarity: float = 1.0
    feedback: float = 1.0
    feedback_vectors: float = 0.3
    siblings: float = 0.1
    feedback_passages: int = 5
    feedback_terms: int = 40
    original: float = 0.5  # share of the question itself in an expanded one


@dataclass(frozen=True)
class Hit:
    """A passage that was found.

    Attributes:
        row: the chunk. score: what it is ordered by, higher is better; parts: what that is made of.
        text, start, end: the chunk, with its neighbours where `search(neighbours=...)` merged them.
        terms: the terms of the question that stand in it. cosine: of its vector and the question's, None without vectors.
    """

    row: Row
    score: float
    parts: Mapping[str, float] = field(default_factory=dict)
    text: str = ""
    start: int = 0
    end: int = 0
    line: int = 0
    terms: tuple[str, ...] = ()
    cosine: float | None = None


@dataclass(frozen=True)
class Question:
    """A question as terms, with their weights as evidence (inverse document frequency), and as a vector."""

    text: str
    terms: tuple[str, ...]  # in order, as they stand
    idf: Mapping[str, float]
    vector: NDArray[np.float32] | None
    background: float = 0.0  # mean cosine of the vector with chunks at hand

    @classmethod
    def of(cls, text: str, index: Index, embedder: Embedder | None) -> Question:
        found = term_list(text)
        frequencies = index.frequencies(found)
        rows, _ = index.statistics()
        rarest = sorted(dict.fromkeys(found), key=lambda term: frequencies.get(term, rows))[:MAX_TERMS]
        idf = {term: inverse_frequency(frequencies.get(term, 0), rows) for term in rarest}
        vector = None if embedder is None or not text.strip() else embedder.queries([text])[0]
        background = 0.0 if vector is None else index.background(vector)
        return cls(text, tuple(term for term in found if term in idf), idf, vector, background)


def inverse_frequency(chunks: int, rows: int) -> float:
    """The weight of a term that stands in so many of the index's chunks; a count may be older than the index."""
    chunks = min(chunks, rows)
    return math.log(1 + (rows - chunks + 0.5) / (chunks + 0.5))


WEIGHTS = Weights()


def search(
    index: Index,
    text: str | Question,
    k: int = 10,
    *,
    embedder: Embedder | None = None,
    reranker: Reranker | None = None,
    where: str | None = None,
    weights: Weights = WEIGHTS,
    neighbours: int = 0,
    unique: bool = True,
) -> list[Hit]:
    """The k best passages for a question, the best first.

    embedder: that of the index (UsageError for another one or none). reranker: reads the best candidates again.
    where: an SQL condition on the columns file, kind, heading, page, key and fields (see `condition`).
    neighbours: so many chunks before and after a hit are merged into its text; unique: near-duplicates are left out.
    """
    check_embedder(index.settings, embedder)
    if k < 1:
        raise UsageError(f"k is {k}; it must be at least 1.")
    question = text if isinstance(text, Question) else Question.of(text, index, embedder)
    rows = max(len(index), 1)  # no more can be found, nor be neighbours
    candidates = find(index, question, min(max(POOL, k), rows), where)
    hits = rank(index, question, candidates, weights)
    if unique:
        hits = distinct(hits, k if reranker is None else max(k, RERANKED))
    if reranker is not None:
        hits = reranker.rerank(question.text, hits[:RERANKED]) + hits[RERANKED:]
    hits = hits[:k]
    return merge_neighbours(index, hits, min(neighbours, rows)) if neighbours else hits


@dataclass(frozen=True)
class Candidates:
    """Rows that full text or vectors found, with their vectors `[rows, dimension]` where there are any."""

    rows: list[Row]
    vectors: NDArray[np.float32] | None


def find(index: Index, question: Question, pool: int, where: str | None = None) -> Candidates:
    """The candidates; UsageError where the filter is no SQL that the index understands."""
    from lancedb.query import MatchQuery

    found: dict[int, None] = {}  # LanceDB's row ids, in order, each once
    try:
        if question.idf:
            query = index.table.search(MatchQuery(" ".join(question.idf), "terms"), query_type="fts")
            query = query.where(where) if where else query
            best = query.with_row_id(True).select(["_score"]).limit(pool).to_arrow()
            found.update(dict.fromkeys(best["_rowid"].to_pylist()))
        if question.vector is not None:
            nearest = index.table.search(question.vector).distance_type("dot").nprobes(PROBES).limit(pool)
            nearest = nearest.where(where, prefilter=True) if where else nearest
            best = nearest.with_row_id(True).select(["_distance"]).to_arrow()
            found.update(dict.fromkeys(best["_rowid"].to_pylist()))
    except (ValueError, RuntimeError) as error:
        if where is None:
            with index.reading():
                raise
        raise UsageError(
            f"the filter {where!r} cannot be applied ({' '.join(str(error).split())[:160]}). "
            "Columns are file, kind, heading, page, key, fields."
        ) from error
    return Candidates(*index.take(list(found)))


def rank(index: Index, question: Question, candidates: Candidates, weights: Weights) -> list[Hit]:
    """The candidates, ordered by the weighed parts of the score."""
    rows = candidates.rows
    if not rows:
        return []
    counts = [Counter(row.terms) for row in rows]
    bm25 = _Bm25(index, rows, counts, weights)
    parts: dict[str, Scores] = {"bm25": scaled(bm25.scores(Counter(question.terms), question.idf))}
    total = parts["bm25"].copy()
    parts["pairs"] = scaled(pair_scores(question, rows))
    total += weights.pairs * parts["pairs"]
    cosines = None
    if candidates.vectors is not None and question.vector is not None:
        cosines = candidates.vectors @ question.vector
        parts["similarity"] = scaled(cosines)
        total += weights.similarity * parts["similarity"]
    if weights.feedback or weights.feedback_vectors:
        best = np.argsort(-total, kind="stable")[: weights.feedback_passages]
        parts["feedback"] = scaled(bm25.expanded(question, best, total[best]))
        total = total + weights.feedback * parts["feedback"]
        if candidates.vectors is not None and cosines is not None:
            moved = question.vector + 0.5 * candidates.vectors[best[:3]].mean(0)
            parts["feedback_similarity"] = scaled(candidates.vectors @ moved)
            total = total + weights.feedback_vectors * parts["feedback_similarity"]
    total = total + weights.siblings * sibling_scores(rows, total)
    hits = []
    wanted = set(question.terms)
    for i in np.argsort(-total, kind="stable"):
        row = rows[i]
        hits.append(
            Hit(
                row,
                float(total[i]),
                {name: float(part[i]) for name, part in parts.items()},
                *(row.plain, row.start, row.end, row.line),
                tuple(sorted(wanted & counts[i].keys())),
                None if cosines is None else float(cosines[i]),
            )
        )
    return hits


class _Bm25:
    """BM25 of candidate rows, with the statistics of the whole index."""

    def __init__(self, index: Index, rows: Sequence[Row], counts: Sequence[Counter[str]], weights: Weights) -> None:
        self.index, self.counts, self.weights = index, counts, weights
        self.rows, mean = index.statistics()
        self.lengths = np.array([len(row.terms) for row in rows], np.float64)
        self.norm = weights.k1 * (1 - weights.b + weights.b * self.lengths / mean)

    def scores(self, query: Mapping[str, float], idf: Mapping[str, float]) -> Scores:
        place = {term: i for i, term in enumerate(query)}
        found = np.zeros((len(self.counts), len(place)))
        for row, count in enumerate(self.counts):
            for term in place.keys() & count.keys():
                found[row, place[term]] = count[term]
        weights = np.array([weight * idf[term] for term, weight in query.items()])
        return (found * (self.weights.k1 + 1) / (found + self.norm[:, None])) @ weights

    def expanded(self, question: Question, best: NDArray[np.intp], scores: Scores) -> Scores:
        """Scores for the question with the terms that mark its best passages."""
        trust = scores / scores.sum() if scores.sum() > 0 else np.full(len(scores), 1 / len(scores))
        model: dict[str, float] = defaultdict(float)
        for i, share in zip(best, trust, strict=True):
            for term, count in self.counts[i].items():
                model[term] += share * count / max(self.lengths[i], 1)
        likely = sorted((term for term in model if len(term) > 1), key=lambda term: (-model[term], term))[: 3 * self.weights.feedback_terms]
        frequencies = self.index.frequencies(likely)
        idf = {term: inverse_frequency(frequencies.get(term, 1), self.rows) for term in likely} | dict(question.idf)
        chosen = sorted(likely, key=lambda term: (-model[term] * idf[term], term))
        chosen = chosen[: self.weights.feedback_terms]
        mass, own = sum(model[term] for term in chosen), Counter(question.terms)
        query: dict[str, float] = defaultdict(float)
        for term, count in own.items():
            query[term] += self.weights.original * count / len(question.terms)
        for term in chosen:
            query[term] += (1 - self.weights.original) * model[term] / mass
        return self.scores(query, idf)


def sibling_scores(rows: Sequence[Row], scores: Scores) -> Scores:
    """For each passage the best score of the other candidates out of the same document: two passages on the matter speak for it."""
    best: dict[str, list[float]] = defaultdict(list)
    for row, score in zip(rows, scores, strict=True):
        best[row.key].append(float(score))
    for found in best.values():
        found.sort(reverse=True)
    others = [found[int(found[0] == score)] if len(found := best[row.key]) > 1 else 0.0 for row, score in zip(rows, scores, strict=True)]
    return np.array(others)


def pair_scores(question: Question, rows: Sequence[Row]) -> Scores:
    """For each passage the weight of the question's neighbouring terms that are neighbours in it, in the same order."""
    pairs = {pair for pair in pairwise(question.terms) if pair[0] != pair[1]}
    if not pairs:
        return np.zeros(len(rows))
    found = [pairs & set(pairwise(row.terms)) for row in rows]
    spread = Counter(pair for some in found for pair in some)
    weight = {pair: math.log(1 + len(rows) / count) for pair, count in spread.items()}
    return np.array([sum(weight[pair] for pair in sorted(some)) for some in found])


def scaled(values: Scores) -> Scores:
    """To 0..1; the lowest is taken at the POOL-th place, since what lies below was not looked for by this part."""
    if not len(values):
        return values
    high = values.max()
    low = np.sort(values)[::-1][min(POOL, len(values)) - 1]
    return np.clip((values - low) / (high - low), 0, None) if high > low else np.zeros_like(values)


def distinct(hits: Sequence[Hit], count: int) -> list[Hit]:
    """The first `count` hits, without passages that repeat a better one."""
    kept: list[tuple[Hit, frozenset[str]]] = []
    for hit in hits:
        if len(kept) == count:
            break
        terms = frozenset(hit.row.terms)
        if not any(terms and len(terms & other) >= NEAR * len(terms | other) for _, other in kept):
            kept.append((hit, terms))
    return [hit for hit, _ in kept]


def merge_neighbours(index: Index, hits: Sequence[Hit], count: int) -> list[Hit]:
    """Each hit with the chunks before and after it; one that a better hit has taken in is left out."""
    merged: list[Hit] = []
    for hit in hits:
        if any(hit.row.file == other.row.file and other.start <= hit.row.start and hit.row.end <= other.end for other in merged):
            continue
        number = int(hit.row.id.rpartition("#")[2])
        rows = [row for row in index.neighbours(hit.row.file, number - count, number + count) if row.key == hit.row.key]
        text = rows[0].plain
        for before, after in pairwise(rows):
            text += (
                "\n" * (after.start - before.end) + after.plain if after.start >= before.end else after.plain[before.end - after.start :]
            )
        merged.append(replace(hit, text=text, start=rows[0].start, end=rows[-1].end, line=rows[0].line))
    return merged


def condition(globs: Sequence[str] = (), kinds: Sequence[str] = (), fields: Sequence[str] = ()) -> str | None:
    """The filter for files that match one of the globs, of one of the kinds, with all of the NAME=VALUE fields.

    UsageError for a kind that is none.
    """
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise UsageError(f"no file is of the kind {unknown[0]!r}. Kinds are {', '.join(KINDS)}.")
    parts = []
    if globs:
        patterns = [
            glob.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_").replace("*", "%").replace("?", "_") for glob in globs
        ]
        parts.append("(" + " OR ".join(f"file LIKE {quoted(f'%{pattern}')}" for pattern in patterns) + ")")
    if kinds:
        parts.append("kind IN (" + ", ".join(quoted(kind) for kind in kinds) + ")")
    parts += [f"array_has(fields, {quoted(one)})" for one in fields]
    return " AND ".join(parts) or None
