"""The GPU benchmark: what it refuses, and, run on a CPU, that its figures belong together."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llmkit.checkpoint.quantize import quantize_folder
from llmkit.cli.bench_gpu import table
from llmkit.cli.main import run
from llmkit.errors import UsageError
from llmkit.measure import bench_gpu as module
from llmkit.measure.bench_gpu import GpuBenchPlan, bench_gpu
from tests.families.tiny import tiny_folder


def test_without_a_gpu_it_says_so(tiny_model_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run(["bench-gpu", str(tiny_model_dir)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "no CUDA GPU" in said.err
    assert "llmkit bench" in said.err
    assert "Traceback" not in said.err


def test_what_cannot_be_compared_is_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    folder = quantize_folder(tiny_model_dir, tmp_path / "q4").folder
    with pytest.raises(UsageError, match="Give the checkpoint it was made from"):
        bench_gpu(GpuBenchPlan(folder, device="cpu"))
    with pytest.raises(UsageError, match="Give a dense model"):
        bench_gpu(GpuBenchPlan(tiny_folder(tmp_path / "moe", "mixtral"), device="cpu"))


class Clock:
    """A side that takes as long as it is told, for each token."""

    def __init__(self, seconds: list[float]) -> None:
        self.seconds = list(seconds)
        self.seen: list[tuple[int, ...]] = []

    def prefill(self, ids: list[int]) -> float:
        self.seen.append(tuple(ids))
        return len(ids) * self.seconds[0]

    def decode(self, ids: list[int], count: int) -> float:
        self.seen.append(tuple(ids))
        return count * self.seconds.pop(0)


def test_medians_without_the_first_round() -> None:
    clocks = {"q4": Clock([9.0, 1.0, 2.0, 4.0]), "nf4": Clock([9.0, 0.5, 0.25, 0.125])}
    found = module.measure(dict(clocks), GpuBenchPlan(Path(), prefill=30, decode=5, repeat=3), 1000, lambda _: None)
    assert found == {"q4_prefill_tok_s": 0.5, "q4_decode_tok_s": 0.5, "nf4_prefill_tok_s": 4.0, "nf4_decode_tok_s": 4.0}
    seen = clocks["q4"].seen + clocks["nf4"].seen
    assert len(set(seen)) == len(seen) == 16  # no prompt twice


def check(plan: GpuBenchPlan, capsys: pytest.CaptureFixture[str]) -> None:
    result = bench_gpu(plan)
    for side in ("q4", "bf16", "nf4"):
        assert result[f"{side}_prefill_tok_s"] > 0
        assert result[f"{side}_decode_tok_s"] > 0
    assert result["decode_ratio_nf4"] == result["q4_decode_tok_s"] / result["nf4_decode_tok_s"]
    share = result["q4_decode_tok_s"] * result["q4_bytes_per_token"] / result["bandwidth_bytes_s"]
    assert result["q4_bandwidth_share"] == share
    assert result["bf16_bytes_per_token"] > 1.5 * result["q4_bytes_per_token"]
    table(result)
    assert "to NF4" in capsys.readouterr().out


def test_the_whole_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_READ", 1 << 22)
    monkeypatch.setenv("LLMKIT_KERNELS", "reference")  # the backend of a GPU
    folder = tiny_folder(tmp_path, hidden_size=192, intermediate_size=384, head_dim=64)
    check(GpuBenchPlan(folder, device="cpu", dtype=None, prefill=8, decode=4, repeat=1), capsys)


@pytest.mark.gpu
def test_the_whole_run_on_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    check(GpuBenchPlan(tiny_folder(tmp_path, hidden_size=192, intermediate_size=384, head_dim=64), prefill=8, decode=4, repeat=1), capsys)
