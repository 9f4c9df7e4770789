"""How well a model predicts a text, and how far a quantized one has moved from its original.

Teacher-forced: every token is predicted from the true ones before it. Documents are independent of each other and begin with BOS where
the model has one, so that each of their tokens is scored; one longer than the context is cut into windows that do not overlap, each
beginning again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

import llmkit
from llmkit.checkpoint.source import ModelSource
from llmkit.engine.backend import Backend
from llmkit.engine.forward import forward_all
from llmkit.engine.sampling import log_softmax
from llmkit.errors import LLMKitError, UsageError
from llmkit.llm.api import LLM
from llmkit.training.data.documents import read_documents
from llmkit.training.recipe import Source

CONTEXT = 2048  # tokens of a window by default, where the model takes as many
LOGITS = 1 << 24  # numbers that one step returns: 64 MiB
_SLICE = 1 << 20  # of these, how many are turned into float64 at a time

Progress = Callable[[int, int], None]  # tokens scored, tokens in all


@dataclass(frozen=True)
class Evaluation:
    """How a model predicts a text. What compares it with a reference is None without one.

    KL is the Kullback-Leibler divergence from the reference's distribution over the next token to the model's, in nats.
    """

    documents: int
    tokens: int  # scored
    bytes: int  # UTF-8, that they stand for
    perplexity: float
    bits_per_byte: float
    bits_per_weight: float  # over the whole model: embeddings, head and norms included
    path: str  # what computed, in words
    reference_bits_per_byte: float | None = None
    mean_kl: float | None = None  # per token
    kl_99: float | None = None  # one token in a hundred has more
    top1_agreement: float | None = None  # share of tokens for which both name the same likeliest one

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Document:
    """A text in windows of tokens, int32, that are computed one by one; those after the first of each are scored."""

    windows: list[np.ndarray]
    nbytes: int  # of the scored tokens


def load_pair(model: str | Path, reference: str | Path | None = None, **load: Any) -> tuple[LLM, LLM | None]:
    """A model, loaded as the keywords of `llmkit.load` say, and its reference in float32 with a cache of 32 bits."""
    llm = llmkit.load(model, speculate="off", **load)
    if reference is None:
        return llm, None
    unquantized = ModelSource.open(reference)
    if unquantized.quantized:
        raise UsageError(f"{reference} is quantized itself. Give the checkpoint that the model was made from.")
    where = {name: load[name] for name in ("device", "threads") if name in load}
    return llm, llmkit.load(unquantized, dtype="float32", speculate="off", **where)


def read_texts(path: str, separator: str = "<|endoftext|>") -> list[str]:
    """The documents of a text file, parted by `separator`, of a JSONL file with a "text" in each row, or of a folder of these."""
    texts = []
    for document in read_documents(Source(path=path, separator=separator)):
        if document.text is None:
            raise UsageError(f'{document.place} has no "text", and a chat or a prompt is not scored. Write rows of {{"text": "..."}}.')
        texts.append(document.text)
    if not texts:
        raise UsageError(f"{path} has no text. Give a file that has.")
    return texts


def evaluate(
    llm: LLM,
    texts: Sequence[str],
    reference: LLM | None = None,
    *,
    ctx_size: int | None = None,
    max_tokens: int | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Scores texts with a model, and against a reference with the same tokenizer, which is taken as it was loaded.

    ctx_size: tokens of a window; by default CONTEXT, or the model's context where that is shorter. max_tokens: score no more.
    Raises UsageError for a reference or a tokenizer that does not belong to the model, LLMKitError where a model's logits are no numbers.
    """
    models = [llm] if reference is None else [llm, reference]
    limit = min(model.ctx_size for model in models)
    if ctx_size is not None and not 2 <= ctx_size <= limit:
        raise UsageError(f"ctx_size {ctx_size} is not between 2 and {limit}, the context of the model. Choose one in between.")
    if reference is not None:
        _check_reference(llm, reference, texts)
    documents = list(_documents(llm, texts, ctx_size or min(limit, CONTEXT), max_tokens))
    total = sum(len(window) - 1 for document in documents for window in document.windows)
    if not total:
        raise UsageError("the text has no token that could be scored. Give a longer one.")
    sums, path = _summed(models, [window for document in documents for window in document.windows], progress)
    nbytes = sum(document.nbytes for document in documents)
    bits = [nats / math.log(2) / nbytes if nbytes else math.nan for nats in sums.nats]
    return Evaluation(
        documents=len(documents),
        tokens=total,
        bytes=nbytes,
        perplexity=math.exp(sums.nats[0] / total),
        bits_per_byte=bits[0],
        bits_per_weight=8 * sum(llm.runner.nbytes.values()) / llm.runner.parameters,
        path=path,
        reference_bits_per_byte=None if reference is None else bits[1],
        mean_kl=None if reference is None else float(sums.kl.mean()),
        kl_99=None if reference is None else float(np.quantile(sums.kl, 0.99)),
        top1_agreement=None if reference is None else sums.same / total,
    )


