"""How fast a model starts, reads a prompt and decodes on this machine, and how that compares with the memory's speed.

Every program runs in a process of its own (its peak memory is its own) and they take turns, so that whatever else the machine does
meets all of them; every figure is a median.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from llmkit.bench.process import Settings, Worker
from llmkit.bench.worker import START_PROMPT
from llmkit.checkpoint.files import load_config
from llmkit.config import ModelConfig
from llmkit.errors import UsageError

DECODE_PROMPT = 16  # tokens before the ones that are timed
STEP_TOKENS = 512  # of prompts in one step: all sequences of a batch begin in the same one


@dataclass(frozen=True)
class BenchPlan:
    """What is measured. Token counts (0 leaves a figure out); `repeat` runs of each figure, of which the median is taken.

    depths: decoding after so many tokens of context. batches: decoding so many sequences at once.
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
    starts: int = 3  # process starts of each program, for load and first-token time


@dataclass(frozen=True)
class Figure:
    """One thing that is timed: the request to a worker, and how many tokens its seconds are for."""

    key: str
    tokens: int
    request: dict[str, Any]
    seeds: int = 0  # added to the request's seed in each run, so that no run finds another's prompt in a cache


@dataclass
class DecodingProgram:
    """A program under measurement; `prefix` is that of its keys in the result."""

    name: str
    prefix: str
    settings: Settings  # of its worker
    module: str = "llmkit.bench.worker"  # that runs it
    worker: Worker | None = None
    report: dict[str, Any] = field(default_factory=dict)
    samples: dict[str, list[float]] = field(default_factory=dict)
    best: dict[str, str] = field(default_factory=dict)  # figure -> the faster of the program's variants
    peak_bytes: int = 0

    def start(self) -> None:
        """Start a new process, timed up to its first token."""
        self.close()
        self.worker = Worker(self.name, self.settings, self.module)
        self.report = self.worker.ready
        for key in ("load_s", "first_token_s"):
            self.samples.setdefault(key, []).append(self.report[key])

    def speed(self, figure: Figure, variant: str, run: int) -> float:
        """Return the tokens per second of one run."""
        assert self.worker is not None
        seed = figure.request["seed"] + run * figure.seeds
        return figure.tokens / self.worker.ask(**{**figure.request, "seed": seed, "variant": variant})["seconds"]

    def close(self) -> None:
        if self.worker is not None:
            self.worker.close()
            self.worker = None

    def result(self) -> dict[str, Any]:
        """Return medians, and which variant they are of, by unprefixed keys."""
        variants = {f"{key}_flash_attention": variant for key, variant in self.best.items() if len(self.report["variants"]) > 1}
        return {key: median(values) for key, values in self.samples.items()} | {"peak_bytes": self.peak_bytes} | variants


def common_settings(plan: BenchPlan) -> Settings:
    """Return what every program is started with, other than its model."""
    requests = [figure.request for phase in figures(plan) for figure in phase]
    return {
        "load": {"dtype": plan.dtype, "device": plan.device, "threads": plan.threads},
        "context": max(request["room"] for request in requests),
        "start_room": requests[0]["room"],
    }


