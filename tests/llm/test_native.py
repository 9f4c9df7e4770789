"""The Python API and the commands on the native kernels: what PyTorch says, without torch, and what is refused."""

from __future__ import annotations

import multiprocessing
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import llmkit
from llmkit import compat
from llmkit.checkpoint.arrays import converted
from llmkit.checkpoint.quantize import quantize_folder
from llmkit.errors import CheckpointError, UsageError
from llmkit.kernels import NativeBackend, native_problem
from llmkit.kernels.backend import default_threads
from llmkit.llm.api import LLM
from llmkit.model.backend import TorchBackend
from tests.cli.test_commands import Said, only_our_settings, said, shell  # noqa: F401 - fixtures
from tests.families.tiny import tiny_folder
from tests.tiny import write_model

pytestmark = pytest.mark.skipif(native_problem() is not None, reason=f"no native kernels: {native_problem()}")

GREEDY = {"temperature": 0, "max_tokens": 40, "ignore_eos": True}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One model in every way weights are stored."""
    root = tmp_path_factory.mktemp("stored")
    made = {}
    for dtype in ("float32", "float16", "bfloat16"):
        made[dtype] = write_model(root / dtype, torch_dtype=dtype, hidden_size=64, context=2048)
        tensors = load_file(made[dtype] / "model.safetensors")
        save_file({name: tensor.to(getattr(torch, dtype)) for name, tensor in tensors.items()}, made[dtype] / "model.safetensors")
    for scheme in ("q4", "q8"):
        made[scheme] = root / scheme
        quantize_folder(made["bfloat16"], made[scheme], scheme)
    return made


def in_torch(folder: Path, **arguments: object) -> LLM:
    """The same model, run by PyTorch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMKIT_KERNELS", "reference")
        return llmkit.load(folder, device="cpu", **arguments)  # type: ignore[arg-type]


def relative(ours: np.ndarray, reference: np.ndarray) -> float:
    return float(np.abs(ours - reference).max() / np.abs(reference).max())


@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
def test_replies_are_those_of_torch(folders: dict[str, Path], stored: str) -> None:
    native, torch_ = llmkit.load(folders[stored], device="cpu", kv_bits=32), in_torch(folders[stored])
    assert isinstance(native.backend, NativeBackend)
    assert isinstance(torch_.backend, TorchBackend)
    prompts = ["Once upon a time", "The dog ran to the ball", "a"]
    for one, other in zip(native.generate(prompts, **GREEDY), torch_.generate(prompts, **GREEDY), strict=True):
        assert (one.text, one.token_ids) == (other.text, other.token_ids)
    drawn = {"temperature": 0.9, "seed": 4, "max_tokens": 40}
    assert native.generate("Once", **drawn).token_ids == torch_.generate("Once", **drawn).token_ids
    assert native.chat("The dog", **GREEDY).text == torch_.chat("The dog", **GREEDY).text
    assert "".join(map(str, native.chat("The dog", stream=True, **GREEDY))) == torch_.chat("The dog", **GREEDY).text
    ids = np.random.default_rng(0).integers(0, native.config.vocab_size, 600).tolist()  # more than one chunk
    assert relative(native.logits(ids), torch_.logits(ids)) < 2e-5
    assert native.score(ids).token_logprobs == pytest.approx(torch_.score(ids).token_logprobs, abs=1e-4)


@pytest.mark.parametrize("scheme", ["q4", "q8"])
def test_quantized_replies_are_those_of_torch(tmp_path: Path, scheme: str) -> None:
    """On a trained model. Activations are rounded to 8 bits: where the last bit of a float32 sum decides how, both go apart by a step."""
    quantize_folder(llmkit.embedded_model(), tmp_path / scheme, scheme)
    native, torch_ = llmkit.load(tmp_path / scheme, device="cpu", kv_bits=32), in_torch(tmp_path / scheme)
    text = "Once upon a time there was a little girl named Lily. She had a dog and a ball. " * 4
    assert relative(native.logits(text), torch_.logits(text)) < 0.03
    assert relative(native.logits(text)[:1], torch_.logits(text)[:1]) < 2e-5
    assert native.score(text).perplexity == pytest.approx(torch_.score(text).perplexity, rel=0.01)
    assert native.generate("Once upon a time", **GREEDY).text == torch_.generate("Once upon a time", **GREEDY).text
    assert native.chat("a dog", **GREEDY).text == torch_.chat("a dog", **GREEDY).text


