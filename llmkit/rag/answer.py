"""Answers whose every sentence is backed by a quoted source, or said to be unsupported, or an honest "the documents do not say"."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from llmkit.errors import UsageError
from llmkit.rag import fence
from llmkit.rag.embed import Embedder
from llmkit.rag.extract import choose, spans, sufficiency
from llmkit.rag.index import Index
from llmkit.rag.prompt import CONTEXT_TOKENS, ENOUGH, HITS, grounded
from llmkit.rag.prove import Citation, Prover
from llmkit.rag.retrieve import Hit, Question, search
from llmkit.rag.sentences import sentences
from llmkit.rag.terms import term_list

if TYPE_CHECKING:
    from llmkit.llm.api import LLM
    from llmkit.rag.rerank import Reranker

UNSUPPORTED = "[unsupported]"


@dataclass(frozen=True)
class Sentence:
    """A sentence of an answer; `supported` by its citations, or by none."""

    text: str
    supported: bool
    citations: tuple[Citation, ...] = ()


@dataclass(frozen=True)
class Answer:
    """An answer. `answer` has the numbers of `sources` behind its sentences; `nearest` are the passages that were found."""

    answer: str
    abstained: bool
    sentences: tuple[Sentence, ...] = ()
    nearest: tuple[Hit, ...] = ()
    stale: tuple[str, ...] = ()  # files that have changed since they were indexed, so that they could not be cited

    def __str__(self) -> str:
        return self.answer

    @property
    def sources(self) -> tuple[Citation, ...]:
        """The citations in the order of their numbers, [1] first."""
        return tuple(dict.fromkeys(citation for sentence in self.sentences for citation in sentence.citations))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready data: answer, abstained, sentences."""
        return {"answer": self.answer, "abstained": self.abstained, "sentences": [asdict(sentence) for sentence in self.sentences]}


class AnswerStream(Iterator[str]):
    """The text of an answer piece by piece, with its citation marks; `answer` holds the whole once the pieces have ended."""

    def __init__(self, pieces: Iterator[str | Answer]) -> None:
        self._pieces = pieces
        self._answer: Answer | None = None

    def __next__(self) -> str:
        for piece in self._pieces:
            if isinstance(piece, Answer):
                self._answer = piece
            elif piece:
                return piece
        raise StopIteration

    @property
    def answer(self) -> Answer:
        """The whole answer; reads what is left of the stream."""
        for _ in self:
            pass
        assert self._answer is not None
        return self._answer


def ask(llm: LLM | None, question: str, index: Index, **options: Any) -> Answer:
    """The whole answer; see `stream` for the options."""
    return stream(llm, question, index, **options).answer


def stream(
    llm: LLM | None,
    question: str,
    index: Index,
    *,
    embedder: Embedder | None = None,
    reranker: Reranker | None = None,
    where: str | None = None,
    extractive: bool = False,
    strict: bool = False,
    hits: int = HITS,
    context_tokens: int = CONTEXT_TOKENS,
    enough: float = ENOUGH,
    **sampling: Any,
) -> AnswerStream:
    """Answer a question from the index.

    llm: what words the answer; None, or extractive=True, answers by the best supported sentences of the documents themselves.
    strict: sentences that no quote supports are left out instead of marked.
    context_tokens: of passages in the prompt. enough: the probability of being answered below which it abstains; 0 never does.
    sampling: for `LLM.chat`; temperature is 0 by default.
    """
    if not question.strip():
        raise UsageError("the question is empty. Ask something.")
    if (llm is None or extractive) and sampling:
        raise UsageError(f"{next(iter(sampling))} has no effect on an extractive answer, which is not generated. Leave it out.")
    asked = Question.of(question, index, embedder)
    found = search(index, asked, hits, embedder=embedder, reranker=reranker, where=where)
    if not found or sufficiency(asked, found) < enough:
        return AnswerStream(iter([fence.ABSTENTION, _abstention(found)]))
    prover = Prover(index, found, embedder)
    if llm is None or extractive:
        return AnswerStream(_extracted(asked, found, prover))
    return AnswerStream(_generated(llm, question, found, prover, strict, context_tokens, {"temperature": 0.0, **sampling}))