def bench(plan: BenchPlan, progress: Callable[[str], None] = lambda _: None, rivals: Sequence[DecodingProgram] = ()) -> dict[str, Any]:
    """Measure llmkit, and return one flat dictionary of medians. Peak memory is that of one prefill and one decode.

    A program with several variants (flash attention on and off) runs with all; each of its figures is the fastest variant's.
    progress: is told what is being measured. rivals: other programs that take turns with it; they hold their samples afterwards.
    Raises UsageError for what cannot be measured.
    """
    check_plan(plan, load_config(plan.folder))
    phases = figures(plan)
    settings = common_settings(plan)
    # As large as llama.cpp's: a run writes where others wrote, and is not the first to touch its memory.
    requests = [figure.request for phase in phases for figure in phase]
    cache = max(request.get("sequences", 1) * -(-request["room"] // 256) * 256 for request in requests)
    load = {**settings["load"], "ctx_size": settings["context"], "cache_tokens": cache, "kv_bits": plan.kv_bits}
    ours = DecodingProgram("llmkit", "", {**settings, "side": "llmkit", "folder": str(plan.folder), "load": load})
    programs = [ours, *rivals]
    with ExitStack() as cleanup:
        for program in programs:
            cleanup.callback(program.close)
        for start in range(plan.starts):
            for program in programs:
                progress(f"start {start + 1}/{plan.starts} of {program.name}")
                # All run on as many threads as ours, which is the first, took.
                threads = ours.report.get("threads", plan.threads)
                program.settings["load"] = {**program.settings["load"], "threads": threads}
                program.start()
        memory = Worker("bandwidth", {"side": "bandwidth", "device": ours.report["device"], "threads": ours.report["threads"]})
        cleanup.callback(memory.close)
        bandwidth: list[float] = []
        for number, phase in enumerate(phases):
            for program in programs:
                progress(f"{' '.join(figure.key for figure in phase)}: warm-up of {program.name}")
                warm_up(program, phase, first=number == 0)
            for run in range(1, plan.repeat + 1):
                bandwidth.append(memory.ask()["bandwidth"])
                for program in programs if run % 2 else reversed(programs):
                    for figure in phase:
                        progress(f"{figure.key}: run {run}/{plan.repeat} of {program.name}")
                        program.samples.setdefault(figure.key, []).append(program.speed(figure, program.best[figure.key], run))
    return summary(plan, ours, median(bandwidth))


def warm_up(program: DecodingProgram, phase: list[Figure], first: bool) -> None:
    """Run each variant of a program once, uncounted, which also tells the fastest one for each figure."""
    assert program.worker is not None
    speeds: dict[str, dict[str, float]] = {figure.key: {} for figure in phase}
    for variant in program.report["variants"]:
        for figure in phase:
            speeds[figure.key][variant] = program.speed(figure, variant, 0)
        if first and not program.peak_bytes:  # before a second variant takes memory too
            program.peak_bytes = program.worker.ask(do="peak")["peak_bytes"]
    program.best |= {key: max(found, key=found.__getitem__) for key, found in speeds.items()}


def figures(plan: BenchPlan) -> list[list[Figure]]:
    """Return what is timed, in phases: what stands in one phase takes turns. `room` is the context that a request needs."""
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
    """Raise UsageError for what cannot be measured, before anything is loaded."""
    if not plan.decode and (plan.depths or plan.batches):
        raise UsageError("decode is 0, so there is nothing to time at a depth or in a batch. Give --decode tokens.")
    if not plan.prefill and not plan.decode:
        raise UsageError("prefill and decode are both 0, so there is nothing to measure. Give one of them tokens.")
    longest = max((figure for phase in figures(plan) for figure in phase), key=lambda figure: figure.request["room"])
    wanted = longest.request["room"]
    if wanted > config.max_position_embeddings:
        options = "--depth or --decode" if "depth" in longest.key else "--prefill or --decode" if plan.decode else "--prefill"
        raise UsageError(f"the runs need a context of {wanted} tokens and the model has {config.max_position_embeddings}. Lower {options}.")


def summary(plan: BenchPlan, ours: DecodingProgram, bandwidth: float) -> dict[str, Any]:
    """Return the flat result; bandwidth: bytes that the machine reads in a second."""
    report, found = ours.report, ours.result()
    result: dict[str, Any] = {"model": str(plan.folder)}
    result |= {name: report[name] for name in ("parameters", "dtype", "device", "threads", "path", "bits_per_weight")}
    result |= {"prefill_tokens": plan.prefill, "decode_tokens": plan.decode, "repeat": plan.repeat, "speculate": "off"}
    result |= found
    result["bandwidth_bytes_s"] = bandwidth
    result["bytes_per_token"] = report["bytes_per_token"]
    for figure in (figure for phase in figures(plan) for figure in phase if figure.key.startswith("decode")):
        request = figure.request
        # In a step every weight is read once, and of every sequence what it has cached: half of the new tokens on average.
        length = request["length"] + request["count"] / 2
        cached = sum(nbytes * min(length, window or length) for nbytes, window in report["cache"])
        read = report["bytes_per_token"] + request["sequences"] * cached
        share = found[figure.key] / request["sequences"] * read / bandwidth
        result[figure.key.replace("decode_tok_s", "bandwidth_share")] = share
    return result
