"""Llama 2, 3, 3.1, 3.2, 3.3 (arXiv:2302.13971, arXiv:2407.21783), and all that uses its layout: SmolLM2, TinyLlama."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmkit.config import ModelConfig
from llmkit.families import Family
from llmkit.families.common import IGNORE, Fields

DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
}


def config(hf: Mapping[str, Any]) -> ModelConfig:
    fields = Fields(hf, DEFAULTS)
    attention = fields.attention(rope=fields.rope(), bias=fields.flag("attention_bias"))
    return fields.model(attention, fields.mlp(bias=fields.flag("mlp_bias")))


FAMILY = Family(config, ignore=IGNORE)
