"""Chat templates: messages to the text a model was trained on, and to the ids that it is served."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Mapping, Sequence
from types import CodeType
from typing import TYPE_CHECKING, Any

from llmkit.errors import TemplateError, UsageError

if TYPE_CHECKING:
    from llmkit.text.codec import CharSpan
    from llmkit.text.tokenizer import Tokenizer

Message = Mapping[str, Any]
_LONGEST_SOURCE = 60_000  # characters, compiled within 2 s at worst; the longest real template seen has 17,000
# Names under which a message may carry its reasoning; templates read the first, gpt-oss reads the second.
_REASONING = ("reasoning_content", "thinking", "reasoning")


class ChatTemplate:
    """The Jinja chat template of a checkpoint, or several under names ("default", "tool_use", ...).

    Renders as `apply_chat_template` of transformers does, in a sandbox that ends within about two seconds and a few
    hundred megabytes whatever the template does (see `sandbox.py`). Safe to use from several threads.
    """

    def __init__(self, source: str | Mapping[str, str], special_tokens: Mapping[str, str] | None = None) -> None:
        """source: a template, or name -> template. special_tokens: `bos_token`, `eos_token`, ... -> their text."""
        self.sources = {"default": source} if isinstance(source, str) else dict(source)
        self.special_tokens = dict(special_tokens or {})
        self._compiled: dict[str, CodeType] = {}

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        *,
        documents: Sequence[Mapping[str, Any]] | None = None,
        template: str | None = None,
        **kwargs: Any,
    ) -> str:
        """The text of a conversation.

        tools: JSON schemas of functions. documents: objects with title and text. add_generation_prompt: end with the
        beginning of an assistant's turn. template: which of several, by name. kwargs: further variables of the
        template (`enable_thinking=False`); they override the special tokens.
        Raises TemplateError where the template is wrong, refuses the messages or goes past its limits.
        """
        return self.render_spans(messages, tools, add_generation_prompt, documents=documents, template=template, **kwargs)[0]

    def render_spans(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        *,
        documents: Sequence[Mapping[str, Any]] | None = None,
        template: str | None = None,
        **kwargs: Any,
    ) -> tuple[str, list[CharSpan]]:
        """As `render`, and the `[start, end)` characters inside of `{% generation %}` blocks."""
        source = self.source(template, tools)
        plain = _plain_messages(messages)
        variables = {
            **self.special_tokens,
            **_plain(kwargs),
            "tools": _plain_objects(tools, "Tools"),
            "documents": _plain_objects(documents, "Documents"),
            "add_generation_prompt": add_generation_prompt,
        }
        objects, arguments = _with_arguments(plain, as_text=False)
        if not arguments:
            return self._run(source, {**variables, "messages": plain})
        # Most templates write the arguments of a call themselves and need an object; some (DeepSeek V3) join them as text.
        try:
            rendered = self._run(source, {**variables, "messages": objects})
            if not any(str(given) in rendered[0] for given in arguments if given):  # Python's notation is no JSON
                return rendered
        except TemplateError:
            with contextlib.suppress(TemplateError):
                return self._run(source, {**variables, "messages": _with_arguments(plain, as_text=True)[0]})
            raise
        return self._run(source, {**variables, "messages": _with_arguments(plain, as_text=True)[0]})

    def _run(self, source: str, variables: Mapping[str, Any]) -> tuple[str, list[CharSpan]]:
        """The text that a template makes of its variables, and where its `{% generation %}` blocks lie."""
        from llmkit.text.sandbox import Sandbox

        try:
            if source not in self._compiled:
                if len(source) > _LONGEST_SOURCE:
                    raise TemplateError(f"The chat template has {len(source)} characters, more than {_LONGEST_SOURCE}; use a shorter one.")
                self._compiled[source] = Sandbox().compile(source)
            sandbox = Sandbox()
            text = "".join(sandbox.run(self._compiled[source], variables))
        except TemplateError:
            raise
        # The template is a stranger's program: whatever it raises is its error and not ours.
        except Exception as error:
            said = str(error) or type(error).__name__
            raise TemplateError(f"The chat template failed ({said}); check the messages, or pass another template.") from error
        spans = []
        for start, inside in sandbox.generations:
            if text[start : start + len(inside)] != inside:
                raise TemplateError(
                    "The chat template has a {% generation %} block inside of a macro or a captured block, where its place in the text "
                    "is not known; move it out."
                )
            spans.append((start, start + len(inside)))
        return text, spans

    def source(self, template: str | None = None, tools: Sequence[Mapping[str, Any]] | None = None) -> str:
        """The template's text: the one named, else "tool_use" where there are tools and such a one, else "default"."""
        if template is None:
            template = "tool_use" if tools is not None and "tool_use" in self.sources else "default"
        if template not in self.sources:
            known = ", ".join(sorted(self.sources)) or "none"
            raise TemplateError(f"There is no chat template {template!r}; pass template= one of: {known}.")
        return self.sources[template]


