"""Reading adapter folders: real ones, damaged ones, those of another model, and those that only look like one."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from llmkit.errors import CheckpointError, LLMKitError, UsageError
from llmkit.families import read_config
from llmkit.lora.adapter import read_adapter
from llmkit.lora.settings import AdapterSettings, parse_settings
from llmkit.lora.write import AdapterWeights, write_adapter
from tests.families.tiny import hf_config, our_config
from tests.lora.peft import random_terms

LLAMA = our_config(hf_config("llama"))
Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A valid adapter, to be spoilt."""
    terms = random_terms(LLAMA, ("q_proj.", "up_proj."), AdapterSettings(r=2))
    write_adapter(tmp_path / "adapter", AdapterWeights(terms), LLAMA, AdapterSettings(r=2, base_model_name_or_path="org/base"))
    return tmp_path / "adapter"


def change(folder: Path, tensors: dict[str, torch.Tensor | None] | None = None, **said: Any) -> None:
    """Other tensors (None takes one away) and other fields of adapter_config.json."""
    file, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    found: dict[str, Any] = {**load_file(file), **(tensors or {})}
    save_file({name: tensor for name, tensor in found.items() if tensor is not None}, file)
    config.write_text(json.dumps(json.loads(config.read_text()) | said))


@pytest.mark.real
def test_the_adapter_of_trl(data_dir: Path) -> None:
    """16 ranks on c_attn of the twelve layers of GPT-2: A is shared by q, k and v, B is cut."""
    config = read_config({"model_type": "gpt2"})
    adapter = read_adapter(data_dir / "models" / "lora-trl-kto", config)
    assert len(adapter.linears) == 36
    assert (adapter.name, adapter.settings.base_model_name_or_path, adapter.base) == ("lora-trl-kto", "gpt2", None)
    stored = load_file(adapter.folder / "adapter_model.safetensors")
    key = "base_model.model.transformer.h.7.attn.c_attn.lora_{}.weight"
    whole = np.concatenate([adapter.linears[f"model.layers.7.self_attn.{name}_proj"].b for name in "qkv"])
    np.testing.assert_array_equal(whole, stored[key.format("B")].numpy())
    for name in "qkv":
        np.testing.assert_array_equal(adapter.linears[f"model.layers.7.self_attn.{name}_proj"].a, stored[key.format("A")].numpy())
    assert adapter.native_problem(config) is None
    assert not adapter.does_nothing


def test_adapter_names_in_keys_and_16_bits(folder: Path) -> None:
    expected = read_adapter(folder, LLAMA).linears["model.layers.0.self_attn.q_proj"]
    a, b = (load_file(folder / "adapter_model.safetensors")[f"{Q}.lora_{end}.weight"].bfloat16() for end in "AB")
    gone: dict[str, torch.Tensor | None] = {f"{Q}.lora_A.weight": None, f"{Q}.lora_B.weight": None}
    change(folder, {**gone, f"{Q}.lora_A.default.weight": a, f"{Q}.lora_B.default.weight": b})
    found = read_adapter(folder, LLAMA).linears["model.layers.0.self_attn.q_proj"]
    np.testing.assert_array_equal(found.a, a.float().numpy())
    np.testing.assert_allclose(found.b, expected.b, rtol=2**-8)


def test_everything_that_does_not_fit_is_one_error(folder: Path) -> None:
    layer = "base_model.model.model.layers"
    change(
        folder,
        {
            f"{Q}.lora_B.weight": None,
            f"{layer}.1.self_attn.q_proj.lora_A.weight": torch.zeros(3, 24),
            f"{layer}.1.self_attn.q_proj.lora_B.weight": torch.zeros(24, 3),
            f"{layer}.2.self_attn.q_proj.lora_A.weight": torch.zeros(2, 20),
            f"{layer}.40.self_attn.q_proj.lora_A.weight": torch.zeros(2, 24),
            f"{layer}.40.self_attn.q_proj.lora_B.weight": torch.zeros(24, 2),
            f"{layer}.0.mlp.w9.lora_A.weight": torch.zeros(2, 24),
            f"{layer}.0.mlp.w9.lora_B.weight": torch.zeros(24, 2),
            f"{layer}.3.self_attn.q_proj.lora_A.weight": torch.full((2, 24), float("nan")),
            f"{layer}.0.mlp.up_proj.lora_B.bias": torch.zeros(40),
            "base_model.model.score.weight": torch.zeros(2, 24),
            "base_model.model.model.embed_tokens.weight": torch.zeros(99, 24),
        },
    )
    with pytest.raises(CheckpointError) as caught:
        read_adapter(folder, LLAMA)
    text = str(caught.value)
    for part in (
        "missing: lora_B of model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj has rank 3 and 3, where adapter_config.json has 2",
        "model.layers.2.self_attn.q_proj gives [24, 20] to model.layers.2.self_attn.q_proj.weight, which is [24, 24]",
        "model.layers.40.self_attn.q_proj is no part of this model",
        "model.layers.0.mlp.w9 is no part of this model",
        "model.layers.3.self_attn.q_proj has values that are not finite",
        "lora_B.bias is a bias of the low-rank term",
        "score.weight is no part of this model",
        "embed_tokens.weight gives [99, 24] to model.embed_tokens.weight, which is [97, 24]",
        "It was trained on 'org/base'.",
    ):
        assert part in text
    assert "up_proj" in text
    assert text.count("\n  ") == 9


