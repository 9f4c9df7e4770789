"""Predicted memory: weights to the byte, the rest against what processes really take; what is proposed fits; sources of the estimates."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from llmkit.checkpoint.arrays import parameter_shapes
from llmkit.checkpoint.files import open_checkpoint
from llmkit.checkpoint.load import load_model
from llmkit.checkpoint.quantize import quantize_folder
from llmkit.checkpoint.save import save_model
from llmkit.checkpoint.source import ModelSource
from llmkit.config import ModelConfig
from llmkit.errors import CheckpointError, DoesNotFit, UsageError
from llmkit.families import read_config
from llmkit.kernels import NativeBackend, native_problem
from llmkit.llm.api import embedded_model
from llmkit.llm.backends import Options, prepare
from llmkit.lora.fused import FusedMatmuls, FusedMLP, training_ops
from llmkit.lora.inject import LoraSettings, inject
from llmkit.model.backend import TorchBackend
from llmkit.model.layers import PLAIN
from llmkit.planning import estimate, memory
from llmkit.planning.check import Fit, fit_run, free, make_run
from llmkit.planning.check_training import fit_recipe, recipe_facts, settle
from llmkit.planning.inference import CONSTANTS, Run, cheaper_run, inference, quantizing
from llmkit.planning.model_info import config_facts, read_facts
from llmkit.planning.training import _saved_numbers, cheaper_recipe, predict, setting, training
from llmkit.training import objective
from llmkit.training.recipe import LoraRecipe, Recipe, from_dict
from tests.checkpoint import raw
from tests.families.tiny import VARIANTS, tiny_folder

LLAMA_1B = {
    **{"model_type": "llama", "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16},
    **{
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
    },
}
SMOLLM = {
    **{"model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30},
    **{
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
    },
}
ONE_B = config_facts(read_config(LLAMA_1B), "one-b")


def zeros_folder(folder: Path, config: dict[str, Any]) -> Path:
    """A bfloat16 checkpoint of zeros, of which no byte is stored."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    header, end = {}, 0
    for name, shape in parameter_shapes(read_config(config)).items():
        size = 2 * math.prod(shape)
        header[name] = raw.entry("BF16", list(shape), end, end + size)
        end += size
    text = json.dumps(header).encode()
    encoded = raw.encode(text + b" " * (-len(text) % 8))
    with (folder / "model.safetensors").open("wb") as file:
        file.write(encoded)
        file.truncate(len(encoded) + end)
    return folder


# --- weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_weights_are_exact(tmp_path: Path, variant: str) -> None:
    source = tiny_folder(tmp_path / "source", variant)
    facts, model = read_facts(ModelSource.open(source)), load_model(source)
    assert facts.stored_bytes == sum(parameter.nbytes for parameter in model.parameters())
    assert facts.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert facts.bytes_as("bfloat16") == facts.stored_bytes // 2
    active = [
        p.numel() for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n and "lm_head" not in n and ".experts." not in n
    ]
    experts = [p.numel() for n, p in model.named_parameters() if ".experts." in n and p.dim() == 2]
    chosen = sum(experts) * 2 // 5  # two of five
    assert facts.active_parameters == sum(active) + chosen + model.config.vocab_size * model.config.hidden_size


@pytest.mark.parametrize("scheme", ["q4", "q8", "nf4"])
@pytest.mark.parametrize("variant", ["llama", "phi3", "gpt2", "mixtral", "gemma2"])
def test_weights_of_quantized_folders_are_exact(tmp_path: Path, variant: str, scheme: str) -> None:
    source = tiny_folder(tmp_path / "source", variant)
    save_model(load_model(source), tmp_path / "half", dtype="bfloat16")
    quantize_folder(tmp_path / "half", tmp_path / "out", scheme)
    facts = read_facts(ModelSource.open(tmp_path / "out"))
    tensors = {name: tensor.nbytes for name, tensor in open_checkpoint(tmp_path / "out").items() if not name.startswith("padding.")}
    assert facts.stored_bytes == sum(tensors.values())
    assert facts.quantized
    foreseen = read_facts(ModelSource.open(tmp_path / "half")).quantized_as(scheme).stored_bytes
    states = sum(size for name, size in tensors.items() if "quant_state" in name)  # text beside each matrix
    if scheme != "nf4" or variant in ("llama", "gemma2", "mixtral"):  # fused matrices share a table
        assert foreseen == facts.stored_bytes - states
    if scheme != "nf4" and variant != "mixtral":
        assert facts.stored_bytes == sum(prepare(ModelSource.open(tmp_path / "out"), Options(device="cpu")).nbytes.values())


