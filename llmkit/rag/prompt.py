"""What a model is asked: the fenced passages that fit its context, and a chat that is grounded turn by turn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from llmkit.errors import ContextOverflow, TemplateError
from llmkit.rag import fence
from llmkit.rag.extract import sufficiency
from llmkit.rag.retrieve import Hit, Question, search
from llmkit.rag.terms import term_list

if TYPE_CHECKING:
    from llmkit.llm.api import LLM
    from llmkit.rag.embed import Embedder
    from llmkit.rag.index import Index

HITS = 8  # passages that an answer may come from
CONTEXT_TOKENS = 1500  # of passages in a prompt
ENOUGH = 0.5  # probability that the passages hold the answer, below which the answer abstains
REPLY_TOKENS = 256  # kept free for the reply where nobody says how long it may be

Messages = list[dict[str, Any]]


def grounded(
    llm: LLM,
    hits: Sequence[Hit],
    question: str,
    *,
    context_tokens: int,
    sampling: Mapping[str, Any],
    before: Sequence[Mapping[str, Any]] = (),
) -> tuple[Messages, list[Hit]]:
    """The messages that ask for an answer from the passages, and those of them that fit the budget and the context.

    Where not even the best passage fits, those of its sentences that do.

    before: a system message of the person's own and earlier turns. ContextOverflow where not even one sentence fits.
    """
    room = llm.ctx_size - int(sampling.get("max_tokens") or min(REPLY_TOKENS, llm.ctx_size // 4))
    used: list[Hit] = []
    spent = 0

    def asked(passages: Sequence[Hit]) -> Messages | None:
        """The messages with these passages, if they fit."""
        tried = _accepted(llm, _joined(before, fence.prompt(passages, question)))
        return tried if len(llm.encode_chat(tried)) <= room else None

    for hit in hits:
        spent += len(llm.tokenizer.encode(hit.text, bos=False))
        if used and spent > context_tokens:
            break
        if asked([*used, hit]) is None:
            break
        used.append(hit)
    if not used and hits:
        used = _cut(hits[0], question, lambda piece: asked([piece]) is not None)
    messages = asked(used) if used else None
    if messages is None:
        raise ContextOverflow(
            f"no passage fits beside the question into the model's context of {llm.ctx_size} tokens. Ask more shortly, take a model with "
            "a longer context, or answer without a model (llmkit rag ask --extractive)."
        )
    return messages, used


def _cut(hit: Hit, question: str, fits: Callable[[Hit], bool]) -> list[Hit]:
    """The longest run of a passage's sentences that fits, around the one that shares most with the question; empty if that does not."""
    parts = fence.trusted_sentences(hit.text, hit.row.kind)
    if not parts:
        return []
    wanted = set(term_list(question))
    shared = [len(wanted.intersection(term_list(hit.text[start:end]))) for start, end in parts]
    first = last = shared.index(max(shared))
    found: list[Hit] = []
    while first >= 0 and last < len(parts):
        start, end = parts[first][0], parts[last][1]
        line = hit.line + hit.text.count("\n", 0, start)
        piece = replace(hit, text=hit.text[start:end], start=hit.start + start, end=hit.start + end, line=line)
        if not fits(piece):
            break
        found = [piece]
        first, last = (first, last + 1) if last + 1 < len(parts) else (first - 1, last)
    return found


def _joined(before: Sequence[Mapping[str, Any]], asked: Sequence[Mapping[str, Any]]) -> Messages:
    """Earlier messages, with the rules at the end of their system message, and the passages with the question."""
    earlier = [dict(message) for message in before]
    system, user = (dict(message) for message in asked)
    if earlier and earlier[0]["role"] == "system":
        earlier[0]["content"] = f"{earlier[0]['content']}\n\n{system['content']}"
        return [*earlier, user]
    return [system, *earlier, user]


def _accepted(llm: LLM, messages: Messages) -> Messages:
    """The messages, with the system's joined to the next where the chat template refuses that role."""
    try:
        llm.encode_chat(messages)
    except TemplateError:
        system, first, *rest = messages
        return [first | {"content": f"{system['content']}\n\n{first['content']}"}, *rest]
    return messages


class Grounding:
    """Grounds the turns of a chat: each user message gets the passages it asks about, each reply its proof."""

    def __init__(self, llm: LLM, index: Index, embedder: Embedder | None = None) -> None:
        self.llm, self.index, self.embedder = llm, index, embedder
        self.hits: list[Hit] = []

    def messages(self, messages: Sequence[Mapping[str, Any]], sampling: Mapping[str, Any]) -> Messages:
        """The messages with passages before the last user message; as they are where the documents do not say."""
        *before, last = (dict(message) for message in messages)
        self.hits = []
        text = str(last["content"])
        question = Question.of(text, self.index, self.embedder)
        found = search(self.index, question, HITS, embedder=self.embedder)
        if not found or sufficiency(question, found) < ENOUGH:
            return [*before, last]
        asked, self.hits = grounded(self.llm, found, text, context_tokens=CONTEXT_TOKENS, sampling=sampling, before=before)
        return asked

    def proof(self, reply: str) -> list[str]:
        """Lines that say which sentences of a reply stand on which quotes."""
        from llmkit.rag.answer import judged

        if not self.hits:
            return ["(the documents do not say; this reply has no source)"]
        lines = []
        for sentence in judged(reply, self.index, self.hits, self.embedder):
            for citation in sentence.citations:
                lines.append(f'{citation.file}:{citation.line} "{" ".join(citation.quote.split())}"')
            if not sentence.supported:
                lines.append(f"[unsupported] {sentence.text}")
        return list(dict.fromkeys(lines))