def mean_divergence(llm: LLM, reference: LLM, windows: Sequence[np.ndarray]) -> float:
    """The mean KL divergence per token from the reference's predictions to the model's, in nats, over windows of token ids, int32."""
    return float(_summed([llm, reference], windows)[0].kl.mean())


def _summed(models: Sequence[LLM], windows: Sequence[np.ndarray], progress: Progress | None = None) -> tuple[_Sums, str]:
    """The sums over all tokens after the first of each window, and what computed, in words."""
    total = sum(len(window) - 1 for window in windows)
    sums = _Sums(total)
    backends = [model.new_backend() for model in models]
    adapters = [model.adapter_name(...) for model in models]
    for window in windows:
        for targets, logits in _logits(backends, adapters, window):
            sums.add(targets, logits, models)
            if progress is not None:
                progress(sums.tokens, total)
    return sums, backends[0].path


def _check_reference(llm: LLM, reference: LLM, texts: Iterable[str]) -> None:
    if reference.config.vocab_size != llm.config.vocab_size:
        raise UsageError(
            f"{reference.name} has {reference.config.vocab_size} tokens and {llm.name} {llm.config.vocab_size}, so their predictions "
            "cannot be compared. Give the checkpoint that the model was made from."
        )
    if reference.source.tokenizer is not None and any(llm.tokenizer.encode(t) != reference.tokenizer.encode(t) for t in texts):
        raise UsageError(
            f"{reference.name} and {llm.name} cut the text into different tokens. Give the checkpoint that the model was made from."
        )


def _documents(llm: LLM, texts: Iterable[str], size: int, max_tokens: int | None) -> Iterator[Document]:
    """Documents in windows of at most `size` tokens, until `max_tokens` are scored."""
    head = [] if llm.bos_id is None else [llm.bos_id]
    first = 1 - len(head)  # tokens of a window's text that are not scored
    left = max_tokens
    for text in texts:
        ids = llm.tokenizer.encode(text, bos=False)
        llm.check_ids([*head, *ids])
        windows, end, unscored = [], 0, 0
        while len(ids) - end > first and left != 0:
            part = ids[end : end + size - len(head)]
            if left is not None:
                part = part[: left + first]
                left -= len(part) - first
            windows.append(np.asarray([*head, *part], np.int32))
            end += len(part)
            unscored += sum(len(llm.tokenizer.decode([token]).encode()) for token in part[:first])
        if windows:
            # Where a character is cut, the part that is there counts as the three bytes of the replacement character.
            yield Document(windows, len((text if end == len(ids) else llm.tokenizer.decode(ids[:end])).encode()) - unscored)


def _logits(backends: Sequence[Backend], adapters: Sequence[str | None], ids: np.ndarray) -> Iterator[tuple[np.ndarray, list[np.ndarray]]]:
    """The tokens of a window that are scored, chunk by chunk, and the logits `[chunk, vocab]` that every model had for them."""
    size = min(512, max(16, LOGITS // backends[0].config.vocab_size))
    wanted = [np.arange(len(ids) - 1)]  # the last token predicts nothing
    passes = [
        forward_all(backend, [ids], wanted=wanted, adapters=[adapter], step_tokens=size)
        for backend, adapter in zip(backends, adapters, strict=True)
    ]
    for results in zip(*passes, strict=True):
        yield ids[results[0][1] + 1], [logits for _, _, logits in results]


class _Sums:
    """What is added up token by token."""

    def __init__(self, total: int) -> None:
        self.tokens = 0
        self.nats = [0.0, 0.0]  # of the model and of the reference
        self.same = 0
        self.kl = np.empty(total)

    def add(self, targets: np.ndarray, logits: Sequence[np.ndarray], models: Sequence[LLM]) -> None:
        """Logits `[len(targets), vocab]` of each model."""
        step = max(1, _SLICE // logits[0].shape[1])
        for start in range(0, len(targets), step):
            goal = targets[start : start + step]
            logs = []
            for number, (every, model) in enumerate(zip(logits, models, strict=True)):
                logs.append(log_softmax(every[start : start + step]))
                if not np.isfinite(nats := -logs[-1][np.arange(len(goal)), goal].sum()):
                    raise LLMKitError(f"the logits of {model.name} are not finite. Is the checkpoint damaged?")
                self.nats[number] += float(nats)
            if len(logs) == 2:
                ours, true = logs
                self.kl[self.tokens : self.tokens + len(goal)] = (np.exp(true) * (true - ours)).sum(-1)
                self.same += int((ours.argmax(-1) == true.argmax(-1)).sum())
            self.tokens += len(goal)
