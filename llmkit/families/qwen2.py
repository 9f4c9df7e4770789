"""Qwen 2 and 2.5 (arXiv:2407.10671): Llama with biases on query, key and value; the upper layers may have a sliding window."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llmkit.config import ModelConfig
from llmkit.families import Family
from llmkit.families.common import IGNORE, Fields

DEFAULTS = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}


def upper_windows(fields: Fields) -> tuple[int | None, ...]:
    """Qwen's sliding windows: none unless switched on, and then from layer `max_window_layers` on where `layer_types` is absent."""
    if not fields.flag("use_sliding_window"):
        fields.values["sliding_window"] = None
    first = fields.integer("max_window_layers", minimum=0)
    return fields.windows(lambda i: fields.sliding_window is not None and i >= first)


def config(hf: Mapping[str, Any]) -> ModelConfig:
    fields = Fields(hf, DEFAULTS)
    attention = fields.attention(rope=fields.rope(), qkv_bias=True)
    return fields.model([replace(attention, sliding_window=window) for window in upper_windows(fields)], fields.mlp())


FAMILY = Family(config, ignore=IGNORE)
