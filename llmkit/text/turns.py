"""Conversations as training examples: the ids a model is served, what it should then generate, and the loss mask of that."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmkit.errors import TemplateError
from llmkit.text.chat import ChatTemplate, Message, encode_prompt, template_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from llmkit.text.codec import CharSpan
    from llmkit.text.tokenizer import Tokenizer

Example = tuple[list[int], list[bool]]  # ids, and for each whether it is learned
Encoding = tuple[list[int], "list[CharSpan]"]  # ids, and the characters each stands for

# Tags around a thought, and what stands between them and its text where a template leaves that to the model (DeepSeek R1).
_THOUGHTS = (("<think>", "</think>", "\n", "\n\n"), ("<|START_THINKING|>", "<|END_THINKING|>", "", ""))


@dataclass(frozen=True)
class _Rendering:
    """A conversation as text. A turn is the characters `[start, end)`: `text[:start]` is the prompt as it is served."""

    text: str
    turns: tuple[CharSpan, ...]
    blocks: tuple[CharSpan, ...] = ()  # `{% generation %}`: what of the turns is learned; none: all


@dataclass(frozen=True)
class ChatDraft:
    """Training examples of a conversation, up to the encoding of `texts`, which is cheaper for many conversations at once."""

    texts: list[str]  # each for `Tokenizer.encode_spans`
    finish: Callable[[Sequence[Encoding]], list[Example]]


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None = None,
    *,
    add_generation_prompt: bool = False,
    **kwargs: Any,
) -> Example:
    """The ids of a whole conversation, and for each whether the assistant produces it: the loss mask of training.

    One rendering, special tokens parsed, no BOS but the template's. The mask is that of `encode_turns`.

    Raises TemplateError where one sequence cannot hold every turn as the model is served it (templates that render a turn
    in another way once others follow); `encode_turns` makes several of such a conversation.
    """
    turns = _assistant_turns(messages)
    if add_generation_prompt or not turns or turns[-1] + 1 < len(messages):
        text = template_of(tokenizer).render(messages, tools, add_generation_prompt, **kwargs)
        ids = tokenizer.encode_spans(text)[0]
        if not turns:
            return ids, [False] * len(ids)
        known, mask = encode_chat(tokenizer, messages[: turns[-1] + 1], tools, **kwargs)
        known = _trimmed(known, mask)[0]
        if ids[: len(known)] != known:
            raise _ambiguous(turns[-1])
        return ids, mask[: len(known)] + [False] * (len(ids) - len(known))
    examples = _draft(tokenizer, _render(template_of(tokenizer), messages, tools, turns, kwargs, split=False), None)
    (example,) = examples.finish([tokenizer.encode_spans(text) for text in examples.texts])
    return example


def encode_turns(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None = None,
    turns: Sequence[int] | None = None,
    **kwargs: Any,
) -> list[Example]:
    """The training examples of a conversation, as `draft_turns` describes them."""
    draft = draft_turns(tokenizer, messages, tools, turns, **kwargs)
    return draft.finish([tokenizer.encode_spans(text) for text in draft.texts])


def draft_turns(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None = None,
    turns: Sequence[int] | None = None,
    **kwargs: Any,
) -> ChatDraft:
    """The examples that teach the assistant's turns (all, or those at the indices `turns`) as the model is served them.

    Before a turn stand exactly the ids of `encode_prompt` for the messages before it, and what is learned is what the model
    then has to generate, up to and with the turn's end token (end-of-text where the template writes none). One example holds
    the whole conversation where that is true of every turn in it. Where it is not (templates that drop earlier reasoning, or
    whose prompt opens a thought that finished turns do not show), each turn has an example of its own. A turn that nothing
    precedes has no prompt and is not learned; what follows the last learned token is left out.

    Raises TemplateError where the template refuses the messages, or renders a turn so that no prompt leads to it.
    """
    template = template_of(tokenizer)
    wanted = [k for k in (_assistant_turns(messages) if turns is None else turns) if k]
    return _draft(
        tokenizer,
        _render(template, messages, tools, wanted, kwargs, split=True),
        lambda: [_one_turn(template, messages[: k + 1], tools, kwargs) for k in wanted],
    )


def _assistant_turns(messages: Sequence[Message]) -> list[int]:
    return [k for k, message in enumerate(messages) if k and message.get("role") == "assistant"]


def _draft(tokenizer: Tokenizer, renderings: list[_Rendering], again: Callable[[], list[_Rendering]] | None) -> ChatDraft:
    """`again` renders turn by turn what turns out to be no sequence of served ids; None: that is an error, and nothing is left out."""

    def finish(encodings: Sequence[Encoding]) -> list[Example]:
        given = iter(encodings)
        examples = [_masked(tokenizer, r, next(given), [next(given)[0] for _ in r.turns]) for r in renderings]
        if all(example is not None for example in examples):
            found = [example for example in examples if example is not None]
            return found if again is None else [_trimmed(*example) for example in found]
        if again is None:
            raise _ambiguous(None)
        return [_trimmed(*_stitched(tokenizer, rendering)) for rendering in again()]

    return ChatDraft([text for r in renderings for text in (r.text, *(r.text[:start] for start, _ in r.turns))], finish)


def _render(
    template: ChatTemplate,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None,
    wanted: Sequence[int],
    kwargs: Mapping[str, Any],
    split: bool,
) -> list[_Rendering]:
    """The conversation as one rendering, or as one for each turn."""
    if not wanted:
        return []
    messages = messages[: wanted[-1] + 1]
    whole, blocks = template.render_spans(messages, tools, False, **kwargs)
    turns = []
    for k in wanted:
        prompt = template.render(messages[:k], tools, True, **kwargs)
        until = whole if k + 1 == len(messages) else template.render(messages[: k + 1], tools, False, **kwargs)
        end = next((len(until) - len(tail) for tail in _tails(template, until) if whole.startswith(until[: len(until) - len(tail)])), 0)
        if end <= len(prompt) or not whole.startswith(prompt):
            if not split:
                raise _ambiguous(k)
            return [_one_turn(template, messages[: n + 1], tools, kwargs) for n in wanted]
        end = len(whole) if until is whole else end
        _check_calls(messages[k], whole[len(prompt) : end], k)
        turns.append((len(prompt), end))
    return [_Rendering(whole, tuple(turns), tuple(blocks))]


def _check_calls(message: Message, text: str, k: int) -> None:
    """Templates without tools render a call as nothing, and a model would learn to say nothing."""
    calls = message.get("tool_calls")
    for call in calls if isinstance(calls, (list, tuple)) else ():
        name = call.get("function", call).get("name")
        if str(name) not in text:
            raise TemplateError(
                f"The chat template leaves out that message {k} calls {name!r}; take a template that shows calls, or leave the row out."
            )


def _tails(template: ChatTemplate, text: str) -> list[str]:
    """What may close a conversation but not a turn: nothing, or a special token (Phi-3's `<|endoftext|>`)."""
    return ["", *(token for token in set(template.special_tokens.values()) if token and text.endswith(token))]


def _one_turn(
    template: ChatTemplate, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None, kwargs: Mapping[str, Any]
) -> _Rendering:
    """The prompt of the last message as it is served, and the message as the model has to generate it."""
    prompt = template.render(messages[:-1], tools, True, **kwargs)
    until, blocks = template.render_spans(messages, tools, False, **kwargs)
    k = len(messages) - 1
    if until.startswith(prompt):
        _check_calls(messages[k], until[len(prompt) :], k)
        return _Rendering(until, ((len(prompt), len(until)),), tuple(blocks))
    before = template.render(messages[:-1], tools, False, **kwargs)
    before = next(
        (before[: len(before) - len(tail)] for tail in _tails(template, before) if prompt.startswith(before.removesuffix(tail))), ""
    )
    common = next((n for n, (a, b) in enumerate(zip(prompt, until, strict=False)) if a != b), min(len(prompt), len(until)))
    common = common if until.rfind("<", 0, common) <= until.rfind(">", 0, common) else until.rfind("<", 0, common)  # not within a tag
    if before and common >= len(before):
        answer = _generated(prompt[len(before) :], until[common:], messages[k], k)
    else:  # the template shows what came before in another way once the turn follows (Mistral leaves the system message out)
        answer = _after_prompt(prompt, before, until, messages)
    _check_calls(messages[k], answer, k)
    return _Rendering(prompt + answer, ((len(prompt), len(prompt + answer)),))


def _after_prompt(prompt: str, before: str, until: str, messages: Sequence[Message]) -> str:
    """What of `until` follows what it shares with the prompt: its last message and the beginning of a turn, or the latter alone."""
    seen, content = (str(message.get("content") or "").strip() for message in messages[-2:])
    for anchor in (prompt[prompt.rfind(seen) :] if seen and seen in prompt else "", prompt[len(before) :] if before else ""):
        answer = until.rpartition(anchor)[2] if anchor and anchor in until else ""
        if answer.lstrip().startswith(content) and (content or messages[-1].get("tool_calls")):
            return answer
    raise _ambiguous(len(messages) - 1)


def _generated(opening: str, rest: str, message: Message, k: int) -> str:
    """What follows a generation prompt that finished turns do not show.

    opening: what the prompt adds to the conversation, as `<|assistant|><think>\\n`. rest: the finished turn from where it differs.
    """
    for begin, close, before, after in _THOUGHTS:
        if opening.rfind(begin) > opening.rfind(close):  # the prompt opens a thought, and the model has to close it
            return rest if close in rest else _reasoning(message, begin, close) + before + close + after + rest
        if opening.rstrip().endswith(close):
            rest = rest.removeprefix(close)
        if close in rest:
            raise TemplateError(
                f"The chat template's generation prompt closes the thought ({opening!r}), but message {k} holds reasoning; "
                "set the template's variable for thinking (chat_template_kwargs), or leave the reasoning out."
            )
    return rest


def _reasoning(message: Message, begin: str, close: str) -> str:
    """A message's reasoning, which may stand in its content."""
    content = message.get("content")
    inside = content.partition(close)[0].partition(begin)[2] if isinstance(content, str) and close in content else ""
    given = next((message[key] for key in ("reasoning_content", "thinking", "reasoning") if message.get(key)), inside)
    return str(given).strip()


def _masked(tokenizer: Tokenizer, rendering: _Rendering, encoded: Encoding, prompts: Sequence[list[int]]) -> Example | None:
    """A rendering's ids and mask; None where a prompt's ids do not begin them (a token lies across its end)."""
    ids, places = encoded
    ends = {*tokenizer.eos_ids, *tokenizer.special_ids}
    mask = [False] * len(ids)
    for (start, end), prompt in zip(rendering.turns, prompts, strict=True):
        if ids[: len(prompt)] != prompt:
            return None
        inside = [n for n in range(len(prompt), len(ids)) if places[n][0] < end]
        blocks = [(a, b) for a, b in rendering.blocks if a < end and b > start]
        learned = inside
        if blocks:  # all but one of the bytes of a character have an empty span
            learned = [n for n in inside if any(places[n][0] < b and max(places[n][1], places[n][0] + 1) > a for a, b in blocks)]
        stop = max((n for n in inside if ids[n] in tokenizer.eos_ids), default=None)
        if stop is None:  # another end token, as Gemma's <end_of_turn>, with nothing but white space after it
            stop = max((n for n in inside if ids[n] in ends and not rendering.text[places[n][1] : end].strip()), default=None)
        for n in learned:
            mask[n] = stop is None or n <= stop
        if stop is not None and learned and not rendering.text[places[learned[-1]][1] : places[stop][0]].strip():
            mask[stop] = True  # a block that leaves its end token out would teach a model that never ends
        if stop is None and learned and end == len(rendering.text) and tokenizer.eos_ids:
            ids, mask = [*ids, tokenizer.eos_ids[0]], [*mask, True]
    return ids, mask


def _stitched(tokenizer: Tokenizer, rendering: _Rendering) -> Example:
    """A rendering of one turn whose prompt ends within a token: the prompt's own ids and then those of the rest."""
    ((start, _),) = rendering.turns
    prompt = tokenizer.encode_spans(rendering.text[:start])[0]
    ids, places = tokenizer.encode_spans(rendering.text)
    whole = _masked(tokenizer, rendering, (ids, places), [prompt])
    if whole is not None:
        return whole
    later = next((n for n, (begin, _) in enumerate(places) if begin >= start), len(ids))
    begin = places[later][0] if later < len(ids) else len(rendering.text)
    head = tokenizer.encode_continuation(rendering.text[start:begin], special=True)
    joined = prompt + head + ids[later:]
    spans = places[:1] * len(prompt) + [(start, begin)] * len(head) + places[later:]
    example = _masked(tokenizer, rendering, (joined, spans), [prompt])
    assert example is not None  # it begins with the prompt
    return example


def _trimmed(ids: list[int], mask: list[bool]) -> Example:
    """Without what follows the last learned id."""
    length = len(ids) if not any(mask) else len(mask) - mask[::-1].index(True)
    return ids[:length], mask[:length]


def _ambiguous(k: int | None) -> TemplateError:
    which = "a message" if k is None else f"message {k}"
    return TemplateError(
        f"Which tokens of {which} the assistant wrote cannot be told: the chat template renders the turn in another way once "
        "others follow it, or than its prompt begins; mark the turns with {% generation %} in the template, or end the conversation "
        "with that turn."
    )


__all__ = ["ChatDraft", "Encoding", "Example", "draft_turns", "encode_chat", "encode_prompt", "encode_turns"]
