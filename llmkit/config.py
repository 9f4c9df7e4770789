"""What a decoder-only transformer is made of, as plain data. No torch.

A family file (`llmkit/families/`) turns a Hugging Face `config.json` into a `ModelConfig`; the model (`llmkit/model/`) builds itself
from it and never asks which family it is. A layer has a mixer (attention, ...), where tokens meet, and a feed-forward (an MLP, experts),
where each stays by itself:

    ModelConfig ── layers: LayerConfig ── mixer:        AttentionConfig | ...
                                      └── feed_forward: MLPConfig | MoEConfig | ...

Both say what they are made of (`params`) and what a sequence keeps in them (`state`). Everything else is derived from these two: shapes
of checkpoints, what is quantized and how finely, what LoRA may stand beside, bytes of weights and caches, names in GGUF, the plan of the
native step. A new kind of mixer is one class like these and the torch module that `module` names.

Names of parameters and fields are those of Hugging Face's Llama where it has one.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Literal, NamedTuple

# linear      [out, in], quantized and adapted           expert  the same, one of many of which a token goes through a few
# router      [experts, in], which decides that          norm    [n]: weight or bias of a norm
# embedding   [vocab, hidden], one row for each token    bias    [out] of a linear
# head        [vocab, hidden], where it is not tied      conv    a short convolution's taps
# positions   [positions, hidden], learned               state   what steers a recurrence: decays, time steps
Role = Literal["linear", "expert", "router", "embedding", "head", "positions", "norm", "bias", "conv", "state"]


class Param(NamedTuple):
    """One parameter.

    name: below its part in a `params`, in full in `ModelConfig.parameters`.
    input, output: the activations that a linear reads and makes. Linears of one part with the same input are computed together
        (query, key and value); "residual" is what is added to the residual stream.
    experts: a token goes through the first number of the second; (1, 1) where every token does.
    """

    name: str
    shape: tuple[int, ...]
    role: Role
    input: str = ""
    output: str = ""
    experts: tuple[int, int] = (1, 1)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def active(self) -> int:
        """Numbers of it that one token is multiplied with, on average."""
        chosen, count = self.experts
        return self.size * chosen // count

    @property
    def quantizable(self) -> bool:
        """Whether it is one of the matrices that are stored in codes; norms, biases, routers and learned positions are not."""
        return self.role in ("linear", "expert", "embedding", "head")


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


class PartConfig(ABC):
    """A mixer or a feed-forward.

    name: of the torch module in its layer, and so in the names of its parameters.
    module: where that module's class is, "package.module:Class"; built with (this, the ModelConfig, the layer's number). A string, so
        that a description needs no torch.
    """

    name: ClassVar[str]
    module: ClassVar[str]

    @abstractmethod
    def params(self, config: ModelConfig) -> Iterator[Param]:
        """Yield its parameters in the order of the torch module's."""

    def state(self, config: ModelConfig) -> tuple[State, ...]:
        """Return what one sequence keeps in it; nothing where every token is by itself."""
        return ()

    @property
    def rotary(self) -> tuple[RopeConfig, int] | None:
        """The rotary embedding it is given and the size of the heads that turn; None: it is given none."""
        return None

    def token_flops(self, length: int) -> float:
        """Return the operations of one token of a text of `length`, on average, besides those of its matrices, forwards."""
        return 0.0


def linear(name: str, shape: tuple[int, int], bias: bool, input: str, output: str) -> Iterator[Param]:
    """Yield the weight `[out, in]` of a linear, and its bias `[out]` where it has one."""
    yield Param(f"{name}.weight", shape, "linear", input, output)
    if bias:
        yield Param(f"{name}.bias", shape[:1], "bias", input, output)


def norm(config: ModelConfig, name: str, size: int, of: str = "hidden") -> Iterator[Param]:
    """Yield the parameters of a norm; those of LayerNorm have a bias too. of: the activation that it normalizes."""
    yield Param(f"{name}.weight", (size,), "norm", of, of)
    if config.norm == "layer":
        yield Param(f"{name}.bias", (size,), "norm", of, of)


