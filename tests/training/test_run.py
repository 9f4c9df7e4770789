"""From a YAML file to a folder that transformers opens."""

from __future__ import annotations

import errno
import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from llmkit import finetuning
from llmkit.checkpoint.load import load_model
from llmkit.errors import ConfigError, UsageError
from llmkit.text.tokenizer import load_tokenizer
from llmkit.training.data.packing import sequential_batches
from llmkit.training.data.sources import load_corpora
from llmkit.training.objective import cross_entropy
from llmkit.training.recipe import Recipe, from_dict, read_recipe, to_dict
from llmkit.training.run import run_recipe

from .conftest import MODEL, SPECIAL, TEMPLATE, stories


def write_recipe(path: Path, **keys: object) -> Path:
    path.write_text(yaml.safe_dump(keys), encoding="utf-8")
    return path


def test_yaml_to_a_folder_that_transformers_opens(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    chats = [{"messages": [{"role": "user", "content": "Go on"}, {"role": "assistant", "content": story}]} for story in stories(40, seed=1)]
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, chats)), encoding="utf-8")
    (tmp_path / "plain.txt").write_text("<|endoftext|>".join(stories(60)), encoding="utf-8")
    recipe = write_recipe(
        tmp_path / "tiny.yaml",
        model=MODEL,
        tokenizer={"vocab_size": 300, "special_tokens": SPECIAL, "bos": "<|end|>", "eos": "<|end|>", "chat_template": TEMPLATE},
        data=[{"path": str(tmp_path / "plain.txt")}, {"path": str(tmp_path / "chats.jsonl"), "weight": 2}],
        generation={"temperature": 0.5},
        output=str(tmp_path / "run"),
        **{"max_length": 64, "batch_size": 4, "max_steps": 6, "held_out": 0.2, "eval_every": 3, "prompts": ["The"]},
        **{"optimizer": "muon", "ema": 0.9, "save_dtype": "float16"},
    )
    sampled: list[Sequence[str]] = []

    def sample(model: str, adapter: Path | None, prompts: Sequence[str]) -> list[str]:
        sampled.append(prompts)
        assert adapter is None
        load_model(model)
        if len(sampled) == 2:
            raise UsageError("this one is too long")  # and yet training goes on
        return list(prompts)

    folder = run_recipe(read_recipe(recipe), sample=sample)
    assert sampled == [("The",)] * 2

    tokenizer, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    assert theirs.encode("The cat 12") == tokenizer.encode("The cat 12")
    messages = chats[0]["messages"]
    assert tokenizer.chat_template is not None
    assert theirs.apply_chat_template(messages, tokenize=False) == tokenizer.chat_template.render(messages, add_generation_prompt=False)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert model.generation_config.temperature == 0.5
    assert model.generation_config.eos_token_id == [0]
    ids = torch.tensor([tokenizer.encode("The cat saw a ball. The dog")])
    ours = load_model(folder, dtype="float32")
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), model(ids).logits, rtol=1e-4, atol=1e-4)

    last = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()][-1]
    assert set(last) >= {"step", "eval_loss", "eval_bits_per_byte", "plain_loss", "chats_bits_per_byte"}
    _, held, _ = load_corpora(read_recipe(recipe).data, tokenizer, 0.2)
    batches = sequential_batches(held, 64, 1)
    with torch.no_grad():  # the file holds float16, so the figures agree to three digits
        nats = sum(float(cross_entropy(ours, batch)) for batch in batches)
    said = [m["content"] for c in chats for m in c["messages"][1:]]
    assert last["eval_loss"] == pytest.approx(nats / held.target_count, rel=2e-3)
    assert last["eval_bits_per_byte"] == pytest.approx(nats / math.log(2) / int(held.target_bytes.sum()), rel=2e-3)
    assert int(held.target_bytes[held.sources == 1].max()) <= max(len(text) for text in said)


