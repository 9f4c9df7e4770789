"""One program of `llmkit bench` in a process of its own, so that its memory and its start-up time are its own.

`llmkit.bench.process.Worker` starts it as `python -m llmkit.bench.worker`.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np

from llmkit.bench.bandwidth import reader
from llmkit.bench.process import Answer, Settings, main
from llmkit.planning.memory import peak_bytes

START_PROMPT = 6  # tokens before the first one of a process


class DecodingModel(Protocol):
    """What is measured: a loaded model that continues token ids greedily and does not stop at an end of text.

    variant: one of `report()["variants"]`. room: tokens of context that a sequence of this request needs.
    """

    vocab_size: int

    def prefill(self, ids: list[int], room: int, variant: str) -> float:
        """Return the seconds until the token after `ids` is there."""

    def decode(self, prompts: list[list[int]], count: int, room: int, variant: str) -> float:
        """Return the seconds for `count` tokens of every sequence after the first one that follows its prompt."""

    def report(self) -> dict[str, Any]:
        """Return what only this program knows of itself, JSON-ready."""


class OwnDecoding:
    """llmkit, through its public API. Without speculation: random tokens repeat, and draft tokens would be right too often."""

    def __init__(self, folder: str, load: Mapping[str, Any]) -> None:
        import llmkit

        self.llm = llmkit.load(folder, speculate="off", **load)
        self.vocab_size = self.llm.config.vocab_size

    def prefill(self, ids: list[int], room: int, variant: str) -> float:
        seconds = self.llm.generate(ids, max_tokens=1, temperature=0, ignore_eos=True).timings.time_to_first_token
        assert seconds is not None
        return seconds

    def decode(self, prompts: list[list[int]], count: int, room: int, variant: str) -> float:
        replies = self.llm.generate(prompts, max_tokens=count + 1, temperature=0, ignore_eos=True)
        return max(reply.timings.total for reply in replies) - min(reply.timings.time_to_first_token for reply in replies)

    def report(self) -> dict[str, Any]:
        config, runner, backend, read = self.llm.config, self.llm.runner, self.llm.backend, 0
        for name, size in runner.nbytes.items():
            if name.startswith(("model.embed_tokens", "model.embed_positions")) and not (
                config.tie_word_embeddings and name.startswith("model.embed_tokens")
            ):
                continue  # one row of the table; a tied one is read whole as the head
            described = config.parameters.get(f"{name.rpartition('.')[0]}.weight")  # the name may be that of codes or scales
            chosen, experts = (1, 1) if described is None else described.experts
            read += size * chosen // experts
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


def load_side(settings: Settings) -> DecodingModel:
    """Load llmkit: `load` are keyword arguments of `llmkit.load`."""
    return OwnDecoding(settings["folder"], settings["load"])


def prompt(length: int, vocab_size: int, seed: int) -> list[int]:
    """Return random token ids, different for every seed, so that no run finds another's prefix in a cache."""
    return np.random.default_rng(seed).integers(0, vocab_size, length).tolist()


def serve(settings: Settings, answer: Answer, load: Callable[[Settings], DecodingModel] = load_side) -> None:
    """Time one program, or the reading of memory, until standard input ends."""
    if settings["side"] == "bandwidth":
        read = reader(settings["device"], settings["threads"])
        answer({})
        for _ in sys.stdin:
            answer({"bandwidth": read()})
        return
    start = time.time()
    side = load(settings)
    loaded = time.time()
    side.prefill(prompt(START_PROMPT, side.vocab_size, 0), settings["start_room"], "")
    answer({"load_s": loaded - start, "first_token_s": time.time() - settings["started"], **side.report()})
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


if __name__ == "__main__":
    main(serve)
