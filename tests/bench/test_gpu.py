"""The GPU benchmark: what it refuses, and, run on a CPU, that its figures belong together; the smallest memory that is enough for QLoRA."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import gpu as module
from benchmarks.bench_gpu import bench_gpu as command
from benchmarks.bench_gpu import table
from benchmarks.gpu import GpuBenchPlan, bench_gpu
from benchmarks.random_model import LLAMA_8B, write_random_nf4
from llmkit.bench.training import TrainBenchPlan
from llmkit.checkpoint.arrays import parameter_shapes
from llmkit.checkpoint.files import load_config
from llmkit.checkpoint.load import load_model
from llmkit.checkpoint.quantize import quantize_folder
from llmkit.cli.main import run
from llmkit.errors import DoesNotFit, UsageError
from llmkit.families import read_config
from tests.families.tiny import tiny_folder


def test_without_a_gpu_it_says_so(tiny_model_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run([str(tiny_model_dir)], command) == 2
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


SMALL = {**LLAMA_8B, "vocab_size": 97, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "bos_token_id": 1} | {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "eos_token_id": 2,
}


def test_a_model_of_random_numbers(tmp_path: Path) -> None:
    import transformers

    told: list[tuple[int, int]] = []
    folder = write_random_nf4(tmp_path / "model", SMALL, lambda done, total: told.append((done, total)))
    shapes = parameter_shapes(load_config(folder))
    assert told[-1] == (sum(map(math.prod, shapes.values())),) * 2
    model = load_model(folder, dtype="float32")
    weight = model.model.layers[1].mlp.down_proj.dequantize()  # type: ignore[union-attr, operator]
    assert weight.std() == pytest.approx(0.02, rel=0.05)
    assert len(weight.unique(dim=0)) == len(weight)
    assert torch.equal(model.model.norm.weight, torch.ones(64))  # type: ignore[arg-type]
    ids = torch.arange(5, 45)[None]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, device_map={"": "cpu"})
    with torch.inference_mode():
        logits = model(ids, torch.arange(40)[None])
        assert (theirs(ids).logits - logits).abs().max() < 0.02 * logits.abs().max()  # theirs are in bfloat16


def test_the_shape_of_llama_8b() -> None:
    shapes = parameter_shapes(read_config(dict(LLAMA_8B)))
    assert sum(map(math.prod, shapes.values())) == 8_030_261_248


class Gpu:
    """Training in which each side needs so much memory; what was asked for."""

    def __init__(self) -> None:
        self.plans: list[TrainBenchPlan] = []
        self.against: list[str | None] = []
        self.set(7.5, 14)

    def set(self, ours: float, theirs: float, total: float = 80.0) -> None:
        """Gigabytes that either side needs, and that there are."""
        self.needs, self.total = {"": ours * 1e9, "transformers_": theirs * 1e9}, int(total * 1e9)

    def __call__(self, plan: TrainBenchPlan, *against: Any, progress: Any = None) -> dict[str, Any]:
        rival, told = (None, against[0]) if progress is None else (against[0], progress)
        told("loading")
        self.plans.append(plan)
        self.against.append(rival)
        memory = self.total if plan.memory is None else plan.memory
        needs = {name: need for name, need in self.needs.items() if rival or not name}
        fits = {name: need <= memory for name, need in needs.items()}
        if not any(fits.values()):
            raise DoesNotFit("nothing fits")
        result: dict[str, Any] = {"model": str(plan.folder), "device": "a GPU", "threads": 1, "rows": 1, "row_length": plan.length}
        result |= {"steps": plan.steps, "against": rival} | ({} if plan.memory is None else {"memory_bytes": plan.memory})
        for name, fit in fits.items():
            result[f"{name}fits"] = fit
            if fit:
                result |= {f"{name}full_tok_s": 100.0, f"{name}full_peak_bytes": int(needs[name]), f"{name}flags": f"flags of {name}"}
        if fits.get("transformers_"):
            result |= {"transformers_version": "5", "peft_version": "0", "bitsandbytes_version": "1"}
        if len(fits) == 2 and all(fits.values()):
            result |= {"full_ratio": 1.0, "full_peak_ratio": self.needs["transformers_"] / self.needs[""], "full_loss_difference": 0.01}
        return result


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    """A machine with one GPU, and what is trained on it; the model without a name is a small one."""
    found = Gpu()
    for name, value in {"is_available": True, "device_count": 1, "get_device_name": "a GPU"}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=found.total))
    for name, replacement in {"bench_train": found, "compare_training": found, "LLAMA_8B": SMALL}.items():
        monkeypatch.setattr(module, name, replacement)
    return found


@pytest.fixture
def four_bits(tmp_path: Path) -> Path:
    return write_random_nf4(tmp_path / "nf4", SMALL)


@pytest.mark.parametrize(
    ("ours", "theirs", "total", "tried", "least"),
    [
        (7.5, 7.9, 80, [8], (8, 8)),
        (7.5, 14, 80, [8, 12, 16], (8, 16)),
        (11, 9, 24, [8, 12], (12, 12)),
        (9, 30, 80, [8, 12, 16, 24, None], (12, 80)),
        (5, 9, 8.5, [8, None], (8, None)),
        (9, 9, 8.5, [8, None], (None, None)),
        (3, 5, 6.0, [None], (6, 6)),
    ],
)
def test_the_smallest_memory_that_is_enough(
    ours: float,
    theirs: float,
    total: float,
    tried: list[int | None],
    least: tuple[int, int],
    four_bits: Path,
    gpu: Gpu,
) -> None:
    gpu.set(ours, theirs, total)
    said: list[str] = []
    found = module.bench_qlora(four_bits, GpuBenchPlan(None), said.append)
    assert [plan.memory for plan in gpu.plans] == [None if size is None else size * 10**9 for size in tried]
    assert (found.get("smallest_bytes"), found.get("transformers_smallest_bytes")) == tuple(size and size * 10**9 for size in least)
    assert (found["fits"], found["transformers_fits"]) == (ours <= total, theirs <= total)
    assert found.get("memory_bytes") == gpu.plans[-1].memory or not found["fits"]
    plan = gpu.plans[0]
    assert (plan.device, plan.rows, plan.length, plan.steps, plan.checkpointing, gpu.against[0]) == (
        "cuda",
        1,
        2048,
        6,
        True,
        "transformers",
    )
    assert said[0] == ("QLoRA: loading" if tried[0] is None else "QLoRA in 8.00 GB: loading")


def test_memory_that_was_given_is_the_only_one(four_bits: Path, gpu: Gpu) -> None:
    found = module.bench_qlora(four_bits, GpuBenchPlan(None, memory=10 * 10**9), lambda _: None)
    assert [plan.memory for plan in gpu.plans] == [10 * 10**9]
    assert (found["fits"], found["transformers_fits"], found["smallest_bytes"]) == (True, False, 10 * 10**9)
    assert "transformers_smallest_bytes" not in found
    with pytest.raises(UsageError, match=r"cuda has 80\.00 GB, so a limit of 90\.00 GB has no effect"):
        bench_gpu(GpuBenchPlan(None, memory=90 * 10**9))
    assert len(gpu.plans) == 1


def test_a_family_that_transformers_fuses_is_measured_alone(tmp_path: Path, gpu: Gpu) -> None:
    found = module.bench_qlora(tiny_folder(tmp_path, "phi3"), GpuBenchPlan(None), lambda _: None)
    assert [(plan.memory, plan.length) for plan in gpu.plans] == [(8 * 10**9, 512)]
    assert gpu.against == [None]
    assert "transformers_fits" not in found


def test_without_a_model_qlora_alone(gpu: Gpu, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--repeat", "2"], command) == 0
    said = capsys.readouterr()
    out = " ".join(said.out.split())
    for text in (
        *("LoRA on random numbers in the shape of Llama 3.1 8B in NF4, a GPU", "1 row of 2048", "100 tok/s (1.00x)", "7500 MB (1.87x)"),
        *("transformers 5, peft 0, bitsandbytes 1: flags of transformers_", "llmkit in 8.00 GB, transformers in 16.00 GB"),
        "FlashAttention 2: 2.00x the speed, 70% less memory (3.33x)",
    ):
        assert text in out, text
    assert "prefill" not in out
    assert [plan.steps for plan in gpu.plans] == [3, 3, 3]
    assert not gpu.plans[0].folder.exists()


def test_where_nothing_fits_it_is_an_error(gpu: Gpu, capsys: pytest.CaptureFixture[str]) -> None:
    gpu.set(90, 90)
    assert run([], command) == 4
    assert "Take a smaller model" in capsys.readouterr().err


def test_decoding_that_does_not_fit(tmp_path: Path, gpu: Gpu, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    gpu.set(7.5, 90)

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(module, "OwnModel", full)
    found = bench_gpu(GpuBenchPlan(tiny_folder(tmp_path)))
    assert (found["decode_fits"], found["qlora_fits"], found["qlora_transformers_fits"]) == (False, True, False)
    assert not any(isinstance(value, dict | list) for value in found.values())
    table(found)
    out = " ".join(capsys.readouterr().out.split())
    assert "do not fit in this GPU's memory together" in out
    assert "does not fit" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--decode", "5"), "--decode has no effect without MODEL"),
        (("--prefill", "5"), "--prefill has no effect without MODEL"),
        (("--revision", "x"), "--revision has no effect without MODEL"),
        (("--memory", "much"), "no amount of memory"),
        (("--memory", ""), "no amount of memory"),
    ],
)
def test_options_without_effect(arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments, command) == 2
    assert message in capsys.readouterr().err


def check(plan: GpuBenchPlan, capsys: pytest.CaptureFixture[str]) -> None:
    result = bench_gpu(plan)
    for side in ("q4", "bf16", "nf4"):
        assert result[f"{side}_prefill_tok_s"] > 0
        assert result[f"{side}_decode_tok_s"] > 0
    assert result["decode_ratio_nf4"] == result["q4_decode_tok_s"] / result["nf4_decode_tok_s"]
    share = result["q4_decode_tok_s"] * result["q4_bytes_per_token"] / result["bandwidth_bytes_s"]
    assert result["q4_bandwidth_share"] == share
    assert result["bf16_bytes_per_token"] > 1.5 * result["q4_bytes_per_token"]
    assert result["qlora_full_tok_s"] > 0
    assert result["qlora_transformers_full_tok_s"] > 0
    assert result["qlora_full_loss_difference"] < 0.02
    table(result)
    out = capsys.readouterr().out
    assert "to NF4" in out
    assert "peak memory" in out


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
