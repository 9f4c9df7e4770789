"""Quantizing folder to folder: what is read back is what was chosen, for every family; faults leave nothing half-written."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmkit.checkpoint.arrays import parameter_shapes, parse_fingerprint
from llmkit.checkpoint.files import open_checkpoint, read_json
from llmkit.checkpoint.load import load_model, load_model_with_report
from llmkit.checkpoint.quantize import quantize_folder
from llmkit.checkpoint.save import save_model
from llmkit.checkpoint.source import ModelSource
from llmkit.errors import CheckpointError, ConfigError, LLMKitError, UsageError
from llmkit.families import read_config
from llmkit.kernels import NativeBackend, native_problem
from llmkit.kernels.format import CODEBOOK, QuantizedMatrix
from llmkit.model.backend import TorchBackend
from llmkit.quant.linears import QuantizedEmbedding, QuantizedLinear
from llmkit.quant.methods import round_to_nearest
from llmkit.quant.schemes import choose
from tests.families.tiny import VARIANTS, tiny_folder
from tests.kernels.test_native import logits
from tests.tiny import quantize_model, write_model

from . import raw

FILE = "model.safetensors"
Tensors = dict[str, tuple[str, list[int], bytes]]


def stored(folder: Path) -> Tensors:
    return {name: (tensor.dtype, list(tensor.shape), bytes(tensor.data)) for name, tensor in open_checkpoint(folder).items()}


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in 4 bits; tests copy it before they damage it."""
    folder = tmp_path_factory.mktemp("quantized")
    quantize_folder(tiny_folder(folder / "source"), folder / "q4")
    return folder / "q4"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny model of a variant, made once."""
    root = tmp_path_factory.mktemp("tiny")
    return lambda variant: root / variant if (root / variant).exists() else tiny_folder(root / variant, variant)


# --- what is written is what is read ----------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["q4", "q8"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_round_trip(tmp_path: Path, tiny: Callable[[str], Path], variant: str, scheme: str) -> None:
    source = tiny(variant)
    report = quantize_folder(source, tmp_path / "out", scheme)
    original = dict(load_model(source).named_parameters())
    source = ModelSource.open(tmp_path / "out")
    config, weights = source.config, source.weights()
    assert weights.keys() == original.keys()
    assert config.layers == load_model(source).config.layers
    modules = dict(load_model(tmp_path / "out").named_modules())
    for name, parameter in original.items():
        weight, choice = weights[name], choose(scheme, config.parameters[name])
        if choice is None:
            assert isinstance(weight, np.ndarray)
            np.testing.assert_array_equal(weight, parameter.detach().numpy())
            continue
        assert isinstance(weight, QuantizedMatrix)
        assert (weight.scheme, weight.group) == (choice.scheme, choice.group)
        expected = round_to_nearest(parameter.detach(), choice.scheme, choice.group)
        for part in ("codes", "scales", "row_scale"):
            np.testing.assert_array_equal(getattr(weight, part), getattr(expected, part))
        module = modules[name.removesuffix(".weight")]
        assert isinstance(module, QuantizedLinear | QuantizedEmbedding)
        assert torch.equal(module.dequantize(), torch.from_numpy(weight.dequantize()))
    assert report.weights == sum(parameter.numel() for parameter in original.values())
    assert report.bytes_after == sum(tensor.nbytes for tensor in open_checkpoint(tmp_path / "out").values())
    assert report.bits_per_weight == 8 * report.bytes_after / report.weights


@pytest.mark.parametrize("scheme", ["q4", "q8"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits(tmp_path: Path, tiny: Callable[[str], Path], variant: str, scheme: str) -> None:
    """The folder computes what the model quantized in memory computes, with kernels and without."""
    source = tiny(variant)
    quantize_folder(source, tmp_path / "out", scheme)
    ids = np.random.default_rng(0).integers(0, 97, 40)
    in_memory, mapped = load_model(source), load_model(tmp_path / "out")
    original = logits(TorchBackend(load_model(source)), ids)
    quantize_model(in_memory, in_memory.config.parameters, scheme)
    found = logits(TorchBackend(mapped), ids)
    np.testing.assert_array_equal(found, logits(TorchBackend(in_memory), ids))
    errors = np.linalg.norm(found - original, axis=1) / np.linalg.norm(original, axis=1)
    # Few columns are the worst case; the median, because an expert that is chosen otherwise changes a row altogether.
    bound = 0.1 if scheme == "q8" else 0.8
    if (variant, scheme) == ("mixtral", "q8") and np.median(errors) >= bound:
        pytest.xfail("known: activations scaled by powers of two are rounded more coarsely than this bound allows")
    assert 0 < np.median(errors) < bound
    source = ModelSource.open(tmp_path / "out")
    config, weights = source.config, source.weights()
    if native_problem(config) is None:
        # A number half-way between two integers may be rounded either way, and that goes through all that follows.
        differences = np.abs(logits(NativeBackend(config, weights), ids) - found).max(-1) / np.abs(found).max()
        assert np.median(differences) < 1e-4
        assert differences.max() < 0.02


@pytest.mark.parametrize("scheme", ["q4", "q8", "nf4"])
@pytest.mark.parametrize("variant", ["llama", "phi3", "gpt2", "mixtral", "qwen2"])
def test_quantizing_while_loading(tmp_path: Path, tiny: Callable[[str], Path], variant: str, scheme: str) -> None:
    """What quantizing the loaded model gives, matrix by matrix."""
    save_model(load_model(tiny(variant)), tmp_path / "half", dtype="bfloat16")
    expected = load_model(tmp_path / "half")
    quantize_model(expected, expected.config.parameters, scheme)
    found, report = load_model_with_report(tmp_path / "half", quantize=scheme)
    assert found.state_dict().keys() == expected.state_dict().keys()
    assert all(torch.equal(tensor, expected.state_dict()[name]) for name, tensor in found.state_dict().items())
    assert report.dtype == f"{scheme} and bfloat16"
    assert report.num_parameters == sum(parameter.numel() for parameter in load_model(tiny(variant)).parameters())
    ids = torch.arange(20).view(1, -1)
    with torch.no_grad():
        assert torch.equal(found(ids), expected(ids))
    quantize_folder(tiny(variant), tmp_path / "out", scheme)
    with pytest.raises(UsageError, match=f"quantize '{scheme}' has no effect: the weights in .* are quantized already.*quantize=null"):
        load_model(tmp_path / "out", quantize=scheme)
    with pytest.raises(UsageError, match="scheme 'q5' is unknown"):
        load_model(tmp_path / "half", quantize="q5")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_dtypes_of_the_source(tmp_path: Path, dtype: str) -> None:
    source = tiny_folder(tmp_path / "source")
    save_model(load_model(source), tmp_path / dtype, dtype=dtype)
    report = quantize_folder(tmp_path / dtype, tmp_path / "out")
    expected = load_model(tmp_path / dtype, "float32")
    quantize_model(expected, expected.config.parameters)
    ids = torch.arange(20).view(1, -1)
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path / "out")(ids), expected(ids))
    assert report.bytes_before == sum(tensor.nbytes for tensor in open_checkpoint(tmp_path / dtype).values())


@pytest.mark.parametrize("variant", ["llama", "gpt2", "phi3", "mixtral"])
def test_shards_make_no_difference(tmp_path: Path, variant: str) -> None:
    source = tiny_folder(tmp_path / "source", variant)
    save_model(load_model(source), tmp_path / "shards", max_shard_bytes=10_000)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    quantize_folder(source, tmp_path / "a")
    quantize_folder(tmp_path / "shards", tmp_path / "b")
    assert (tmp_path / "a" / FILE).read_bytes() == (tmp_path / "b" / FILE).read_bytes()


def test_threads_make_no_difference(tmp_path: Path) -> None:
    sizes = {"vocab_size": 12_000, "hidden_size": 384, "num_attention_heads": 4, "num_hidden_layers": 1}
    source = tiny_folder(tmp_path / "source", **sizes)  # several blocks of rows
    before = torch.get_num_threads()
    for threads in (1, 2, 5):
        quantize_folder(source, tmp_path / str(threads), threads=threads)
    assert len({(tmp_path / str(threads) / FILE).read_bytes() for threads in (1, 2, 5)}) == 1
    assert torch.get_num_threads() == before


def test_the_folder(tmp_path: Path) -> None:
    source = write_model(tmp_path / "source", auto_map={"AutoModel": "x.Y"})
    (source / "notes.txt").write_text("not of the model")
    quantize_folder(source, tmp_path / "new" / "out")
    out = tmp_path / "new" / "out"
    assert names(out) == ["config.json", "generation_config.json", FILE, "tokenizer.json", "tokenizer_config.json"]
    config = read_json(out / "config.json")
    record = config.pop("quantization_config")
    assert parse_fingerprint(config.pop("llmkit_source")) == ModelSource.open(source).fingerprint
    assert config == {name: value for name, value in read_json(source / "config.json").items() if name != "auto_map"}
    assert (record["quant_method"], record["version"], record["codebook"]) == ("llmkit", 1, list(CODEBOOK))
    assert record["tensors"]["model.embed_tokens.weight"] == {"scheme": "q4", "group": 16, "shape": [config["vocab_size"], 32]}
    tensors = open_checkpoint(out)
    assert all(tensor.offset % 64 == 0 for name, tensor in tensors.items() if not name.startswith("padding."))
    assert not any(name.startswith("padding.") for name in ModelSource.open(out).weights())
    _, report = load_model_with_report(out)
    assert report.mapped_bytes > 0
    assert report.dtype == "q4, q8 and float32"


def test_progress_counts_every_weight_once(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    source = tiny_folder(tmp_path / "source")
    report = quantize_folder(source, tmp_path / "out", progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    assert {total for _, total in seen} == {report.weights} == {seen[-1][0]}


MEASURE = """
import sys, threading, time, torch
from llmkit.checkpoint.quantize import quantize_folder
def anonymous():
    return int(open("/proc/self/status").read().split("RssAnon:")[1].split()[0]) * 1024
