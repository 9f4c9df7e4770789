"""Every example runs to its end, as a person would start it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
SAYS = {  # what shows that an example did what it is about
    "classify": "ran to get it.",
    "draft_tokens": "the same text: True",
    "engine": "30 steps for 50 tokens",
    "finetune": "Bolt is in 0 of 9 stories",
    "layers": "73,728 numbers in the KV cache",
    "prefix_cache": "240 of 251 prompt tokens were known",
    "quantize": "4.88 bits per weight",
    "rag": "The documents do not say",
    "threads": "to the letter: True",
}


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 10
    assert set(SAYS) <= {path.stem for path in EXAMPLES}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(example: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(example)], cwd=tmp_path, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert SAYS.get(example.stem, "\n") in done.stdout
    assert not done.stderr.strip()
