"""Passages that fit, and chats that are grounded turn by turn."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmkit.cli.main import run
from llmkit.errors import ContextOverflow
from llmkit.rag.index import Index
from llmkit.rag.prompt import Grounding, grounded
from llmkit.rag.retrieve import search
from tests.rag.test_answer import ABSENT, Scripted

QUESTION = "How much water does the Harbour pump move per minute?"


def test_only_what_fits_is_sent(index: Index) -> None:
    hits = search(index, "Harbour pump ferry")
    assert len(hits) >= 3
    llm = Scripted("")
    _, used = grounded(llm, hits, QUESTION, context_tokens=10_000, sampling={})  # type: ignore[arg-type]
    assert used == hits
    _, used = grounded(llm, hits, QUESTION, context_tokens=1, sampling={})  # type: ignore[arg-type]
    assert used == hits[:1]
    _, used = grounded(llm, hits, QUESTION, context_tokens=10_000, sampling={"max_tokens": 3900})  # type: ignore[arg-type]
    assert 0 < len(used) < len(hits)
    llm.ctx_size = 50
    with pytest.raises(ContextOverflow, match="no passage fits"):
        grounded(llm, hits, QUESTION, context_tokens=100, sampling={})  # type: ignore[arg-type]


def test_a_turn_gets_passages_and_its_reply_is_proved(index: Index) -> None:
    chat = Grounding(Scripted(""), index)  # type: ignore[arg-type]
    turns = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": QUESTION},
    ]
    messages = chat.messages(turns, {})
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user"]
    assert messages[0]["content"].startswith("Be kind.\n\nYou answer a question from passages")
    assert "340 litres" in messages[-1]["content"]
    assert turns[-1]["content"] == QUESTION
    lines = chat.proof("It moves 340 litres of water per minute. It is green.")
    assert 'guide.md:3 "The Harbour pump moves 340 litres of water per minute."' in lines[0]
    assert lines[1] == "[unsupported] It is green."


def test_a_turn_that_the_documents_do_not_answer_is_said_to_have_no_source(index: Index) -> None:
    chat = Grounding(Scripted(""), index)  # type: ignore[arg-type]
    asked = [{"role": "user", "content": ABSENT}]
    assert chat.messages(asked, {}) == asked
    assert "no source" in chat.proof("Illimani.")[0]


def test_chat_with_documents(index: Index, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["chat", str(tiny_model_dir), "--rag", index.location, "-p", QUESTION, "-n", "8", "--temperature", "0", "-t", "1"]
    assert run(arguments) == 0
    captured = capsys.readouterr()
    assert captured.out.strip()
    assert captured.err.startswith(("[unsupported]", "/"))
    assert run(["chat", str(tiny_model_dir), "--rag", "nowhere", "-p", "x", "-t", "1"]) == 1
    assert "there is no index" in capsys.readouterr().err


def test_ask_with_a_model_whose_words_have_no_proof(index: Index, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["rag", "ask", QUESTION, "--index", index.location, "-m", str(tiny_model_dir), "-n", "8", "-t", "1", "--strict"]
    assert run(arguments) == 0
    out = capsys.readouterr().out
    assert out.startswith("The documents do not say.")
    assert "The nearest passages:" in out


def test_of_a_passage_that_is_too_long_the_sentences_that_fit_are_sent(index: Index) -> None:
    hits = search(index, QUESTION)
    llm = Scripted("")
    messages, whole = grounded(llm, hits[:1], QUESTION, context_tokens=1500, sampling={})  # type: ignore[arg-type]
    llm.ctx_size = len(llm.encode_chat(messages)) + 9  # one word less than that and the reply
    messages, used = grounded(llm, hits, QUESTION, context_tokens=1500, sampling={"max_tokens": 10})  # type: ignore[arg-type]
    assert len(used) == 1
    assert "340 litres" in used[0].text
    assert len(used[0].text) < len(whole[0].text)
    assert Path(used[0].row.file).read_text()[used[0].start : used[0].end] == used[0].text
    assert used[0].text in messages[-1]["content"]