@pytest.mark.parametrize(
    ("said", "problem"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; llmkit runs LORA"),
        ({"r": 0}, "r is 0, not a whole number from 1"),
        ({"lora_alpha": "high"}, "lora_alpha is 'high', not a number"),
        ({"rank_pattern": {"q_proj": "2"}}, "rank_pattern is"),
        ({"rank_pattern": {"((a+)+)+b": 2}}, "is none that llmkit matches"),
        ({"alpha_pattern": {"(": 2}}, "is none that llmkit matches"),
        ({"use_dora": "yes"}, "use_dora is 'yes', not true or false"),
        ({"use_dora": True}, "use_dora is True, but model.layers.0.self_attn.q_proj has no magnitude"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the base model too"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens = [1] is not something llmkit runs"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices = [1] is not something"),
        ({"layer_replication": [[0, 4]]}, "layer_replication"),
        ({"of_a_later_peft": {"scale": 2}}, "of_a_later_peft"),
    ],
)
def test_settings_that_llmkit_does_not_run(folder: Path, said: dict[str, Any], problem: str) -> None:
    change(folder, **said)
    with pytest.raises(CheckpointError) as caught:
        read_adapter(folder, LLAMA)
    assert problem in str(caught.value)


def test_what_only_tells_of_training_is_passed_over(folder: Path) -> None:
    change(
        folder, lora_dropout=0.1, init_lora_weights="gaussian", layers_to_transform=[0], peft_version="0.99", megatron_core="megatron.core"
    )
    assert len(read_adapter(folder, LLAMA).linears) == 8


def test_nothing_matched_is_an_error(folder: Path) -> None:
    save_file({}, folder / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="holds no LoRA weights at all"):
        read_adapter(folder, LLAMA)


def test_an_adapter_of_another_family_names_its_modules(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"(?s)layers.0.self_attn.q_proj gives \[24, 24\].*trained on 'org/base'"):
        read_adapter(folder, our_config(hf_config("gemma3")))


def test_folders_that_are_none(folder: Path, tmp_path: Path, tiny_model_dir: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no adapter_config.json. It is a model, not an adapter"):
        read_adapter(tiny_model_dir, LLAMA)
    with pytest.raises(CheckpointError, match=r"The folder .*/adaptr does not exist"):  # a mistyped path does not go to the hub
        read_adapter(str(tmp_path / "adaptr"), LLAMA)
    with pytest.raises(CheckpointError, match=r"is a file, not an adapter folder"):
        read_adapter(str(folder / "adapter_config.json"), LLAMA)
    with pytest.raises(CheckpointError, match=r"org/adapter is no folder here and not in the hub cache, and HF_HUB_OFFLINE is set"):
        read_adapter("org/adapter", LLAMA)
    with pytest.raises(UsageError, match="neither a folder nor a hub id"):
        read_adapter("what is this", LLAMA)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"only a pickle file \(adapter_model.bin\), which can run code and is never opened"):
        read_adapter(folder, LLAMA)
    (folder / "adapter_model.bin").unlink()
    with pytest.raises(CheckpointError, match=r"has no adapter_model\.safetensors"):
        read_adapter(folder, LLAMA)


def test_an_adapter_that_changes_nothing_is_known(folder: Path) -> None:
    assert not read_adapter(folder, LLAMA).does_nothing
    file = folder / "adapter_model.safetensors"
    save_file({name: tensor * ("lora_A" in name) for name, tensor in load_file(file).items()}, file)
    assert read_adapter(folder, LLAMA).does_nothing


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_weights_are_one_error(folder: Path, data: st.DataObject) -> None:
    original = (folder / "adapter_model.safetensors").read_bytes()
    spoilt = bytearray(original)
    for _ in range(data.draw(st.integers(1, 4))):
        header = data.draw(st.booleans())
        place = data.draw(st.integers(0, (1500 if header else len(original)) - 1))
        spoilt[place] = data.draw(st.integers(0, 255))
    cut = data.draw(st.one_of(st.just(len(spoilt)), st.integers(0, len(spoilt))))
    other = folder.parent / "spoilt"
    shutil.copytree(folder, other, dirs_exist_ok=True)
    (other / "adapter_model.safetensors").write_bytes(spoilt[:cut])
    with suppress(LLMKitError):  # and nothing else
        assert read_adapter(other, LLAMA).linears


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
FIELDS = ["peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_dora", "use_rslora", "init_lora_weights", "x"]


@settings(max_examples=150, deadline=None)
@given(said=st.dictionaries(st.sampled_from(FIELDS), JSON))
def test_any_settings_are_read_or_named(said: dict[str, Any]) -> None:
    problems: list[str] = []
    found = parse_settings(said, problems)
    assert found.scale("model.layers.0.self_attn.q_proj", found.rank("model.layers.0.self_attn.q_proj")) is not None
    assert problems or said.get("peft_type") == "LORA"


def test_patterns_are_matched_as_peft_matches_them() -> None:
    said = {"peft_type": "LORA", "rank_pattern": {"layers.1.self_attn.q_proj": 7, "q_proj": 2, "^model.layers.2.up_proj": 3}}
    problems: list[str] = []
    found = parse_settings(said, problems)
    assert not problems
    assert [found.rank(f"model.layers.{i}.self_attn.q_proj") for i in (0, 1, 11)] == [2, 7, 2]
    assert found.rank("model.layers.2.up_proj") == 3
    assert found.rank("model.layers.0.xq_proj") == 8
