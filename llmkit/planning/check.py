"""Whether a run fits into the memory there is: the question that commands ask before they load anything. No torch."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from llmkit.checkpoint.source import ModelSource
from llmkit.compat import default_device
from llmkit.errors import DoesNotFit, LLMKitError
from llmkit.kernels import native_problem
from llmkit.planning.inference import Change, Run, Terms, cheaper_run, inference, quantizing
from llmkit.planning.memory import available_bytes, parse_size, shown
from llmkit.planning.model_info import Facts, read_facts

LEAST_POSITIONS = 2048  # of a chat whose context nobody chose: its cache grows with what is said


@dataclass(frozen=True)
class Fit:
    """What a run needs, and what there is."""

    what: str  # of which model
    terms: Terms
    available: int
    change: Change | None = None  # where it does not fit: what would

    @property
    def total(self) -> int:
        return sum(self.terms.values())

    @property
    def fits(self) -> bool:
        return self.total <= self.available

    @property
    def remedy(self) -> str:
        """What to do where it does not fit, in words."""
        if self.change is None:
            return "Nothing that is tried makes it fit: take a smaller model, or a machine with more memory."
        return f"With {self.change.text} it takes about {shown(self.change.total)}."

    def refuse(self) -> None:
        """DoesNotFit, with what takes most, and the remedy."""
        if self.fits:
            return
        largest = sorted(self.terms.items(), key=lambda term: -term[1])[:3]
        listed = ", ".join(f"{name} {shown(size)}" for name, size in largest)
        raise DoesNotFit(
            f"{self.what} needs about {shown(self.total)} ({listed}, ...), and {shown(self.available)} are free. {self.remedy} "
            "(LLMKIT_MEMORY=16GB, for instance, says otherwise how much there is.)"
        )


def free(device: str, memory: str | None = None) -> int:
    """The memory to plan with: as given, as LLMKIT_MEMORY says, or what the device has."""
    given = _said(memory)
    return available_bytes(device) if given is None else given


def _said(memory: str | None) -> int | None:
    text = os.environ.get("LLMKIT_MEMORY") or None if memory is None else memory
    return None if text is None else parse_size(text)


def make_run(facts: Facts, positions: int, device: str, **rest: Any) -> Run:
    """A run of a model as `llmkit.load` would run it on a device."""
    on_cpu = re.fullmatch(r"cpu(:\d+)?", device) is not None
    native = on_cpu and facts.native_problem is None and native_problem(facts.config) is None
    return Run(min(positions, facts.config.max_position_embeddings), device=device, native=native, **rest)


def fit_run(facts: Facts, run: Run, available: int, draft: Facts | None = None) -> Fit:
    """Whether a model can be loaded and generate."""
    terms = inference(facts, run)
    if draft is not None:
        terms["draft model"] = sum(size for name, size in inference(draft, replace(run, dtype=None)).items() if name != "process")
    fit = Fit(facts.name, terms, available)
    return fit if fit.fits else replace(fit, change=cheaper_run(facts, run, available - terms.get("draft model", 0)))


def check_run(source: ModelSource, arguments: Mapping[str, Any]) -> None:
    """DoesNotFit where a model cannot be loaded with these arguments of `llmkit.load`.

    What is wrong with the model or an argument is left to `load`, which says it better.
    """
    given = _said(None)
    try:
        facts = read_facts(source)
        named = arguments.get("draft_model")
        draft = None if named is None else read_facts(ModelSource.open(named, download=False))
        device = arguments.get("device") or default_device()
        positions = arguments.get("ctx_size") or LEAST_POSITIONS
        run = make_run(facts, positions, device, dtype=arguments.get("dtype"), kv_bits=arguments.get("kv_bits"))
        fit = fit_run(facts, run, available_bytes(device) if given is None else given, draft)
    except (LLMKitError, OSError, ValueError, RuntimeError):
        return
    fit.refuse()


def check_quantizing(source: ModelSource, scheme: str) -> None:
    """DoesNotFit where a model cannot be quantized here."""
    try:
        facts = read_facts(source)
    except LLMKitError:  # quantizing says what is wrong
        return
    Fit(f"quantizing {facts.name}", quantizing(facts, scheme), free("cpu")).refuse()
