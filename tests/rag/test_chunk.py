"""Chunks follow the structure of documents, and are spans of them."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from llmkit.rag.chunk import Chunk, chunk
from llmkit.rag.embed import words
from llmkit.rag.read import Document, read
from llmkit.rag.sentences import sentences
from llmkit.rag.terms import clean


def chunks(name: str, text: str, size: int = 60) -> tuple[Document, list[Chunk]]:
    document = read(Path("/docs") / name, text.encode())
    return document, chunk(document, words, size)


def test_markdown_keeps_its_heading_path_and_its_code() -> None:
    text = (
        f"# A\n\n{'Some words to begin. ' * 4}\n\n## B\n\n{'One sentence here. ' * 9}\n\n```python\n# not a heading\n\nx = 1\n```\n\n"
        f"## C\n\n{'Other words. ' * 12}"
    )
    document, found = chunks("a.md", text)
    assert [one.heading for one in found] == ["A", "A > B", "A > C"]
    assert "# not a heading\n\nx = 1\n```" in found[1].plain
    assert document.text[found[1].start :].startswith("## B")
    assert found[1].line == 5


def test_a_long_table_carries_its_header() -> None:
    text = "## Parts\n\n| name | weight |\n| --- | --- |\n" + "".join(f"| part {n} | {n} kg |\n" for n in range(40))
    document, found = chunks("a.md", text)
    assert len(found) > 2
    assert found[0].plain.startswith("## Parts")
    for one in found[2:]:
        assert one.context == "| name | weight |\n| --- | --- |"
        assert one.heading == "Parts"
    assert all(f"| part {n} |" in document.text[one.start : one.end] for one in found[-1:] for n in (39,))


def test_csv_rows_carry_the_header_and_quoted_newlines_do_not_cut_them() -> None:
    text = "name,note\n" + "".join(f'person {n},"first\nsecond {n}"\n' for n in range(30))
    _, found = chunks("a.csv", text, 40)
    assert len(found) > 3
    assert all(one.context == "name,note" for one in found[1:])
    assert all(one.plain.count('"') % 2 == 0 for one in found)


def test_code_is_cut_at_definitions() -> None:
    body = "    value = compute(value, other)\n" * 6
    text = f"import os\n\n\ndef first(value):\n{body}\n\nclass Second:\n    def method(self, value):\n{body}"
    _, found = chunks("a.py", text)
    assert [one.heading for one in found][-2:] == ["def first", "class Second"]


def test_jsonl_rows_have_their_text_title_key_and_fields() -> None:
    rows = [
        {"_id": "x1", "title": "Pumps", "text": 'A "pump"\nmoves caf\u00e9 water.', "year": 1987},
        {"_id": "x2", "text": "Other."},
        {"a": "no usual name", "b": 2},
    ]
    text = "\n".join(json.dumps(row) for row in rows) + "\nnot json\n\n"
    document, found = chunks("a.jsonl", text)
    assert [one.key for one in found] == ["x1", "x2", "/docs/a.jsonl", "/docs/a.jsonl"][: len(found)]
    first = found[0]
    assert document.text[first.start : first.end] == r"A \"pump\"\nmoves caf\u00e9 water."
    assert clean(first.plain).split() == ["A", '"pump"', "moves", "café", "water."]
    assert len(first.plain) == first.end - first.start
    assert first.heading == "Pumps"
    assert "year=1987" in first.fields


def test_a_byte_order_mark_is_no_part_of_a_heading_or_a_row() -> None:
    document, found = chunks("a.md", "\ufeff# Title\n\nWords.")
    assert found[0].heading == "Title"
    assert document.text[found[0].start : found[0].end] == found[0].plain
    _, found = chunks("a.jsonl", '\ufeff{"_id": "7", "text": "Words."}')
    assert (found[0].key, found[0].plain, found[0].line) == ("7", "Words.", 1)


def test_rows_that_no_store_would_take_are_mended() -> None:
    """Halves of a surrogate pair, and a depth that Python's parser gives up at."""
    _, found = chunks("a.jsonl", r'{"_id": "i\udfff", "title": "t\ud800", "text": "Words.", "x": "y\ud800"}')
    assert (found[0].key, found[0].heading, found[0].fields[-1]) == ("i?", "t?", "x=y?")
    assert len(chunks("a.jsonl", '{"a":' + "[" * 100_000 + "]" * 100_000 + "}", 50_000)[1]) > 1


@pytest.mark.parametrize("name", ["a.md", "a.txt", "a.py", "a.csv", "a.jsonl"])
def test_any_text_gives_chunks_that_cover_it_within_the_size(name: str) -> None:
    generator = random.Random(1)
    alphabet = [
        "word ",
        "\n",
        "\n\n",
        "# H\n",
        "| a | b |\n",
        "|---|---|\n",
        "```\n",
        "x" * 300,
        ". ",
        "é",
        '"',
        ",",
        "def f():\n",
        "    ",
        "{",
    ]
    for _ in range(60):
        text = "".join(generator.choice(alphabet) for _ in range(generator.randint(1, 120)))
        if not text.strip():
            continue
        document, found = chunks(name, text, 20)
        covered = set()
        for one in found:
            assert 0 <= one.start < one.end <= len(document.text)
            assert words(one.plain) <= 20
            assert one.line == document.text.count("\n", 0, one.start) + 1
            covered.update(range(one.start, one.end))
        if name != "a.csv":  # the header of a table stands beside its rows
            assert all(i in covered for i, c in enumerate(document.text) if not c.isspace())


def test_sentences() -> None:
    text = (
        "Dr. Smith went home. He had 5.5 sacks, i.e. many.\n\n## Title here\n- item one\n- item two. Yes!"
        '\nIn the U.S. Army he was "good." Then'
        " a checkpoint of\n1.2 billion loads."
    )
    assert [text[start:end] for start, end in sentences(text)] == [
        "Dr. Smith went home.",
        "He had 5.5 sacks, i.e. many.",
        "Title here",
        "item one",
        "item two.",
        "Yes!",
        'In the U.S. Army he was "good."',
        "Then a checkpoint of\n1.2 billion loads.",
    ]


def test_a_heading_ends_with_its_line_and_code_at_every_line() -> None:
    text = "# Pump\nIt stands at the quay.\n\n```sh\nrun --fast   quickly\nstop\n```\nThen it is\nquiet.\n\n"
    text += "| day | opens |\n|---|---|\n| Monday | 10:00 |"
    said = [
        "Pump",
        "It stands at the quay.",
        "run --fast   quickly",
        "stop",
        "Then it is\nquiet.",
        "day | opens",
        "---|---",
        "Monday | 10:00",
    ]
    assert [text[start:end] for start, end in sentences(text)] == said
    cut = "run --fast   quickly\nstop\n```\n\nThen it is\nquiet.\n\n```\nlast"  # the chunk began within the code
    assert [cut[start:end] for start, end in sentences(cut)] == [
        "run --fast   quickly",
        "stop",
        "Then it is\nquiet.",
        "last",
    ]