@dataclass(frozen=True, kw_only=True)
class AttentionConfig(PartConfig):
    """Causal grouped-query attention (arXiv:2305.13245)."""

    name = "self_attn"
    module = "llmkit.model.layers:Attention"

    num_heads: int
    num_kv_heads: int  # each serves num_heads / num_kv_heads query heads
    head_dim: int
    rope: RopeConfig | None = None  # None: no rotation (NoPE layers of SmolLM3; models with learned positions)
    sliding_window: int | None = None  # a key is visible while query position - key position < sliding_window
    scale: float | None = None  # of the scores; None: head_dim ** -0.5
    softcap: float | None = None  # scores become softcap * tanh(score / softcap) (Gemma 2)
    qk_norm: Literal["head", "full"] | None = None  # per head (Qwen3, Gemma 3) or over all heads at once (OLMo 2)
    qkv_bias: bool = False  # Qwen2, GPT-2
    o_bias: bool = False  # GPT-2; Llama with attention_bias

    @property
    def query_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def score_scale(self) -> float:
        """What scores are multiplied by before the softmax."""
        return self.head_dim**-0.5 if self.scale is None else self.scale

    @property
    def rotary(self) -> tuple[RopeConfig, int] | None:
        return None if self.rope is None else (self.rope, self.head_dim)

    def params(self, config: ModelConfig) -> Iterator[Param]:
        hidden, query, kv = config.hidden_size, self.query_size, self.kv_size
        yield from linear("q_proj", (query, hidden), self.qkv_bias, "hidden", "query")
        yield from linear("k_proj", (kv, hidden), self.qkv_bias, "hidden", "key")
        yield from linear("v_proj", (kv, hidden), self.qkv_bias, "hidden", "value")
        yield from linear("o_proj", (hidden, query), self.o_bias, "attended", "residual")
        if self.qk_norm is not None:
            whole = self.qk_norm == "full"
            yield from norm(config, "q_norm", query if whole else self.head_dim, "query")
            yield from norm(config, "k_norm", kv if whole else self.head_dim, "key")

    def state(self, config: ModelConfig) -> tuple[State, ...]:
        return (State("kv", (2, self.num_kv_heads, self.head_dim), self.sliding_window),)

    def token_flops(self, length: int) -> float:
        """`q k` and `scores v`, a multiplication and an addition each, with half of the keys in sight on average."""
        return 4 * self.query_size * min(length, self.sliding_window or length) / 2


@dataclass(frozen=True, kw_only=True)
class MLPConfig(PartConfig):
    """`down(act(gate(x)) * up(x))` (SwiGLU, arXiv:2002.05202), or plain `down(act(up(x)))` (GPT-2)."""

    name = "mlp"
    module = "llmkit.model.layers:MLP"

    intermediate_size: int
    hidden_act: str = "silu"
    gated: bool = True
    bias: bool = False  # GPT-2; Llama with mlp_bias

    def params(self, config: ModelConfig) -> Iterator[Param]:
        hidden, inner = config.hidden_size, self.intermediate_size
        if self.gated:
            yield from linear("gate_proj", (inner, hidden), self.bias, "hidden", "gate")
        yield from linear("up_proj", (inner, hidden), self.bias, "hidden", "up")
        yield from linear("down_proj", (hidden, inner), self.bias, "inner", "residual")


@dataclass(frozen=True, kw_only=True)
class MoEConfig(PartConfig):
    """A mixture of experts: softmax router, the best few of many MLPs for each token (Mixtral, Qwen3-MoE)."""

    name = "mlp"
    module = "llmkit.model.layers:MixtureOfExperts"

    num_experts: int
    num_experts_per_tok: int
    expert: MLPConfig
    norm_topk_prob: bool = True  # the chosen experts' weights sum to one (Mixtral; Qwen3-MoE where set)

    def params(self, config: ModelConfig) -> Iterator[Param]:
        yield Param("gate.weight", (self.num_experts, config.hidden_size), "router", "hidden", "expert")
        of_one, share = list(self.expert.params(config)), (self.num_experts_per_tok, self.num_experts)
        for j in range(self.num_experts):
            for param in of_one:
                role: Role = "expert" if param.role == "linear" else param.role
                yield Param(f"experts.{j}.{param.name}", param.shape, role, param.input, param.output, share)


