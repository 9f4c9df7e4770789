"""Recipes: what is accepted, and what the errors say."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml

from llmkit.errors import UsageError
from llmkit.training.recipe import Recipe, TokenizerRecipe, from_dict, keys_help, read_recipe, to_dict

ROOT = Path(__file__).parents[2]
GOOD = """
model: some/folder
data: [{path: a.jsonl, weight: 2}, {path: b.txt}]
output: runs/a
max_steps: 10
learning_rate: 3e-4
"""


def read(tmp_path: Path, text: str, *overrides: str) -> Recipe:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return read_recipe(path, overrides)


def test_keys_and_overrides(tmp_path: Path) -> None:
    recipe = read(tmp_path, GOOD, "data.1.weight=0.5", "optimizer=muon", "epochs=2", "max_steps=null", "prompts=[a, b]", "model=other")
    assert recipe.learning_rate == 3e-4  # YAML 1.1 reads 3e-4 as a string
    assert [source.weight for source in recipe.data] == [2.0, 0.5]
    assert (recipe.optimizer, recipe.epochs, recipe.max_steps, recipe.prompts, recipe.model) == ("muon", 2.0, None, ("a", "b"), "other")


def test_a_source_more_and_paths_from_python(tmp_path: Path) -> None:
    recipe = read(tmp_path, GOOD, "data.2.path=more.jsonl", "data.2.weight=3")
    assert (recipe.data[2].path, recipe.data[2].weight) == ("more.jsonl", 3.0)
    keys = {"model": tmp_path, "data": [{"path": tmp_path / "a.jsonl"}], "output": tmp_path, "max_steps": 1}
    assert from_dict(keys).data[0].path == str(tmp_path / "a.jsonl")


def test_a_stored_recipe_reads_back(tmp_path: Path) -> None:
    tokenizer = "{vocab_size: 300, special_tokens: [<s>], bos: <s>, eos: <s>}"
    recipe = read(tmp_path, GOOD + f"tokenizer: {tokenizer}\n", "model={model_type: llama, hidden_size: 8}", "generation.temperature=0.5")
    assert isinstance(recipe.tokenizer, TokenizerRecipe)
    assert recipe.generation == {"temperature": 0.5}
    assert from_dict(yaml.safe_load(yaml.safe_dump(to_dict(recipe)))) == recipe


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("learnin_rate=1", "learnin_rate is not a key of a recipe. Did you mean learning_rate?"),
        ("data.0.wieght=1", "data.0.wieght is not a key of a recipe. Did you mean data.0.weight?"),
        ("lr=1", "lr is not a key of a recipe. Did you mean learning_rate?"),
        ("lora_rank=4", "lora_rank is not a key of a recipe. Did you mean lora.r?"),
        ("lora.rank=4", "lora.rank is not a key of a recipe. Did you mean lora.r?"),
        ("learning_rate=fast", "learning_rate is 'fast', which is not a number."),
        ("learning_rate=.nan", "learning_rate is nan, which is out of range."),
        ("batch_size=2.5", "batch_size is 2.5, which is not an integer."),
        ("batch_size=true", "batch_size is True, which is not an integer."),
        ("batch_size=0", "batch_size is 0, which is out of range. Choose a value from 1 to 1,048,576."),
        ("device=gpu", "device is 'gpu', which is not a choice. Choose one of auto, cpu, cuda, cuda:1, mps."),
        ("compile=1", "compile is 1, which is not a true|false."),
        ("schedule=cosin", "schedule is 'cosin', which is not a choice. Did you mean cosine?"),
        ("data=a.txt", "data is 'a.txt', which is not a list."),
        ("data=[a.txt]", "data.0 is 'a.txt', not a mapping."),
        ("data=[]", "data lists no source."),
        ("data.0.weight=-1", "data.0.weight is -1, which is out of range."),
        ("data.7.weight=1", "data.7.weight cannot be set: data.7 does not exist"),
        ("output.x=1", "output.x cannot be set"),
        ("max_steps=null", "Nothing says when to stop."),
        ("muon_learning_rate=1e-3", "muon_learning_rate has no effect with optimizer=adamw."),
        ("model={model_type: llama}", "model is a configuration without a tokenizer."),
        ("tokenizer={vocab_size: 300}", "a new tokenizer does not fit the trained embedding of some/folder."),
        ("tokenizer={vocab_size: 100}", "tokenizer.vocab_size is 100, but 256 bytes and the special tokens need 257."),
        ("tokenizer={vocab_size: 300, bos: <s>}", "tokenizer.bos is '<s>', which is not among tokenizer.special_tokens."),
        ("tokenizer={}", "tokenizer.vocab_size is missing."),
        ("tokenizer=7", "tokenizer is 7, which is not a string."),
        ("max_steps", "'max_steps' is not of the form key=value."),
        ("prompts=[", "the value in 'prompts=[' cannot be read."),
        ("seed=2026-13-01", "the value in 'seed=2026-13-01' cannot be read."),
        ("seed=!!timestamp x", "the value in 'seed=!!timestamp x' cannot be read."),
        ("learning_rate=1" + "0" * 400, "learning_rate is 1000"),
        ("seed=1" + "0" * 400, "seed is 1000"),
        ("data.²=1", "data.² cannot be set"),
    ],
)
def test_errors_name_the_key_and_the_remedy(tmp_path: Path, override: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        read(tmp_path, GOOD, override)
    message = str(caught.value)
    assert said in message
    assert message.rstrip().endswith((".", "?"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- a", "is a list, not a mapping"),
        ("a: [", "is not YAML"),
        ("", "is a NoneType"),
        ("seed: 2026-13-01", "is not YAML"),
        ("seed: !!int x", "is not YAML"),
        ("seed: " + "9" * 5000, "is not YAML"),
        ("prompts: " + "[" * 2000, "is not YAML"),
    ],
)
def test_files_that_are_no_recipe(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        read(tmp_path, text)
    with pytest.raises(UsageError, match="cannot be read"):
        read_recipe(tmp_path / "none.yaml")


def test_values_are_shown_in_short(tmp_path: Path) -> None:
    """A few lines of aliases can stand for a value of gigabytes."""
    doubled = "\n".join(f"  - &a{n + 1} [*a{n}, *a{n}]" for n in range(24))
    with pytest.raises(UsageError, match="which is not an integer") as caught:
        read(tmp_path, GOOD + f"seed:\n  - &a0 [x, x]\n{doubled}\n")
    assert len(str(caught.value)) < 2000


def test_help_tells_every_key() -> None:
    text = keys_help()
    for field in dataclasses.fields(Recipe):
        assert f"{field.name} (" in text
    assert "data.N.weight (number; default 1.0)" in text
    assert "data.N.columns (mapping; default {})" in text
    assert "prompts (list; default [])" in text
    assert "tokenizer.vocab_size (integer; required)" in text
