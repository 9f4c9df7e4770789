"""What a run would learn, before it begins: sample rows with their mask, counts, lengths, and what is wrong. Loads no weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from llmkit.checkpoint.files import load_config
from llmkit.checkpoint.hub import resolve
from llmkit.text.tokenizer import Tokenizer, load_tokenizer
from llmkit.training.data.documents import training_texts
from llmkit.training.data.packing import pack, pieces_of, row_length
from llmkit.training.data.sources import Corpus, DataReport, load_corpora
from llmkit.training.data.vocabulary import train_tokenizer
from llmkit.training.recipe import Recipe, TokenizerRecipe

BARS = 10  # of the histogram


@dataclass(frozen=True)
class Sample:
    """A document as the model sees it: pieces of its text, each learned or only seen."""

    place: str
    pieces: list[tuple[str, bool]]


@dataclass(frozen=True)
class DataCheck:
    """What `check_data` found."""

    report: DataReport
    samples: list[Sample]
    held_out: int  # documents
    max_length: int
    lengths: list[tuple[int, int, int]]  # histogram of tokens per document: from, to (inclusive), documents
    longest: int
    rows: int  # packed rows of one epoch, every document once
    fill: float  # share of their slots that hold a token
    problems: list[str]  # what would make the run useless


def check_data(recipe: Recipe, samples: int = 2, preference: bool = False) -> DataCheck:
    """Read and encode a recipe's data as its run would.

    samples: documents to show of each source. preference: the data are pairs (`loss: dpo`).
    Raises what the run would raise for its tokenizer and its data.
    """
    vocab_size, context = None, None
    if isinstance(recipe.model, str):
        config = load_config(resolve(recipe.model))
        vocab_size, context = config.vocab_size, config.max_position_embeddings
    max_length = row_length(recipe.max_length, context)
    tokenizer = _tokenizer(recipe, max_length)
    train, held, report = load_corpora(recipe.data, tokenizer, recipe.held_out, max_length, preference)
    slots = train.offsets[1:] - train.offsets[:-1] - 1
    lengths = pieces_of(train, range(len(train)), max_length)[:, 2]
    rows = len(pack(lengths, max_length))
    return DataCheck(
        report=report,
        samples=list(_samples(train, tokenizer, samples, preference)),
        held_out=len(held),
        max_length=max_length,
        lengths=_histogram(slots + 1),
        longest=int(slots.max()) + 1,
        rows=rows,
        fill=float(lengths.sum()) / (rows * max_length),
        problems=list(_problems(report, train, vocab_size)),
    )


def _tokenizer(recipe: Recipe, max_length: int) -> Tokenizer:
    if isinstance(recipe.tokenizer, TokenizerRecipe):
        with TemporaryDirectory() as folder:
            train_tokenizer(recipe.tokenizer, training_texts(recipe.data, recipe.held_out), Path(folder), max_length)
            return load_tokenizer(folder)
    name = recipe.tokenizer or recipe.model
    assert isinstance(name, str)  # the recipe refuses a configuration without a tokenizer
    return load_tokenizer(resolve(name))


def _samples(corpus: Corpus, tokenizer: Tokenizer, count: int, preference: bool) -> Iterator[Sample]:
    """The first documents of each source; with pairs both answers of each."""
    for source in range(int(corpus.sources.max()) + 1):
        for document in (corpus.sources == source).nonzero()[0][: count * (2 if preference else 1)]:
            span = slice(corpus.offsets[document], corpus.offsets[document + 1])
            learned = corpus.learned[span].copy()
            learned[:1] = False  # nothing comes before the first token to predict it from
            tagged = zip(corpus.tokens[span].tolist(), learned.tolist(), strict=True)
            pieces = []
            stream = tokenizer.stream(skip_special=False)  # one for all, as a character may lie in two tokens
            for target, group in groupby(tagged, key=lambda pair: pair[1]):
                pieces.append(("".join([stream.push(token) for token, _ in group]), target))
            pieces.append((stream.flush(), pieces[-1][1]))
            kind = "" if not preference else (" (chosen)", " (rejected)")[document % 2]
            yield Sample(corpus.places[document] + kind, [piece for piece in pieces if piece[0]])


def _histogram(lengths: np.ndarray) -> list[tuple[int, int, int]]:
    """Documents by length, in at most ten steps of a round width."""
    longest = int(lengths.max())
    width = next(w * 10**e for e in range(10) for w in (1, 2, 5) if w * 10**e * BARS >= longest)
    counts = np.bincount((lengths - 1) // width, minlength=(longest - 1) // width + 1)
    return [(n * width + 1, (n + 1) * width, int(count)) for n, count in enumerate(counts)]


def _problems(report: DataReport, train: Corpus, vocab_size: int | None) -> Iterator[str]:
    for source in report.sources:
        if source.rows and not source.documents and not source.held_out:
            yield f"{source.path} has {source.rows:,} rows and nothing to learn in any of them."
        if source.documents and not source.ended:
            yield f"{source.path} never teaches an end token, so the model would not learn to stop: raise max_length, or name an eos_token."
    largest = int(train.tokens.max())
    if vocab_size is not None and largest >= vocab_size:
        yield f"The tokenizer gives the id {largest}, and the model has {vocab_size} embeddings: they do not belong together."