@pytest.mark.parametrize("stored", ["float32", "q4"])
def test_a_reply_does_not_depend_on_its_batch(folders: dict[str, Path], stored: str) -> None:
    """Bit for bit, so the greedy text and every log probability are those of the prompt alone."""
    llm = llmkit.load(folders[stored], device="cpu", speculate="off")
    prompts = ["Once upon a time", "The dog", "a ball and the sun was warm. The dog", "Once"]
    alone = [llm.generate(prompt, logprobs=2, **GREEDY) for prompt in prompts]
    together = llmkit.load(folders[stored], device="cpu", threads=1, speculate="ngram").generate(prompts, logprobs=2, **GREEDY)
    assert [one.token_ids for one in together] == [one.token_ids for one in alone]
    assert [one.logprobs for one in together] == [one.logprobs for one in alone]


def test_a_loaded_model_says_what_runs_it(folders: dict[str, Path]) -> None:
    kernels = r"native \w+, 2 threads, "
    assert re.search(rf"float32, {kernels}32-bit cache, context 2048", repr(llmkit.load(folders["float32"], device="cpu", threads=2)))
    assert re.search(rf"bfloat16, {kernels}16-bit cache", repr(llmkit.load(folders["bfloat16"], device="cpu", threads=2)))
    assert re.search(rf"q4.*, \d\.\d\d bits per weight, {kernels}16-bit cache", repr(llmkit.load(folders["q4"], device="cpu", threads=2)))
    assert re.search(r"bfloat16, PyTorch on cpu, \d+ threads?, 32-bit cache", repr(in_torch(folders["bfloat16"])))


PROGRAM = """
import sys, llmkit
llm = llmkit.load({model!r}, device="cpu", draft_model={draft!r})
llm.generate(["Once", "The dog"], max_tokens=9)
list(llm.chat("dog", stream=True, max_tokens=9))
llm.logits("Once"), llm.score("Once upon"), repr(llm)
heavy = {{"torch", "transformers", "tokenizers.tools", "scipy", "pandas"}} & set(sys.modules)
assert not heavy, heavy
"""


@pytest.mark.parametrize(("stored", "draft"), [("float32", None), ("bfloat16", "q4"), ("q4", None)])
def test_no_torch_is_imported_on_a_cpu(folders: dict[str, Path], stored: str, draft: str | None) -> None:
    program = PROGRAM.format(model=str(folders[stored]), draft=None if draft is None else str(folders[draft]))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


