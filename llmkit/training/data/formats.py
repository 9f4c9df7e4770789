"""Rows to documents: every layout in which people keep training data. No torch.

A document is text, a prompt with its completion, or a chat; one with a `rejected` answer is a pair for preference training.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from llmkit.errors import UsageError

Message = Mapping[str, Any]

LAYOUTS = (
    '{"messages": [{"role", "content"}]}, {"prompt", "completion"}, {"text"}, Alpaca {"instruction", "input", "output"}, '
    'ShareGPT {"conversations": [{"from", "value"}]}, {"question", "answer"}, {"query", "response"} or {"prompt", "chosen", "rejected"}'
)
_PAIRS = (("prompt", "completion"), ("prompt", "response"), ("question", "answer"), ("question", "response"), ("query", "response"))
_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "function": "tool",
}


@dataclass(frozen=True)
class Document:
    """One document. Exactly one of `text`, `prompt` with `completion`, or `messages` is set."""

    place: str  # file:line, for messages to people
    text: str | None = None
    prompt: str | None = None
    completion: str | None = None
    system: str | None = None  # a system message before the prompt
    messages: tuple[Message, ...] | None = None
    tools: tuple[Mapping[str, Any], ...] | None = None
    context: int = 0  # so many messages at the beginning are only seen, whoever says them
    rejected: str | tuple[Message, ...] | None = None  # the worse answer, instead of the completion or of the messages after the context
    split: Literal["train", "valid"] | None = None  # where the data is split already

    @property
    def target(self) -> str:
        """The text that is learned: everything, the completion, or what the assistant says and calls."""
        if self.text is not None:
            return self.text
        if self.messages is not None:
            said = [m for m in self.messages[self.context :] if m["role"] == "assistant"]
            return "\n".join(
                str(m.get("content") or "") + (json.dumps(m["tool_calls"], ensure_ascii=False) if m.get("tool_calls") else "") for m in said
            )
        return self.completion or ""

    def is_held_out(self, share: float) -> bool:
        """Whether the document belongs to the held-out `share`.

        The choice is a hash of the target text (letter case and white space aside), so it does not depend on order,
        seed or other documents, and a story stays on one side in all the forms it appears in.
        """
        digest = hashlib.blake2b(" ".join(self.target.lower().split()).encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") < share * 2**64

    def pair(self) -> tuple[Document, Document]:
        """The chosen and the rejected document; UsageError where there is but one answer."""
        if self.rejected is None:
            raise UsageError(
                f"{self.place} has one answer, and a preference loss compares two. "
                'Give {"prompt", "chosen", "rejected"} rows, or choose another loss.'
            )
        chosen = dataclasses.replace(self, rejected=None)
        if isinstance(self.rejected, str):
            return chosen, dataclasses.replace(chosen, completion=self.rejected)
        assert self.messages is not None
        return chosen, dataclasses.replace(chosen, messages=(*self.messages[: self.context], *self.rejected))


def parse_row(line: str, place: str, preference: bool = False, columns: Mapping[str, str] | None = None) -> Document:
    """One JSONL row as a document; UsageError says what is wrong with it."""
    try:
        row = json.loads(line, parse_constant=_no_constant)
        if "\\u" in line:
            json.dumps(row, ensure_ascii=False).encode()  # a lone surrogate (\ud800) is no text
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{place} is not JSON ({error}). Each line must be one JSON object.") from None
    return read_row(row, place, preference, columns)


def read_row(row: Any, place: str, preference: bool = False, columns: Mapping[str, str] | None = None) -> Document:
    """A decoded row as a document.

    preference: a row that has both a plain answer and a chosen and a rejected one is read as the pair.
    columns: a layout's key -> the key that the row has instead.
    Raises UsageError where the row fits no layout, naming the place, what was found and the layouts.
    """
    if not isinstance(row, dict):
        raise UsageError(f"{place} is a JSON {type(row).__name__}, not an object. Each row must be one JSON object.")
    found = ", ".join(f"{key} (without a value)" if value is None else str(key) for key, value in row.items()) or "(none)"
    row = {key: value for key, value in row.items() if value is not None}
    for key, column in (columns or {}).items():
        if column in row:
            row[key] = row.pop(column)
    compares = "chosen" in row and "rejected" in row
    document = _preference(row, place) if compares and preference else None
    document = document or _chat(row, place) or _prompted(row, place) or (_preference(row, place) if compares else None)
    if document is None and "text" in row:
        document = Document(place, text=_text(row, "text", place))
    if document is None:
        raise UsageError(
            f"{place} has the keys {found:.200}, which make no document. A row is {LAYOUTS}. "
            "data.N.columns says what other keys stand for, as in {text: story}."
        )
    return document


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON value; write null")


def _chat(row: Mapping[str, Any], place: str) -> Document | None:
    key = next((key for key in ("messages", "conversations", "conversation") if isinstance(row.get(key), (list, str))), None)
    if key is None or (key != "messages" and "chosen" in row):
        return None
    messages = _messages(row[key], f"{place}, {key}")
    system = _system(row, place)
    if system and messages[0]["role"] != "system":
        messages = ({"role": "system", "content": system}, *messages)
    return Document(place, messages=messages, tools=_tools(row, place))


def _prompted(row: Mapping[str, Any], place: str) -> Document | None:
    instructed = "instruction" in row
    answer = next((key for key in ("output", "response", "completion") if key in row), None) if instructed else None
    if instructed and answer is not None:
        return _with_history(row, _instruction(row, place), _text(row, answer, place), place)
    for ask, answer in _PAIRS:
        if ask in row and answer in row:
            if not (isinstance(row[ask], str) and isinstance(row[answer], str)) and ask == "prompt":
                return _conversational(row, answer, place)
            return _with_history(row, _text(row, ask, place), _text(row, answer, place), place)
    return None


def _with_history(row: Mapping[str, Any], prompt: str, completion: str, place: str) -> Document:
    """A prompt and its completion, after the earlier rounds that some Alpaca files keep in `history`."""
    history, system = row.get("history"), _system(row, place)
    if not history:
        return Document(place, prompt=prompt, completion=completion, system=system, tools=_tools(row, place))
    if not isinstance(history, list) or not all(
        isinstance(r, list) and len(r) == 2 and all(isinstance(t, str) for t in r) for r in history
    ):
        raise UsageError(f"{place}: history is no list of [question, answer] pairs. Correct the row, or drop the key.")
    texts = [*(text for rounds in history for text in rounds), prompt, completion]
    messages = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]
    return Document(place, messages=(*([{"role": "system", "content": system}] if system else []), *messages), tools=_tools(row, place))


def _conversational(row: Mapping[str, Any], answer: str, place: str) -> Document:
    """TRL's prompt and completion as lists of messages; the prompt is only seen."""
    prompt = _turns(row, "prompt", "user", place)
    return Document(place, messages=(*prompt, *_turns(row, answer, "assistant", place)), tools=_tools(row, place), context=len(prompt))


