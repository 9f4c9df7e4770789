"""The errors a person can cause. Each message is one sentence with the cause and the value, one with the remedy."""

from __future__ import annotations


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
