"""Adapters on the command line: --adapter, its mirror in the environment, and /adapter in the chat."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

import llmkit
from llmkit.checkpoint.files import load_config
from llmkit.cli.conversation import Conversation
from llmkit.cli.repl import ChatCompleter
from llmkit.errors import UsageError
from llmkit.lora.settings import AdapterSettings
from llmkit.lora.write import AdapterWeights, write_adapter
from tests.cli.test_chat import Terminal
from tests.cli.test_commands import Said, only_our_settings, said  # noqa: F401 - fixtures
from tests.lora.peft import random_terms

GREEDY = {"temperature": 0, "max_tokens": 12, "ignore_eos": True}
FLAGS = ("--temp", "0", "-n", "12", "--ignore-eos")


@pytest.fixture(scope="module")
def adapters(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root, config, settings = tmp_path_factory.mktemp("adapters"), load_config(tiny_model_dir), AdapterSettings(r=4, lora_alpha=8)
    for seed, name in enumerate(("pirate", "poet")):
        write_adapter(root / name, AdapterWeights(random_terms(config, ("self_attn.", "mlp."), settings, seed)), config, settings)
    return {name: root / name for name in ("pirate", "poet")}


@pytest.fixture
def replies(tiny_model_dir: Path, adapters: dict[str, Path]) -> dict[str | None, str]:
    llm = llmkit.load(tiny_model_dir, adapter=adapters, device="cpu")
    found = {name: llm.chat("The dog", adapter=name, **GREEDY).text for name in (None, "pirate", "poet")}
    assert len(set(found.values())) == 3
    return found


def test_one_message(tiny_model_dir: Path, adapters: dict[str, Path], replies: dict[str | None, str], said: Said) -> None:  # noqa: F811
    model = str(tiny_model_dir)
    assert said("chat", model, *FLAGS, text="The dog")[1].strip() == replies[None].strip()
    assert said("chat", model, "--adapter", str(adapters["poet"]), *FLAGS, text="The dog")[1].strip() == replies["poet"].strip()
    assert (
        said("generate", model, "--chat", "-p", "The dog", "--adapter", f"x={adapters['poet']}", *FLAGS)[1].strip()
        == replies["poet"].strip()
    )
    code, out, err = said("chat", model, *(f"--adapter={path}" for path in adapters.values()), text="The dog")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "one message is answered with one adapter" in err


def test_mirror_in_the_environment(
    tiny_model_dir: Path,
    adapters: dict[str, Path],
    replies: dict[str | None, str],
    said: Said,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LLMKIT_ADAPTER", str(adapters["pirate"]))
    for command in (("chat",), ("generate", "--chat", "-p", "The dog")):
        assert said(command[0], str(tiny_model_dir), *command[1:], *FLAGS, text="The dog")[1].strip() == replies["pirate"].strip()
    monkeypatch.setenv("LLMKIT_ADAPTER", os.pathsep.join(map(str, adapters.values())))
    code, _, err = said("chat", str(tiny_model_dir), text="The dog")
    assert code == 2
    assert "one adapter" in err


def test_eval_scores_with_it(tiny_model_dir: Path, adapters: dict[str, Path], tmp_path: Path, said: Said) -> None:  # noqa: F811
    (tmp_path / "text.txt").write_text("Once upon a time there was a dog and a ball.")
    arguments = ("eval", str(tiny_model_dir), "--text", str(tmp_path / "text.txt"), "--reference", str(tiny_model_dir), "--json")
    plain, adapted = (json.loads(said(*arguments, *more)[1]) for more in ((), ("--adapter", str(adapters["poet"]))))
    assert plain["mean_kl"] < 1e-6
    assert adapted["mean_kl"] > 0.1
    assert adapted["reference_bits_per_byte"] == pytest.approx(plain["reference_bits_per_byte"])


@pytest.mark.parametrize(
    ("arguments", "code", "cause"),
    [
        (("--adapter", "/no/such/adapter"), 1, "The folder /no/such/adapter does not exist"),
        (("--adapter", "MODEL"), 1, "It is a model, not an adapter"),
        (("--any-base",), 2, "any_base has no effect without an adapter"),
        (("--adapter", "none=PIRATE"), 2, "cannot be called 'none'"),
    ],
)
def test_what_is_refused(
    tiny_model_dir: Path,
    adapters: dict[str, Path],
    said: Said,  # noqa: F811
    arguments: tuple[str, ...],
    code: int,
    cause: str,
) -> None:
    typed = [part.replace("MODEL", str(tiny_model_dir)).replace("PIRATE", str(adapters["pirate"])) for part in arguments]
    found, out, err = said("generate", str(tiny_model_dir), "-p", "a", *typed)
    assert (found, out, err.count("\n")) == (code, "", 1)
    assert cause in err


def test_a_conversation_changes_adapters(tiny_model_dir: Path, adapters: dict[str, Path], replies: dict[str | None, str]) -> None:
    conversation = Conversation(llmkit.load(tiny_model_dir, adapter=adapters, device="cpu"), sampling=dict(GREEDY))

    def reply() -> str:
        conversation.turns.clear()
        stream = conversation.ask("The dog")
        list(stream)
        return stream.completion.text

    assert reply() == replies["pirate"]
    assert conversation.choose_adapter("poet") == "adapter: poet (loaded: pirate, poet)"
    assert reply() == replies["poet"]
    assert conversation.choose_adapter("none") == "adapter: none (loaded: pirate, poet)"
    assert reply() == replies[None]
    with pytest.raises(UsageError, match=r"'pirat' is not loaded. Did you mean 'pirate'"):
        conversation.choose_adapter("pirat")
    assert conversation.choose_adapter("") == "adapter: none (loaded: pirate, poet)"


def test_names_are_completed() -> None:
    from prompt_toolkit.completion import CompleteEvent
    from prompt_toolkit.document import Document

    completer = ChatCompleter(["/adapter", "/set"], ["pirate", "poet"])

    def completions(text: str) -> list[str]:
        return [found.text for found in completer.get_completions(Document(text), CompleteEvent())]

    assert completions("/adapter p") == ["pirate", "poet"]
    assert completions("/adapter n") == ["none"]
    assert completions("/set verb") == ["verbose"]


def test_on_a_terminal(tiny_model_dir: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    given = [part for path in adapters.values() for part in ("--adapter", str(path))]
    terminal = Terminal(tiny_model_dir, tmp_path / "state", *given, *FLAGS)
    try:
        assert "adapters pirate, poet" in " ".join(terminal.wait().split())
        assert "adapter: pirate (loaded: pirate, poet)" in terminal.answer("/adapter")
        assert "adapter: poet" in terminal.answer("/adapter poet")
        terminal.answer("The dog")
        assert "Loaded are pirate, poet" in terminal.answer("/adapter x")
        terminal.child.send("/bye\r")
        assert terminal.end() == 0
    finally:
        terminal.child.close(force=True)
