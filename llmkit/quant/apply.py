"""Quantized modules in the place of dense ones: a walk over the module tree."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from llmkit.kernels.format import QuantizedMatrix
from llmkit.quant import nf4
from llmkit.quant.linears import QuantizedEmbedding, QuantizedLinear
from llmkit.quant.methods import round_to_nearest
from llmkit.quant.nf4 import Nf4Linear, Nf4Matrix
from llmkit.quant.schemes import NF4, Choice


def install(model: nn.Module, matrices: Mapping[str, QuantizedMatrix | Nf4Matrix], dtype: torch.dtype = torch.float32) -> None:
    """Put quantized modules where the named weights were; biases stay the parameters they are. dtype: of embedding rows.

    A name is that of a weight, "model.layers.0.mlp.up_proj.weight", of a module with `in_features` or `num_embeddings`.
    """
    for name, matrix in matrices.items():
        path = name.removesuffix(".weight")
        parent, _, child = path.rpartition(".")
        old = model.get_submodule(path)
        new: nn.Module
        if isinstance(matrix, Nf4Matrix):
            assert isinstance(old, nn.Linear)
            new = Nf4Linear(matrix, old.bias)
        elif isinstance(old, nn.Embedding):
            new = QuantizedEmbedding(matrix, dtype)
        else:
            assert isinstance(old, nn.Linear)
            new = QuantizedLinear(matrix, old.bias)
        setattr(model.get_submodule(parent), child, new)


@torch.no_grad()
def quantize_matrix(weight: torch.Tensor, choice: Choice) -> QuantizedMatrix | Nf4Matrix:
    """Return a matrix `[out, in]` in codes."""
    return nf4.quantize(weight) if choice.scheme == NF4 else round_to_nearest(weight, choice.scheme, choice.group)
