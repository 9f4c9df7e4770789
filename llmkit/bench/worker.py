"""One side of a benchmark in a process of its own, so that its memory and start-up are its own.

Started by `llmkit.bench.process` as `python -m llmkit.bench.worker`. Takes one JSON request per line on standard
input and answers each with one JSON line. While it waits it computes nothing, so that sides can take turns.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from llmkit.errors import DoesNotFit, LLMKitError, out_of_memory
from llmkit.planning.memory import peak_bytes

START_PROMPT = 6  # tokens before the first one of a process


class Side(Protocol):
    """What is measured: a loaded model that continues token ids greedily and does not stop at an end of text.

    variant: one of `facts()["variants"]`. room: tokens of context that a sequence of this request needs.
    """

    vocab_size: int

    def prefill(self, ids: list[int], room: int, variant: str) -> float:
        """Seconds until the token after `ids` is there."""

    def decode(self, prompts: list[list[int]], count: int, room: int, variant: str) -> float:
        """Seconds for `count` tokens of every sequence after the first one that follows its prompt."""

    def facts(self) -> dict[str, Any]:
        """What only this side knows."""


class OurSide:
    """llmkit, through its public API. Without speculation: random tokens repeat, and guesses would be right too often."""

    def __init__(
        self,
        folder: str,
        dtype: str | None,
        device: str | None,
        threads: int | None,
        kv_bits: int | None,
        context: int,
        cache_tokens: int,
    ) -> None:
        import llmkit

        self.llm = llmkit.load(
            folder,
            dtype=dtype,
            device=device,
            ctx_size=context,
            cache_tokens=cache_tokens,
            threads=threads,
            kv_bits=kv_bits,
            speculate="off",
        )
        self.vocab_size = self.llm.config.vocab_size

    def prefill(self, ids: list[int], room: int, variant: str) -> float:
        seconds = self.llm.generate(ids, max_tokens=1, temperature=0, ignore_eos=True).timings.time_to_first_token
        assert seconds is not None
        return seconds

    def decode(self, prompts: list[list[int]], count: int, room: int, variant: str) -> float:
        replies = self.llm.generate(prompts, max_tokens=count + 1, temperature=0, ignore_eos=True)
        return max(reply.timings.total for reply in replies) - min(reply.timings.time_to_first_token for reply in replies)

    def facts(self) -> dict[str, Any]:
        config, runner, backend, read = self.llm.config, self.llm.runner, self.llm.backend, 0
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
        windows = backend.cache_windows
        return {
            "variants": [""],
            "dtype": runner.stored,
            "device": runner.device,
            "parameters": runner.parameters,
            "bits_per_weight": 8 * sum(runner.nbytes.values()) / runner.parameters,
            "bytes_per_token": read,
            "cache": [(backend.block_bytes(group) / backend.block_size, window) for group, window in enumerate(windows)],
            "threads": backend.threads,
            "path": backend.path,
        }


def load_side(settings: dict[str, Any]) -> Side:
    """The model of a side, loaded."""
    common = {name: settings[name] for name in ("threads", "context", "cache_tokens")}
    if settings["side"] == "llama.cpp":
        from llmkit.bench.llama_cpp import LlamaSide

        return LlamaSide(settings["file"], settings["threads"])
    if settings["side"] == "transformers":
        from llmkit.bench.transformers import TransformersSide

        return TransformersSide(settings["folder"], settings["dtype"], settings["device"], settings["threads"])
    return OurSide(settings["folder"], settings["dtype"], settings["device"], kv_bits=settings["kv_bits"], **common)


def prompt(length: int, vocab_size: int, seed: int) -> list[int]:
    """Random token ids, different for every seed, so that no run finds another's prefix in a cache."""
    return np.random.default_rng(seed).integers(0, vocab_size, length).tolist()


def serve(settings: dict[str, Any], answer: Callable[[dict[str, Any]], None]) -> None:
    """What the settings ask for, until standard input ends."""
    if settings["side"] == "export":
        from llmkit.bench.llama_cpp import export

        answer({"file": str(export(Path(settings["folder"]), Path(settings["into"]), settings["type"]))})
        return
    if settings["side"] == "bandwidth":
        from llmkit.bench.bandwidth import reader

        read = reader(settings["device"], settings["threads"])
        answer({})
        for _ in sys.stdin:
            answer({"bandwidth": read()})
        return
    start = time.time()
    side = load_side(settings)
    loaded = time.time()
    side.prefill(prompt(START_PROMPT, side.vocab_size, 0), settings["start_room"], "")
    answer({"load_s": loaded - start, "first_token_s": time.time() - settings["started"], **side.facts()})
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "peak":
            answer({"peak_bytes": peak_bytes()})
            continue
        where = {"room": request["room"], "variant": request["variant"]}
        if request["do"] == "prefill":
            seconds = side.prefill(prompt(request["length"], side.vocab_size, request["seed"]), **where)
        else:
            seeds = range(1000 * request["seed"], 1000 * request["seed"] + request["sequences"])
            prompts = [prompt(request["length"], side.vocab_size, seed) for seed in seeds]
            seconds = side.decode(prompts, request["count"], **where)
        answer({"seconds": seconds})


def main(serve: Callable[[dict[str, Any], Callable[[dict[str, Any]], None]], None] = serve) -> None:
    """Serves what the first argument asks for; an error of llmkit's goes to the process that measures, and memory that ran out as one."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not get between the answers

    def answer(data: dict[str, Any]) -> None:
        answers.write(json.dumps(data) + "\n")
        answers.flush()

    try:
        serve(json.loads(sys.argv[1]), answer)
    except LLMKitError as error:
        answer({"error": str(error), "kind": type(error).__name__})
    except (MemoryError, RuntimeError, OSError) as error:
        if not out_of_memory(error):
            raise
        answer({"error": "a side of the benchmark needs more memory than there is. Take a smaller model.", "kind": DoesNotFit.__name__})


if __name__ == "__main__":
    main()
