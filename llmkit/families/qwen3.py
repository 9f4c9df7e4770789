"""Qwen 3 (arXiv:2505.09388): Llama with a norm on every query and key head, no biases unless asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmkit.config import LayerConfig, ModelConfig
from llmkit.families import Family, qwen2
from llmkit.families.common import IGNORE, Fields

DEFAULTS = {**qwen2.DEFAULTS, "head_dim": 128}


def config(hf: Mapping[str, Any]) -> ModelConfig:
    fields = Fields(hf, DEFAULTS)
    rope, bias = fields.rope(), fields.flag("attention_bias")
    layers = [LayerConfig(rope, window) for window in qwen2.upper_windows(fields)]
    return fields.model(layers=layers, qk_norm="head", qkv_bias=bias, o_bias=bias)


FAMILY = Family(config, ignore=IGNORE)
