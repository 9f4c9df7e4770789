"""Writes the collections that `llmkit rag eval` is measured on in the BEIR layout: python recipes/rag_data.py DATA OUT

DATA holds rag/cranfield, rag/xquad.en.json and rag/anthropic_docs (see the README's figures). Of each collection OUT gets
corpus.jsonl, queries.jsonl and qrels.tsv; of XQuAD also, for each fold of titles, an index without them and all questions
(folds/N/corpus.jsonl, folds/N/queries.jsonl), and the questions of one collection put to the documents of another (foreign/A-B.jsonl).
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

FOLDS = 4


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_collection(out: Path, corpus: list[dict[str, Any]], queries: list[dict[str, Any]], qrels: list[tuple[str, str]]) -> None:
    write_rows(out / "corpus.jsonl", corpus)
    write_rows(out / "queries.jsonl", queries)
    lines = "".join(f"{query}\t{document}\t1\n" for query, document in qrels)
    (out / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\n" + lines, encoding="utf-8")


def cranfield(data: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[tuple[str, str]]]:
    """1,400 abstracts; the query numbered n in the judgements is the n-th of cran.qry; every judgement listed counts."""

    def parts(name: str) -> list[str]:
        return re.split(r"^\.I ", (data / "cranfield" / name).read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]

    corpus = []
    for part in parts("cran.all.1400"):
        text = part.partition("\n.W\n")[2]
        corpus.append({"_id": part.partition("\n")[0].strip(), "text": " ".join(text.split())})
    queries = [
        {"_id": str(number), "text": " ".join(part.partition(".W\n")[2].split())} for number, part in enumerate(parts("cran.qry"), 1)
    ]
    lines = (data / "cranfield" / "QRelsCorrectedforTRECeval").read_text(encoding="utf-8").split("\n")
    return corpus, queries, [(line.split()[0], line.split()[2]) for line in lines if line.strip()]


def xquad(data: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[tuple[str, str]]]:
    """240 paragraphs of 48 articles and 1,190 questions."""
    corpus, queries, qrels = [], [], []
    for article in json.loads((data / "xquad.en.json").read_text(encoding="utf-8"))["data"]:
        for number, paragraph in enumerate(article["paragraphs"]):
            key = f"{article['title']}#{number}"
            corpus.append({"_id": key, "text": paragraph["context"]})
            for question in paragraph["qas"]:
                answers = [answer["text"] for answer in question["answers"]]
                queries.append({"_id": question["id"], "text": question["question"], "answers": answers})
                qrels.append((question["id"], key))
    return corpus, queries, qrels


def anthropic_docs(data: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[tuple[str, str]]]:
    """232 sections and 100 questions, most with two gold sections."""
    folder = data / "anthropic_docs"
    sections = json.loads((folder / "anthropic_docs.json").read_text(encoding="utf-8"))
    questions = json.loads((folder / "docs_evaluation_dataset.json").read_text(encoding="utf-8"))
    corpus = [{"_id": one["chunk_link"], "title": one["chunk_heading"], "text": one["text"]} for one in sections]
    queries = [{"_id": one["id"], "text": one["question"], "answers": [one["correct_answer"]]} for one in questions]
    return corpus, queries, [(one["id"], key) for one in questions for key in one["correct_chunks"]]


def title_of(key: str) -> str:
    return key.partition("#")[0]


def main(data: Path, out: Path) -> None:
    collections = {"cranfield": cranfield(data), "xquad": xquad(data), "anthropic_docs": anthropic_docs(data)}
    for name, (corpus, queries, qrels) in collections.items():
        write_collection(out / name, corpus, queries, qrels)
    for own in collections:
        for other, (_, queries, _) in collections.items():
            if own != other:
                rows = [{"_id": query["_id"], "text": query["text"], "answerable": False} for query in queries]
                write_rows(out / "foreign" / f"{other}-in-{own}.jsonl", rows)
    corpus, queries, qrels = collections["xquad"]
    titles = list(dict.fromkeys(title_of(row["_id"]) for row in corpus))
    for fold in range(FOLDS):
        removed = set(titles[fold::FOLDS])
        write_rows(out / "folds" / str(fold) / "corpus.jsonl", [row for row in corpus if title_of(row["_id"]) not in removed])
        rows = [query | {"answerable": title_of(key) not in removed} for query, (_, key) in zip(queries, qrels, strict=True)]
        write_rows(out / "folds" / str(fold) / "queries.jsonl", rows)


if __name__ == "__main__":
    main(Path(sys.argv[1]) / "rag", Path(sys.argv[2]))
