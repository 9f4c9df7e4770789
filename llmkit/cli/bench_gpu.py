"""`llmkit bench-gpu`: 4 bits on a GPU beside bfloat16 and bitsandbytes' NF4."""

from __future__ import annotations

from typing import Any

import click

from llmkit.cli.bench import show
from llmkit.cli.options import AtLeast, model_name, option


@click.command(short_help="Measure 4 bits against bfloat16 and NF4 on a GPU.")
@click.argument("model", required=False, default=None)
@option("-m", "--model", "model_option", metavar="MODEL", help="The same as MODEL: a folder, a hub id or HUB_ID@REV.")
@option("--revision", metavar="REV", help="Branch, tag or commit of a hub id.")
@option("--prefill", type=AtLeast(1), default=512, show_default=True, metavar="N", help="Tokens of the prompt.")
@option("--decode", type=AtLeast(1), default=128, show_default=True, metavar="N", help="Tokens of the reply.")
@option("--repeat", type=AtLeast(1), default=5, show_default=True, metavar="N", help="Runs of which the median is taken.")
@option("--json", "as_json", is_flag=True, envvar="LLMKIT_JSON", help="Print one flat JSON object and nothing else.")
def bench_gpu(revision: str | None, prefill: int, decode: int, repeat: int, as_json: bool, **_: object) -> int:
    """Quantize MODEL (a dense checkpoint in 16 or 32 bits) and measure it on the GPU: prefill and decode of one sequence, the share of
    the memory's bandwidth, and how that compares with bfloat16 and with bitsandbytes' NF4 in transformers.
    """
    from llmkit.checkpoint.hub import resolve
    from llmkit.measure.bench_gpu import GpuBenchPlan
    from llmkit.measure.bench_gpu import bench_gpu as measure

    plan = GpuBenchPlan(resolve(str(model_name()), revision), prefill=prefill, decode=decode, repeat=repeat)
    return show(lambda progress: measure(plan, progress), table, as_json)


def table(result: dict[str, Any]) -> None:
    """For a person."""
    from rich.console import Console
    from rich.table import Table

    title = f"{result['model']} on {result['device']}, {result['bits_per_weight']:.2f} bits per weight"
    out = Table("", "4 bits", "bfloat16", "NF4", "to bfloat16", "to NF4", title=title)
    for figure in ("prefill", "decode"):
        rates = [f"{result[f'{side}_{figure}_tok_s']:.1f} tok/s" for side in ("q4", "bf16", "nf4")]
        ratios = [f"{result[f'{figure}_ratio_{rival}']:.2f}x" for rival in ("bf16", "nf4")]
        out.add_row(f"{figure} {result[f'{figure}_tokens']}", *rates, *ratios)
    shares = [f"{result[f'{side}_bandwidth_share']:.0%}" for side in ("q4", "bf16")]
    out.add_row(f"share of {result['bandwidth_bytes_s'] / 1e9:.0f} GB/s in decode", *shares, "", "", "")
    Console().print(out)
