"""How fast a model decodes on a GPU in 4 bits, next to itself in bfloat16 and to bitsandbytes' NF4 in transformers; and how fast, in
how little memory, an adapter is trained on it (QLoRA).

The checkpoint is quantized for the run. In decoding all models are loaded at once and take turns; every figure is a median.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import numpy as np
import torch

import llmkit
from benchmarks.random_model import LLAMA_8B, write_random_nf4
from benchmarks.training import compare_training
from llmkit.bench.training import TrainBenchPlan, bench_train
from llmkit.checkpoint.files import load_config
from llmkit.checkpoint.quantize import quantize_folder
from llmkit.checkpoint.source import ModelSource
from llmkit.errors import DoesNotFit, UsageError, out_of_memory
from llmkit.families import family
from llmkit.model.backend import TorchBackend
from llmkit.planning.memory import check_gpu, check_limit, gpu_bytes, shown

PROMPT = 16  # tokens before those that are timed
ROW = 2048  # tokens of a training step
SIZES = tuple(size * 10**9 for size in (8, 12, 16, 24))  # of GPUs that people have; the smallest that is enough is looked for
# What unsloth says of itself beside transformers with FlashAttention 2 (github.com/unslothai/unsloth): twice the speed, 70% less memory.
UNSLOTH_SPEED, UNSLOTH_SAVED = 2.0, 0.7
_READ = 1 << 30  # bytes, far more than a GPU's cache


@dataclass(frozen=True)
class GpuBenchPlan:
    """What is measured. Token counts; `repeat` runs of each figure, of which the median is taken.

    folder: None: QLoRA alone, on a model of random numbers in the shape of Llama 3.1 8B. memory: bytes of the GPU that one may take in
    QLoRA; None: the smallest of `SIZES` that is enough for both programs. row: tokens of a training step.
    """

    folder: Path | None
    device: str = "cuda"
    dtype: str | None = "bfloat16"  # what flows between layers; of the weights, too, where they are not quantized
    prefill: int = 512
    decode: int = 128
    repeat: int = 5
    memory: int | None = None
    row: int = ROW


class TimedModel(Protocol):
    """A loaded model."""

    def prefill(self, ids: list[int]) -> float:
        """Return the seconds until the first token after `ids`."""

    def decode(self, ids: list[int], count: int) -> float:
        """Return the seconds for `count` tokens, greedy, after the first one that follows `ids`."""


class OwnModel:
    """llmkit, through its public API."""

    def __init__(self, folder: Path, plan: GpuBenchPlan) -> None:
        self.llm = llmkit.load(folder, device=plan.device, dtype=plan.dtype, speculate="off")

    def prefill(self, ids: list[int]) -> float:
        seconds = self.llm.generate(ids, max_tokens=1, temperature=0, ignore_eos=True).timings.time_to_first_token
        assert seconds is not None
        return seconds

    def decode(self, ids: list[int], count: int) -> float:
        rate = self.llm.generate(ids, max_tokens=count + 1, temperature=0, ignore_eos=True).timings.decode_tok_s
        assert rate is not None
        return count / rate

    def bytes_per_token(self) -> int:
        """Return the bytes that one token reads of a dense model's weights: all but an embedding that is no head."""
        assert isinstance(self.llm.backend, TorchBackend)
        model = self.llm.backend.model
        skipped = ("model.embed_positions",) if model.lm_head is None else ("model.embed_positions", "model.embed_tokens")
        named = [*model.named_parameters(), *model.named_buffers()]
        return sum(tensor.nbytes for name, tensor in named if not name.startswith(skipped))


class TransformersNf4:
    """The same checkpoint in transformers with bitsandbytes' NF4, computing in bfloat16."""

    def __init__(self, folder: Path, device: str) -> None:
        import transformers

        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        four_bit = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
        self.device = device
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=four_bit, dtype=torch.bfloat16, device_map={"": device}
        ).eval()
        self.model.generation_config = transformers.GenerationConfig(do_sample=False, pad_token_id=0)  # and no end of text

    @torch.inference_mode()
    def prefill(self, ids: list[int]) -> float:
        start = time.perf_counter()
        int(self.model(torch.tensor([ids], device=self.device), use_cache=True, logits_to_keep=1).logits.argmax())
        return time.perf_counter() - start

    @torch.inference_mode()
    def decode(self, ids: list[int], count: int) -> float:
        times: list[float] = []

        def clock(tokens: Any, scores: Any, **_: Any) -> Any:
            int(tokens[0, -1])  # waits for the device
            times.append(time.perf_counter())
            return torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)

        prompt = torch.tensor([ids], device=self.device)
        self.model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=count + 1, stopping_criteria=[clock])
        assert len(times) == count + 1
        return times[-1] - times[0]


