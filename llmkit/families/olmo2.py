"""OLMo 2 (arXiv:2501.00656): Llama with the norms after attention and MLP, and one norm over all query or key heads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmkit.config import ModelConfig
from llmkit.families import Family
from llmkit.families.common import IGNORE, Fields, uniform

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
    bias = fields.flag("attention_bias")
    return fields.model(layers=uniform(fields, rope=fields.rope()), norm_placement="post", qk_norm="full", qkv_bias=bias, o_bias=bias)


FAMILY = Family(config, ignore=IGNORE)
