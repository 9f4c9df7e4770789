"""`llmkit bench`: speed, start-up and memory of a model on this machine."""

from __future__ import annotations

import json
import sys
from typing import Any

import click

from llmkit.cli.options import model_name, model_options, option

# figure -> how it is written for a person
ROWS = {
    "prefill_tok_s": ("prefill", "{:.0f} tok/s", 1.0),
    "decode_tok_s": ("decode", "{:.1f} tok/s", 1.0),
    "load_s": ("load", "{:.2f} s", 1.0),
    "first_token_s": ("first token from process start", "{:.2f} s", 1.0),
    "peak_bytes": ("peak memory", "{:.0f} MB", 1e-6),
}
RATIOS = {
    "prefill_tok_s": "prefill_ratio",
    "decode_tok_s": "decode_ratio",
    "load_s": "load_ratio",
    "first_token_s": "first_token_ratio",
    "peak_bytes": "peak_ratio",
}


@click.command(short_help="Measure speed, start-up time and memory.")
@model_options
@option("--prefill", type=click.IntRange(min=1), default=512, show_default=True, metavar="N", help="Tokens of the prompt.")
@option("--decode", type=click.IntRange(min=1), default=128, show_default=True, metavar="N", help="Tokens of the reply.")
@option("--repeat", type=click.IntRange(min=1), default=3, show_default=True, metavar="N", help="Runs of which the median is taken.")
@option("--starts", type=click.IntRange(min=1), default=2, show_default=True, metavar="N", help="Process starts of each side.")
@option("--against", type=click.Choice(["transformers"]), help="Measure this beside it, taking turns, in float32 unless --dtype says else.")
@option("--json", "as_json", is_flag=True, envvar="LLMKIT_JSON", help="Print one flat JSON object and nothing else.")
def bench(
    revision: str | None,
    dtype: str | None,
    device: str | None,
    threads: int | None,
    prefill: int,
    decode: int,
    repeat: int,
    starts: int,
    against: str | None,
    as_json: bool,
    **_: object,
) -> int:
    """Measure MODEL: prefill, decode, loading, the first token from the start of a process, peak memory, and the share of the
    machine's memory bandwidth that decoding reaches. Each side runs in a process of its own.
    """
    from llmkit.checkpoint.hub import resolve
    from llmkit.measure.bench import BenchPlan
    from llmkit.measure.bench import bench as measure

    plan = BenchPlan(
        folder=resolve(str(model_name()), revision),
        dtype=dtype or ("float32" if against else None),
        device=device,
        threads=threads,
        prefill=prefill,
        decode=decode,
        repeat=repeat,
        starts=starts,
        against_transformers=against is not None,
    )
    result = measure(plan, _progress if sys.stderr.isatty() else lambda _: None)
    if sys.stderr.isatty():
        _progress("")
    if as_json:
        print(json.dumps(result))
    else:
        _table(result, against is not None)
    return 0


def _progress(what: str) -> None:
    print(f"\r\x1b[2K{what}", end="", file=sys.stderr, flush=True)


def _table(result: dict[str, Any], compared: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    title = f"{result['model']}: {result['parameters']:,} parameters, {result['dtype']} on {result['device']}, {result['threads']} threads"
    table = Table("", "llmkit", title=title)
    if compared:
        table.add_column(f"transformers {result['transformers_version']}")
        table.add_column("ratio")
    for key, (label, form, scale) in ROWS.items():
        tokens = {"prefill_tok_s": f" {result['prefill_tokens']}", "decode_tok_s": f" {result['decode_tokens']}"}.get(key, "")
        row = [label + tokens, form.format(result[key] * scale)]
        if compared:
            row += [form.format(result[f"transformers_{key}"] * scale), f"{result[RATIOS[key]]:.2f}x"]
        table.add_row(*row)
    bandwidth = f"{result['bandwidth_share']:.0%} of {result['bandwidth_bytes_s'] / 1e9:.1f} GB/s"
    table.add_row("memory bandwidth reached in decode", bandwidth)
    Console().print(table)