def _abstention(found: Sequence[Hit], stale: Sequence[str] = ()) -> Answer:
    return Answer(fence.ABSTENTION, True, nearest=tuple(found), stale=tuple(stale))


def _extracted(question: Question, found: Sequence[Hit], prover: Prover) -> Iterator[str | Answer]:
    """The best sentences, each its own citation."""
    built = Builder()
    for span in choose(spans(found, question, prover.embedder)):
        citation = prover.checked(span.hit, span.start, span.end, 1.0)
        if citation is not None:
            yield built.add(Sentence(" ".join(span.text.split()), True, (citation,)))
    if not built.sentences:
        yield fence.ABSTENTION
        yield _abstention(found, prover.stale)
        return
    yield built.answer(found, prover.stale)


def _generated(
    llm: LLM, question: str, found: Sequence[Hit], prover: Prover, strict: bool, context_tokens: int, sampling: Mapping[str, Any]
) -> Iterator[str | Answer]:
    """What the model says, sentence by sentence as each is proved."""
    messages, _ = grounded(llm, found, question, context_tokens=context_tokens, sampling=sampling)
    built, text = Builder(), ""
    with llm.chat(messages, stream=True, **sampling) as chunks:
        for chunk in chunks:
            text += chunk.text
            parts = sentences(text)
            for start, end in parts[:-1]:  # the last one may go on
                yield from _judge(text[start:end], prover, built, strict)
            if len(parts) > 1:
                text = text[parts[-1][0] :]
    yield from _judge(text, prover, built, strict)
    if any(sentence.supported for sentence in built.sentences):
        yield built.answer(found, prover.stale)
        return
    yield f"\n{fence.ABSTENTION}" if built.text else fence.ABSTENTION
    yield replace(_abstention(found, prover.stale), sentences=tuple(built.sentences))


def judged(text: str, index: Index, hits: Sequence[Hit], embedder: Embedder | None = None) -> list[Sentence]:
    """The sentences of a text, each with the quote that supports it."""
    built, prover = Builder(), Prover(index, hits, embedder)
    for start, end in sentences(text):
        for _ in _judge(text[start:end], prover, built, strict=False):
            pass
    return built.sentences


def _judge(text: str, prover: Prover, built: Builder, strict: bool) -> Iterator[str]:
    """The piece of the answer that a sentence adds; none for what says nothing, or in strict mode has no proof."""
    bare = re.sub(r"\s*\[\d+(?:\s*,\s*\d+)*\]", "", text).strip()
    if not re.search(r"\w", bare) or term_list(bare) == term_list(fence.ABSTENTION):
        return
    citation = prover.prove(bare)
    if citation is not None or not strict:
        yield built.add(Sentence(bare, citation is not None, () if citation is None else (citation,)))


class Builder:
    """The answer as it grows: its text with numbered citations."""

    def __init__(self) -> None:
        self.sentences: list[Sentence] = []
        self.text = ""
        self._numbers: dict[Citation, int] = {}

    def add(self, sentence: Sentence) -> str:
        """The piece of text that this sentence adds."""
        self.sentences.append(sentence)
        for citation in sentence.citations:
            self._numbers.setdefault(citation, len(self._numbers) + 1)
        marks = "".join(f"[{self._numbers[citation]}]" for citation in sentence.citations) or UNSUPPORTED
        piece = f"{' ' if self.text else ''}{sentence.text} {marks}"
        self.text += piece
        return piece

    def answer(self, found: Sequence[Hit], stale: Sequence[str]) -> Answer:
        return Answer(self.text, False, tuple(self.sentences), tuple(found), tuple(stale))
