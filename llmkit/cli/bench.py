"""`llmkit bench`: speed, start-up and memory of a model on this machine."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from llmkit.cli.bench_train import measure_training, refuse_idle_options, train_options, train_table
from llmkit.cli.options import AtLeast, model_name, model_options, option
from llmkit.errors import UsageError


class Counts(click.ParamType):
    """`N[,N]`: token or sequence counts."""

    name = "N[,N]"

    def __init__(self, most: int) -> None:
        self.most = most

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        parts = str(value).split(",")
        if not all(part.strip().isascii() and part.strip().isdigit() and 1 <= int(part) <= self.most for part in parts):
            self.fail(f"{value!r} is not N or N,N,... with every N from 1 to {self.most}.", param, ctx)
        return tuple(dict.fromkeys(int(part) for part in parts))


@click.command(short_help="Measure speed, start-up time and memory.")
@model_options
@option("--prefill", type=AtLeast(0), default=512, show_default=True, metavar="N", help="Tokens of the prompt; 0: none.")
@option("--decode", type=AtLeast(0), default=128, show_default=True, metavar="N", help="Tokens of the reply; 0: none.")
@option("--depth", "depths", type=Counts(1 << 24), default=(), help="Decode after N tokens of context too.")
@option("--batch", "batches", type=Counts(256), default=(), help="Decode N sequences at once too: total tokens per second.")
@option(
    "--kv-bits",
    type=click.Choice(["32", "16", "8"]),
    callback=lambda _ctx, _param, value: value and int(value),
    help="Of each number in our KV cache [default: 32 for float32 weights, else 16].",
)
@option("--repeat", type=AtLeast(1), default=3, show_default=True, metavar="N", help="Runs of which the median is taken.")
@option("--starts", type=AtLeast(1), default=3, show_default=True, metavar="N", help="Process starts of each program.")
@option("--against", type=click.Choice(["transformers", "llama.cpp"]), help="Measure this beside it, taking turns.")
@option(
    "--rival-files", type=click.Path(path_type=Path, file_okay=False), metavar="DIR", help="Keep the files for llama.cpp, or find them."
)
@option("--json", "as_json", is_flag=True, envvar="LLMKIT_JSON", help="Print one flat JSON object and nothing else.")
@train_options
def bench(**params: Any) -> int:
    """Measure MODEL: prefill, decode, loading, the first token from the start of a process, peak memory, and the share of the
    machine's memory bandwidth that decoding reaches. Each program runs in a process of its own; no token is drafted.

    Against transformers both run in float32 unless --dtype says else. llama.cpp runs on the same weights in its own formats
    of about as many bits (F16, Q8_0, or Q4_0 and Q4_K_M), with a float16 cache and the better of flash attention on and off.

    With --train: LoRA (r=16, every linear, AdamW; products in float32, with --device cuda in bfloat16) in tokens per second and peak
    memory; against transformers and PEFT with the same first adapter on the same ids, so the losses are compared too. A folder in nf4
    (llmkit quantize --scheme nf4) is QLoRA in both.
    """
    refuse_idle_options(params["train"])
    from llmkit.checkpoint.hub import resolve

    folder = resolve(str(model_name()), params["revision"])
    if params["train"]:
        return show(lambda progress: measure_training(params, folder, progress), train_table, params["as_json"])
    return show(lambda progress: _measure(params, folder, progress), _table, params["as_json"])


def _measure(params: dict[str, Any], folder: Path, progress: Callable[[str], None]) -> dict[str, Any]:
    """Run what the options of the command line ask for."""
    from llmkit.bench import comparison
    from llmkit.bench.inference import BenchPlan
    from llmkit.bench.inference import bench as measure

    against = params["against"]
    if params["rival_files"] is not None and against is None:
        raise UsageError("--rival-files has no effect without --against llama.cpp, whose files it keeps. Leave it out, or add that.")
    names = ("threads", "kv_bits", "prefill", "decode", "depths", "batches", "repeat", "starts")
    plan = BenchPlan(
        folder,
        dtype=params["dtype"] or ("float32" if against == "transformers" else None),
        device=params["device"] or ("cpu" if against == "llama.cpp" else None),
        **{name: params[name] for name in names},
    )
    if against is None:
        return measure(plan, progress)
    return comparison("inference").compare(plan, against, params["rival_files"], progress)


def show(measure: Callable[[Callable[[str], None]], dict[str, Any]], table: Callable[[dict[str, Any]], None], as_json: bool) -> int:
    """Measure, showing on a terminal what is being measured, and print the figures as a table or as one JSON object."""
    terminal = sys.stderr.isatty()
    result = measure(_progress if terminal else lambda _: None)
    if terminal:
        _progress("")
    if as_json:
        print(json.dumps(result))
    else:
        table(result)
    return 0


def _progress(what: str) -> None:
    print(f"\r\x1b[2K{what}", end="", file=sys.stderr, flush=True)


def _table(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    from llmkit.bench import comparison

    against = result.get("against")
    rivals = comparison("inference") if against else None
    # One column for each program: a rival's keys are ours behind its prefix.
    end = "load_s"
    prefixes = [key.removesuffix(end) for key in result if key.endswith(end)]
    title = f"{result['model']}: {result['parameters']:,} parameters, {result['dtype']}"
    table = Table("", "llmkit", title=title)
    for prefix in prefixes[1:]:
        table.add_column(result[f"{prefix}name"])
    if against:
        table.add_column("ratio" if len(prefixes) == 2 else "ratio to the best")
    for key in result:
        label = _label(key, result)
        if label is None:
            continue
        row = [label, *(_value(key, result[prefix + key]) for prefix in prefixes)]
        share = result.get(key.replace("decode_tok_s", "bandwidth_share")) if key.startswith("decode_tok_s") else None
        if share is not None:
            row[1] += f" ({share:.0%} of bandwidth)"
        table.add_row(*row, *([f"{result[rivals.ratio_key(key)]:.2f}x"] if rivals else []))
    bits = [result.get(f"{prefix}bits_per_weight") for prefix in prefixes]
    table.add_row("bits per weight", *("" if number is None else f"{number:.2f}" for number in bits))
    console = Console()
    console.print(table)
    notes = [f"llmkit: {result['path']}, no speculation; memory read at {result['bandwidth_bytes_s'] / 1e9:.1f} GB/s"]
    if rivals:
        notes.append(f"{against} {result[f'{rivals.RIVALS[against]}_version']}: {result[f'{prefixes[1]}flags']}")
    for note in notes:
        console.print(note, highlight=False, soft_wrap=True)


def _label(key: str, result: dict[str, Any]) -> str | None:
    """Return what a figure is called in the table; None for what is not one of our own figures."""
    fixed = {
        "prefill_tok_s": f"prefill {result['prefill_tokens']}",
        "decode_tok_s": f"decode {result['decode_tokens']}",
        "load_s": "load",
        "first_token_s": "first token from process start",
        "peak_bytes": "peak memory",
    }
    for prefix, label in (("decode_tok_s_depth_", "decode at depth {}"), ("decode_tok_s_batch_", "decode of {} sequences")):
        if key.startswith(prefix):
            return label.format(key.removeprefix(prefix))
    return fixed.get(key)


def _value(key: str, value: float) -> str:
    if key.endswith("_bytes"):
        return f"{value / 1e6:.0f} MB"
    if "_tok_s" in key:
        return f"{value:.0f} tok/s" if value >= 100 else f"{value:.1f} tok/s"
    return f"{value:.2f} s"
