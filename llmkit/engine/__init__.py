"""Generation on token ids and numpy arrays: sampling, KV cache blocks, continuous batching. No torch, no text."""

from llmkit.engine.batch import Backend, Engine, Event, FinishReason, Sequence
from llmkit.engine.generate import generate
from llmkit.engine.sampling import SamplingParams, TokenLogprobs

__all__ = ["Backend", "Engine", "Event", "FinishReason", "SamplingParams", "Sequence", "TokenLogprobs", "generate"]
