"""How fast a model starts, reads and writes on this machine, and how that compares with other programs and with the memory's speed.

Each side runs in a process of its own (its peak memory is its own) and the sides take turns, so that whatever else the
machine does meets all of them; every figure is a median.
"""

from __future__ import annotations

import importlib.util
import math
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from llmkit.bench.process import Worker
from llmkit.bench.worker import START_PROMPT
from llmkit.checkpoint.files import load_config
from llmkit.checkpoint.formats.llmkit import quantization
from llmkit.config import ModelConfig
from llmkit.errors import UsageError

DECODE_PROMPT = 16  # tokens before the ones that are timed
STEP_TOKENS = 512  # of prompts in one step: all sequences of a batch begin in the same one
RIVALS = {"transformers": "transformers", "llama.cpp": "llama_cpp"}  # and how their keys begin
INSTALL = 'CMAKE_ARGS="-DGGML_NATIVE=ON" pip install --no-binary llama-cpp-python "llmkit[llama-cpp]"'


@dataclass(frozen=True)
class BenchPlan:
    """What is measured. Token counts (0 leaves a figure out); `repeat` runs of each figure, of which the median is taken.

    depths: decoding after so many tokens of context. batches: decoding so many sequences at once.
    rival_files: where files for llama.cpp are kept and found again; by default they are written anew and removed.
    """

    folder: Path
    dtype: str | None = None
    device: str | None = None
    threads: int | None = None
    kv_bits: int | None = None
    prefill: int = 512
    decode: int = 128
    depths: tuple[int, ...] = ()
    batches: tuple[int, ...] = ()
    repeat: int = 3
    starts: int = 3  # process starts of each side, for load and first-token time
    against: str | None = None
    rival_files: Path | None = None


@dataclass(frozen=True)
class Figure:
    """One thing that is timed: the request to a worker, and how many tokens its seconds are for."""

    key: str
    tokens: int
    request: dict[str, Any]
    seeds: int = 0  # added to the request's seed in each run, so that no run finds another's prompt in a cache


@dataclass
class Side:
    """One program under measurement; `prefix` is that of its keys in the result."""

    name: str
    prefix: str
    settings: dict[str, Any]
    worker: Worker | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    samples: dict[str, list[float]] = field(default_factory=dict)
    best: dict[str, str] = field(default_factory=dict)  # figure -> the faster of the side's variants
    peak_bytes: int = 0

    def start(self) -> None:
        """A new process, timed up to its first token."""
        self.close()
        self.worker = Worker(self.name, self.settings)
        self.facts = self.worker.ready
        for key in ("load_s", "first_token_s"):
            self.samples.setdefault(key, []).append(self.facts[key])

    def speed(self, figure: Figure, variant: str, run: int) -> float:
        """Tokens per second of one run."""
        assert self.worker is not None
        seed = figure.request["seed"] + run * figure.seeds
        return figure.tokens / self.worker.ask(**{**figure.request, "seed": seed, "variant": variant})["seconds"]

    def close(self) -> None:
        if self.worker is not None:
            self.worker.close()
            self.worker = None

    def result(self) -> dict[str, Any]:
        """Medians, and which variant they are of, by unprefixed keys."""
        variants = {f"{key}_flash_attention": variant for key, variant in self.best.items() if len(self.facts["variants"]) > 1}
        return {key: median(values) for key, values in self.samples.items()} | {"peak_bytes": self.peak_bytes} | variants


