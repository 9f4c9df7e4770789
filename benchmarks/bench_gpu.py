"""`make bench-gpu`: 4 bits on a GPU next to bfloat16 and bitsandbytes' NF4, in generating and in training (QLoRA)."""

from __future__ import annotations

import sys
from typing import Any

import click

from llmkit.cli.bench import show
from llmkit.cli.bench_train import train_table
from llmkit.cli.main import run
from llmkit.cli.options import AtLeast, from_command_line, model_name, option
from llmkit.errors import UsageError


@click.command(short_help="Measure 4 bits against bfloat16 and NF4, and QLoRA, on a GPU.")
@click.argument("model", required=False, default=None)
@option("-m", "--model", "model_option", metavar="MODEL", help="The same as MODEL: a folder, a hub id or HUB_ID@REV.")
@option("--revision", metavar="REV", help="Branch, tag or commit of a hub id.")
@option("--prefill", type=AtLeast(1), default=512, show_default=True, metavar="N", help="Tokens of the prompt.")
@option("--decode", type=AtLeast(1), default=128, show_default=True, metavar="N", help="Tokens of the reply.")
@option("--repeat", type=AtLeast(1), default=5, show_default=True, metavar="N", help="Runs of which the median is taken.")
@option("--memory", metavar="SIZE", help="Of the GPU for QLoRA, as 8GB [default: the least of 8, 12, 16 and 24 GB that is enough].")
@option("--json", "as_json", is_flag=True, envvar="LLMKIT_JSON", help="Print one flat JSON object and nothing else.")
def bench_gpu(
    model: str | None,
    model_option: str | None,
    revision: str | None,
    prefill: int,
    decode: int,
    repeat: int,
    memory: str | None,
    as_json: bool,
) -> int:
    """Quantize MODEL (a dense checkpoint in 16 or 32 bits) and measure it on the GPU: prefill and decode of one sequence, the share of
    the memory's bandwidth, and how that compares with bfloat16 and with bitsandbytes' NF4 in transformers.

    Then QLoRA (r=16, every linear, one row of 2,048 tokens) on MODEL in NF4, in tokens per second and peak memory, beside transformers,
    PEFT and bitsandbytes on the same weights. Without MODEL that alone, on random numbers in the shape of Llama 3.1 8B: 6 GB that are
    written to the folder for temporary files, for some minutes.
    """
    from benchmarks.gpu import GpuBenchPlan
    from benchmarks.gpu import bench_gpu as measure
    from llmkit.checkpoint.hub import resolve
    from llmkit.planning.memory import parse_size

    folder = resolve(str(model_name()), revision) if model or model_option else None
    if folder is None:
        for name in ("revision", "prefill", "decode"):
            if from_command_line(name):
                raise UsageError(f"--{name} has no effect without MODEL. Give a folder or a hub id, or leave it out.")
    plan = GpuBenchPlan(folder, prefill=prefill, decode=decode, repeat=repeat, memory=None if memory is None else parse_size(memory))
    return show(lambda progress: measure(plan, progress), table, as_json)


def table(result: dict[str, Any]) -> None:
    """For a person: decoding, where it was measured, and QLoRA."""
    from rich.console import Console

    from llmkit.planning.memory import shown

    console = Console()
    if result.get("decode_fits"):
        _decode_table(result)
    elif "decode_fits" in result:
        console.print("Decoding was not measured: 4 bits, bfloat16 and NF4 do not fit in this GPU's memory together.", soft_wrap=True)
    qlora = {key.removeprefix("qlora_"): value for key, value in result.items() if key.startswith("qlora_")}
    sides = [begin for begin in ("", "transformers_") if f"{begin}fits" in qlora]
    if any(qlora[f"{begin}fits"] for begin in sides):
        train_table({**qlora, "model": f"{result['model']} in NF4"})
    else:
        console.print("QLoRA was not measured: it does not fit in this GPU's memory.", soft_wrap=True)
    notes = [
        f"{begin.rstrip('_') or 'llmkit'} in {shown(qlora[f'{begin}smallest_bytes'])}"
        for begin in sides
        if f"{begin}smallest_bytes" in qlora
    ]
    if notes:
        console.print(f"least memory of those tried that is enough: {', '.join(notes)}", highlight=False, soft_wrap=True)
    speed, peak = qlora["unsloth_published_ratio"], qlora["unsloth_published_peak_ratio"]
    console.print(
        f"for comparison, unsloth says of itself, beside transformers with FlashAttention 2: {speed:.2f}x the speed, "
        f"{1 - 1 / peak:.0%} less memory ({peak:.2f}x)",
        highlight=False,
        soft_wrap=True,
    )


def _decode_table(result: dict[str, Any]) -> None:
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


if __name__ == "__main__":
    sys.exit(run(command=bench_gpu, name="bench-gpu"))
