"""The layering of the packages, and the modules without torch."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "llmkit"

# Packages of one level do not import each other; a package may import any level above it in the list, which stands on that page alone.
PAGE = PACKAGE.parent / "docs" / "architecture.md"
LEVELS = [line.split() for line in PAGE.read_text(encoding="utf-8").split("```layers\n")[1].split("\n```")[0].splitlines()]
LEVEL_OF = {package: level for level, packages in enumerate(LEVELS) for package in packages}
HEAVY = {"torch", "transformers", "peft", "accelerate", "bitsandbytes", "datasets"}
NO_TORCH = [
    *("__init__", "config", "errors", "rope", "families", "text", "engine", "llm", "planning", "cli"),
    *("kernels/__init__", "kernels/backend", "kernels/training_ops", "compat"),
    *("checkpoint/files", "checkpoint/hub", "checkpoint/source"),
    *("checkpoint/arrays", "checkpoint/weights", "checkpoint/formats"),
    *("lora/__init__", "lora/adapter", "lora/settings"),
]


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def package_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported(path: Path, *, top_level_only: bool = False) -> Iterator[str]:
    """Full names of what a module imports; without TYPE_CHECKING blocks, and without functions where only the top level counts."""

    def visit(node: ast.AST) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == "TYPE_CHECKING":
                continue
            if top_level_only and isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
                continue
            if isinstance(child, ast.Import):
                yield from (alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path}: relative import"
                yield from (f"{child.module}.{alias.name}" for alias in child.names)
            else:
                yield from visit(child)

    yield from visit(ast.parse(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_strictly_down(path: Path) -> None:
    own = package_of(path)
    if own in ("__init__", "__main__"):
        return
    assert own in LEVEL_OF, f"{own} has no layer; name it in {PAGE.name}"
    for name in imported(path):
        parts = name.split(".")
        if parts[0] != "llmkit" or len(parts) < 2 or parts[1] == "__version__":
            continue
        other = parts[1]
        where = f"{path.relative_to(PACKAGE)} imports {name}, which is not above {own} in {PAGE.name}"
        assert other == own or LEVEL_OF[other] < LEVEL_OF[own], where


def test_the_list_names_what_there_is() -> None:
    """A package that is gone leaves the list, and the page's table names every other."""
    packages = {package_of(path) for path in modules()} - {"__init__", "__main__"}
    assert packages == set(LEVEL_OF)
    table = PAGE.read_text(encoding="utf-8").partition("## The order of layers")[0]
    missing = {name for name in packages if f"`{name}/`" not in table and f"`{name}.py`" not in table}
    assert not missing


def test_the_walks_name_files_there_are() -> None:
    """Every path in the page's drawings is one under llmkit/, where it stands in full."""
    walks = PAGE.read_text(encoding="utf-8").partition("## From a prompt to a token")[2].partition("## Four seams")[0]
    named = set(re.findall(r"\b(?:[a-z_]+/)+(?:[a-z_]+\.(?:py|cpp))?", "".join(walks.split("```")[1::2])))
    assert len(named) > 30
    for name in named - {"llmkit/", "recipes/"}:
        assert any((PACKAGE / folder / name).exists() for folder in ("", "training", "kernels", "checkpoint")), name


def test_the_walk_sees_imports(tmp_path: Path) -> None:
    file = tmp_path / "a.py"
    file.write_text("import torch\nfrom llmkit.cli import main\nif TYPE_CHECKING:\n    import peft\ndef f():\n    from datasets import x\n")
    assert list(imported(file)) == ["torch", "llmkit.cli.main", "datasets.x"]
    assert list(imported(file, top_level_only=True)) == ["torch", "llmkit.cli.main"]


@pytest.mark.parametrize("where", NO_TORCH)
def test_modules_without_torch(where: str) -> None:
    paths = [PACKAGE / f"{where}.py"] if (PACKAGE / f"{where}.py").is_file() else sorted((PACKAGE / where).rglob("*.py"))
    assert paths
    for path in paths:
        heavy = {name.split(".")[0] for name in imported(path, top_level_only=True)} & HEAVY
        assert not heavy, f"{path.relative_to(PACKAGE)} imports {heavy} when it is imported"


@pytest.mark.parametrize(
    "code",
    [
        "import llmkit",
        "import llmkit.llm.api",
        "from llmkit.cli.main import run; assert run(['--help']) == 0",
        "from llmkit.cli.main import run; assert run(['chat', '--help']) == 0",
        "from llmkit.cli.main import run; assert run(['train', '--help']) == 0",
        "from llmkit.cli.main import run; assert run(['merge', '--help']) == 0",
        "import llmkit.llm.adapters, llmkit.lora.adapter, llmkit.checkpoint.arrays",
        "from llmkit.cli.main import run; assert run(['plan', 'llmkit/stories', '--device', 'cpu', '--json']) == 0",
        "import llmkit.engine, llmkit.text.tokenizer, llmkit.families, llmkit.checkpoint.files, llmkit.checkpoint.hub",
    ],
)
def test_no_torch_is_imported(code: str) -> None:
    program = f"import sys, json; {code}; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    names = {name.split(".")[0] for name in json.loads(done.stdout.splitlines()[-1])}
    assert not names & HEAVY


def test_help_imports_no_numpy_nor_rich() -> None:
    """What makes `llmkit --help` answer within 0.3 s."""
    program = "import sys, json; from llmkit.cli.main import run; run(['--help']); print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    names = {name.split(".")[0] for name in json.loads(done.stdout.splitlines()[-1])}
    assert not names & {"numpy", "rich", "prompt_toolkit", "huggingface_hub", "tokenizers"}


def test_public_names() -> None:
    import llmkit

    for name in llmkit.__all__:
        assert getattr(llmkit, name) is not None
    assert set(llmkit.__all__) <= set(dir(llmkit))
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        _ = llmkit.lod  # type: ignore[attr-defined]
