"""Tiny random models of every family, made with transformers: the oracle of the parity tests.

`VARIANTS` maps a name to a transformers configuration; the models have odd head counts and enough layers for every kind
of layer to occur. Every parameter, norms and biases too, is perturbed, so that none can be left out unnoticed.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel

from llmkit.config import ModelConfig
from llmkit.families import read_config

WINDOW = 7
ORIGINAL = 48  # positions before a scaled RoPE is stretched
SHORT, LONG = [1.0, 1.1, 1.3, 1.6], [1.5, 2.5, 4.0, 7.0]  # longrope, for 8 rotating dimensions

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
    "initializer_range": 0.25,  # large enough for attention to be far from uniform, so that positions and masks show
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": None,
}
GPT2_SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "n_embd": 24,
    "n_layer": 4,
    "n_head": 3,
    "n_positions": 128,
    "initializer_range": 0.25,
    "bos_token_id": 1,
    "eos_token_id": None,
}
GEMMA: dict[str, Any] = {"head_dim": 10, "query_pre_attn_scalar": 20, "sliding_window": WINDOW}
MOE: dict[str, Any] = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "head_dim": 12}
GRANITE = {"embedding_multiplier": 3.0, "attention_multiplier": 0.2, "residual_multiplier": 0.7, "logits_scaling": 5.0}
SWITCHED_ON = {"use_sliding_window": True, "sliding_window": WINDOW}


def rope(rope_type: str, **parameters: Any) -> dict[str, Any]:
    """Configuration of a RoPE stretched beyond ORIGINAL positions."""
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 500.0, **parameters}}


YARN = rope("yarn", factor=4.0, original_max_position_embeddings=ORIGINAL)
LLAMA3 = rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=ORIGINAL)
LONGROPE = rope("longrope", short_factor=SHORT, long_factor=LONG)
NO_SCALING = rope("linear", factor=4.0)["rope_parameters"]
GEMMA3_ROPE = {"rope_parameters": {"full_attention": NO_SCALING, "sliding_attention": {"rope_type": "default", "rope_theta": 100.0}}}
MIXED_LAYERS = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]

# name: (configuration class, fields on top of SIZES)
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama-biases-tied": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "head_dim": 10}),
    "llama-linear": ("LlamaConfig", rope("linear", factor=3.0)),
    "llama-dynamic": ("LlamaConfig", rope("dynamic", factor=3.0) | {"max_position_embeddings": ORIGINAL}),
    "llama-llama3": ("LlamaConfig", LLAMA3 | {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16}),
    "llama-yarn": ("LlamaConfig", YARN | {"head_dim": 16}),
    "llama-yarn-mscale": (
        "LlamaConfig",
        rope("yarn", factor=4.0, original_max_position_embeddings=ORIGINAL, mscale=0.8, mscale_all_dim=0.3, truncate=False, beta_fast=8.0),
    ),
    "mistral": ("MistralConfig", {"sliding_window": WINDOW, "head_dim": 12}),
    "mistral-full": ("MistralConfig", {"sliding_window": None, "num_key_value_heads": 3}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 5, "sliding_window": WINDOW}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen2-window": ("Qwen2Config", SWITCHED_ON | {"max_window_layers": 2}),
    "qwen2-layer-types": ("Qwen2Config", SWITCHED_ON | YARN | {"layer_types": MIXED_LAYERS}),
    "qwen3": ("Qwen3Config", {"head_dim": 12}),
    "qwen3-window": ("Qwen3Config", SWITCHED_ON | {"head_dim": 8, "max_window_layers": 1, "attention_bias": True}),
    "qwen3-moe": ("Qwen3MoeConfig", MOE | {"decoder_sparse_step": 2, "norm_topk_prob": True}),
    "qwen3-moe-window": ("Qwen3MoeConfig", MOE | SWITCHED_ON | {"mlp_only_layers": [1], "attention_bias": True}),
    "gemma2": ("Gemma2Config", GEMMA | {"final_logit_softcapping": 5.0, "attn_logit_softcapping": 4.0}),
    "gemma2-uncapped": ("Gemma2Config", GEMMA | {"final_logit_softcapping": None, "attn_logit_softcapping": None, "attention_bias": True}),
    "gemma3": ("Gemma3TextConfig", GEMMA | GEMMA3_ROPE | {"sliding_window_pattern": 3}),
    "phi3": ("Phi3Config", {"num_key_value_heads": 3, "sliding_window": WINDOW}),
    "phi3-partial": ("Phi3Config", {"hidden_size": 36, "partial_rotary_factor": 0.5}),
    "phi3-partial-odd": ("Phi3Config", {"hidden_size": 30, "partial_rotary_factor": 0.55}),
    "phi3-longrope": ("Phi3Config", LONGROPE | {"original_max_position_embeddings": ORIGINAL}),
    "gpt2": ("GPT2Config", GPT2_SIZES),
    "gpt2-by-depth": ("GPT2Config", GPT2_SIZES | {"scale_attn_by_inverse_layer_idx": True, "n_inner": 50, "tie_word_embeddings": False}),
    "gpt2-unscaled": ("GPT2Config", GPT2_SIZES | {"scale_attn_weights": False, "activation_function": "relu"}),
    "smollm3": ("SmolLM3Config", {}),
    "smollm3-window": ("SmolLM3Config", SWITCHED_ON | {"no_rope_layers": [1, 0, 0, 1], "attention_bias": True, "mlp_bias": True}),
    "olmo2": ("Olmo2Config", {}),
    "olmo2-biases": ("Olmo2Config", {"attention_bias": True, "num_attention_heads": 6, "num_key_value_heads": 3}),
    "granite": ("GraniteConfig", GRANITE | {"tie_word_embeddings": True}),
    "granite-biases": ("GraniteConfig", GRANITE | {"attention_bias": True, "mlp_bias": True}),
}


def hf_config(variant: str, **changes: Any) -> PreTrainedConfig:
    """The transformers configuration of a variant, with some fields changed."""
    name, fields = VARIANTS[variant]
    sizes = {} if name == "GPT2Config" else SIZES
    cls: Callable[..., PreTrainedConfig] = getattr(transformers, name)
    return cls(**json.loads(json.dumps(sizes | fields | changes)))


@torch.no_grad()
def perturb(model: torch.nn.Module, seed: int) -> None:
    """Adds N(0, 0.05) to every parameter."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)


def hf_model(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A random float32 model in eval mode. Eager attention: the others leave out soft caps; eager experts: the others want even sizes."""
    torch.manual_seed(seed)
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model: PreTrainedModel = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, **eager)
    perturb(model, seed)
    return model.eval()


def raw_config(config: PreTrainedConfig) -> dict[str, Any]:
    """The configuration as its config.json has it."""
    found: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return found


def our_config(config: PreTrainedConfig) -> ModelConfig:
    return read_config(raw_config(config))


def save(model: PreTrainedModel, folder: Path) -> Path:
    """The model as a Hugging Face folder."""
    model.save_pretrained(folder)
    return folder


def tiny_folder(folder: Path, variant: str = "llama", seed: int = 0, **changes: Any) -> Path:
    """A saved tiny model of a variant, for tests that need some checkpoint folder."""
    return save(hf_model(hf_config(variant, **changes), seed), folder)
