"""Qwen 3 (arXiv:2505.09388): Llama with a norm on every query and key head, no biases unless asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llmkit.config import ModelConfig
from llmkit.families import Family, qwen2
from llmkit.families.common import IGNORE, Fields

DEFAULTS = {**qwen2.DEFAULTS, "head_dim": 128}


def config(hf: Mapping[str, Any]) -> ModelConfig:
    fields = Fields(hf, DEFAULTS)
    attention = fields.attention(rope=fields.rope(), qk_norm="head", bias=fields.flag("attention_bias"))
    return fields.model([replace(attention, sliding_window=window) for window in qwen2.upper_windows(fields)], fields.mlp())


FAMILY = Family(config, ignore=IGNORE)
