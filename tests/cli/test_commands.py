"""The commands as they are called from a shell: output, pipes, errors, exit codes."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from llmkit.cli.main import run
from tests.tiny import write_model

ANSI = "\x1b["


Said = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def only_our_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("LLMKIT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("LLMKIT_DEVICE", "cpu")


def shell(*arguments: str, text: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """`llmkit ARGUMENTS` in a process of its own, with `text` on its standard input."""
    return subprocess.run(
        [sys.executable, "-m", "llmkit", *arguments], input=text, capture_output=True, text=True, env={**os.environ, **environment}
    )


class Piped:
    """Standard input that is not a terminal."""

    def __init__(self, text: str) -> None:
        self.buffer = io.BytesIO(text.encode())

    def isatty(self) -> bool:
        return False


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Said:
    """Run a command in this process: (exit code, standard output, standard error)."""

    def call(*arguments: str, text: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", Piped(text))
        code = run(arguments)
        out = capsys.readouterr()
        return code, out.out, out.err

    return call


def test_help_and_version(said: Said) -> None:
    code, out, _ = said("--help")
    assert code == 0
    for command in ("chat", "generate", "verify", "bench", "train", "finetune"):
        assert f"  {command} " in out
    assert said("--version")[1].startswith("llmkit, version 0.")
    for command in ("chat", "generate", "verify", "bench", "train"):
        code, out, _ = said(command, "--help")
        assert code == 0
        assert "Usage: llmkit" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["chta"], "error: No such command 'chta'. Did you mean 'chat'?"),
        (["generate", "x", "--tempreture", "1"], "error: No such option '--tempreture'. Did you mean '--temperature'?"),
        (["generate"], "error: Missing argument 'MODEL': a folder or a hub id."),
        (["generate", "x", "-m", "y"], "error: two models were given, 'x' and 'y'"),
        (["generate", "x", "-p", "a", "-f", "b"], "error: -p and -f both give the prompt"),
        (["generate", "x", "-s", "a"], "error: --system has no effect without --chat."),
        (["generate", "x", "--chat-template", "a"], "error: --chat-template has no effect without --chat."),
        (["generate", "x", "--logprobs", "1"], "error: --logprobs has no effect without --json."),
        (["generate", "x", "--logit-bias", "a"], "is not ID=BIAS"),
        (["chat", "x"], "error: the message is empty"),
        (["generate", "TINY", "--temp", "0", "--top-p", "0.5"], "error: --top-p has no effect at temperature 0"),
        (["generate", "TINY", "--temp", "-1"], "temperature"),
        (["generate", "TINY", "--ctx-size", "5000"], "ctx_size 5000"),
        (["verify", "TINY", "--length", "5000"], "length 5000"),
    ],
)
def test_usage_errors(said: Said, tiny_model_dir: Path, arguments: list[str], message: str) -> None:
    code, out, err = said(*[str(tiny_model_dir) if a == "TINY" else a for a in arguments])
    assert code == 2
    assert message in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert out == ""


def test_failures_have_code_1(said: Said, tmp_path: Path, tiny_model_dir: Path) -> None:
    code, out, err = said("generate", str(tmp_path))
    assert (code, out) == (1, "")
    assert err.startswith("error: ")
    assert "Traceback" not in err
    code, _, err = said("generate", str(tiny_model_dir), "-f", str(tmp_path / "no-such-file"))
    assert code == 1
    assert "no-such-file" in err
    base = write_model(tmp_path / "base", template=None)
    code, _, err = said("chat", str(base), text="hello")
    assert code == 1
    assert "no chat template" in err
    assert "--chat-template" in err


def test_generate_prints_only_the_new_text(said: Said, tiny_model_dir: Path, tmp_path: Path) -> None:
    import llmkit

    expected = llmkit.load(tiny_model_dir, device="cpu").generate("Once upon", temperature=0, max_tokens=12).text
    plain = ["--temp", "0", "-n", "12"]
    file = tmp_path / "prompt.txt"
    file.write_text("Once upon\n")
    for code, out, err in (
        said("generate", str(tiny_model_dir), "-p", "Once upon", *plain),
        said("generate", "-m", str(tiny_model_dir), "-f", str(file), *plain),
        said("generate", str(tiny_model_dir), *plain, text="Once upon\n"),
        said("generate", str(tiny_model_dir), "-p", "-", *plain, text="Once upon\n"),
        said("generate", str(tiny_model_dir), "--file", "-", *plain, text="Once upon"),
    ):
        assert (code, out, err) == (0, expected + "\n", "")


def test_generate_from_bos(said: Said, tiny_model_dir: Path) -> None:
    import llmkit

    expected = llmkit.load(tiny_model_dir, device="cpu").generate("", temperature=0, max_tokens=12).text
    assert said("generate", str(tiny_model_dir), "--temp", "0", "-n", "12") == (0, expected + "\n", "")


def test_generate_json(said: Said, tiny_model_dir: Path) -> None:
    code, out, err = said(
        *("generate", str(tiny_model_dir), "-p", "Once", "-n", "5", "--seed", "3", "--json", "--logprobs", "2", "--ignore-eos")
    )
    assert (code, err) == (0, "")
    result = json.loads(out)
    assert len(result["token_ids"]) == result["usage"]["completion_tokens"] == 5
    assert result["finish_reason"] == "length"
    assert result["seed"] == 3
    assert [len(entry["top"]) for entry in result["logprobs"]] == [2] * 5
    assert result["timings"]["time_to_first_token"] > 0


def test_generate_json_without_a_tokenizer_needs_no_text(said: Said, tiny_model_dir: Path, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "ids"
    shutil.copytree(tiny_model_dir, folder)
    (folder / "tokenizer.json").unlink()
    code, out, err = said("generate", str(folder), "-p", "Once")
    assert (code, out) == (1, "")
    assert "has no tokenizer" in err


def test_generate_with_the_chat_template(said: Said, tiny_model_dir: Path) -> None:
    import llmkit

    llm = llmkit.load(tiny_model_dir, device="cpu")
    messages = [{"role": "system", "content": "dog"}, {"role": "user", "content": "ball"}]
    expected = llm.chat(messages, temperature=0, max_tokens=12).text
    plain = ["--temp", "0", "-n", "12"]
    assert said("generate", str(tiny_model_dir), "--chat", "-s", "dog", "-p", "ball", *plain)[1] == expected + "\n"
    assert said("chat", str(tiny_model_dir), "-s", "dog", *plain, text="ball\n") == (0, expected + "\n", "")
    assert said("chat", str(tiny_model_dir), "-s", "dog", "-p", "ball", *plain) == (0, expected + "\n", "")


def test_environment_mirrors_the_flags(said: Said, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMKIT_MODEL", str(tiny_model_dir))
    monkeypatch.setenv("LLMKIT_MAX_TOKENS", "4")
    monkeypatch.setenv("LLMKIT_TEMPERATURE", "0")
    monkeypatch.setenv("LLMKIT_TOP_P", "0.9")  # not typed, so no complaint that it has no effect
    monkeypatch.setenv("LLMKIT_JSON", "1")
    code, out, _ = said("generate", "-p", "Once")
    assert code == 0
    assert len(json.loads(out)["token_ids"]) <= 4
    assert json.loads(out)["seed"] is None
    assert said("generate", "-p", "Once", str(tiny_model_dir))[0] == 0  # an argument wins over the environment


@pytest.mark.parametrize("value", ["many", "0"])
def test_an_error_says_where_the_value_came_from(said: Said, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    typed = said("generate", str(tiny_model_dir), "-p", "Once", "-t", value)
    monkeypatch.setenv("LLMKIT_THREADS", value)
    mirrored = said("generate", str(tiny_model_dir), "-p", "Once")
    assert typed[0] == mirrored[0] == 2
    assert "'--threads': " in typed[2]
    assert "LLMKIT_THREADS: " in mirrored[2]
    assert "range" not in typed[2] or value == "0"


def test_stop_strings_from_the_environment_keep_their_spaces(said: Said, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = said("generate", str(tiny_model_dir), "-p", "Once", "--seed", "1", "-n", "40", "--ignore-eos")[1]
    at = free.index(" ", 5)
    monkeypatch.setenv("LLMKIT_STOP", "never this\n" + free[at - 1 : at + 2])
    cut = said("generate", str(tiny_model_dir), "-p", "Once", "--seed", "1", "-n", "40", "--ignore-eos")[1]
    assert cut == free[: free.index(free[at - 1 : at + 2])] + "\n"


def test_verbose_goes_to_standard_error(said: Said, tiny_model_dir: Path) -> None:
    _, out, err = said("generate", str(tiny_model_dir), "-p", "Once upon", "-n", "5", "-v", "--ignore-eos")
    assert "tok/s" not in out
    assert "first token" in err
    assert "(0 cached), 5 new (length)" in err


def test_a_pipe_gets_raw_text(tiny_model_dir: Path) -> None:
    done = shell("chat", str(tiny_model_dir), "-n", "8", "--ignore-eos", text="Tell me a story about a dog.")
    assert done.returncode == 0
    assert done.stderr == ""
    assert done.stdout.endswith("\n")
    assert ANSI not in done.stdout


def test_closed_streams_are_empty_ones(tiny_model_dir: Path) -> None:
    def call(arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(f"{sys.executable} -m llmkit {arguments}", shell=True, capture_output=True, text=True)

    done = call(f"generate {tiny_model_dir} --temp 0 -n 12 <&-")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip()
    assert call(f"generate {tiny_model_dir} -p Once -n 3 >&-").stderr == ""
    done = call(f"chat {tiny_model_dir} <&-")
    assert done.returncode == 2
    assert done.stderr.startswith("error: the message is empty")


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), OSError(12, "Cannot allocate memory")]
)
def test_memory_that_runs_out_has_an_exit_code_of_its_own(
    said: Said, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def out_of_memory(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("llmkit.llm.api.LLM.stream", out_of_memory)
    code, out, err = said("generate", str(tiny_model_dir), "-p", "Once")
    assert (code, out) == (4, "")
    assert err.startswith("error: memory ran out. Take a smaller model")


@pytest.mark.skipif(sys.platform != "linux", reason="bounds the address space as Linux counts it")
def test_a_model_that_does_not_fit(tmp_path: Path) -> None:
    """Four gigabytes of weights, of which no byte is stored, in an address space of less."""
    folder = write_model(tmp_path / "big")
    data = (folder / "model.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size]) | {
        "extra": {"dtype": "U8", "shape": [1 << 32], "data_offsets": [len(data) - 8 - size, len(data) - 8 - size + (1 << 32)]}
    }
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text + data[8 + size :])
        file.truncate(8 + len(text) + len(data) - 8 - size + (1 << 32))
    command = f"ulimit -v 3500000; {sys.executable} -m llmkit generate {folder} -p Once"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert done.returncode == 4, done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_a_reader_that_leaves_early_is_no_traceback(tiny_model_dir: Path) -> None:
    command = f"{sys.executable} -m llmkit generate {tiny_model_dir} -p Once -n 3000 --ignore-eos | head -c 5"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert done.stderr == ""


def test_verify_command(said: Said, tiny_model_dir: Path) -> None:
    code, out, _ = said("verify", str(tiny_model_dir), "--json")
    assert code == 0
    result = json.loads(out)
    assert result["ok"] is True
    assert {check["name"] for check in result["checks"]} == {
        "logits vs transformers",
        "greedy tokens vs transformers",
        "cached vs uncached",
        "chunked vs whole prefill",
        "batch vs single",
    }
    assert all(check["ok"] is True for check in result["checks"])


def test_verify_exit_code_where_something_differs(said: Said, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmkit.evaluate import verify
    from llmkit.evaluate.verify import Check

    checks = [Check("a", True, 0.0, 1e-4), Check("b", False, 1.0, 1e-4), Check("c", None, note="it cannot")]
    monkeypatch.setattr(verify, "verify", lambda *_, **__: checks)
    code, out, _ = said("verify", str(tiny_model_dir))
    assert code == 3
    assert "differs" in out
    assert "not checked" in out
    assert "it cannot" in out


def test_bench_command_prints_one_flat_object(tiny_model_dir: Path) -> None:
    done = shell("bench", str(tiny_model_dir), "--prefill", "32", "--decode", "8", "--repeat", "1", "--starts", "1", "--json", "-t", "1")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert not any(isinstance(value, (dict, list)) for value in result.values())
    for name in ("prefill_tok_s", "decode_tok_s", "load_s", "first_token_s", "peak_bytes", "bandwidth_share", "bandwidth_bytes_s"):
        assert result[name] > 0
    assert result["threads"] == 1
