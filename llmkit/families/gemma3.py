"""Gemma 3 (arXiv:2503.19786), text: five local layers with a RoPE of their own to one global layer, norms on query and key heads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llmkit.config import ModelConfig
from llmkit.families import Family, Rule, gemma2
from llmkit.families.common import FULL, IGNORE, NAMES, SLIDING, Fields

DEFAULTS = {
    **gemma2.DEFAULTS,
    "vocab_size": 262208,
    "max_position_embeddings": 131072,
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
    "sliding_window_pattern": 6,
    "final_logit_softcapping": None,
    "attn_logit_softcapping": None,
}

# The same tensors in a text checkpoint, and as part of an image-and-text one as saved by newer and by older versions of transformers.
PREFIXES = {"model.": "", "model.language_model.": "", "language_model.model.": "language_model."}
RULES = [Rule(body + name, ("model." + name,)) for body in PREFIXES for name in NAMES]
RULES += [Rule(head + "lm_head.weight", ("lm_head.weight",)) for head in ("", "language_model.")]
OUTSIDE = ("dtype", "torch_dtype", "tie_word_embeddings", "eos_token_id", "quantization_config", "auto_map")
IMAGES = (r"(model\.)?(vision_tower|multi_modal_projector)\..*",)


def config(hf: Mapping[str, Any]) -> ModelConfig:
    if isinstance(text := hf.get("text_config"), Mapping):  # image and text: what stands outside counts for both
        outside = {name: hf[name] for name in OUTSIDE if name in hf}
        hf = {**text, **outside, "model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"]}
    fields = Fields(hf, DEFAULTS, gemma2.SPELLING)
    pattern = fields.integer("sliding_window_pattern")
    windows = fields.windows(lambda i: (i + 1) % pattern != 0)
    ropes = Fields(fields.mapping("rope_parameters", (FULL, SLIDING)), {}, where="rope_parameters in config.json")
    # In the old spelling `rope_theta` and `rope_scaling` are those of the global layers alone.
    full = fields.rope({**ropes.mapping(FULL), **fields.mapping("rope_scaling")})
    local = fields.rope(ropes.mapping(SLIDING), theta="rope_local_base_freq")
    every = gemma2.attention(fields, qk_norm="head")
    layers = [replace(every, rope=full if window is None else local, sliding_window=window) for window in windows]
    return gemma2.model(fields, layers)


FAMILY = Family(config, rules=tuple(RULES), ignore=IGNORE + IMAGES)
