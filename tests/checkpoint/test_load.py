"""Folders become models in place; everything that does not fit is named in one error."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from llmkit.checkpoint.load import empty_model, load_model, load_model_with_report
from llmkit.errors import CheckpointError, ConfigError, LLMKitError, UsageError
from llmkit.families import read_config

from . import raw


def test_parameters_are_the_mapped_file(tmp_path: Path) -> None:
    folder = raw.llama_folder(tmp_path / "m")
    before = (folder / "model.safetensors").read_bytes()
    model, report = load_model_with_report(folder)
    weights = dict(model.named_parameters())
    assert set(weights) == set(raw.llama_tensors())
    for name, (_, shape, data) in raw.llama_tensors().items():
        assert list(weights[name].shape) == shape
        assert weights[name].detach().numpy().tobytes() == data
    assert (report.mapped_bytes, report.copied_bytes, report.skipped, report.notes) == (4 * report.num_parameters, 0, (), ())
    with torch.no_grad():  # copy on write: it can be trained, and the file stays
        weights["model.norm.weight"].zero_()
    model(torch.tensor([[1, 2, 3]])).sum().backward()
    assert all(weight.grad is not None for weight in weights.values())
    assert (folder / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", torch.float32, "torch.float16"])
def test_conversion(tmp_path: Path, dtype: Any) -> None:
    folder = raw.llama_folder(tmp_path / "m")
    model, report = load_model_with_report(folder, dtype)
    assert {str(w.dtype) for w in model.parameters()} == {"torch." + str(dtype).removeprefix("torch.")} == {"torch." + report.dtype}
    assert model.model.norm.weight[0] == 10.5
    assert (report.copied_bytes == 0) == (dtype is torch.float32)


@pytest.mark.parametrize("field", ["dtype", "torch_dtype"])
def test_default_dtype_is_the_config_s_then_the_file_s(tmp_path: Path, field: str) -> None:
    folder = raw.llama_folder(tmp_path / "m", torch_dtype=None)
    assert load_model(folder).model.norm.weight.dtype == torch.float32
    raw.llama_folder(folder, **{"torch_dtype": None, field: "bfloat16"})
    assert load_model(folder).model.norm.weight.dtype == torch.bfloat16


def test_default_dtype_of_a_silent_config_is_that_of_the_tensors(tmp_path: Path) -> None:
    halves = {name: ("F16", shape, struct.pack("<e", 2.0) * (len(data) // 4)) for name, (_, shape, data) in raw.llama_tensors().items()}
    folder = raw.llama_folder(tmp_path / "m", halves, torch_dtype=None)
    model, report = load_model_with_report(folder)
    assert (report.dtype, report.copied_bytes) == ("float16", 0)
    assert model.model.norm.weight[0] == 2.0


def test_everything_that_does_not_fit_is_in_one_error(tmp_path: Path) -> None:
    tensors = raw.llama_tensors()
    del tensors["model.layers.0.mlp.up_proj.weight"], tensors["model.embed_tokens.weight"]
    tensors |= {
        "model.norm.weight": raw.floats([5], 1.0),
        "model.layers.0.self_attn.q_proj.bias": raw.floats([4], 1.0),
        "model.layers.1.mlp.up_proj.weight": raw.floats([6, 4], 1.0),
        "model.layers.0.self_attn.k_proj.weight": ("I32", [2, 4], bytes(32)),
        "model.layers.0.self_attn.rotary_emb.inv_freq": raw.floats([1], 1.0),
    }
    folder = raw.llama_folder(tmp_path / "m", tensors)
    with pytest.raises(CheckpointError) as caught:
        load_model(folder)
    listed = [line.strip() for line in str(caught.value).splitlines()[1:-1]]
    assert sorted(listed) == [
        "missing: model.embed_tokens.weight [8, 4]",
        "missing: model.layers.0.mlp.up_proj.weight [6, 4]",
        "surplus: 'model.layers.0.self_attn.q_proj.bias' [4]",
        "surplus: 'model.layers.1.mlp.up_proj.weight' [6, 4]",
        "wrong dtype: 'model.layers.0.self_attn.k_proj.weight' is I32, weights are F64, F32, F16, BF16, F8_E4M3, F8_E5M2",
        "wrong shape: model.norm.weight needs [4], 'model.norm.weight' is [5]",
    ]


def test_a_damaged_number_of_layers_is_no_endless_message(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="and 3491 more") as caught:
        load_model(raw.llama_folder(tmp_path, num_hidden_layers=500))
    assert str(caught.value).count("missing: ") == 1000


def test_skipped_names_and_code_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": raw.floats([1], 1.0)}
    load_model(raw.llama_folder(tmp_path / "m", raw.llama_tensors() | buffer, auto_map={"AutoModel": "x.Y"}))
    said = {record.levelname: record.message for record in caplog.records}
    assert "never runs code" in said["WARNING"]
    assert "1 stored tensors are not needed and were skipped: model.layers.0.self_attn.rotary_emb.inv_freq" in said["INFO"]


def test_skipped_names_are_reported(tmp_path: Path) -> None:
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": raw.floats([1], 1.0)}
    _, report = load_model_with_report(raw.llama_folder(tmp_path / "m", raw.llama_tensors() | buffer))
    assert report.skipped == tuple(buffer)


def test_a_tied_head_may_be_stored_if_it_is_the_embedding(tmp_path: Path) -> None:
    embedding = raw.llama_tensors()["model.embed_tokens.weight"]
    model, report = load_model_with_report(raw.llama_folder(tmp_path / "m", raw.llama_tensors() | {"lm_head.weight": embedding}))
    assert report.skipped == ("lm_head.weight",)
    assert model.lm_head is None
    wide = ("F64", [8, 4], struct.pack("<d", 0.5) * 32)
    assert load_model_with_report(raw.llama_folder(tmp_path / "wide", raw.llama_tensors() | {"lm_head.weight": wide}))[1].skipped
    for other in (raw.floats([8, 4], 3.0), raw.floats([4, 8], 0.5), ("U8", [8, 4], bytes(32))):
        folder = raw.llama_folder(tmp_path / "other", raw.llama_tensors() | {"lm_head.weight": other})
        with pytest.raises(CheckpointError, match=r"not tied: 'lm_head.weight' differs from 'model.embed_tokens.weight'"):
            load_model(folder)


def test_an_untied_head_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"missing: lm_head.weight \[8, 4\]"):
        load_model(raw.llama_folder(tmp_path / "m", tie_word_embeddings=False))


def test_a_file_that_is_not_aligned_is_copied(tmp_path: Path) -> None:
    folder = raw.llama_folder(tmp_path / "m")
    data = (folder / "model.safetensors").read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", length + 1) + data[8 : 8 + length] + b" " + data[8 + length :])
    model, report = load_model_with_report(folder)
    assert report.mapped_bytes == 0
    assert model.model.norm.weight[0] == 10.5


def test_unknown_dtype_and_device(tmp_path: Path) -> None:
    folder = raw.llama_folder(tmp_path / "m")
    with pytest.raises(UsageError, match=r"dtype 'float31' is unknown. Use one of float32, float16, bfloat16"):
        load_model(folder, "float31")
    with pytest.raises(UsageError, match="device 'gpu' cannot be used"):
        load_model(folder, device="gpu")
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="device 'cuda' cannot be used"):
            load_model(folder, device="cuda")
    if not torch.backends.mps.is_available():  # torch lists all of its backends after the first sentence
        with pytest.raises(UsageError, match=r"^device 'mps' cannot be used: [^.]*(\S\.\S[^.]*)*\. Use cpu") as caught:
            load_model(folder, device="mps")
        assert len(str(caught.value)) < 300


def test_quantized_folders_and_remote_code(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is quantized \\('fp8'\\)"):
        load_model(raw.llama_folder(tmp_path / "q", quantization_config={"quant_method": "fp8"}))
    _, report = load_model_with_report(raw.llama_folder(tmp_path / "m", auto_map={"AutoModelForCausalLM": "modeling_x.X"}))
    assert "never runs code" in report.notes[0]


def test_sizes_beyond_any_machine(tmp_path: Path) -> None:
    folder = raw.llama_folder(tmp_path / "m", hidden_size=2**31, num_attention_heads=1, num_key_value_heads=1, intermediate_size=2**33)
    with pytest.raises(LLMKitError):
        load_model(folder)


def test_unknown_families_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'mistrall' is not a family llmkit knows; did you mean 'mistral'"):
        load_model(raw.llama_folder(tmp_path / "m", model_type="mistrall"))


# Run in a process of its own; prints, for each dtype, the growth of anonymous memory sampled while loading.
MEASURE = """
import re, sys, threading
from llmkit.checkpoint.load import load_model_with_report
def anonymous():
    return 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1])
