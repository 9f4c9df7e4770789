"""Safetensors files written by hand, so that they can lie."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

LLAMA = {
    "model_type": "llama",
    "vocab_size": 8,
    "hidden_size": 4,
    "intermediate_size": 6,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 16,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
}


def encode(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A file with this header (bytes or a JSON value) and data, and a header length that may be wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def write(path: Path, tensors: dict[str, tuple[str, list[int], bytes]]) -> Path:
    """A correct file: name -> (dtype, shape, bytes)."""
    header, data = {}, b""
    for name, (dtype, shape, raw) in tensors.items():
        header[name] = entry(dtype, shape, len(data), len(data) + len(raw))
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(encode(text + b" " * (-len(text) % 8), data))
    return path


def write_shards(folder: Path, shards: dict[str, dict[str, tuple[str, list[int], bytes]]], **index: str) -> None:
    """Shards and their index; keyword arguments change where the index says a tensor is."""
    weight_map = {}
    for shard, tensors in shards.items():
        write(folder / shard, tensors)
        weight_map |= dict.fromkeys(tensors, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map | index}))


def llama_tensors(value: float = 0.5) -> dict[str, tuple[str, list[int], bytes]]:
    """The tensors that LLAMA asks for, float32, each filled with a number of its own."""
    shapes = {
        "model.embed_tokens.weight": [8, 4],
        "model.layers.0.input_layernorm.weight": [4],
        "model.layers.0.self_attn.q_proj.weight": [4, 4],
        "model.layers.0.self_attn.k_proj.weight": [2, 4],
        "model.layers.0.self_attn.v_proj.weight": [2, 4],
        "model.layers.0.self_attn.o_proj.weight": [4, 4],
        "model.layers.0.post_attention_layernorm.weight": [4],
        "model.layers.0.mlp.gate_proj.weight": [6, 4],
        "model.layers.0.mlp.up_proj.weight": [6, 4],
        "model.layers.0.mlp.down_proj.weight": [4, 6],
        "model.norm.weight": [4],
    }
    return {name: floats(shape, value + i) for i, (name, shape) in enumerate(shapes.items())}


def floats(shape: list[int], value: float) -> tuple[str, list[int], bytes]:
    count = 1
    for size in shape:
        count *= size
    return "F32", shape, struct.pack("<f", value) * count


def llama_folder(folder: Path, tensors: dict[str, tuple[str, list[int], bytes]] | None = None, **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(LLAMA | config))
    write(folder / "model.safetensors", llama_tensors() if tensors is None else tensors)
    return folder
