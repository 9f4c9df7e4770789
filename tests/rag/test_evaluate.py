"""The measures are those of their definitions, and the command prints and keeps them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from llmkit.cli.main import run
from llmkit.errors import UsageError
from llmkit.rag.evaluate import contains, evaluate_answers, f1, judge_ranking, ndcg, read_queries
from llmkit.rag.index import Index
from llmkit.rag.ingest import add


def test_ranking_measures() -> None:
    relevant = {"a": 1.0, "b": 1.0, "z": 1.0}
    ranked = ["x", "a", "y", "b"]
    gain = 1 / math.log2(3) + 1 / math.log2(5)
    assert ndcg(ranked, relevant) == pytest.approx(gain / (1 + 1 / math.log2(3) + 1 / math.log2(4)))
    assert ndcg(["a"], {"a": 3.0, "b": 1.0}, binary=False) == pytest.approx(3 / (3 + 1 / math.log2(3)))
    measures = judge_ranking(ranked, relevant)
    assert measures["mrr"] == 0.5
    assert (measures["recall@1"], measures["recall@5"], measures["all@5"]) == (0, pytest.approx(2 / 3), 0)
    assert judge_ranking(["a", "b", "z"], relevant)["all@5"] == 1
    assert judge_ranking([], relevant)["mrr"] == 0


def test_answer_measures() -> None:
    assert f1("The Harbour pump.", "harbour pump") == 1
    assert f1("a pump of brass", "pump") == pytest.approx(2 / 4)
    assert f1("x", "y") == 0
    assert contains("It was built in 1987, they say.", "1987")
    assert not contains("It was built in 19870.", "1987")


def test_queries_and_judgements_are_read(tmp_path: Path) -> None:
    queries, qrels = tmp_path / "q.jsonl", tmp_path / "r.tsv"
    queries.write_text('{"_id": "1", "text": "one"}\n{"id": 2, "question": "two", "answers": ["x"], "answerable": false}\n')
    qrels.write_text("query-id\tcorpus-id\tscore\n1\ta\t1\n1\tb\t2\n")
    one, two = read_queries(queries, qrels)
    assert (one.text, one.relevant, two.answers, two.answerable) == ("one", {"a": 1.0, "b": 2.0}, ("x",), False)
    qrels.write_text("1 0 a 1\n")  # TREC
    assert read_queries(queries, qrels)[0].relevant == {"a": 1.0}
    qrels.write_text("1 a\n")
    with pytest.raises(UsageError, match="line 1"):
        read_queries(queries, qrels)
    queries.write_text("[]\n")
    with pytest.raises(UsageError, match="line 1"):
        read_queries(queries)
    queries.write_text("\n")
    with pytest.raises(UsageError, match="no query"):
        read_queries(queries)


@pytest.mark.parametrize("row", ['{"_id": "1"}', '{"_id": "1", "text": " "}', '{"_id": "1", "text": "a", "answers": "abc"}'])
def test_a_query_that_asks_nothing_is_refused_before_the_work(tmp_path: Path, row: str) -> None:
    (tmp_path / "queries.jsonl").write_text('{"_id": "0", "text": "A line\u2028separator."}\n' + row)
    with pytest.raises(UsageError, match="line 2 of"):
        read_queries(tmp_path / "queries.jsonl")


@pytest.fixture
def questions(tmp_path: Path, docs: Path) -> Path:
    rows = [
        {"_id": "1", "text": "Who designed the Harbour pump?", "answers": ["Marta Lindqvist"]},
        {"_id": "2", "text": "Who commands the ferry Aurora?", "answers": ["Jonas Berg"]},
        {"_id": "3", "text": "Which mountain did the queen of Bolivia climb?", "answerable": False},
    ]
    (tmp_path / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\n1\tguide.md\t1\n2\tboat.txt\t1\n")
    add(Index.create(tmp_path / "index"), [docs])
    return tmp_path


def test_answers_are_judged(questions: Path) -> None:
    index = Index.open(questions / "index")
    result = evaluate_answers(index, read_queries(questions / "queries.jsonl", questions / "qrels.tsv"))
    certain = ("abstains_on_unanswerable", "citation_recall", "answer_in_quotes", "quotes_stand_in_source", "supported")
    wanted = dict.fromkeys(certain, 1) | {"abstains_on_answerable": 0}
    assert wanted.items() <= result["all"].items()
    assert result["abstention_precision"] == 1


def test_the_command_keeps_results_with_their_settings(questions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ["--queries", str(questions / "queries.jsonl"), "--qrels", str(questions / "qrels.tsv")]
    assert run(["rag", "eval", "--index", str(questions / "index"), *files, "--answers"]) == 0
    out = capsys.readouterr().out
    assert "ndcg@10" in out
    assert "abstains_on_unanswerable" in out
    kept = json.loads((questions / "index" / "evaluations.jsonl").read_text())
    assert kept["retrieval"]["all"]["recall@1"] == 1
    assert kept["settings"]["chunk_tokens"] == 220
    assert Index.open(questions / "index").files()
    assert run(["rag", "eval", "--index", str(questions / "index"), "--queries", files[1]]) == 2
    assert "nothing to measure" in capsys.readouterr().err


def test_a_result_that_could_not_be_kept_is_told_before_the_work(
    questions: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmkit.rag.evaluate.evaluate_answers", lambda *_, **__: pytest.fail("it began"))
    arguments = ["--queries", str(questions / "queries.jsonl"), "--answers", "-o", str(questions / "none" / "out.jsonl")]
    assert run(["rag", "eval", "--index", str(questions / "index"), *arguments]) == 1
    assert "No such file or directory" in capsys.readouterr().err
