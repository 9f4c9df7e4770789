"""Mistral (arXiv:2310.06825): Llama with one sliding window in every layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmkit.config import ModelConfig
from llmkit.families import Family
from llmkit.families.common import IGNORE, Fields

DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
}


def config(hf: Mapping[str, Any]) -> ModelConfig:
    fields = Fields(hf, DEFAULTS)
    fields.refuse("layer_types")  # alternating windows are the model_type ministral
    return fields.model(fields.attention(rope=fields.rope(), sliding_window=fields.sliding_window), fields.mlp())


FAMILY = Family(config, ignore=IGNORE)
