"""`llmkit bench --train`: the options that go with it, and its table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from llmkit.cli.options import AtLeast, from_command_line, option
from llmkit.errors import UsageError

if TYPE_CHECKING:
    from llmkit.bench.training import TrainBenchPlan

F = TypeVar("F", bound=Callable[..., Any])

_TRAINING = {
    "rows": "--rows",
    "row_length": "--row-length",
    "steps": "--steps",
    "data": "--data",
    "quantize": "--quantize",
    "checkpointing": "--checkpointing",
    "rival_checkpointing": "--rival-checkpointing",
    "memory": "--memory",
}
_GENERATING = {
    "prefill": "--prefill",
    "decode": "--decode",
    "depths": "--depth",
    "batches": "--batch",
    "kv_bits": "--kv-bits",
    "starts": "--starts",
    "rival_files": "--rival-files",
}


def train_options(function: F) -> F:
    """`--train` and what has an effect beside it alone."""
    for decorator in reversed(
        (
            option(
                "--train",
                is_flag=True,
                help="Measure LoRA training instead, on the CPU unless --device says else; the options below go with it.",
            ),
            option("--rows", type=AtLeast(1), default=4, show_default=True, metavar="N", help="Rows of a step."),
            option("--row-length", type=AtLeast(2), default=512, show_default=True, metavar="N", help="Tokens of a row."),
            option(
                "--steps", type=AtLeast(2), metavar="N", help="Steps on random tokens, the first of them not timed [default: --repeat + 1]."
            ),
            option("--data", type=click.Path(path_type=Path), metavar="FILE", help="Measure chats too: rows as for `llmkit finetune`."),
            option("--quantize", type=click.Choice(["q4", "q8", "nf4"]), help="Measure llmkit with a frozen base in so few bits too."),
            option("--checkpointing", is_flag=True, help="llmkit computes activations again in the backward pass."),
            option("--rival-checkpointing", is_flag=True, help="Measure transformers with gradient checkpointing too."),
            option("--memory", metavar="SIZE", help="With --device cuda: each program may take so much of the GPU, as 8GB [default: all]."),
        )
    ):
        function = decorator(function)
    return function


def refuse_idle_options(train: bool) -> None:
    """UsageError for a typed option that has no effect with, or without, `--train`."""
    for name, flag in (_GENERATING if train else _TRAINING).items():
        if from_command_line(name):
            remedy = "Leave out one of the two." if train else "Add that, or leave it out."
            raise UsageError(f"{flag} has no effect {'with' if train else 'without'} --train. {remedy}")


def training_plan(params: Mapping[str, Any], folder: Path) -> TrainBenchPlan:
    """Return what the options of the command line ask for. UsageError for one without effect."""
    from llmkit.bench.training import TrainBenchPlan
    from llmkit.planning.memory import parse_size

    if params["steps"] and params["data"] is None and from_command_line("steps") and from_command_line("repeat"):
        raise UsageError("--repeat has no effect beside --steps without --data. Leave out one of the two.")
    if params["rival_checkpointing"] and params["against"] is None:
        raise UsageError("--rival-checkpointing has no effect without --against transformers. Add that, or leave it out.")
    # In the environment the size is llmkit plan's, too.
    memory = params["memory"] if (params["device"] or "").startswith("cuda") or from_command_line("memory") else None
    return TrainBenchPlan(
        folder=folder,
        memory=None if memory is None else parse_size(memory),
        length=params["row_length"],
        steps=params["steps"] or params["repeat"] + 1,
        **{name: params[name] for name in ("dtype", "device", "threads", "rows", "repeat", "data", "quantize", "checkpointing")},
    )


def measure_training(params: Mapping[str, Any], folder: Path, progress: Callable[[str], None]) -> dict[str, Any]:
    """Run what the options of the command line ask for."""
    from llmkit.bench import comparison
    from llmkit.bench.training import bench_train

    plan, against = training_plan(params, folder), params["against"]
    if against is None:
        return bench_train(plan, progress)
    return comparison("training").compare_training(plan, against, params["rival_checkpointing"], progress)


def train_table(result: dict[str, Any]) -> None:
    """Print a column for each program, and our ratios to transformers, where it was measured, behind its figures."""
    from rich.console import Console
    from rich.table import Table

    from llmkit.bench import comparison

    end = "fits"
    prefixes = [key.removesuffix(end) for key in result if key.endswith(end)]
    where = f"{result['threads']} threads" if result["device"] == "cpu" else result["device"]
    rivals = comparison("training") if result.get("against") else None
    run = rivals.compared_run(result) if rivals else ""
    out = Table("", *map(_name, prefixes), title=f"LoRA on {result['model']}, {where}")
    for label, key, ratio in (
        (f"{result['rows']} row{'s' if result['rows'] > 1 else ''} of {result['row_length']}", "full_tok_s", "full_ratio"),
        ("peak memory of that", "full_peak_bytes", "full_peak_ratio"),
        (f"{result.get('chats')} chats, supervised tokens", "chats_target_tok_s", "chats_ratio"),
        ("padding and prompts too", "chats_tok_s", ""),
        ("frozen weights", "base_bytes", ""),
        ("share of bfloat16", "base_share", ""),
    ):
        if any(prefix + key in result for prefix in prefixes):
            out.add_row(label, *(_value(result, prefix, key, f"{ratio}{run}") for prefix in prefixes))
    console = Console()
    console.print(out)
    notes = [f"llmkit: {result['flags']}"] if "flags" in result else []
    for note in notes + (rivals.notes(result) if rivals else []):
        console.print(note, highlight=False, soft_wrap=True)


def _name(prefix: str) -> str:
    if prefix.startswith("transformers"):
        return "transformers" + (", checkpointing" if prefix.endswith("checkpointing_") else "")
    return f"llmkit {prefix.rstrip('_')}".rstrip()


def _value(result: dict[str, Any], prefix: str, key: str, ratio: str) -> str:
    """Return one program's figure, with our ratio; nothing where it has none."""
    from llmkit.planning.memory import shown

    value = result.get(prefix + key)
    if value is None:
        limit = f" in {shown(result['memory_bytes'])}" if "memory_bytes" in result else ""
        return f"does not fit{limit}" if key == "full_tok_s" else ""
    text = f"{value / 1e6:.0f} MB" if key.endswith("_bytes") else f"{value:.0f} tok/s" if "_tok_s" in key else f"{value:.2f}"
    return text + (f" ({result[prefix + ratio]:.2f}x)" if prefix + ratio in result else "")
