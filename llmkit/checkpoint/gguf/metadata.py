"""What llama.cpp's graphs of our families can express, and a configuration in the terms of its GGUF metadata."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import gguf
from gguf import GGUFWriter

from llmkit.config import AttentionConfig, MLPConfig, ModelConfig, MoEConfig
from llmkit.errors import ConfigError
from llmkit.rope import inverse_frequencies, rotary_dim

QKV_BIAS, O_BIAS, MLP_BIAS = "attention biases", "a bias after attention", "biases in the MLP"


@dataclass(frozen=True)
class Architecture:
    """One of llama.cpp's graphs, as far as it differs from the others (src/models/*.cpp)."""

    name: str
    interleaved_rope: bool = False  # rotates pairs (2i, 2i + 1): the rows of query and key heads are reordered
    act: str = "silu"
    can: frozenset[str] = frozenset()  # biases that it applies where they are there
    square: bool = False  # wants heads * head_dim = hidden_size
    windows: bool = False  # knows sliding windows
    fused: Mapping[str, str] = field(default_factory=dict)  # tensors that stand one below the other in another one
    no_rope_step: int | None = None  # every such layer is not rotated
    untied: bool = False  # wants an output matrix of its own
    adds_one: bool = False  # Gemma: its norms are stored as 1 + w
    soft_caps: bool = False  # Gemma 2: always both


QKV_IN_ONE = dict.fromkeys(("attn_q", "attn_k", "attn_v"), "attn_qkv")
BIASES = frozenset({QKV_BIAS, O_BIAS, MLP_BIAS})
LLAMA = Architecture("llama", interleaved_rope=True, can=BIASES)
QKV = frozenset({QKV_BIAS})
ARCHITECTURES: dict[str, Architecture] = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "mixtral": LLAMA,
    "granite": Architecture("granite", interleaved_rope=True, can=BIASES),
    "smollm3": Architecture("smollm3", interleaved_rope=True, can=QKV, no_rope_step=4),
    "qwen2": Architecture("qwen2", can=QKV, square=True),
    "qwen3": Architecture("qwen3", can=QKV),
    "qwen3_moe": Architecture("qwen3moe", can=QKV),
    "olmo2": Architecture("olmo2", can=QKV, square=True, untied=True),
    "phi3": Architecture("phi3", square=True, fused=QKV_IN_ONE | {"ffn_gate": "ffn_up"}),
    "gpt2": Architecture("gpt2", act="gelu_pytorch_tanh", can=BIASES, square=True, fused=QKV_IN_ONE),
    "gemma2": Architecture("gemma2", act="gelu_pytorch_tanh", can=QKV, windows=True, adds_one=True, soft_caps=True),
    "gemma3": Architecture("gemma3", act="gelu_pytorch_tanh", can=QKV, windows=True, adds_one=True),
    "gemma3_text": Architecture("gemma3", act="gelu_pytorch_tanh", can=QKV, windows=True, adds_one=True),
}


def check_model(config: ModelConfig) -> tuple[Architecture, list[str]]:
    """The architecture for a configuration and what a person should know; ConfigError names everything it cannot express."""
    found = ARCHITECTURES.get(config.model_type)
    if found is None:
        raise ConfigError(
            f"model_type {config.model_type!r} is not one that llmkit writes as GGUF; those are {', '.join(ARCHITECTURES)}. "
            "Use llama.cpp's own converter."
        )
    attention, mlp = _uniform(config)
    problems, notes = [], []
    biases = {QKV_BIAS: attention.qkv_bias, O_BIAS: attention.o_bias, MLP_BIAS: mlp.bias}
    problems += [name for name, there in biases.items() if there and name not in found.can]
    if mlp.hidden_act != found.act:
        problems.append(f"the activation {mlp.hidden_act}")
    if found.square and attention.query_size != config.hidden_size:
        problems.append(f"{attention.num_heads} heads of {attention.head_dim} in a hidden size of {config.hidden_size}")
    windows = [window for window in config.cache_windows if window is not None]
    if not found.windows and windows:
        notes.append(f"llama.cpp knows no sliding windows for {found.name}: beyond {min(windows)} tokens its answers differ.")
    if found.soft_caps and None in (attention.softcap, config.final_logit_softcapping):
        problems.append("logits or attention scores without a soft cap")
    if found.soft_caps and not config.tie_word_embeddings:
        problems.append("an output matrix of its own")
    if not found.soft_caps and attention.softcap is not None:
        problems.append("a soft cap on attention scores")
    problems += _moe_problems(config)
    problems += _rope_problems(config, found)
    if any(rope.rope_type == "dynamic" for rope, _ in config.rotaries):
        notes.append("llama.cpp knows no dynamic RoPE: the file's context is the one before it is stretched.")
    if problems:
        raise ConfigError(
            f"llama.cpp's architecture {found.name!r} cannot express this model: it has no {'; no '.join(problems)}. "
            "Give a model without, or keep it in safetensors."
        )
    return found, notes


def _uniform(config: ModelConfig) -> tuple[AttentionConfig, MLPConfig]:
    """Return what the layers have in common: the first attention, and the first MLP or expert."""
    first = config.layers[0].feed_forward
    mlp = first.expert if isinstance(first, MoEConfig) else first
    assert isinstance(mlp, MLPConfig)
    return config.attention(0), mlp


def _moe_problems(config: ModelConfig) -> list[str]:
    mixtures = {layer.feed_forward if isinstance(layer.feed_forward, MoEConfig) else None for layer in config.layers}
    problems = ["mix of dense layers and layers with experts"] if len(mixtures) > 1 else []
    if any(moe is not None and not moe.norm_topk_prob for moe in mixtures):
        problems.append("experts whose weights do not sum to one (norm_topk_prob false)")
    return problems