load_model_with_report(sys.argv[1], "float16")  # what the first load imports
for dtype in sys.argv[3:]:
    before = peak = anonymous()
    done = threading.Event()
    def watch():
        global peak
        while not done.wait(0.001):
            peak = max(peak, anonymous())
    thread = threading.Thread(target=watch)
    thread.start()
    try:
        model, report = load_model_with_report(sys.argv[2], dtype)
    finally:
        done.set()
    thread.join()
    print(max(peak, anonymous()) - before, report.num_parameters, report.mapped_bytes)
    del model
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_peak_memory(tmp_path: Path) -> None:
    """88 MB of bfloat16: kept, they cost nothing; converted, no more than the result."""
    small, large = raw.llama_folder(tmp_path / "small"), tmp_path / "large"
    wide = {"vocab_size": 20000, "hidden_size": 512, "intermediate_size": 4096, "num_hidden_layers": 4}
    config = raw.LLAMA | wide | {"num_attention_heads": 8, "num_key_value_heads": 8, "torch_dtype": "bfloat16"}
    large.mkdir()
    (large / "config.json").write_text(json.dumps(config))
    shapes = {name: list(p.shape) for name, p in empty_model(read_config(config)).named_parameters()}
    raw.write(large / "model.safetensors", {name: ("BF16", shape, bytes(2 * torch.Size(shape).numel())) for name, shape in shapes.items()})
    itemsizes = {"bfloat16": 0, "float16": 2, "float32": 4}
    run = subprocess.run([sys.executable, "-c", MEASURE, small, large, *itemsizes], capture_output=True, text=True, check=True)
    for line, (dtype, itemsize) in zip(run.stdout.splitlines(), itemsizes.items(), strict=True):
        grown, parameters, mapped = map(int, line.split())
        assert grown < itemsize * parameters * 1.1 + 8e6, dtype
        assert mapped == (2 * parameters if dtype == "bfloat16" else 0)