class TestWhereTheDeviceIsNotSaid:
    def test_without_a_driver_torch_is_not_asked(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(compat, "_may_have_gpu", lambda: False)
        monkeypatch.setitem(sys.modules, "torch", None)  # an import would raise
        assert compat.default_device() == "cpu"

    @pytest.mark.parametrize(("cuda", "mps", "expected"), [(True, False, "cuda"), (False, True, "mps"), (False, False, "cpu")])
    def test_with_one_torch_decides(self, monkeypatch: pytest.MonkeyPatch, cuda: bool, mps: bool, expected: str) -> None:
        monkeypatch.setattr(compat, "_may_have_gpu", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        assert compat.default_device() == expected

    def test_signs_of_a_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        asked = []

        def driver(name: str) -> object:
            asked.append(name)
            if driver_there:
                return object()
            raise OSError

        monkeypatch.setattr(compat.ctypes, "CDLL", driver)
        monkeypatch.setattr(compat.Path, "exists", lambda self: False)
        for platform, name in (("linux", "libcuda.so.1"), ("win32", "nvcuda.dll")):
            monkeypatch.setattr(compat.sys, "platform", platform)
            for driver_there in (True, False):
                assert compat._may_have_gpu() is driver_there
                assert asked.pop() == name
        monkeypatch.setattr(compat.sys, "platform", "darwin")
        for machine in ("arm64", "x86_64"):
            monkeypatch.setattr(compat.platform, "machine", lambda machine=machine: machine)
            assert compat._may_have_gpu() is (machine == "arm64")


class TestTheLineThatSaysWhyPyTorchRuns:
    def test_once_and_never_between_the_reply(self, folders: dict[str, Path]) -> None:
        line = "PyTorch runs the model, not the faster native kernels: LLMKIT_KERNELS=reference asks for PyTorch.\n"
        for more in ([], ["--draft-model", str(folders["float16"])]):
            arguments = ["chat", str(folders["float16"]), "--temp", "0", "-n", "20", *more]
            torch_, native = shell(*arguments, text="dog", LLMKIT_KERNELS="reference"), shell(*arguments, text="dog")
            assert (torch_.returncode, torch_.stdout, torch_.stderr) == (0, native.stdout, line)
            assert native.stderr == ""

    def test_what_the_native_step_lacks(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        llm = llmkit.load(tiny_folder(tmp_path / "moe", "mixtral"), device="cpu")
        assert isinstance(llm.backend, TorchBackend)
        assert [record.getMessage() for record in caplog.records] == [
            "PyTorch runs the model, not the faster native kernels: mixtures of experts are not part of the native step."
        ]

    def test_without_a_compiler(self, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
        native = llmkit.load(folders["q4"], device="cpu", kv_bits=32).generate("Once upon", **GREEDY)
        monkeypatch.setitem(sys.modules, "llmkit.kernels.cpu._native", None)
        monkeypatch.delattr("llmkit.kernels.cpu._native", raising=False)
        llm = llmkit.load(folders["q4"], device="cpu")
        assert isinstance(llm.backend, TorchBackend)
        assert "were not built (no C++ compiler" in caplog.text
        assert llm.generate("Once upon", **GREEDY).token_ids == native.token_ids

    def test_no_line_where_the_native_kernels_run(self, folders: dict[str, Path], caplog: pytest.LogCaptureFixture) -> None:
        llmkit.load(folders["q4"], device="cpu", draft_model=folders["float32"])
        assert not caplog.records


class TestDtype:
    @pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
    @pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
    def test_of_the_weights(self, folders: dict[str, Path], stored: str, dtype: str) -> None:
        llm = llmkit.load(folders[stored], device="cpu", dtype=dtype, kv_bits=32)
        assert llm.runner.stored == dtype
        assert relative(llm.logits([5, 6, 7, 8]), in_torch(folders[stored], dtype=dtype).logits([5, 6, 7, 8])) < 2e-5

    @pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
    def test_rounds_as_torch_does(self, dtype: str) -> None:
        generator = np.random.default_rng(1)
        bits = generator.integers(0, 2**32, 5000, dtype=np.uint32)  # all exponents, denormals, NaN
        ties = generator.integers(0, 2**16, 1000, dtype=np.uint32) << 16 | 0x8000
        usual = np.array([*generator.normal(size=3000), 0.0, -0.0, np.inf, 65519.9, 65520, 6e-8], np.float32)
        values = np.concatenate([bits, ties, usual.view(np.uint32)]).view(np.float32)
        expected = torch.from_numpy(values).to(getattr(torch, dtype))
        got = torch.from_numpy(converted(values, dtype, piece=999).view(np.int16 if dtype != "float32" else np.int32))
        assert torch.equal(got.view(getattr(torch, dtype)).isnan(), expected.isnan())
        number = ~expected.isnan()
        assert torch.equal(got[number], expected.view(got.dtype)[number])

    def test_has_no_effect_on_quantized_weights(self, folders: dict[str, Path], said: Said) -> None:  # noqa: F811
        with pytest.raises(UsageError, match=r"dtype 'float32' has no effect on a CPU where the weights are quantized.*Leave it out"):
            llmkit.load(folders["q4"], device="cpu", dtype="float32")
        assert said("generate", str(folders["q4"]), "-p", "a", "--dtype", "float16")[0] == 2
        llmkit.load(folders["float16"], device="cpu", dtype="float32", draft_model=folders["q4"])  # said of the model

    def test_that_there_is_not(self, folders: dict[str, Path]) -> None:
        with pytest.raises(UsageError, match=r"dtype 'float8' is unknown. Use one of float32, float16, bfloat16"):
            llmkit.load(folders["float32"], device="cpu", dtype="float8")


class TestCache:
    def test_fewer_bits_change_little(self) -> None:
        text = "Once upon a time there was a little girl named Lily. She had a dog and a ball. " * 4
        exact = llmkit.load(llmkit.embedded_model(), device="cpu", dtype="float32").logits(text)
        for bits, least, most in ((32, 0.0, 0.0), (16, 1e-6, 2e-3), (8, 1e-4, 5e-2)):
            llm = llmkit.load(llmkit.embedded_model(), device="cpu", dtype="float32", kv_bits=bits)
            assert f"{bits}-bit cache" in repr(llm)
            assert least <= relative(llm.logits(text), exact) <= most

    def test_option(self, folders: dict[str, Path], said: Said, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
        arguments = ("generate", str(folders["bfloat16"]), "-p", "Once upon", "--temp", "0", "-n", "20")
        usual = said(*arguments)
        assert usual[0] == 0
        assert said(*arguments, "--kv-bits", "16") == usual
        assert said(*arguments, "--kv-bits", "8")[0] == 0
        code, _, err = said(*arguments, "--kv-bits", "4")
        assert (code, err.count("\n")) == (2, 1)
        monkeypatch.setenv("LLMKIT_KV_BITS", "12")
        assert said(*arguments)[0] == 2

    @pytest.mark.parametrize("bits", [4, 0, "8", 16.0, True])
    def test_what_it_cannot_be(self, folders: dict[str, Path], bits: object) -> None:
        with pytest.raises(UsageError, match=r"kv_bits is .*; a cached number has 32, 16 or 8 bits"):
            llmkit.load(folders["q4"], device="cpu", kv_bits=bits)  # type: ignore[arg-type]

    def test_torch_has_only_its_own(self, folders: dict[str, Path]) -> None:
        assert in_torch(folders["q4"], kv_bits=32)
        with pytest.raises(UsageError, match=r"kv_bits 8 needs the native kernels, and LLMKIT_KERNELS=reference .* 32 bits. Leave"):
            in_torch(folders["q4"], kv_bits=8)


class TestThreads:
    def test_any_number_gives_the_same_bits(self, folders: dict[str, Path]) -> None:
        ids = list(range(5, 60))
        expected = llmkit.load(folders["q4"], device="cpu", threads=1).logits(ids)
        for threads in (2, 3, 4 * (os.cpu_count() or 1) + 1):
            llm = llmkit.load(folders["q4"], device="cpu", threads=threads)
            assert f"{threads} threads" in repr(llm)
            np.testing.assert_array_equal(llm.logits(ids), expected)

    def test_default_and_environment(self, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
        assert llmkit.load(folders["q4"], device="cpu").backend.threads == default_threads()
        monkeypatch.setenv("LLMKIT_THREADS", "3")
        assert llmkit.load(folders["q4"], device="cpu").backend.threads == 3
        assert llmkit.load(folders["q4"], device="cpu", threads=1).backend.threads == 1
        for wrong in ("0", "many", "-1", "²"):
            monkeypatch.setenv("LLMKIT_THREADS", wrong)
            with pytest.raises(UsageError, match=r"LLMKIT_THREADS is .*; it must be an integer from 1 to 1024"):
                llmkit.load(folders["q4"], device="cpu")

    @pytest.mark.parametrize("threads", [0, -1, 1.5, "2", True, 1025, 10**12])
    def test_what_they_cannot_be(self, folders: dict[str, Path], threads: object) -> None:
        with pytest.raises(UsageError, match=r"threads is .*; it must be an integer from 1 to 1024"):
            llmkit.load(folders["q4"], device="cpu", threads=threads)  # type: ignore[arg-type]


def test_two_models_at_once(folders: dict[str, Path]) -> None:
    models = [llmkit.load(folders[stored], device="cpu") for stored in ("float32", "q4", "q8")]
    alone = [llm.generate("Once upon a time", **GREEDY).token_ids for llm in models]
    with ThreadPoolExecutor(6) as pool:
        asked = [pool.submit(llm.generate, "Once upon a time", **GREEDY) for _ in range(4) for llm in models]
        assert [reply.result().token_ids for reply in asked] == alone * 4


def reply_in_child(llm: LLM, out: Connection) -> None:
    out.send(llm.generate("Once upon a time", **GREEDY).token_ids)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_fork_after_use(folders: dict[str, Path]) -> None:
    llm = llmkit.load(folders["q4"], device="cpu", threads=2)
    expected = llm.generate("Once upon a time", **GREEDY).token_ids
    ours, theirs = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(target=reply_in_child, args=(llm, theirs))
    child.start()
    assert ours.poll(30), "the child does not answer"
    assert ours.recv() == expected
    child.join(30)
    assert child.exitcode == 0
    assert llm.generate("Once upon a time", **GREEDY).token_ids == expected


def damaged(folder: Path, target: Path, cut: int) -> Path:
    target.mkdir()
    for file in folder.iterdir():
        data = file.read_bytes()
        (target / file.name).write_bytes(data[:cut] if file.name == "model.safetensors" else data)
    return target


@pytest.mark.parametrize("cut", [0, 7, 100, 5000, -1])
def test_a_truncated_folder_is_an_error(folders: dict[str, Path], tmp_path: Path, said: Said, cut: int) -> None:  # noqa: F811
    folder = damaged(folders["q4"], tmp_path / "cut", cut)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        llmkit.load(folder, device="cpu")
    code, out, err = said("generate", str(folder), "-p", "a")
    assert (code, out, err.count("error: ")) == (1, "", 1)