def _preference(row: Mapping[str, Any], place: str) -> Document:
    """Two answers to one prompt: strings, messages after a prompt, or whole conversations with a common beginning."""
    key = next((key for key in ("prompt", "question", "query", "conversations", "messages") if key in row), None)
    if isinstance(row["chosen"], str) and isinstance(row["rejected"], str):
        chosen, rejected = _text(row, "chosen", place), _text(row, "rejected", place)
        if "instruction" in row or isinstance(row.get(key or ""), str):
            prompt = _instruction(row, place) if "instruction" in row else _text(row, str(key), place)
            system = _system(row, place)
            return Document(place, prompt=prompt, completion=chosen, rejected=rejected, system=system, tools=_tools(row, place))
        if key is None:
            raise UsageError(f"{place} has a chosen and a rejected text, but no prompt. A pair is {{prompt, chosen, rejected}}.")
    good, bad = (_turns(row, name, "assistant", place) for name in ("chosen", "rejected"))
    if good[0]["role"] == "assistant" and bad[0]["role"] == "assistant" and key is not None:
        context = _turns(row, key, "user", place)
        system = _system(row, place)
        if system and context[0]["role"] != "system":
            context = ({"role": "system", "content": system}, *context)
        return Document(place, messages=(*context, *good), rejected=bad, context=len(context), tools=_tools(row, place))
    common = next((n for n, (a, b) in enumerate(zip(good, bad, strict=False)) if a != b), min(len(good), len(bad)))
    while common and not (common < min(len(good), len(bad)) and good[common]["role"] == bad[common]["role"] == "assistant"):
        common -= 1  # equal answers end in the common part, and the answer is what comes after a question
    if not common:
        raise UsageError(
            f"{place}: chosen and rejected do not begin with the same messages, followed by an assistant's. "
            'Give the common part as "prompt".'
        )
    return Document(place, messages=good, rejected=bad[common:], context=common, tools=_tools(row, place))


def _instruction(row: Mapping[str, Any], place: str) -> str:
    """Alpaca's instruction and, a blank line after it, its input."""
    given = next((key for key in ("input", "context") if key in row), None)
    parts = [_text(row, "instruction", place), *([_text(row, given, place)] if given else [])]
    return "\n\n".join(part for part in parts if part.strip())


def _system(row: Mapping[str, Any], place: str) -> str | None:
    key = next((key for key in ("system", "system_prompt") if row.get(key)), None)
    return None if key is None else _text(row, key, place)


