"""Gemma 2 (arXiv:2408.00118): norms on both sides, soft caps on scores and logits, every other layer in a sliding window."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llmkit.config import AttentionConfig, ModelConfig
from llmkit.families import Family
from llmkit.families.common import IGNORE, Fields

DEFAULTS = {
    "vocab_size": 256000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "final_logit_softcapping": 30.0,
    "attn_logit_softcapping": 50.0,
}

SPELLING = {"hidden_act": "hidden_activation"}  # released configs carry a stale hidden_act too


def attention(fields: Fields, **more: Any) -> AttentionConfig:
    """What Gemma 2 and 3 have in common: the scale of the scores is no head's, and they may have a soft cap."""
    scale, softcap = fields.number("query_pre_attn_scalar") ** -0.5, fields.optional_number("attn_logit_softcapping")
    return fields.attention(scale=scale, softcap=softcap, bias=fields.flag("attention_bias"), **more)


def model(fields: Fields, layers: list[AttentionConfig]) -> ModelConfig:
    """What the whole of a Gemma 2 or 3 is, with these layers."""
    return fields.model(
        layers,
        fields.mlp(),
        norm_placement="sandwich",
        norm_offset=1.0,
        embedding_multiplier=fields.integer("hidden_size") ** 0.5,
        final_logit_softcapping=fields.optional_number("final_logit_softcapping"),
    )


def config(hf: Mapping[str, Any]) -> ModelConfig:
    fields = Fields(hf, DEFAULTS, SPELLING)
    every = attention(fields, rope=fields.rope())
    return model(fields, [replace(every, sliding_window=window) for window in fields.windows(lambda i: i % 2 == 0)])


FAMILY = Family(config, ignore=IGNORE)
