"""Granite 3 (dense): Llama with multipliers on embeddings, attention scores, residuals and logits (muP)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmkit.config import ModelConfig
from llmkit.families import Family, llama
from llmkit.families.common import IGNORE, Fields, uniform

DEFAULTS = {
    **llama.DEFAULTS,
    "embedding_multiplier": 1.0,
    "attention_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "logits_scaling": 1.0,
}


def config(hf: Mapping[str, Any]) -> ModelConfig:
    fields = Fields(hf, DEFAULTS)
    return fields.model(
        layers=uniform(fields, rope=fields.rope(), attention_scale=fields.number("attention_multiplier")),
        embedding_multiplier=fields.number("embedding_multiplier"),
        residual_multiplier=fields.number("residual_multiplier"),
        logits_scaling=fields.number("logits_scaling"),
        qkv_bias=fields.flag("attention_bias"),
        o_bias=fields.flag("attention_bias"),
        mlp_bias=fields.flag("mlp_bias"),
    )


FAMILY = Family(config, ignore=IGNORE)
