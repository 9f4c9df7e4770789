"""`adapter_config.json`: what PEFT (https://huggingface.co/docs/peft) writes of a LoRA beside its weights. No torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import sqrt
from typing import Any, TypeVar

METADATA = "llmkit"  # in the safetensors header: the fingerprints, as JSON; PEFT and transformers pass over it
PREFIX = "base_model.model."  # of the names of tensors

# What an adapter may say and we need not know: how it was trained and initialised, and which modules its tensors name anyway.
IGNORED = {
    "auto_mapping", "peft_version", "task_type", "revision", "inference_mode", "lora_dropout", "fan_in_fan_out", "bias", "target_modules",
    "exclude_modules", "target_parameters", "modules_to_save", "layers_to_transform", "layers_pattern", "loftq_config", "eva_config",
    "corda_config", "lora_ga_config", "velora_config", "megatron_config", "megatron_core", "runtime_config", "qalora_group_size",
}  # fmt: skip
READ = {"peft_type", "base_model_name_or_path", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora"}
# PEFT applies these initialisations to the base weights too, and again whenever it loads the adapter.
CHANGES_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")

# A pattern comes out of a file, and Python's matcher may take exponential time where repeated groups stand in it.
_HARMLESS = re.compile(r"(?:[^*+?{]|(?<=[.\w\]])[*+?]|\\[*+?{])*")
_MOST_REPEATS = 4


@dataclass(frozen=True)
class AdapterSettings:
    """The fields of adapter_config.json that decide what an adapter computes, by PEFT's names.

    rank_pattern and alpha_pattern are regular expressions, matched against the end of a module's path, in place of r and lora_alpha.
    """

    r: int = 8
    lora_alpha: float = 8
    use_rslora: bool = False  # scaled by lora_alpha / sqrt(r), arXiv:2312.03732
    use_dora: bool = False  # rows of the sum are scaled to learned lengths, arXiv:2402.09353
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    base_model_name_or_path: str | None = None

    def rank(self, module: str) -> int:
        """The rank of a module, given its path."""
        return _looked_up(self.rank_pattern, module, self.r)

    def scale(self, module: str, rank: int) -> float:
        """What the product B A of a module is multiplied by."""
        return _looked_up(self.alpha_pattern, module, self.lora_alpha) / (sqrt(rank) if self.use_rslora else rank)


Number = TypeVar("Number", int, float)


def _looked_up(patterns: Mapping[str, Number], module: str, default: Number) -> Number:
    names = (module, f"{module}.weight")  # PEFT may wrap the weight (target_parameters: routers of transformers 5), and matches its path
    return next((value for pattern, value in patterns.items() if any(re.match(rf"(.*\.)?({pattern})$", name) for name in names)), default)


def parse_settings(said: Mapping[str, Any], problems: list[str]) -> AdapterSettings:
    """The settings of an adapter_config.json; everything in it that is wrong, or that llmkit does not run, goes to `problems`."""

    def wrong(name: str, needed: str) -> None:
        problems.append(f"{name} is {said.get(name)!r:.80}, not {needed}")

    if said.get("peft_type") != "LORA":
        problems.append(f"peft_type is {said.get('peft_type')!r:.40}; llmkit runs LORA")
    r, alpha = said.get("r", 8), said.get("lora_alpha", 8)
    if not _is_rank(r):
        wrong("r", "a whole number from 1")
        r = 1
    if not _is_number(alpha):
        wrong("lora_alpha", "a number")
        alpha = 1
    patterns: dict[str, dict[str, Any]] = {}
    for name, fits in (("rank_pattern", _is_rank), ("alpha_pattern", _is_number)):
        found = said.get(name) or {}
        if not isinstance(found, Mapping) or not all(fits(value) for value in found.values()):
            wrong(name, "patterns with their numbers")
            found = {}
        patterns[name] = {pattern: value for pattern, value in found.items() if _usable(pattern, problems)}
    flags: dict[str, Any] = {}
    for name in ("use_rslora", "use_dora"):
        flags[name] = said.get(name) or False
        if not isinstance(flags[name], bool):
            wrong(name, "true or false")
            flags[name] = False
    init = said.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(CHANGES_BASE):
        problems.append(
            f"init_lora_weights {init!r:.40} changes the base model too; save it as a LoRA of the plain base (PEFT converts it)"
        )
    for name, value in said.items():
        if name not in IGNORED | READ | {"init_lora_weights"} and value not in (None, False, [], {}):
            problems.append(f"{name} = {value!r:.80} is not something llmkit runs")
    base = said.get("base_model_name_or_path")
    fields: dict[str, Any] = {"r": r, "lora_alpha": alpha, **flags, **patterns}
    return AdapterSettings(**fields, base_model_name_or_path=base if isinstance(base, str) else None)


def _is_rank(value: Any) -> bool:
    return type(value) is int and 1 <= value < 1 << 24


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30


def _usable(pattern: str, problems: list[str]) -> bool:
    repeats = len(re.findall(r"[*+?]", pattern))
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError):
        repeats = _MOST_REPEATS + 1
    if repeats > _MOST_REPEATS or not _HARMLESS.fullmatch(pattern):
        problems.append(f"the pattern {pattern!r:.80} is none that llmkit matches (a few of . * + ? and no repeated groups)")
        return False
    return True
