"""How good retrieval and answers are, on queries with judgements in the BEIR layout (arXiv:2104.08663).

queries.jsonl has a row {"_id", "text"} for each query, and for answers {"answers": [...]}, or {"answerable": false} where the
documents do not say. qrels.tsv has "query-id corpus-id score" lines (TREC's four columns too); a corpus id is the `_id` of a JSONL
row, or the name of a file.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmkit.errors import UsageError
from llmkit.rag.answer import Answer, ask
from llmkit.rag.embed import Embedder
from llmkit.rag.index import Index
from llmkit.rag.retrieve import WEIGHTS, Hit, Weights, search

if TYPE_CHECKING:
    from llmkit.llm.api import LLM
    from llmkit.rag.rerank import Reranker

Progress = Callable[[int, int], None]
DEPTH = 100  # passages looked at for each query
_ARTICLES = re.compile(r"\b(a|an|the)\b")


@dataclass(frozen=True)
class Query:
    """A question, the documents judged relevant to it, and what is known of its answer."""

    id: str
    text: str
    relevant: Mapping[str, float] = field(default_factory=dict)
    answers: tuple[str, ...] = ()
    answerable: bool = True


def read_queries(queries: Path, qrels: Path | None = None) -> list[Query]:
    """The queries of a file, with their judgements. UsageError names the line that is none."""
    judged: dict[str, dict[str, float]] = {}
    if qrels is not None:
        for number, line in enumerate(_lines(qrels), 1):
            parts = line.split("\t") if "\t" in line else line.split()
            if len(parts) == 4:
                parts = [parts[0], *parts[2:]]
            if number == 1 and parts[0] == "query-id":
                continue
            try:
                query, document, score = parts
                judged.setdefault(query, {})[document] = float(score)
            except ValueError as error:
                raise UsageError(f"line {number} of {qrels} is not 'query-id corpus-id score': {line[:80]!r}.") from error
    found = []
    for number, line in enumerate(_lines(queries), 1):
        try:
            row = json.loads(line)
            name, text, golds = str(row.get("_id", row.get("id", number))), row.get("text", row.get("question")), row.get("answers", [])
            if not isinstance(text, str) or not text.strip() or not isinstance(golds, list):
                raise ValueError("it has no question, or answers that are no list")
            answers = tuple(str(answer) for answer in golds)
            found.append(Query(name, text, judged.get(name, {}), answers, bool(row.get("answerable", True))))
        except (ValueError, AttributeError, TypeError) as error:
            raise UsageError(
                f'line {number} of {queries} is no JSON object with "_id" and "text" (and, if any, a list "answers"): {line[:80]!r}.'
            ) from error
    if not found:
        raise UsageError(f"{queries} holds no query.")
    return found


def _lines(path: Path) -> list[str]:
    try:
        return [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read ({error}). Give a UTF-8 text file.") from error


# --- retrieval --------------------------------------------------------------------------------------------------------


def ndcg(ranked: Sequence[str], relevant: Mapping[str, float], k: int = 10, *, binary: bool = True) -> float:
    """Normalised discounted cumulative gain of the first k; binary: every judgement counts one."""
    gains = {name: 1.0 if binary else max(score, 0.0) for name, score in relevant.items()}
    found = sum(gains.get(name, 0.0) / math.log2(place + 2) for place, name in enumerate(ranked[:k]))
    ideal = sum(gain / math.log2(place + 2) for place, gain in enumerate(sorted(gains.values(), reverse=True)[:k]))
    return found / ideal if ideal else 0.0


def ranked_keys(hits: Iterable[Hit], relevant: Mapping[str, float]) -> list[str]:
    """The documents of the hits, each once: the keys, or the names of their files where judgements name those."""
    keys = []
    for hit in hits:
        name = Path(hit.row.file).name
        keys.append(name if hit.row.key == hit.row.file and name in relevant else hit.row.key)
    return list(dict.fromkeys(keys))


def judge_ranking(ranked: Sequence[str], relevant: Mapping[str, float]) -> dict[str, float]:
    """The measures of one query."""
    hits = [place for place, name in enumerate(ranked) if name in relevant]
    measures = {"ndcg@10": ndcg(ranked, relevant), "mrr": 1 / (hits[0] + 1) if hits else 0.0}
    for k in (1, 5, 10, 100):
        within = sum(place < k for place in hits)
        measures |= {f"recall@{k}": within / len(relevant), f"all@{k}": float(within == len(relevant))}
    return measures


def evaluate_retrieval(
    index: Index,
    queries: Sequence[Query],
    *,
    embedder: Embedder | None = None,
    reranker: Reranker | None = None,
    weights: Weights = WEIGHTS,
    progress: Progress = lambda done, total: None,
) -> dict[str, Any]:
    """Means over the queries that have judgements, of all of them, and of every other one from the first and from the second."""
    rows: list[dict[str, float]] = []
    seconds = 0.0
    judged = [query for query in queries if query.relevant]
    if not judged:
        raise UsageError("no query has a judgement. Give --qrels whose query ids are those of the queries.")
    for done, query in enumerate(judged):
        progress(done, len(judged))
        began = time.perf_counter()
        hits = search(index, query.text, DEPTH, embedder=embedder, reranker=reranker, weights=weights, unique=False)
        seconds += time.perf_counter() - began
        rows.append(judge_ranking(ranked_keys(hits, query.relevant), query.relevant))
    return {
        "queries": len(rows),
        "all": mean(rows),
        "first_half": mean(rows[::2]),
        "second_half": mean(rows[1::2]),
        "seconds_per_query": seconds / len(rows),
        "weights": asdict(weights),
    }


def mean(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of each measure over the rows that have it."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: sum(row[name] for row in rows if name in row) / sum(name in row for row in rows) for name in names}


# --- answers ----------------------------------------------------------------------------------------------------------


def normalized(text: str) -> list[str]:
    """The words of an answer as SQuAD compares them (arXiv:1606.05250): lower case, without marks and articles."""
    return _ARTICLES.sub(" ", re.sub(r"[^\w\s]", "", re.sub(r"\[\d+\]|\[unsupported\]", "", text.lower()))).split()


def f1(answer: str, gold: str) -> float:
    """The harmonic mean of precision and recall of words."""
    mine, theirs = normalized(answer), normalized(gold)
    common = sum((Counter(mine) & Counter(theirs)).values())
    return 2 * common / (len(mine) + len(theirs)) if common else float(mine == theirs)


def contains(text: str, gold: str) -> bool:
    """Whether the gold answer's words stand in a text in a row."""
    return f" {' '.join(normalized(gold))} " in f" {' '.join(normalized(text))} "


