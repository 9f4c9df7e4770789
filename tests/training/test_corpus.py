"""Rows to the corpus: what is learned in every layout, pairs, cuts, and the account of what was left out."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmkit.errors import UsageError
from llmkit.text.chat import ChatTemplate, encode_prompt
from llmkit.text.tokenizer import Tokenizer, load_tokenizer
from llmkit.training.data import sources as corpus_module
from llmkit.training.data.formats import read_row
from llmkit.training.data.sources import Corpus, SourceReport, load_corpora
from llmkit.training.data.tokenize import encode_document
from llmkit.training.data.vocabulary import train_tokenizer
from llmkit.training.recipe import Source, TokenizerRecipe

from .conftest import TEMPLATE, stories

ASK = {"role": "user", "content": "A cat?"}
TELL = {"role": "assistant", "content": "The cat."}
LAYOUTS: list[dict[str, Any]] = [
    {"text": "The cat."},
    {"prompt": "A cat?", "completion": "The cat."},
    {"instruction": "A", "input": "cat?", "output": "The cat."},
    {"conversations": [{"from": "human", "value": "A cat?"}, {"from": "gpt", "value": "The cat."}]},
    {"messages": [ASK, TELL]},
    {"messages": [ASK, TELL, ASK, TELL]},
    {"messages": [ASK, {"role": "assistant", "tool_calls": [{"name": "look", "arguments": {}}], "content": "I look."}]},
    {"prompt": [ASK], "completion": [TELL]},
]


def load(path: Path, rows: list[dict[str, Any]], tokenizer: Tokenizer, *args: Any, **keys: Any) -> tuple[Corpus, SourceReport]:
    file = path / "rows.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    train, held, report = load_corpora([Source(str(file), **keys)], tokenizer, 0.0, *args)
    assert not len(held)
    return train, report.sources[0]


def documents(corpus: Corpus) -> list[tuple[list[int], list[bool]]]:
    spans = [slice(a, b) for a, b in zip(corpus.offsets[:-1], corpus.offsets[1:], strict=True)]
    return [(corpus.tokens[span].tolist(), corpus.learned[span].tolist()) for span in spans]


@pytest.fixture
def plain(tmp_path: Path) -> Tokenizer:
    """A tokenizer without a chat template."""
    train_tokenizer(TokenizerRecipe(vocab_size=300), stories(120), tmp_path / "plain", 64)
    return load_tokenizer(tmp_path / "plain")


@pytest.mark.parametrize("row", LAYOUTS)
@pytest.mark.parametrize("learn", ["completion", "last", "all"])
def test_the_end_is_learned_in_every_layout(tokenizer: Tokenizer, plain: Tokenizer, row: dict[str, Any], learn: Any) -> None:
    for each in (tokenizer, plain):
        document = read_row(row, "here")
        if document.messages is not None and each is plain:
            with pytest.raises(UsageError, match=r"here is a chat, but the tokenizer has no chat template\. Give it one"):
                encode_document(document, each, Source("", learn=learn))
            continue
        for ids, learned in encode_document(document, each, Source("", learn=learn)):
            assert ids[-1] == each.eos_ids[0]
            assert learned[-1]
            assert ids[0] == each.bos_id
            assert ids[1] != each.bos_id  # never doubled


def test_without_a_template_a_row_is_what_generate_continues(plain: Tokenizer) -> None:
    ((ids, learned),) = encode_document(read_row({"instruction": "A", "input": "cat?", "output": " Yes."}, "here"), plain, Source(""))
    prompt = plain.encode("A\n\ncat?")
    assert ids[: len(prompt)] == prompt
    assert plain.decode(ids) == "A\n\ncat? Yes."
    assert learned == [False] * len(prompt) + [True] * (len(ids) - len(prompt))


def test_what_of_a_chat_is_learned(tokenizer: Tokenizer) -> None:
    messages = [ASK, TELL, ASK, {"role": "assistant", "content": "The dog."}, ASK]

    def learned(row: dict[str, Any], learn: Any = "completion") -> str:
        ((ids, mask),) = encode_document(read_row(row, "here"), tokenizer, Source("", learn=learn))
        return tokenizer.decode([i for i, keep in zip(ids, mask, strict=True) if keep], skip_special=False)

    assert learned({"messages": messages}) == "The cat.<|end|>The dog.<|end|>"
    assert learned({"messages": messages}, "last") == "The dog.<|end|>"
    assert learned({"prompt": messages[:3], "completion": messages[3:4]}) == "The dog.<|end|>"
    assert learned({"messages": [ASK, {**TELL, "weight": 0}, *messages[2:]]}) == "The dog.<|end|>"  # OpenAI's key


def test_pairs_are_two_documents_with_one_prompt(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = [{"prompt": f"Say {n}.", "chosen": f"It is {n}.", "rejected": f"No {n}."} for n in range(40)]
    rows += [{"prompt": "a", "chosen": "same", "rejected": "same"}, {"prompt": "b", "chosen": "", "rejected": "c"}]
    corpus, report = load(tmp_path, rows, tokenizer, None, True)
    assert (report.rows, report.documents, report.equal, report.no_target) == (42, 80, 1, 1)
    for n, (good, bad) in enumerate(zip(documents(corpus)[::2], documents(corpus)[1::2], strict=True)):
        prompt = encode_prompt(tokenizer, [{"role": "user", "content": f"Say {n}."}])
        for (ids, learned), answer in ((good, f"It is {n}."), (bad, f"No {n}.")):
            assert ids == [*prompt, *tokenizer.encode(answer, bos=False), tokenizer.eos_ids[0]]
            assert learned == [False] * len(prompt) + [True] * (len(ids) - len(prompt))
    with pytest.raises(UsageError, match="one answer, and a preference loss compares two"):
        load(tmp_path, LAYOUTS[:1], tokenizer, None, True)


def test_pairs_outside_of_preference_training(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = [{"prompt": "A cat?", "chosen": "The cat.", "rejected": "No."}]
    with pytest.raises(UsageError, match=r"rows.jsonl:1 has a chosen and a rejected answer.*loss: dpo.*learn: chosen"):
        load(tmp_path, rows, tokenizer)
    chosen, _ = load(tmp_path, rows, tokenizer, learn="chosen")
    same, _ = load(tmp_path, LAYOUTS[1:2], tokenizer)
    assert documents(chosen) == documents(same)


def test_what_is_cut_and_dropped_is_counted(tokenizer: Tokenizer, tmp_path: Path) -> None:
    long = " ".join(stories(30))
    rows = [
        {"messages": [ASK]},  # nothing to learn
        {"prompt": "a", "completion": "  "},
        {"prompt": "a", "completion": long},  # cut
        {"prompt": long, "completion": "a"},  # the answer lies past the cut
        {"text": long},  # goes on in further rows
        *LAYOUTS[1:2] * 3,  # two duplicates
    ]
    corpus, report = load(tmp_path, rows, tokenizer, 32)
    assert (report.rows, report.documents, report.no_target) == (8, 5, 2)
    assert (report.cut, report.cut_away, report.continued, report.duplicates) == (1, 1, 1, 2)
    assert report.ended == 4
    lengths = np.diff(corpus.offsets)
    assert lengths[0] == 33  # 32 slots
    assert lengths[1] > 33
    assert report.tokens == len(corpus.tokens)
    assert report.targets == corpus.target_count
    told = report.notes(32)
    assert any("1 documents are cut at max_length=32" in line for line in told)
    assert any("2 rows have nothing to learn" in line for line in told)
    kept = tokenizer.decode(corpus.tokens[: corpus.offsets[1]][corpus.learned[: corpus.offsets[1]]].tolist())
    assert corpus.target_bytes[0] == len(kept.encode())

    _, report = load(tmp_path, rows, tokenizer, 32, overlong="drop")
    assert (report.documents, report.overlong) == (3, 3)
    with pytest.raises(UsageError, match=r"rows.jsonl:3 has [\d,]+ tokens, more than max_length=32\. Raise max_length"):
        load(tmp_path, rows, tokenizer, 32, overlong="error")


def test_turns_that_change_later_are_split_and_counted(tokenizer_folder: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_folder)
    tokenizer.chat_template = ChatTemplate(
        TEMPLATE.replace("%}{{ m.content }}<|end|>", "%}{{ m.content if loop.last else '.' }}<|end|>"), {}
    )
    corpus, report = load(tmp_path, LAYOUTS[5:6], tokenizer)
    assert (len(corpus), report.split) == (2, 1)
    assert [place.rpartition(" (")[2] for place in corpus.places] == ["turn 1)", "turn 2)"]
    assert corpus.target_bytes.tolist() == [len("The cat.")] * 2


def test_a_row_that_the_template_refuses(tokenizer_folder: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_folder)
    refuse = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    tokenizer.chat_template = ChatTemplate(refuse + TEMPLATE, tokenizer.special_tokens)
    rows = [*LAYOUTS[4:5], {"messages": [{"role": "system", "content": "s"}, ASK, TELL]}, {"unknown": 1}]
    with pytest.raises(UsageError, match=r"rows.jsonl:2 \(roles: system, user, assistant\): .*System role not supported"):
        load(tmp_path, rows[:2], tokenizer)
    corpus, report = load(tmp_path, rows, tokenizer, bad_rows="drop")
    assert (len(corpus), report.rows, report.bad) == (1, 3, 2)
    assert "rows.jsonl:" in report.first_bad


def test_an_empty_source_is_an_error(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"rows\.jsonl in data holds no document"):
        load(tmp_path, [], tokenizer)
    with pytest.raises(UsageError, match=r"no document to learn from .* 1 rows have nothing to learn"):
        load(tmp_path, [{"messages": [ASK]}], tokenizer)


def test_splits_go_where_they_belong(tokenizer: Tokenizer, tmp_path: Path) -> None:
    for name, texts in (("train", ["one", "two"]), ("valid", ["two", "three"])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    train, held, report = load_corpora([Source(str(tmp_path))], tokenizer, 0.5)
    assert (len(train), len(held)) == (2, 2)
    assert report.sources[0].seen_in_training == 1


def test_special_tokens_in_text_are_pointed_out_or_parsed(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = [{"text": "<|user|>A cat?<|assistant|>The cat.<|end|>"}, {"text": "The cat."}]
    corpus, report = load(tmp_path, rows, tokenizer)
    assert report.written == 1
    assert "special_tokens: true" in report.notes(None)[0]
    parsed, report = load(tmp_path, rows, tokenizer, special_tokens=True)
    assert report.written == 0
    ids = parsed.tokens[: parsed.offsets[1]].tolist()
    assert ids == [0, *encode_prompt(tokenizer, [ASK])[1:], *tokenizer.encode("The cat.", bos=False), 0]
    assert len(corpus.tokens) > len(parsed.tokens)


def test_a_tokenizer_without_an_end_is_refused(plain: Tokenizer) -> None:
    plain.eos_ids = ()
    for row in LAYOUTS[:2]:
        with pytest.raises(UsageError, match="names no end-of-text token"):
            encode_document(read_row(row, "here"), plain, Source(""))


def test_learning_everything_learns_an_end_too(tokenizer_folder: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_folder)
    tokenizer.chat_template = ChatTemplate(TEMPLATE.replace("<|end|>", ""), tokenizer.special_tokens)
    ((ids, learned),) = encode_document(read_row(LAYOUTS[4], "here"), tokenizer, Source("", learn="all"))
    assert ids[-1] == tokenizer.eos_ids[0]
    assert all(learned)


def test_long_texts_are_encoded_a_few_at_a_time(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is shown of the reading moves between two chunks, and a book takes as long as thousands of chats."""
    steps: list[int] = []
    monkeypatch.setattr(corpus_module, "_progress", lambda: nullcontext(steps.append))
    monkeypatch.setattr(corpus_module, "_CHUNK_TEXT", 100)
    rows = [{"text": f"The cat {n}. " * 5} for n in range(6)]
    train, _ = load(tmp_path, rows, tokenizer)
    assert steps == [2, 2, 2]
    monkeypatch.undo()
    assert documents(train) == documents(load(tmp_path, rows, tokenizer)[0])
