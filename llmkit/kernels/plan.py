"""The description of a model for the native step: a `ModelConfig` and named arrays as the dicts that cpu/module.cpp reads. No torch.

A layer goes over as its linears and norms by the names they have in `AttentionConfig.params` and `MLPConfig.params`; C++ looks them up in
one table (cpu/plan.cpp). Matrices are handed over in place, so a mapped file stays mapped; vectors are small and become float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmkit.config import AttentionConfig, MLPConfig, ModelConfig
from llmkit.kernels.format import QuantizedMatrix, Weight

Floats = NDArray[np.float32]

# The numbers of plan.h.
KINDS = {np.dtype(np.float32): 0, np.dtype(np.float16): 1, np.dtype(np.uint16): 2}  # bfloat16 travels as uint16
Q4, Q8 = 3, 4
ACTIVATIONS = {"silu": 0, "swish": 0, "gelu": 1, "gelu_new": 2, "gelu_pytorch_tanh": 2, "gelu_tanh": 2, "relu": 3}
CACHE_KINDS = {32: 0, 16: 1, 8: Q8}

# Where the norms of a layer stand, in the order of `LayerConfig.norm_names`. Their own names do not say it: what Llama calls
# post_attention_layernorm stands before the MLP.
PLACES = ("before_mixer", "after_mixer", "before_feed_forward", "after_feed_forward")


def plan_problem(config: ModelConfig) -> str | None:
    """Return what of a model the native step does not cover, or None: it runs attention and dense MLPs of one shape in all layers."""
    for layer in config.layers:
        mixer, feed_forward = layer.parts
        if not isinstance(mixer, AttentionConfig):
            return f"layers with {type(mixer).__name__} are not part of the native step"
        if not isinstance(feed_forward, MLPConfig):
            kind = "mixtures of experts" if config.sparse else f"layers with {type(feed_forward).__name__}"
            return f"{kind} are not part of the native step"
        if feed_forward.hidden_act not in ACTIVATIONS:
            return f"the activation {feed_forward.hidden_act} is not part of the native step"
        if _shape(mixer) != _shape(config.attention(0)) or feed_forward != config.layers[0].feed_forward:
            return "layers of different sizes are not part of the native step"
    return None


def _shape(mixer: AttentionConfig) -> tuple[object, ...]:
    """What all layers of the native step have in common."""
    return mixer.num_heads, mixer.num_kv_heads, mixer.head_dim, mixer.softcap, mixer.qk_norm


class Description:
    """A model without a `plan_problem`, for C++: numbers, arrays, and tuples of them."""

    def __init__(self, config: ModelConfig, weights: Mapping[str, Weight]) -> None:
        """weights: by our parameter names; see `NativeBackend`."""
        self.config, self.weights = config, weights

    def model(self, cache: int) -> dict[str, Any]:
        """Return what concerns the whole model. cache: one of the values of `CACHE_KINDS`."""
        config, attention, mlp = self.config, self.config.attention(0), self.config.layers[0].feed_forward
        assert isinstance(mlp, MLPConfig)
        positions = self.weights.get("model.embed_positions.weight")
        return {
            **{name: getattr(config, name) for name in ("vocab_size", "hidden_size", "max_position_embeddings", "norm_eps")},
            **{name: getattr(config, name) for name in ("embedding_multiplier", "residual_multiplier", "logits_scaling")},
            **{name: getattr(attention, name) for name in ("num_heads", "num_kv_heads", "head_dim")},
            "intermediate_size": mlp.intermediate_size,
            "activation": ACTIVATIONS[mlp.hidden_act],
            "attn_logit_softcapping": attention.softcap or 0.0,  # 0: none
            "final_logit_softcapping": config.final_logit_softcapping or 0.0,
            "norm_before_heads": attention.qk_norm == "full",
            "cache": cache,
            "windows": tuple(window or 0 for window in config.cache_windows),
            "embedding": self._linear("model.embed_tokens"),
            "head": None if config.tie_word_embeddings else self._linear("lm_head"),
            "final_norm": self._norm("model.norm"),
            "positions_table": None if positions is None else floats(positions),
        }

    def layer(self, index: int) -> dict[str, Any]:
        """Return what a layer is made of."""
        layer, attention, prefix = self.config.layers[index], self.config.attention(index), f"model.layers.{index}."
        # The name of a part's parameter without ".weight": "self_attn.q_norm" is a norm within the mixer.
        parts = [(f"{part.name}.{param.name[:-7]}", param) for part in layer.parts for param in part.params(self.config)]
        weights = [(name, param.role) for name, param in parts if param.name.endswith(".weight")]
        placed = {place: name for place, name in zip(PLACES, layer.norm_names, strict=True) if name is not None}
        inner = {name: name for name, role in weights if role == "norm"}
        return {
            "linears": {name: self._linear(prefix + name) for name, role in weights if role == "linear"},
            "norms": {place: self._norm(prefix + name) for place, name in (placed | inner).items()},
            "rope": -1 if attention.rotary is None else self.config.rotaries.index(attention.rotary),
            "group": self.config.cache_windows.index(attention.sliding_window),
            "window": attention.sliding_window or 0,
            "attention_scale": attention.score_scale,
        }

    def _linear(self, name: str) -> tuple[Any, ...] | None:
        weight, bias = self.weights.get(f"{name}.weight"), self.weights.get(f"{name}.bias")
        return None if weight is None else linear(weight, None if bias is None else floats(bias))  # C++ says what is missing

    def _norm(self, name: str) -> tuple[Floats, Floats | None]:
        bias = self.weights.get(f"{name}.bias") if self.config.norm == "layer" else None
        # Gemma stores w and means 1 + w; C++ multiplies by what it is given.
        return floats(self.weights[f"{name}.weight"]) + np.float32(self.config.norm_offset), None if bias is None else floats(bias)


def adapter_terms(linears: Mapping[str, tuple[Floats, Floats]]) -> list[tuple[int, str, int, Floats, Floats]]:
    """Return the terms of an adapter for C++: layer, name in it, rank, A `[rank, in]`, B `[out, rank]`.

    linears: A and B by the path of the linear, `model.layers.0.mlp.up_proj`; B with the scale in it.
    """
    out = []
    for path, (a, b) in linears.items():
        _, _, layer, name = path.split(".", 3)
        out.append((int(layer), name, len(a), floats(a), floats(b)))
    return out


def linear(weight: Weight, bias: Floats | None) -> tuple[Any, ...]:
    """Return a linear for C++: kind, rows, columns, data, scales, row_scale, bias, group, codebook."""
    rows, columns = weight.shape
    if isinstance(weight, QuantizedMatrix):
        kind = Q4 if weight.scheme == "q4" else Q8
        return kind, rows, columns, weight.codes, weight.scales, _in_place(weight.row_scale), bias, weight.group, weight.codebook
    return KINDS[weight.dtype], rows, columns, _in_place(weight), None, None, bias, 32, None


def _in_place(array: np.ndarray) -> np.ndarray:
    """The array itself where C++ can read it; a file may hold numbers at addresses that are no multiple of their size."""
    return np.require(array, requirements=("C_CONTIGUOUS", "ALIGNED"))


def floats(array: Weight) -> Floats:
    """Return the numbers as contiguous float32; uint16 are the bits of bfloat16."""
    assert isinstance(array, np.ndarray)
    if array.dtype == np.uint16:
        return (array.astype(np.uint32) << 16).view(np.float32)
    return np.ascontiguousarray(array, np.float32)
