"""How fast a model decodes on a GPU in 4 bits, beside itself in bfloat16 and beside bitsandbytes' NF4 in transformers.

The checkpoint is quantized for the run. All sides are loaded at once and take turns; every figure is a median.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import numpy as np
import torch

import llmkit
from llmkit.checkpoint.files import load_config
from llmkit.checkpoint.quantize import quantize_folder
from llmkit.errors import UsageError
from llmkit.model.backend import TorchBackend

PROMPT = 16  # tokens before those that are timed
_READ = 1 << 30  # bytes, far more than a GPU's cache


@dataclass(frozen=True)
class GpuBenchPlan:
    """What is measured. Token counts; `repeat` runs of each figure, of which the median is taken."""

    folder: Path
    device: str = "cuda"
    dtype: str | None = "bfloat16"  # what flows between layers; of the weights, too, where they are not quantized
    prefill: int = 512
    decode: int = 128
    repeat: int = 5


class Side(Protocol):
    """A loaded model."""

    def prefill(self, ids: list[int]) -> float:
        """Seconds until the first token after `ids`."""

    def decode(self, ids: list[int], count: int) -> float:
        """Seconds for `count` tokens, greedy, after the first one that follows `ids`."""


class Ours:
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
        """What one token reads of a dense model's weights: all but an embedding that is no head."""
        assert isinstance(self.llm.backend, TorchBackend)
        model = self.llm.backend.model
        skipped = ("model.embed_positions",) if model.lm_head is None else ("model.embed_positions", "model.embed_tokens")
        named = [*model.named_parameters(), *model.named_buffers()]
        return sum(tensor.nbytes for name, tensor in named if not name.startswith(skipped))


class Nf4:
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
    """One flat dictionary: figures of `q4`, `bf16` and `nf4`; ratios above 1 are in favour of q4. `progress` is told what is measured.

    Raises UsageError without a GPU and for a checkpoint that is quantized already.
    """
    if plan.device.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError("this machine has no CUDA GPU that torch can use. Run llmkit bench for its processor.")
    config = load_config(plan.folder)
    if config.hf.get("quantization_config"):
        raise UsageError(f"{plan.folder} is quantized, so there is nothing to compare it with. Give the checkpoint it was made from.")
    if any(layer.moe is not None for layer in config.layers):
        raise UsageError(f"{plan.folder} is a mixture of experts, and a token reads only some. Give a dense model.")
    with tempfile.TemporaryDirectory() as scratch:
        progress("quantizing")
        report = quantize_folder(plan.folder, Path(scratch) / "q4")
        progress("loading")
        ours, plain = Ours(report.folder, plan), Ours(plan.folder, plan)
        sides: dict[str, Side] = {"q4": ours, "bf16": plain, "nf4": Nf4(plan.folder, plan.device)}
        bandwidth = read_bandwidth(plan.device)
        result: dict[str, Any] = {
            "model": str(plan.folder),
            "device": torch.cuda.get_device_name(plan.device) if plan.device.startswith("cuda") else plan.device,
            "prefill_tokens": plan.prefill,
            "decode_tokens": plan.decode,
            "repeat": plan.repeat,
            "bits_per_weight": report.bits_per_weight,
            "bandwidth_bytes_s": bandwidth,
        }
        result |= measure(sides, plan, config.vocab_size, progress)
        for name, side in (("q4", ours), ("bf16", plain)):
            result[f"{name}_bytes_per_token"] = side.bytes_per_token()
            result[f"{name}_bandwidth_share"] = result[f"{name}_decode_tok_s"] * side.bytes_per_token() / bandwidth
    for figure in ("prefill", "decode"):
        for rival in ("bf16", "nf4"):
            result[f"{figure}_ratio_{rival}"] = result[f"q4_{figure}_tok_s"] / result[f"{rival}_{figure}_tok_s"]
    return result


def measure(sides: dict[str, Side], plan: GpuBenchPlan, vocab_size: int, progress: Callable[[str], None]) -> dict[str, float]:
    """`SIDE_prefill_tok_s` and `SIDE_decode_tok_s`, medians of interleaved runs; the first round warms up and is not counted."""
    rates: dict[str, list[float]] = {f"{name}_{figure}_tok_s": [] for name in sides for figure in ("prefill", "decode")}
    draws = np.random.default_rng(0)
    for run in range(plan.repeat + 1):
        for name, side in sides.items() if run % 2 else reversed(sides.items()):
            progress(f"run {run}/{plan.repeat} of {name}")
            # New ids every time: no run finds another's prefix in a cache.
            read = plan.prefill / side.prefill(draws.integers(0, vocab_size, plan.prefill).tolist())
            wrote = plan.decode / side.decode(draws.integers(0, vocab_size, PROMPT).tolist(), plan.decode)
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
