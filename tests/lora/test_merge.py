"""Merging: the model with the adapter beside it and the model with the adapter in it say the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import llmkit
from llmkit.checkpoint.files import load_config, open_checkpoint
from llmkit.checkpoint.quantize import quantize_folder
from llmkit.checkpoint.source import ModelSource
from llmkit.errors import CheckpointError, UsageError
from llmkit.kernels.format import QuantizedMatrix, widen
from llmkit.lora.merge import merge
from llmkit.lora.settings import AdapterSettings
from llmkit.lora.write import AdapterWeights, write_adapter
from tests.cli.test_commands import Said, only_our_settings, said  # noqa: F401 - fixtures
from tests.families.tiny import hf_config, our_config, save
from tests.lora.peft import IDS, PARITY, base_model, difference, random_lengths, random_terms, random_weights, trained_by_peft
from tests.tiny import write_model

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::RuntimeWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"
)

SETTINGS = AdapterSettings(r=3, lora_alpha=5)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "fused": ("phi3", {"target_modules": "all-linear"}),
    "transposed": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "bias": "all"}),
    "experts": ("mixtral", {"target_modules": "all-linear"}),
    "dora": ("gemma2", {"target_modules": ["q_proj", "down_proj"], "use_dora": True}),
    "part-of-tied": ("llama-biases-tied", {"target_modules": ["q_proj", "embed_tokens"]}),
    "whole": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head", "norm"]}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_merged_model_is_that_of_peft(case: str, tmp_path: Path) -> None:
    variant, settings = CASES[case]
    theirs = trained_by_peft(tmp_path, variant, **settings)
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert difference(llmkit.load(tmp_path / "merged", device="cpu").logits(IDS), theirs) < PARITY
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        assert difference(model(torch.tensor([IDS])).logits[0].numpy(), theirs) < PARITY


def test_a_quantized_base_becomes_16_bits(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", hidden_size=64)
    config = load_config(base)
    quantize_folder(base, tmp_path / "q4", "q4")
    terms = random_terms(config, ("mlp.",), SETTINGS)
    write_adapter(tmp_path / "adapter", AdapterWeights(terms), config, SETTINGS, base=ModelSource.open(base).fingerprint)
    report = merge(tmp_path / "q4", tmp_path / "adapter", tmp_path / "merged")
    assert (report.dtype, report.quantized) == ("bfloat16", "q4 and q8")
    config_json = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert "quantization_config" not in config_json
    assert config_json["torch_dtype"] == "bfloat16"
    assert {tensor.dtype for tensor in open_checkpoint(tmp_path / "merged").values()} == {"BF16"}
    assert (tmp_path / "merged" / "tokenizer.json").is_file()
    dense = merge(tmp_path / "q4", tmp_path / "adapter", tmp_path / "dense", dtype="float32")
    assert dense.nbytes == 2 * report.nbytes
    merged, quantized = (ModelSource.open(tmp_path / name).weights() for name in ("dense", "q4"))
    for name, weight in quantized.items():
        expected = weight.dequantize() if isinstance(weight, QuantizedMatrix) else widen(weight)
        if (path := name.removesuffix(".weight")) in terms:
            a, b = terms[path]
            expected = expected + 5 / 3 * (b @ a).numpy()
        np.testing.assert_allclose(merged[name], expected, atol=1e-6)
    assert merge(base, tmp_path / "adapter", tmp_path / "same").dtype == "float32"


def test_an_embedding_trained_with_its_tied_head_stays_tied(tmp_path: Path) -> None:
    config = our_config(hf_config("qwen2"))
    save(base_model("qwen2"), tmp_path / "base")
    whole = random_weights(config, ["model.embed_tokens.weight"])
    write_adapter(tmp_path / "adapter", AdapterWeights({}, modules_to_save=whole), config, SETTINGS)
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert load_config(tmp_path / "merged").tie_word_embeddings
    beside = llmkit.load(tmp_path / "base", adapter=tmp_path / "adapter", device="cpu")
    assert difference(llmkit.load(tmp_path / "merged", device="cpu").logits(IDS), beside.logits(IDS)) < PARITY


class TestCommand:
    @pytest.fixture
    def folders(self, tmp_path: Path) -> Path:
        base = write_model(tmp_path / "base", hidden_size=64)
        config = load_config(base)
        terms = random_terms(config, ("self_attn.", "mlp."), SETTINGS)
        write_adapter(tmp_path / "adapter", AdapterWeights(terms), config, SETTINGS, base=ModelSource.open(base).fingerprint)
        quantize_folder(base, tmp_path / "q4", "q4")
        return tmp_path

    def test_says_how_far_it_is(self, folders: Path, said: Said) -> None:  # noqa: F811
        code, out, err = said("merge", str(folders / "base"), str(folders / "adapter"), "-o", str(folders / "m"), "-t", "1")
        assert (code, err) == (0, "")
        assert f"{folders / 'm'}: float32, " in out
        assert "KL divergence from the model with the adapter: " in out
        assert "quantized" not in out
        (folders / "text.txt").write_text("Once upon a time there was a dog.")
        again = ("merge", str(folders / "q4"), str(folders / "adapter"), "-o", str(folders / "m"), "--text", str(folders / "text.txt"))
        assert said(*again)[0] == 2  # it exists
        code, out, _ = said(*again, "--overwrite")
        assert code == 0
        assert "The model was quantized (q4 and q8); merged it is not." in out
        code, out, _ = said(*again, "--overwrite", "--json", "--dtype", "float16")
        found = json.loads(out)
        assert (code, found["dtype"], found["quantized"]) == (0, "float16", "q4 and q8")
        assert 0 < found["mean_kl"] < 0.1
        assert found["tokens"] > 5

    def test_without_a_tokenizer_random_ids_are_compared(self, folders: Path, said: Said) -> None:  # noqa: F811
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (folders / "base" / name).unlink()
        code, out, _ = said("merge", str(folders / "base"), str(folders / "adapter"), "-o", str(folders / "m"), "--json")
        found = json.loads(out)
        assert (code, found["tokens"]) == (0, 255)
        assert abs(found["mean_kl"]) < 1e-9
        text = ("--text", str(folders / "base" / "config.json"), "--overwrite")
        assert said("merge", str(folders / "base"), str(folders / "adapter"), "-o", str(folders / "m"), *text)[0] == 2

    def test_what_is_refused(self, folders: Path, said: Said) -> None:  # noqa: F811
        other = write_model(folders / "other", hidden_size=64, rms_norm_eps=1e-6)
        tensors = folders / "other" / "model.safetensors"
        raw = bytearray(tensors.read_bytes())
        raw[-2] ^= 1
        raw[-130] ^= 1
        tensors.write_bytes(raw)
        arguments = ("merge", str(other), str(folders / "adapter"), "-o", str(folders / "m"))
        code, _, err = said(*arguments)
        assert code == 1
        assert "was trained on another model" in err
        assert said(*arguments, "--any-base")[0] == 0
        with pytest.raises(UsageError, match="would be replaced while it is read"):
            merge(folders / "base", folders / "adapter", folders / "base", overwrite=True)
        with pytest.raises(CheckpointError, match=r"has no adapter_config\.json. It is a model"):
            merge(folders / "base", folders / "base", folders / "n")
        assert not (folders / "n").exists()


def test_dora_of_a_quantized_base(tmp_path: Path) -> None:
    """Rows have the learned lengths, whatever the base's rows were rounded to."""
    base = write_model(tmp_path / "base", hidden_size=64)
    config, settings = load_config(base), AdapterSettings(r=3, use_dora=True)
    quantize_folder(base, tmp_path / "q4", "q4")
    terms = random_terms(config, ("q_proj.",), settings)
    lengths = random_lengths(terms)
    write_adapter(tmp_path / "adapter", AdapterWeights(terms, magnitudes=lengths), config, settings)
    merge(tmp_path / "q4", tmp_path / "adapter", tmp_path / "merged", dtype="float32")
    merged, quantized = (ModelSource.open(tmp_path / name).weights() for name in ("merged", "q4"))
    for path, (a, b) in terms.items():
        matrix, rows = quantized[f"{path}.weight"], merged[f"{path}.weight"]
        assert isinstance(matrix, QuantizedMatrix)
        assert isinstance(rows, np.ndarray)
        direction = matrix.dequantize() + 8 / 3 * (b @ a).numpy()
        expected = lengths[path].numpy()[:, None] * direction / np.linalg.norm(direction, axis=1, keepdims=True)
        np.testing.assert_allclose(rows, expected, atol=1e-6)


