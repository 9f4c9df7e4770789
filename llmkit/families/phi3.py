"""Phi-3 and 3.5 (arXiv:2404.14219): Llama with query, key and value in one tensor, gate and up in another, and longrope."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmkit.config import ModelConfig
from llmkit.families import Family, Rule
from llmkit.families.common import IGNORE, Fields

DEFAULTS = {
    "vocab_size": 32064,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
}

ATTENTION, MLP = "model.layers.{i}.self_attn.", "model.layers.{i}.mlp."
RULES = (
    Rule(ATTENTION + "qkv_proj.weight", tuple(f"{ATTENTION}{name}_proj.weight" for name in "qkv")),
    Rule(MLP + "gate_up_proj.weight", (MLP + "gate_proj.weight", MLP + "up_proj.weight")),
)


def config(hf: Mapping[str, Any]) -> ModelConfig:
    fields = Fields(hf, DEFAULTS)
    rope = fields.rope(partial=True, renamed={"su": "longrope", "yarn": "longrope"})  # longrope before it had its name
    return fields.model(fields.attention(rope=rope, sliding_window=fields.sliding_window), fields.mlp())


FAMILY = Family(config, rules=RULES, ignore=IGNORE)
