"""Llama 2, 3, 3.1, 3.2, 3.3 (arXiv:2302.13971, arXiv:2407.21783), and all that uses its layout: SmolLM2, TinyLlama."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmkit.config import ModelConfig
from llmkit.families import Family
from llmkit.families.common import IGNORE, Fields, uniform

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
    return fields.model(
        layers=uniform(fields, rope=fields.rope()),
        qkv_bias=fields.flag("attention_bias"),
        o_bias=fields.flag("attention_bias"),
        mlp_bias=fields.flag("mlp_bias"),
    )


FAMILY = Family(config, ignore=IGNORE)
