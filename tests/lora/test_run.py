"""Adapters beside a model: chosen per request, in one batch, on the native step and in PyTorch."""

from __future__ import annotations

import logging
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import llmkit
from llmkit.checkpoint.files import load_config
from llmkit.checkpoint.quantize import quantize_folder
from llmkit.checkpoint.source import ModelSource
from llmkit.errors import CheckpointError, UsageError
from llmkit.kernels import NativeBackend, native_problem
from llmkit.llm.api import LLM
from llmkit.lora.settings import AdapterSettings
from llmkit.lora.write import AdapterWeights, write_adapter
from llmkit.model.backend import TorchBackend
from tests.families.tiny import tiny_folder
from tests.lora.peft import random_lengths, random_terms, random_weights
from tests.tiny import TEMPLATE, write_model

native = pytest.mark.skipif(native_problem() is not None, reason=f"no native kernels: {native_problem()}")
GREEDY = {"temperature": 0, "max_tokens": 24, "ignore_eos": True}
SETTINGS = AdapterSettings(r=4, lora_alpha=8, base_model_name_or_path="org/base")
DORA = AdapterSettings(r=4, lora_alpha=8, use_dora=True)
PROMPTS = ["Once upon a time", "The dog", "a ball and the sun was warm. The dog", "Once"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in float32, bfloat16 and 4 bits, and adapters of every kind."""
    root = tmp_path_factory.mktemp("adapters")
    base = write_model(root / "float32", hidden_size=64, context=2048)
    config = load_config(base)
    write_model(root / "bfloat16", hidden_size=64, context=2048, torch_dtype="bfloat16")
    tensors = load_file(base / "model.safetensors")
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, root / "bfloat16" / "model.safetensors")
    quantize_folder(base, root / "q4", "q4")
    marks = {"base": ModelSource.open(base).fingerprint, "chat_template": TEMPLATE}
    for name, seed in (("pirate", 1), ("poet", 2)):
        terms = random_terms(config, ("self_attn.", "mlp."), SETTINGS, seed)
        write_adapter(root / name, AdapterWeights(terms), config, SETTINGS, **marks, source=base)  # type: ignore[arg-type]
    terms = random_terms(config, ("q_proj.", "down_proj."), DORA, 3)
    write_adapter(root / "dora", AdapterWeights(terms, magnitudes=random_lengths(terms)), config, DORA)
    terms = random_terms(config, ("q_proj.", "embed_tokens.", "lm_head."), SETTINGS, 4)
    write_adapter(root / "whole", AdapterWeights(terms, modules_to_save=random_weights(config, ["model.norm.weight"])), config, SETTINGS)
    return root


def in_torch(folder: Path, **arguments: object) -> LLM:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMKIT_KERNELS", "reference")
        return llmkit.load(folder, device="cpu", **arguments)  # type: ignore[arg-type]


def two(root: Path, stored: str = "float32", **arguments: object) -> LLM:
    return llmkit.load(root / stored, adapter=[root / "pirate", root / "poet"], device="cpu", **arguments)  # type: ignore[arg-type]


@native
@pytest.mark.parametrize("stored", ["float32", "bfloat16", "q4"])
def test_a_mixed_batch_is_each_alone_bit_for_bit(root: Path, stored: str) -> None:
    llm = two(root, stored, speculate="off")
    assert isinstance(llm.backend, NativeBackend)
    which = ["pirate", None, "poet", "pirate"]
    alone = [llm.generate(prompt, adapter=name, logprobs=2, **GREEDY) for prompt, name in zip(PROMPTS, which, strict=True)]
    together = two(root, stored, threads=1, speculate="ngram").generate(PROMPTS, adapter=which, logprobs=2, **GREEDY)
    assert [one.token_ids for one in together] == [one.token_ids for one in alone]
    assert [one.logprobs for one in together] == [one.logprobs for one in alone]
    plain = llmkit.load(root / stored, device="cpu").generate(PROMPTS[1], logprobs=2, **GREEDY)
    assert (together[1].token_ids, together[1].logprobs) == (plain.token_ids, plain.logprobs)
    assert len({tuple(llm.generate("Once", adapter=name, **GREEDY).token_ids) for name in (None, "pirate", "poet")}) == 3


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "q4"])
def test_pytorch_gives_the_same(root: Path, stored: str) -> None:
    ours, theirs = two(root, stored, kv_bits=32), in_torch(root / stored, adapter=[root / "pirate", root / "poet"])
    assert isinstance(theirs.backend, TorchBackend)
    ids = list(range(5, 60))
    for name in (None, "pirate", "poet"):
        expected = theirs.logits(ids, adapter=name)
        worst = np.abs(ours.logits(ids, adapter=name) - expected).max() / np.abs(expected).max()
        assert worst < (0.03 if stored == "q4" else 2e-5)  # of 4 bits: activations are rounded, and now and then to the other side
    if stored != "q4":
        which = ["pirate", None, "poet", None]
        both = [llm.generate(PROMPTS, adapter=which, **GREEDY) for llm in (ours, theirs)]
        assert [one.text for one in both[0]] == [one.text for one in both[1]]


@pytest.mark.parametrize("variant", ["qwen3-moe", "phi3-longrope", "mistral"])
def test_a_mixed_batch_in_pytorch(variant: str, tmp_path: Path) -> None:
    """Sliding windows, frequencies by length and experts, in one step with others and alone."""
    base = tiny_folder(tmp_path / "base", variant)
    config = load_config(base)
    for seed in (1, 2):
        terms = random_terms(config, ("self_attn.", "mlp."), AdapterSettings(r=2), seed)
        write_adapter(tmp_path / f"a{seed}", AdapterWeights(terms), config, AdapterSettings(r=2))
    llm = in_torch(base, adapter={"one": tmp_path / "a1", "two": tmp_path / "a2"})
    prompts = [list(range(3, 3 + length)) for length in (5, 40, 60, 9, 21)]
    which = ["one", None, "two", "one", "two"]
    together = llm.generate(prompts, adapter=which, logprobs=0, **GREEDY)
    for prompt, name, found in zip(prompts, which, together, strict=True):
        alone = llm.generate(prompt, adapter=name, logprobs=0, **GREEDY)
        assert found.token_ids == alone.token_ids
        np.testing.assert_allclose([t.logprob for t in found.logprobs], [t.logprob for t in alone.logprobs], atol=1e-4)


class TestWhatTheNativeStepCannotRun:
    @pytest.mark.parametrize(
        ("name", "reason"),
        [("dora", "the adapter 'dora' has DoRA magnitudes"), ("whole", "the adapter 'whole' has weights trained as a whole")],
    )
    @pytest.mark.parametrize("stored", ["float32", "q4"])
    @native
    def test_pytorch_runs_it_and_says_why(self, root: Path, stored: str, name: str, reason: str, caplog: pytest.LogCaptureFixture) -> None:
        llm = llmkit.load(root / stored, adapter=[root / "pirate", root / name], device="cpu")
        assert isinstance(llm.backend, TorchBackend)
        assert [record.message for record in caplog.records] == [
            f"PyTorch runs the model, not the faster native kernels: {reason}, which the native step does not run."
        ]
        ids = list(range(5, 40))
        assert np.abs(llm.logits(ids, adapter=name) - llm.logits(ids, adapter=None)).max() > 0.1
        np.testing.assert_allclose(llm.logits(ids, adapter="pirate"), in_torch(root / stored, adapter=root / "pirate").logits(ids), rtol=0)

    def test_terms_on_embeddings_alone(self, root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        config = load_config(root / "float32")
        write_adapter(tmp_path / "embed", AdapterWeights(random_terms(config, ("embed_tokens.",), SETTINGS)), config, SETTINGS)
        llmkit.load(root / "float32", adapter=tmp_path / "embed", device="cpu")
        assert native_problem() is not None or "has a term on model.embed_tokens" in caplog.text

    def test_a_cache_that_only_the_native_step_has(self, root: Path) -> None:
        with pytest.raises(UsageError, match="kv_bits 8 needs the native kernels, and the adapter 'dora' has DoRA"):
            llmkit.load(root / "float32", adapter=root / "dora", kv_bits=8, device="cpu")


class TestChoice:
    def test_the_first_is_the_default(self, root: Path) -> None:
        llm = two(root)
        assert llm.adapters == ("pirate", "poet")
        assert repr(llm).endswith("adapters pirate, poet>")
        said = {name: llm.generate("Once", adapter=name, **GREEDY).text for name in llm.adapters}
        assert llm.generate("Once", **GREEDY).text == said["pirate"]
        assert "".join(map(str, llm.stream("Once", adapter="poet", **GREEDY))) == said["poet"]
        assert llm.chat("Once", **GREEDY).text == llm.chat("Once", adapter="pirate", **GREEDY).text
        assert "".join(map(str, llm.chat("Once", stream=True, adapter="poet", **GREEDY))) == llm.chat("Once", adapter="poet", **GREEDY).text
        assert llm.score("Once upon", adapter="poet").perplexity != llm.score("Once upon").perplexity

    def test_without_adapters_nothing_is_chosen(self, root: Path) -> None:
        llm = llmkit.load(root / "float32", device="cpu")
        assert llm.adapters == ()
        assert llm.generate("Once", **GREEDY).text == llm.generate("Once", adapter=None, **GREEDY).text
        with pytest.raises(UsageError, match=r"adapter 'pirate' is not loaded\. None is loaded; give one to load"):
            llm.generate("Once", adapter="pirate")

    def test_unknown_names(self, root: Path) -> None:
        llm = two(root)
        for ask in (llm.generate, llm.stream, llm.chat, llm.logits, llm.score):
            with pytest.raises(UsageError, match=r"adapter 'pirat' is not loaded\. Did you mean 'pirate'"):
                ask("Once", adapter="pirat")
        with pytest.raises(UsageError, match="Loaded are pirate, poet"):
            llm.generate("Once", adapter="x")
        with pytest.raises(UsageError, match="2 adapters for 3 prompts"):
            llm.generate(["a", "b", "c"], adapter=["poet", None])
        with pytest.raises(UsageError, match="1 adapters for 1 prompts"):
            llm.generate("a", adapter=["poet"])

    def test_names_of_their_own(self, root: Path) -> None:
        assert llmkit.load(root / "float32", adapter={"a": root / "poet", "b": root / "poet"}, device="cpu").adapters == ("a", "b")
        assert llmkit.load(root / "float32", adapter=f"x={root / 'poet'}", device="cpu").adapters == ("x",)
        with pytest.raises(UsageError, match="two adapters are called 'poet'"):
            llmkit.load(root / "float32", adapter=[root / "poet", root / "poet"], device="cpu")
        for name in ("none", "a b", ""):
            with pytest.raises(UsageError, match="cannot be called"):
                llmkit.load(root / "float32", adapter={name: root / "poet"}, device="cpu")


def test_adapters_share_no_cached_prefix(root: Path) -> None:
    llm, prompt = two(root), "The dog ran to the ball and the sun was warm. " * 6
    asked = [llm.generate(prompt, adapter=name, **GREEDY) for name in ("pirate", "poet", None, "pirate", "poet", None)]
    assert [one.usage.cached_tokens > 0 for one in asked] == [False] * 3 + [True] * 3
    assert [one.text for one in asked[:3]] == [one.text for one in asked[3:]]


def test_threads_with_adapters_of_their_own(root: Path) -> None:
    llm = two(root)
    which = ["pirate", "poet", None] * 3
    alone = {name: llm.generate("Once upon a time", adapter=name, **GREEDY).token_ids for name in (None, "pirate", "poet")}
    with ThreadPoolExecutor(6) as pool:
        asked = [pool.submit(llm.generate, "Once upon a time", adapter=name, **GREEDY) for name in which]
        assert [reply.result().token_ids for reply in asked] == [alone[name] for name in which]


@native
def test_a_draft_model_guesses_without(root: Path) -> None:
    exact = llmkit.load(root / "float32", adapter=root / "poet", device="cpu", speculate="off").generate("Once upon", **GREEDY)
    guessed = llmkit.load(root / "float32", adapter=root / "poet", device="cpu", draft_model=root / "bfloat16").generate(
        "Once upon", **GREEDY
    )
    assert guessed.token_ids == exact.token_ids


PROGRAM = """
import sys, llmkit
llm = llmkit.load({model!r}, device="cpu", adapter={adapter!r})
llm.generate(["Once", "The dog"], adapter=[None, "poet"], max_tokens=9)
list(llm.chat("dog", stream=True, max_tokens=9)), llm.logits("Once")
assert "torch" not in sys.modules
"""


@native
def test_torch_is_not_imported(root: Path) -> None:
    program = PROGRAM.format(model=str(root / "q4"), adapter=str(root / "poet"))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


class TestBase:
    def other(self, root: Path, to: Path) -> Path:
        """A sibling: the same model after a little more training."""
        shutil.copytree(root / "float32", to)
        tensors = load_file(to / "model.safetensors")
        save_file({name: tensor * 1.01 for name, tensor in tensors.items()}, to / "model.safetensors")
        return to

    def test_another_one_is_an_error(self, root: Path, tmp_path: Path) -> None:
        other = self.other(root, tmp_path / "other")
        quantize_folder(other, tmp_path / "q4", "q4")
        for base in (other, tmp_path / "q4"):
            with pytest.raises(CheckpointError, match=r"'poet' was trained on another model .* from those of 'org/base'.*--any-base"):
                llmkit.load(base, adapter=root / "poet", device="cpu")
            assert llmkit.load(base, adapter=root / "poet", any_base=True, device="cpu").adapters == ("poet",)
        with pytest.raises(UsageError, match="any_base has no effect without an adapter"):
            llmkit.load(root / "float32", any_base=True, device="cpu")

    def test_copies_are_the_same(self, root: Path, tmp_path: Path) -> None:
        tensors = load_file(root / "float32" / "model.safetensors")
        shutil.copytree(root / "float32", tmp_path / "half")
        save_file({name: tensor.half() for name, tensor in tensors.items()}, tmp_path / "half" / "model.safetensors")
        marks = {name: ModelSource.open(root / name).fingerprint for name in ("float32", "bfloat16", "q4")}
        first = marks["float32"]
        assert first is not None
        assert {mark.digest for mark in marks.values() if mark is not None} == {first.digest}
        half = ModelSource.open(tmp_path / "half").fingerprint
        assert half is not None
        assert half.dtype == "float16"
        assert not half.differs(first)  # rounded twice: nothing is claimed

    def test_a_quantized_folder_that_does_not_remember(self, root: Path, tmp_path: Path) -> None:
        shutil.copytree(root / "q4", tmp_path / "q4")
        config = tmp_path / "q4" / "config.json"
        config.write_text(re.sub(r'"llmkit_source": \{[^}]*\},', "", config.read_text()))
        assert ModelSource.open(tmp_path / "q4").fingerprint is None
        assert llmkit.load(tmp_path / "q4", adapter=root / "poet", device="cpu").adapters == ("poet",)


def test_another_template_is_a_warning(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        llmkit.load(root / "float32", adapter=root / "poet", device="cpu")
        assert not caplog.records
        llm = llmkit.load(root / "float32", adapter=root / "poet", chat_template=TEMPLATE + "!", device="cpu")
    assert re.search(r"'poet' was trained with another chat template .*--chat-template .*poet/chat_template.jinja", caplog.text)
    caplog.clear()
    template = root / "poet" / "chat_template.jinja"
    llm = llmkit.load(root / "float32", adapter=root / "poet", chat_template=template, device="cpu")
    assert not caplog.records
    assert llm.adapters == ("poet",)


def test_an_adapter_that_changes_nothing_is_a_warning(root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = ModelSource.open(root / "float32").config
    terms = {path: (a, torch.zeros_like(b)) for path, (a, b) in random_terms(config, ("q_proj.",), SETTINGS).items()}
    write_adapter(tmp_path / "new", AdapterWeights(terms), config, SETTINGS)
    llmkit.load(root / "float32", adapter=tmp_path / "new", device="cpu")
    assert "'new' changes nothing: all of its B are zero" in caplog.text
