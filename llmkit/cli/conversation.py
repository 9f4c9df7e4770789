"""The state of a chat: messages and settings, and what /retry, /undo, /save and /load do to them. Prints nothing."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmkit.errors import UsageError
from llmkit.llm.adapters import NONE

if TYPE_CHECKING:
    from llmkit.llm.api import LLM, AdapterChoice
    from llmkit.llm.outputs import Completion, Stream
    from llmkit.rag.prompt import Grounding

# What /set understands, and how its value is read.
SETTINGS: dict[str, Callable[[str], Any]] = {
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "max_tokens": int,
    "min_tokens": int,
    "seed": int,
    "repetition_penalty": float,
    "presence_penalty": float,
    "frequency_penalty": float,
    "stop": lambda text: (text.replace("\\n", "\n"),),
}


@dataclass
class Conversation:
    """Messages between a person and a model, in the form that chat templates and training data share."""

    llm: LLM
    system: str | None = None
    sampling: dict[str, Any] = field(default_factory=dict)
    turns: list[dict[str, Any]] = field(default_factory=list)  # without the system message
    adapter: AdapterChoice = ...  # the first that was loaded
    grounding: Grounding | None = None  # finds passages for each message
    retries: int = 0  # of the last reply: with a fixed seed each one takes the next seed
    _asked: list[dict[str, Any]] = field(default_factory=list)  # the turns the reply in progress answers

    @property
    def messages(self) -> list[dict[str, Any]]:
        return self._with_system(self.turns)

    def _with_system(self, turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{"role": "system", "content": self.system}] * (self.system is not None) + turns

    def _prompt(self, asked: list[dict[str, Any]]) -> list[dict[str, Any]]:
        messages = self._with_system(asked)
        return messages if self.grounding is None else self.grounding.messages(messages, self.sampling)

    def ask(self, text: str) -> Stream:
        """Start the reply to a new user message; both are kept when `answered` is called."""
        asked = [*self.turns, {"role": "user", "content": text}]
        stream = self.llm.chat(self._prompt(asked), stream=True, adapter=self.adapter, **self.sampling)
        self._asked, self.retries = asked, 0
        return stream

    def retry(self) -> Stream:
        """Start another reply to the last user message."""
        asked = list(self.turns)
        while asked and asked[-1]["role"] != "user":
            asked.pop()
        if not asked:
            raise UsageError("there is nothing to retry yet. Say something first.")
        sampling = dict(self.sampling)
        if sampling.get("seed") is not None:
            sampling["seed"] += self.retries + 1
        stream = self.llm.chat(self._prompt(asked), stream=True, adapter=self.adapter, **sampling)
        self._asked, self.retries = asked, self.retries + 1
        return stream

    def answered(self, completion: Completion) -> None:
        """Keep the reply and its question; of a reply that was interrupted before its first word nothing is kept."""
        if completion.text or completion.finish_reason != "interrupted":
            self.turns = [*self._asked, {"role": "assistant", "content": completion.text}]

    def undo(self) -> str:
        """Forget the last user message and what followed; returns that message."""
        while self.turns:
            turn = self.turns.pop()
            if turn["role"] == "user":
                return str(turn["content"])
        raise UsageError("there is nothing to undo yet. Say something first.")

    def set(self, name: str, value: str) -> None:
        """Change a sampling argument for the replies to come; `default` goes back to the model's own."""
        name = name.replace("-", "_")
        name = "temperature" if name == "temp" else name
        if name not in SETTINGS:
            from difflib import get_close_matches

            near = get_close_matches(name, SETTINGS, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else f"Settings are {', '.join(SETTINGS)}, verbose."
            raise UsageError(f"{name!r} is not a setting. {hint}")
        sampling = {key: old for key, old in self.sampling.items() if key != name}
        if value != "default":
            try:
                sampling[name] = SETTINGS[name](value)
            except ValueError:
                raise UsageError(f"{name} cannot be {value!r}. Give a number, or `default`.") from None
        self.llm.params(**sampling)  # refuses a value out of range
        self.sampling = sampling

    def choose_adapter(self, name: str) -> str:
        """Take another adapter for the replies to come, `none` for the model without; says which is in use."""
        if name:
            self.adapter = self.llm.adapter_name(None if name == NONE else name)
        used = self.llm.adapter_name(self.adapter) or NONE
        return f"adapter: {used} (loaded: {', '.join(self.llm.adapters) or NONE})"

    def describe(self) -> str:
        """The sampling in force in one line, the person's own values marked with a star."""
        params = self.llm.params(**self.sampling)
        shown = ["temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens"]
        names = [name for name in SETTINGS if name in shown or name in self.sampling]
        off = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "max_tokens": None}
        cuts = ("top_p", "top_k", "min_p") if params.temperature == 0 else ()  # without effect: the likeliest token is taken
        parts = []
        for name in names:
            if name in cuts and name not in self.sampling:
                continue
            value = getattr(params, name)
            if name in self.sampling or name == "temperature" or value != off.get(name):
                parts.append(f"{name} {value}{'*' if name in self.sampling else ''}")
        return ", ".join(parts)

    def save(self, file: str) -> int:
        """Append the chat to a JSONL file as one training row; returns the number of rows the file has now."""
        if not self.turns:
            raise UsageError("there is nothing to save yet. Say something first.")
        path = Path(os.path.expanduser(file))
        with path.open("a+", encoding="utf-8") as rows:
            rows.write(json.dumps({"messages": self.messages}, ensure_ascii=False) + "\n")
            rows.seek(0)
            return sum(1 for line in rows if line.strip())

    def load(self, file: str) -> None:
        """Go on with the last chat of a JSONL file."""
        path = Path(os.path.expanduser(file))
        remedy = 'Give a JSONL file with {"messages": [...]} rows, as /save writes it.'
        try:
            lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
            messages = json.loads(lines[-1])["messages"]
            turns = [dict(message) for message in messages]
            if not all(isinstance(turn["role"], str) and "content" in turn for turn in turns):
                raise KeyError("role")
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            raise UsageError(f"{file} cannot be read ({why}). {remedy}") from error
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise UsageError(f"the last row of {file} is not a chat. {remedy}") from error
        has_system = bool(turns) and turns[0]["role"] == "system"
        self.system = str(turns[0]["content"]) if has_system else None
        self.turns = turns[has_system:]
        self.retries = 0
