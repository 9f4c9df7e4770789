"""`llmkit generate`: continue a prompt."""

from __future__ import annotations

import json
import logging
import sys

import click

from llmkit.cli.options import (
    AtLeast,
    adapter_options,
    context_options,
    load_model,
    model_options,
    option,
    refuse_without_effect,
    sampling_arguments,
    sampling_options,
    speculation_options,
)
from llmkit.cli.terminal import finish, read_input, write_stream


@click.command(short_help="Continue a prompt and print only the new text.")
@model_options
@context_options
@option("-p", "--prompt", metavar="TEXT", help="The prompt; - reads standard input.")
@option("-f", "--file", metavar="FILE", help="Read the prompt from a file (less a newline at its end); - reads standard input.")
@option("--chat", is_flag=True, help="Send the prompt as a user message through the chat template.")
@option("-s", "--system", metavar="TEXT", help="System message (with --chat).")
@option("--chat-template", metavar="FILE|NAME", help="A Jinja template in place of the model's (with --chat).")
@option("--logprobs", type=AtLeast(0), metavar="K", help="Log probabilities, with the K most likely alternatives (with --json).")
@option("--json", "as_json", is_flag=True, envvar="LLMKIT_JSON", help="Print one JSON object when the reply is complete.")
@option("-v", "--verbose", is_flag=True, help="Speed, time to first token, cached tokens and skipped tensors on standard error.")
@speculation_options
@adapter_options(several=False)
@sampling_options
def generate(
    prompt: str | None,
    file: str | None,
    chat: bool,
    system: str | None,
    chat_template: str | None,
    logprobs: int | None,
    as_json: bool,
    verbose: bool,
    **_: object,
) -> int:
    """Continue a prompt and print only the new text.

    The prompt comes from -p, -f or standard input; without any of them the model starts from BOS. No chat template is
    applied unless --chat is given.
    """
    text = _prompt(prompt, file)
    if not chat:
        for flag, value in (("--system", system), ("--chat-template", chat_template)):
            if value is not None:
                raise click.UsageError(f"{flag} has no effect without --chat.", click.get_current_context())
    if logprobs is not None and not as_json:
        raise click.UsageError("--logprobs has no effect without --json.", click.get_current_context())

    if verbose:
        logging.basicConfig(format="%(message)s")
        logging.getLogger("llmkit").setLevel(logging.INFO)

    llm = load_model()
    arguments = sampling_arguments()
    refuse_without_effect(llm.params(**arguments).temperature)
    if chat:
        messages = [{"role": "system", "content": system}] * (system is not None) + [{"role": "user", "content": text}]
        stream = llm.chat(messages, stream=True, logprobs=logprobs, **arguments)
    else:
        stream = llm.stream(text, logprobs=logprobs, **arguments)
    if as_json:
        completion = finish(stream)
        print(json.dumps(completion.to_dict(), ensure_ascii=False))
    else:
        llm.tokenizer  # noqa: B018 - without one there is no text to print: say so before the first token
        completion = write_stream(stream)
    if verbose:
        print(completion.summary(), file=sys.stderr)
    return 130 if completion.finish_reason == "interrupted" else 0


def _prompt(prompt: str | None, file: str | None) -> str:
    if prompt is not None and file is not None:
        raise click.UsageError("-p and -f both give the prompt; give one of them.", click.get_current_context())
    if prompt is not None and prompt != "-":
        return prompt
    if file is not None:
        return read_input(file)
    if prompt == "-" or not sys.stdin.isatty():
        return read_input("-")
    return ""
