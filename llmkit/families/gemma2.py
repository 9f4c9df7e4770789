"""Gemma 2 (arXiv:2408.00118): norms on both sides, soft caps on scores and logits, every other layer in a sliding window."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmkit.config import LayerConfig, ModelConfig
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


def gemma(fields: Fields, layers: list[LayerConfig], **more: Any) -> ModelConfig:
    """What Gemma 2 and 3 have in common."""
    return fields.model(
        layers=layers,
        norm_placement="sandwich",
        norm_offset=1.0,
        embedding_multiplier=fields.integer("hidden_size") ** 0.5,
        attn_logit_softcapping=fields.optional_number("attn_logit_softcapping"),
        final_logit_softcapping=fields.optional_number("final_logit_softcapping"),
        qkv_bias=fields.flag("attention_bias"),
        o_bias=fields.flag("attention_bias"),
        **more,
    )


def config(hf: Mapping[str, Any]) -> ModelConfig:
    fields = Fields(hf, DEFAULTS, SPELLING)
    rope, scale = fields.rope(), fields.number("query_pre_attn_scalar") ** -0.5
    windows = fields.windows(lambda i: i % 2 == 0)
    return gemma(fields, [LayerConfig(rope, window, attention_scale=scale) for window in windows])


FAMILY = Family(config, ignore=IGNORE)
