"""Granite 3 (dense): Llama with multipliers on embeddings, attention scores, residuals and logits (muP)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmkit.config import ModelConfig
from llmkit.families import Family, llama
from llmkit.families.common import IGNORE, Fields

DEFAULTS = {
    **llama.DEFAULTS,
    "embedding_multiplier": 1.0,
    "attention_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "logits_scaling": 1.0,
}


def config(hf: Mapping[str, Any]) -> ModelConfig:
    fields = Fields(hf, DEFAULTS)
    bias, scale = fields.flag("attention_bias"), fields.number("attention_multiplier")
    return fields.model(
        fields.attention(rope=fields.rope(), bias=bias, scale=scale),
        fields.mlp(bias=fields.flag("mlp_bias")),
        embedding_multiplier=fields.number("embedding_multiplier"),
        residual_multiplier=fields.number("residual_multiplier"),
        logits_scaling=fields.number("logits_scaling"),
    )


FAMILY = Family(config, ignore=IGNORE)
