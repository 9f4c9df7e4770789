"""What llmkit does where the core alone is installed."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from llmkit.errors import EXTRA_OF, NotInstalled, naming_extras

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def core_alone(program: str, *arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
    """Run a program in which nothing can be imported that an extra brings."""
    blocked = f"import sys; sys.modules.update(dict.fromkeys({sorted(EXTRA_OF)}))\n"
    return subprocess.run([sys.executable, "-c", blocked + program, *arguments], input=text, capture_output=True, text=True)


def command(*arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
    return core_alone("from llmkit.cli.main import main; main()", *arguments, text=text)


def names(requirements: list[str]) -> set[str]:
    return {Requirement(requirement).name.lower().replace("-", "_") for requirement in requirements}


def test_the_core_is_small() -> None:
    assert len(PROJECT["dependencies"]) <= 9


@pytest.mark.parametrize(("module", "extra"), EXTRA_OF.items())
def test_an_extra_brings_what_the_error_says(module: str, extra: str) -> None:
    distributions = {name.lower().replace("-", "_") for name in packages_distributions()[module]}
    assert distributions & names(PROJECT["optional-dependencies"][extra])
    assert not distributions & names(PROJECT["dependencies"])


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", "llmkit/stories", "-p", "Once upon a time", "-n", "4", "--temperature", "0"),
        ("chat", "llmkit/stories", "-p", "Tell me a story about a dog.", "-n", "4"),
        ("plan", "llmkit/stories"),
    ],
)
def test_the_core_runs_models(arguments: tuple[str, ...]) -> None:
    done = command(*arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip()


@pytest.mark.parametrize(
    ("extra", "arguments"),
    [
        ("torch", ("quantize", "llmkit/stories", "-o", "q4")),
        ("torch", ("generate", "llmkit/stories", "-p", "hi", "--device", "cuda")),
        ("gguf", ("convert", "llmkit/stories", "-o", "stories.gguf")),
        ("rag", ("rag", "add", "README.md", "--index", "some.index")),
        ("train", ("verify", "llmkit/stories")),
        ("train", ("finetune", "recipes/lora_sft.yaml")),
    ],
)
def test_what_is_not_installed_is_one_sentence_with_the_line_for_pip(extra: str, arguments: tuple[str, ...]) -> None:
    done = command(*arguments)
    assert done.returncode == 1
    assert done.stderr.startswith("error: This needs the package ")
    assert done.stderr.endswith(f"Run: pip install 'llmkit[{extra}]'\n")
    assert len(done.stderr.splitlines()) == 1


def test_the_python_api_says_it_too() -> None:
    done = core_alone("import llmkit; llmkit.finetune('recipes/lora_sft.yaml')")
    assert done.stderr.splitlines()[-1].endswith("pip install 'llmkit[train]'")


def test_a_module_of_nobodys_stays_an_import_error() -> None:
    with pytest.raises(ModuleNotFoundError) as caught, naming_extras():
        import no_such_library  # type: ignore[import-not-found]  # noqa: F401
    assert not isinstance(caught.value, NotInstalled)
