"""Whether a recipe fits into the memory there is. No torch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from llmkit.checkpoint.source import ModelSource
from llmkit.compat import default_device
from llmkit.errors import LLMKitError
from llmkit.planning.check import Fit, free
from llmkit.planning.model_info import Facts, mapping_facts, read_facts, tokenizer_entries
from llmkit.planning.training import cheaper_recipe, predict
from llmkit.training.recipe import Recipe, TokenizerRecipe


def fit_recipe(recipe: Recipe, facts: Facts, available: int, device: str) -> Fit:
    """Whether a recipe can be trained."""
    teacher, data = _teacher(recipe), data_size(recipe)
    terms = predict(recipe, facts, device, available=available, teacher=teacher, data_bytes=data)
    fit = Fit(f"training {facts.name}", terms, available)
    return fit if fit.fits else replace(fit, change=cheaper_recipe(recipe, facts, available, device, teacher, data))


def settle(recipe: Recipe, source: ModelSource | None = None) -> tuple[Recipe, Fit | None]:
    """The recipe with what it leaves to the memory there is (`checkpointing`), and what it will take; None where its model is not here yet.

    source: the recipe's model, where it is open already. Raises DoesNotFit where it cannot be trained here.
    """
    facts = recipe_facts(recipe, source)
    if facts is None:
        return recipe, None
    device = recipe_device(recipe)
    available = free(device)
    fit = fit_recipe(recipe, facts, available, device)
    fit.refuse()
    return replace(recipe, checkpointing=checkpoints(recipe, facts, available, device)), fit


def checkpoints(recipe: Recipe, facts: Facts, available: int, device: str) -> bool:
    """Whether activations are computed again on the way back: as the recipe says, else where it would not fit without."""
    if recipe.checkpointing is not None:
        return recipe.checkpointing
    plain = replace(recipe, checkpointing=False)
    return sum(predict(plain, facts, device, teacher=_teacher(recipe), data_bytes=data_size(recipe)).values()) > available


def recipe_device(recipe: Recipe) -> str:
    return default_device() if recipe.device == "auto" else recipe.device


def recipe_facts(recipe: Recipe, source: ModelSource | None = None) -> Facts | None:
    """The facts of a recipe's model; None where it is not here, or a file of it cannot be read."""
    try:
        if isinstance(recipe.model, str):
            return read_facts(source or ModelSource.open(recipe.model, download=False))
        assert recipe.tokenizer is not None  # the recipe refuses that
        tokenizer = recipe.tokenizer
        if isinstance(tokenizer, TokenizerRecipe):
            entries = tokenizer.vocab_size
        else:
            entries = tokenizer_entries(ModelSource.open(tokenizer, download=False).folder)
        return mapping_facts(recipe.model, entries, recipe.max_length or 2048)
    except LLMKitError:
        return None


def _teacher(recipe: Recipe) -> Facts | None:
    distill = recipe.distill
    if distill is None:
        return None
    try:
        facts = read_facts(ModelSource.open(distill.teacher, download=False))
    except LLMKitError:  # not here yet, or wrong, which the run says better
        return None
    return facts.quantized_as(distill.quantize) if distill.quantize is not None and not facts.quantized else facts


def data_size(recipe: Recipe) -> int:
    """Bytes of the recipe's files that are here; a hub id counts nothing."""
    size = 0
    for source in recipe.data:
        path = Path(source.path)
        files = path.rglob("*") if path.is_dir() else [path]
        size += sum(file.stat().st_size for file in files if file.is_file() and file.suffix in (".txt", ".md", ".jsonl"))
    return size
