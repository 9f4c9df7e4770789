"""Generation on token ids and numpy arrays: sampling, KV cache blocks, continuous batching. No torch, no text."""

from llmkit.engine.backend import Backend, Sequence, StepBatch
from llmkit.engine.engine import Engine
from llmkit.engine.sampling import SamplingParams, TokenLogprobs

__all__ = ["Backend", "Engine", "SamplingParams", "Sequence", "StepBatch", "TokenLogprobs"]
