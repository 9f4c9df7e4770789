"""A recipe from the memory it needs to the weights it leaves: `llmkit.finetune` and `llmkit finetune`."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmkit.checkpoint.source import ModelSource
from llmkit.errors import naming_extras
from llmkit.planning.check_training import recipe_device, settle
from llmkit.planning.memory import measured_peak, shown
from llmkit.training.recipe import Recipe, from_dict, read_recipe


@naming_extras("train")
def finetune(recipe: str | Path | Mapping[str, Any] | Recipe, *overrides: str, resume: bool = False) -> Path:
    """Train or fine-tune as a recipe says; returns the folder with the model, or with `lora` the adapter.

    recipe: a YAML file, or its keys. overrides: "learning_rate=1e-4", "lora.r=8", ... to a file. resume: go on from the last checkpoint.

    Raises LLMKitError (see llmkit.errors): UsageError for the recipe or its data, DoesNotFit before anything is loaded, TrainingError
    where the loss stops being a number. KeyboardInterrupt after an orderly stop with a checkpoint.
    """
    settings = (
        recipe if isinstance(recipe, Recipe) else from_dict(recipe) if isinstance(recipe, Mapping) else read_recipe(Path(recipe), overrides)
    )
    source = _opened(settings)
    settings, fit = settle(settings, source)
    from llmkit.training.run import run_recipe

    folder = run_recipe(settings, resume=resume, sample=_sample, source=source)
    if fit is not None:
        peak = measured_peak(recipe_device(settings))
        print(f"memory: {shown(fit.total)} predicted, {shown(peak)} measured ({peak / fit.total - 1:+.0%})", file=sys.stderr)
    return folder


def _opened(recipe: Recipe) -> ModelSource | None:
    """The folder to start from, opened once for plan and run; None for a hub id.

    Of a hub id the cache may hold a part, which is enough to plan with; the run downloads the rest.
    """
    if not isinstance(recipe.model, str) or not os.path.isdir(os.path.expanduser(recipe.model)):
        return None
    return ModelSource.open(recipe.model)


def _sample(model: str, adapter: Path | None, prompts: Sequence[str]) -> list[str]:
    """What a person would get: an answer where the model chats, else a continuation."""
    import llmkit

    llm = llmkit.load(model, adapter=adapter)
    speak = llm.chat if llm.tokenizer.chat_template is not None else llm.generate
    length = min(120, llm.config.max_position_embeddings // 2)
    return [f"{prompt} -> {speak(prompt, max_tokens=length, seed=0).text!r}" for prompt in prompts]
