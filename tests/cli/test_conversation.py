"""The chat's state without a terminal, and Markdown that grows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import llmkit
from llmkit.cli.conversation import Conversation
from llmkit.cli.terminal import read_input, split_finished
from llmkit.errors import UsageError


@pytest.fixture
def conversation(tiny_model_dir: Path) -> Conversation:
    llm = llmkit.load(tiny_model_dir, device="cpu")
    return Conversation(llm, sampling={"max_tokens": 8, "seed": 2, "ignore_eos": True, "temperature": 1.0})


def reply(conversation: Conversation, text: str | None = None) -> str:
    stream = conversation.retry() if text is None else conversation.ask(text)
    list(stream)
    conversation.answered(stream.completion)
    return stream.completion.text


def test_a_reply_that_was_interrupted_before_its_first_word_leaves_no_trace(conversation: Conversation) -> None:
    reply(conversation, "The dog")
    before = list(conversation.turns)
    stream = conversation.ask("a ball")
    stream.close()
    conversation.answered(stream.completion)
    assert conversation.turns == before


def test_retry_takes_the_next_seed_and_undo_the_whole_turn(conversation: Conversation) -> None:
    replies = [reply(conversation, "The dog"), reply(conversation), reply(conversation)]
    assert len(set(replies)) == 3
    assert conversation.turns == [{"role": "user", "content": "The dog"}, {"role": "assistant", "content": replies[-1]}]
    assert conversation.undo() == "The dog"
    assert conversation.turns == []
    for nothing in (conversation.undo, conversation.retry):
        with pytest.raises(UsageError, match="nothing to"):
            nothing()


def test_saved_chats_are_training_rows(conversation: Conversation, tmp_path: Path) -> None:
    file = tmp_path / "chats.jsonl"
    conversation.system = "Be a cat. Ä"
    reply(conversation, "The dog")
    assert conversation.save(str(file)) == 1
    reply(conversation, "a ball")
    assert conversation.save(str(file)) == 2
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert [len(row["messages"]) for row in rows] == [3, 5]
    other = Conversation(conversation.llm)
    other.load(str(file))
    assert other.messages == conversation.messages


@pytest.mark.parametrize("content", ["", "no json", "{}", '{"messages": 3}', '{"messages": [1]}', '{"messages": [{"role": "user"}]}', "[]"])
def test_loading_what_is_no_chat(conversation: Conversation, tmp_path: Path, content: str) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text(content)
    with pytest.raises(UsageError, match="not a chat"):
        conversation.load(str(file))
    with pytest.raises(UsageError, match="cannot be read"):
        conversation.load(str(tmp_path / "none.jsonl"))


def test_read_input(tmp_path: Path) -> None:
    file = tmp_path / "a"
    for raw, text in ((b"a\n", "a"), (b"a\r\n", "a"), (b"a\n\n", "a\n"), (b" a", " a"), ("ä\n".encode(), "ä")):
        file.write_bytes(raw)
        assert read_input(str(file)) == text
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="not UTF-8"):
        read_input(str(file))


MARKDOWN = """First paragraph
goes on.

- one

- two

  still two

1. a

2. b

```python
x = 1

y = 2
```

The end."""


def test_markdown_is_cut_only_between_finished_blocks() -> None:
    done, open_text = "", ""
    cuts = []
    for character in MARKDOWN:
        finished, open_text = split_finished(open_text + character)
        if finished:
            cuts.append(finished)
        done += finished
    assert done + open_text == MARKDOWN
    assert [cut.strip() for cut in cuts] == [
        "First paragraph\ngoes on.\n\n- one\n\n- two\n\n  still two\n\n1. a\n\n2. b",
        "```python\nx = 1\n\ny = 2\n```",
    ]
    assert open_text == "The end."
