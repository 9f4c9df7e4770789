"""The Python API: `from llmkit.llm import LLM, load`. The names are imported when they are first used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmkit.llm.api import LLM, embedded_model, load
    from llmkit.llm.outputs import Chunk, Completion, Score, Stream

__all__ = ["LLM", "Chunk", "Completion", "Score", "Stream", "embedded_model", "load"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'llmkit.llm' has no attribute {name!r}")
    module = "llmkit.llm.api" if name in ("LLM", "embedded_model", "load") else "llmkit.llm.outputs"
    return getattr(importlib.import_module(module), name)
