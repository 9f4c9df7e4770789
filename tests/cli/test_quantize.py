"""`llmkit quantize`, `convert` and `eval` as a person calls them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pexpect
import pytest

from llmkit.cli.main import run
from tests.tiny import TEXT, write_model

SLOW = """
import sys, time
from llmkit.checkpoint import quantize
from llmkit.cli.main import run
found = quantize.round_to_nearest
def slow(*arguments):
    time.sleep(0.2)
    return found(*arguments)
quantize.round_to_nearest = slow
sys.exit(run(sys.argv[1:]))
"""


def llmkit(*arguments: object, text: str = "") -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LLMKIT_")}
    command = [sys.executable, "-m", "llmkit", *map(str, arguments)]
    return subprocess.run(command, input=text, capture_output=True, text=True, env=environment | {"LLMKIT_DEVICE": "cpu"})


Said = Callable[..., tuple[int, str, str]]


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Said:
    """The same in this process: (exit code, standard output, standard error)."""
    for name in [name for name in os.environ if name.startswith("LLMKIT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("LLMKIT_DEVICE", "cpu")

    def call(*arguments: object) -> tuple[int, str, str]:
        code = run([*map(str, arguments)])
        out = capsys.readouterr()
        return code, out.out, out.err

    return call


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def quantized(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantized") / "q8"
    done = llmkit("quantize", model, "-o", folder, "--scheme", "q8")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(
        r".*/q8: q8, \d+\.\d\d bits per weight over the whole model, 0\.1 MB before, 0\.0 MB after, \d+\.\d s\n", done.stdout
    )
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(f"{TEXT}<|endoftext|>\n{TEXT[:70]}<|endoftext|>")
    return file


def test_a_quantized_folder_is_used_like_any_other(quantized: Path, model: Path) -> None:
    plain = ["-p", "Once upon", "--temp", "0", "-n", "12", "--ignore-eos"]
    done = llmkit("generate", quantized, *plain)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == llmkit("generate", model, *plain).stdout  # 8 bits change no greedy token of this model
    assert llmkit("chat", quantized, "-n", "5", "--ignore-eos", text="Hello").returncode == 0


def test_nf4(model: Path, tmp_path: Path) -> None:
    done = llmkit("quantize", model, "-o", tmp_path / "nf4", "--scheme", "nf4")
    assert done.returncode == 0
    assert re.fullmatch(r".*/nf4: nf4, \d+\.\d\d bits per weight over the whole model, .* s\n", done.stdout)
    assert "not whole blocks of 64" in done.stderr  # the tiny model's rows
    assert done.stderr.count("\n") == 1
    done = llmkit("generate", tmp_path / "nf4", "-p", "Once", "-n", "3", "--ignore-eos")
    assert done.returncode == 0
    assert "they do not run bitsandbytes' 4 bits; a folder of `llmkit quantize --scheme q4` is faster" in done.stderr
    assert done.stderr.count("\n") == 1


def test_errors_of_quantize(said: Said, model: Path, quantized: Path, tmp_path: Path) -> None:
    for arguments, code, message in (
        ([model], 2, "Missing option '-o' / '--output'"),
        ([model, "-o", tmp_path / "x", "--scheme", "q5"], 2, "'q5' is not one of 'q4', 'q8', 'nf4'"),
        ([model, "-o", tmp_path / "x", "--shceme", "q4"], 2, "Did you mean '--scheme'?"),
        ([model, "-o", tmp_path / "x", "-t", "0"], 2, "0 is not in the range"),
        ([model, "-o", quantized], 2, "exists and is not empty. Choose another folder, or replace it"),
        ([model, "-o", model, "--overwrite"], 2, "would be replaced while it is read"),
        ([quantized, "-o", tmp_path / "x"], 1, "is quantized already"),
        ([tmp_path / "nothing", "-o", tmp_path / "x"], 1, "nothing"),
        (["-o", tmp_path / "x"], 2, "Missing argument 'MODEL'"),
    ):
        found, out, err = said("quantize", *arguments)
        assert (found, out) == (code, ""), err
        assert err.startswith("error: ")
        assert message in err
        assert err.count("\n") == 1
    assert os.listdir(tmp_path) == []


def test_the_progress_bar_of_a_long_run(model: Path, tmp_path: Path) -> None:
    """On a terminal, after two seconds, and gone at the end; a pipe sees none of it."""
    command = ["-c", SLOW, "quantize", str(model), "-t", "1", "-o"]
    with subprocess.Popen([sys.executable, *command, tmp_path / "piped"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as piped:
        environment = {**os.environ, "TERM": "xterm"}
        arguments = [*command, str(tmp_path / "out")]
        child = pexpect.spawn(sys.executable, arguments, encoding="utf-8", timeout=60, dimensions=(40, 200), env=environment)
        child.expect(r"quantizing .*\d+%")
        assert "MB" not in child.before
        child.expect(r"out: q4, .* MB after")
        child.expect(pexpect.EOF)
        child.close()
        assert child.exitstatus == 0
        out, err = piped.communicate(timeout=60)
    assert (piped.returncode, err) == (0, b"")
    assert out.count(b"\n") == 1


def test_convert(model: Path, quantized: Path, tmp_path: Path) -> None:
    import gguf

    file = tmp_path / "m.gguf"
    done = llmkit("convert", model, "-o", file, "--to", "gguf:q8_0")
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r".*m\.gguf: 0\.\d MB, \d+ tensors \(.*Q8_0.*\)\n", done.stdout)
    assert done.stderr == ""
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors}
    assert types["blk.0.attn_q.weight"] == "Q8_0"
    assert types["output_norm.weight"] == "F32"
    done = llmkit("convert", quantized, "-o", tmp_path / "again.gguf", "--no-tokenizer")
    assert done.returncode == 0, done.stderr
    assert "F16" in done.stdout


def test_errors_of_convert(said: Said, model: Path, tmp_path: Path) -> None:
    (tmp_path / "there.gguf").write_text("precious")
    for arguments, code, message in (
        ([model], 2, "Missing option '-o' / '--output'"),
        ([model, "-o", tmp_path / "x", "--to", "gguf:q6_k"], 2, "is not one of"),
        ([model, "-o", tmp_path / "there.gguf"], 2, "exists. Choose another name, or replace it"),
        ([model, "-o", tmp_path], 2, "is a folder"),
        ([tmp_path / "nothing", "-o", tmp_path / "x"], 1, "nothing"),
    ):
        found, out, err = said("convert", *arguments)
        assert (found, out) == (code, ""), err
        assert err.startswith("error: ")
        assert message in err
        assert err.count("\n") == 1
    assert os.listdir(tmp_path) == ["there.gguf"]
    assert (tmp_path / "there.gguf").read_text() == "precious"


def test_eval_prints_one_flat_object(said: Said, model: Path, quantized: Path, text: Path) -> None:
    done = llmkit("eval", quantized, "--reference", model, "--text", text, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    result = json.loads(done.stdout)
    assert not any(isinstance(value, dict | list) for value in result.values())
    assert (result["documents"], result["model"], result["reference"]) == (2, str(quantized), str(model))
    assert 0 < result["mean_kl"] < result["kl_99"] < 0.1
    assert 0.9 < result["top1_agreement"] <= 1
    assert result["bits_per_byte"] == pytest.approx(result["reference_bits_per_byte"], rel=0.05)
    alone = json.loads(said("eval", model, "--text", text, "--json", "--separator", "", "-n", "30")[1])
    assert (alone["documents"], alone["tokens"], alone["mean_kl"]) == (1, 30, None)


def test_eval_prints_a_table(said: Said, model: Path, text: Path) -> None:
    code, out, err = said("eval", model, "--text", text, "--reference", model)
    assert (code, err) == (0, "")
    for label in ("perplexity", "bits per byte", "mean KL per token", "same likeliest token", "100.00%", "computed by"):
        assert label in out


def test_errors_of_eval(said: Said, model: Path, quantized: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "chat.jsonl").write_text('{"messages": [{"role": "user", "content": "Hi"}]}\n')
    (tmp_path / "bad.jsonl").write_text("{\n")
    (tmp_path / "latin.txt").write_bytes(b"\xff\xfe\xfa")
    (tmp_path / "short.txt").write_text(" ")
    for arguments, code, message in (
        ([model], 2, "Missing option '--text'"),
        ([model, "--text", tmp_path / "nowhere"], 2, "does not exist"),
        ([model, "--text", tmp_path / "empty.txt"], 2, "has no text"),
        ([model, "--text", tmp_path / "short.txt"], 2, "has no text"),
        ([model, "--text", tmp_path / "chat.jsonl"], 2, 'chat.jsonl:1 has no "text"'),
        ([model, "--text", tmp_path / "bad.jsonl"], 2, "bad.jsonl:1 is not JSON"),
        ([model, "--text", tmp_path / "latin.txt"], 2, "is not UTF-8"),
        ([model, "--text", text, "-c", "100000"], 2, "ctx_size 100000 is not between 2 and 4096"),
        ([model, "--text", text, "--reference", quantized], 2, "is quantized itself"),
        ([model, "--text", text, "--reference", tmp_path / "nothing"], 1, "nothing"),
    ):
        found, out, err = said("eval", *arguments)
        assert (found, out) == (code, ""), err
        assert err.startswith("error: ")
        assert message in err
        assert err.count("\n") == 1
