"""The chat on a pseudo-terminal, as a person drives it."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pexpect
import pytest

import llmkit

PROMPT = ">>> "
WAIT = 120  # seconds; the machine may be busy


class Terminal:
    """A running `llmkit chat`; `answer` returns what stands between a line typed and the next prompt, without colours."""

    def __init__(self, model: Path, state: Path, *arguments: str) -> None:
        env = {name: value for name, value in os.environ.items() if not name.startswith("LLMKIT_")}
        env |= {"XDG_STATE_HOME": str(state), "TERM": "xterm-256color", "PROMPT_TOOLKIT_NO_CPR": "1", "LLMKIT_DEVICE": "cpu"}
        command = ["-m", "llmkit", "chat", str(model), *arguments]
        self.child = pexpect.spawn(sys.executable, command, env=env, encoding="utf-8", timeout=WAIT, dimensions=(40, 100))

    def wait(self) -> str:
        """What was printed up to the next empty prompt."""
        self.child.expect(r"a message, or /help")
        return plain(self.child.before or "")

    def answer(self, line: str) -> str:
        self.child.send(line + "\r")
        return self.wait()

    def end(self) -> int:
        self.child.expect(pexpect.EOF)
        self.child.close()
        return int(self.child.exitstatus)


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[=>]|\r", "", text)


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


@pytest.fixture
def terminal(tiny_model_dir: Path, state: Path) -> Iterator[Terminal]:
    terminal = Terminal(tiny_model_dir, state, "-n", "12", "--seed", "1", "--ignore-eos")
    yield terminal
    terminal.child.close(force=True)


def test_a_conversation(terminal: Terminal, tmp_path: Path) -> None:
    start = terminal.wait()
    assert "llama" in start
    assert "temperature 0.7, top_k 20, max_tokens 12*, seed 1*" in start  # the defaults in one line

    terminal.answer("The dog")
    first = saved(terminal, tmp_path / "first.jsonl")
    assert [message["role"] for message in first] == ["user", "assistant"]
    assert first[0]["content"] == "The dog"

    terminal.answer("/retry")
    second = saved(terminal, tmp_path / "second.jsonl")
    assert second[0] == first[0]
    assert second[1] != first[1]  # the next seed
    assert len(second) == 2

    assert "forgot: The dog" in terminal.answer("/undo")
    assert "nothing to save yet" in terminal.answer(f"/save {tmp_path / 'none.jsonl'}")
    assert not (tmp_path / "none.jsonl").exists()

    assert "The dog" in terminal.answer(f"/load {tmp_path / 'first.jsonl'}")
    assert saved(terminal, tmp_path / "again.jsonl") == first

    assert "system: Be a cat." in terminal.answer("/system Be a cat.")
    assert saved(terminal, tmp_path / "system.jsonl") == [{"role": "system", "content": "Be a cat."}, *first]
    greedy = terminal.answer("/set temperature 0")
    assert "temperature 0.0*" in greedy
    assert "top_k" not in greedy  # it has no effect there
    assert "temperature 0.7," in terminal.answer("/set temperature default")
    assert "error: temperature" in terminal.answer("/set temperature -3")
    assert "Did you mean 'temperature'?" in terminal.answer("/set temprature 1")
    assert "takes no 'now'" in terminal.answer("/retry now")
    assert "takes no 'now'" in terminal.answer("/bye now")
    assert "error" in terminal.answer("/save ~nobody-of-that-name/x")
    assert "Did you mean /history?" in terminal.answer("/histori")
    assert "assistant:" in terminal.answer("/history")
    assert "verbose on" in terminal.answer("/set verbose on")
    assert "tok/s" in terminal.answer("a ball")
    terminal.answer("/clear")
    assert "assistant:" not in terminal.answer("/history")
    terminal.answer("/system none")
    assert "nothing was said" in terminal.answer("/history")
    assert "/retry" in terminal.answer("/help")

    terminal.child.sendintr()
    terminal.child.expect("/bye or Ctrl-D leaves")
    terminal.wait()
    terminal.child.send("/bye\r")
    assert terminal.end() == 0


def saved(terminal: Terminal, file: Path) -> list[dict[str, str]]:
    assert "saved as row 1" in terminal.answer(f"/save {file}")
    (row,) = file.read_text().splitlines()
    messages = json.loads(row)["messages"]
    assert isinstance(messages, list)
    return messages


def test_ctrl_c_stops_the_reply_and_keeps_what_was_said(tiny_model_dir: Path, state: Path, tmp_path: Path) -> None:
    terminal = Terminal(tiny_model_dir, state, "-n", "4000", "--temp", "1", "--seed", "3", "--ignore-eos")
    llm = llmkit.load(tiny_model_dir, device="cpu")
    begin = llm.chat("sun", temperature=1, seed=3, max_tokens=20, ignore_eos=True).text.split()[0]
    assert begin not in "sun"
    terminal.wait()
    terminal.child.send("sun\r")
    terminal.child.expect_exact(begin)  # the reply has begun
    terminal.child.sendintr()
    assert "interrupted" in terminal.wait()
    messages = saved(terminal, tmp_path / "chat.jsonl")
    assert [message["role"] for message in messages] == ["user", "assistant"]
    assert 0 < len(messages[1]["content"]) < 8000
    terminal.child.sendeof()
    assert terminal.end() == 0


def test_ctrl_c_together_with_enter_sends_nothing(tiny_model_dir: Path, state: Path) -> None:
    """The terminal may still give keys and not signals then; the interrupt must not wait for the end of the reply."""
    terminal = Terminal(tiny_model_dir, state, "-n", "4000", "--ignore-eos")
    terminal.wait()
    terminal.child.send("sun\r\x03")
    assert "nothing was sent" in terminal.wait()
    assert "nothing to save yet" in terminal.answer(f"/save {state / 'none.jsonl'}")
    terminal.child.close(force=True)


def test_a_full_context_says_how_to_go_on(tiny_model_dir: Path, state: Path) -> None:
    terminal = Terminal(tiny_model_dir, state, "-c", "64", "--ignore-eos")
    terminal.wait()
    assert "the context of 64 tokens is full; /undo" in terminal.answer("sun")
    reply = " ".join(terminal.answer("the dog ran " * 30).split())  # lines break where the terminal ends
    assert "more than the context of 64" in reply
    assert "/clear the whole chat" in reply
    terminal.answer("/clear")
    assert "is full" in terminal.answer("dog")
    terminal.child.close(force=True)


def test_a_pasted_text_and_triple_quotes_are_one_message(terminal: Terminal, tmp_path: Path) -> None:
    terminal.wait()
    terminal.child.send("\x1b[200~the dog\nthe ball\x1b[201~\r")
    terminal.wait()
    terminal.child.send('"""the sun\r')
    terminal.child.send('was warm"""\r')
    terminal.wait()
    messages = saved(terminal, tmp_path / "chat.jsonl")
    assert [message["content"] for message in messages if message["role"] == "user"] == ["the dog\nthe ball", "the sun\nwas warm"]


def test_history_lasts_over_sessions(terminal: Terminal, tiny_model_dir: Path, state: Path) -> None:
    terminal.wait()
    terminal.answer("the warm sun")
    terminal.child.sendeof()
    assert terminal.end() == 0
    assert "the warm sun" in (state / "llmkit" / "chat_history").read_text()
    again = Terminal(tiny_model_dir, state)
    again.wait()
    again.child.send("\x1b[A")  # up
    again.child.expect("the warm sun")
    again.child.close(force=True)
