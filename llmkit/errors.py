"""The errors a person can cause. Each message is one sentence with the cause and the value, one with the remedy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class LLMKitError(Exception):
    """Base of all errors llmkit raises for bad input; the command line prints it without a traceback."""

    exit_code = 1


class UsageError(LLMKitError):
    """An option or argument that is out of range, unknown or without effect."""

    exit_code = 2


class CheckFailed(LLMKitError):
    """A check that was asked for (verify, a quality gate) found a difference."""

    exit_code = 3


class DoesNotFit(LLMKitError):
    """The work would not fit in the memory there is."""

    exit_code = 4


class NotInstalled(LLMKitError):
    """A library that an extra of llmkit brings and that is not installed."""


# The extras of pyproject.toml by what is imported of them; the core's own libraries are always there.
EXTRA_OF = {
    "torch": "torch",
    **dict.fromkeys(("accelerate", "bitsandbytes", "datasets", "peft", "transformers", "yaml"), "train"),
    **dict.fromkeys(("sentencepiece", "tiktoken"), "sentencepiece"),
    **dict.fromkeys(("docx", "filelock", "lancedb", "pyarrow", "pypdf", "selectolax", "Stemmer"), "rag"),
    "gguf": "gguf",
    "matplotlib": "plot",
}


@contextmanager
def naming_extras(wanted: str | None = None) -> Iterator[None]:
    """Turn the import error of a library that an extra brings into NotInstalled, which names the line for pip.

    Libraries are imported where they are used, so this stands around what a person calls: the command line, `load`, `finetune`.
    wanted: the extra with all that this work needs; without it, the one that brings the library that was missed first.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        extra = EXTRA_OF.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        raise NotInstalled(
            f"This needs the package {error.name}, which is not installed. Run: pip install 'llmkit[{wanted or extra}]'"
        ) from error


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: Python's own, the system's, or torch's on any device (a RuntimeError by its text)."""
    text = str(error)
    told = any(word in text for word in ("out of memory", "allocate memory", "STATUS_ALLOC_FAILED"))  # the last: cuBLAS's and cuDNN's
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError | OSError) and told)


class ConfigError(LLMKitError):
    """A configuration that cannot be right or that llmkit does not run."""


class CheckpointError(LLMKitError):
    """A checkpoint file that is missing, damaged or does not belong to the model."""


class TokenizerError(LLMKitError):
    """A tokenizer that is missing, damaged or asked for something it cannot do."""


class TemplateError(LLMKitError):
    """A chat template that is wrong, refuses the messages or does not end."""


class ContextOverflow(LLMKitError):
    """A prompt and its reply do not fit into the context or the KV cache."""