def test_a_run_is_reproducible_and_never_overwritten(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    first = run_recipe(make_recipe(output=str(tmp_path / "a"), max_steps=3))
    second = run_recipe(make_recipe(output=str(tmp_path / "b"), max_steps=3))
    other = run_recipe(make_recipe(output=str(tmp_path / "c"), max_steps=3, seed=1))
    weights = [(folder / "model.safetensors").read_bytes() for folder in (first, second, other)]
    assert weights[0] == weights[1] != weights[2]
    with pytest.raises(UsageError, match="already holds a run"):
        run_recipe(make_recipe(output=str(tmp_path / "a")))


def test_a_recipe_of_ones_own_is_never_replaced(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    """Not by a run whose output is the folder that it lies in; what a run has written itself it may write again."""
    path = tmp_path / "run" / "recipe.yaml"
    path.parent.mkdir()
    recipe = make_recipe(max_steps=1)
    text = "# mine\n" + yaml.safe_dump(to_dict(recipe))
    path.write_text(text)
    for options in ([], ["--resume"]):  # there is no run to go on with
        done = subprocess.run([sys.executable, "-m", "llmkit", "finetune", str(path), *options], capture_output=True, text=True)
        assert done.returncode == 2
        assert "was not written by a run and would be replaced. Choose another output, or rename" in done.stderr
        assert [file.name for file in path.parent.iterdir()] == ["recipe.yaml"]
        assert path.read_text() == text
    path.unlink()
    run_recipe(recipe)
    stored = read_recipe(path)
    assert stored == replace(recipe, max_length=stored.max_length)
    run_recipe(replace(stored, max_steps=2), resume=True)
    assert read_recipe(path).max_steps == 2
    (path.parent / "checkpoint.pt").unlink()  # as if it had died before its first checkpoint
    shutil.rmtree(path.parent / "model")
    run_recipe(stored)
    assert read_recipe(path).max_steps == 1


def test_a_stored_recipe_is_replaced_whole(make_recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run may be started from the very file; where writing fails it is still there."""
    recipe = make_recipe(max_steps=1)
    run_recipe(recipe)
    path = tmp_path / "run" / "recipe.yaml"
    before = path.read_text()
    write = Path.write_text

    def full(self: Path, text: str, *arguments: Any, **keys: Any) -> int:
        if "recipe.yaml" in self.name:
            write(self, text[:10], *arguments, **keys)
            raise OSError(errno.ENOSPC, "No space left on device", str(self))
        return write(self, text, *arguments, **keys)

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        run_recipe(read_recipe(path, ["max_steps=2"]), resume=True)
    assert path.read_text() == before
    assert not list(path.parent.glob("*.tmp"))


def test_a_trained_model_is_trained_on(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    first = run_recipe(make_recipe(output=str(tmp_path / "a"), max_steps=30))
    before = json.loads((tmp_path / "a" / "metrics.jsonl").read_text().splitlines()[-1])["eval_loss"]
    run_recipe(make_recipe(output=str(tmp_path / "b"), model=str(first), tokenizer=None, max_steps=1, learning_rate=1e-6))
    after = json.loads((tmp_path / "b" / "metrics.jsonl").read_text().splitlines()[-1])["eval_loss"]
    assert after == pytest.approx(before, abs=1e-3)


def test_what_does_not_fit_together_is_refused(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="more than the model's 32 positions"):
        run_recipe(make_recipe(model=MODEL | {"max_position_embeddings": 32}))
    with pytest.raises(ConfigError, match="the tokenizer has 300 entries"):
        run_recipe(make_recipe(model=MODEL | {"vocab_size": 200}))


def test_command_line(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(to_dict(make_recipe(max_steps=2))))
    command = [sys.executable, "-m", "llmkit", "finetune", str(path)]
    done = subprocess.run([*command, "max_steps=1", "prompts=[The cat]"], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, str(tmp_path / "run" / "model"))
    assert "documents held out" in done.stderr
    assert "The cat -> " in done.stderr
    assert re.search(r"^  The cat -> ['\"]", done.stderr, re.MULTILINE)  # what the model said is in quotes, what it was told is not
    wrong = subprocess.run([*command, "max_step=1"], capture_output=True, text=True)
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr == "error: max_step is not a key of a recipe. Did you mean max_steps?\n"


def test_training_needs_no_engine() -> None:
    """Siblings do not import each other, and reading a recipe needs no torch."""
    code = (
        "import sys, llmkit.training.recipe; assert 'torch' not in sys.modules; "
        "import llmkit.training.run; print([m for m in sys.modules if 'llmkit.engine' in m])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_a_folder_is_opened_for_plan_and_run_a_hub_id_for_each(tmp_path: Path) -> None:
    """Of a hub id the cache may hold a part: the plan takes that, and the run downloads the rest."""
    common: dict[str, Any] = {"data": [{"path": "a.txt"}], "output": "out", "max_steps": 1}
    opened = finetuning._opened(from_dict({"model": str(tmp_path), **common}))
    assert opened is not None
    assert opened.folder == tmp_path
    for name in ("org/name", "x" * 5000, "~nobody-of-this-name/model"):
        assert finetuning._opened(from_dict({"model": name, **common})) is None
