"""`llmkit bench --against`: llmkit next to transformers or llama.cpp on the same weights, taking turns in one run."""

from __future__ import annotations

import importlib.util
import math
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llmkit.bench.inference import BenchPlan, DecodingProgram, bench, check_plan, common_settings
from llmkit.bench.process import Worker
from llmkit.checkpoint.files import load_config
from llmkit.checkpoint.source import ModelSource
from llmkit.config import ModelConfig
from llmkit.errors import UsageError
from llmkit.quant.schemes import Choice

RIVALS = {"transformers": "transformers", "llama.cpp": "llama_cpp"}  # and how their keys begin
WORKER = "benchmarks.worker"
INSTALL = 'CMAKE_ARGS="-DGGML_NATIVE=ON" pip install --no-binary llama-cpp-python "llmkit[llama-cpp]"'


def compare(
    plan: BenchPlan, against: str, rival_files: Path | None = None, progress: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """Measure llmkit and a rival, and return what `bench` does, the rival's medians under its prefix, and `*_ratio` to the best rival.

    A ratio above 1 is in llmkit's favour: speed is ours / theirs, time and memory theirs / ours.
    rival_files: the folder where files for llama.cpp are kept and found again; by default they are written again and removed.
    Raises UsageError for what cannot be measured.
    """
    config = load_config(plan.folder)
    check_plan(plan, config)
    check_rival(plan, against, rival_files, config)
    with rival_programs(plan, against, rival_files, config, progress) as rivals:
        result = bench(plan, progress, rivals)
    return result | ratios(result, against, rivals)


def check_rival(plan: BenchPlan, against: str, rival_files: Path | None, config: ModelConfig) -> None:
    """Raise UsageError for what cannot be compared, before anything is loaded."""
    if rival_files is not None and against != "llama.cpp":
        raise UsageError("--rival-files has no effect without --against llama.cpp, whose files it keeps. Leave it out, or add that.")
    if against == "transformers" and not ModelSource(plan.folder).format.transformers_reads:
        raise UsageError(
            f"transformers cannot read {plan.folder}, which llmkit quantized. "
            "Compare with --against llama.cpp, or give the checkpoint it was made from."
        )
    if against == "llama.cpp":
        if importlib.util.find_spec("llama_cpp") is None:
            raise UsageError(f"--against llama.cpp needs llama-cpp-python, which is not installed. Build it for this processor: {INSTALL}")
        if plan.device not in (None, "cpu"):
            raise UsageError(f"llama.cpp is measured on the CPU, not on {plan.device}. Leave out --device, or compare with transformers.")


@contextmanager
def rival_programs(
    plan: BenchPlan, against: str, rival_files: Path | None, config: ModelConfig, progress: Callable[[str], None]
) -> Iterator[list[DecodingProgram]]:
    """Yield the programs that llmkit is measured against, with the files that they read."""
    common = common_settings(plan)
    if against == "transformers":
        settings = {**common, "side": "transformers", "folder": str(plan.folder)}
        yield [DecodingProgram("transformers", "transformers_", settings, WORKER)]
        return
    with tempfile.TemporaryDirectory(prefix="llmkit-bench-") as temporary:
        into = str(rival_files or temporary)
        programs = []
        for kind in rival_types(plan.folder):
            progress(f"writing the model for llama.cpp, {kind}")
            # In a process of its own, since llama.cpp ends the one that it fails in.
            writer = Worker("llama.cpp export", {"side": "export", "folder": str(plan.folder), "into": into, "type": kind}, WORKER)
            settings = {**common, "side": "llama.cpp", "file": writer.ready["file"]}
            writer.close()
            programs.append(DecodingProgram(f"llama.cpp {kind.upper()}", f"llama_cpp_{kind}_", settings, WORKER))
        yield programs


def rival_types(folder: Path) -> tuple[str, ...]:
    """Return the types of llama.cpp's files with about as many bits as ours: by the scheme that most of our weights have."""
    source = ModelSource(folder)
    if not source.quantized:
        return ("f16",)
    weights: Counter[str] = Counter()
    for name, stored in source.format.storage.items():
        if isinstance(stored, Choice):
            weights[stored.scheme] += math.prod(source.shapes[name])
    return ("q8_0",) if weights.most_common(1)[0][0] == "q8" else ("q4_0", "q4_k_m")


def ratios(result: dict[str, Any], against: str, rivals: Sequence[DecodingProgram]) -> dict[str, Any]:
    """Return the rivals' medians under their prefixes, and the ratios of ours, in `result`, to the best of them."""
    found: dict[str, Any] = {"against": against, f"{RIVALS[against]}_version": rivals[0].report["version"]}
    medians = [rival.result() for rival in rivals]
    for rival, theirs in zip(rivals, medians, strict=True):
        known = {key: rival.report[key] for key in ("dtype", "flags", "bits_per_weight") if key in rival.report}
        found |= {rival.prefix + key: value for key, value in (known | {"name": rival.name} | theirs).items()}
    for key in [key for key in medians[0] if key in result]:
        others = [theirs[key] for theirs in medians]
        found[ratio_key(key)] = result[key] / max(others) if "_tok_s" in key else min(others) / result[key]
    return found


def ratio_key(key: str) -> str:
    """Return the key of our figure's ratio to the best rival's."""
    return key.replace("_tok_s", "_ratio") if "_tok_s" in key else key.rsplit("_", 1)[0] + "_ratio"
