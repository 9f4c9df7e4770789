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

from llmkit.checkpoint.gguf.metadata import Architecture, attention_scale, their_scale
from llmkit.config import ModelConfig, RopeConfig
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
    for i, layer in enumerate(config.layers):
        theirs, ours = f"blk.{i}.", f"model.layers.{i}."
        if layer.moe is not None:
            add(theirs + "ffn_gate_inp.weight", ours + "mlp.gate.weight")
            for name in ("gate", "up", "down"):
                experts = (f"{ours}mlp.experts.{j}.{name}_proj.weight" for j in range(layer.moe.num_experts))
                add(f"{theirs}ffn_{name}_exps.weight", *experts, stacked=True)
        for end in (".weight", ".bias"):
            for name, sources in _layer_names(config, architecture).items():
                if ours + sources[0] + end in weights:
                    add(theirs + name + end, *(ours + source + end for source in sources))
    assert not weights, f"weights without a place in the file: {', '.join(weights)}"
    return plans


def _layer_names(config: ModelConfig, architecture: Architecture) -> dict[str, tuple[str, ...]]:
    """llama.cpp's name -> ours, within a layer."""
    attention, mlp = "self_attn.", "mlp."
    names: dict[str, tuple[str, ...]] = {"attn_norm": ("input_layernorm",)}
    if architecture.fused_qkv:
        names["attn_qkv"] = tuple(f"{attention}{one}_proj" for one in "qkv")
    else:
        names |= {f"attn_{one}": (f"{attention}{one}_proj",) for one in "qkv"}
    names |= {"attn_output": (attention + "o_proj",), "attn_q_norm": (attention + "q_norm",), "attn_k_norm": (attention + "k_norm",)}
    if config.norm_placement == "pre":
        names["ffn_norm"] = ("post_attention_layernorm",)
    else:
        names |= {"post_attention_norm": ("post_attention_layernorm",), "ffn_norm": ("pre_feedforward_layernorm",)}
        names |= {"post_ffw_norm": ("post_feedforward_layernorm",)}
    if architecture.fused_gate_up:
        names["ffn_up"] = (mlp + "gate_proj", mlp + "up_proj")
    else:
        names |= {"ffn_gate": (mlp + "gate_proj",), "ffn_up": (mlp + "up_proj",)}
    return names | {"ffn_down": (mlp + "down_proj",)}


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
    """A weight as llama.cpp's graph wants its values."""
    changes: list[Callable[[np.ndarray], np.ndarray]] = []
    if architecture.adds_one and weight.name.endswith("norm.weight"):
        changes.append(lambda values: values + np.float32(config.norm_offset))
    kind = weight.name.split(".")[-2]
    if architecture.interleaved_rope and kind in ("q_proj", "k_proj"):
        heads = config.num_attention_heads if kind == "q_proj" else config.num_key_value_heads
        changes.append(lambda values: interleave(values, heads))
    if kind == ("q_norm" if config.qk_norm else "q_proj"):
        # llama.cpp scales scores as its graph says; what is missing is put into the query.
        layer = config.layers[int(weight.name.split(".")[2])]
        ratio = attention_scale(config, layer) / their_scale(config, architecture)
        if not math.isclose(ratio, 1.0, rel_tol=1e-6):
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
    rope = next((layer.rope for layer in config.layers if layer.rope is not None), None)
    if rope is not None and rope.rope_type == "llama3":
        plain = inverse_frequencies(RopeConfig(rope.rope_theta), config.head_dim, 1)[0]
        yield "rope_freqs.weight", plain / inverse_frequencies(rope, config.head_dim, 1)[0]
    if rope is not None and rope.rope_type == "longrope":
        yield "rope_factors_long.weight", np.array(rope.long_factor, np.float32)
        yield "rope_factors_short.weight", np.array(rope.short_factor, np.float32)


def _constant(values: np.ndarray) -> Rows:
    return lambda begin, end: values[begin:end]
