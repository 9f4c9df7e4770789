"""`llmkit quantize`: a model in 4 or 8 bits."""

from __future__ import annotations

from pathlib import Path

import click

from llmkit.cli.options import AtLeast, model_name, option
from llmkit.cli.progress import Bar

SCHEMES = ("q4", "q8", "nf4")


@click.command(short_help="Write a model in 4 or 8 bits.")
@click.argument("model", required=False, default=None)
@option("-m", "--model", "model_option", metavar="MODEL", help="The same as MODEL: a folder, a hub id or HUB_ID@REV.")
@option("--revision", metavar="REV", help="Branch, tag or commit of a hub id.")
@option("-o", "--output", type=click.Path(path_type=Path), required=True, metavar="FOLDER", help="The folder to write.")
@option(
    "--scheme",
    type=click.Choice(SCHEMES),
    default="q4",
    show_default=True,
    help="About 4.5 or 8.3 bits for each weight; nf4: bitsandbytes' 4 bits, for transformers and QLoRA.",
)
@option("-t", "--threads", type=AtLeast(1), help="CPU threads [default: torch's choice].")
@option("--overwrite", is_flag=True, help="Replace a model folder that is there.")
def quantize(revision: str | None, output: Path, scheme: str, threads: int | None, overwrite: bool, **_: object) -> int:
    """Write MODEL as a folder with quantized weights, which chat, generate and the Python API open like any other.

    The checkpoint is read and written matrix by matrix, so even a model larger than the memory can be quantized.
    """
    from llmkit.checkpoint.source import ModelSource
    from llmkit.planning.check import check_quantizing

    source = ModelSource.open(model_name(), revision)
    check_quantizing(source, scheme)
    from llmkit.checkpoint.quantize import quantize_folder

    with Bar("quantizing") as progress:
        report = quantize_folder(source, output, scheme, overwrite=overwrite, threads=threads, progress=progress)
    print(
        f"{report.folder}: {report.scheme}, {report.bits_per_weight:.2f} bits per weight over the whole model, "
        f"{report.bytes_before / 1e6:.1f} MB before, {report.bytes_after / 1e6:.1f} MB after, {report.seconds:.1f} s"
    )
    return 0
