"""`finetune --check-data`: what it shows, and what it says is wrong."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from llmkit.cli.check_data import print_check
from llmkit.cli.main import run
from llmkit.training.data.packing import row_length
from llmkit.training.data.preview import DataCheck, check_data
from llmkit.training.recipe import Recipe, to_dict

from .conftest import stories


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    path = tmp_path / "chats.jsonl"
    rows = [{"prompt": f"Tell story {n}.", "completion": text} for n, text in enumerate(stories(60))]
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


def shown(check: DataCheck, colour: bool = False) -> str:
    console = Console(file=io.StringIO(), force_terminal=colour, width=120, highlight=False, color_system="standard" if colour else None)
    print_check(check, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_what_is_shown(make_recipe: Callable[..., Recipe], chats: Path) -> None:
    check = check_data(make_recipe(data=[{"path": str(chats)}], held_out=0.1), samples=1)
    assert not check.problems
    (sample,) = check.samples
    assert "".join(text for text, learned in sample.pieces if learned).endswith(".<|end|>")
    text = shown(check)
    assert f"<|user|>Tell story 0.<|assistant|>[[{stories(1)[0]}<|end|>]]" in text
    (source,) = check.report.sources
    assert source.documents + source.held_out == 60
    assert sum(count for *_, count in check.lengths) == source.documents
    assert all(low <= high for low, high, _ in check.lengths)
    assert check.lengths[-1][1] >= check.longest
    assert source.tokens - source.documents <= check.rows * 48
    assert f"{check.rows} rows of 48 tokens" in text
    assert "\x1b[32m" in shown(check, colour=True)
    assert "[[" not in shown(check, colour=True)


def endless(chats: Path) -> str:
    """A file whose only answer is cut before its end."""
    path = chats.with_name("long.jsonl")
    path.write_text(json.dumps({"prompt": "a", "completion": " ".join(stories(40))}), encoding="utf-8")
    return str(path)


def test_problems_are_named(make_recipe: Callable[..., Recipe], chats: Path) -> None:
    check = check_data(make_recipe(data=[{"path": str(chats)}, {"path": endless(chats)}], held_out=0))
    (problem,) = check.problems
    assert "long.jsonl never teaches an end token" in problem
    empty = chats.with_name("empty.jsonl")
    empty.write_text('{"prompt": "a", "completion": ""}')
    check = check_data(make_recipe(data=[{"path": str(chats)}, {"path": str(empty)}]))
    assert "empty.jsonl has 1 rows and nothing to learn" in check.problems[0]


def test_the_command(make_recipe: Callable[..., Recipe], chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(to_dict(make_recipe(data=[{"path": str(chats)}]))))
    assert run(["finetune", str(recipe), "--check-data"]) == 0
    said = capsys.readouterr()
    assert "chats.jsonl:1" in said.out
    assert "end learned" in said.out
    assert not (tmp_path / "run").exists()
    assert run(["finetune", str(recipe), "--check-data", f"data.0.path={endless(chats)}", "held_out=0"]) == 3
    assert "never teaches an end token" in capsys.readouterr().err
    assert run(["finetune", str(recipe), "--check-data", "--resume"]) == 2


def test_the_usual_length_of_a_row() -> None:
    assert row_length(None, 1024) == 1024
    assert row_length(None, 131072) == 2048
    assert row_length(None, None) == 2048
    assert row_length(64, 1024) == 64
