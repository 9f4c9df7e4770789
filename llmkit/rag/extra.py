"""What says, in one sentence, that the `rag` extra is not installed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from llmkit.errors import LLMKitError


@contextmanager
def needs_rag_extra() -> Iterator[None]:
    """Around an import of one of its packages."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise LLMKitError(f"llmkit rag needs the package {error.name}, which is not installed. Run: pip install 'llmkit[rag]'") from error