def bench(plan: BenchPlan, progress: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Measure, and return one flat dictionary: our medians, those of rivals under a prefix, and `*_ratio` against the best rival.

    A ratio above 1 is in our favour: speed is ours / theirs, time and memory theirs / ours. A rival with flash attention runs
    with and without; each of its figures is the faster of both. Peak memory is that of one prefill and one decode.
    `progress` is told what is being measured. Raises UsageError for what cannot be measured.
    """
    config = load_config(plan.folder)
    check_plan(plan, config)
    phases = figures(plan)
    requests = [figure.request for phase in phases for figure in phase]
    with ExitStack() as cleanup:
        common: dict[str, Any] = {"dtype": plan.dtype, "device": plan.device, "threads": plan.threads}
        common |= {"context": max(request["room"] for request in requests), "start_room": phases[0][0].request["room"]}
        # As large as llama.cpp's: a run writes where others wrote, and is not the first to touch its memory.
        common |= {"cache_tokens": max(request.get("sequences", 1) * -(-request["room"] // 256) * 256 for request in requests)}
        ours = Side("llmkit", "", {**common, "side": "llmkit", "folder": str(plan.folder), "kv_bits": plan.kv_bits})
        cleanup.callback(ours.close)
        rivals: list[Side] = []
        for side in cleanup.enter_context(rival_sides(plan, config, common, progress)):
            rivals.append(side)
            cleanup.callback(side.close)
        sides = [ours, *rivals]
        for start in range(plan.starts):
            for side in sides:
                progress(f"start {start + 1}/{plan.starts} of {side.name}")
                side.settings["threads"] = ours.facts.get("threads", plan.threads)  # ours, which is the first, for all
                side.start()
        memory = Worker("bandwidth", {"side": "bandwidth", "device": ours.facts["device"], "threads": ours.facts["threads"]})
        cleanup.callback(memory.close)
        bandwidth = []
        for number, phase in enumerate(phases):
            for side in sides:
                progress(f"{' '.join(figure.key for figure in phase)}: warm-up of {side.name}")
                warm_up(side, phase, first=number == 0)
            for run in range(1, plan.repeat + 1):
                bandwidth.append(memory.ask()["bandwidth"])
                for side in sides if run % 2 else reversed(sides):
                    for figure in phase:
                        progress(f"{figure.key}: run {run}/{plan.repeat} of {side.name}")
                        side.samples.setdefault(figure.key, []).append(side.speed(figure, side.best[figure.key], run))
    return summary(plan, ours, rivals, median(bandwidth))


def warm_up(side: Side, phase: list[Figure], first: bool) -> None:
    """One uncounted run of each variant of a side, which also tells the faster one for each figure."""
    assert side.worker is not None
    speeds: dict[str, dict[str, float]] = {figure.key: {} for figure in phase}
    for variant in side.facts["variants"]:
        for figure in phase:
            speeds[figure.key][variant] = side.speed(figure, variant, 0)
        if first and not side.peak_bytes:  # before a second variant takes memory too
            side.peak_bytes = side.worker.ask(do="peak")["peak_bytes"]
    side.best |= {key: max(found, key=found.__getitem__) for key, found in speeds.items()}


def figures(plan: BenchPlan) -> list[list[Figure]]:
    """What is timed, in phases: what stands in one phase takes turns. `room` is the context that a request needs."""
    base = []
    if plan.prefill:
        base.append(Figure("prefill_tok_s", plan.prefill, {"do": "prefill", "length": plan.prefill, "seed": 1}, seeds=2))
    if plan.decode:
        base.append(Figure("decode_tok_s", plan.decode, _decode(plan, DECODE_PROMPT, 1), seeds=2))
    if base:
        room = max(START_PROMPT, plan.prefill, DECODE_PROMPT + plan.decode if plan.decode else 0) + 1
        for figure in base:
            figure.request["room"] = room
    # A run at depth finds the context that the one before has left.
    phases = [base] if base else []
    phases += [[Figure(f"decode_tok_s_depth_{depth}", plan.decode, _decode(plan, depth, 1))] for depth in plan.depths]
    for batch in plan.batches:
        length = max(1, min(DECODE_PROMPT, STEP_TOKENS // batch))
        phases.append([Figure(f"decode_tok_s_batch_{batch}", batch * plan.decode, _decode(plan, length, batch), seeds=1)])
    return phases


def _decode(plan: BenchPlan, length: int, sequences: int) -> dict[str, Any]:
    room = length + plan.decode + 1
    return {"do": "decode", "length": length, "sequences": sequences, "count": plan.decode, "room": room, "seed": 2}


def check_plan(plan: BenchPlan, config: ModelConfig) -> None:
    """UsageError for what cannot be measured, before anything is loaded."""
    if not plan.decode and (plan.depths or plan.batches):
        raise UsageError("decode is 0, so there is nothing to time at a depth or in a batch. Give --decode tokens.")
    if not plan.prefill and not plan.decode:
        raise UsageError("prefill and decode are both 0, so there is nothing to measure. Give one of them tokens.")
    longest = max((figure for phase in figures(plan) for figure in phase), key=lambda figure: figure.request["room"])
    wanted = longest.request["room"]
    if wanted > config.max_position_embeddings:
        options = "--depth or --decode" if "depth" in longest.key else "--prefill or --decode" if plan.decode else "--prefill"
        raise UsageError(f"the runs need a context of {wanted} tokens and the model has {config.max_position_embeddings}. Lower {options}.")
    if plan.rival_files is not None and plan.against != "llama.cpp":
        raise UsageError("--rival-files has no effect without --against llama.cpp, whose files it keeps. Leave it out, or add that.")
    if plan.against == "transformers" and quantization(plan.folder, config) is not None:
        raise UsageError(
            f"transformers cannot read {plan.folder}, which llmkit quantized. "
            "Compare with --against llama.cpp, or give the checkpoint it was made from."
        )
    if plan.against == "llama.cpp":
        if importlib.util.find_spec("llama_cpp") is None:
            raise UsageError(f"--against llama.cpp needs llama-cpp-python, which is not installed. Build it for this processor: {INSTALL}")
        if plan.device not in (None, "cpu"):
            raise UsageError(f"llama.cpp is measured on the CPU, not on {plan.device}. Leave out --device, or compare with transformers.")


@contextmanager
def rival_sides(plan: BenchPlan, config: ModelConfig, common: dict[str, Any], progress: Callable[[str], None]) -> Iterator[list[Side]]:
    """The programs that ours is measured against, with the files that they read."""
    if plan.against is None:
        yield []
    elif plan.against == "transformers":
        yield [Side("transformers", "transformers_", {**common, "side": "transformers", "folder": str(plan.folder)})]
    else:
        with tempfile.TemporaryDirectory(prefix="llmkit-bench-") as temporary:
            into = str(plan.rival_files or temporary)
            sides = []
            for kind in rival_types(plan.folder, config):
                progress(f"writing the model for llama.cpp, {kind}")
                worker = Worker("llama.cpp export", {"side": "export", "folder": str(plan.folder), "into": into, "type": kind})
                settings = {**common, "side": "llama.cpp", "file": worker.ready["file"]}
                worker.close()
                sides.append(Side(f"llama.cpp {kind.upper()}", f"llama_cpp_{kind}_", settings))
            yield sides


def rival_types(folder: Path, config: ModelConfig) -> tuple[str, ...]:
    """The types of llama.cpp's files with about as many bits as ours: by the scheme that most of our weights have."""
    record = quantization(folder, config)
    if record is None:
        return ("f16",)
    weights: Counter[str] = Counter()
    for stored in record.tensors.values():
        weights[stored.scheme] += math.prod(stored.shape)
    return ("q8_0",) if weights.most_common(1)[0][0] == "q8" else ("q4_0", "q4_k_m")


def summary(plan: BenchPlan, ours: Side, rivals: list[Side], bandwidth: float) -> dict[str, Any]:
    """The flat result."""
    facts, found = ours.facts, ours.result()
    result: dict[str, Any] = {"model": str(plan.folder)}
    result |= {name: facts[name] for name in ("parameters", "dtype", "device", "threads", "path", "bits_per_weight")}
    result |= {"prefill_tokens": plan.prefill, "decode_tokens": plan.decode, "repeat": plan.repeat, "speculate": "off"}
    result |= found
    result["bandwidth_bytes_s"] = bandwidth
    result["bytes_per_token"] = facts["bytes_per_token"]
    for figure in (figure for phase in figures(plan) for figure in phase if figure.key.startswith("decode")):
        request = figure.request
        # In a step every weight is read once, and of every sequence what it has cached: half of the new tokens on average.
        length = request["length"] + request["count"] / 2
        cached = sum(nbytes * min(length, window or length) for nbytes, window in facts["cache"])
        read = facts["bytes_per_token"] + request["sequences"] * cached
        share = found[figure.key] / request["sequences"] * read / bandwidth
        result[figure.key.replace("decode_tok_s", "bandwidth_share")] = share
    if not rivals:
        return result
    result["against"] = plan.against
    assert plan.against is not None
    result[f"{RIVALS[plan.against]}_version"] = rivals[0].facts["version"]
    theirs = [rival.result() for rival in rivals]
    for rival, medians in zip(rivals, theirs, strict=True):
        known = {key: rival.facts[key] for key in ("dtype", "flags", "bits_per_weight") if key in rival.facts}
        result |= {rival.prefix + key: value for key, value in (known | {"name": rival.name} | medians).items()}
    for key, value in found.items():
        others = [medians[key] for medians in theirs]
        result[ratio_key(key)] = value / max(others) if "_tok_s" in key else min(others) / value
    return result


def ratio_key(key: str) -> str:
    """The key of our figure's ratio to the best rival's."""
    return key.replace("_tok_s", "_ratio") if "_tok_s" in key else key.rsplit("_", 1)[0] + "_ratio"
