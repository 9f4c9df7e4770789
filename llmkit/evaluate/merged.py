"""How far a merged model's predictions are from those of the model with the adapter beside it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

import llmkit
from llmkit.errors import UsageError
from llmkit.evaluate.perplexity import Progress, evaluate, mean_divergence, read_texts

SAMPLE = (
    "Once upon a time there was a small town by the sea. Every morning the fishermen went out in their boats, and every evening the "
    "children waited for them on the beach. One day a storm came, and the boats did not come back until the next morning.\n\n"
    "To make bread, mix 500 grams of flour with 350 grams of water, 10 grams of salt and a little yeast. Let the dough rest for two "
    "hours, shape it, and bake it for 40 minutes at 230 degrees.\n\n"
    "Question: What is the largest planet of our solar system? Answer: Jupiter. Its mass is more than twice that of all the other "
    "planets together, and it has at least 95 moons."
)
RANDOM_TOKENS = 256  # where there is no tokenizer


def divergence(
    model: str | Path,
    adapter: str | Path,
    merged: str | Path,
    *,
    text: str | None = None,
    threads: int | None = None,
    any_base: bool = False,
    progress: Progress | None = None,
) -> tuple[float, int]:
    """The mean KL divergence per token, in nats, from `model` with `adapter` to `merged`, and of how many tokens.

    text: a file as `llmkit eval` reads it; by default SAMPLE, or random ids for a model without a tokenizer.
    """
    reference = llmkit.load(model, adapter=adapter, any_base=any_base, device="cpu", threads=threads, speculate="off")
    ours = llmkit.load(merged, device="cpu", threads=threads, speculate="off")
    if reference.source.tokenizer is None:
        if text is not None:
            raise UsageError(f"{model} has no tokenizer to read {text} with. Leave --text out, or add a tokenizer.json to its folder.")
        count = min(RANDOM_TOKENS, ours.ctx_size)
        ids = np.random.default_rng(0).integers(0, ours.config.vocab_size, count).astype(np.int32)
        return mean_divergence(ours, reference, [ids]), count - 1
    result = evaluate(ours, [SAMPLE] if text is None else read_texts(text), reference, progress=progress)
    assert result.mean_kl is not None
    return result.mean_kl, result.tokens
