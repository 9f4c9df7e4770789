"""`llmkit train RECIPE.yaml [key=value ...]`, also called `finetune`."""

from __future__ import annotations

from pathlib import Path

import click

from llmkit.training.recipe import keys_help, read_recipe


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
def train(recipe: Path, overrides: tuple[str, ...], resume: bool) -> None:
    """Train or fine-tune a model as RECIPE (a YAML file) says; KEY=VALUE changes a key, as in learning_rate=1e-3 or data.0.weight=2."""
    settings = read_recipe(recipe, overrides)
    from llmkit.training.run import run_recipe

    click.echo(run_recipe(settings, resume=resume, sample=_sample))


def _sample(folder: Path, prompt: str) -> str:
    """What a person would get: an answer where the model chats, else a continuation."""
    import llmkit

    llm = llmkit.load(folder)
    speak = llm.chat if llm.tokenizer.chat_template is not None else llm.generate
    return f"{prompt} -> {speak(prompt, max_tokens=min(120, llm.config.max_position_embeddings // 2), seed=0).text}"


if __name__ == "__main__":
    train()
