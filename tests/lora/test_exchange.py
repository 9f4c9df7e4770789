"""Adapters between PEFT and llmkit, both ways: the same logits for every family, fused linears, experts and everything else."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import llmkit
from llmkit.checkpoint.source import ModelSource
from llmkit.errors import UsageError
from llmkit.lora.adapter import read_adapter
from llmkit.lora.settings import AdapterSettings
from llmkit.lora.write import AdapterWeights, write_adapter
from tests.families.tiny import hf_config, our_config, save
from tests.lora.peft import (
    FAMILIES,
    IDS,
    PARITY,
    base_model,
    difference,
    logits,
    random_lengths,
    random_terms,
    random_weights,
    read_by_peft,
    trained_by_peft,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::RuntimeWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"
)

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
FROM_PEFT: dict[str, tuple[str, dict[str, Any]]] = {
    **{variant: (variant, {"target_modules": "all-linear"}) for variant in FAMILIES},
    "rank-and-alpha-patterns": (
        "phi3",
        {
            "target_modules": ["qkv_proj", "o_proj"],
            "rank_pattern": {"layers.1.self_attn.qkv_proj": 7, "o_proj": 2},
            "alpha_pattern": {"o_proj": 11},
        },
    ),
    "rslora": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "use_rslora": True}),
    "dora": ("llama-biases-tied", {"target_modules": ["q_proj", "down_proj"], "use_dora": True, "use_rslora": True}),
    "dora-fused": ("phi3", {"target_modules": ["qkv_proj", "gate_up_proj"], "use_dora": True}),
    "dora-transposed": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "use_dora": True}),
    "experts-and-router": ("qwen3-moe", {"target_modules": ["q_proj"], "target_parameters": [*EXPERTS, "mlp.gate.weight"]}),
    "experts-down": ("qwen3-moe", {"target_modules": ["q_proj"], "target_parameters": EXPERTS[1:], "use_rslora": True}),
    "experts-up": (
        "qwen3-moe",
        {
            "target_modules": ["q_proj"],
            "target_parameters": EXPERTS[:1],
            "rank_pattern": {"gate_up_proj": 3},
            "alpha_pattern": {r".*\.gate_up_proj": 7},
        },
    ),
    "old-mixtral": ("mixtral", {"target_modules": ["q_proj", "w1", "w2", "w3"]}),
    "embeddings": ("gpt2", {"target_modules": ["wte", "wpe", "c_attn"]}),
    "embeddings-scaled": ("gemma3", {"target_modules": ["q_proj", "embed_tokens"]}),
    "embedding-of-a-tied-head": ("llama-biases-tied", {"target_modules": ["q_proj", "embed_tokens"]}),
    "tied-head": ("llama-biases-tied", {"target_modules": ["q_proj", "lm_head"]}),
    "head": ("llama", {"target_modules": ["q_proj", "lm_head"]}),
    "whole-modules": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head", "norm"]}),
    "whole-embedding-of-a-tied-head": ("gpt2", {"target_modules": ["c_attn"], "modules_to_save": ["wte", "ln_f"]}),
    "biases": ("gpt2", {"target_modules": ["c_attn"], "bias": "all"}),
    "biases-of-adapted": ("llama-biases-tied", {"target_modules": ["q_proj"], "bias": "lora_only"}),
}


@pytest.mark.parametrize("case", FROM_PEFT)
def test_peft_to_llmkit(case: str, tmp_path: Path) -> None:
    variant, settings = FROM_PEFT[case]
    theirs = trained_by_peft(tmp_path, variant, **settings)
    llm = llmkit.load(tmp_path / "base", adapter=tmp_path / "adapter", device="cpu", speculate="off")
    assert difference(llm.logits(IDS), theirs) < PARITY
    assert difference(llm.logits(IDS, adapter=None), logits(base_model(variant))) < PARITY
    assert difference(llm.logits(IDS, adapter=None), theirs) > 0.05  # the adapter does something


BOTH = ("self_attn.", "mlp.")
QV = ("q_proj.", "v_proj.", "up_proj.")
Terms = tuple[str, ...]
TO_PEFT: dict[str, tuple[str, Terms, AdapterSettings, Terms]] = {
    **{variant: (variant, BOTH, AdapterSettings(r=3, lora_alpha=5), ()) for variant in FAMILIES},
    "part-of-fused": ("phi3", QV, AdapterSettings(r=3, lora_alpha=5), ()),
    "part-of-transposed": ("gpt2", QV, AdapterSettings(r=3, lora_alpha=5), ()),
    "ranks-and-alphas": (
        "phi3",
        QV,
        AdapterSettings(3, 5, use_rslora=True, rank_pattern={"q_proj": 2, r"layers\.1\.mlp\.up_proj": 5}, alpha_pattern={"v_proj": 9.5}),
        (),
    ),
    "one-layer": ("phi3", ("layers.1.mlp.up_proj.", "layers.1.self_attn.q_proj."), AdapterSettings(r=4), ()),
    "dora-fused": ("phi3", ("q_proj.", "k_proj.", "v_proj.", "o_proj."), AdapterSettings(r=4, use_dora=True), ()),
    "dora-transposed": ("gpt2", BOTH, AdapterSettings(r=4, use_dora=True, use_rslora=True), ()),
    "some-experts": ("qwen3-moe", ("experts.0.gate_proj.", "experts.3.gate_proj.", "mlp.gate."), AdapterSettings(r=3), ()),
    "experts-of-other-ranks": (
        "mixtral",
        ("mlp.gate.", "up_proj.", "q_proj."),
        AdapterSettings(r=3, rank_pattern={"up_proj": 5, r"mlp\.gate": 2}, alpha_pattern={r"mlp\.gate": 3}),
        (),
    ),
    "embedding-and-head": ("llama", ("q_proj.", "lm_head.", "embed_tokens."), AdapterSettings(r=3), ()),
    "embeddings": ("gpt2", ("q_proj.", "embed_tokens.", "embed_positions."), AdapterSettings(r=3), ()),
    "whole-tied-embedding": ("llama-biases-tied", ("q_proj.",), AdapterSettings(r=2), ("model.embed_tokens.weight", "model.norm.weight")),
    "whole-modules": (
        "gpt2",
        ("q_proj.",),
        AdapterSettings(r=2),
        ("model.norm.weight", "model.norm.bias", "model.layers.0.mlp.down_proj.weight", "model.layers.0.mlp.down_proj.bias"),
    ),
    "whole-fused": ("phi3", ("o_proj.",), AdapterSettings(r=2), tuple(f"model.layers.1.self_attn.{name}_proj.weight" for name in "qkv")),
}


@pytest.mark.parametrize("case", TO_PEFT)
def test_llmkit_to_peft(case: str, tmp_path: Path) -> None:
    variant, paths, settings, whole = TO_PEFT[case]
    save(base_model(variant), tmp_path / "base")
    config = our_config(hf_config(variant))
    terms = random_terms(config, paths, settings)
    write_adapter(
        tmp_path / "adapter",
        AdapterWeights(terms, magnitudes=random_lengths(terms) if settings.use_dora else {}, modules_to_save=random_weights(config, whole)),
        config,
        settings,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected).*")  # PEFT leaves out what it does not find, and says no more
        theirs = read_by_peft(tmp_path / "adapter", variant)
    llm = llmkit.load(tmp_path / "base", adapter=tmp_path / "adapter", device="cpu", speculate="off")
    assert difference(llm.logits(IDS), theirs) < PARITY
    assert difference(llm.logits(IDS, adapter=None), theirs) > 0.05
    back = read_adapter(tmp_path / "adapter", config)
    for path, (a, b) in terms.items():
        found, scale = back.linears[path], settings.scale(path, len(a))
        np.testing.assert_allclose(found.b @ found.a, (scale * b @ a).numpy(), atol=1e-5)


def test_fused_ranks_stand_beside_each_other(tmp_path: Path) -> None:
    config = our_config(hf_config("phi3"))
    terms = random_terms(config, ("layers.0.self_attn.q_proj.", "layers.0.self_attn.v_proj."), AdapterSettings(r=3, lora_alpha=5))
    write_adapter(tmp_path, AdapterWeights(terms), config, AdapterSettings(r=3, lora_alpha=5, base_model_name_or_path="org/base"))
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    module = "base_model.model.model.layers.0.self_attn.qkv_proj"
    assert set(tensors) == {f"{module}.lora_A.weight", f"{module}.lora_B.weight"}
    a, b = tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"]
    (qa, qb), (va, vb) = terms.values()
    torch.testing.assert_close(a, torch.cat((qa, va)))
    torch.testing.assert_close(b[:24, :3], qb)
    torch.testing.assert_close(b[48:, 3:], vb)
    assert not b[:48, 3:].any()
    assert not b[24:, :3].any()
    said = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (said["rank_pattern"], said["alpha_pattern"]) == ({"qkv_proj": 6}, {"qkv_proj": 10})
    assert said["target_modules"] == ["model.layers.0.self_attn.qkv_proj"]
    assert said["base_model_name_or_path"] == "org/base"


def test_what_cannot_be_exchanged_is_named(tmp_path: Path) -> None:
    fused = our_config(hf_config("phi3"))
    dora = AdapterSettings(r=2, use_dora=True)
    q = random_terms(fused, ("layers.0.self_attn.q_proj.", "layers.1.mlp.up_proj."), dora)
    with pytest.raises(UsageError, match=r"(?s)DoRA on a part of model.layers.0.self_attn.qkv_proj.*DoRA on a part of .*gate_up_proj"):
        write_adapter(tmp_path / "a", AdapterWeights(q, magnitudes=random_lengths(q)), fused, dora)
    sparse = our_config(hf_config("mixtral"))
    experts = random_terms(sparse, ("experts.1.up_proj.",), dora)
    with pytest.raises(UsageError, match="DoRA on experts, routers"):
        write_adapter(tmp_path / "a", AdapterWeights(experts, magnitudes=random_lengths(experts)), sparse, dora)
    plain = AdapterSettings(r=2)
    some = random_weights(fused, ["model.layers.0.self_attn.q_proj.weight"])
    with pytest.raises(UsageError, match=r"q_proj trained as a whole without .*k_proj.weight, .*v_proj.weight"):
        write_adapter(tmp_path / "a", AdapterWeights({}, modules_to_save=some), fused, plain)
    one = random_weights(sparse, ["model.layers.0.mlp.experts.1.up_proj.weight"])
    with pytest.raises(UsageError, match=r"experts.1.up_proj trained as a whole, which is no module"):
        write_adapter(tmp_path / "a", AdapterWeights({}, modules_to_save=one), sparse, plain)
    wrong = {
        "model.layers.0.self_attn.q_proj": (torch.zeros(2, 5), torch.zeros(7, 2)),
        "model.layers.9.mlp.up_proj": (torch.zeros(2, 24),) * 2,
    }
    with pytest.raises(UsageError, match=r"(?s)layers.0.self_attn.q_proj has A \[2, 5\] and B \[7, 2\].*layers.9"):
        write_adapter(tmp_path / "a", AdapterWeights(wrong), fused, plain)
    with pytest.raises(UsageError, match="no weights to write"):
        write_adapter(tmp_path / "a", AdapterWeights({}), fused, plain)
    assert not (tmp_path / "a").exists()


def test_a_target_is_whole_or_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, settings = our_config(hf_config("llama")), AdapterSettings(r=2)
    terms = random_terms(config, ("q_proj.",), settings)
    target = tmp_path / "adapter"
    write_adapter(target, AdapterWeights(terms), config, settings)
    before = (target / "adapter_model.safetensors").read_bytes()
    with pytest.raises(UsageError, match="exists and is not empty"):
        write_adapter(target, AdapterWeights(terms), config, settings)
    other = random_terms(config, ("q_proj.",), settings, seed=5)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("llmkit.lora.write._sync", full)
        with pytest.raises(llmkit.LLMKitError, match="No space left"):
            write_adapter(target, AdapterWeights(other), config, settings, overwrite=True)
    assert (target / "adapter_model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    write_adapter(target, AdapterWeights(other), config, settings, overwrite=True)
    assert (target / "adapter_model.safetensors").read_bytes() != before
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").touch()
    with pytest.raises(UsageError, match="is not an adapter"):
        write_adapter(tmp_path / "notes", AdapterWeights(terms), config, settings, overwrite=True)


def test_fingerprints_travel_in_the_weights_file(tiny_model_dir: Path, tmp_path: Path) -> None:
    from llmkit.checkpoint.files import load_config

    config, settings = load_config(tiny_model_dir), AdapterSettings(r=2)
    terms = random_terms(config, ("q_proj.",), settings)
    base = ModelSource.open(tiny_model_dir).fingerprint
    write_adapter(tmp_path / "a", AdapterWeights(terms), config, settings, base=base, chat_template="{{ messages }}", source=tiny_model_dir)
    adapter = read_adapter(tmp_path / "a", config)
    assert base is not None
    assert adapter.base == base
    assert adapter.template is not None
    with safe_open(tmp_path / "a" / "adapter_model.safetensors", "pt") as file:
        assert set(json.loads(file.metadata()["llmkit"])) == {"base", "chat_template"}
    assert {path.name for path in (tmp_path / "a").iterdir()} >= {"tokenizer.json", "chat_template.jinja"}
    assert re.fullmatch("[0-9a-f]{32}", adapter.template)
