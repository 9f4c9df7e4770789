"""A decoder-only reranker (Qwen3-Reranker, arXiv:2506.05176): does this document meet the question, yes or no?

Its score is the probability of "yes" against "no" as the next token, from the logits of llmkit's own transformer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

import numpy as np

from llmkit.errors import CheckpointError
from llmkit.rag.states import batches, pooled_states

if TYPE_CHECKING:
    from llmkit.rag.retrieve import Hit

# The prompt of the model card, word for word: the model was trained on it.
PREFIX = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct provided. "
    'Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
)
SUFFIX = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"


class Reranker(Protocol):
    """What reads question and passage together."""

    def scores(self, question: str, texts: Sequence[str]) -> list[float]:
        """The probability, 0..1, that each text answers the question."""
        ...

    def rerank(self, question: str, hits: Sequence[Hit]) -> list[Hit]:
        """The hits in the order of these scores, which become theirs."""
        ...


def load_reranker(model: str, *, device: str | None = None, threads: int | None = None) -> DecoderReranker:
    """A folder or hub id of a decoder-only reranker in any family that llmkit runs, 4-bit folders too."""
    return DecoderReranker(model, device=device, threads=threads)


class DecoderReranker:
    """The yes/no logits of a causal model."""

    def __init__(self, model: str, *, device: str | None = None, threads: int | None = None, max_tokens: int = 2048) -> None:
        from llmkit.llm.api import load

        self._llm = load(model, device=device, threads=threads, speculate="off")
        tokenizer = self._llm.tokenizer
        yes, no = tokenizer.token_id("yes"), tokenizer.token_id("no")
        if yes is None or no is None:
            raise CheckpointError(f'{model} has no tokens "yes" and "no", so it is no Qwen3-Reranker. Choose another reranker.')
        self._answers = [yes, no]
        self._prefix = tokenizer.encode(PREFIX, bos=False, special=True)
        self._suffix = tokenizer.encode(SUFFIX, bos=False, special=True)
        self._backend = self._llm.new_backend()
        self._room = min(max_tokens, self._llm.ctx_size) - len(self._prefix) - len(self._suffix)

    def scores(self, question: str, texts: Sequence[str]) -> list[float]:
        tokenizer = self._llm.tokenizer
        ids = []
        for text in texts:
            middle = tokenizer.encode(f"<Instruct>: {INSTRUCTION}\n<Query>: {question}\n<Document>: {text}", bos=False)
            ids.append(self._prefix + middle[: self._room] + self._suffix)
        out = np.zeros(len(ids))
        for batch in batches([len(one) for one in ids]):
            logits = pooled_states(self._backend, [ids[i] for i in batch], last=True, hidden=False)[:, self._answers].astype(np.float64)
            out[batch] = 1 / (1 + np.exp(logits[:, 1] - logits[:, 0]))
        return out.tolist()

    def rerank(self, question: str, hits: Sequence[Hit]) -> list[Hit]:
        scores = self.scores(question, [hit.text for hit in hits])
        judged = [replace(hit, score=score, parts={**hit.parts, "reranker": score}) for hit, score in zip(hits, scores, strict=True)]
        return sorted(judged, key=lambda hit: -hit.score)