def test_only_headers_are_read(tmp_path: Path) -> None:
    """A model of 2.5 GB that is a hole on the disk: reading it would show."""
    folder = zeros_folder(tmp_path / "big", LLAMA_1B)
    program = (
        "import sys; from pathlib import Path\n"
        "from llmkit.checkpoint.source import ModelSource\n"
        "from llmkit.planning.model_info import read_facts; from llmkit.planning.memory import peak_bytes\n"
        "facts = read_facts(ModelSource.open(Path(sys.argv[1])))\n"
        "print(facts.stored_bytes, peak_bytes(), sorted({'torch', 'peft'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program, folder], capture_output=True, text=True, check=True)
    stored, peak, heavy = done.stdout.split(maxsplit=2)
    assert int(stored) == ONE_B.stored_bytes == 2_471_628_800
    assert int(peak) < 100_000_000
    assert heavy == "[]\n"


def test_a_config_alone_is_enough(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_1B))
    facts = read_facts(ModelSource.open(tmp_path))
    assert facts.stored_bytes == ONE_B.stored_bytes
    assert facts.notes == ("its weights are not here: sizes follow from config.json",)


def test_misfits_are_named(tmp_path: Path) -> None:
    tensors = raw.llama_tensors()
    del tensors["model.norm.weight"]
    with pytest.raises(CheckpointError, match=r"missing: model\.norm\.weight"):
        read_facts(ModelSource.open(raw.llama_folder(tmp_path / "x", tensors)))


def without_windows(config: ModelConfig) -> ModelConfig:
    mixers = [replace(config.attention(i), sliding_window=None) for i in range(config.num_hidden_layers)]
    return replace(config, layers=tuple(replace(layer, mixer=mixer) for layer, mixer in zip(config.layers, mixers, strict=True)))


# --- inference --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["llama", "llama-biases-tied", "gemma3", "mistral", "phi3-longrope"])
@pytest.mark.parametrize("bits", [8, 16, 32])
def test_the_cache_is_that_of_the_backends(tmp_path: Path, variant: str, bits: int) -> None:
    model = load_model(tiny_folder(tmp_path / "source", variant))
    config = model.config
    facts = read_facts(ModelSource.open(tmp_path / "source"))
    windows, positions = config.cache_windows, 16 * 20
    long = without_windows(config)
    weights = {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}
    found = inference(replace(facts, config=long), Run(positions, kv_bits=bits))["KV cache"]
    assert native_problem(config) is None
    backend = NativeBackend(config, weights, kv_bits=bits)
    assert found == 20 * sum(backend.block_bytes(group) for group in range(len(windows)))
    if bits == 32:
        torch_backend = TorchBackend(model)
        found = inference(replace(facts, config=long), Run(positions, native=False))["KV cache"]
        assert found == 20 * sum(torch_backend.block_bytes(group) for group in range(len(windows)))


def test_sliding_windows_hold_less() -> None:
    config = read_config({**LLAMA_1B, "model_type": "mistral", "sliding_window": 4096})
    windowed = inference(config_facts(config, "m"), Run(100_000))["KV cache"]
    assert windowed == pytest.approx(inference(ONE_B, Run(4096 + 512))["KV cache"], rel=0.01)


