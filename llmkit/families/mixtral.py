"""Mixtral (arXiv:2401.04088): Mistral with eight experts per layer, two of them for each token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmkit.config import ModelConfig
from llmkit.families import Family, Rule
from llmkit.families.common import IGNORE, Fields

DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "num_experts_per_tok": 2,
    "num_local_experts": 8,
}

THEIRS, OURS = "model.layers.{i}.block_sparse_moe.", "model.layers.{i}.mlp."
EXPERT = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
RULES = [Rule(THEIRS + "gate.weight", (OURS + "gate.weight",))]
RULES += [Rule(f"{THEIRS}experts.{{j}}.{a}.weight", (f"{OURS}experts.{{j}}.{b}.weight",)) for a, b in EXPERT.items()]


def config(hf: Mapping[str, Any]) -> ModelConfig:
    fields = Fields(hf, DEFAULTS)
    moe = fields.moe("num_local_experts", "intermediate_size", norm_topk_prob=True)
    return fields.model(fields.attention(rope=fields.rope(), sliding_window=fields.sliding_window), moe)


FAMILY = Family(config, rules=tuple(RULES), ignore=IGNORE)
