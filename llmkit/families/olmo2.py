"""OLMo 2 (arXiv:2501.00656): Llama with the norms after attention and MLP, and one norm over all query or key heads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmkit.config import ModelConfig
from llmkit.families import Family
from llmkit.families.common import IGNORE, Fields

DEFAULTS = {
    "vocab_size": 50304,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
}


def config(hf: Mapping[str, Any]) -> ModelConfig:
    fields = Fields(hf, DEFAULTS)
    attention = fields.attention(rope=fields.rope(), qk_norm="full", bias=fields.flag("attention_bias"))
    return fields.model(attention, fields.mlp(), norm_placement="post")


FAMILY = Family(config, ignore=IGNORE)
