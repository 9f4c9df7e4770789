"""What `speculate` and `draft_model` of `llmkit.load` may be. No torch."""

from __future__ import annotations

import filecmp

from llmkit.errors import UsageError
from llmkit.llm.folder import ModelFolder

MODES = ("auto", "ngram", "off")


def check_speculation(speculate: str, model: ModelFolder, draft: ModelFolder | None) -> None:
    """Raises UsageError for an unknown mode, for one that a draft model contradicts, and for a draft model that speaks of other tokens."""
    if speculate not in MODES:
        raise UsageError(f"speculate is {speculate!r}; it must be one of {', '.join(MODES)}.")
    if draft is None:
        return
    if speculate != "auto":
        raise UsageError(f"speculate {speculate!r} leaves the draft model {draft.path} without effect. Give one of the two.")
    difference = _difference(model, draft)
    if difference is not None:
        raise UsageError(
            f"the draft model {draft.path} has another vocabulary than the model: {difference}. "
            "Take a smaller model of the same family, or speculate 'ngram', which needs no draft model."
        )


def _difference(model: ModelFolder, draft: ModelFolder) -> str | None:
    """Where two vocabularies first differ; None where every id stands for the same token."""
    ours, theirs = model.tokenizer, draft.tokenizer
    if ours is None or theirs is None:
        if ours is not theirs:
            return "only one of them has a tokenizer"
        sizes = model.config.vocab_size, draft.config.vocab_size
    else:
        sizes = ours.vocab_size, theirs.vocab_size  # the models' own may be padded
    if sizes[0] != sizes[1]:
        return f"{sizes[1]} tokens, not {sizes[0]}"
    file, other = (folder.path / "tokenizer.json" for folder in (model, draft))
    if ours is None or theirs is None or (file.is_file() and other.is_file() and filecmp.cmp(file, other, shallow=False)):
        return None  # equal files are the usual case: no need to look at every token
    for token_id in range(sizes[0]):
        if ours.token_bytes(token_id) != theirs.token_bytes(token_id):
            return f"token {token_id} is {theirs.token(token_id)!r}, not {ours.token(token_id)!r}"
    return None