# The norms of a layer: before the mixer, after it, before the feed-forward, after it. The names are those of the checkpoints,
# where Llama's `post_attention_layernorm` stands before the MLP and Gemma's after the attention.
#
#     pre (Llama)                  post (OLMo 2)                sandwich (Gemma 2)
#     x + attn(norm(x))            x + norm(attn(x))            x + norm(attn(norm(x)))
#     x + mlp(norm(x))             x + norm(mlp(x))             x + norm(mlp(norm(x)))
NormPlacement = Literal["pre", "post", "sandwich"]
NORM_NAMES: dict[NormPlacement, tuple[str | None, str | None, str | None, str | None]] = {
    "pre": ("input_layernorm", None, "post_attention_layernorm", None),
    "post": (None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
    "sandwich": ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
}


@dataclass(frozen=True)
class LayerConfig:
    """One layer: a mixer and a feed-forward, each added to the residual stream."""

    mixer: PartConfig
    feed_forward: PartConfig
    norm_placement: NormPlacement = "pre"

    @property
    def parts(self) -> tuple[PartConfig, PartConfig]:
        return self.mixer, self.feed_forward

    @property
    def norm_names(self) -> tuple[str | None, str | None, str | None, str | None]:
        """Before and after the mixer, before and after the feed-forward; None: there is none."""
        return NORM_NAMES[self.norm_placement]

    def params(self, config: ModelConfig) -> Iterator[Param]:
        """Yield the layer's parameters, named below the layer."""
        for part in self.parts:
            for param in part.params(config):
                yield param._replace(name=f"{part.name}.{param.name}")
        for name in self.norm_names:
            if name is not None:
                yield from norm(config, name, config.hidden_size)

    def state(self, config: ModelConfig) -> tuple[State, ...]:
        """Return what one sequence keeps in this layer."""
        return self.mixer.state(config) + self.feed_forward.state(config)


@dataclass(frozen=True)
class ModelConfig:
    """One decoder-only transformer, whatever its family: what its layers are, and what concerns all of it."""

    model_type: str
    vocab_size: int
    hidden_size: int
    max_position_embeddings: int
    layers: tuple[LayerConfig, ...]
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-6
    norm_offset: float = 0.0  # 1.0: the stored weight w means 1 + w (Gemma)
    learned_positions: bool = False  # GPT-2: a table of max_position_embeddings rows
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
    def parameters(self) -> Mapping[str, Param]:
        """Every parameter of the `Transformer` by its name, in its order: what a checkpoint must give."""
        return {param.name: param for param in self._parameters()}

    def _parameters(self) -> Iterator[Param]:
        table = self.vocab_size, self.hidden_size
        yield Param("model.embed_tokens.weight", table, "embedding", "token", "hidden")
        if self.learned_positions:
            yield Param("model.embed_positions.weight", (self.max_position_embeddings, self.hidden_size), "positions")
        for i, layer in enumerate(self.layers):
            for param in layer.params(self):
                yield param._replace(name=f"model.layers.{i}.{param.name}")
        for param in norm(self, "norm", self.hidden_size):
            yield param._replace(name=f"model.{param.name}")
        if not self.tie_word_embeddings:
            yield Param("lm_head.weight", table, "head", "hidden", "logits")

    @cached_property
    def states(self) -> tuple[tuple[State, ...], ...]:
        """What one sequence keeps, per layer."""
        return tuple(layer.state(self) for layer in self.layers)

    @cached_property
    def cache_windows(self) -> tuple[int | None, ...]:
        """The distinct sliding windows of what is kept by position, all of it (None) first: one group of KV-cache blocks each."""
        windows = {state.window for states in self.states for state in states if state.kind == "kv"}
        return tuple(sorted(windows, key=lambda window: (window is not None, window or 0)))

    @cached_property
    def rotaries(self) -> tuple[tuple[RopeConfig, int], ...]:
        """The distinct rotary embeddings of its layers, with the size of their heads."""
        return tuple(dict.fromkeys(layer.mixer.rotary for layer in self.layers if layer.mixer.rotary is not None))

    @cached_property
    def rope_depends_on_length(self) -> bool:
        """Whether the rotary frequencies of any layer depend on how long the sequence will be."""
        return any(rope.by_length for rope, _ in self.rotaries)

    @cached_property
    def sparse(self) -> bool:
        """Whether tokens go through some of the weights only."""
        return any(param.role == "expert" for param in self.parameters.values())

    def attention(self, layer: int) -> AttentionConfig:
        """Return a layer's mixer where that must be attention."""
        mixer = self.layers[layer].mixer
        assert isinstance(mixer, AttentionConfig)
        return mixer
