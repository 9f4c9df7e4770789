"""`llmkit rag`: index documents, search them, and answer from them with proof."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from llmkit.cli.options import AtLeast, load_arguments, option, refuse_without_effect, sampling_arguments, sampling_options
from llmkit.cli.rag_output import as_json_line, hit_data, printable, show_evaluation, show_hits, show_sources

if TYPE_CHECKING:
    from llmkit.rag.embed import Embedder
    from llmkit.rag.index import Index

F = TypeVar("F", bound=Callable[..., Any])

index_option = option("--index", "place", required=True, metavar="DIR", envvar="LLMKIT_INDEX", help="The folder of the index.")
json_option = option("--json", "as_json", is_flag=True, help="Print one JSON object.")


def machine_options(function: F) -> F:
    """Where models run."""
    function = option("--device", metavar="DEVICE", help="cpu, cuda, cuda:1, mps [default: cuda or mps where there is one].")(function)
    return option("-t", "--threads", type=AtLeast(1), help="CPU threads [default: physical cores].")(function)


def filter_options(function: F) -> F:
    """Which documents are searched."""
    function = option("--field", "fields", multiple=True, metavar="NAME=VALUE", help="Only JSONL rows with this member; repeatable.")(
        function
    )
    function = option(
        "--kind", "kinds", multiple=True, metavar="KIND", help="Only files of this kind (markdown, pdf, code, ...); repeatable."
    )(function)
    return option("--glob", "globs", multiple=True, metavar="GLOB", help="Only files whose path ends so, as in 'api/*.md'; repeatable.")(
        function
    )


def reranker_option(function: F) -> F:
    return option("--reranker", metavar="MODEL", help="A decoder-only reranker (Qwen3-Reranker) reads the best passages again.")(function)


@click.group(short_help="Index documents, search them, answer from them with proof.")
def rag() -> None:
    """Answers from your documents, every sentence backed by a quote that stands in them.

    \b
    llmkit rag add docs/ notes.pdf --index my.index     (once, and after changes)
    llmkit rag search "retry limit" --index my.index
    llmkit rag ask "How often is it retried?" --index my.index
    """


@rag.command(short_help="Index files and folders; unchanged files are skipped.")
@click.argument("paths", nargs=-1, required=True, metavar="PATH...")
@index_option
@option("--embedder", metavar="MODEL", help="Folder or hub id that makes vectors [default: the index's; a new one has full text only].")
@option("--chunk-tokens", type=AtLeast(16), metavar="N", help="Size of a new index's chunks, in the embedder's tokens [default: 220].")
@option("--glob", "globs", multiple=True, metavar="GLOB", help="In folders only files that match, as in '*.md'; repeatable.")
@option("--sync", is_flag=True, help="Also take out files that are gone.")
@option("--max-megabytes", type=AtLeast(1), default=64, show_default=True, metavar="N", help="Skip larger files.")
@json_option
@machine_options
def add(
    paths: tuple[str, ...],
    place: str,
    embedder: str | None,
    chunk_tokens: int | None,
    globs: tuple[str, ...],
    sync: bool,
    max_megabytes: int,
    as_json: bool,
    device: str | None,
    threads: int | None,
) -> int:
    """Index text, Markdown, HTML, PDF, docx, source code, JSONL and csv. An interrupted run continues when it is called again."""
    from llmkit.cli.progress import Bar
    from llmkit.rag import ingest

    max_bytes = max_megabytes << 20
    same = None
    if embedder is None and chunk_tokens is None:
        same = ingest.nothing_to_do(place, paths, globs=globs, sync=sync, max_bytes=max_bytes)
    if same is not None:
        report, total = same
    else:
        index, model = _open_to_add(place, embedder, chunk_tokens, device, threads)
        try:
            with Bar("indexing") as progress:
                report = ingest.add(index, paths, embedder=model, globs=globs, sync=sync, max_bytes=max_bytes, progress=progress)
        except KeyboardInterrupt:
            print(f"stopped; {len(index)} chunks are in {place}, and the same command goes on from there.", file=sys.stderr)
            raise
        total = len(index)
    for file, note in report.notes:
        print(printable(f"note: {file} {note}."), file=sys.stderr)
    for file, why in report.skipped:
        print(printable(f"skipped {file}: {why}."), file=sys.stderr)
    if as_json:
        counts = {"added": report.added, "replaced": report.replaced, "removed": report.removed, "unchanged": report.unchanged}
        skipped = [{"file": file, "reason": why} for file, why in report.skipped]
        print(as_json_line(counts | {"skipped": skipped, "chunks": report.chunks, "index": place, "total_chunks": total}))
    else:
        parts = [f"{len(report.added)} added", f"{len(report.replaced)} replaced", f"{report.unchanged} unchanged"]
        parts += [f"{len(report.removed)} removed"] * bool(report.removed) + [f"{len(report.skipped)} skipped"] * bool(report.skipped)
        parts += [f"{report.unknown} of other kinds passed over"] * bool(report.unknown)
        print(f"{', '.join(parts)}; {report.chunks} chunks written, {total} in {place}")
    done = report.added or report.replaced or report.removed or report.unchanged
    return 0 if done or not report.skipped else 1


@rag.command(short_help="Find passages.")
@click.argument("query")
@index_option
@option("-k", "--hits", type=AtLeast(1), default=5, show_default=True, metavar="N", help="Passages to show.")
@option("--neighbours", type=AtLeast(0), default=0, metavar="N", help="Show so many chunks before and after each hit too.")
@filter_options
@reranker_option
@json_option
@machine_options
def search(
    query: str,
    place: str,
    hits: int,
    neighbours: int,
    globs: tuple[str, ...],
    kinds: tuple[str, ...],
    fields: tuple[str, ...],
    reranker: str | None,
    as_json: bool,
    device: str | None,
    threads: int | None,
) -> int:
    """Show the passages that fit QUERY best, with their scores; QUERY - reads standard input."""
    from llmkit.cli.terminal import read_input
    from llmkit.rag.index import Index
    from llmkit.rag.retrieve import condition
    from llmkit.rag.retrieve import search as find

    text = read_input("-") if query == "-" else query
    if not text.strip():
        raise click.UsageError("the query is empty; give some words.", click.get_current_context())
    index = Index.open(place)
    found = find(
        index,
        text,
        hits,
        embedder=_embedder(index, device, threads),
        reranker=_reranker(reranker, device, threads),
        where=condition(globs, kinds, fields),
        neighbours=neighbours,
    )
    if as_json:
        print(as_json_line({"query": text, "hits": [hit_data(hit) for hit in found]}))
    else:
        show_hits(found)
    return 0


@rag.command(short_help="Answer a question, with proof.")
@click.argument("question")
@index_option
@option("-m", "--model", metavar="MODEL", help="What words the answer [default: none, as with --extractive].")
@option("--extractive", is_flag=True, help="Answer with the best supported sentences themselves; nothing is generated.")
@option("--strict", is_flag=True, help="Leave out sentences that no quote supports, instead of marking them.")
@option("-k", "--hits", type=AtLeast(1), default=8, show_default=True, metavar="N", help="Passages to answer from.")
@option("--context-tokens", type=AtLeast(64), default=1500, show_default=True, metavar="N", help="Of passages in the prompt.")
@filter_options
@reranker_option
@json_option
@option("--revision", metavar="REV", help="Branch, tag or commit of a hub id.")
@option("--dtype", type=click.Choice(["float32", "float16", "bfloat16"]), help="Of the weights [default: the checkpoint's].")
@option("-c", "--ctx-size", type=AtLeast(1), metavar="N", help="Longest prompt plus reply [default: the model's].")
@option("--chat-template", metavar="FILE|NAME", help="A Jinja template in place of the model's.")
@machine_options
@sampling_options
def ask(
    question: str,
    place: str,
    model: str | None,
    extractive: bool,
    strict: bool,
    hits: int,
    context_tokens: int,
    globs: tuple[str, ...],
    kinds: tuple[str, ...],
    fields: tuple[str, ...],
    reranker: str | None,
    as_json: bool,
    device: str | None,
    threads: int | None,
    **_: object,
) -> int:
    """Answer QUESTION from the documents; QUESTION - reads standard input.

    Each sentence is followed by the numbers of its quotes, or by [unsupported]. Where the documents hold no answer, it says so.
    """
    from llmkit.cli.terminal import read_input
    from llmkit.rag.answer import stream
    from llmkit.rag.index import Index
    from llmkit.rag.retrieve import condition

    text = read_input("-") if question == "-" else question
    sampling = sampling_arguments()
    generated = model is not None and not extractive
    if not generated:
        _refuse(strict=strict, **{name: sampling[name] for name in sampling})
    index = Index.open(place)
    llm = None
    if generated:
        from llmkit.llm.api import load

        llm = load(str(model), **load_arguments())
        llm.chat_template  # noqa: B018 - without one there is no chat: say so before the first word
        refuse_without_effect(llm.params(**{"temperature": 0.0, **sampling}).temperature)
    pieces = stream(
        llm,
        text,
        index,
        embedder=_embedder(index, device, threads),
        reranker=_reranker(reranker, device, threads),
        where=condition(globs, kinds, fields),
        strict=strict,
        hits=hits,
        context_tokens=context_tokens,
        **sampling,
    )
    if as_json:
        print(as_json_line(pieces.answer.to_dict()))
    else:
        for piece in pieces:
            sys.stdout.write(printable(piece))
            sys.stdout.flush()
        print()
        show_sources(pieces.answer)
    for file in pieces.answer.stale:
        print(printable(f"note: {file} has changed since it was indexed, so it was not quoted. Add it again."), file=sys.stderr)
    return 0


@rag.command("eval", short_help="Measure retrieval and answers.")
@index_option
@option("--queries", required=True, type=click.Path(exists=True, dir_okay=False), metavar="FILE", help='JSONL rows {"_id", "text"}.')
@option("--qrels", type=click.Path(exists=True, dir_okay=False), metavar="FILE", help="Judgements: query-id corpus-id score.")
@option("--answers", is_flag=True, help='Answer too: rows with {"answers": [...]} or {"answerable": false}.')
@option("-m", "--model", metavar="MODEL", help="What words the answers [default: none, they are extractive].")
@reranker_option
@option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False),
    metavar="FILE",
    help="Append the result as a JSON line [default: DIR/evaluations.jsonl].",
)
@json_option
@machine_options
def evaluate(
    place: str,
    queries: str,
    qrels: str | None,
    answers: bool,
    model: str | None,
    reranker: str | None,
    output: str | None,
    as_json: bool,
    device: str | None,
    threads: int | None,
) -> int:
    """Judge an index on queries in the BEIR layout: recall@k, nDCG@10 and MRR; with --answers exact match, F1, citations and abstention.

    Results are given for all queries and for both halves (every other one), so that settings chosen on one can be judged on the other.
    """
    from dataclasses import asdict

    from llmkit.cli.progress import Bar
    from llmkit.rag import evaluate as judge
    from llmkit.rag.index import Index

    if model is not None and not answers:
        raise click.UsageError("--model has no effect without --answers.", click.get_current_context())
    if qrels is None and not answers:
        raise click.UsageError("there is nothing to measure. Give --qrels, or --answers, or both.", click.get_current_context())
    index = Index.open(place)
    rows = judge.read_queries(Path(queries), None if qrels is None else Path(qrels))
    target = Path(output or Path(place) / "evaluations.jsonl")
    target.open("a", encoding="utf-8").close()  # that it cannot be written is better known before an hour of work
    embedder, reader = _embedder(index, device, threads), _reranker(reranker, device, threads)
    settings = {"queries": queries, "qrels": qrels, "model": model, "reranker": reranker, "chunks": len(index), **asdict(index.settings)}
    result: dict[str, Any] = {"settings": settings}
    if qrels is not None:
        with Bar("searching") as progress:
            result["retrieval"] = judge.evaluate_retrieval(index, rows, embedder=embedder, reranker=reader, progress=progress)
    if answers:
        llm = None
        if model is not None:
            from llmkit.llm.api import load

            llm = load(model, device=device, threads=threads)
        with Bar("answering") as progress:
            result["answers"] = judge.evaluate_answers(index, rows, llm=llm, embedder=embedder, reranker=reader, progress=progress)
    line = json.dumps(result, ensure_ascii=False)
    with target.open("a", encoding="utf-8") as file:
        file.write(line + "\n")
    if as_json:
        print(as_json_line(result))
    else:
        show_evaluation(result)
    return 0


def _refuse(**options: object) -> None:
    """An option that has no effect without a model is an error."""
    for name, value in options.items():
        if value:
            flag = "--" + name.replace("_", "-")
            raise click.UsageError(
                f"{flag} has no effect on an answer that is not generated. Give --model, without --extractive.", click.get_current_context()
            )


def _open_to_add(
    place: str, embedder: str | None, chunk_tokens: int | None, device: str | None, threads: int | None
) -> tuple[Index, Embedder | None]:
    from llmkit.errors import UsageError
    from llmkit.rag.chunk import CHUNK_TOKENS
    from llmkit.rag.embed import DeferredEmbedder, check_embedder
    from llmkit.rag.index import Index, IndexMissing, Settings

    try:
        index = Index.open(place)
    except IndexMissing:
        size = chunk_tokens or CHUNK_TOKENS
        if embedder is None:
            return Index.create(place, Settings(chunk_tokens=size)), None
        model = DeferredEmbedder(embedder, device, threads)
        if size > model.max_tokens:
            raise UsageError(
                f"--chunk-tokens {size} is more than the {model.max_tokens} tokens that {embedder} reads. Give fewer."
            ) from None
        name = str(Path(embedder).absolute()) if Path(embedder).is_dir() else embedder
        return Index.create(place, Settings(name, model.fingerprint, model.dimension, size)), model
    if chunk_tokens not in (None, index.settings.chunk_tokens):
        raise UsageError(f"the index has chunks of {index.settings.chunk_tokens} tokens; --chunk-tokens {chunk_tokens} needs a new index.")
    if embedder is not None:
        model = DeferredEmbedder(embedder, device, threads)
        check_embedder(index.settings, model)
        return index, model
    return index, _embedder(index, device, threads)


def _embedder(index: Index, device: str | None, threads: int | None) -> Embedder | None:
    """The embedder that the index was made with; it is loaded when it is first needed."""
    from llmkit.rag.embed import DeferredEmbedder

    return DeferredEmbedder(index.settings.embedder, device, threads) if index.settings.dimension else None


def _reranker(model: str | None, device: str | None, threads: int | None) -> Any:
    from llmkit.rag.rerank import load_reranker

    return None if model is None else load_reranker(model, device=device, threads=threads)
