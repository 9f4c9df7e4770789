"""The `llmkit` command: finds the subcommand, runs it, and turns every error into one line and an exit code.

Subcommands are imported when they are called, so `llmkit --help` needs neither torch nor transformers.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from difflib import get_close_matches

import click

import llmkit
from llmkit.errors import DoesNotFit, LLMKitError, naming_extras, out_of_memory

# name -> (module:attribute of its click.Command, what --help says)
COMMANDS = {
    "chat": ("llmkit.cli.chat:chat", "Talk to a model in the terminal (without MODEL: the embedded story teller)."),
    "generate": ("llmkit.cli.generate:generate", "Continue a prompt and print only the new text."),
    "rag": ("llmkit.cli.rag:rag", "Index documents, search them, answer from them with a quote for every sentence."),
    "verify": ("llmkit.cli.verify:verify", "Check a model against transformers and against itself; exit code 3 where it differs."),
    "quantize": ("llmkit.cli.quantize:quantize", "Write a model in 4 or 8 bits."),
    "merge": ("llmkit.cli.merge:merge", "Write a model with an adapter in its weights."),
    "eval": ("llmkit.cli.eval:evaluate", "Measure how well a model predicts a text, also against its original."),
    "bench": ("llmkit.cli.bench:bench", "Measure speed, start-up time and memory, also against transformers."),
    "convert": ("llmkit.cli.convert:convert", "Write a model as a GGUF file for llama.cpp."),
    "plan": ("llmkit.cli.plan:plan", "Say whether a model or a training run fits into memory, and what it costs."),
    "finetune": ("llmkit.cli.train:train", "Train or fine-tune a model from a recipe; also called train."),
    "train": ("llmkit.cli.train:train", "The same as finetune."),
}

# The extra with all that a command needs, where that is more than the first library it misses tells.
EXTRAS = {"rag": "rag", "verify": "train", "convert": "gguf", "finetune": "train", "train": "train"}

INTERRUPTED = 130  # 128 + SIGINT, as shells report it


class LazyGroup(click.Group):
    """A click group whose commands live in `COMMANDS` and are imported on use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name][0].partition(":")
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            near = get_close_matches(args[0], COMMANDS, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else f"Commands are {', '.join(COMMANDS)}."
            raise click.UsageError(f"No such command {args[0]!r}. {hint}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="Every option has a mirror in the environment: --max-tokens is LLMKIT_MAX_TOKENS. "
    "Exit codes: 0 ok, 1 failure, 2 usage, 3 a check failed, 4 does not fit in memory, 130 interrupted.",
)
@click.version_option(llmkit.__version__, "-V", "--version", prog_name="llmkit")
def app() -> None:
    """LLM inference and fine-tuning with one readable transformer for every Hugging Face checkpoint."""


def _reopen_closed_streams() -> None:
    """A stream that the caller closed (`<&-`, `>&-`), which Python has as None, becomes one that is empty."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 - open to the end of the process


def _help_of(error: click.UsageError) -> str:
    return f"{error.ctx.command_path if error.ctx else 'llmkit'} --help"


def _fail(message: str, code: int) -> int:
    sys.stdout.flush()
    print(f"error: {message}", file=sys.stderr)
    return code


def run(arguments: Sequence[str] | None = None, command: click.Command = app, name: str = "llmkit") -> int:
    """Run one command line (default: sys.argv) and return its exit code; errors a person can cause go to stderr as one line."""
    _reopen_closed_streams()
    try:
        given = list(sys.argv[1:] if arguments is None else arguments)
        with naming_extras(EXTRAS.get(given[0]) if given else None):
            result = command.main(args=given, prog_name=name, standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.format_message())
        return 2
    except click.NoSuchOption as error:
        near = get_close_matches(error.option_name, error.possibilities or [], n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        return _fail(f"No such option {error.option_name!r}.{hint} See {_help_of(error)}.", error.exit_code)
    except click.UsageError as error:
        message = error.format_message().strip()
        return _fail(f"{message}{'' if message.endswith(('.', '?', '!')) else '.'} See {_help_of(error)}.", error.exit_code)
    except click.ClickException as error:
        return _fail(error.format_message(), error.exit_code)
    except LLMKitError as error:
        return _fail(str(error), error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        return INTERRUPTED
    except BrokenPipeError:  # the reader (`| head`) has seen enough; stop Python's shutdown from flushing into it again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (MemoryError, RuntimeError, OSError) as error:
        if out_of_memory(error):
            return _fail("memory ran out. Take a smaller model, dtype, context or batch.", DoesNotFit.exit_code)
        if not isinstance(error, OSError):
            raise
        return _fail(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}.", 1)
    return result if isinstance(result, int) else 0


def main() -> None:
    """Entry point of the `llmkit` script."""
    sys.exit(run())
