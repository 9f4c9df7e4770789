"""The weights of a model as the tensors of a GGUF file: renamed, reordered, put together, and encoded chunk by chunk."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from gguf import LlamaFileType
from torch import nn

from llmkit.checkpoint.gguf.metadata import Architecture, their_scale
from llmkit.config import ModelConfig, RopeConfig, norm
from llmkit.errors import CheckpointError
from llmkit.kernels import reference
from llmkit.model.transformer import Transformer
from llmkit.quant.linears import QuantizedEmbedding, QuantizedLinear
from llmkit.quant.nf4 import Nf4Linear
from llmkit.rope import inverse_frequencies

FILE_TYPES: dict[str, tuple[Type, LlamaFileType]] = {
    "f16": (Type.F16, LlamaFileType.MOSTLY_F16),
    "q8_0": (Type.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "q4_0": (Type.Q4_0, LlamaFileType.MOSTLY_Q4_0),
}
NUMPY = {Type.F32: np.float32, Type.F16: np.float16}
LARGEST = {Type.F16: 65504.0, Type.Q8_0: 127 * 65504.0, Type.Q4_0: 8 * 65504.0}  # the scale of a block is a float16
CHUNK = 1 << 24  # weights converted at a time

# llama.cpp's name of what makes an activation in a part of a layer. Of its norms in the order of `LayerConfig.norm_names`.
LINEAR_NAMES = {
    ("self_attn", "query"): "attn_q",
    ("self_attn", "key"): "attn_k",
    ("self_attn", "value"): "attn_v",
    ("self_attn", "residual"): "attn_output",
    ("mlp", "expert"): "ffn_gate_inp",
    ("mlp", "gate"): "ffn_gate",
    ("mlp", "up"): "ffn_up",
    ("mlp", "residual"): "ffn_down",
}
NORM_NAMES = ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm")

Rows = Callable[[int, int], np.ndarray]  # float32, some rows of a weight


@dataclass(frozen=True)
class Weight:
    """One of our weights: its shape and a function that gives some rows of it as float32."""

    name: str
    shape: tuple[int, ...]
    rows: Rows = field(repr=False)

    def whole(self) -> np.ndarray:
        return self.rows(0, self.shape[0])


@dataclass(frozen=True)
class TensorPlan:
    """One tensor of the file: our weights one below the other (`stacked`: along a new first axis), changed and encoded."""

    name: str
    type: Type
    parts: tuple[Weight, ...]
    stacked: bool = False
    narrow: bool = False  # meant to be quantized, but its rows do not fill blocks

    @property
    def shape(self) -> tuple[int, ...]:
        first = self.parts[0].shape
        return (len(self.parts), *first) if self.stacked else (sum(part.shape[0] for part in self.parts), *first[1:])

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """As the writer wants it: in bytes for the quantized types."""
        return self.shape if self.type in NUMPY else gguf.quant_shape_to_byte_shape(self.shape, self.type)

    @property
    def stored_dtype(self) -> np.dtype:
        return np.dtype(NUMPY.get(self.type, np.uint8))

    @property
    def nbytes(self) -> int:
        return math.prod(self.stored_shape) * self.stored_dtype.itemsize

    def encode(self) -> np.ndarray:
        """The tensor in its type; only a chunk of it is ever float32."""
        out = np.empty(self.stored_shape, self.stored_dtype)
        if out.ndim > 2:
            out = out.reshape(-1, out.shape[-1])
        place = 0
        for part in self.parts:
            step = max(1, CHUNK // math.prod(part.shape[1:]))
            for start in range(0, part.shape[0], step):
                values = part.rows(start, min(start + step, part.shape[0]))
                out[place : place + len(values)] = self._encoded(values, part.name)
                place += len(values)
        return out

    def _encoded(self, values: np.ndarray, name: str) -> np.ndarray:
        if not np.isfinite(values).all():
            raise CheckpointError(f"{name} has values that are not finite. Download or copy the model again.")
        largest = float(np.abs(values).max())
        if largest > LARGEST.get(self.type, math.inf):
            remedy = "Use q8_0." if largest <= LARGEST[Type.Q8_0] else "Keep the model in safetensors."
            raise CheckpointError(f"{name} has values up to {largest:.3g}, which {self.type.name} cannot hold. {remedy}")
        return values.astype(self.stored_dtype) if self.type in NUMPY else gguf.quantize(values, self.type)


def weights_of(model: Transformer) -> dict[str, Weight]:
    """All weights of a model by our names, those of quantized modules too."""

    def dense(parameter: torch.Tensor) -> Rows:
        return lambda begin, end: parameter[begin:end].to(torch.float32).numpy()

    def quantized(module: QuantizedLinear | QuantizedEmbedding) -> Rows:
        return lambda begin, end: reference.rows(module.packed, torch.arange(begin, end)).numpy()

    def nf4(module: Nf4Linear) -> Rows:
        return lambda begin, end: module.matrix.rows(begin, end).dequantize().numpy()

    found = {name: Weight(name, tuple(p.shape), dense(p.detach())) for name, p in model.named_parameters()}
    modules: Iterator[tuple[str, nn.Module]] = model.named_modules()
    for path, module in modules:
        if isinstance(module, QuantizedLinear | QuantizedEmbedding):
            found[f"{path}.weight"] = Weight(f"{path}.weight", module.shape, quantized(module))
        elif isinstance(module, Nf4Linear):
            found[f"{path}.weight"] = Weight(f"{path}.weight", module.shape, nf4(module))
    return found


def layout(model: Transformer, architecture: Architecture, file_type: str) -> list[TensorPlan]:
    """The tensors of the file in their order: our weights renamed, reordered, put together."""
    config = model.config
    weights = {name: _changed(weight, config, architecture) for name, weight in weights_of(model).items()}
    plans = []

    def add(name: str, *ours: str, stacked: bool = False) -> None:
        parts = tuple(weights.pop(one) for one in ours)
        plan = TensorPlan(name, Type.F32, parts, stacked)
        plans.append(TensorPlan(name, _type(plan, config, file_type), parts, stacked, _narrow(plan, file_type)))

    add("token_embd.weight", "model.embed_tokens.weight")
    if architecture.untied and config.tie_word_embeddings:
        weights["lm_head.weight"] = plans[0].parts[0]
    for theirs, ours in (("position_embd", "model.embed_positions"), ("output_norm", "model.norm"), ("output", "lm_head")):
        for end in (".weight", ".bias"):
            if ours + end in weights:
                add(theirs + end, ours + end)
    for name, factors in _rope_factors(config):
        plans.append(TensorPlan(name, Type.F32, (Weight(name, factors.shape, _constant(factors)),)))
    for i in range(config.num_hidden_layers):
        for name, (sources, stacked) in _layer_tensors(config, architecture, i).items():
            add(f"blk.{i}.{name}", *sources, stacked=stacked)
    assert not weights, f"weights without a place in the file: {', '.join(weights)}"
    return plans


def _layer_tensors(config: ModelConfig, architecture: Architecture, index: int) -> dict[str, tuple[list[str], bool]]:
    """Return llama.cpp's names within a layer with our parameters that go into each, and whether those are stacked (experts)."""
    layer, prefix = config.layers[index], f"model.layers.{index}."
    found: dict[str, tuple[list[str], bool]] = {}
    for part in layer.parts:
        for param in part.params(config):
            name = LINEAR_NAMES[part.name, param.output]
            name = architecture.fused.get(name, name) + ("_norm" if param.role == "norm" else "_exps" if param.role == "expert" else "")
            whole = f"{name}.{param.name.rpartition('.')[2]}"
            found.setdefault(whole, ([], param.role == "expert"))[0].append(f"{prefix}{part.name}.{param.name}")
    for theirs, ours in zip(NORM_NAMES, layer.norm_names, strict=True):
        if ours is not None:
            found |= {f"{theirs}.{param.name.rpartition('.')[2]}": ([prefix + param.name], False) for param in norm(config, ours, 0)}
    return found