def _rope_problems(config: ModelConfig, architecture: Architecture) -> list[str]:
    problems = []
    step = architecture.no_rope_step
    still = [layer.mixer.rotary is None and not config.learned_positions for layer in config.layers]
    if still != [step is not None and (i + 1) % step == 0 for i in range(len(still))]:
        problems.append(f"such layers without RoPE ({[i for i, off in enumerate(still) if off]})")
    # Gemma 3's windows have a RoPE of their own, which is never stretched.
    own = architecture.name == "gemma3"
    mixers = [config.attention(i) for i in range(config.num_hidden_layers)]
    kinds = {(mixer.rope, own and mixer.sliding_window is not None) for mixer in mixers if mixer.rope is not None}
    if len(kinds) > len({local for _, local in kinds}):
        problems.append("layers that differ in their RoPE")
    for rope, local in kinds:
        assert rope is not None
        if local and rope.rope_type != "default":
            problems.append(f"{rope.rope_type} RoPE in the layers with a window")
        if rope.rope_type == "yarn" and (rope.beta_fast, rope.beta_slow, rope.truncate) != (32.0, 1.0, True):
            problems.append("yarn other than with beta_fast 32, beta_slow 1 and rounded bounds")
        if rope.rope_type == "llama3" and not architecture.interleaved_rope:
            problems.append("llama3 RoPE")
        if rope.rope_type == "longrope" and architecture.name not in ("phi3", "llama", "granite"):
            problems.append("longrope RoPE")
        if (rotated := rotary_dim(rope, mixers[0].head_dim)) % 2:
            problems.append(f"odd number of rotated dimensions ({rotated})")
    return problems


def write_metadata(writer: GGUFWriter, config: ModelConfig, architecture: Architecture) -> None:
    """Everything llama.cpp builds its graph from."""
    attention, mlp = _uniform(config)
    dynamic = next((rope.original_max_position_embeddings for rope, _ in config.rotaries if rope.rope_type == "dynamic"), None)
    writer.add_context_length(dynamic or config.max_position_embeddings)
    writer.add_vocab_size(config.vocab_size)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(mlp.intermediate_size)
    writer.add_head_count(attention.num_heads)
    writer.add_head_count_kv(attention.num_kv_heads)
    writer.add_key_length(attention.head_dim)
    writer.add_value_length(attention.head_dim)
    (writer.add_layer_norm_rms_eps if config.norm == "rms" else writer.add_layer_norm_eps)(config.norm_eps)
    if attention.softcap is not None:
        writer.add_attn_logit_softcapping(attention.softcap)
    if config.final_logit_softcapping is not None:
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if architecture.name == "granite":
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)
        writer.add_attention_scale(attention.score_scale)
    if isinstance(moe := config.layers[0].feed_forward, MoEConfig):
        writer.add_expert_count(moe.num_experts)
        writer.add_expert_used_count(moe.num_experts_per_tok)
        writer.add_expert_feed_forward_length(moe.expert.intermediate_size)
    _write_windows(writer, config, architecture)
    _write_rope(writer, config, architecture)


def _write_windows(writer: GGUFWriter, config: ModelConfig, architecture: Architecture) -> None:
    if not architecture.windows:
        if architecture.name == "phi3":
            writer.add_sliding_window(0)  # without the key llama.cpp takes the file for an old one and assumes a window
        return
    windows = [config.attention(i).sliding_window for i in range(config.num_hidden_layers)]
    if given := [window for window in windows if window is not None]:
        writer.add_sliding_window(given[0])
    writer.add_sliding_window_pattern([window is not None for window in windows])


def _write_rope(writer: GGUFWriter, config: ModelConfig, architecture: Architecture) -> None:
    own = architecture.name == "gemma3"
    mixers = [config.attention(i) for i in range(config.num_hidden_layers)]
    if own and (local := next((mixer.rope for mixer in mixers if mixer.sliding_window is not None), None)) is not None:
        writer.add_rope_freq_base_swa(local.rope_theta)
    rope = next((mixer.rope for mixer in mixers if mixer.rope is not None and not (own and mixer.sliding_window is not None)), None)
    if rope is None:
        return
    writer.add_rope_dimension_count(rotary_dim(rope, mixers[0].head_dim))
    writer.add_rope_freq_base(rope.rope_theta)
    if rope.rope_type in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope.rope_type))
        writer.add_rope_scaling_factor(rope.factor)
    if rope.rope_type == "longrope":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)
        writer.add_rope_scaling_attn_factors(inverse_frequencies(rope, mixers[0].head_dim, 1)[1])
    if rope.rope_type in ("yarn", "longrope"):
        assert rope.original_max_position_embeddings is not None
        writer.add_rope_scaling_orig_ctx_len(rope.original_max_position_embeddings)
    if rope.rope_type == "yarn":
        # llama.cpp multiplies cos and sin by 0.1 ln(factor) + 1 itself; the rest is a factor on top.
        own_factor = 0.1 * math.log(rope.factor) + 1 if rope.factor > 1 else 1.0
        extra = inverse_frequencies(rope, mixers[0].head_dim, 1)[1] / own_factor
        if not math.isclose(extra, 1.0, rel_tol=1e-6):
            writer.add_rope_scaling_attn_factors(extra)


def their_scale(config: ModelConfig, architecture: Architecture) -> float:
    """Return what scores are multiplied by in llama.cpp's graph."""
    attention = config.attention(0)
    if architecture.name == "granite":  # stands in the metadata
        return attention.score_scale
    if (architecture.name, config.num_hidden_layers) in (("gemma2", 46), ("gemma3", 62)):  # taken for the 27B models
        return float(config.hidden_size // attention.num_heads) ** -0.5
    return attention.head_dim**-0.5
