"""Options that several commands share, each declared once, and how they become arguments of `llmkit.load` and of sampling."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from llmkit.errors import UsageError

if TYPE_CHECKING:
    from llmkit.llm.api import LLM

F = TypeVar("F", bound=Callable[..., Any])
Decorator = Callable[[F], F]


class MirroredOption(click.Option):
    """An option whose error names the environment variable where the value came from there."""

    def get_error_hint(self, ctx: click.Context | None) -> str:
        mirrored = ctx is not None and ctx.get_parameter_source(str(self.name)) is ParameterSource.ENVIRONMENT
        return str(self.envvar) if mirrored else super().get_error_hint(ctx)


class AtLeast(click.IntRange):
    """A whole number that is not below `min`."""

    name = "integer"

    def __init__(self, least: int) -> None:
        super().__init__(min=least)


def option(*names: str, **settings: Any) -> Callable[[F], F]:
    """A click option with its mirror in the environment: `--max-tokens` is also `LLMKIT_MAX_TOKENS`."""
    long = next(name for name in names if name.startswith("--")).split("/")[0]
    settings.setdefault("envvar", "LLMKIT_" + long[2:].upper().replace("-", "_"))
    return click.option(*names, cls=MirroredOption, **settings)


def _stack(*decorators: Callable[[F], F]) -> Callable[[F], F]:
    def decorate(function: F) -> F:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return decorate


class LogitBias(click.ParamType):
    """`ID=BIAS`, for example 42=-100."""

    name = "ID=BIAS"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, float]:
        if isinstance(value, tuple):
            return value
        token, _, bias = str(value).partition("=")
        try:
            return int(token), float(bias)
        except ValueError:
            self.fail(f"{value!r} is not ID=BIAS; write a token id, '=' and a number, as in 42=-100.", param, ctx)


class StopText(click.ParamType):
    """A text; the mirror in the environment holds one a line, since a stop string may have spaces."""

    name = "TEXT"
    envvar_list_splitter = "\n"


def _unescape(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(value.replace("\\n", "\n").replace("\\t", "\t") for value in values)


def model_options(function: F) -> F:
    """MODEL and how it is loaded; read them with `load_arguments`."""
    return _stack(
        click.argument("model", required=False, default=None),
        option("-m", "--model", "model_option", metavar="MODEL", help="The same as MODEL: a folder, a hub id or HUB_ID@REV."),
        option("--revision", metavar="REV", help="Branch, tag or commit of a hub id."),
        option("--dtype", type=click.Choice(["float32", "float16", "bfloat16"]), help="Of the weights [default: the checkpoint's]."),
        option("--device", metavar="DEVICE", help="cpu, cuda, cuda:1, mps [default: cuda or mps where there is one]."),
        option("-t", "--threads", type=AtLeast(1), help="CPU threads [default: physical cores]."),
    )(function)


def context_options(function: F) -> F:
    """How long prompt and reply may be, and what remembering them takes; `load_arguments` reads it too."""
    return _stack(
        option("-c", "--ctx-size", type=AtLeast(1), metavar="N", help="Longest prompt plus reply [default: the model's]."),
        option(
            "--kv-bits",
            type=click.Choice(["32", "16", "8"]),
            callback=lambda _ctx, _param, value: value and int(value),
            help="Of each number in the KV cache [default: 32 for float32 weights, else 16].",
        ),
    )(function)


def speculation_options(function: F) -> F:
    """How tokens are drafted; `load_arguments` reads it too."""
    return _stack(
        option("--draft-model", metavar="MODEL", help="A smaller model with the same vocabulary, which drafts tokens."),
        option(
            "--speculate",
            type=click.Choice(["auto", "ngram", "off"]),
            help="Draft tokens from the text so far [default: auto, which is ngram on the native step, where replies stay the same].",
        ),
    )(function)


class AdapterName(click.ParamType):
    """A folder, a hub id or NAME=PATH; the mirror in the environment holds several as PATH does."""

    name = "[NAME=]PATH"
    envvar_list_splitter = os.pathsep


def adapter_options(*, several: bool) -> Callable[[F], F]:
    """Which adapters run beside the model; `load_arguments` reads it too."""
    more = "; repeatable, the first is used until /adapter says another" if several else ""
    return _stack(
        option("--adapter", type=AdapterName(), multiple=several, metavar="[NAME=]PATH", help=f"A PEFT adapter, folder or hub id{more}."),
        option("--any-base", is_flag=True, help="Take an adapter that was trained on other weights of the same shape."),
    )


def sampling_options(function: F) -> F:
    """Everything about how tokens are chosen; read them with `sampling_arguments`."""
    number = {"type": float, "metavar": "X"}
    count = {"type": int, "metavar": "N"}
    return _stack(
        option("-n", "--max-tokens", **count, help="Longest reply in tokens."),
        option("--min-tokens", **count, help="No end of text before so many tokens."),
        option("--temperature", "--temp", **number, help="0 is greedy [default: the model's generation_config.json]."),
        option("--top-p", **number, help="Sample from the smallest set of tokens with this probability."),
        option("--top-k", **count, help="Sample from the k most likely tokens; 0 is off."),
        option("--min-p", **number, help="Drop tokens less likely than this share of the most likely one."),
        option("--seed", **count, help="The same seed gives the same draws."),
        option("--repetition-penalty", **number, help="Divide positive logits of tokens already seen; 1 is off."),
        option("--presence-penalty", **number, help="Subtract from the logits of tokens already written; 0 is off."),
        option("--frequency-penalty", **number, help="The same for each time a token was written; 0 is off."),
        option("--logit-bias", type=LogitBias(), multiple=True, help="Add BIAS to the logit of token ID; repeatable."),
        option(
            "--stop",
            type=StopText(),
            multiple=True,
            callback=_unescape,
            metavar="TEXT",
            help=r"Stop before this text (\n is a new line); repeatable.",
        ),
        option("--stop-token", "stop_token_ids", type=int, multiple=True, metavar="ID", help="Stop at this token id; repeatable."),
        option("--ignore-eos", is_flag=True, help="Go on after an end-of-text token."),
    )(function)


SAMPLING = (
    *("max_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p", "seed"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias", "stop", "stop_token_ids", "ignore_eos"),
)


def from_command_line(name: str) -> bool:
    """Whether an option was typed (rather than left out or taken from the environment)."""
    return click.get_current_context().get_parameter_source(name) is ParameterSource.COMMANDLINE


def model_name(default: Callable[[], Path] | None = None) -> str | Path:
    """MODEL, given as an argument or as -m, or the default."""
    params = click.get_current_context().params
    argument, named = params["model"], params["model_option"]
    if argument and named and from_command_line("model_option"):
        raise click.UsageError(f"two models were given, {argument!r} and {named!r}; give one.", click.get_current_context())
    model = argument or named
    if model:
        return str(model)
    if default is None:
        raise click.UsageError("Missing argument 'MODEL': a folder or a hub id.", click.get_current_context())
    return default()


def load_arguments() -> dict[str, Any]:
    """The keyword arguments of `llmkit.load` that this command line sets."""
    params = click.get_current_context().params
    names = (
        "revision",
        "dtype",
        "device",
        "threads",
        "ctx_size",
        "kv_bits",
        "chat_template",
        "draft_model",
        "speculate",
        "adapter",
        "any_base",
    )
    return {name: params[name] for name in names if params.get(name) not in (None, (), False)}


def load_model(default: Callable[[], Path] | None = None) -> LLM:
    """Open MODEL and the draft model, each once, and load them, unless they do not fit into memory."""
    from llmkit.checkpoint.source import ModelSource
    from llmkit.compat import default_device
    from llmkit.llm.api import load
    from llmkit.planning.memory import clearly_fits

    arguments = load_arguments()
    source = ModelSource.open(model_name(default), arguments.pop("revision", None))
    if (draft := arguments.get("draft_model")) is not None:
        arguments["draft_model"] = ModelSource.open(draft)
    on_cpu = (arguments.get("device") or default_device()) == "cpu"
    if draft is not None or not on_cpu or not clearly_fits(source, arguments.get("ctx_size") or 2048):
        from llmkit.planning.check import check_run

        check_run(source, arguments)
    return load(source, **arguments)


def sampling_arguments() -> dict[str, Any]:
    """The sampling arguments that this command line sets, by their names in the Python API."""
    params = click.get_current_context().params
    chosen = {name: params[name] for name in SAMPLING if params[name] is not None and params[name] != () and params[name] is not False}
    if "logit_bias" in chosen:
        chosen["logit_bias"] = dict(chosen["logit_bias"])
    return chosen


def refuse_without_effect(temperature: float) -> None:
    """At temperature 0 the most likely token is taken: a cut of the distribution that was typed would be ignored."""
    if temperature == 0:
        for name in ("top_p", "top_k", "min_p"):
            if from_command_line(name):
                flag = "--" + name.replace("_", "-")
                raise UsageError(f"{flag} has no effect at temperature 0, which is greedy. Leave it out or give --temperature.")
