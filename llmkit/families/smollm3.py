"""SmolLM3: Llama in which every fourth layer has no positions at all (NoPE, arXiv:2305.19466)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llmkit.config import ModelConfig
from llmkit.families import Family
from llmkit.families.common import IGNORE, Fields

DEFAULTS = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "rope_theta": 2e6,
    "no_rope_layer_interval": 4,
    "tie_word_embeddings": True,
}


def config(hf: Mapping[str, Any]) -> ModelConfig:
    fields = Fields(hf, DEFAULTS)
    rope, count = fields.rope(), fields.num_hidden_layers
    rotated = fields.indicators("no_rope_layers")  # 1: this layer has RoPE, whatever the name says
    if rotated is None:
        interval = fields.integer("no_rope_layer_interval")
        rotated = [(i + 1) % interval != 0 for i in range(count)]
    slides = fields.flag("use_sliding_window") and fields.sliding_window is not None
    windows = fields.windows(lambda i: slides and not rotated[i])
    plain = fields.attention(bias=fields.flag("attention_bias"))
    layers = [replace(plain, rope=rope if rotated[i] else None, sliding_window=windows[i]) for i in range(count)]
    return fields.model(layers, fields.mlp(bias=fields.flag("mlp_bias")))


FAMILY = Family(config, ignore=IGNORE)
