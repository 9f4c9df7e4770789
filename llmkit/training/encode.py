"""One document to its training examples: token ids, and which of them are learned. No torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from llmkit.errors import TemplateError, UsageError
from llmkit.text.tokenizer import Tokenizer
from llmkit.text.turns import Encoding, Example, draft_turns
from llmkit.training.recipe import Source
from llmkit.training.rows import Document


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
    return draft.finish(encode_texts(tokenizer, draft.kind, draft.texts))


def draft_document(document: Document, tokenizer: Tokenizer, source: Source) -> Draft:
    """The document's examples, but for the encoding of their texts; raises as `encode_document`."""
    end = list(tokenizer.eos_ids[:1])
    if document.text is not None:

        def whole(encodings: Sequence[Encoding]) -> list[Example]:
            ids = encodings[0][0]
            ids = ids + (end if ids[-1:] != end else [])  # some tokenizers end a text by themselves
            return [(ids, [True] * len(ids))]

        return Draft("text", [document.text], whole)
    has_template = tokenizer.chat_template is not None
    if document.messages is not None or (has_template if source.chat is None else source.chat):
        if not has_template:
            raise UsageError(
                f"{document.place} is a chat, but the tokenizer has no chat template. "
                "Give it one (a chat_template.jinja in its folder), or use prompt/completion rows with chat: false."
            )
        return _chat_draft(document, tokenizer, source)
    prompt = "\n\n".join(part for part in (document.system, document.prompt) if part)

    def joined(encodings: Sequence[Encoding]) -> list[Example]:
        ids = encodings[0][0]
        ids = ids[: -len(end)] if end and ids[1:][-1:] == end else ids
        answer = tokenizer.encode_continuation(document.completion or "")
        return [(ids + answer + end, [source.learn == "all"] * len(ids) + [True] * (len(answer) + len(end)))]

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
            return Draft("chat", [text], lambda encodings: [(ids, [True] * len(ids)) for ids, _ in encodings])
        draft = draft_turns(tokenizer, messages, document.tools, turns[-1:] if source.learn == "last" else turns, **variables)
    except TemplateError as error:
        raise UsageError(f"{document.place}: {error}") from None

    def finish(encodings: Sequence[Encoding]) -> list[Example]:
        try:
            return draft.finish(encodings)
        except TemplateError as error:
            raise UsageError(f"{document.place}: {error}") from None

    return Draft("chat", draft.texts, finish)


def encode_texts(tokenizer: Tokenizer, kind: str, texts: list[str]) -> list[Encoding]:
    """The texts of drafts of one kind."""
    if kind == "chat":
        return tokenizer.encode_spans_batch(texts)
    return [(ids, []) for ids in tokenizer.encode_batch(texts)]
