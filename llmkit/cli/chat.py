"""`llmkit chat`: talk to a model."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from llmkit.cli.options import (
    adapter_options,
    context_options,
    load_arguments,
    load_model,
    model_options,
    option,
    refuse_without_effect,
    sampling_arguments,
    sampling_options,
    speculation_options,
)
from llmkit.cli.rag_output import printable
from llmkit.cli.terminal import read_input, write_stream

if TYPE_CHECKING:
    from llmkit.llm.api import LLM
    from llmkit.rag.prompt import Grounding


@click.command(short_help="Talk to a model in the terminal.")
@model_options
@context_options
@option("-p", "--prompt", metavar="TEXT", help="Answer this one message and leave; - reads standard input.")
@option("-s", "--system", metavar="TEXT", help="System message.")
@option("--chat-template", metavar="FILE|NAME", help="A Jinja template in place of the model's.")
@option("--rag", "documents", metavar="DIR", help="Answer from this index (see `llmkit rag`); the proof follows each reply.")
@option("-v", "--verbose", is_flag=True, help="After each reply: speed, time to first token, cached tokens.")
@speculation_options
@adapter_options(several=True)
@sampling_options
def chat(prompt: str | None, system: str | None, documents: str | None, verbose: bool, **_: object) -> int:
    """Talk to MODEL (default: the embedded story teller).

    On a terminal this is a conversation with history and /commands (try /help). Where standard input or output is a pipe,
    the input is one message and only the reply is printed.
    """
    from llmkit.llm.api import embedded_model

    interactive = prompt is None and sys.stdin.isatty() and sys.stdout.isatty()
    message = "" if interactive else read_input("-") if prompt in (None, "-") else str(prompt)
    if not interactive and not message.strip():
        raise click.UsageError("the message is empty; give one with -p or through the pipe.", click.get_current_context())
    if not interactive and len(load_arguments().get("adapter", ())) > 1:
        raise click.UsageError("one message is answered with one adapter; give --adapter once.", click.get_current_context())

    llm = load_model(embedded_model)
    llm.chat_template  # noqa: B018 - without one there is no chat: say so before the first message
    sampling = sampling_arguments()
    refuse_without_effect(llm.params(**sampling).temperature)
    grounding = None if documents is None else _grounding(llm, documents)
    if interactive:
        from llmkit.cli.conversation import Conversation
        from llmkit.cli.repl import Repl

        return Repl(Conversation(llm, system, sampling, grounding=grounding), verbose).run()

    messages = [{"role": "system", "content": system}] * (system is not None) + [{"role": "user", "content": message}]
    if grounding is not None:
        messages = grounding.messages(messages, sampling)
    completion = write_stream(llm.chat(messages, stream=True, **sampling))
    if grounding is not None:
        print(printable("\n".join(grounding.proof(completion.text))), file=sys.stderr)
    if verbose:
        print(completion.summary(), file=sys.stderr)
    return 130 if completion.finish_reason == "interrupted" else 0


def _grounding(llm: LLM, documents: str) -> Grounding:
    from llmkit.rag.embed import DeferredEmbedder
    from llmkit.rag.index import Index
    from llmkit.rag.prompt import Grounding

    index = Index.open(documents)
    return Grounding(llm, index, DeferredEmbedder(index.settings.embedder) if index.settings.dimension else None)