quantize_folder(sys.argv[2], sys.argv[3] + "-small")  # threads and buffers are there
peak, done = base, end = anonymous(), False
def watch():
    global peak
    while not end:
        peak = max(peak, anonymous())
        time.sleep(0.002)
thread = threading.Thread(target=watch)
thread.start()
quantize_folder(sys.argv[1], sys.argv[3], threads=2)
end = True
thread.join()
print(peak - base)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the memory of a process as Linux counts it")
def test_memory_is_far_below_the_model(tmp_path: Path) -> None:
    """160 MB of bfloat16 zeros, most of them in two matrices, of which no byte is stored."""
    source, config = tmp_path / "source", raw.LLAMA | {"vocab_size": 50_000, "hidden_size": 768, "tie_word_embeddings": False}
    source.mkdir()
    (source / "config.json").write_text(json.dumps(config))
    header, end = {}, 0
    for name, shape in parameter_shapes(read_config(config)).items():
        size = 2 * math.prod(shape)
        header[name] = raw.entry("BF16", list(shape), end, end + size)
        end += size
    text = json.dumps(header).encode()
    encoded = raw.encode(text + b" " * (-len(text) % 8))  # aligned, as every writer does it: what is not must be copied to be read
    with (source / FILE).open("wb") as file:
        file.write(encoded)
        file.truncate(len(encoded) + end)
    command = [sys.executable, "-c", MEASURE, source, tiny_folder(tmp_path / "small"), tmp_path / "out"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True)
    assert end > 150_000_000
    assert int(done.stdout) < 40_000_000


