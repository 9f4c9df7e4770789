"""One document to its training examples: token ids, and which of them are learned. No torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from llmkit.errors import TemplateError, UsageError
from llmkit.text.codec import CharSpan
from llmkit.text.tokenizer import Tokenizer
from llmkit.text.turns import Encoding, Example, draft_turns
from llmkit.training.data.formats import Document, Message
from llmkit.training.recipe import Source


@dataclass(frozen=True)
class Draft:
    """A document's examples up to the encoding of its texts, which is cheaper for many documents at once."""

    kind: Literal["text", "plain", "chat"]
    texts: list[str]
    finish: Callable[[Sequence[Encoding]], list[Example]]


def encode_document(document: Document, tokenizer: Tokenizer, source: Source) -> list[Example]:
    """The training examples of a document: token ids and, for each, whether it is a target.

    Text is learned whole. Prompt and completion go through the chat template where there is one (`source.chat` overrules it), else
    they are encoded apart and joined, as they are when the model is asked to continue the prompt. A chat gives one example, or
    one for each turn (see `draft_turns`); none where nothing in it can be learned. Every layout ends with a learned end token.

    Raises:
        UsageError: a chat without a chat template, or one that the template refuses.
    """
    draft = draft_document(document, tokenizer, source)
    return draft.finish(encode_texts(tokenizer, draft.kind, draft.texts, source.special_tokens))


def draft_document(document: Document, tokenizer: Tokenizer, source: Source) -> Draft:
    """The document's examples, but for the encoding of their texts; raises as `encode_document`."""
    has_template = tokenizer.chat_template is not None
    if document.messages is not None or (document.text is None and (has_template if source.chat is None else source.chat)):
        if not has_template:
            raise UsageError(
                f"{document.place} is a chat, but the tokenizer has no chat template. "
                "Give it one (a chat_template.jinja in its folder), or use prompt/completion rows with chat: false."
            )
        return _chat_draft(document, tokenizer, source)
    if not tokenizer.eos_ids:
        raise UsageError(
            "The tokenizer names no end-of-text token, so a model could not learn to stop. Set eos_token in its tokenizer_config.json."
        )
    end = [tokenizer.eos_ids[0]]
    if document.text is not None:

        def whole(encodings: Sequence[Encoding]) -> list[Example]:
            ids = encodings[0][0]
            ids = ids + (end if ids[-1:] != end else [])  # some tokenizers end a text by themselves
            return [(ids, [True] * len(ids))]

        return Draft("text", [document.text], whole)
    prompt = "\n\n".join(part for part in (document.system, document.prompt) if part)

    def joined(encodings: Sequence[Encoding]) -> list[Example]:
        ids = encodings[0][0]
        ids = ids[:-1] if ids[1:][-1:] == end else ids
        answer = tokenizer.encode_continuation(document.completion or "", special=source.special_tokens)
        answer += end if answer[-1:] != end else []
        return [(ids + answer, [source.learn == "all"] * len(ids) + [True] * len(answer))]

    return Draft("plain", [prompt], joined)


def _chat_draft(document: Document, tokenizer: Tokenizer, source: Source) -> Draft:
    messages, context = document.messages, document.context
    if messages is None:
        system = [{"role": "system", "content": document.system}] if document.system else []
        messages = (*system, {"role": "user", "content": document.prompt}, {"role": "assistant", "content": document.completion})
    variables = source.chat_template_kwargs
    turns = [k for k, m in enumerate(messages) if k >= context and m["role"] == "assistant" and m.get("weight", 1) != 0]
    try:
        if source.learn == "all":
            assert tokenizer.chat_template is not None
            text = tokenizer.chat_template.render(messages, document.tools, False, **variables)
            return Draft("chat", [text], lambda encodings: [_all_of(tokenizer, text, *encodings[0])])
        draft = draft_turns(tokenizer, messages, document.tools, turns[-1:] if source.learn == "last" else turns, **variables)
    except TemplateError as error:
        raise _refused(document, messages, error) from None

    def finish(encodings: Sequence[Encoding]) -> list[Example]:
        try:
            return draft.finish(encodings)
        except TemplateError as error:
            raise _refused(document, messages, error) from None

    return Draft("chat", draft.texts, finish)


def _refused(document: Document, messages: Sequence[Message], error: TemplateError) -> UsageError:
    """With the order of roles, which is what templates refuse most."""
    roles = [str(message["role"]) for message in messages]
    shown = ", ".join(roles if len(roles) <= 8 else [*roles[:8], "..."])
    return UsageError(f"{document.place} (roles: {shown}): {error}")


def _all_of(tokenizer: Tokenizer, text: str, ids: list[int], places: list[CharSpan]) -> Example:
    """A chat that is learned whole, with an end token where the template writes none."""
    ends = {*tokenizer.eos_ids, *tokenizer.special_ids}
    last = max((n for n, token in enumerate(ids) if token in ends), default=None)
    if last is None or text[places[last][1] :].strip():
        ids = [*ids, *tokenizer.eos_ids[:1]]
    return ids, [True] * len(ids)


def encode_texts(tokenizer: Tokenizer, kind: str, texts: list[str], special: bool) -> list[Encoding]:
    """The texts of drafts of one kind; `special`: special tokens written in them count as such, as in a chat they always do."""
    if kind == "chat":
        return tokenizer.encode_spans_batch(texts)
    return [(ids, []) for ids in tokenizer.encode_batch(texts, special=special)]
