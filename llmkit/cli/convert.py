"""`llmkit convert`: a model in the format of another program."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from llmkit.cli.options import model_name, option

FORMATS = ("gguf:f16", "gguf:q8_0", "gguf:q4_0")


@click.command(short_help="Write a model as a GGUF file for llama.cpp.")
@click.argument("model", required=False, default=None)
@option("-m", "--model", "model_option", metavar="MODEL", help="The same as MODEL: a folder, a hub id or HUB_ID@REV.")
@option("--revision", metavar="REV", help="Branch, tag or commit of a hub id.")
@option("-o", "--output", type=click.Path(path_type=Path), required=True, metavar="FILE", help="The file to write.")
@option("--to", "to", type=click.Choice(FORMATS), default="gguf:f16", show_default=True, help="Format and type of the matrices.")
@option("--no-tokenizer", is_flag=True, help="Write placeholder tokens: the file then works with token ids only.")
@option("--overwrite", is_flag=True, help="Replace a file that is there.")
def convert(revision: str | None, output: Path, to: str, no_tokenizer: bool, overwrite: bool, **_: object) -> int:
    """Write MODEL as one GGUF file, the format of llama.cpp, with its configuration, tokenizer and chat template.

    The matrices are float16, or 8 or 4 bits in llama.cpp's Q8_0 and Q4_0; what a person should know about the file is said on stderr.
    """
    from llmkit.checkpoint.hub import resolve

    folder = resolve(str(model_name()), revision)
    from llmkit.checkpoint.gguf.write import write_gguf

    file_type = to.removeprefix("gguf:")
    report = write_gguf(folder, output, file_type, tokenizer=not no_tokenizer, overwrite=overwrite, progress=sys.stderr.isatty())
    for note in report.notes:
        print(f"warning: {note}", file=sys.stderr)
    types = ", ".join(f"{count} {name}" for name, count in report.types.items())
    print(f"{report.path}: {report.nbytes / 1e6:.1f} MB, {report.tensors} tensors ({types})")
    return 0