# --- targets ----------------------------------------------------------------------------------------------------------


def test_targets(tmp_path: Path) -> None:
    source = tiny_folder(tmp_path / "source")
    quantize_folder(source, tmp_path / "out")
    before = (tmp_path / "out" / FILE).read_bytes()
    with pytest.raises(UsageError, match="exists and is not empty"):
        quantize_folder(source, tmp_path / "out", "q8")
    assert (tmp_path / "out" / FILE).read_bytes() == before
    (tmp_path / "out" / "old.txt").touch()
    quantize_folder(source, tmp_path / "out", "q8", overwrite=True)
    assert names(tmp_path / "out") == ["config.json", "generation_config.json", FILE]
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="is a file"):
        quantize_folder(source, tmp_path / "file", overwrite=True)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "precious.txt").touch()
    with pytest.raises(UsageError, match="not a model folder"):
        quantize_folder(source, tmp_path / "home", overwrite=True)
    assert names(tmp_path) == ["file", "home", "out", "source"]


@pytest.mark.parametrize("alias", ["source", "source/.", "link"])
def test_the_source_is_not_replaced(tmp_path: Path, alias: str) -> None:
    source = tiny_folder(tmp_path / "source")
    (tmp_path / "link").symlink_to(source)
    before = stored(source)
    with pytest.raises(UsageError, match="would be replaced while it is read"):
        quantize_folder(source, tmp_path / alias, overwrite=True)
    assert stored(source) == before


