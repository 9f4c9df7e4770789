"""GPT-2 (Radford et al., 2019): LayerNorm, learned positions, plain MLP; its linears are stored as [in, out] (Conv1D)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llmkit.config import ModelConfig
from llmkit.families import Family, Rule
from llmkit.families.common import Fields

DEFAULTS: dict[str, Any] = {"vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12}
DEFAULTS |= {"activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "scale_attn_weights": True, "tie_word_embeddings": True}

SPELLING = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head", "intermediate_size": "n_inner"}
SPELLING |= {"max_position_embeddings": "n_positions", "hidden_act": "activation_function", "rms_norm_eps": "layer_norm_epsilon"}
NORMS = {"ln_1": "input_layernorm", "ln_2": "post_attention_layernorm"}
LINEARS = {"attn.c_proj": "self_attn.o_proj", "mlp.c_fc": "mlp.up_proj", "mlp.c_proj": "mlp.down_proj"}


def config(hf: Mapping[str, Any]) -> ModelConfig:
    fields = Fields(hf, DEFAULTS, SPELLING)
    fields.refuse("reorder_and_upcast_attn")
    if fields.get("intermediate_size") is None:
        fields.values["n_inner"] = 4 * fields.integer("hidden_size")
    scale = fields.head_dim**-0.5 if fields.flag("scale_attn_weights") else 1.0
    by_depth = fields.flag("scale_attn_by_inverse_layer_idx")
    attention = fields.attention(bias=True)
    layers = [replace(attention, scale=scale / (i + 1) if by_depth else scale) for i in range(fields.num_hidden_layers)]
    return fields.model(layers, fields.mlp(gated=False, bias=True), learned_positions=True, norm="layer")


def rules(prefix: str) -> list[Rule]:
    """The tensors of GPT-2, in checkpoints of the whole model (`transformer.`) or of its body alone (no prefix)."""
    layer, ours = prefix + "h.{i}.", "model.layers.{i}."
    found = [Rule(prefix + "wte.weight", ("model.embed_tokens.weight",)), Rule(prefix + "wpe.weight", ("model.embed_positions.weight",))]
    for end in (".weight", ".bias"):
        qkv = tuple(f"{ours}self_attn.{name}_proj{end}" for name in "qkv")
        found += [Rule(prefix + "ln_f" + end, ("model.norm" + end,))]
        found += [Rule(layer + a + end, (ours + b + end,)) for a, b in NORMS.items()]
        found += [Rule(layer + a + end, (ours + b + end,), transpose=end == ".weight") for a, b in LINEARS.items()]
        found += [Rule(layer + "attn.c_attn" + end, qkv, transpose=end == ".weight")]
    return found


FAMILY = Family(config, rules=(*rules("transformer."), *rules("")), ignore=(r".*attn\.(bias|masked_bias)",))