@pytest.mark.parametrize("variant", ["llama", "phi3", "gpt2"])
def test_nf4(variant: str, tmp_path: Path) -> None:
    """A base in the Hugging Face 4-bit layout, fused or transposed: run by PyTorch with the adapter beside it, and merged."""
    save(base_model(variant), tmp_path / "base")
    quantize_folder(tmp_path / "base", tmp_path / "nf4", "nf4")
    config = our_config(hf_config(variant))
    terms = random_terms(config, ("self_attn.", "mlp."), SETTINGS)
    fingerprint = ModelSource.open(tmp_path / "base").fingerprint
    write_adapter(tmp_path / "adapter", AdapterWeights(terms), config, SETTINGS, base=fingerprint, chat_template="{{ messages }}")
    assert ModelSource.open(tmp_path / "nf4").fingerprint == fingerprint
    report = merge(tmp_path / "nf4", tmp_path / "adapter", tmp_path / "merged", dtype="float32")
    assert report.quantized == "nf4"
    assert (tmp_path / "merged" / "chat_template.jinja").read_text() == "{{ messages }}"
    assert "llmkit_source" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    beside = llmkit.load(tmp_path / "nf4", adapter=tmp_path / "adapter", device="cpu")
    assert difference(llmkit.load(tmp_path / "merged", device="cpu").logits(IDS), beside.logits(IDS)) < PARITY
    assert difference(beside.logits(IDS, adapter=None), beside.logits(IDS)) > 0.05
