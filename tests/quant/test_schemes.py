"""Which tensors are quantized and how finely, what that costs, and the walk over a model in memory."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from llmkit.checkpoint.load import load_model
from llmkit.errors import UsageError
from llmkit.families import read_config
from llmkit.kernels.format import stored_shapes
from llmkit.quant.linears import QuantizedEmbedding, QuantizedLinear
from llmkit.quant.schemes import SCHEMES, Choice, choose
from tests.families.tiny import VARIANTS, hf_config, our_config, tiny_folder
from tests.tiny import quantize_model

LLAMA_1B = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
}
SMOLLM_135M = LLAMA_1B | {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
}
# The shapes of Llama 2 7B: as many heads of keys and values as of queries, and a head of its own.
LLAMA_7B = LLAMA_1B | {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "head_dim": 128,
    "tie_word_embeddings": False,
}


def bits_per_weight(config: dict[str, object], scheme: str) -> float:
    bits = weights = 0
    for param in read_config(config).parameters.values():
        shape, choice, count = param.shape, choose(scheme, param), param.size
        weights += count
        if choice is None:
            bits += 32 * count
        else:
            arrays = stored_shapes(choice.scheme, choice.group, (shape[0], shape[1])).values()
            bits += 8 * sum(dtype.itemsize * math.prod(size) for dtype, size in arrays)
    return bits / weights


@pytest.mark.parametrize(("config", "most"), [(LLAMA_1B, 4.94), (SMOLLM_135M, 5.35), (LLAMA_7B, 4.75)], ids=["1b", "135m", "7b"])
def test_bits_over_the_whole_model(config: dict[str, object], most: float) -> None:
    """At most those of a Q4_0 file of the same model; embeddings, head and norms included."""
    assert 4.25 < bits_per_weight(config, "q4") <= most
    assert 8.25 < bits_per_weight(config, "q8") < 8.4


def test_choices() -> None:
    def chosen(variant: str, name: str, shape: tuple[int, ...], scheme: str = "q4") -> Choice | None:
        return choose(scheme, our_config(hf_config(variant)).parameters[name]._replace(shape=shape))

    layer = "model.layers.1."
    assert chosen("llama", f"{layer}mlp.gate_proj.weight", (64, 32)) == Choice("q4", 32)
    assert chosen("llama", f"{layer}mlp.down_proj.weight", (32, 64)) == Choice("q4", 16)
    assert chosen("llama", f"{layer}self_attn.k_proj.weight", (32, 32)) == Choice("q4", 16)
    assert chosen("llama", f"{layer}self_attn.k_proj.weight", (16, 32)) == Choice("q8", 32)
    assert chosen("llama", f"{layer}self_attn.v_proj.weight", (32, 32)) == Choice("q8", 32)
    assert chosen("llama", "lm_head.weight", (100, 32)) == Choice("q4", 16)
    assert chosen("mixtral", f"{layer}mlp.experts.1.up_proj.weight", (64, 32)) == Choice("q4", 32)
    for variant, name in (
        *(("gpt2", f"{layer}input_layernorm.weight"), ("gpt2", f"{layer}self_attn.q_proj.bias"), ("mixtral", f"{layer}mlp.gate.weight")),
        *(("llama", "model.norm.weight"), ("gpt2", "model.embed_positions.weight")),
    ):
        assert all(chosen(variant, name, (32,), scheme) is None for scheme in SCHEMES)
    with pytest.raises(UsageError, match=r"scheme 'q5' is unknown\. Use one of q4, q8"):
        chosen("llama", "lm_head.weight", (8, 8), "q5")


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_matrix_of_every_family_is_quantized(tmp_path: Path, variant: str) -> None:
    model = load_model(tiny_folder(tmp_path, variant))
    dense = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    quantize_model(model, model.config.parameters, "q8")
    assert not any(isinstance(module, nn.Linear) for name, module in model.named_modules() if not name.endswith("mlp.gate"))
    quantized = {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear | QuantizedEmbedding)}
    for name, module in quantized.items():
        weight = dense.pop(f"{name}.weight")
        assert (module.dequantize() - weight).norm() < 0.01 * weight.norm()
    left = dict(model.named_parameters())
    assert left.keys() == dense.keys()
    assert all(torch.equal(left[name], dense[name]) for name in left)
    assert {name.rsplit(".", 1)[-1] for name in left} <= {"weight", "bias"}
