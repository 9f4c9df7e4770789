"""Search finds, orders, filters and merges passages."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import pytest

from llmkit.errors import UsageError
from llmkit.rag.index import Index
from llmkit.rag.ingest import add
from llmkit.rag.retrieve import Weights, condition, scaled, search
from llmkit.rag.terms import term_list


def test_terms() -> None:
    assert term_list("The getUserName of Zürich: snake_case, 東京都, 1,000 and 3.11") == [
        *("getusernam", "get", "user", "name", "zurich", "snake", "case", "東京", "京都", "1000", "3.11")
    ]
    assert term_list("It was not the one") == ["one"]
    assert term_list("x" * 200) == []


def test_the_best_passage_comes_first(index: Index) -> None:
    hit = search(index, "Who designed the pump?")[0]
    assert "Marta Lindqvist" in hit.text
    assert hit.row.heading == "Harbour pump"
    assert hit.row.line == 1
    assert "pump" in hit.terms
    assert Path(hit.row.file).read_text()[hit.start : hit.end] == hit.text
    assert search(index, "zyzzyva") == []


def test_bm25_is_that_of_the_formula(tmp_path: Path) -> None:
    texts = ["alpha beta beta gamma", "alpha delta", "epsilon beta delta delta zeta eta"]
    folder = tmp_path / "docs"
    folder.mkdir()
    for number, text in enumerate(texts):
        (folder / f"{number}.txt").write_text(text)
    index = Index.create(tmp_path / "index")
    add(index, [folder])
    terms = [[str(number), *term_list(text)] for number, text in enumerate(texts)]
    mean = sum(map(len, terms)) / 3
    frequency = Counter(term for one in terms for term in set(one))
    expected = {}
    for number, one in enumerate(terms):
        total = 0.0
        for term in ("alpha", "beta"):
            count, chunks = one.count(term), frequency[term]
            total += math.log(1 + (3 - chunks + 0.5) / (chunks + 0.5)) * count * 2.2 / (count + 1.2 * (0.25 + 0.75 * len(one) / mean))
        expected[str(number)] = total
    low, high = min(expected.values()), max(expected.values())
    hits = search(index, "alpha beta", weights=Weights(pairs=0, feedback=0, feedback_vectors=0))
    assert {Path(hit.row.file).stem: hit.score for hit in hits} == pytest.approx({k: (v - low) / (high - low) for k, v in expected.items()})


def test_scaled() -> None:
    import numpy as np

    assert scaled(np.array([3.0, 1.0, 2.0])).tolist() == [1.0, 0.0, 0.5]
    assert scaled(np.array([2.0, 2.0])).tolist() == [0.0, 0.0]
    assert scaled(np.array([])).tolist() == []


def test_filters(tmp_path: Path, docs: Path) -> None:
    rows = docs / "rows.jsonl"
    rows.write_text('{"id": "a", "text": "A pump of brass.", "year": 1990}\n{"id": "b", "text": "A pump of steel.", "year": 2000}\n')
    index = Index.create(tmp_path / "index")
    add(index, [docs])
    assert {hit.row.key for hit in search(index, "pump", where=condition(fields=["year=2000"]))} == {"b"}
    assert {hit.row.kind for hit in search(index, "pump", where=condition(kinds=["markdown"]))} == {"markdown"}
    assert {Path(hit.row.file).name for hit in search(index, "pump ferry", where=condition(globs=["boat.t*", "it's_.md"]))} == {"boat.txt"}
    with pytest.raises(UsageError, match="cannot be applied"):
        search(index, "pump", where="nonsense ===")
    with pytest.raises(UsageError, match="at least 1"):
        search(index, "pump", 0)


def test_near_duplicates_are_left_out(tmp_path: Path, docs: Path) -> None:
    (docs / "copy.txt").write_text((docs / "boat.txt").read_text())
    index = Index.create(tmp_path / "index")
    add(index, [docs])
    assert len([hit for hit in search(index, "ferry captain", unique=False) if "Berg" in hit.text]) == 2
    assert len([hit for hit in search(index, "ferry captain") if "Berg" in hit.text]) == 1


def test_neighbours_are_merged_into_one_span_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "long.txt"
    file.write_text("\n\n".join(f"Paragraph {n} speaks of topic{n} only. " + "Filling words stand here. " * 30 for n in range(5)))
    index = Index.create(tmp_path / "index")
    add(index, [file])
    hit = search(index, "topic2", 1, neighbours=1)[0]
    assert "topic1" in hit.text
    assert "topic3" in hit.text
    assert "topic4" not in hit.text
    assert file.read_text()[hit.start : hit.end] == hit.text


@pytest.mark.parametrize(
    "query", ["the of and", "?!", "", "pump " * 10_000, " ".join(f"w{i} pump" for i in range(10_000)), "'; DROP \" \\ %", "\0 pump"]
)
def test_any_query_is_answered(index: Index, query: str) -> None:
    hits = search(index, query)
    assert bool(hits) == ("pump" in query)


def test_more_than_there_is_gives_all_there_is(index: Index) -> None:
    found = search(index, "pump", 10**30, neighbours=10**30)
    assert {hit.row.id for hit in search(index, "pump", 100)} >= {hit.row.id for hit in found} != set()
