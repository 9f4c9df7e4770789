"""How fast a model starts, reads and writes on this machine, and how that compares with transformers and with the memory's speed.

Each side runs in a process of its own (its peak memory is its own) and the sides take turns, so that whatever else the
machine does meets both; every figure is a median.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from llmkit.errors import LLMKitError

DECODE_PROMPT = 16  # tokens before the ones that are timed


@dataclass(frozen=True)
class BenchPlan:
    """What is measured. Token counts; `repeat` runs of each figure, of which the median is taken."""

    folder: Path
    dtype: str | None = None
    device: str | None = None
    threads: int | None = None
    prefill: int = 512
    decode: int = 128
    repeat: int = 3
    starts: int = 2  # process starts of each side, for load and first-token time
    against_transformers: bool = False


class Worker:
    """A running `bench_worker`; `ready` is what it said when its first token was there."""

    def __init__(self, plan: BenchPlan, side: str) -> None:
        settings = {
            "side": side,
            "folder": str(plan.folder),
            "dtype": plan.dtype,
            "device": plan.device,
            "threads": plan.threads,
            "started": time.time(),
        }
        self._side = side
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed in close()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "llmkit.measure.bench_worker", json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        self.ready = self._read()

    def ask(self, **request: Any) -> dict[str, Any]:
        """One request, one answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.terminate()
        self._process.wait()
        self._errors.close()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._errors.seek(0)
            said = self._errors.read().strip().splitlines()
            self.close()
            cause = said[-1] if said else f"exit code {self._process.returncode}"
            raise LLMKitError(f"the {self._side} side of the benchmark stopped: {cause}. Try the model with `llmkit verify` first.")
        answer: dict[str, Any] = json.loads(line)
        return answer


@dataclass
class Figures:
    """What was measured of one side."""

    load_s: list[float] = field(default_factory=list)
    first_token_s: list[float] = field(default_factory=list)
    prefill_tok_s: list[float] = field(default_factory=list)
    decode_tok_s: list[float] = field(default_factory=list)
    peak_bytes: int = 0

    def medians(self) -> dict[str, float]:
        return {
            "prefill_tok_s": median(self.prefill_tok_s),
            "decode_tok_s": median(self.decode_tok_s),
            "load_s": median(self.load_s),
            "first_token_s": median(self.first_token_s),
            "peak_bytes": self.peak_bytes,
        }


def bench(plan: BenchPlan, progress: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Measure, and return one flat dictionary: our medians, `transformers_*` for theirs, `*_ratio` for ours against theirs.

    A ratio above 1 is in our favour: speed is ours / theirs, time and memory theirs / ours.
    `progress` is told what is being measured.
    """
    sides = ["llmkit", "transformers"] if plan.against_transformers else ["llmkit"]
    figures = {side: Figures() for side in sides}
    facts: dict[str, dict[str, Any]] = {}
    workers: dict[str, Worker] = {}
    progress("memory bandwidth")
    probe = Worker(plan, "bandwidth")
    bandwidth = probe.ready["bandwidth"]
    probe.close()
    try:
        for start in range(plan.starts):
            for side in sides:
                progress(f"start {start + 1}/{plan.starts} of {side}")
                if side in workers:
                    workers.pop(side).close()
                workers[side] = Worker(plan, side)
                facts[side] = workers[side].ready
                figures[side].load_s.append(facts[side]["load_s"])
                figures[side].first_token_s.append(facts[side]["first_token_s"])
        for run in range(plan.repeat + 1):  # the first one warms up and is not counted
            for side in sides if run % 2 else reversed(sides):
                progress(f"run {run}/{plan.repeat} of {side}")
                read = workers[side].ask(do="prefill", length=plan.prefill, seed=2 * run + 1)
                wrote = workers[side].ask(do="decode", length=DECODE_PROMPT, count=plan.decode, seed=2 * run + 2)
                if run > 0:
                    figures[side].prefill_tok_s.append(plan.prefill / read["seconds"])
                    figures[side].decode_tok_s.append(plan.decode / wrote["seconds"])
                figures[side].peak_bytes = max(read["peak_bytes"], wrote["peak_bytes"])
    finally:
        for worker in workers.values():
            worker.close()

    ours = facts["llmkit"]
    result: dict[str, Any] = {
        "model": str(plan.folder),
        "parameters": ours["parameters"],
        "dtype": ours["dtype"],
        "device": ours["device"],
        "threads": ours["threads"],
        "prefill_tokens": plan.prefill,
        "decode_tokens": plan.decode,
        "repeat": plan.repeat,
    }
    result |= figures["llmkit"].medians()
    result["bandwidth_bytes_s"] = bandwidth
    result["bytes_per_token"] = ours["bytes_per_token"]
    result["bandwidth_share"] = result["decode_tok_s"] * ours["bytes_per_token"] / bandwidth
    if plan.against_transformers:
        theirs = figures["transformers"].medians()
        result |= {f"transformers_{name}": value for name, value in theirs.items()}
        result["transformers_version"] = facts["transformers"]["version"]
        result["transformers_dtype"] = facts["transformers"]["dtype"]
        for name in ("prefill_tok_s", "decode_tok_s"):
            result[name.replace("_tok_s", "_ratio")] = result[name] / theirs[name]
        for name, ratio in (("load_s", "load_ratio"), ("first_token_s", "first_token_ratio"), ("peak_bytes", "peak_ratio")):
            result[ratio] = theirs[name] / result[name]
    return result