PEAK = """
import sys, json, logging
import numpy as np
import llmkit
from llmkit.planning.memory import measured_peak
folder, count, options = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
llm = llmkit.load(folder, speculate="off", **options)
ids = np.random.default_rng(0).integers(0, llm.config.vocab_size, count).tolist()
llm.generate(ids, max_tokens=4, temperature=0, ignore_eos=True)
print(measured_peak())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the constants were measured on Linux")
@pytest.mark.parametrize(
    ("mid", "count", "kernels", "options"),
    [
        (False, 8, "", {}),
        (True, 700, "", {}),
        (True, 700, "", {"dtype": "float32", "kv_bits": 8}),
        (True, 300, "reference", {}),
    ],
)
def test_predicted_and_measured_peaks(tmp_path: Path, mid: bool, count: int, kernels: str, options: dict[str, Any]) -> None:
    folder = zeros_folder(tmp_path / "mid", SMOLLM) if mid else embedded_model()
    environment = {"PATH": "", "LLMKIT_DEVICE": "cpu", "LLMKIT_KERNELS": kernels, "PYTHONPATH": ":".join(sys.path), "LLMKIT_THREADS": "1"}
    command = [sys.executable, "-c", PEAK, str(folder), str(count), json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    run = Run(count + 4, native=not kernels, **options)
    predicted = sum(inference(read_facts(ModelSource.open(folder)), run).values())
    assert predicted == pytest.approx(int(done.stdout.split()[-1]), rel=0.15)


QUANTIZE = """
import sys
from llmkit.checkpoint.quantize import quantize_folder
from llmkit.planning.memory import measured_peak
quantize_folder(sys.argv[1], sys.argv[2], sys.argv[3], threads=1)
print(measured_peak())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the constants were measured on Linux")
@pytest.mark.parametrize("scheme", ["q4", "nf4"])
def test_predicted_and_measured_peaks_of_quantizing(tmp_path: Path, scheme: str) -> None:
    folder = zeros_folder(tmp_path / "wide", SMOLLM | {"num_hidden_layers": 1, "vocab_size": 98_304})
    command = [sys.executable, "-c", QUANTIZE, str(folder), str(tmp_path / "out"), scheme]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert sum(quantizing(read_facts(ModelSource.open(folder)), scheme).values()) == pytest.approx(int(done.stdout), rel=0.15)


def test_a_run_on_a_gpu_counts_what_lies_on_it() -> None:
    terms = inference(ONE_B, Run(4096, device="cuda", native=False))
    assert terms["weights"] == ONE_B.stored_bytes
    assert terms["KV cache"] == 4096 * 16 * 2 * 8 * 64 * 2
    assert terms["process"] == CONSTANTS.cuda_context


@settings(max_examples=60, deadline=None)
@given(available=st.integers(10**7, 5 * 10**9), positions=st.integers(16, 100_000), bits=st.sampled_from([None, 8, 16]))
def test_what_is_proposed_for_a_run_fits(available: int, positions: int, bits: int | None) -> None:
    run = Run(positions, kv_bits=bits)
    fit = fit_run(ONE_B, run, available)
    assert fit.total == sum(inference(ONE_B, run).values())
    assert fit.fits == (fit.total <= available)
    if fit.fits:
        fit.refuse()
        return
    smallest = inference(ONE_B.quantized_as("q4"), Run(min(positions, 256), kv_bits=8))
    if fit.change is None:
        assert sum(smallest.values()) + 10**6 * 30 > available
        assert "Nothing that is tried" in fit.remedy
    else:
        assert fit.change.say
        assert fit.change.total <= available
    with pytest.raises(DoesNotFit, match=r"one-b needs about .*weights .* are free"):
        fit.refuse()


def test_the_cheapest_change_comes_first() -> None:
    long = Run(131_072)
    need = sum(inference(ONE_B, long).values())
    first = cheaper_run(ONE_B, long, need - 10**8)
    assert first is not None
    assert first.say == ("--kv-bits 8",)
    short = cheaper_run(ONE_B, Run(512), 2 * 10**9)
    assert short is not None
    assert short.say == ("llmkit quantize one-b -o FOLDER --scheme q8",)
    assert cheaper_run(ONE_B, Run(512), 10**8) is None


# --- training ---------------------------------------------------------------------------------------------------------


def recipe(**keys: Any) -> Recipe:
    return from_dict({"model": "m", "data": [{"path": "nowhere.txt"}], "output": "out", "max_steps": 1, **keys})


