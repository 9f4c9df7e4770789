"""bench --train: both programs do the same steps, the figures belong together, and what cannot be measured is refused."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from benchmarks import training as comparison
from benchmarks.training import check_rival, compare_training, rival_programs
from benchmarks.training_worker import load_rival, padded
from llmkit.bench import training as module
from llmkit.bench.process import Worker
from llmkit.bench.training import TrainBenchPlan, bench_train, check_train_plan, own_programs
from llmkit.bench.training_worker import Chats, TrainingModel, factors, random_rows, serve, start_adapter
from llmkit.bench.training_worker import load_model as load_own
from llmkit.checkpoint.files import load_config
from llmkit.checkpoint.load import load_model
from llmkit.checkpoint.quantize import quantize_folder
from llmkit.checkpoint.save import save_model
from llmkit.cli.bench_train import train_table
from llmkit.cli.main import run
from llmkit.errors import DoesNotFit, UsageError, out_of_memory
from llmkit.kernels import native_problem
from llmkit.planning.memory import check_gpu, check_limit, limit_gpu
from llmkit.training.data.packing import IGNORE
from tests.families.tiny import tiny_folder
from tests.tiny import write_model

PLAN = TrainBenchPlan(Path(), threads=1, rows=2, length=24, steps=3, repeat=2, chats=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose matrices are large enough to be quantized everywhere."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
    return write_model(tmp_path_factory.mktemp("bench_train") / "model", **sizes)


@pytest.fixture(scope="module")
def data(folder: Path) -> Path:
    """Prompts and answers of several lengths, some longer than a row."""
    file = folder.parent / "chats.jsonl"
    rows = [{"prompt": "the dog ran " * (1 + n % 5), "completion": "to the ball " * (1 + n % 3)} for n in range(9)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def started(folder: Path, name: str, **changes: Any) -> TrainingModel:
    """A program's model as its worker loads it."""
    plan, config = replace(PLAN, folder=folder, quantize="q4"), load_config(folder)
    settings = {program.name: program.settings for program in [*own_programs(plan, config), *rival_programs(plan, True, config)]}[name]
    side = (load_rival if name.startswith("transformers") else load_own)({**settings, **changes})
    start_adapter(side.model)
    return side


