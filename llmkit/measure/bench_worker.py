"""One side of a benchmark in a process of its own, so that its memory and start-up are its own.

Started by `llmkit.measure.bench` as `python -m llmkit.measure.bench_worker`. Takes one JSON request per line on standard
input and answers each with one JSON line. While it waits it computes nothing, so two sides can take turns.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from typing import Any, Protocol

import numpy as np


class Side(Protocol):
    """What is measured: a loaded model that continues token ids greedily and does not stop at an end of text."""

    vocab_size: int

    def prefill(self, ids: list[int]) -> float:
        """Seconds until the logits after the last token of `ids` are there."""

    def decode(self, ids: list[int], count: int) -> float:
        """Seconds for `count` tokens after the first one that follows `ids`."""

    def facts(self) -> dict[str, Any]:
        """dtype, parameters, bytes read per decoded token; what only this side knows."""


class OurSide:
    """llmkit, through its public API."""

    def __init__(self, folder: str, dtype: str | None, device: str | None, threads: int | None) -> None:
        import llmkit

        self.llm = llmkit.load(folder, dtype=dtype, device=device, threads=threads, speculate="off")
        self.vocab_size = self.llm.config.vocab_size

    def prefill(self, ids: list[int]) -> float:
        seconds = self.llm.generate(ids, max_tokens=1, temperature=0, ignore_eos=True).timings.time_to_first_token
        assert seconds is not None
        return seconds

    def decode(self, ids: list[int], count: int) -> float:
        rate = self.llm.generate(ids, max_tokens=count + 1, temperature=0, ignore_eos=True).timings.decode_tok_s
        assert rate is not None
        return count / rate

    def facts(self) -> dict[str, Any]:
        config, runner, read = self.llm.config, self.llm.runner, 0
        for name, size in runner.nbytes.items():
            if name.startswith(("model.embed_tokens", "model.embed_positions")) and not (
                config.tie_word_embeddings and name.startswith("model.embed_tokens")
            ):
                continue  # one row of the table; a tied one is read whole as the head
            if ".experts." in name:
                moe = config.layers[int(name.split(".")[2])].moe
                assert moe is not None
                size = size * moe.num_experts_per_tok // moe.num_experts
            read += size
        return {
            "dtype": runner.stored,
            "device": runner.device,
            "parameters": runner.parameters,
            "bytes_per_token": read,
            "threads": self.llm.backend.threads,
            "path": self.llm.backend.path,
        }


class TransformersSide:
    """The same through transformers: a forward pass for the prompt, `generate` for decoding."""

    def __init__(self, folder: str, dtype: str | None, device: str | None, threads: int | None) -> None:
        import torch
        import transformers

        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        if threads is not None:
            torch.set_num_threads(threads)
        self.device = device or "cpu"
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or "auto").to(self.device).eval()
        # Nothing of the checkpoint's sampling, and no end of text.
        self.model.generation_config = transformers.GenerationConfig(do_sample=False, pad_token_id=0)
        self.vocab_size = self.model.config.vocab_size

    def prefill(self, ids: list[int]) -> float:
        import torch

        with torch.inference_mode():
            start = time.perf_counter()
            logits = self.model(torch.tensor([ids], device=self.device), use_cache=True, logits_to_keep=1).logits
            int(logits.argmax())
            return time.perf_counter() - start

    def decode(self, ids: list[int], count: int) -> float:
        import torch

        times: list[float] = []

        def clock(tokens: Any, scores: Any, **_: Any) -> Any:
            times.append(time.perf_counter())
            return torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)

        prompt = torch.tensor([ids], device=self.device)
        with torch.inference_mode():
            self.model.generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=count + 1, stopping_criteria=[clock], do_sample=False
            )
        assert len(times) == count + 1
        return times[-1] - times[0]

    def facts(self) -> dict[str, Any]:
        import transformers

        return {"version": transformers.__version__, "dtype": str(self.model.dtype).removeprefix("torch.")}


def read_bandwidth(device: str | None, threads: int | None, size: int = 1 << 29) -> float:
    """Bytes per second at which this machine reads memory: the median of matrix-vector products over `size` bytes."""
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    matrix = torch.ones(size // (4 * 4096), 4096, device=device or "cpu")
    vector = torch.ones(4096, device=matrix.device)
    seconds = []
    for _ in range(9):
        start = time.perf_counter()
        float(torch.mv(matrix, vector)[0])  # reading a value waits for the device
        seconds.append(time.perf_counter() - start)
    return matrix.numel() * 4 / float(np.median(seconds[2:]))


def prompt(length: int, vocab_size: int, seed: int) -> list[int]:
    """Random token ids, different for every seed, so that no run finds another's prefix in a cache."""
    return np.random.default_rng(seed).integers(0, vocab_size, length).tolist()


def peak_bytes() -> int:
    """The largest resident memory of this process so far, mapped file pages included."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def main() -> None:
    """Serve requests until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not get between the answers
    settings = json.loads(sys.argv[1])

    def answer(data: dict[str, Any]) -> None:
        answers.write(json.dumps(data) + "\n")
        answers.flush()

    arguments = {name: settings[name] for name in ("dtype", "device", "threads")}
    if settings["side"] == "bandwidth":
        answer({"bandwidth": read_bandwidth(settings["device"], settings["threads"])})
        return
    start = time.time()
    side: Side = (OurSide if settings["side"] == "llmkit" else TransformersSide)(settings["folder"], **arguments)
    loaded = time.time()
    side.prefill(prompt(8, side.vocab_size, 0))
    answer({"load_s": loaded - start, "first_token_s": time.time() - settings["started"], **side.facts()})
    for line in sys.stdin:
        request = json.loads(line)
        ids = prompt(request["length"], side.vocab_size, request["seed"])
        seconds = side.prefill(ids) if request["do"] == "prefill" else side.decode(ids, request["count"])
        answer({"seconds": seconds, "peak_bytes": peak_bytes()})


if __name__ == "__main__":
    main()