@pytest.mark.parametrize("variant", ["llama", "qwen3", "gemma2", "gemma3", "olmo2", "mixtral", "phi3", "gpt2", "granite"])
@pytest.mark.parametrize(("lora", "native"), [(False, False), (True, False), (True, True)])
def test_what_a_layer_keeps_for_the_backward_pass(tmp_path: Path, variant: str, lora: bool, native: bool) -> None:
    """Counted by torch: every storage that autograd saves, once."""
    sizes = {"n_embd": 48} if variant.startswith("gpt2") else {"hidden_size": 48, "head_dim": 16, "intermediate_size": 96}
    if variant == "phi3":
        del sizes["head_dim"]
    model = load_model(tiny_folder(tmp_path / "source", variant, **sizes))
    if lora:
        inject(model, LoraSettings(r=4))
    fused = FusedMatmuls()
    ops = replace(PLAIN, matmuls=fused, mlp=FusedMLP(fused)) if lora else PLAIN
    if native:
        ops = training_ops(torch.device("cpu"), adapters=lora)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, tuple[int, torch.Tensor]] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters and tensor.is_floating_point():
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    tokens = torch.arange(64).view(2, 32) % 97
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(tokens, hidden=True, ops=ops)
    how = setting(recipe(max_length=32, batch_size=2, lora={"r": 4} if lora else None), read_facts(ModelSource.open(tmp_path / "source")))
    predicted = 4 * 64 * (sum(_saved_numbers(model.config, layer, how) for layer in model.config.layers) + 3 * model.config.hidden_size)
    assert predicted == pytest.approx(sum(size for size, _ in kept.values()), rel=0.15)


def test_the_loss_computes_so_many_logits_at_a_time() -> None:
    found = objective._TILE["cpu"], objective._LOGITS, objective._SMALLEST
    assert found == (CONSTANTS.logit_tile, CONSTANTS.logit_elements, CONSTANTS.logit_columns)


def test_terms_of_training() -> None:
    facts = config_facts(read_config(SMOLLM), "small")
    plain = recipe(max_length=512, batch_size=4)
    how = setting(plain, facts)
    terms = training(how, facts)
    assert terms["weights"] == 4 * facts.parameters
    assert terms["optimizer"] == 8 * facts.parameters
    fewer = training(setting(plain, facts, checkpointing=True), facts)
    assert fewer["activations"] < 0.2 * terms["activations"]
    assert training(replace(how, optimizer="muon"), facts)["optimizer"] < 0.7 * terms["optimizer"]
    assert training(replace(how, ema=True), facts)["average of the weights"] == 4 * facts.parameters
    assert training(replace(how, loss="dpo"), facts)["the model as it was"] == 4 * facts.parameters
    assert training(how, facts, "cuda")["process"] == CONSTANTS.cuda_context
    adapter = recipe(max_length=512, batch_size=4, lora={})
    frozen = training(setting(adapter, facts), facts)
    count = 30 * 16 * (2 * (576 + 576) + 2 * (576 + 192) + 3 * (576 + 1536))  # q and o, k and v, gate, up and down
    assert frozen["weights"] == facts.stored_bytes
    assert (frozen["adapters"], frozen["gradients"], frozen["optimizer"]) == (4 * count, 4 * count, 8 * count)
    for scheme, share in (("q8", 0.53), ("q4", 0.31)):
        assert training(setting(replace(adapter, quantize=scheme), facts), facts)["weights"] < share * frozen["weights"]
    pairs = setting(recipe(max_length=512, batch_size=4, lora={}, loss="orpo"), facts)
    assert pairs.tokens == 2 * setting(adapter, facts).tokens
    few = setting(recipe(lora={"r": 2, "target_modules": ["q_proj"], "use_dora": True}, max_length=64), facts)
    assert few.trained == 30 * (2 * (576 + 576) + 576)