@pytest.mark.parametrize("checkpointing", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_both_programs_take_the_same_steps(folder: Path, data: Path, checkpointing: bool) -> None:
    ours, theirs = (started(folder, name, checkpointing=checkpointing) for name in ("llmkit", "transformers"))
    mine, others = factors(ours.model), factors(theirs.model)
    assert mine.keys() == others.keys()
    assert len(mine) == 2 * 7 * 2
    assert all(torch.equal(mine[name], others[name]) for name in mine)
    losses = []
    for step in range(3):
        ids = random_rows(2, 24, 40, step)
        losses.append((ours.full(ids), theirs.full(ids)))
    chats = Chats(str(folder), str(data), 24, 4)
    for step in range(3):
        (loss, slots), (other, padded_slots) = ours.chats(chats.of_step(step), 3), theirs.chats(chats.of_step(step), 3)
        losses.append((loss, other))
        assert slots > 0
        assert padded_slots >= sum(len(ids) for ids, _ in chats.of_step(step))
    assert all(abs(a - b) < 1e-5 for a, b in losses), losses
    assert all((mine[name] - others[name]).abs().max() < 1e-4 for name in mine)
    moved = [name for name in mine if name.endswith(".B") and mine[name].abs().max() > 1e-5]
    assert len(moved) == len(mine) // 2
    first = ours.full(random_rows(2, 24, 40, 0))
    assert first < losses[0][0]  # it has learned


@pytest.fixture(scope="module")
def nf4(folder: Path) -> Path:
    return quantize_folder(folder, folder.parent / "nf4", "nf4").folder


@pytest.fixture(scope="module")
def bf16_nf4(folder: Path) -> Path:
    """Made from a checkpoint in bfloat16: what is not in 4 bits is stored so, and products are to be."""
    save_model(load_model(folder), folder.parent / "bf16", dtype="bfloat16")
    return quantize_folder(folder.parent / "bf16", folder.parent / "bf16_nf4", "nf4").folder


def test_both_programs_train_beside_the_same_four_bits(nf4: Path) -> None:
    ours, theirs = (started(nf4, name) for name in ("llmkit", "transformers"))
    mine, others = factors(ours.model), factors(theirs.model)
    assert mine.keys() == others.keys()
    losses = [(ours.full(ids), theirs.full(ids)) for ids in (random_rows(2, 24, 40, step) for step in range(3))]
    assert all(abs(a - b) < 1e-5 for a, b in losses), losses
    assert all((mine[name] - others[name]).abs().max() < 1e-4 for name in mine)
    assert "nf4" in ours.report()["flags"]
    assert ours.report()["base_bytes"] < 0.5 * ours.report()["bf16_base_bytes"]
    assert "float32, sdpa attention, gradient checkpointing" in theirs.report()["flags"]
    assert theirs.report()["bitsandbytes_version"]


def test_of_a_bfloat16_checkpoint_on_a_cpu_both_compute_in_float32(bf16_nf4: Path) -> None:
    ours, theirs = (started(bf16_nf4, name) for name in ("llmkit", "transformers"))
    ids = random_rows(2, 24, 40, 0)
    assert ours.full(ids) == pytest.approx(theirs.full(ids), abs=1e-5)
    # In a second step they differ by more: on the way back bitsandbytes rounds the weights to the dtype they once had.
    ids = random_rows(2, 24, 40, 1)
    assert ours.full(ids) == pytest.approx(theirs.full(ids), abs=1e-3)


def test_both_programs_in_bfloat16_as_on_a_gpu(bf16_nf4: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = started(bf16_nf4, "llmkit")
    for place in ("llmkit.training.loop", "benchmarks.training_worker"):
        monkeypatch.setattr(f"{place}.product_dtype", lambda wanted, device: torch.bfloat16)
    ours, theirs = started(bf16_nf4, "llmkit", checkpointing=True), started(bf16_nf4, "transformers")
    for step in range(3):
        ids = random_rows(2, 24, 40, step)
        exact, mine, other = plain.full(ids), ours.full(ids), theirs.full(ids)
        assert mine != exact
        assert mine == pytest.approx(exact, abs=0.02)
        assert other == pytest.approx(exact, abs=0.02)
    assert "bfloat16 forward, checkpointing" in ours.report()["flags"]
    assert "bfloat16, sdpa attention" in theirs.report()["flags"]
    assert {factor.dtype for side in (ours, theirs) for factor in factors(side.model).values()} == {torch.float32}


def test_a_step_begins_anew(folder: Path) -> None:
    side, ids = started(folder, "llmkit"), random_rows(2, 24, 40, 0)
    losses = [side.full(ids) for _ in range(2)]
    start_adapter(side.model)
    side.renew_optimizer()
    assert [side.full(ids) for _ in range(2)] == losses
    assert losses[1] < losses[0]


@pytest.mark.skipif(native_problem() is not None, reason="no native kernels")
def test_a_quantized_base_computes_with_integers_in_less_memory(folder: Path) -> None:
    side, plain = started(folder, "llmkit q4"), started(folder, "llmkit")
    assert "q4, integer forward" in side.report()["flags"]
    assert plain.report()["base_bytes"] == 2 * side.report()["bf16_base_bytes"]  # stored in float32
    assert side.report()["base_bytes"] < 0.33 * side.report()["bf16_base_bytes"]
    ids = random_rows(2, 24, 40, 0)
    assert side.full(ids) == pytest.approx(plain.full(ids), rel=0.1)


def test_padding() -> None:
    tokens, mask, labels = padded([(np.array([5, 6, 7]), np.array([False, True, True])), (np.array([8, 9]), np.array([False, True]))])
    assert tokens.tolist() == [[5, 6, 7], [8, 9, 0]]
    assert mask.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert labels.tolist() == [[IGNORE, 6, 7], [IGNORE, 9, IGNORE]]


def test_every_chat_is_seen_before_one_comes_again(folder: Path, data: Path) -> None:
    chats = Chats(str(folder), str(data), 100, 3)
    seen = [chat[0].tobytes() for step in range(3) for chat in chats.of_step(step)]
    assert len({*seen}) == len({ids.tobytes() for ids in np.split(chats.corpus.tokens.astype(np.int64), chats.corpus.offsets[1:-1])})
    assert [ids.tolist() for ids, _ in chats.of_step(3)] == [ids.tolist() for ids, _ in chats.of_step(0)]
    with pytest.raises(UsageError, match=r"holds 9 documents to learn from, and a step takes 10"):
        Chats(str(folder), str(data), 100, 10)


class FakeWorker:
    """A side that takes as long as it is told: seconds of a step on rows, of a chat step by micro-batch."""

    speeds: ClassVar[dict[str, tuple[float, Callable[[int], float], int]]] = {
        "llmkit": (1.0, lambda _: 2.0, 100),
        "llmkit q4": (0.5, lambda _: 1.0, 50),
        "transformers": (2.0, lambda size: {1: 9.0, 2: 8.0}.get(size, 20.0), 400),
        "transformers, checkpointing": (4.0, lambda size: 1 / 0, 200),
    }
    adapter: ClassVar[dict[str, list[int]]] = {"q_proj.A": [16, 8]}

    def __init__(self, asked: list[tuple[str, str, int | None]], name: str, settings: dict[str, Any]) -> None:
        self.asked, self.name, self.renewed = asked, name, False
        self.ready = {
            "adapter": dict(self.adapter),
            "device": settings["device"],
            "threads": 2,
            "flags": f"flags of {name}",
            "bf16_base_bytes": 1000,
            "base_bytes": 300,
        }
        if name.startswith("transformers"):
            self.ready = {key: value for key, value in self.ready.items() if "base" not in key}
            self.ready |= {"transformers_version": "5", "peft_version": "0"}

    def ask(self, do: str, step: int = 0, micro_batch: int | None = None) -> dict[str, Any]:
        self.asked.append((self.name, do, micro_batch))
        full, chats, peak = self.speeds[self.name]
        if do == "peak":
            return {"peak_bytes": peak}
        if do == "renew":
            self.renewed = True
            return {}
        assert do == "full" or micro_batch is not None
        seconds = 100.0 if step == 0 and (do == "full" or self.renewed) else full if do == "full" else chats(micro_batch or 0)
        loss = 3.0 + step + (0.25 if self.name == "llmkit q4" and step == 2 else 0.0)
        return {"seconds": seconds, "loss": loss, "slots": 48, "targets": 24}

    def close(self) -> None:
        self.asked.append((self.name, "close", None))


class Workers:
    """Starts such sides in the place of processes.

    asked: what every side was asked for, in order.
    ends: where memory runs out: a side that does not load (True), or one that lasts for so many requests.
    fused: a side whose adapter is on other linears.
    """

    def __init__(self, ends: dict[str, bool | int] | None = None, fused: str | None = None) -> None:
        self.asked: list[tuple[str, str, int | None]] = []
        self.ends, self.fused = ends or {}, fused

    def __call__(self, name: str, settings: dict[str, Any], worker: str) -> Any:
        left = self.ends.get(name, 1000)
        if left is True:
            raise DoesNotFit("memory ran out")
        started = Short(left, self.asked, name, settings)
        if name == self.fused:
            started.ready["adapter"] = {"qkv_proj.A": [16, 8]}
        return started


class Short(FakeWorker):
    """Memory runs out after so many requests."""

    def __init__(self, left: int, asked: list[tuple[str, str, int | None]], name: str, settings: dict[str, Any]) -> None:
        super().__init__(asked, name, settings)
        self.left = left

    def ask(self, do: str, step: int = 0, micro_batch: int | None = None) -> dict[str, Any]:
        self.left -= 1
        if self.left < 0:
            raise DoesNotFit("memory ran out")
        return super().ask(do, step, micro_batch)


def test_figures_belong_together(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    workers = Workers()
    plan = replace(PLAN, folder=folder, quantize="q4", data=Path("d"), chats=32)
    said: list[str] = []
    found = compare_training(plan, "transformers", True, said.append, workers)
    assert not any(isinstance(value, dict | list) for value in found.values())
    assert (found["full_tok_s"], found["q4_full_tok_s"], found["transformers_full_tok_s"]) == (48, 96, 24)
    assert (found["full_ratio"], found["q4_full_ratio"], found["full_ratio_checkpointing"]) == (2, 4, 4)
    assert (found["full_peak_ratio"], found["full_peak_ratio_checkpointing"], found["q4_full_peak_ratio"]) == (4, 2, 8)
    assert (found["full_loss_difference"], found["q4_full_loss_difference"]) == (0, 0.25)
    assert (found["chats_target_tok_s"], found["chats_tok_s"], found["transformers_chats_target_tok_s"]) == (12, 24, 3)
    assert (found["chats_ratio"], found["q4_chats_ratio"], found["transformers_chats_micro_batch"]) == (4, 8, 2)
    assert found["base_share"] == 0.3
    assert found["transformers_chats_micro_batches_tried"] == "1, 2, 4"
    tried = [size for name, do, size in workers.asked if name == "transformers" and do == "chats"]
    assert tried == [1, 2, 4, *[2] * (plan.repeat + 1)]  # 8 and more are not tried after 4 was slower
    assert not any(name == "transformers, checkpointing" and do == "chats" for name, do, _ in workers.asked)
    assert [do for _, do, _ in workers.asked][-4:] == ["close"] * 4
    assert any("step 3/3 of llmkit q4" in line for line in said)
    train_table(found)
    out = " ".join(capsys.readouterr().out.split())
    for text in ("48 tok/s", "2.00x", "0.30", "micro-batches of 2", "over 3 steps: 0.0e+00", "flags of transformers"):
        assert text in out, text


def test_no_larger_micro_batch_where_memory_might_end(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "available_bytes", lambda: 399)  # and the rival has taken 400
    found = compare_training(replace(PLAN, folder=folder, data=Path("d")), "transformers", start=Workers())
    assert found["transformers_chats_micro_batches_tried"] == "1"
    assert found["transformers_chats_micro_batch"] == 1


def test_a_side_that_does_not_fit_is_a_result(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    workers = Workers({"llmkit": True, "transformers": 1})
    plan = replace(PLAN, folder=folder, quantize="q4", device="cuda", memory=8 * 10**9)
    found = compare_training(plan, "transformers", True, start=workers)
    assert [found[f"{side}fits"] for side in ("", "q4_", "transformers_", "transformers_checkpointing_")] == [False, True, False, True]
    assert not any(isinstance(value, dict | list) for value in found.values())
    assert "full_tok_s" not in found
    assert "transformers_full_tok_s" not in found
    assert (found["q4_full_tok_s"], found["q4_full_ratio_checkpointing"], found["q4_full_peak_ratio_checkpointing"]) == (96, 8, 4)
    assert [name for name, do, _ in workers.asked if do == "close"] == ["llmkit q4", "transformers", "transformers, checkpointing"]
    train_table(found)
    out = " ".join(capsys.readouterr().out.split())
    assert out.count("does not fit in 8.00 GB") == 2
    for text in ("8.00x", "ratios are to its run with checkpointing", "flags of transformers, checkpointing"):
        assert text in out, text


def test_where_nothing_fits_it_is_an_error(folder: Path) -> None:
    workers = Workers({"llmkit": 2, "transformers": True})
    with pytest.raises(DoesNotFit, match=r"llmkit and transformers: training does not fit in 12\.00 GB\. Take a smaller model"):
        compare_training(replace(PLAN, folder=folder, device="cuda", memory=12 * 10**9), "transformers", start=workers)


def test_memory_that_runs_out_on_chats(folder: Path) -> None:
    workers = Workers({"transformers": PLAN.steps + 2})  # the steps, their peak, the first micro-batch
    found = compare_training(replace(PLAN, folder=folder, data=Path("d")), "transformers", start=workers)
    assert (found["fits"], found["transformers_fits"]) == (True, False)
    assert found["chats_target_tok_s"] == 12
    assert not any("ratio" in key for key in found)


def test_on_a_gpu_one_side_is_loaded_at_a_time(folder: Path) -> None:
    workers = Workers()
    found = compare_training(replace(PLAN, folder=folder, device="cuda:1"), "transformers", start=workers)
    assert [name for name, _, _ in workers.asked] == ["llmkit"] * (PLAN.steps + 2) + ["transformers"] * (PLAN.steps + 2)
    assert (found["device"], found["full_ratio"], found["full_loss_difference"]) == ("cuda:1", 2, 0)


OUT_OF_MEMORY = """
import sys, torch
from llmkit.bench.process import main

def serve(settings, answer):
    answer({})
    for _ in sys.stdin:
        torch.empty(1 << 60, dtype=torch.uint8)

main(serve)
"""


def test_memory_that_runs_out_in_a_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "greedy.py").write_text(OUT_OF_MEMORY)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    worker = Worker("llmkit", {}, "greedy")
    with pytest.raises(DoesNotFit, match="needs more memory than there is"):
        worker.ask(do="full")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_errors_that_say_that_memory_ran_out(error: Exception, expected: bool) -> None:
    assert out_of_memory(error) == expected


def test_what_a_worker_does_on_a_gpu(nf4: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its requests to torch.cuda, around a side that is really on the CPU."""
    done: list[str] = []

    def note(name: str, result: Any = None) -> Callable[..., Any]:
        return lambda *arguments: done.append(name) or result

    def loaded(settings: dict[str, Any]) -> TrainingModel:
        done.append("load")
        side = load_own({**settings, "device": "cpu"})
        monkeypatch.setattr(side, "full", note("step", 1.5))
        return side

    for name, result in {"is_available": True, "device_count": 1, "get_device_name": "a GPU", "max_memory_allocated": 123}.items():
        monkeypatch.setattr(torch.cuda, name, note(name, result))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=20 * 10**9))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, index: done.append(f"limit {share} of {index}"))
    monkeypatch.setattr(torch.cuda, "synchronize", note("synchronize"))
    monkeypatch.setattr("sys.stdin", io.StringIO('{"do": "full", "step": 0}\n{"do": "peak"}\n'))
    plan = replace(PLAN, folder=nf4, device="cuda", memory=8 * 10**9, threads=None)
    settings = own_programs(plan, load_config(nf4))[0].settings
    answers: list[dict[str, Any]] = []
    serve(settings, answers.append, loaded)
    assert [name for name in done if name not in ("is_available", "device_count")] == [
        *("limit 0.4 of 0", "load", "get_device_name", "step", "synchronize", "max_memory_allocated")
    ]
    ready, step, peak = answers
    assert ready["device"] == "a GPU"
    assert (step["loss"], step["slots"], peak) == (1.5, 48, {"peak_bytes": 123})
    with pytest.raises(UsageError, match="cuda has 20"):
        serve({**settings, "memory": 21 * 10**9}, answers.append)


def test_the_limit_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[float, int]] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=80 * 10**9))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, device: given.append((share, device)))
    limit_gpu("cuda:1", 8 * 10**9)
    limit_gpu("cuda", 80 * 10**9)
    assert given == [(0.1, 1), (1.0, 0)]  # torch takes no device without a number here
    check_limit("cuda", 80 * 10**9)
    with pytest.raises(UsageError, match=r"cuda has 80\.00 GB, so a limit of 81\.00 GB has no effect"):
        check_limit("cuda", 81 * 10**9)
    for device in ("cpu", "mps", "cuda", "cuda:1"):
        check_gpu(device, "")
    for device in ("cuda:2", "cuda:x"):
        with pytest.raises(UsageError, match=rf"no device '{device}': this machine has cuda:0 to cuda:1\. Take one"):
            check_gpu(device, "Take one.")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match=r"no CUDA GPU that torch can use\. Take one"):
        check_gpu("cuda", "Take one.")


def test_without_a_rival_there_are_no_ratios(folder: Path) -> None:
    found = bench_train(replace(PLAN, folder=folder), start=Workers())
    assert found["full_tok_s"] == 48
    assert not any("ratio" in key or "transformers" in key or "difference" in key or "chats" in key for key in found)


def test_other_adapters_are_not_compared(folder: Path) -> None:
    with pytest.raises(UsageError, match=r"transformers puts its adapter onto other linears .*\(q_proj\).*fuses"):
        compare_training(replace(PLAN, folder=folder), "transformers", start=Workers(fused="transformers"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"device": "mps"}, "on cpu and on cuda, not on mps"),
        ({"memory": 8 * 10**9}, "--memory limits a GPU"),
        ({"device": "cuda", "data": Path("d")}, "chats are measured on the CPU"),
        ({"steps": 1}, "first one is not timed"),
        ({"rows": 10**20}, "100000000000000000000 rows of 24 tokens are too many"),
        ({"length": 5000}, "the model has 4096 positions"),
    ],
)
def test_refused(change: dict[str, Any], message: str, tiny_model_dir: Path) -> None:
    with pytest.raises(UsageError, match=message):
        bench_train(replace(PLAN, folder=tiny_model_dir, **change))


def test_llama_cpp_is_not_compared(tiny_model_dir: Path) -> None:
    with pytest.raises(UsageError, match="not compared in training"):
        compare_training(replace(PLAN, folder=tiny_model_dir), "llama.cpp")


def test_a_quantized_folder_is_measured_alone(folder: Path, tmp_path: Path) -> None:
    quantized = quantize_folder(folder, tmp_path / "q4", "q4").folder
    config = load_config(quantized)
    check_train_plan(replace(PLAN, folder=quantized), config)
    with pytest.raises(UsageError, match="compared with full weights"):
        check_rival(replace(PLAN, folder=quantized), "transformers", False)
    with pytest.raises(UsageError, match="--quantize has no effect"):
        check_train_plan(replace(PLAN, folder=quantized, quantize="q4"), config)
    side = started(quantized, "llmkit")
    assert side.report()["base_bytes"] < 0.33 * side.report()["bf16_base_bytes"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--train", "--prefill", "5"), "--prefill has no effect with --train"),
        (("--train", "--batch", "2"), "--batch has no effect with --train"),
        (("--steps", "5"), "--steps has no effect without --train"),
        (("--quantize", "q4"), "--quantize has no effect without --train"),
        (("--train", "--steps", "1"), "--steps"),
        (("--memory", "8GB"), "--memory has no effect without --train"),
        (("--train", "--rival-checkpointing"), "--rival-checkpointing has no effect"),
        (("--train", "--memory", "8GB"), "--memory limits a GPU"),
        (("--train", "--device", "cuda", "--memory", "much"), "no amount of memory"),
        (("--train", "--memory", ""), "no amount of memory"),
        (("--train", "--steps", "3", "--repeat", "5"), "--repeat has no effect beside --steps"),
    ],
)
def test_options_without_effect(arguments: tuple[str, ...], message: str, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", str(tiny_model_dir), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_rival_of_four_bits_has_checkpointing_anyway(nf4: Path) -> None:
    with pytest.raises(UsageError, match="--rival-checkpointing has no effect on a folder in nf4"):
        compare_training(replace(PLAN, folder=nf4), "transformers", True)


@pytest.mark.parametrize(("device", "memory"), [(None, None), ("cuda", 6_500_000_000)])
def test_memory_of_the_environment_is_that_of_a_gpu(
    device: str | None, memory: int | None, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans: list[TrainBenchPlan] = []

    def measured(plan: TrainBenchPlan, progress: Callable[[str], None]) -> dict[str, Any]:
        plans.append(plan)
        return {"a": 1}

    monkeypatch.setattr(module, "bench_train", measured)
    monkeypatch.setenv("LLMKIT_MEMORY", "6.5GB")
    assert run(["bench", str(folder), "--train", "--json", *(["--device", device] if device else [])]) == 0
    assert [plan.memory for plan in plans] == [memory]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU")
def test_a_gpu_that_is_not_there(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", str(folder), "--train", "--device", "cuda", "--memory", "8GB"]) == 2
    said = capsys.readouterr().err
    assert "no CUDA GPU that torch can use" in said
    assert "Traceback" not in said


def test_the_command_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In a real process, of ours only: the rival's takes seconds to import."""
    arguments = ["--train", "--rows", "2", "--row-length", "24", "--repeat", "1", "-t", "1", "--json"]
    assert run(["bench", str(folder), *arguments]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["full_tok_s"] > 0
    assert found["full_peak_bytes"] > 1e7
    assert (found["steps"], found["threads"], found["base_share"]) == (2, 1, 2.0)


@pytest.mark.slow
def test_everything_in_processes_of_its_own(folder: Path, data: Path) -> None:
    found = compare_training(replace(PLAN, folder=folder, quantize="q4", data=data), "transformers", True)
    assert found["full_loss_difference"] < 1e-5
    assert found["full_loss_difference_checkpointing"] < 1e-5
    assert found["chats_loss_difference"] < 1e-5
    assert found["transformers_chats_micro_batch"] in (1, 2, 4)
    assert all(value > 0 for key, value in found.items() if "_tok_s" in key or key.endswith("ratio"))


@pytest.mark.slow
def test_a_family_that_transformers_fuses(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "phi3", "phi3")
    with pytest.raises(UsageError, match="because it fuses them"):
        compare_training(replace(PLAN, folder=folder), "transformers")
