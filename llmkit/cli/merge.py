"""`llmkit merge`: an adapter into the weights of its model."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click

from llmkit.cli.options import AtLeast, option
from llmkit.cli.progress import Bar


@click.command(short_help="Write a model with an adapter in its weights.")
@click.argument("model")
@click.argument("adapter")
@option("-o", "--output", type=click.Path(path_type=Path), required=True, metavar="FOLDER", help="The folder to write.")
@option(
    "--dtype",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    help="Of the merged weights [default: the model's; 16 bits where it is quantized].",
)
@option("--text", type=click.Path(exists=True), metavar="FILE", help="Compare on this text [default: a short one of llmkit's own].")
@option("-t", "--threads", type=AtLeast(1), help="CPU threads [default: physical cores].")
@option("--any-base", is_flag=True, help="Take an adapter that was trained on other weights of the same shape.")
@option("--overwrite", is_flag=True, help="Replace a model folder that is there.")
@option("--json", "as_json", is_flag=True, envvar="LLMKIT_JSON", help="Print one JSON object.")
def merge(
    model: str,
    adapter: str,
    output: Path,
    dtype: str | None,
    text: str | None,
    threads: int | None,
    any_base: bool,
    overwrite: bool,
    as_json: bool,
) -> int:
    """Write MODEL with the PEFT adapter ADAPTER in its weights, and say how far its predictions are from those of MODEL with ADAPTER:
    the Kullback-Leibler divergence per token, in nats. A quantized MODEL is dequantized first.
    """
    from llmkit.evaluate.merged import divergence
    from llmkit.lora.merge import merge as write

    with Bar("merging") as progress:
        report = write(model, adapter, output, dtype=dtype, any_base=any_base, overwrite=overwrite, progress=progress)
    with Bar("comparing") as progress:
        kl, tokens = divergence(model, adapter, report.folder, text=text, threads=threads, any_base=any_base, progress=progress)
    if as_json:
        print(json.dumps({**asdict(report), "folder": str(report.folder), "mean_kl": kl, "tokens": tokens}))
        return 0
    print(f"{report.folder}: {report.dtype}, {report.nbytes / 1e6:.1f} MB")
    if report.quantized:
        print(f"The model was quantized ({report.quantized}); merged it is not. llmkit quantize makes it small again.")
    print(f"KL divergence from the model with the adapter: {kl:.2g} nats per token, over {tokens} tokens")
    return 0