def test_a_cpu_with_native_kernels_takes_less(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their memory has no holes between activations, their products read 16 bits; checkpointing computes their attention again."""
    facts, plain = config_facts(read_config(SMOLLM), "small"), recipe(max_length=512, batch_size=4, lora={})

    def both(wanted: Recipe, checkpointing: bool = False, device: str = "cpu") -> tuple[dict[str, int], dict[str, int]]:
        monkeypatch.delenv("LLMKIT_KERNELS", raising=False)
        found = training(setting(wanted, facts, checkpointing), facts, device)
        monkeypatch.setenv("LLMKIT_KERNELS", "reference")
        return found, training(setting(wanted, facts, checkpointing), facts, device)

    native, reference = both(plain)
    assert native["activations"] == reference["activations"]
    assert reference["holes between them"] == int(CONSTANTS.holes * reference["activations"])
    assert native["holes between them"] < 0.13 * native["activations"]
    native, reference = both(plain, checkpointing=True)
    # Of PyTorch's attention the block that is computed again takes what was kept.
    assert reference["activations"] - native["activations"] == 2048 * 29 * 4 * (576 + 9)
    native, reference = both(replace(plain, max_length=64, batch_size=1), checkpointing=True)
    assert reference["logits or backward buffers"] > native["logits or backward buffers"]
    for changed in (
        replace(plain, lora=LoraRecipe(use_dora=True)),
        replace(plain, lora=LoraRecipe(dropout=0.1)),
        replace(plain, lora=None),
        replace(plain, dtype="bfloat16"),
    ):  # in PyTorch's memory
        native, reference = both(changed)
        assert native == reference
    native, reference = both(plain, checkpointing=True, device="cuda")
    assert native == reference


def test_qlora_on_a_gpu() -> None:
    """An 8B model in NF4: 16 bits flow between blocks, norms keep 32, and one weight at a time is made in 16."""
    eight = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "tie_word_embeddings": False}
    facts = config_facts(read_config(LLAMA_1B | eight), "eight-b")
    wanted = recipe(max_length=2048, batch_size=1, lora={"r": 16}, quantize="nf4")
    terms = training(setting(wanted, facts, checkpointing=True), facts, "cuda")
    block = 2 * (6 * 4096 + 2 * 1024 + 32 + 2 + 7 * 16 + 2 * 14336) + 2 * 2 * 4096  # numbers that linears take, norms' inputs once more
    kept = 32 * (2 * 4096 + 2 * 4096 + 4 * 32) - (2 * 4096 + 4 * 32)
    assert terms["activations"] == 2048 * (kept + block + 8 * 4096)
    assert terms["logits or backward buffers"] == 2048 * 2 * (5 * 14336 + 2 * 4096)
    assert "gradients" not in terms  # as they come, more than they take goes
    assert sum(terms.values()) < 8.6e9


def test_checkpointing_by_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = recipe(max_length=512, batch_size=4, model=str(zeros_folder(tmp_path / "m", SMOLLM)), device="cpu")
    facts = recipe_facts(wanted)
    assert facts is not None
    plain, fewer = (sum(training(setting(wanted, facts, on), facts).values()) for on in (False, True))
    assert sum(predict(wanted, facts).values()) == plain
    for memory_, expected, total in ((plain, False, plain), (plain - 1, True, fewer), (fewer, True, fewer)):
        monkeypatch.setenv("LLMKIT_MEMORY", str(memory_))
        settled, fit = settle(wanted)
        assert (settled.checkpointing, fit and fit.total) == (expected, total)
        assert settle(replace(wanted, checkpointing=True))[0].checkpointing
    monkeypatch.setenv("LLMKIT_MEMORY", str(fewer - 1))
    with pytest.raises(DoesNotFit, match=r"With batch_size=2 grad_accumulation=2 it takes"):
        settle(wanted)


def test_adapters_are_proposed_for_trained_models_only() -> None:
    facts, wanted = config_facts(read_config(SMOLLM), "small"), recipe(max_length=128, batch_size=1, checkpointing=True)
    change = cheaper_recipe(wanted, facts, 1_600_000_000)
    assert change is not None
    assert change.say == ("lora={}",)
    assert change.total == sum(predict(replace(wanted, lora=LoraRecipe()), facts).values())
    change = cheaper_recipe(replace(wanted, lora=LoraRecipe(), checkpointing=False), facts, 10**8)
    assert change is None
    scratch = recipe(max_length=128, model=SMOLLM, tokenizer={"vocab_size": 49152}, checkpointing=True)
    assert cheaper_recipe(scratch, facts, 1_600_000_000) is None


@settings(max_examples=40, deadline=None)
@given(available=st.integers(3 * 10**8, 6 * 10**9), batch=st.integers(1, 64), length=st.sampled_from([64, 512, 2048]))
def test_what_is_proposed_for_a_recipe_fits(available: int, batch: int, length: int) -> None:
    facts, wanted = config_facts(read_config(SMOLLM), "small"), recipe(max_length=length, batch_size=batch, checkpointing=False)
    fit = fit_recipe(wanted, facts, available, "cpu")
    change = fit.change
    if fit.fits or change is None:
        return
    assert change.total <= available
    keys = dict(word.split("=") for word in change.say)
    changed = recipe(
        checkpointing=False, **({"max_length": length, "batch_size": batch} | {k: int(v) for k, v in keys.items() if v.isdigit()})
    )
    if keys.keys() <= {"batch_size", "grad_accumulation", "max_length"}:
        assert sum(predict(changed, facts).values()) == change.total
        assert changed.batch_size * changed.grad_accumulation >= batch


def test_fewer_rows_come_before_shorter_ones() -> None:
    facts, wanted = config_facts(read_config(SMOLLM), "small"), recipe(max_length=512, batch_size=16, checkpointing=False)
    need = sum(predict(wanted, facts).values())
    change = cheaper_recipe(wanted, facts, int(0.7 * need))
    assert change is not None
    assert change.say == ("batch_size=8", "grad_accumulation=2")


def test_a_recipe_from_scratch(tmp_path: Path) -> None:
    model = {name: value for name, value in SMOLLM.items() if name != "vocab_size"}
    facts = recipe_facts(recipe(model=model, tokenizer={"vocab_size": 1000}, max_length=256))
    assert facts is not None
    assert facts.head == (1000, 576)
    assert facts.config.max_position_embeddings == 8192
    assert recipe_facts(recipe(model="not/here")) is None


TRAIN = """
import sys, json
from llmkit.planning.memory import measured_peak
from llmkit.training.recipe import from_dict
from llmkit.training.run import run_recipe
run_recipe(from_dict(json.loads(sys.argv[1])))
print(measured_peak())
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the constants were measured on Linux")
def test_predicted_and_measured_peaks_of_training(tmp_path: Path) -> None:
    model = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 12, "num_attention_heads": 8, "num_key_value_heads": 4}
    (tmp_path / "data.txt").write_text("\n".join(f"{n} times {n} is {n * n}.\n<|endoftext|>" for n in range(20_000)))
    wanted = {
        **{
            "model": SMOLLM | model | {"vocab_size": None},
            "tokenizer": {"vocab_size": 4096},
            "data": [{"path": str(tmp_path / "data.txt")}],
        },
        **{"output": str(tmp_path / "run"), "max_steps": 3, "eval_every": 0, "held_out": 0, "batch_size": 4, "max_length": 512},
    }
    done = subprocess.run([sys.executable, "-c", TRAIN, json.dumps(wanted)], capture_output=True, text=True, check=True)
    facts = recipe_facts(from_dict(wanted))
    assert facts is not None
    fit = fit_recipe(from_dict(wanted), facts, 10**12, "cpu")
    assert fit.total == pytest.approx(int(done.stdout.split()[-1]), rel=0.15)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or native_problem() is not None, reason="the constants were measured on Linux")
