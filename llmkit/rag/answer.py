"""Answers whose every sentence is backed by a quoted source, or said to be unsupported, or an honest "the documents do not say"."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmkit.errors import ContextOverflow, TemplateError, UsageError
from llmkit.rag import fence
from llmkit.rag.embed import Embedder
from llmkit.rag.evidence import Facts, Support, compare
from llmkit.rag.extract import choose, spans, sufficiency
from llmkit.rag.index import Index
from llmkit.rag.read import Unreadable, decode
from llmkit.rag.retrieve import Hit, Question, search
from llmkit.rag.sentences import sentences
from llmkit.rag.terms import clean, term_list

if TYPE_CHECKING:
    from llmkit.llm import LLM
    from llmkit.rag.rerank import Reranker

HITS = 8  # passages that an answer may come from
CONTEXT_TOKENS = 1500  # of passages in a prompt
ENOUGH = 0.5  # probability that the passages hold the answer, below which the answer abstains
WINDOW = 3  # sentences of a quote at most
UNSUPPORTED = "[unsupported]"


@dataclass(frozen=True)
class Citation:
    """A quote that stands in `file` at the characters `[start, end)` (of the extracted text for HTML, PDF and docx)."""

    file: str
    line: int
    start: int
    end: int
    quote: str
    score: float


@dataclass(frozen=True)
class Sentence:
    """A sentence of an answer; `supported` by its citations, or by none."""

    text: str
    supported: bool
    citations: tuple[Citation, ...] = ()


@dataclass(frozen=True)
class Answer:
    """An answer. `answer` has the numbers of `sources` behind its sentences; `nearest` are the passages, told where it abstains."""

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
    built, text = Builder(), ""
    said = ""
    for piece in converse(llm, found, question, context_tokens, sampling):
        text += piece
        parts = sentences(text)
        for start, end in parts[:-1]:  # the last one may go on
            said += text[start:end]
            yield from _judge(text[start:end], prover, built, strict)
        if len(parts) > 1:
            text = text[parts[-1][0] :]
    if text.strip():
        yield from _judge(text.strip(), prover, built, strict)
    if not any(sentence.supported for sentence in built.sentences):
        if not built.text:
            yield fence.ABSTENTION
        yield replace(_abstention(found, prover.stale), sentences=tuple(built.sentences))
        return
    yield built.answer(found, prover.stale)


def _judge(text: str, prover: Prover, built: Builder, strict: bool) -> Iterator[str]:
    bare = re.sub(r"\s*\[\d+(?:\s*,\s*\d+)*\]", "", text).strip()
    if not re.search(r"\w", bare) or _same(bare, fence.ABSTENTION):
        return
    citation = prover.prove(bare)
    if citation is None and strict:
        return
    yield built.add(Sentence(bare, citation is not None, () if citation is None else (citation,)))


def _same(one: str, other: str) -> bool:
    return term_list(one) == term_list(other)


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


def converse(llm: LLM, found: Sequence[Hit], question: str, context_tokens: int, sampling: Mapping[str, Any]) -> Iterator[str]:
    """The model's reply to the fenced passages, as many of them as the budget and the context take."""
    room = llm.ctx_size - int(sampling.get("max_tokens") or min(256, llm.ctx_size // 4))
    used: list[Hit] = []
    for hit in found:
        messages = fence.prompt([*used, hit], question)
        tokens = len(_encoded(llm, messages))
        if used and sum(len(llm.tokenizer.encode(one.text, bos=False)) for one in [*used, hit]) > context_tokens:
            break
        if tokens > room:
            break
        used.append(hit)
    if not used:
        raise ContextOverflow(
            f"no passage fits beside the question into the model's context of {llm.ctx_size} tokens. Ask more shortly, take a model with "
            "a longer context, or answer with extractive."
        )
    messages = fence.prompt(used, question)
    with llm.chat(_roles(llm, messages), stream=True, **sampling) as chunks:
        for chunk in chunks:
            yield chunk.text


def _roles(llm: LLM, messages: list[dict[str, str]]) -> list[dict[str, str]]:
    """The messages, with the system's joined to the user's where the chat template refuses that role."""
    try:
        llm.encode_chat(messages)
    except TemplateError:
        return [{"role": "user", "content": "\n\n".join(message["content"] for message in messages)}]
    return messages


def _encoded(llm: LLM, messages: list[dict[str, str]]) -> list[int]:
    return llm.encode_chat(_roles(llm, messages))


# --- proof ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Window:
    """One to three neighbouring sentences of a passage: what a citation may quote."""

    hit: Hit
    start: int
    end: int
    text: str
    facts: Facts


class Prover:
    """Finds the quote that supports a sentence, and checks that it stands in its file."""

    def __init__(self, index: Index, hits: Sequence[Hit], embedder: Embedder | None) -> None:
        self.index, self.hits, self.embedder = index, hits, embedder
        self.stale: list[str] = []
        self._windows: list[_Window] | None = None
        self._texts: dict[str, str | None] = {}

    def prove(self, sentence: str) -> Citation | None:
        """The shortest quote that supports a sentence best; None if none does."""
        claim = Facts.of(sentence)
        judged = sorted(
            ((compare(claim, window.facts, about=self._about(window.hit)), window) for window in self._all_windows()),
            key=lambda pair: (bool(pair[0].problems), -pair[0].score, pair[1].end - pair[1].start),
        )
        for support, window in judged[:8]:
            if not support.supported and not support.problems:
                support = self._with_vectors(sentence, claim, window)
            if support.supported and (citation := self.checked(window.hit, window.start, window.end, support.score)) is not None:
                return citation
        return None

    def checked(self, hit: Hit, start: int, end: int, score: float) -> Citation | None:
        """A citation of characters `[start, end)` of the hit's document, if its text is still there; found again if it has moved."""
        offset = start - hit.row.start
        whole = hit.row.text if hit.row.start <= start and end <= hit.row.end else hit.text
        quote = whole[offset : offset + end - start] if whole is hit.row.text else hit.text[start - hit.start : end - hit.start]
        source = self._source(hit)
        if source is None or source[start:end] != quote:
            moved = None if source is None else locate(quote, source)
            if moved is None or source is None:
                if hit.row.file not in self.stale:
                    self.stale.append(hit.row.file)
                return None
            start, end = moved
            quote = source[start:end]
        return Citation(hit.row.file, source.count("\n", 0, start) + 1, start, end, quote, round(score, 4))

    def _about(self, hit: Hit) -> frozenset[str]:
        return frozenset(term_list(f"{hit.row.heading} {Path(hit.row.file).stem}"))

    def _with_vectors(self, sentence: str, claim: Facts, window: _Window) -> Support:
        if self.embedder is None:
            return Support(0.0)
        mine, theirs = self.embedder.documents([sentence, window.text])
        return compare(claim, window.facts, similarity=float(np.dot(mine, theirs)), about=self._about(window.hit))

    def _all_windows(self) -> list[_Window]:
        if self._windows is None:
            self._windows = []
            for hit in self.hits:
                parts = [part for part in sentences(hit.text) if not fence.instructs(hit.text[slice(*part)])]
                for first in range(len(parts)):
                    for last in range(first, min(first + WINDOW, len(parts))):
                        start, end = parts[first][0], parts[last][1]
                        text = clean(hit.text[start:end])
                        if last == first or not fence.instructs(text):
                            self._windows.append(_Window(hit, hit.start + start, hit.start + end, text, Facts.of(text)))
        return self._windows

    def _source(self, hit: Hit) -> str | None:
        """The text that offsets count in: kept in the index where it was extracted, else the file as it is now."""
        file = hit.row.file
        if file not in self._texts:
            text = self.index.source(file)
            if text is None:
                try:
                    text = decode(Path(file).read_bytes())[0]
                except (OSError, Unreadable):
                    text = None
            self._texts[file] = text
        return self._texts[file]


def locate(quote: str, text: str) -> tuple[int, int] | None:
    """Where a quote stands in a text, however its white space is laid out; None if nowhere or at several places."""
    pattern = r"\s+".join(re.escape(word) for word in quote.split())
    places = [match.span() for _, match in zip(range(2), re.finditer(pattern, text), strict=False)] if pattern else []
    return places[0] if len(places) == 1 else None
