"""Generation on token ids and numpy arrays: sampling, KV cache blocks, continuous batching. No torch, no text."""

from llmkit.engine.backend import Backend, StepBatch
from llmkit.engine.batch import Engine
from llmkit.engine.generate import generate
from llmkit.engine.sampling import SamplingParams, TokenLogprobs
from llmkit.engine.sequence import Event, FinishReason, Sequence

__all__ = ["Backend", "Engine", "Event", "FinishReason", "SamplingParams", "Sequence", "StepBatch", "TokenLogprobs", "generate"]
