"""A model with an adapter, beside the model without: another tree of modules over the same weights."""

from __future__ import annotations

import copy

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmkit.checkpoint.load import NoInit
from llmkit.lora.adapter import Adapter, LowRank
from llmkit.model.layers import Embedding, Linear
from llmkit.model.transformer import Transformer


def adapted(model: Transformer, adapter: Adapter) -> Transformer:
    """Return the model with the adapter. What the adapter leaves alone is shared with `model`, which stays as it is.

    Terms are computed in float32 on a CPU, else in the dtype of the model's norms.
    """
    tensors = [*model.parameters(), *model.buffers()]
    # A second tree of modules: tensors and config are told to the copy as copied already, so only modules are made again.
    out = copy.deepcopy(model, {id(shared): shared for shared in (*tensors, model.config)})
    weight = next(model.model.norm.parameters())  # norms are never quantized: they say the device and the dtype of the model
    device = weight.device
    dtype = torch.float32 if device.type == "cpu" else weight.dtype
    embedding = "model.embed_tokens"
    touched = {*adapter.linears, *(name.rpartition(".")[0] for name in adapter.replaced)}
    if out.lm_head is None and touched & {embedding, "lm_head"}:
        out.lm_head = _TiedHead(model.get_submodule(embedding))  # type: ignore[assignment]  # the one is adapted, the other is not
    for name, array in adapter.replaced.items():
        tensor = _tensor(array).to(device)  # as it is stored on a CPU, where any linear upcasts its weight
        _replace(out, name, tensor if device.type == "cpu" else tensor.to(dtype))
    for path, term in adapter.linears.items():
        base = out.get_submodule(path)
        new: nn.Module
        if hasattr(base, "num_embeddings"):
            new = AdaptedEmbedding(base, term, device, dtype)
        else:
            magnitude = adapter.magnitudes.get(path)
            new = AdaptedLinear(base, term, device, dtype, magnitude)
        _put(out, path, new)
    return out.eval()


class AdaptedLinear(nn.Module):
    """`W x + B A x` over any linear; with a magnitude m (DoRA) the rows of W + B A are scaled to it: `m / ||W + B A||` times that."""

    a: Tensor
    b: Tensor
    stretch: Tensor | None
    offset: Tensor | None
    quantized = None

    def __init__(
        self, base: nn.Module, term: LowRank, device: torch.device, dtype: torch.dtype, magnitude: np.ndarray | None = None
    ) -> None:
        super().__init__()
        self.base = base
        self.in_features, self.out_features = term.a.shape[1], term.b.shape[0]
        a, b = (torch.from_numpy(part).to(device) for part in term)
        stretch = offset = None
        # The norms of DoRA are those of the finished matrix, computed once: m (W + B A) / ||W + B A|| = stretch W + (stretch B) A.
        if magnitude is not None:
            dense = base.dequantize().float()  # type: ignore[operator]
            stretch = torch.from_numpy(magnitude).to(device) / torch.linalg.vector_norm(dense + b @ a, dim=1)
            b = stretch[:, None] * b
            bias = getattr(base, "bias", None)
            # What the base adds to its rows is stretched with them in `forward`; the offset takes that back.
            if bias is not None:
                offset = ((1 - stretch) * bias.float()).to(dtype)
            stretch = stretch.to(dtype)
        for name, tensor in (("a", a.to(dtype)), ("b", b.to(dtype)), ("stretch", stretch), ("offset", offset)):
            self.register_buffer(name, tensor)

    def forward(self, x: Tensor) -> Tensor:
        out = self.base(x)
        if self.stretch is not None:  # the bias is not stretched
            out = out * self.stretch if self.offset is None else torch.addcmul(self.offset, out, self.stretch)
        low: Tensor = F.linear(F.linear(x, self.a), self.b)
        return out + low

    @property
    def bias(self) -> Tensor | None:
        bias: Tensor | None = self.base.bias  # type: ignore[assignment]
        return bias

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the weight with the adapter `[out_features, in_features]`, float32 unless another dtype is asked for."""
        dense: Tensor = self.base.dequantize().float()  # type: ignore[operator]
        dense = (dense if self.stretch is None else dense * self.stretch.float()[:, None]) + self.b.float() @ self.a.float()
        return dense if dtype is None else dense.to(dtype)


class AdaptedEmbedding(nn.Module):
    """The rows of token ids, or of positions, each with its share of B A."""

    a: Tensor
    b: Tensor

    def __init__(self, base: nn.Module, term: LowRank, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.base = base
        self.num_embeddings, self.embedding_dim = term.b.shape[0], term.a.shape[1]
        for name, part in zip("ab", term, strict=True):
            self.register_buffer(name, torch.from_numpy(part).to(device, dtype))

    def forward(self, ids: Tensor) -> Tensor:
        rows: Tensor = self.base(ids)
        low = self.b[ids] @ self.a
        return rows.to(low.dtype) + low


class _TiedHead(nn.Module):
    """The head of a model that ties it to the embedding, as a linear."""

    bias = quantized = None

    def __init__(self, embedding: nn.Module) -> None:
        super().__init__()
        self.embedding = embedding

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.embedding.logits(x)  # type: ignore[operator]
        return out

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        dense: Tensor = self.embedding.dequantize()  # type: ignore[operator]
        return dense if dtype is None else dense.to(dtype)


def _replace(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Put a tensor where a parameter is; a quantized matrix makes room for a dense module."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    parameter = nn.Parameter(tensor, requires_grad=False)
    if leaf in module._parameters:
        module._parameters[leaf] = parameter  # of the copied tree: the original module has its own table
        return
    embeds = hasattr(module, "num_embeddings")
    with torch.device("meta"), NoInit():
        dense: nn.Module = Embedding(*tensor.shape) if embeds else Linear(tensor.shape[1], tensor.shape[0], bias=False)
    dense._parameters["weight"] = parameter
    if isinstance(bias := getattr(module, "bias", None), nn.Parameter):
        dense._parameters["bias"] = bias
    _put(model, path, dense)


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _tensor(array: np.ndarray) -> Tensor:
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if array.dtype == np.uint16 else tensor