@pytest.mark.parametrize(
    "keys",
    [
        {"batch_size": 4},
        {"batch_size": 1},
        {"batch_size": 4, "checkpointing": True},
        {"batch_size": 4, "quantize": "q4"},
        {"batch_size": 1, "quantize": "nf4"},
        {"batch_size": 4, "quantize": "nf4", "checkpointing": True},
    ],
)
def test_predicted_and_measured_peaks_of_training_an_adapter(tmp_path: Path, keys: dict[str, Any]) -> None:
    """Beside a model of the width of SmolLM 135M."""
    (tmp_path / "data.txt").write_text("\n".join(f"{n} times {n} is {n * n}." for n in range(2000)))
    wanted = {
        **{"model": str(zeros_folder(tmp_path / "m", SMOLLM | {"num_hidden_layers": 12})), "tokenizer": str(embedded_model())},
        **{"data": [{"path": str(tmp_path / "data.txt")}], "output": str(tmp_path / "run"), "device": "cpu", "lora": {}},
        **{"max_steps": 2, "eval_every": 0, "held_out": 0, "max_length": 512, "checkpointing": False, **keys},
    }
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", TRAIN, json.dumps(wanted)], capture_output=True, text=True, check=True, env=environment)
    facts = recipe_facts(from_dict(wanted))
    assert facts is not None
    fit = fit_recipe(from_dict(wanted), facts, 10**12, "cpu")
    assert fit.total == pytest.approx(int(done.stdout.split()[-1]), rel=0.15)


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("8GB", 8 * 10**9),
        ("8 gb", 8 * 10**9),
        ("512MiB", 512 << 20),
        ("7.5G", 7_500_000_000),
        ("1000", 1000),
        ("1tib", 1 << 40),
        ("64kB", 64_000),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert memory.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "8 bananas", "-1GB", "0", "GB", "1e9", "8GBB", "nan", "0.1", "0.0001kB", "9" * 400, "9000000TiB"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match=r"is no amount of memory\. Write it as 8GB"):
        memory.parse_size(text)