def _text(row: Mapping[str, Any], key: str, place: str) -> str:
    value = row[key]
    if not isinstance(value, str):
        raise UsageError(f"{place}: {key} is {json.dumps(value, default=str):.60}, not text. Write it as a string.")
    return value


def _turns(row: Mapping[str, Any], key: str, role: str, place: str) -> tuple[Message, ...]:
    """A string or one message or several, as messages."""
    value = row[key]
    if isinstance(value, str):
        return ({"role": role, "content": value},)
    return _messages([value] if isinstance(value, dict) else value, f"{place}, {key}")


def _messages(value: Any, where: str) -> tuple[Message, ...]:
    value = _decoded(value, where)
    if not isinstance(value, list) or not value:
        raise UsageError(f"{where} is {'empty' if value == [] else f'a {type(value).__name__}'}. Give a list of at least one message.")
    return tuple(_message(message, f"{where}.{index}") for index, message in enumerate(value))


def _message(raw: Any, where: str) -> Message:
    if not isinstance(raw, dict):
        raise UsageError(f'{where} is a {type(raw).__name__}, not a message. A message is {{"role": ..., "content": ...}}.')
    message = {key: value for key, value in raw.items() if value is not None}
    role, content = message.pop("from", None), message.pop("value", None)
    role, content = message.get("role", role), message.get("content", content)
    if not isinstance(role, str) or not role:
        raise UsageError(
            f'{where} has the keys {", ".join(map(str, raw)) or "(none)":.100} and no role. A message is {{"role", "content"}}.'
        )
    if role == "function_call":  # ShareGPT: the call, or several, as JSON
        role, message["tool_calls"], content = "assistant", content, None
    elif isinstance(legacy := message.pop("function_call", None), dict):  # OpenAI before tool_calls
        message["tool_calls"] = [legacy]
    message["role"] = _ROLES.get(role, role)
    calls = _tool_calls(message.pop("tool_calls"), where) if "tool_calls" in message else []
    if calls:
        message["tool_calls"] = calls
    if isinstance(content, list):
        content = "".join(_part(part, where) for part in content)
    if content is not None and not isinstance(content, str):
        raise UsageError(f"{where}: content is {json.dumps(content, default=str):.60}, not text. Write it as a string.")
    if content is None and not calls:
        raise UsageError(f"{where} has no content{' and calls no tool' if role == 'assistant' else ''}. Give it one, or drop the message.")
    if content is not None:
        message["content"] = content
    return message


def _part(part: Any, where: str) -> str:
    """The text of a content part in OpenAI's notation."""
    if isinstance(part, dict) and isinstance(part.get("text"), str) and part.get("type", "text") == "text":
        return str(part["text"])
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    raise UsageError(f"{where} holds a part of type {kind!r:.60}, and only text can be learned. Take the row out, or the part.")


def _tool_calls(value: Any, where: str) -> list[dict[str, Any]]:
    """Calls in OpenAI's notation; arguments stay a string or an object, and must be JSON."""
    value = _decoded(value, f"{where}, tool_calls")
    calls = []
    for call in value if isinstance(value, list) else [value]:
        call = _decoded(call, f"{where}, tool_calls")
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise UsageError(f'{where} has a tool call without a name. A call is {{"name": ..., "arguments": {{...}}}}.')
        arguments = function.get("arguments", function.get("parameters", {}))
        if isinstance(arguments, str):
            arguments = arguments.strip() or "{}"
        if not isinstance(_decoded(arguments, f"{where}: the arguments of {function['name']:.60}"), dict):
            raise UsageError(f"{where}: the arguments of {function['name']:.60} are no JSON object. Write them as one.")
        rest = {
            key: part
            for key, part in call.items()
            if key not in ("function", "name", "arguments", "parameters", "type") and part is not None
        }
        calls.append({**rest, "type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return calls


def _tools(row: Mapping[str, Any], place: str) -> tuple[Mapping[str, Any], ...] | None:
    """The tools a row offers, each in OpenAI's notation."""
    key = next((key for key in ("tools", "functions") if row.get(key)), None)
    if key is None:
        return None
    value = _decoded(row[key], f"{place}, {key}")
    tools = [_decoded(tool, f"{place}, {key}") for tool in value] if isinstance(value, list) else [value]
    if not all(isinstance(tool, dict) for tool in tools):
        raise UsageError(f"{place}: {key} is no list of JSON schemas. Give objects with name, description and parameters.")
    return tuple(tool if "function" in tool else {"type": "function", "function": tool} for tool in tools) or None


def _decoded(value: Any, where: str) -> Any:
    """A value that some files keep as a string of JSON."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where} is not JSON ({error}). Correct the row.") from None
