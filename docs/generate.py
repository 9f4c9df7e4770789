"""Write docs/reference/ from the code: `python docs/generate.py`.

`--check` says what is out of date, exit code 1. `--api FOLDER` writes the API reference there (pdoc); a warning of pdoc's is an error.

The commands come from `llmkit.cli`, the keys of recipes from `llmkit.training.recipe`, what a recipe is from its own first lines.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import get_type_hints

import click

import llmkit
from llmkit.cli.main import COMMANDS, app
from llmkit.training.recipe import keys_help

DOCS = Path(__file__).parent
RECIPES = DOCS.parent / "recipes"
HEADER = "<!-- Written by docs/generate.py; do not edit. -->\n\n"


def cell(text: str) -> str:
    """Return a text as one cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")


def option_row(option: click.Option) -> str:
    """Return an option's row: names and what they take, what it does, its mirror in the environment."""
    names = ", ".join(f"`{name}`" for name in [*option.opts, *option.secondary_opts])
    if not option.is_flag:
        choices = option.type.choices if isinstance(option.type, click.Choice) else None
        takes = "|".join(map(str, choices)) if choices else option.metavar or option.type.name.upper()
        names += f" `{takes}`"
    mirror = f"`{option.envvar}`" if isinstance(option.envvar, str) else ""
    default = f" [default: {option.default}]" if option.show_default and option.default is not None else ""
    return f"| {cell(names)} | {cell((option.help or '') + default)} | {mirror} |"


def command_section(name: str, command: click.Command, level: int = 2) -> Iterator[str]:
    """Yield the lines of a command: usage, description, options, and its own commands."""
    context = click.Context(command, info_name=name)
    usage = " ".join(command.collect_usage_pieces(context))
    yield f"{'#' * level} llmkit {name}\n\n```\nllmkit {name} {usage}\n```\n"
    # click's \\b marks a paragraph whose lines stay as they are
    for paragraph in inspect.cleandoc(command.help or "").split("\n\n"):
        yield f"```\n{paragraph[2:]}\n```\n" if paragraph.startswith("\b\n") else f"{paragraph}\n"
    options = [parameter for parameter in command.params if isinstance(parameter, click.Option) and not parameter.hidden]
    if options:
        yield "| option | | environment |\n|---|---|---|"
        yield from map(option_row, options)
        yield ""
    if isinstance(command, click.Group):
        for inner in command.list_commands(context):
            found = command.get_command(context, inner)
            assert found is not None
            yield from command_section(f"{name} {inner}", found, level + 1)


def cli_page() -> str:
    """Return the reference of commands."""
    lines = ["# Commands\n", f"{app.epilog}\n"]
    context = click.Context(app)
    for name, (_, short) in COMMANDS.items():
        command = app.get_command(context, name)
        assert command is not None
        if name == "train":  # another name of finetune
            lines.append(f"## llmkit train\n\n{short}\n")
            continue
        lines += command_section(name, command)
    return HEADER + "\n".join(lines).rstrip() + "\n"


def recipes_page() -> str:
    """Return the reference of recipes: what each file says of itself, and every key."""
    lines = [
        "# Recipes\n",
        "`llmkit finetune RECIPE.yaml key=value ...`; `data.1.path=...` adds a source, `lora.r=8` sets a key of another.\n",
    ]
    for path in sorted(RECIPES.glob("*.yaml")):
        comment = path.read_text(encoding="utf-8").partition("\n\n")[0].splitlines()
        body = "\n".join(line.removeprefix("#").removeprefix(" ").rstrip() for line in comment)
        lines += [f"## [{path.stem}](../../recipes/{path.name})\n", f"```\n{body}\n```\n"]
    lines += ["## Keys\n", "| key | type | default | |", "|---|---|---|---|"]
    for line in keys_help().splitlines():
        found = re.fullmatch(r"(\S+) \((.*?); (?:default (.*?)|(required))\): (.*)", line)
        assert found is not None, line
        name, kind, default, required, help = found.groups()
        lines.append(f"| `{name}` | {cell(kind)} | {required or f'`{default}`'} | {cell(help)} |")
    return HEADER + "\n".join(lines) + "\n"


PAGES = {"reference/cli.md": cli_page, "reference/recipes.md": recipes_page}


def modules() -> Iterator[str]:
    """Yield every module but those that need a GPU, in the order of their files."""
    package = DOCS.parent / "llmkit"
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        if "triton" not in parts and parts[-1] != "__main__":
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def api(folder: Path) -> None:
    """Write the API reference of every module."""
    import pdoc
    import pdoc.render

    for module in map(importlib.import_module, modules()):  # names that a package imports on first use: pdoc looks where they are then
        for name in getattr(module, "__all__", ()):
            setattr(module, name, getattr(module, name))
        for value in list(vars(module).values()):  # pdoc does not find the types of a NamedTuple
            if isinstance(value, type) and issubclass(value, tuple) and value.__module__ == module.__name__:
                value.__new__.__annotations__ = get_type_hints(value)
    pdoc.render.configure(docformat="google", footer_text=f"llmkit {llmkit.__version__}")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        # pdoc finds the modules of a package by itself, but not of one that has `__all__`
        warnings.filterwarnings("ignore", message="The module specification")
        pdoc.pdoc(*modules(), output_directory=folder)


def main(arguments: list[str]) -> int:
    """Write the pages, or compare them, or write the API reference."""
    if arguments[:1] == ["--api"]:
        api(Path(arguments[1]))
        return 0
    check, stale = arguments == ["--check"], 0
    for name, page in PAGES.items():
        path, text = DOCS / name, page()
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            continue
        stale += 1
        print(f"docs/{name} is out of date. Run python docs/generate.py." if check else f"docs/{name}")
        if not check:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