def test_a_folder_around_the_source_is_not_replaced(tmp_path: Path) -> None:
    """It would be renamed away and removed, and the source with it."""
    source = tiny_folder(tmp_path / "model" / "original")
    shutil.copy(source / "config.json", tmp_path / "model")
    with pytest.raises(UsageError, match="would be replaced while it is read"):
        quantize_folder(source, tmp_path / "model", overwrite=True)
    assert names(tmp_path / "model") == ["config.json", "original"]


def test_what_is_quantized_is_not_quantized_again(tmp_path: Path, quantized: Path) -> None:
    with pytest.raises(CheckpointError, match="is quantized already, and quantizing again only loses more"):
        quantize_folder(quantized, tmp_path / "again")
    assert names(tmp_path) == []
    with pytest.raises(UsageError, match="a quantized model is not saved from memory"):
        save_model(load_model(quantized), tmp_path / "again")


def test_sources_that_are_wrong(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="scheme 'q5' is unknown"):
        quantize_folder(tmp_path, tmp_path / "out", "q5")
    with pytest.raises(LLMKitError):
        quantize_folder(tmp_path / "nowhere", tmp_path / "out")
    source = raw.llama_folder(tmp_path / "source")
    tensors = raw.llama_tensors()
    del tensors["model.norm.weight"]
    raw.llama_folder(source, tensors | {"x": raw.floats([2], 0.0)})
    with pytest.raises(CheckpointError, match=r"(?s)missing.*model\.norm\.weight"):
        quantize_folder(source, tmp_path / "out")
    foreign = raw.llama_folder(tmp_path / "foreign", quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(CheckpointError, match="is quantized \\('gptq'\\), which llmkit does not read"):
        quantize_folder(foreign, tmp_path / "out")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors = raw.llama_tensors()
    tensors[name] = raw.floats([6, 4], float("nan"))
    with pytest.raises(CheckpointError, match=rf"{name} cannot be quantized: row 0 has values that are not finite"):
        quantize_folder(raw.llama_folder(tmp_path / "nan", tensors), tmp_path / "out")
    assert names(tmp_path) == ["foreign", "nan", "source"]


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of a file as Linux does")
def test_a_disk_that_is_full(tmp_path: Path) -> None:
    """A file may not grow beyond 100 KB: writing fails as on a full disk."""
    source = write_model(tmp_path / "source", vocab_size=8000)
    program = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); "
        "from llmkit.cli.main import run; sys.exit(run(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "quantize", str(source), "-o", str(tmp_path / "new" / "out")], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: Cannot save to ")
    assert "Nothing was written; free space" in done.stderr
    assert names(tmp_path) == ["source"]