def judge_answer(answer: Answer, query: Query, index: Index) -> dict[str, float]:
    """The measures of one answer; those that it has no part in are left out."""
    if not query.answerable:
        return {"abstains_on_unanswerable": float(answer.abstained)}
    measures = {"abstains_on_answerable": float(answer.abstained)}
    if answer.abstained:
        missed = {"exact": 0.0, "f1": 0.0, "answer_in_quotes": 0.0} if query.answers else {}
        return measures | missed | ({"citation_recall": 0.0} if query.relevant else {})
    quotes = [citation.quote for citation in answer.sources]
    if query.answers:
        measures |= {
            "exact": float(any(normalized(answer.answer) == normalized(gold) for gold in query.answers)),
            "f1": max(f1(answer.answer, gold) for gold in query.answers),
            "answer_in_quotes": float(any(contains(quote, gold) for quote in quotes for gold in query.answers)),
        }
    if query.relevant:
        right = [citation for citation in answer.sources if _is_relevant(index, citation.file, citation.start, query.relevant)]
        measures["citation_precision"] = len(right) / len(quotes) if quotes else 0.0
        measures["citation_recall"] = float(bool(right))
    if quotes:
        measures["quotes_stand_in_source"] = sum(
            _text(index, citation.file)[citation.start : citation.end] == citation.quote for citation in answer.sources
        ) / len(quotes)
    measures["supported"] = sum(sentence.supported for sentence in answer.sentences) / len(answer.sentences)
    return measures


def _is_relevant(index: Index, file: str, start: int, relevant: Mapping[str, float]) -> bool:
    if file in relevant or Path(file).name in relevant:
        return True
    from llmkit.rag.index import any_of

    rows = index.table.search().where(f'{any_of("file", [file])} AND start <= {start} AND "end" > {start}').select(["key"]).limit(4)
    return any(key in relevant for key in rows.to_arrow()["key"].to_pylist())


def _text(index: Index, file: str) -> str:
    source = index.source(file)
    return Path(file).read_text(encoding="utf-8") if source is None else source


def evaluate_answers(
    index: Index,
    queries: Sequence[Query],
    *,
    llm: LLM | None = None,
    embedder: Embedder | None = None,
    progress: Progress = lambda done, total: None,
    **options: Any,
) -> dict[str, Any]:
    """Means over the queries, of all of them and of both halves; extractive without a model. options: of `ask`."""
    rows = []
    for done, query in enumerate(queries):
        progress(done, len(queries))
        rows.append(judge_answer(ask(llm, query.text, index, embedder=embedder, **options), query, index))
    result: dict[str, Any] = {"queries": len(rows), "all": mean(rows), "first_half": mean(rows[::2]), "second_half": mean(rows[1::2])}
    abstained = [row.get("abstains_on_unanswerable", row.get("abstains_on_answerable", 0.0)) for row in rows]
    rightly = sum(row.get("abstains_on_unanswerable", 0.0) for row in rows)
    if sum(abstained):
        result["abstention_precision"] = rightly / sum(abstained)
    return result
