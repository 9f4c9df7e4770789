"""`llmkit plan`: what a model or a training run needs, before anything is loaded."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llmkit.cli.options import AtLeast, option

if TYPE_CHECKING:
    from llmkit.planning.check import Fit
    from llmkit.planning.model_info import Facts

DEFAULT_POSITIONS = 4096
TRAINED_LENGTH = 2048  # of the rows that --tokens without a recipe are cut into


@click.command(short_help="Say whether a model or a training run fits into memory, and what it costs.")
@click.argument("model")
@click.argument("recipe", nargs=-1, metavar="[RECIPE.yaml [KEY=VALUE]...]")
@option("--revision", metavar="REV", help="Branch, tag or commit of a hub id.")
@option("--memory", metavar="SIZE", help="Plan for so much memory (8GB) instead of what is free here.")
@option("--device", metavar="DEVICE", help="cpu, cuda or mps [default: as chat or the recipe would choose].")
@option("-c", "--ctx-size", type=AtLeast(1), metavar="N", help=f"Tokens of a conversation [default: {DEFAULT_POSITIONS:,} or the model's].")
@option("--sequences", type=AtLeast(1), metavar="N", help="Conversations at once [default: 1].")
@option("--kv-bits", type=click.Choice(["32", "16", "8"]), help="Of each number in the KV cache [default: as chat would choose].")
@option("--dtype", type=click.Choice(["float32", "float16", "bfloat16"]), help="Convert the weights [default: as they are stored].")
@option("--tokens", type=float, metavar="N", help="Train on so many tokens [default: what the recipe says].")
@option("--flops", type=float, metavar="X", help="Operations a second of the hardware, as its maker states them [default: measured here].")
@option("--watts", type=float, metavar="X", help="Its power [default: 12 for each CPU thread; 500 with --flops or a GPU].")
@option("--price", type=float, metavar="X", help="Its price for an hour [default: electricity at 0.30 for a kWh].")
@option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def plan(
    model: str,
    recipe: tuple[str, ...],
    revision: str | None,
    memory: str | None,
    device: str | None,
    ctx_size: int | None,
    sequences: int | None,
    kv_bits: str | None,
    dtype: str | None,
    tokens: float | None,
    flops: float | None,
    watts: float | None,
    price: float | None,
    as_json: bool,
) -> int:
    """Say what MODEL needs to run, or what RECIPE needs to train it: memory for each part of it, and whether it fits; if not, the change
    that costs least and makes it fit. Only config.json and the headers of the weights are read, and nothing is downloaded.

    MODEL is a folder, a hub id in the cache, or a recipe that names its own. KEY=VALUE changes a key of the recipe.
    Exit code 4: it does not fit.
    """
    from llmkit.checkpoint.source import ModelSource
    from llmkit.compat import default_device
    from llmkit.planning.check import fit_run, free, make_run
    from llmkit.planning.model_info import read_facts

    context = click.get_current_context()
    training = model.endswith((".yaml", ".yml")) or bool(recipe)
    options = {"--ctx-size": ctx_size, "--sequences": sequences, "--kv-bits": kv_bits, "--dtype": dtype}
    if training:
        for name, said in options.items():
            if said is not None:
                raise click.UsageError(f"{name} has no effect on training; the recipe's keys say it.", context)
        result = _training(model, recipe, revision, memory, device, tokens, flops, watts, price)
    else:
        for name, value in {"--flops": flops, "--watts": watts, "--price": price}.items():
            if value is not None and tokens is None:
                raise click.UsageError(f"{name} has no effect without a recipe or --tokens.", context)
        facts = read_facts(ModelSource.open(model, revision, download=False))
        chosen = device or default_device()
        bits = None if kv_bits is None else int(kv_bits)
        run = make_run(facts, ctx_size or DEFAULT_POSITIONS, chosen, sequences=sequences or 1, kv_bits=bits, dtype=dtype)
        fit = fit_run(facts, run, free(chosen, memory))
        result = _flat(facts, fit, chosen) | {"positions": run.positions, "sequences": run.sequences}
        if tokens is not None:
            result |= _costs(facts, tokens, "as asked", min(TRAINED_LENGTH, run.positions), chosen, flops, watts, price, scratch=True)
    if as_json:
        print(json.dumps(result, ensure_ascii=False, allow_nan=False))
    else:
        _print(result)
    return 0 if result["fits"] else 4


def _training(
    model: str,
    words: tuple[str, ...],
    revision: str | None,
    memory: str | None,
    device: str | None,
    tokens: float | None,
    flops: float | None,
    watts: float | None,
    price: float | None,
) -> dict[str, Any]:
    from llmkit.checkpoint.source import ModelSource
    from llmkit.errors import UsageError
    from llmkit.planning.check import free
    from llmkit.planning.check_training import checkpoints, fit_recipe, recipe_device, recipe_facts
    from llmkit.planning.model_info import read_facts
    from llmkit.planning.training import setting
    from llmkit.training.recipe import read_recipe

    own = model.endswith((".yaml", ".yml"))
    path, *overrides = (model, *words) if own else words
    if "=" in path:
        raise UsageError(f"{path!r} changes a key, but of no recipe. Give the recipe's file before it.")
    if not own:
        at = f"@{revision}" if revision else ""
        overrides.append(f"model={json.dumps(model + at)}")
    if device is not None:
        overrides.append(f"device={device}")
    recipe = read_recipe(Path(path), overrides)
    facts = recipe_facts(recipe)
    if facts is None:
        assert isinstance(recipe.model, str)
        facts = read_facts(ModelSource.open(recipe.model, download=False))  # raises what is wrong
    chosen = recipe_device(recipe)
    available = free(chosen, memory)
    fit = fit_recipe(recipe, facts, available, chosen)
    plain = setting(recipe, facts, checkpoints(recipe, facts, available, chosen))
    result = _flat(facts, fit, chosen) | {
        "recipe": path,
        "trained_parameters": plain.trained,
        "checkpointing": plain.checkpointing,
        "tokens_per_step": plain.tokens * recipe.grad_accumulation,
    }
    count, how = (tokens, "as asked") if tokens is not None else _tokens(recipe, plain.tokens * recipe.grad_accumulation)
    scratch = isinstance(recipe.model, dict)
    if count is None and recipe.max_minutes is None:
        return result
    if flops is None and not chosen.startswith("cpu"):
        from llmkit.checkpoint.load import usable_device

        try:
            usable_device(chosen)
        except UsageError:
            missing = f"time and cost are not estimated, as there is no {chosen} here to be measured; --flops says how fast it is"
            return result | {"note": "; ".join((*facts.notes, missing))}
    return result | _costs(
        facts,
        count,
        how,
        plain.length,
        chosen,
        flops,
        watts,
        price,
        scratch=scratch,
        lora=plain.lora,
        factors=plain.trained if plain.lora else 0,
        checkpointing=plain.checkpointing,
        minutes=recipe.max_minutes,
    )


def _tokens(recipe: Any, per_step: int) -> tuple[float | None, str]:
    """Tokens of a whole run, and where the number comes from; None where only the clock ends it."""
    from llmkit.planning.check_training import data_size

    found = []
    if recipe.max_steps is not None:
        found.append((float(recipe.max_steps * per_step), f"{recipe.max_steps:,} steps of {per_step:,}"))
    if recipe.epochs is not None and (size := data_size(recipe)):
        found.append((recipe.epochs * size / 4, f"{recipe.epochs:g} epochs of the data, 4 bytes for a token"))
    return min(found) if found else (None, "")


def _costs(
    facts: Facts,
    tokens: float | None,
    how: str,
    length: int,
    device: str,
    flops: float | None,
    watts: float | None,
    price: float | None,
    *,
    scratch: bool,
    lora: bool = False,
    factors: int = 0,
    checkpointing: bool = False,
    minutes: float | None = None,
) -> dict[str, Any]:
    """What training takes beside memory. minutes: where only the clock ends it, tokens is None."""
    from llmkit.planning import estimate

    each = estimate.flops_per_token(facts, length, lora=lora, factors=factors, checkpointing=checkpointing)
    threads = os.cpu_count() or 1
    if flops is not None:
        speed, said = flops * estimate.UTILISATION, f"{estimate.UTILISATION:.0%} of {flops:.3g} operations/s"
    else:
        speed = estimate.measured_flops(device) * estimate.MEASURED_UTILISATION
        said = f"{estimate.MEASURED_UTILISATION:.0%} of a matrix product measured on this {device}"
    if tokens is None:
        assert minutes is not None
        tokens, how = minutes * 60 * speed / each, f"{minutes:g} minutes at that speed"
    power = watts or (estimate.GPU_WATTS if flops is not None or not device.startswith("cpu") else estimate.CPU_WATTS * threads)
    hours = tokens * each / speed / 3600
    energy = hours * power / 1000
    result: dict[str, Any] = {
        "tokens": tokens,
        "tokens_from": how,
        "training_flops": tokens * each,
        "hours": hours,
        "hours_from": said,
        "energy_kwh": energy,
        "cost": hours * price if price is not None else energy * estimate.PRICE_KWH,
        "cost_from": f"{price:g} for an hour" if price is not None else f"electricity at {estimate.PRICE_KWH:.2f} for a kWh",
    }
    if scratch:
        result |= {
            "expected_loss": estimate.expected_loss(facts.parameters, tokens),
            "expected_loss_hoffmann": estimate.expected_loss(facts.parameters, tokens, estimate.HOFFMANN),
            "best_tokens": estimate.best_tokens(facts.parameters),
            "expected_loss_from": estimate.SOURCES,
        }
    return result


def _flat(facts: Facts, fit: Fit, device: str) -> dict[str, Any]:
    terms = {f"{name.replace(' ', '_')}_bytes": size for name, size in fit.terms.items()}
    result: dict[str, Any] = {"model": facts.name, "parameters": facts.parameters, "device": device, **terms}
    result |= {"total_bytes": fit.total, "available_bytes": fit.available, "fits": fit.fits}
    if not fit.fits:
        result |= {"remedy": fit.change.text if fit.change else None, "remedy_bytes": fit.change.total if fit.change else None}
        result["remedy_text"] = fit.remedy
    if facts.notes:
        result["note"] = "; ".join(facts.notes)
    return result


def _print(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    from llmkit.planning.memory import shown

    console = Console(highlight=False, soft_wrap=True)
    table = Table("memory at the peak", title=f"{result['model']}, {result['parameters']:,} parameters, on {result['device']}")
    table.add_column("", justify="right")
    summed = ("total_bytes", "available_bytes", "remedy_bytes")
    for name, size in result.items():
        if name.endswith("_bytes") and name not in summed:
            table.add_row(name.removesuffix("_bytes").replace("_", " "), shown(size))
    table.add_section()
    table.add_row("in all", shown(result["total_bytes"]))
    table.add_row("available", shown(result["available_bytes"]))
    console.print(table)
    if result.get("checkpointing"):
        console.print("Activations are computed again on the way back (checkpointing).")
    if "note" in result:
        console.print(f"Note: {result['note']}.", markup=False)
    if result["fits"]:
        console.print("It fits.")
    else:
        console.print(f"It does not fit. {result['remedy_text']}", markup=False)
    if "training_flops" not in result:
        return
    console.print()
    costs = Table("estimate of training", "")
    costs.add_column("from")
    costs.add_row("tokens", f"{result['tokens']:.3g}", result["tokens_from"])
    costs.add_row("operations", f"{result['training_flops']:.3g}", "6 N D, 4 N D where weights are frozen, and attention")
    costs.add_row("time", _duration(result["hours"]), result["hours_from"])
    costs.add_row("energy", f"{result['energy_kwh']:.3g} kWh", "")
    costs.add_row("cost", f"{result['cost']:.2f}", result["cost_from"])
    if "expected_loss" in result:
        loss = f"{result['expected_loss']:.2f} ({result['expected_loss_hoffmann']:.2f} by the original's constants) nats per token"
        costs.add_row("expected loss", loss, "of the laws' own web text and tokenizer")
        costs.add_row("best for its operations", f"{result['best_tokens']:.3g} tokens", "")
    console.print(costs)
    if "expected_loss" in result:
        console.print(f"Loss: {result['expected_loss_from']}.", markup=False)


def _duration(hours: float) -> str:
    if hours < 1 / 60:
        return f"{3600 * hours:.0f} s"
    if hours < 1:
        return f"{60 * hours:.0f} min"
    return f"{hours:.1f} h" if hours < 48 else f"{hours / 24:.1f} days"
