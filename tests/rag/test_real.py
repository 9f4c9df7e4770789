"""What the README claims, on parts of public collections: search, proof of altered evidence, abstention."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from llmkit.rag.answer import ask
from llmkit.rag.evaluate import evaluate_answers, evaluate_retrieval, read_queries
from llmkit.rag.evidence import support
from llmkit.rag.index import Index
from llmkit.rag.ingest import add
from llmkit.rag.sentences import sentences
from recipes.rag_data import main as write_collections

pytestmark = pytest.mark.real
NAME = re.compile(r"(?<=[a-z,] )[A-Z][a-z]{3,}")


@pytest.fixture(scope="module")
def collections(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("collections")
    write_collections(data_dir / "rag", folder)
    return folder


def indexed(folder: Path, *paths: Path) -> Index:
    index = Index.create(folder / "index")
    add(index, paths)
    return index


def quoted_sentences(collections: Path) -> list[str]:
    rows = [json.loads(line)["text"] for line in (collections / "xquad" / "corpus.jsonl").read_text().splitlines()]
    found = [text[start:end] for text in rows for start, end in sentences(text)]
    return [sentence for sentence in found if 40 < len(sentence) < 300]


def other_number(sentence: str, random: random.Random, names: list[str]) -> str | None:
    numbers = list(re.finditer(r"\d[\d,.]*\d|\d", sentence))
    if not numbers:
        return None
    chosen = random.choice(numbers)
    last = str((int(chosen[0][-1]) + random.randint(1, 8)) % 10)
    return sentence[: chosen.end() - 1] + last + sentence[chosen.end() :]


def other_name(sentence: str, random: random.Random, names: list[str]) -> str | None:
    found = list(NAME.finditer(sentence))
    if not found:
        return None
    chosen = random.choice(found)
    return sentence[: chosen.start()] + random.choice([name for name in names if name != chosen[0]]) + sentence[chosen.end() :]


def negated(sentence: str, random: random.Random, names: list[str]) -> str | None:
    if denied := re.search(r"\b(?:not|never) ", sentence):
        return sentence[: denied.start()] + sentence[denied.end() :]
    verb = re.search(r"\b(?:is|are|was|were|has|have|had|can|could|will|would|may|must|should) ", sentence)
    return sentence[: verb.end()] + "not " + sentence[verb.end() :] if verb else None


@pytest.mark.parametrize("alter", [other_number, other_name, negated])
def test_altered_evidence_is_no_support(collections: Path, alter: Callable[[str, random.Random, list[str]], str | None]) -> None:
    """The claim is the sentence as it stood; a number, a name or a negation of the quote is changed by rule."""
    generator = random.Random(1)
    claims = quoted_sentences(collections)
    names = [name for claim in claims for name in NAME.findall(claim)]
    pairs = [(claim, quote) for claim in claims if (quote := alter(claim, generator, names)) is not None and quote != claim]
    assert len(pairs) > 300
    assert sum(support(claim, quote).supported for claim, quote in pairs) < 0.03 * len(pairs)
    assert sum(support(claim, claim).supported for claim, _ in pairs) > 0.97 * len(pairs)


def test_shortened_claims_are_supported(collections: Path) -> None:
    """Without what stands in brackets and without the last clause."""
    claims = quoted_sentences(collections)
    short = []
    for claim in claims:
        parts = re.sub(r"\s*\([^)]*\)", "", claim).split(", ")
        short.append(", ".join(parts[:-1]) + "." if len(parts) > 2 else ", ".join(parts))
    assert sum(support(one, claim).supported for one, claim in zip(short, claims, strict=True)) > 0.95 * len(claims)


def test_search_finds_the_paragraph(collections: Path, tmp_path: Path) -> None:
    index = indexed(tmp_path, collections / "xquad" / "corpus.jsonl")
    queries = read_queries(collections / "xquad" / "queries.jsonl", collections / "xquad" / "qrels.tsv")[::8]
    result = evaluate_retrieval(index, queries)["all"]
    assert result["recall@1"] > 0.9
    assert result["recall@5"] > 0.97


def test_it_abstains_where_the_documents_do_not_say(collections: Path, tmp_path: Path) -> None:
    """Articles taken out of the index, and questions about something else altogether; every quote stands in its file."""
    index = indexed(tmp_path, collections / "folds" / "3" / "corpus.jsonl")
    result = evaluate_answers(index, read_queries(collections / "folds" / "3" / "queries.jsonl")[::14])["all"]
    assert result["abstains_on_unanswerable"] > 0.8
    assert result["abstains_on_answerable"] < 0.08
    assert result["quotes_stand_in_source"] == 1
    foreign = read_queries(collections / "foreign" / "cranfield-in-xquad.jsonl")[::6]
    assert evaluate_answers(index, foreign)["all"]["abstains_on_unanswerable"] > 0.95


def test_a_real_folder_of_docs(data_dir: Path, tmp_path: Path) -> None:
    folder = data_dir / "rag" / "llm_docs_md"
    index = indexed(tmp_path, folder)
    assert len(index.files()) == len(list(folder.rglob("*.md")))
    for question in ("How do I set a default model?", "Where are logs stored?", "How do I install a plugin?"):
        answer = ask(None, question, index)
        assert not answer.abstained
        for citation in answer.sources:
            assert Path(citation.file).read_text(encoding="utf-8")[citation.start : citation.end] == citation.quote
