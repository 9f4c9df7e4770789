"""`llmkit finetune RECIPE.yaml [key=value ...]`, also called `train`."""

from __future__ import annotations

from pathlib import Path

import click

from llmkit.errors import CheckFailed, UsageError
from llmkit.finetuning import finetune
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
    folder = finetune(settings, resume=resume)
    if settings.lora is not None:
        click.echo(f"to use it: llmkit chat {settings.model} --adapter {folder}", err=True)
    click.echo(folder)


def _check_data(settings: Recipe) -> None:
    from llmkit.cli.check_data import print_check
    from llmkit.training.data.preview import check_data

    check = check_data(settings, preference=settings.preference)
    print_check(check)
    if check.problems:
        raise CheckFailed(" ".join(check.problems))


if __name__ == "__main__":
    train()
