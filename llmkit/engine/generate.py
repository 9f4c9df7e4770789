"""The loop around the engine: prompts in, tokens out as they come."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from llmkit.engine.batch import Engine, PromptIds
from llmkit.engine.sampling import SamplingParams
from llmkit.engine.sequence import Event, Sequence


def generate(
    engine: Engine, prompts: Iterable[PromptIds], params: SamplingParams, adapter: str | None = None, *, eos_ids: Iterable[int] = ()
) -> Iterator[Event]:
    """Replies to all prompts in one batch, `params.n` samples each; `Event.sequence` says whose token it is.

    Tokens are read off the sequences, so that several of these loops over one engine may be interleaved. A loop that is
    closed early, or broken off by Ctrl-C, aborts its sequences; they keep what they have.

    Raises:
        UsageError, ContextOverflow: a prompt is refused (see `Engine.add`); none is run.
        LLMKitError: the model's logits are no numbers.
    """
    delivered: dict[Sequence, int] = {}  # tokens yielded, of the sequences not yet done
    eos_ids = tuple(eos_ids)
    try:
        for prompt in prompts:
            delivered.update(dict.fromkeys(engine.add_samples(prompt, params, adapter, eos_ids=eos_ids), 0))
        while delivered:
            engine.step()
            for sequence in list(delivered):
                yield from _undelivered(sequence, delivered)
                if sequence.error is not None:
                    raise sequence.error
                if sequence.finish_reason is not None:
                    del delivered[sequence]
    finally:
        for sequence in delivered:
            engine.abort(sequence)


def _undelivered(sequence: Sequence, delivered: dict[Sequence, int]) -> Iterator[Event]:
    while (index := delivered[sequence]) < sequence.num_generated:  # which may grow while the caller has the token
        delivered[sequence] = index + 1
        last = index + 1 == sequence.num_generated
        logprobs = None if sequence.logprobs is None else sequence.logprobs[index]
        yield Event(sequence, int(sequence.token_ids[index]), logprobs, sequence.finish_reason if last and sequence.error is None else None)
