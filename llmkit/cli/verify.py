"""`llmkit verify`: one table of what agrees and what does not."""

from __future__ import annotations

import json

import click

from llmkit.cli.options import AtLeast, adapter_options, model_name, option

EXIT_DIFFERS = 3


@click.command(short_help="Check a model against transformers and against itself.")
@click.argument("model", required=False)
@option("-m", "--model", "model_option", metavar="MODEL", help="The same as the argument MODEL: a folder or a hub id.")
@option("--length", type=AtLeast(2), metavar="N", help="Tokens of the test prompt [default: past the sliding window].")
@option("--seed", type=int, default=0, show_default=True, metavar="N", help="Of the random test prompt.")
@option("--device", metavar="DEVICE", help="cpu, cuda, mps [default: cpu; transformers always runs on the cpu].")
@option("-t", "--threads", type=AtLeast(1), help="CPU threads [default: physical cores].")
@adapter_options(several=False)
@option("--json", "as_json", is_flag=True, envvar="LLMKIT_JSON", help="Print one JSON object.")
def verify(
    length: int | None, seed: int, device: str | None, threads: int | None, adapter: str | None, any_base: bool, as_json: bool, **_: object
) -> int:
    """Check MODEL in float32: our logits and greedy tokens against transformers', cached against uncached, chunked against
    whole prefill, batch against single. With an adapter: against PEFT's reading of both. Exit code 3 where something differs.

    A quantized MODEL is checked in its own arithmetic; transformers cannot read it, so llmkit eval --reference compares it.
    """
    from llmkit.evaluate import verify as measure

    model = model_name()
    checks = measure.verify(model, length=length, seed=seed, device=device or "cpu", threads=threads, adapter=adapter, any_base=any_base)
    differs = any(check.ok is False for check in checks)
    if as_json:
        print(json.dumps({"model": str(model), "ok": not differs, "checks": [check.to_dict() for check in checks]}, ensure_ascii=False))
    else:
        from rich.console import Console
        from rich.table import Table

        table = Table("check", "result", "difference", "limit", "note", title=str(model))
        for check in checks:
            result = {True: "[green]same[/]", False: "[red]differs[/]", None: "[yellow]not checked[/]"}[check.ok]
            difference = "" if check.difference is None else f"{check.difference:.1e}"
            table.add_row(check.name, result, difference, "" if check.limit is None else f"{check.limit:.0e}", check.note)
        Console().print(table)
    return EXIT_DIFFERS if differs else 0