def _type(plan: TensorPlan, config: ModelConfig, file_type: str) -> Type:
    if len(plan.shape) < 2 or plan.name.endswith(("ffn_gate_inp.weight", "position_embd.weight")):
        return Type.F32
    if _narrow(plan, file_type):
        return Type.F16
    if file_type == "q4_0" and plan.name == ("token_embd.weight" if config.tie_word_embeddings else "output.weight"):
        return Type.Q8_0
    return FILE_TYPES[file_type][0]


def _narrow(plan: TensorPlan, file_type: str) -> bool:
    matrix = len(plan.shape) > 1 and not plan.name.endswith(("ffn_gate_inp.weight", "position_embd.weight"))
    return matrix and file_type != "f16" and plan.shape[-1] % 32 != 0


def _changed(weight: Weight, config: ModelConfig, architecture: Architecture) -> Weight:
    """Return a weight with its values as llama.cpp's graph wants them."""
    param = config.parameters[weight.name]
    changes: list[Callable[[np.ndarray], np.ndarray]] = []
    if architecture.adds_one and param.role == "norm":
        changes.append(lambda values: values + np.float32(config.norm_offset))
    if param.output in ("query", "key"):
        attention = config.attention(int(weight.name.split(".")[2]))
        if architecture.interleaved_rope and param.role != "norm":
            heads = attention.num_heads if param.output == "query" else attention.num_kv_heads
            changes.append(lambda values: interleave(values, heads))
        # llama.cpp scales scores as its graph says; what is missing is put into the query, behind its norm where it has one.
        ratio = attention.score_scale / their_scale(config, architecture)
        last = param.output == "query" and (param.role == "norm") == (attention.qk_norm is not None)
        if last and not math.isclose(ratio, 1.0, rel_tol=1e-6):
            changes.append(lambda values: values * np.float32(ratio))
    if not changes:
        return weight

    def rows(begin: int, end: int) -> np.ndarray:
        values = weight.whole()
        for change in changes:
            values = change(values)
        return values[begin:end]

    return Weight(weight.name, weight.shape, rows)


def interleave(values: np.ndarray, heads: int) -> np.ndarray:
    """The rows of every head (its rotated halves one after the other, as in Hugging Face files) as pairs of neighbours."""
    halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(values.shape)


def _rope_factors(config: ModelConfig) -> Iterator[tuple[str, np.ndarray]]:
    """Tensors by which llama.cpp divides the rotary frequencies, for the types that no formula of its own covers."""
    rope, dim = next(iter(config.rotaries), (None, 0))
    if rope is not None and rope.rope_type == "llama3":
        plain = inverse_frequencies(RopeConfig(rope.rope_theta), dim, 1)[0]
        yield "rope_freqs.weight", plain / inverse_frequencies(rope, dim, 1)[0]
    if rope is not None and rope.rope_type == "longrope":
        yield "rope_factors_long.weight", np.array(rope.long_factor, np.float32)
        yield "rope_factors_short.weight", np.array(rope.short_factor, np.float32)


def _constant(values: np.ndarray) -> Rows:
    return lambda begin, end: values[begin:end]