SLOW = """
import sys, time
from llmkit.checkpoint import quantize
from llmkit.cli.main import run
found = quantize.round_to_nearest
def slow(*arguments):
    print("working", flush=True)
    time.sleep(0.5)
    return found(*arguments)
quantize.round_to_nearest = slow
sys.exit(run(sys.argv[1:]))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_stopped_in_the_middle(tmp_path: Path, number: signal.Signals, quantized: Path) -> None:
    """The target is as it was. Ctrl-C also takes away what was begun; kill -9 leaves a hidden folder that is no model."""
    source = tiny_folder(tmp_path / "source")
    shutil.copytree(quantized, tmp_path / "out")
    before = stored(tmp_path / "out")
    command = [sys.executable, "-c", SLOW, "quantize", str(source), "-o", str(tmp_path / "out"), "--overwrite"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "working\n"
        time.sleep(0.7)
        process.send_signal(number)
        assert process.wait(10) == (130 if number == signal.SIGINT else -number)
        assert process.stderr.read().strip() == ""
    assert stored(tmp_path / "out") == before
    left = [name for name in names(tmp_path) if name not in ("out", "source")]
    if number == signal.SIGINT:
        assert left == []
    else:
        assert [name.startswith(".out.") and name.endswith(".partial") for name in left] == [True]


# --- damaged folders --------------------------------------------------------------------------------------------------


def both_refuse(folder: Path, message: str) -> None:
    for read in (lambda folder: ModelSource.open(folder).weights(), load_model):
        with pytest.raises((CheckpointError, ConfigError), match=message):
            read(folder)


@pytest.fixture
def folder(tmp_path: Path, quantized: Path) -> Path:
    return Path(shutil.copytree(quantized, tmp_path / "q4"))


def change_record(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.update(version=2), r"quantized by a newer llmkit \(format 2; this one reads 1\). Update llmkit"),
        (lambda r: r.update(version="1"), "version cannot be '1'"),
        (lambda r: r.update(version=0), "version cannot be 0"),
        (lambda r: r.update(version=True), "version cannot be True"),
        (lambda r: r.update(quant_method="awq"), r"quantized \('awq'\), which llmkit does not read"),
        (lambda r: r.update(codebook=list(range(15))), "16 numbers from 0 to 127"),
        (lambda r: r.update(codebook=[*range(15), 128]), "16 numbers from 0 to 127"),
        (lambda r: r.update(codebook=[*range(15), 1.5]), "16 numbers from 0 to 127"),
        (lambda r: r.update(codebook=[*range(15), True]), "16 numbers from 0 to 127"),
        (lambda r: r.pop("codebook"), "codebook is None"),
        (lambda r: r.update(tensors={}), "there are no tensors"),
        (lambda r: r.update(tensors=[1]), "there are no tensors"),
        (lambda r: r["tensors"].update({Q_PROJ: 5}), "the entry of 'model.layers.1.self_attn.q_proj.weight' is 5"),
        (lambda r: r["tensors"][Q_PROJ].update(scheme="q2"), "the scheme 'q2' is unknown|The scheme 'q2' is unknown"),
        (lambda r: r["tensors"][Q_PROJ].update(group=64), "groups of 16 or 32, not 64"),
        (lambda r: r["tensors"][Q_PROJ].update(shape=[24, "24"]), "the shape of"),
        (lambda r: r["tensors"][Q_PROJ].update(shape=[24, 2**50]), "cannot have the shape"),
        (lambda r: r["tensors"][Q_PROJ].update(shape=[24, 25]), rf"wrong shape: {Q_PROJ} needs \[24, 24\], .* has \[24, 25\]"),
        (lambda r: r["tensors"].pop(Q_PROJ), rf"(?s)missing: {Q_PROJ} \[24, 24\].*surplus: '{Q_PROJ}.codes'"),
        (lambda r: r["tensors"].update(x=r["tensors"][Q_PROJ]), "surplus: 'x' in quantization_config"),
    ],
)
def test_damaged_records(folder: Path, change: Callable[[dict[str, Any]], object], message: str) -> None:
    change_record(folder, change)
    both_refuse(folder, message)


def test_learned_positions_in_codes(tmp_path: Path) -> None:
    """No scheme stores them so, and nothing could run them."""
    quantize_folder(tiny_folder(tmp_path / "source", "gpt2"), tmp_path / "q8", "q8")
    tensors, name = stored(tmp_path / "q8"), "model.embed_positions.weight"
    shape = tensors.pop(name)[1]
    matrix = round_to_nearest(torch.ones(shape), "q8")
    codes, scales = (("I8", list(array.shape), array.tobytes()) for array in (matrix.codes, matrix.scales))
    row_scale = raw.floats(list(matrix.row_scale.shape), 1.0)
    raw.write(tmp_path / "q8" / FILE, tensors | {f"{name}.codes": codes, f"{name}.scales": scales, f"{name}.row_scale": row_scale})
    change_record(tmp_path / "q8", lambda r: r["tensors"].update({name: {"scheme": "q8", "group": 32, "shape": shape}}))
    both_refuse(tmp_path / "q8", f"never quantized: '{name}'")


def test_everything_that_is_wrong_is_named_at_once(folder: Path) -> None:
    tensors = stored(folder)
    prefix = "model.layers.0."
    del tensors[f"{prefix}mlp.up_proj.weight.scales"]
    del tensors["model.norm.weight"]
    tensors["stranger"] = raw.floats([3], 1.0)
    codes = f"{prefix}self_attn.q_proj.weight.codes"
    tensors[codes] = ("I8", tensors[codes][1], tensors[codes][2])
    scales = f"{prefix}self_attn.o_proj.weight.scales"
    tensors[scales] = ("I8", [1, *tensors[scales][1]], tensors[scales][2])
    tensors["model.layers.2.input_layernorm.weight"] = raw.floats([23], 1.0)
    raw.write(folder / FILE, tensors)
    with pytest.raises(CheckpointError) as caught:
        ModelSource.open(folder).weights()
    text = str(caught.value)
    for part in (
        *(f"missing: {prefix}mlp.up_proj.weight.scales", "missing: model.norm.weight [24]", "surplus: 'stranger' [3]"),
        *(f"wrong shape or dtype: {codes} is I8", f"wrong shape or dtype: {scales} is I8 [1, "),
        "wrong shape or dtype: model.layers.2.input_layernorm.weight is F32 [23]",
    ):
        assert part in text
    assert text.endswith("Download or copy the folder again, or correct config.json.")
    both_refuse(folder, "do not fit its config.json")


def test_truncated_files(folder: Path) -> None:
    whole = (folder / FILE).read_bytes()
    for size in (0, 4, 8, 100, len(whole) // 2, len(whole) - 1):
        (folder / FILE).write_bytes(whole[:size])
        both_refuse(folder, FILE)
    (folder / FILE).unlink()
    both_refuse(folder, "safetensors")


def test_bytes_that_have_changed_are_weights_all_the_same(folder: Path) -> None:
    """Values are not checked, so a damaged file may say anything, but it computes."""
    data = bytearray((folder / FILE).read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    data[start:] = np.random.default_rng(0).bytes(len(data) - start)
    (folder / FILE).write_bytes(data)
    ids = np.arange(20)
    with np.errstate(all="ignore"):
        assert logits(TorchBackend(load_model(folder)), ids).shape == (20, 97)
    source = ModelSource.open(folder)
    config, weights = source.config, source.weights()
    if native_problem(config) is None:
        assert logits(NativeBackend(config, weights), ids).shape == (20, 97)


VALUES = st.recursive(
    st.one_of(st.integers(-(2**70), 2**70), st.booleans(), st.floats(), st.none(), st.text(max_size=3)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.sampled_from(["quant_method", "version", "codebook", "tensors", "scheme", "group", "shape"]), value=VALUES)
def test_any_record_is_read_or_refused(folder: Path, quantized: Path, place: str, value: object) -> None:
    shutil.copyfile(quantized / "config.json", folder / "config.json")
    change_record(folder, lambda r: (r["tensors"][Q_PROJ] if place in ("scheme", "group", "shape") else r).update({place: value}))
    try:
        ModelSource.open(folder).weights()
    except LLMKitError as error:
        str(error).encode()
