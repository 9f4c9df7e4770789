"""A model of random numbers in bitsandbytes' 4 bits, to measure training on where there is no checkpoint: speed depends on shapes alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llmkit.checkpoint.arrays import converted, parameter_shapes
from llmkit.checkpoint.files import SINGLE, TensorFile, replacing, write_json
from llmkit.checkpoint.formats import RECORD
from llmkit.checkpoint.quantize_nf4 import record, write_nf4
from llmkit.checkpoint.weights import Piece
from llmkit.families import read_config
from llmkit.quant.schemes import NF4, choose

# Llama 3.1 8B (arXiv:2407.21783; its config.json).
LLAMA_8B: Mapping[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "torch_dtype": "bfloat16",
}
_DRAWN = (1 << 22) + 1  # numbers; all matrices are made of these. Odd, so that no row is the repetition of another.
_DEVIATION = 0.02  # as most models begin


def write_random_nf4(folder: Path, hf: Mapping[str, Any], progress: Callable[[int, int], None] | None = None) -> Path:
    """Write a folder that llmkit and transformers open: matrices are normal, vectors ones, as a model without biases begins.

    hf: a config.json. progress: is told the weights done and all there are. Takes the memory of the largest matrix in 16 bits.
    Raises CheckpointError where writing fails (nothing is left behind).
    """
    config = read_config(dict(hf))
    shapes = parameter_shapes(config)
    drawn = converted(np.random.default_rng(0).normal(0, _DEVIATION, _DRAWN).astype(np.float32), "bfloat16")
    ones = converted(np.ones(max(size for size, *rest in shapes.values() if not rest), np.float32), "bfloat16")
    numbers = np.resize(drawn, max(map(math.prod, shapes.values())))
    path = folder / SINGLE
    pieces = {}
    for name, shape in shapes.items():
        values = (ones if len(shape) == 1 else numbers)[: math.prod(shape)]
        pieces[name] = Piece(TensorFile(name, "BF16", shape, values.view(np.uint8).data, path, 0), shape)
    with replacing(folder) as partial:
        write_nf4(partial / SINGLE, config, pieces, {name: choose(NF4, param) for name, param in config.parameters.items()}, None, progress)
        write_json(partial / "config.json", {**hf, RECORD: record("bfloat16")})
    return folder
