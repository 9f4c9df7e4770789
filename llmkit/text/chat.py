"""Chat templates: messages to the text a model was trained on, and to ids with the mask of what it should learn."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from types import CodeType
from typing import TYPE_CHECKING, Any

from llmkit.errors import TemplateError, UsageError

if TYPE_CHECKING:
    from llmkit.text.codec import Span
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
    ) -> tuple[str, list[Span]]:
        """As `render`, and the `[start, end)` characters inside of `{% generation %}` blocks."""
        from llmkit.text.sandbox import Sandbox

        source = self.source(template, tools)
        variables = {
            **self.special_tokens,
            **_plain(kwargs),
            "messages": _plain_messages(messages),
            "tools": _plain_objects(tools, "Tools"),
            "documents": _plain_objects(documents, "Documents"),
            "add_generation_prompt": add_generation_prompt,
        }
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
    return tokenizer.encode(_template_of(tokenizer).render(messages, tools, True, **kwargs), bos=False, special=True)


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None = None,
    *,
    add_generation_prompt: bool = False,
    **kwargs: Any,
) -> tuple[list[int], list[bool]]:
    """The ids of a whole conversation, and for each whether the assistant produces it: the loss mask of training.

    The ids are those that `encode_prompt` gives for the same text: one rendering, special tokens parsed, no BOS but the
    template's. The mask follows the template's `{% generation %}` blocks. Without them the turns of the
    assistant are found by rendering the conversation up to each of them, with and without the generation prompt.
    A turn ends with its end-of-text token; what the template puts after it is not learned.

    Raises TemplateError where a turn's place is ambiguous, as with templates that render a turn in another way once
    others follow (they drop the reasoning of earlier turns).
    """
    template = _template_of(tokenizer)
    text, spans = template.render_spans(messages, tools, add_generation_prompt, **kwargs)
    ids, places = tokenizer.encode_spans(text)
    mask = [False] * len(ids)
    if spans:
        for start, end in spans:
            _mark(mask, places, start, end)
        return ids, mask
    whole = text if not add_generation_prompt else template.render(messages, tools, False, **kwargs)
    if not text.startswith(whole):
        raise _ambiguous(len(messages) - 1)
    for k, message in enumerate(messages):
        if message.get("role") != "assistant":
            continue
        before = template.render(messages[:k], tools, True, **kwargs) if k else ""
        until = template.render(messages[: k + 1], tools, False, **kwargs)
        if not whole.startswith(before) or not until.startswith(before):
            raise _ambiguous(k)
        stop = len(until) if whole.startswith(until) else _end_before_tail(tokenizer, ids, until, whole, len(before), message)
        if stop is None:
            raise _ambiguous(k)
        _mark(mask, places, len(before), stop, tokenizer.eos_ids, ids)
    return ids, mask


def _end_before_tail(tokenizer: Tokenizer, ids: list[int], until: str, whole: str, start: int, message: Message) -> int | None:
    """Where a turn that begins at `start` ends if the template closes each conversation with a tail (Phi-3's `<|endoftext|>`).

    until: the conversation up to the turn, tail and all; whole, ids: all of it. None where the difference of the two
    is no such tail: it must end the whole as well, and leave the turn its content.
    """
    alone, places = tokenizer.encode_spans(until)
    same = next((n for n, (a, b) in enumerate(zip(alone, ids, strict=False)) if a != b), None)
    if same is None:
        return None
    end = places[same][0]
    content = message.get("content")
    kept = isinstance(content, str) and bool(content.strip()) and content.strip() in until[start:end]
    return end if kept and whole.endswith(until[end:]) else None


def _mark(mask: list[bool], places: list[Span], start: int, end: int, eos_ids: Sequence[int] = (), ids: Sequence[int] = ()) -> None:
    """Marks the tokens that hold a character of `[start, end)`, up to the last end-of-text token among them."""
    inside = [n for n, (begin, stop) in enumerate(places) if begin < end and stop > start]
    if not inside:
        return
    last = max((n for n in inside if ids and ids[n] in eos_ids), default=inside[-1])
    for n in range(inside[0], last + 1):
        mask[n] = True


def _template_of(tokenizer: Tokenizer) -> ChatTemplate:
    if tokenizer.chat_template is None:
        raise TemplateError("The model has no chat template; use generate with plain text, or give it a chat_template.jinja.")
    return tokenizer.chat_template


def _ambiguous(k: int) -> TemplateError:
    return TemplateError(
        f"Which tokens of message {k} the assistant wrote cannot be told: the chat template renders the turn in another way once "
        "others follow it; mark the turns with {% generation %} in the template, or end the conversation with that turn."
    )


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
