"""Retrieval and grounded answers: find passages in a person's documents, answer from them, prove every sentence by a quote.

>>> from llmkit import rag
>>> index = rag.Index.create("notes.index")
>>> rag.add(index, ["docs/"])
>>> answer = rag.ask(None, "How is the port set?", index)      # None: the best supported sentences themselves, no generation
>>> answer = rag.ask(llm, "How is the port set?", index)       # generated, then checked sentence by sentence

read (files to text) -> chunk -> terms, embed -> index (LanceDB) -> retrieve -> evidence -> answer; `evaluate` judges both ends.
The names are imported when they are first used, so that `import llmkit.rag` needs nothing of the `rag` extra.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmkit.rag.answer import Answer, Sentence, ask, stream
    from llmkit.rag.embed import load_embedder
    from llmkit.rag.index import Index
    from llmkit.rag.ingest import add
    from llmkit.rag.prove import Citation
    from llmkit.rag.rerank import load_reranker
    from llmkit.rag.retrieve import Hit, search

_HOMES = {
    "llmkit.rag.answer": ("Answer", "Sentence", "ask", "stream"),
    "llmkit.rag.embed": ("load_embedder",),
    "llmkit.rag.index": ("Index",),
    "llmkit.rag.ingest": ("add",),
    "llmkit.rag.prove": ("Citation",),
    "llmkit.rag.rerank": ("load_reranker",),
    "llmkit.rag.retrieve": ("Hit", "search"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = ["Answer", "Citation", "Hit", "Index", "Sentence", "add", "ask", "load_embedder", "load_reranker", "search", "stream"]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'llmkit.rag' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME_OF[name]), name)