def test_a_container_limits_what_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = memory.available_bytes()
    assert plain > 10**7
    for name, text in {"max": "1000000", "current": "900000", "stat": "anon 1\ninactive_file 50000\n"}.items():
        (tmp_path / name).write_text(text)
    paths = (*(str(tmp_path / name) for name in ("max", "current", "stat")), "inactive_file")
    monkeypatch.setattr(memory, "_CGROUPS", (paths,))
    assert memory.available_bytes() == 150_000
    (tmp_path / "max").write_text("max\n")
    assert memory.available_bytes() > 10**7


def test_what_a_person_says_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMKIT_MEMORY", "2GB")
    assert free("cpu") == 2 * 10**9
    assert free("cuda", "3GB") == 3 * 10**9
    monkeypatch.delenv("LLMKIT_MEMORY")
    assert free("cpu") == pytest.approx(memory.available_bytes(), rel=0.2)


def test_a_run_is_as_load_would_run_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLMKIT_KERNELS", raising=False)
    assert make_run(ONE_B, 10**7, "cpu") == Run(131_072, native=True)
    assert make_run(ONE_B, 100, "cuda:1") == Run(100, device="cuda:1", native=False)
    monkeypatch.setenv("LLMKIT_KERNELS", "reference")
    assert not make_run(ONE_B, 100, "cpu").native
    assert Fit("x", {"weights": 1}, 1).fits


# --- estimates --------------------------------------------------------------------------------------------------------


def test_expected_losses() -> None:
    """Chinchilla (70 billion parameters, 1.4 trillion tokens) by the original's constants, and the replication's floor."""
    assert estimate.expected_loss(70e9, 1.4e12, estimate.HOFFMANN) == pytest.approx(1.937, abs=0.001)
    assert estimate.expected_loss(1e30, 1e30) == pytest.approx(1.8172, abs=1e-4)


@pytest.mark.parametrize("parameters", [1e8, 1e9, 7e10])
def test_best_tokens(parameters: float) -> None:
    """About 20 for each parameter, and no other division of the same operations gives a lower loss."""
    tokens = estimate.best_tokens(parameters)
    assert 15 < tokens / parameters < 40
    least = estimate.expected_loss(parameters, tokens)
    for share in (0.5, 0.9, 1.1, 2.0):
        assert estimate.expected_loss(parameters * share, tokens / share) > least


def counted(folder: Path) -> int:
    """Operations of the matrix products of a forward and a backward pass over 64 tokens, as torch counts them."""
    with FlopCounterMode(display=False) as counter:
        load_model(folder)(torch.arange(64).view(1, 64) % 97).sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("variant", ["llama", "phi3", "gpt2", "qwen2", "mixtral"])
def test_operations_are_those_that_torch_counts(tmp_path: Path, variant: str) -> None:
    """torch does not count fused attention."""
    facts = read_facts(ModelSource.open(tiny_folder(tmp_path / "source", variant)))
    each = estimate.flops_per_token(facts, 0, lora=False)
    assert 64 * each == counted(tmp_path / "source")
    frozen = estimate.flops_per_token(facts, 0, lora=True)
    assert each - frozen == 2 * facts.active_parameters
    assert estimate.flops_per_token(facts, 0, lora=True, factors=100) == frozen + 600
    assert estimate.flops_per_token(facts, 0, lora=False, checkpointing=True) == each * 4 / 3


def test_operations_of_attention(tmp_path: Path) -> None:
    """Gemma 2's is computed in products that torch counts, over the whole square of which half is visible."""
    found = read_facts(ModelSource.open(tiny_folder(tmp_path / "source", "gemma2")))
    facts = replace(found, config=without_windows(found.config))
    weights, each = (estimate.flops_per_token(facts, length, lora=False) for length in (0, 64))
    assert 64 * 2 * (each - weights) == counted(tmp_path / "source") - 64 * weights


def test_measured_operations() -> None:
    assert 1e8 < estimate.measured_flops("cpu") < 1e14
