"""What a decoder-only transformer is made of, as plain data. No torch.

A family file (`llmkit/families/`) turns a Hugging Face `config.json` into a `ModelConfig`; the model
(`llmkit/model/`) builds itself from it and never asks which family it is. Field names are those of
Hugging Face where it has one. What differs from layer to layer stands in `layers`, one entry per layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embeddings of a layer (RoFormer, arXiv:2104.09864) and how they are stretched.

    `rope_type` is one of default, linear, dynamic, llama3, yarn (arXiv:2309.00071), longrope (arXiv:2402.13753).
    """

    rope_theta: float = 10000.0
    rope_type: str = "default"
    partial_rotary_factor: float = 1.0  # share of head_dim that is rotated (Phi-3 small variants, SmolLM)
    factor: float = 1.0
    original_max_position_embeddings: int | None = None
    attention_factor: float | None = None  # yarn, longrope: multiplies cos and sin
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    mscale: float | None = None  # yarn
    mscale_all_dim: float | None = None  # yarn
    truncate: bool = True  # yarn: round the correction range outwards
    short_factor: tuple[float, ...] = ()  # longrope
    long_factor: tuple[float, ...] = ()  # longrope

    @property
    def by_length(self) -> bool:
        """Whether the frequencies depend on how long the sequence will be."""
        return self.rope_type in ("dynamic", "longrope")


@dataclass(frozen=True)
class State:
    """What one sequence keeps in one layer between two steps.

    kind: "kv" is kept for every position, in blocks of the KV cache: `shape` is that of one position, `[2, kv_heads, head_dim]`.
        "recurrent" (a linear attention's matrices, `[heads, key_dim, value_dim]`) and "conv" (the last inputs of a causal
        convolution, `[kernel - 1, channels]`) are of one size whatever the length, float32, and live in slots
        (`StepBatch.state_in`): they are overwritten, so going on from a prefix needs a copy of them.
    window: of "kv" only the last so many positions are looked at (sliding window); None: all.
    """

    kind: Literal["kv", "recurrent", "conv"]
    shape: tuple[int, ...]
    window: int | None = None

    @property
    def numbers(self) -> int:
        """How many numbers it is: of one position ("kv"), of a whole sequence (the others)."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class MoEConfig:
    """A mixture-of-experts MLP: softmax router, top-k experts, gated MLP each (Mixtral, Qwen3-MoE)."""

    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    norm_topk_prob: bool = True  # the chosen experts' weights sum to one (Mixtral; Qwen3-MoE where set)


@dataclass(frozen=True)
class LayerConfig:
    """What may differ between the layers of one model."""

    rope: RopeConfig | None = None  # None: no rotation (NoPE layers of SmolLM3; models with learned positions)
    sliding_window: int | None = None  # a key is visible while query position - key position < sliding_window
    moe: MoEConfig | None = None  # None: a dense MLP
    attention_scale: float | None = None  # None: head_dim ** -0.5

    def state(self, config: ModelConfig) -> tuple[State, ...]:
        """What one sequence keeps in this layer."""
        return (State("kv", (2, config.num_key_value_heads, config.head_dim), self.sliding_window),)


# The norms of a layer: before attention, after it, before the MLP, after it. The names are those of the checkpoints,
# where Llama's `post_attention_layernorm` stands before the MLP and Gemma's after the attention.
#
#     pre (Llama)                  post (OLMo 2)                sandwich (Gemma 2)
#     x + attn(norm(x))            x + norm(attn(x))            x + norm(attn(norm(x)))
#     x + mlp(norm(x))             x + norm(mlp(x))             x + norm(mlp(norm(x)))
NORM_NAMES: dict[str, tuple[str | None, str | None, str | None, str | None]] = {
    "pre": ("input_layernorm", None, "post_attention_layernorm", None),
    "post": (None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
    "sandwich": ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
}


@dataclass(frozen=True)
class ModelConfig:
    """One decoder-only transformer, whatever its family."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    layers: tuple[LayerConfig, ...]
    hidden_act: str = "silu"
    gated_mlp: bool = True  # False: down(act(up(x))), GPT-2
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-6
    norm_offset: float = 0.0  # 1.0: the stored weight w means 1 + w (Gemma)
    # Where the norms of a layer stand: "pre" before attention and MLP (Llama), "post" after them (OLMo 2),
    # "sandwich" on both sides (Gemma 2 and 3).
    norm_placement: Literal["pre", "post", "sandwich"] = "pre"
    qk_norm: Literal["head", "full"] | None = None  # per head (Qwen3, Gemma 3) or over all heads at once (OLMo 2)
    qkv_bias: bool = False  # Qwen2, GPT-2
    o_bias: bool = False  # GPT-2; Llama with attention_bias
    mlp_bias: bool = False  # GPT-2; Llama with mlp_bias
    learned_positions: bool = False  # GPT-2: a table of max_position_embeddings rows
    attn_logit_softcapping: float | None = None  # Gemma 2
    final_logit_softcapping: float | None = None  # Gemma 2
    embedding_multiplier: float = 1.0  # Gemma (sqrt of hidden_size), Granite
    residual_multiplier: float = 1.0  # Granite
    logits_scaling: float = 1.0  # Granite: logits are divided by it
    tie_word_embeddings: bool = False
    dtype: str = "float32"  # of the checkpoint's tensors: float32, float16, bfloat16
    hf: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)  # the config.json it was read from

    @property
    def num_hidden_layers(self) -> int:
        return len(self.layers)

    @cached_property
    def states(self) -> tuple[tuple[State, ...], ...]:
        """What one sequence keeps, per layer."""
        return tuple(layer.state(self) for layer in self.layers)

    @property
    def cache_windows(self) -> tuple[int | None, ...]:
        """The distinct sliding windows, full attention (None) first: one group of KV-cache blocks each."""
        windows = {state.window for states in self.states for state in states if state.kind == "kv"}
        return tuple(sorted(windows, key=lambda w: (w is not None, w or 0)))

    @property
    def rope_depends_on_length(self) -> bool:
        """Whether the rotary frequencies of any layer depend on how long the sequence will be."""
        return any(layer.rope is not None and layer.rope.by_length for layer in self.layers)
