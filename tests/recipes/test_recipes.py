"""Every recipe says how it is started and what it needs, and in a small configuration runs to its end through the command."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import robot_data

import llmkit
from llmkit.cli.main import run
from llmkit.training.recipe import read_recipe
from tests.conftest import ROOT

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
SMALL = ["max_steps=2", "batch_size=1", "grad_accumulation=1", "max_length=160", "log_every=1", "eval_documents=2", "device=cpu"]
CHANGES = {"stories": ["data=[{path: recipes/data/stories.txt}]", "held_out=0.1", "tokenizer.vocab_size=300", "save_minutes=0"]}


def opening(path: Path) -> str:
    """The comment that a recipe opens with."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return "\n".join(lines[: next(n for n, line in enumerate(lines) if not line.startswith("#"))])


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_opens_with_what_it_does_its_launch_command_and_its_needs(path: Path) -> None:
    what, _, rest = opening(path).partition("\n")
    assert len(what) > 20
    commands = re.findall(rf"#   (llmkit finetune recipes/{path.name}.*?)(?:     \(.*)?$", rest, re.MULTILINE)
    assert commands
    for command in commands:
        assert read_recipe(path, shlex.split(command)[3:]).data  # its keys are keys
    needs = rest.partition("# Needs")[2]
    assert re.search(r"\d (GB|MB)", needs)  # memory
    assert re.search(r"minutes?|seconds", needs)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_runs_to_its_end(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)  # the recipes name their model and data from here
    output = tmp_path / "run"
    assert run(["finetune", str(path), f"output={output}", *SMALL, *CHANGES.get(path.stem, [])]) == 0
    said = capsys.readouterr()
    result = Path(said.out.strip())
    assert "Traceback" not in said.err
    entries = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries if "loss" in entry] == [1, 2]
    assert entries[-1]["eval_loss"] > 0
    assert (output / "loss.png").is_file()
    assert len({file.stat().st_mode for file in result.iterdir()}) == 1  # who reads the settings reads the weights
    adapter = result.name == "adapter"
    assert not adapter or "293,376 of 2,481,696 parameters are trained" in said.err  # in whatever bits the others are held
    llm = llmkit.load(llmkit.embedded_model() if adapter else result, adapter=result if adapter else None)
    assert llm.generate("Once", max_tokens=3, temperature=0).usage.completion_tokens > 0


def test_the_data_is_what_its_script_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(robot_data, "FOLDER", tmp_path)
    robot_data.main()
    shipped = ROOT / "recipes" / "data"
    written = sorted(path.name for path in tmp_path.iterdir())
    assert written == sorted(path.name for path in shipped.iterdir())
    for name in written:
        assert (tmp_path / name).read_bytes() == (shipped / name).read_bytes()
