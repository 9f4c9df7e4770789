"""`llmkit bench --train`: the options that go with it, and its table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click

from llmkit.cli.options import AtLeast, from_command_line, option
from llmkit.errors import UsageError

F = TypeVar("F", bound=Callable[..., Any])

RIVALS = ("transformers", "peft", "bitsandbytes")
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
            option("--checkpointing", is_flag=True, help="llmkit computes activations again on the way back."),
            option("--rival-checkpointing", is_flag=True, help="Measure transformers with gradient checkpointing too."),
            option("--memory", metavar="SIZE", help="With --device cuda: each side may take so much of the GPU, as 8GB [default: all]."),
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


def measure_training(params: Mapping[str, Any], folder: Path, progress: Callable[[str], None]) -> dict[str, Any]:
    """What the options of the command line ask for."""
    from llmkit.bench.training import TrainBenchPlan, bench_train
    from llmkit.planning.memory import parse_size

    if params["steps"] and params["data"] is None and from_command_line("steps") and from_command_line("repeat"):
        raise UsageError("--repeat has no effect beside --steps without --data. Leave out one of the two.")
    # In the environment the size is llmkit plan's, too.
    memory = params["memory"] if (params["device"] or "").startswith("cuda") or from_command_line("memory") else None
    plan = TrainBenchPlan(
        folder=folder,
        dtype=params["dtype"],
        device=params["device"],
        memory=None if memory is None else parse_size(memory),
        threads=params["threads"],
        rows=params["rows"],
        length=params["row_length"],
        steps=params["steps"] or params["repeat"] + 1,
        repeat=params["repeat"],
        data=params["data"],
        quantize=params["quantize"],
        checkpointing=params["checkpointing"],
        against=params["against"],
        rival_checkpointing=params["rival_checkpointing"],
    )
    return bench_train(plan, progress)


def train_table(result: dict[str, Any]) -> None:
    """For a person: a column for each side, with our ratios to transformers beside the figures."""
    from rich.console import Console
    from rich.table import Table

    end = "fits"
    begins = [key.removesuffix(end) for key in result if key.endswith(end)]
    where = f"{result['threads']} threads" if result["device"] == "cpu" else result["device"]
    run = _compared(result)
    out = Table("", *map(_name, begins), title=f"LoRA on {result['model']}, {where}")
    for label, key, ratio in (
        (f"{result['rows']} row{'s' if result['rows'] > 1 else ''} of {result['row_length']}", "full_tok_s", "full_ratio"),
        ("peak memory of that", "full_peak_bytes", "full_peak_ratio"),
        (f"{result.get('chats')} chats, targets", "chats_target_tok_s", "chats_ratio"),
        ("padding and prompts too", "chats_tok_s", ""),
        ("frozen weights", "base_bytes", ""),
        ("share of bfloat16", "base_share", ""),
    ):
        if any(begin + key in result for begin in begins):
            out.add_row(label, *(_value(result, begin, key, f"{ratio}{run}") for begin in begins))
    console = Console()
    console.print(out)
    for note in _notes(result):
        console.print(note, highlight=False, soft_wrap=True)


def _name(begin: str) -> str:
    if begin.startswith("transformers"):
        return "transformers" + (", checkpointing" if begin.endswith("checkpointing_") else "")
    return f"llmkit {begin.rstrip('_')}".rstrip()


def _value(result: dict[str, Any], begin: str, key: str, ratio: str) -> str:
    """One side's figure, with our ratio; nothing where that side has none."""
    from llmkit.planning.memory import shown

    value = result.get(begin + key)
    if value is None:
        room = f" in {shown(result['memory_bytes'])}" if "memory_bytes" in result else ""
        return f"does not fit{room}" if key == "full_tok_s" else ""
    text = f"{value / 1e6:.0f} MB" if key.endswith("_bytes") else f"{value:.0f} tok/s" if "_tok_s" in key else f"{value:.2f}"
    return text + (f" ({result[begin + ratio]:.2f}x)" if begin + ratio in result else "")


def _compared(result: dict[str, Any]) -> str:
    """Which run of transformers the ratios are to: that without checkpointing (""), or "_checkpointing" where only that one fits."""
    return "_checkpointing" if result.get("transformers_checkpointing_fits") and not result["transformers_fits"] else ""


def _notes(result: dict[str, Any]) -> list[str]:
    notes = [f"llmkit: {result['flags']}"] if "flags" in result else []
    run = _compared(result)
    if f"transformers{run}_flags" in result:
        versions = ", ".join(f"{name} {result[f'{name}_version']}" for name in RIVALS if f"{name}_version" in result)
        which = "" if "transformers_checkpointing_fits" not in result else " with checkpointing" if run else " without checkpointing"
        notes.append(f"{versions}: {result[f'transformers{run}_flags']}; ratios are to its run{which}, above 1 in llmkit's favour")
    if f"full_loss_difference{run}" in result:
        notes.append(f"largest difference of the loss over {result['steps']} steps: {result[f'full_loss_difference{run}']:.1e}")
        if "transformers_chats_micro_batch" in result:
            notes.append(
                f"chats: transformers is fastest in micro-batches of {result['transformers_chats_micro_batch']} "
                f"(of {result['transformers_chats_micro_batches_tried']}); "
                f"largest difference of the loss {result['chats_loss_difference']:.1e}"
            )
    return notes
