"""The Hugging Face 4-bit layout: transformers reads what we write with the same logits, and we what it writes; damage is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from llmkit.checkpoint.files import open_checkpoint, read_json
from llmkit.checkpoint.formats.bitsandbytes import STATE
from llmkit.checkpoint.gguf.tensors import weights_of
from llmkit.checkpoint.load import load_model, load_model_with_report
from llmkit.checkpoint.quantize import quantize_folder
from llmkit.checkpoint.quantize_nf4 import record
from llmkit.checkpoint.save import save_model
from llmkit.checkpoint.source import ModelSource
from llmkit.errors import CheckpointError, UsageError
from llmkit.llm.backends import Options, prepare
from llmkit.quant.nf4 import Nf4Linear
from tests.checkpoint import raw
from tests.families.tiny import VARIANTS, hf_config, hf_model, tiny_folder
from tests.kernels.test_native import logits

FILE = "model.safetensors"
IDS = torch.arange(40).view(1, -1)
# Rows of whole blocks of 64: bitsandbytes' kernel for CPUs with AVX-512 misreads others.
WIDE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
WIDE_MOE: dict[str, Any] = {"moe_intermediate_size": 64}
WIDE_GPT2: dict[str, Any] = {"n_embd": 64, "n_head": 4, "n_inner": 128}


def wide_folder(folder: Path, variant: str) -> Path:
    changes = WIDE_GPT2 if variant.startswith("gpt2") else WIDE | (WIDE_MOE if "moe" in variant else {})
    if variant.startswith("phi3"):
        changes = {**changes, "num_attention_heads": 2, "num_key_value_heads": 2}
        del changes["head_dim"]
    if variant == "phi3-longrope":
        changes["rope_parameters"] = VARIANTS[variant][1]["rope_parameters"] | {"short_factor": [1.0] * 16, "long_factor": [2.0] * 16}
    return tiny_folder(folder, variant, **changes)


def reference(folder: Path) -> PreTrainedModel:
    """The folder in transformers, its 4-bit linears kept from the bfloat16 arithmetic they use on CPUs that have it."""
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, **eager)
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.train()
    return model


@torch.no_grad()
def difference(folder: Path, theirs: PreTrainedModel) -> float:
    """The largest difference between the logits, relative to the largest logit."""
    expected = theirs(IDS).logits
    return float((load_model(folder, "float32")(IDS) - expected).abs().max() / expected.abs().max())


# --- what is written --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["llama", "mixtral", "qwen3-moe", "gemma3", "phi3", "gpt2", "smollm3-window"])
def test_transformers_gives_the_same_logits(tmp_path: Path, variant: str) -> None:
    source = wide_folder(tmp_path / "source", variant)
    quantize_folder(source, tmp_path / "out", "nf4")
    theirs = reference(tmp_path / "out")
    linears = [name for name, module in theirs.named_modules() if type(module).__name__ == "Linear4bit"]
    assert len(linears) >= 4 * theirs.config.num_hidden_layers
    assert difference(tmp_path / "out", theirs) < 5e-6
    assert difference(source, theirs) > 0.02  # it is not the dense model that was read


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_transformers_gives_the_same_logits_for_every_variant(tmp_path: Path, variant: str) -> None:
    quantize_folder(wide_folder(tmp_path / "source", variant), tmp_path / "out", "nf4")
    assert difference(tmp_path / "out", reference(tmp_path / "out")) < 5e-6


def test_it_is_what_transformers_writes(tmp_path: Path) -> None:
    """Tensor by tensor, codes and scales and all; only the JSON of the states may be padded."""
    source = wide_folder(tmp_path / "source", "llama")
    quantize_folder(source, tmp_path / "ours", "nf4")
    settings = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": torch.float32}
    AutoModelForCausalLM.from_pretrained(source, quantization_config=BitsAndBytesConfig(load_in_4bit=True, **settings)).save_pretrained(
        tmp_path / "theirs"
    )
    ours, theirs = load_file(tmp_path / "ours" / FILE), load_file(tmp_path / "theirs" / FILE)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        if STATE in name:
            assert json.loads(bytes(ours[name].numpy())) == json.loads(bytes(tensor.numpy()))
        else:
            assert ours[name].dtype == tensor.dtype
            assert torch.equal(ours[name], tensor), name
    assert read_json(tmp_path / "ours" / "config.json")["quantization_config"] == record("float32")
    assert read_json(tmp_path / "theirs" / "config.json")["quantization_config"] == record("float32")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_what_is_not_quantized_keeps_its_dtype(tmp_path: Path, dtype: str) -> None:
    save_model(load_model(wide_folder(tmp_path / "source", "llama")), tmp_path / "short", dtype=dtype)
    report = quantize_folder(tmp_path / "short", tmp_path / "out", "nf4")
    original, tensors = open_checkpoint(tmp_path / "short"), open_checkpoint(tmp_path / "out")
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
        assert bytes(tensors[name].data) == bytes(original[name].data)
    assert all(tensor.offset % (4 if tensor.dtype == "F32" else 2 if "F16" in tensor.dtype else 1) == 0 for tensor in tensors.values())
    assert report.bytes_after == sum(tensor.nbytes for tensor in tensors.values())
    model, loaded = load_model_with_report(tmp_path / "out")
    assert loaded.dtype == f"nf4 and {dtype}"
    assert loaded.copied_bytes == 0
    assert loaded.num_parameters == report.weights == sum(p.numel() for p in load_model(tmp_path / "source").parameters())
    assert model.model.norm.weight.dtype == getattr(torch, dtype)
    theirs = reference(tmp_path / "out")
    torch.nn.Module.float(theirs)  # all of its arithmetic, as ours is on a CPU
    for module in theirs.modules():
        if type(module).__name__ == "Linear4bit":
            module.compute_dtype = torch.float32
    assert difference(tmp_path / "out", theirs) < 5e-6


def test_chunks_and_threads_make_no_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny_folder(tmp_path / "source", "phi3")  # fused: rows of three matrices, blocks across their bounds
    seen: list[tuple[int, int]] = []
    before = torch.get_num_threads()
    report = quantize_folder(source, tmp_path / "a", "nf4", threads=2, progress=lambda done, total: seen.append((done, total)))
    assert torch.get_num_threads() == before
    monkeypatch.setattr("llmkit.checkpoint.quantize_nf4._CHUNK", 1000)
    quantize_folder(source, tmp_path / "b", "nf4", threads=1)
    assert (tmp_path / "a" / FILE).read_bytes() == (tmp_path / "b" / FILE).read_bytes()
    assert seen == sorted(seen)
    assert {total for _, total in seen} == {report.weights} == {seen[-1][0]}


def test_warnings(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    quantize_folder(tiny_folder(tmp_path / "moe", "mixtral", head_dim=16), tmp_path / "out", "nf4")
    assert "The experts stay in float32" in caplog.text
    assert "Rows of 48 weights are not whole blocks of 64" in caplog.text
    caplog.clear()
    quantize_folder(wide_folder(tmp_path / "wide", "llama"), tmp_path / "wide-out", "nf4")
    assert caplog.text == ""


# --- what is read -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variant", "kind", "double", "storage"),
    [("llama", "nf4", False, "uint8"), ("llama", "fp4", True, "uint8"), ("phi3", "nf4", True, "bfloat16"), ("gpt2", "nf4", True, "uint8")],
)
def test_folders_of_transformers(tmp_path: Path, variant: str, kind: str, double: bool, storage: str) -> None:
    source = wide_folder(tmp_path / "source", variant)
    settings = {"bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": double, "bnb_4bit_quant_storage": storage}
    quantized = BitsAndBytesConfig(load_in_4bit=True, **settings)
    AutoModelForCausalLM.from_pretrained(source, quantization_config=quantized).save_pretrained(tmp_path / "out")
    assert load_model_with_report(tmp_path / "out")[1].dtype == f"{kind} and float32"
    assert difference(tmp_path / "out", reference(tmp_path / "out")) < 5e-6


def test_experts_of_older_checkpoints(tmp_path: Path) -> None:
    """transformers 4 held each expert in a linear, and quantized it."""
    source = wide_folder(tmp_path / "source", "mixtral")
    quantize_folder(source, tmp_path / "out", "nf4")
    tensors, packed = load_file(tmp_path / "out" / FILE), {}
    donor = "model.layers.0.self_attn.o_proj.weight"  # [64, 128], as w2 is
    name = "model.layers.0.block_sparse_moe.experts.1.w2.weight"
    for key in [key for key in tensors if key.startswith(donor)]:
        packed[key.replace(donor, name)] = tensors[key].clone()
    save_file(tensors | packed, tmp_path / "out" / FILE, metadata={"format": "pt"})
    model = load_model(tmp_path / "out")
    expert = model.get_submodule("model.layers.0.mlp.experts.1.down_proj")
    assert isinstance(expert, Nf4Linear)
    assert torch.equal(expert.dequantize(), model.get_submodule("model.layers.0.self_attn.o_proj").dequantize())


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nf4")
    quantize_folder(wide_folder(folder / "source", "phi3"), folder / "out", "nf4")
    return folder / "out"


def test_pytorch_runs_it_and_says_why(quantized: Path, tmp_path: Path) -> None:
    runner = prepare(ModelSource.open(quantized), Options(device="cpu"))
    assert runner.problem is not None
    assert "bitsandbytes' 4 bits; a folder of `llmkit quantize --scheme q4` is faster" in runner.problem
    found = logits(runner.new_backend(), IDS[0].numpy())
    with torch.no_grad():
        expected = load_model(quantized)(IDS)[0].numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    with pytest.raises(UsageError, match="dtype 'float16' has no effect"):
        prepare(ModelSource.open(quantized), Options(device="cpu", dtype="float16"))
    with pytest.raises(CheckpointError, match="is quantized already"):
        quantize_folder(quantized, tmp_path / "again")
    with pytest.raises(UsageError, match="not saved from memory"):
        save_model(load_model(quantized), tmp_path / "again")


def test_weights_for_gguf(quantized: Path) -> None:
    model = load_model(quantized)
    name = "model.layers.1.self_attn.v_proj"
    weight = weights_of(model)[f"{name}.weight"]
    assert np.array_equal(weight.rows(3, 20), model.get_submodule(name).dequantize()[3:20].numpy())


def test_training_reaches_the_input_and_nothing_else(quantized: Path) -> None:
    model = load_model(quantized)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model(IDS).square().mean().backward()
    embedding = model.model.embed_tokens.weight.grad
    assert embedding is not None
    assert float(embedding.abs().max()) > 0
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


QKV = "model.layers.0.self_attn.qkv_proj.weight"
Tensors = dict[str, torch.Tensor]


def state(change: Callable[[dict[str, Any]], object]) -> Callable[[Tensors], object]:
    """A change of the JSON beside a matrix."""

    def changed(tensors: Tensors) -> None:
        said = json.loads(bytes(tensors[f"{QKV}.{STATE}nf4"].numpy()))
        change(said)
        tensors[f"{QKV}.{STATE}nf4"] = torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)

    return changed


DAMAGE: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "no scales": (lambda t: t.pop(f"{QKV}.absmax"), r"needs absmax U8 \[192\], which is missing"),
    "no state": (lambda t: t.pop(f"{QKV}.{STATE}nf4"), "has the quant_state of nothing"),
    "no codes": (lambda t: t.pop(QKV), "has 0 bytes of codes, not 6144"),
    "cut codes": (lambda t: t.update({QKV: t[QKV][:100].clone()}), "has 100 bytes of codes, not 6144"),
    "a short table": (lambda t: t.update({f"{QKV}.quant_map": torch.zeros(8)}), r"needs quant_map F32 \[16\], which is F32 \[8\]"),
    "another kind": (lambda t: t.update({f"{QKV}.{STATE}nf5": t.pop(f"{QKV}.{STATE}nf4")}), "has the quant_state of nf5"),
    "not JSON": (lambda t: t.update({f"{QKV}.{STATE}nf4": torch.zeros(5, dtype=torch.uint8)}), "cannot be read"),
    "another shape": (state(lambda s: s.update(shape=[64, 192])), "wrong shape|cannot be cut"),
    "a shape that is none": (state(lambda s: s.update(shape=[1 << 40, 2])), "has the shape"),
    "no shape": (state(lambda s: s.pop("shape")), "cannot be read"),
    "odd blocks": (state(lambda s: s.update(blocksize=3)), "has blocks of 3"),
    "odd nested blocks": (state(lambda s: s.update(nested_blocksize=128)), "scales in blocks of 128"),
    "an offset that is no number": (state(lambda s: s.update(nested_offset="nan")), "nested_offset nan"),
    "a surplus matrix": (
        lambda t: t.update({key.replace(QKV, "x.weight"): t[key].clone() for key in [*t] if key.startswith(QKV)}),
        "surplus: 'x.weight'",
    ),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_named(quantized: Path, tmp_path: Path, what: str) -> None:
    shutil.copytree(quantized, tmp_path / "out")
    tensors = load_file(quantized / FILE)
    DAMAGE[what][0](tensors)
    save_file(tensors, tmp_path / "out" / FILE, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=DAMAGE[what][1]):
        load_model(tmp_path / "out")


def test_what_is_not_read(tmp_path: Path, quantized: Path) -> None:
    config = hf_config("llama", **WIDE)
    hf_model(config).save_pretrained(tmp_path / "eight")
    for changes, message in (
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, r"in bitsandbytes' 8 bits \(load_in_8bit\)"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "none of its tensors is"),
    ):
        said = read_json(tmp_path / "eight" / "config.json") | {"quantization_config": changes}
        (tmp_path / "eight" / "config.json").write_text(json.dumps(said))
        with pytest.raises(CheckpointError, match=message):
            load_model(tmp_path / "eight")


def test_sources_that_are_wrong(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    tensors = raw.llama_tensors()
    tensors[name] = raw.floats([6, 4], float("nan"))
    with pytest.raises(CheckpointError, match=f"{name} cannot be quantized: it has values that are not finite"):
        quantize_folder(raw.llama_folder(tmp_path / "nan", tensors), tmp_path / "out", "nf4")
    assert not (tmp_path / "out").exists()