def encode_prompt(
    tokenizer: Tokenizer, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None, **kwargs: Any
) -> list[int]:
    """The ids of a conversation up to where the assistant's reply begins (`add_generation_prompt`), for generating it."""
    return tokenizer.encode(template_of(tokenizer).render(messages, tools, True, **kwargs), bos=False, special=True)


def template_of(tokenizer: Tokenizer) -> ChatTemplate:
    if tokenizer.chat_template is None:
        raise TemplateError("The model has no chat template; use generate with plain text, or give it a chat_template.jinja.")
    return tokenizer.chat_template


def _plain_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as templates expect them: no keys that are None, and reasoning under the names templates read."""
    if isinstance(messages, (str, Mapping)) or not messages:
        raise UsageError("A chat needs a list of messages with at least one in it, such as [{'role': 'user', 'content': 'Hello'}].")
    plain = []
    for message in _plain(list(messages)):
        if not isinstance(message, dict):
            raise UsageError(f"A chat message must be an object with role and content, not {type(message).__name__}.")
        message = {key: value for key, value in message.items() if value is not None}
        reasoning = next((message[key] for key in _REASONING if key in message), None)
        if reasoning is not None:
            message = {"thinking": reasoning, **message, "reasoning_content": reasoning}
        plain.append(message)
    return plain


def _with_arguments(messages: list[dict[str, Any]], as_text: bool) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The messages with the arguments of tool calls as JSON text or as objects, and those that are objects; what is neither stays."""
    found: list[dict[str, Any]] = []

    def convert(call: Any) -> Any:
        if not isinstance(call, dict):
            return call
        if isinstance(call.get("function"), dict):
            return {**call, "function": convert(call["function"])}
        given = call.get("arguments")
        try:
            value = json.loads(given) if isinstance(given, str) else given
        except (ValueError, RecursionError):
            return call
        if not isinstance(value, dict):
            return call
        found.append(value)
        if as_text:
            return {**call, "arguments": given if isinstance(given, str) else json.dumps(value, ensure_ascii=False)}
        return {**call, "arguments": value}

    changed = [
        {**message, "tool_calls": [convert(call) for call in message["tool_calls"]]}
        if isinstance(message.get("tool_calls"), list)
        else message
        for message in messages
    ]
    return changed, found


def _plain_objects(values: Sequence[Mapping[str, Any]] | None, what: str) -> list[dict[str, Any]] | None:
    if values is None:
        return None
    if isinstance(values, (str, Mapping)) or not all(isinstance(value, Mapping) for value in values):
        raise UsageError(f"{what} must be a list of objects (JSON schemas or title and text); pass dictionaries.")
    return [_plain(value) for value in values]


def _plain(value: Any) -> Any:
    """Plain data and nothing with methods of its own: a template could call them."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):  # an enum or another subclass
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(_plain, value)) if type(value) in (list, tuple) else [_plain(part) for part in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return f"<{type(value).__name__}>"  # pictures and arrays: templates only ask whether they are there
