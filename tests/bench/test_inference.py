"""bench: what it asks for, what it makes of the answers, and what it refuses. Speeds themselves are not tested."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import llmkit
from benchmarks.inference import check_rival, compare, ratios, rival_types
from llmkit.bench import bandwidth
from llmkit.bench.inference import BenchPlan, DecodingProgram, bench, figures, summary, warm_up
from llmkit.bench.worker import OwnDecoding
from llmkit.checkpoint.files import load_config
from llmkit.checkpoint.quantize import quantize_folder
from llmkit.cli.main import run
from llmkit.errors import CheckpointError, UsageError
from tests.tiny import write_model

SMALL = ("--prefill", "24", "--decode", "4", "--repeat", "1", "--starts", "1", "-t", "1", "--json")
SHORT = {"prefill": 24, "decode": 4, "repeat": 1, "starts": 1, "threads": 1}


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 4-bit folder whose matrices are large enough to be quantized everywhere."""
    folder = tmp_path_factory.mktemp("bench")
    source = write_model(folder / "model", hidden_size=128, intermediate_size=256, num_attention_heads=4, num_key_value_heads=2)
    quantize_folder(source, folder / "q4", "q4")
    return folder / "q4"


def command(*arguments: str) -> dict[str, Any]:
    """The result of `llmkit bench ARGUMENTS`, whose standard output is one JSON object and nothing else."""
    done = subprocess.run([sys.executable, "-m", "llmkit", "bench", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert not any(isinstance(value, dict | list) for value in result.values())
    return result


def test_the_embedded_model_alone() -> None:
    result = command(str(llmkit.embedded_model()), *SMALL, "--depth", "40,64", "--batch", "3", "--kv-bits", "8")
    keys = ("prefill_tok_s", "decode_tok_s", "decode_tok_s_depth_40", "decode_tok_s_depth_64", "decode_tok_s_batch_3")
    for key in (*keys, "load_s", "first_token_s", "peak_bytes", "bandwidth_bytes_s"):
        assert result[key] > 0
    # What a step reads, as share and speed say: the weights in 16 bits and what the sequences have cached. The share itself depends on how
    # much of the machine's bandwidth others took while it was measured.
    read = {
        end: result[f"bandwidth_share{end}"] * result["bandwidth_bytes_s"] * sequences / result[f"decode_tok_s{end}"]
        for end, sequences in {"": 1, "_depth_40": 1, "_depth_64": 1, "_batch_3": 3}.items()
    }
    weights = 2 * 2_188_320
    assert weights < read[""] < read["_depth_40"] < read["_depth_64"] < 1.2 * weights
    assert read["_batch_3"] - weights == pytest.approx(3 * (read[""] - weights), rel=0.2)
    assert result["first_token_s"] > result["load_s"]
    assert "native" in result["path"]
    assert "8-bit cache" in result["path"]
    assert (result["threads"], result["speculate"]) == (1, "off")
    assert result["bits_per_weight"] == 16
    assert not any("ratio" in key or "llama" in key for key in result)


def test_table(tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", str(tiny_model_dir), *SMALL[:-1], "--depth", "30", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    for text in ("prefill 24", "decode 4", "decode at depth 30", "peak memory", "of bandwidth", "no speculation", "memory read at"):
        assert text in out.replace("\n", " "), text


def test_no_torch_on_the_native_path(tiny_model_dir: Path) -> None:
    """What a quantized folder costs to start is measured, and importing torch must not be a part of it."""
    settings = {
        "side": "llmkit",
        "folder": str(tiny_model_dir),
        "load": {"device": "cpu", "threads": 1, "ctx_size": 64, "cache_tokens": 256},
    }
    program = (
        f"import sys, json\nfrom llmkit.bench.worker import load_side\nside = load_side({settings!r})\n"
        "side.report(); side.decode([[5, 6], [7, 8]], 3, 6, ''); print(json.dumps('torch' in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "false", done.stderr


def test_runs_write_where_others_wrote(tiny_model_dir: Path) -> None:
    """Our cache is as large as llama.cpp's: what a run needs is taken from those before, and no new memory is touched."""
    side = OwnDecoding(str(tiny_model_dir), {"device": "cpu", "threads": 1, "ctx_size": 40, "cache_tokens": 256})
    assert side.llm._engine.cache.pools[0].num_blocks == 256 // 16 + 1


def test_what_is_asked_for() -> None:
    plan = BenchPlan(Path("m"), prefill=600, decode=100, depths=(2048,), batches=(8, 256))
    phases = figures(plan)
    assert [[figure.key for figure in phase] for phase in phases] == [
        ["prefill_tok_s", "decode_tok_s"],
        ["decode_tok_s_depth_2048"],
        ["decode_tok_s_batch_8"],
        ["decode_tok_s_batch_256"],
    ]
    base, deep, eight, many = (phase[-1] for phase in phases)
    assert (base.request["room"], deep.request["room"], eight.request["room"]) == (601, 2149, 117)
    assert (base.tokens, deep.tokens, eight.tokens) == (100, 100, 800)
    assert deep.seeds == 0  # the next run finds this one's context
    assert many.request["length"] * 256 == 512  # all prompts pass in one step
    assert [len(phase) for phase in figures(replace(plan, prefill=0))] == [1, 1, 1, 1]
    ((shortest,),) = figures(BenchPlan(Path("m"), prefill=1, decode=0))
    assert shortest.request["room"] == 7  # the prompt of a start and its token


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decode": 0, "depths": (5,)}, "decode is 0"),
        ({"decode": 0, "prefill": 0}, "both 0"),
        ({"depths": (5000,)}, "context of 5005 tokens and the model has 4096"),
    ],
)
def test_refused(change: dict[str, Any], message: str, tiny_model_dir: Path) -> None:
    with pytest.raises(UsageError, match=message):
        bench(BenchPlan(tiny_model_dir, **{**SHORT, **change}))


def test_comparisons_that_are_refused(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    with pytest.raises(UsageError, match="--rival-files has no effect"):
        compare(BenchPlan(tiny_model_dir, **SHORT), "transformers", Path("x"))
    with pytest.raises(UsageError, match="on the CPU, not on cuda"):
        compare(BenchPlan(tiny_model_dir, device="cuda", **SHORT), "llama.cpp")


def test_files_of_no_rival(tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", str(tiny_model_dir), "--rival-files", "x"]) == 2
    assert "--rival-files has no effect" in capsys.readouterr().err


def test_a_wheel_has_no_comparisons(tmp_path: Path, tiny_model_dir: Path) -> None:
    """As where llmkit is installed: its package alone, and no benchmarks/ next to it."""
    (tmp_path / "llmkit").symlink_to(Path(llmkit.__file__).parent)
    program = (
        "import sys; from pathlib import Path; import llmkit.bench; llmkit.bench.CHECKOUT = Path('.')\n"
        "from llmkit.cli.main import run; sys.exit(run(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", program, "bench", str(tiny_model_dir), "--against", "transformers"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == (
        "error: comparisons with other programs need llmkit's source checkout. Clone the repository, or leave out --against.\n"
    )


def test_a_missing_llama_cpp_is_said_with_its_remedy(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"not installed.*GGML_NATIVE=ON.*llmkit\[llama-cpp\]"):
        compare(BenchPlan(tiny_model_dir), "llama.cpp")


def test_transformers_cannot_read_a_quantized_folder(quantized: Path) -> None:
    with pytest.raises(UsageError, match="which llmkit quantized"):
        check_rival(BenchPlan(quantized), "transformers", None, load_config(quantized))


@pytest.mark.parametrize("counts", ["0", "-1", "8,", "x", "1.5"])
def test_counts(counts: str, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", str(tiny_model_dir), "--depth", counts]) == 2
    assert "is not N or N,N" in capsys.readouterr().err


def test_what_a_side_raises_comes_back_as_it_is(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-10])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        bench(BenchPlan(folder, device="cpu", **SHORT))


def test_rivals_have_about_as_many_bits(quantized: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    assert rival_types(quantized) == ("q4_0", "q4_k_m")
    assert rival_types(tiny_model_dir) == ("f16",)
    quantize_folder(tiny_model_dir, tmp_path / "q8", "q8")
    assert rival_types(tmp_path / "q8") == ("q8_0",)


class Answers:
    """A worker whose speeds are known: seconds of a request by variant."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self.seconds, self.asked = seconds, []  # type: ignore[var-annotated]

    def ask(self, **request: Any) -> dict[str, Any]:
        self.asked.append(request)
        return {"peak_bytes": 100 * len(self.asked)} if request["do"] == "peak" else {"seconds": self.seconds[request["variant"]]}

    def close(self) -> None:
        pass


def test_the_faster_variant_counts_and_memory_is_that_of_one() -> None:
    phase = figures(BenchPlan(Path("m"), prefill=0, decode=10))[0]
    side = DecodingProgram("a", "a_", {}, "", Answers({"on": 2.0, "off": 1.0}), {"variants": ["on", "off"]})  # type: ignore[arg-type]
    warm_up(side, phase, first=True)
    assert side.best == {"decode_tok_s": "off"}
    assert side.peak_bytes == 200
    assert side.speed(phase[0], "off", 1) == 10.0
    warm_up(side, phase, first=False)
    assert side.peak_bytes == 200


def test_ratios_are_to_the_best_rival() -> None:
    plan = BenchPlan(Path("m"), prefill=8, decode=4, depths=(100,))
    facts = {"parameters": 10, "dtype": "q4", "device": "cpu", "threads": 2, "path": "native", "bits_per_weight": 4.5, "variants": [""]}
    facts |= {"bytes_per_token": 1000, "cache": [[2.0, None], [1.0, 50]], "version": "1", "flags": "AVX"}

    def side(prefix: str, prefill: float, decode: float, seconds: float, peak: int) -> DecodingProgram:
        times = {"load_s": [seconds], "first_token_s": [9.0, seconds, 0.0]}
        speeds = {"prefill_tok_s": [prefill], "decode_tok_s": [decode], "decode_tok_s_depth_100": [decode / 2]}
        return DecodingProgram(prefix, prefix, {}, "", None, facts, times | speeds, peak_bytes=peak)

    ours, rivals = side("", 100, 10, 1.0, 50), [side("llama_cpp_q4_0_", 50, 4, 3.0, 60), side("llama_cpp_q4_k_m_", 20, 5, 2.0, 90)]
    result = summary(plan, ours, 100_000)
    result |= ratios(result, "llama.cpp", rivals)
    assert (result["prefill_ratio"], result["decode_ratio"], result["decode_ratio_depth_100"]) == (2.0, 2.0, 2.0)
    assert (result["load_ratio"], result["first_token_ratio"], result["peak_ratio"]) == (2.0, 2.0, 1.2)
    assert (result["llama_cpp_q4_0_prefill_tok_s"], result["llama_cpp_q4_k_m_decode_tok_s"]) == (50, 5)
    assert result["llama_cpp_version"] == "1"
    # 1000 bytes of weights, 102 cached tokens of 2 bytes, and 50 in the window of 1 byte: 5 times a second.
    assert result["bandwidth_share_depth_100"] == pytest.approx(5 * (1000 + 204 + 50) / 100_000)


def test_bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bandwidth, "SIZE", 1 << 22)
    assert 1e8 < bandwidth.reader("cpu", 2)() < 1e13


@pytest.mark.slow
def test_against_transformers(tiny_model_dir: Path) -> None:
    result = command(str(tiny_model_dir), *SMALL, "--against", "transformers", "--batch", "2", "--device", "cpu")
    assert result["dtype"] == result["transformers_dtype"] == "float32"
    for name in ("prefill", "decode", "load", "first_token", "peak"):
        assert result[f"{name}_ratio"] > 0
    assert result["decode_ratio_batch_2"] == result["decode_tok_s_batch_2"] / result["transformers_decode_tok_s_batch_2"]
