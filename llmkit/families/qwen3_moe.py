"""Qwen 3 mixture of experts (arXiv:2505.09388): Qwen 3 whose layers are experts, but for those the config keeps dense."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmkit.config import ModelConfig
from llmkit.families import Family
from llmkit.families.common import IGNORE, Fields

DEFAULTS = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 24,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "decoder_sparse_step": 1,
    "moe_intermediate_size": 768,
    "num_experts_per_tok": 8,
    "num_experts": 128,
}


def config(hf: Mapping[str, Any]) -> ModelConfig:
    # transformers 5 saves num_experts under the name that Mixtral gave it.
    fields = Fields(hf, DEFAULTS, {"num_experts": "num_local_experts"} if "num_local_experts" in hf else {})
    window = fields.sliding_window if fields.flag("use_sliding_window") else None
    moe = fields.moe("num_experts", "moe_intermediate_size", norm_topk_prob=fields.flag("norm_topk_prob"))
    attention = fields.attention(rope=fields.rope(), sliding_window=window, qk_norm="head", bias=fields.flag("attention_bias"))
    step, dense, mlp = fields.integer("decoder_sparse_step"), fields.indices("mlp_only_layers"), fields.mlp()
    sparse = [(i + 1) % step == 0 and i not in dense for i in range(fields.num_hidden_layers)]
    return fields.model(attention, [moe if chosen else mlp for chosen in sparse])


FAMILY = Family(config, ignore=IGNORE)
