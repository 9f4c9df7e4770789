"""`llmkit train RECIPE.yaml [key=value ...]`, also called `finetune`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from llmkit.errors import CheckFailed, UsageError
from llmkit.training.recipe import Recipe, keys_help, read_recipe


class _TrainCommand(click.Command):
    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Recipe keys"):
            for line in keys_help().splitlines():
                name, _, rest = line.partition(" ")
                formatter.write_text(f"{name} {rest}")


@click.command(cls=_TrainCommand, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("recipe", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--resume", is_flag=True, help="Go on from the run's last checkpoint, exactly where it was.")
@click.option("--check-data", is_flag=True, help="Show what of the data is learned, and stop; exit code 3: it cannot be right.")
def train(recipe: Path, overrides: tuple[str, ...], resume: bool, check_data: bool) -> None:
    """Train or fine-tune a model as RECIPE (a YAML file) says; KEY=VALUE changes a key, as in learning_rate=1e-3 or data.0.weight=2."""
    settings = read_recipe(recipe, overrides)
    if check_data:
        if resume:
            raise UsageError("--resume has no effect with --check-data, which trains nothing. Leave one of them out.")
        _check_data(settings)
        return
    from llmkit.measure.fit_training import recipe_device, settle
    from llmkit.measure.memory import measured_peak, shown

    settings, fit = settle(settings)
    from llmkit.training.run import run_recipe

    folder = run_recipe(settings, resume=resume, sample=_sample)
    if fit is not None:
        peak = measured_peak(recipe_device(settings))
        click.echo(f"memory at the peak: {shown(fit.total)} predicted, {shown(peak)} measured", err=True)
    click.echo(folder)


def _check_data(settings: Recipe) -> None:
    from llmkit.cli.check_data import print_check
    from llmkit.training.check import check_data

    check = check_data(settings, preference=settings.preference)
    print_check(check)
    if check.problems:
        raise CheckFailed(" ".join(check.problems))


def _sample(model: str, adapter: Path | None, prompts: Sequence[str]) -> list[str]:
    """What a person would get: an answer where the model chats, else a continuation."""
    import llmkit

    llm = llmkit.load(model, adapter=adapter)
    speak = llm.chat if llm.tokenizer.chat_template is not None else llm.generate
    length = min(120, llm.config.max_position_embeddings // 2)
    return [f"{prompt} -> {speak(prompt, max_tokens=length, seed=0).text}" for prompt in prompts]


if __name__ == "__main__":
    train()