def bench_gpu(plan: GpuBenchPlan, progress: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """One flat dictionary: figures of `q4`, `bf16` and `nf4` in decoding, ratios above 1 being in favour of q4; and `qlora_*`, which
    `bench_qlora` gives. `progress` is told what is measured.

    Raises UsageError without a GPU and for a checkpoint that is quantized already, DoesNotFit where memory is enough for nothing.
    """
    check_gpu(plan.device, "Run llmkit bench for its processor.")
    on_cuda = plan.device.startswith("cuda")
    if on_cuda and plan.memory is not None:
        check_limit(plan.device, plan.memory)
    result: dict[str, Any] = {
        "model": "random numbers in the shape of Llama 3.1 8B" if plan.folder is None else str(plan.folder),
        "device": torch.cuda.get_device_name(plan.device) if on_cuda else plan.device,
        "repeat": plan.repeat,
    }
    if plan.folder is not None:
        _check_folder(plan.folder)
    with tempfile.TemporaryDirectory() as scratch:
        # Training first, in processes of its own: afterwards this one holds memory of the GPU.
        progress("quantizing")
        if plan.folder is None:
            four_bit = write_random_nf4(
                Path(scratch) / "nf4", LLAMA_8B, lambda done, total: progress(f"writing a model of random numbers: {done / total:.0%}")
            )
        else:
            four_bit = quantize_folder(plan.folder, Path(scratch) / "nf4", "nf4").folder
        result |= {f"qlora_{key}": value for key, value in bench_qlora(four_bit, plan, progress).items()}
        if plan.folder is not None:
            result |= _bench_decode(plan.folder, Path(scratch) / "q4", plan, progress)
    if not any(value for key, value in result.items() if key.endswith("fits")):
        raise DoesNotFit(f"{result['model']} fits in the memory of {result['device']} in no way that is measured. Take a smaller model.")
    return result


def _check_folder(folder: Path) -> None:
    source = ModelSource(folder)
    if source.quantized:
        raise UsageError(f"{folder} is quantized, so there is nothing to compare it with. Give the checkpoint it was made from.")
    if source.config.sparse:
        raise UsageError(f"{folder} is a mixture of experts, and a token reads only some. Give a dense model.")


def bench_qlora(folder: Path, plan: GpuBenchPlan, progress: Callable[[str], None]) -> dict[str, Any]:
    """QLoRA (r=16) on one row of tokens, both programs computing activations again in the backward pass, next to transformers, PEFT and
    bitsandbytes on the same NF4 folder; of a family whose linears transformers fuses, whose adapter is another one, llmkit alone.

    Returns what `bench_train` does, in the smallest memory that was enough for both programs, and `smallest_bytes` for each of them: the
    smallest that was enough for it. A side for which none was has `fits` False.
    """
    config = load_config(folder)
    fuses = any(len(rule.ours) > 1 for rule in family(config.model_type).rules)
    prefixes = ("",) if fuses else ("", "transformers_")
    result: dict[str, Any] = {f"{prefix}fits": False for prefix in prefixes}
    smallest: dict[str, int] = {}
    for memory in _sizes(plan):
        where = "" if memory is None else f" in {shown(memory)}"
        train = TrainBenchPlan(
            folder,
            device=plan.device,
            memory=memory,
            rows=1,
            length=min(plan.row, config.max_position_embeddings),
            steps=plan.repeat + 1,
            checkpointing=True,
        )
        told = partial(_tell, progress, f"QLoRA{where}: ")
        try:
            result = bench_train(train, told) if fuses else compare_training(train, "transformers", progress=told)
        except DoesNotFit:
            continue
        fitting = [prefix for prefix in prefixes if result[f"{prefix}fits"]]
        if train.on_cuda:
            for prefix in fitting:
                smallest.setdefault(f"{prefix}smallest_bytes", gpu_bytes(plan.device) if memory is None else memory)
        if len(fitting) == len(prefixes):
            break
    published = {"unsloth_published_ratio": UNSLOTH_SPEED, "unsloth_published_peak_ratio": 1 / (1 - UNSLOTH_SAVED)}
    return {**{key: value for key, value in result.items() if key != "model"}, **smallest, **published}


def _tell(progress: Callable[[str], None], where: str, what: str) -> None:
    progress(where + what)


def _sizes(plan: GpuBenchPlan) -> tuple[int | None, ...]:
    """The memory to try, smallest first; None: all there is."""
    if plan.memory is not None or not plan.device.startswith("cuda"):
        return (plan.memory,)
    return (*(size for size in SIZES if size < gpu_bytes(plan.device)), None)


def _bench_decode(folder: Path, target: Path, plan: GpuBenchPlan, progress: Callable[[str], None]) -> dict[str, Any]:
    """Decoding of the checkpoint quantized to `target`; of models that do not fit together `decode_fits` False, and no figures."""
    progress("quantizing")
    report = quantize_folder(folder, target)
    progress("loading")
    try:
        ours, plain = OwnModel(report.folder, plan), OwnModel(folder, plan)
        models: dict[str, TimedModel] = {"q4": ours, "bf16": plain, "nf4": TransformersNf4(folder, plan.device)}
        bandwidth = read_bandwidth(plan.device)
        rates = measure(models, plan, load_config(folder).vocab_size, progress)
    except (DoesNotFit, MemoryError, RuntimeError) as error:
        if not (isinstance(error, DoesNotFit) or out_of_memory(error)):
            raise
        return {"decode_fits": False}
    result: dict[str, Any] = {
        "decode_fits": True,
        "prefill_tokens": plan.prefill,
        "decode_tokens": plan.decode,
        "bits_per_weight": report.bits_per_weight,
        "bandwidth_bytes_s": bandwidth,
        **rates,
    }
    for name, model in (("q4", ours), ("bf16", plain)):
        result[f"{name}_bytes_per_token"] = model.bytes_per_token()
        result[f"{name}_bandwidth_share"] = result[f"{name}_decode_tok_s"] * model.bytes_per_token() / bandwidth
    for figure in ("prefill", "decode"):
        for rival in ("bf16", "nf4"):
            result[f"{figure}_ratio_{rival}"] = result[f"q4_{figure}_tok_s"] / result[f"{rival}_{figure}_tok_s"]
    return result


def measure(models: dict[str, TimedModel], plan: GpuBenchPlan, vocab_size: int, progress: Callable[[str], None]) -> dict[str, float]:
    """`SIDE_prefill_tok_s` and `SIDE_decode_tok_s`, medians of interleaved runs; the first round warms up and is not counted."""
    rates: dict[str, list[float]] = {f"{name}_{figure}_tok_s": [] for name in models for figure in ("prefill", "decode")}
    draws = np.random.default_rng(0)
    for run in range(plan.repeat + 1):
        for name, model in models.items() if run % 2 else reversed(models.items()):
            progress(f"run {run}/{plan.repeat} of {name}")
            # New ids every time: no run finds another's prefix in a cache.
            read = plan.prefill / model.prefill(draws.integers(0, vocab_size, plan.prefill).tolist())
            wrote = plan.decode / model.decode(draws.integers(0, vocab_size, PROMPT).tolist(), plan.decode)
            if run:
                rates[f"{name}_prefill_tok_s"].append(read)
                rates[f"{name}_decode_tok_s"].append(wrote)
    return {name: median(values) for name, values in rates.items()}


def read_bandwidth(device: str) -> float:
    """Bytes per second at which the device reads its memory: the best of several sums over a gigabyte."""
    data = torch.ones(_READ // 4, dtype=torch.float32, device=device)
    seconds = []
    for _ in range(8):
        start = time.perf_counter()
        float(data.sum())  # reading a value waits for the device
        seconds.append(time.perf_counter() - start)
    return data.nbytes / min(seconds)
