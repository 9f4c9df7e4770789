"""`llmkit eval`: how well a model predicts a text, and how far it has moved from its original."""

from __future__ import annotations

import json
from typing import Any

import click

from llmkit.cli.options import AtLeast, adapter_options, context_options, load_arguments, model_name, model_options, option
from llmkit.cli.progress import Bar


@click.command(short_help="Measure how well a model predicts a text, also against its original.")
@model_options
@context_options
@adapter_options(several=False)
@option("--text", required=True, type=click.Path(exists=True), metavar="FILE", help='Text, or JSONL with a "text" in each row.')
@option("--reference", metavar="ORIGINAL", help="The checkpoint MODEL was made from: compare with its float32 predictions.")
@option("--separator", default="<|endoftext|>", show_default=True, metavar="TEXT", help="What parts the documents of a text file.")
@option("-n", "--max-tokens", type=AtLeast(1), metavar="N", help="Score so many tokens [default: all].")
@option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def evaluate(text: str, reference: str | None, separator: str, max_tokens: int | None, as_json: bool, **_: object) -> int:
    """Score a text with MODEL: perplexity and bits per byte. With --reference also the KL divergence from the original's predictions
    and how often both name the same likeliest token.

    Each document begins with an empty cache, and so does each window of one longer than --ctx-size [default: 2,048 or the model's context].
    """
    from llmkit.evaluate.perplexity import evaluate as measure
    from llmkit.evaluate.perplexity import load_pair, read_texts

    model, arguments = str(model_name()), load_arguments()
    ctx_size = arguments.pop("ctx_size", None)
    llm, original = load_pair(model, reference, **arguments)
    with Bar("evaluating") as progress:
        result = measure(llm, read_texts(text, separator), original, ctx_size=ctx_size, max_tokens=max_tokens, progress=progress)
    if as_json:
        print(json.dumps({"model": model, "reference": reference, "text": text} | result.to_dict(), ensure_ascii=False, allow_nan=False))
    else:
        _print(model, result.to_dict())
    return 0


FIELDS = {
    "tokens": "tokens scored",
    "documents": "documents",
    "perplexity": "perplexity",
    "bits_per_byte": "bits per byte",
    "reference_bits_per_byte": "bits per byte of the original",
    "mean_kl": "mean KL per token, nats",
    "kl_99": "99% of tokens below",
    "top1_agreement": "same likeliest token",
    "bits_per_weight": "bits per weight",
    "path": "computed by",
}


def _print(model: str, result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("measure", "value", title=model)
    for name, label in FIELDS.items():
        value = result[name]
        if value is not None:
            table.add_row(label, _written(name, value))
    Console().print(table)


def _written(name: str, value: Any) -> str:
    if name == "top1_agreement":
        return f"{100 * value:.2f}%"
    return f"{value:.4g}" if name in ("mean_kl", "kl_99") else f"{value:.4f}" if isinstance(value, float) else str(value)
