"""Files and folders into an index: unchanged files are left alone, changed ones replaced, unreadable ones reported."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

import numpy as np

from llmkit.errors import UsageError
from llmkit.rag import snapshot
from llmkit.rag.chunk import Chunk, chunk
from llmkit.rag.embed import Embedder, check_embedder, words
from llmkit.rag.index import CHUNKS, Index
from llmkit.rag.read import KIND_OF, MAX_BYTES, Document, Unreadable, digest_of, read, read_bytes
from llmkit.rag.terms import clean

BATCH_CHUNKS = 512  # of one commit with an embedder: what an interruption loses at most
BATCH_CHUNKS_TEXT = 8192  # without one
EMBEDDED = 128  # chunks between two reports of progress: some seconds of a slow machine


@dataclass
class Report:
    """What `add` did; paths are absolute."""

    added: list[str] = field(default_factory=list)
    replaced: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    unchanged: int = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)  # (file, why)
    notes: list[tuple[str, str]] = field(default_factory=list)
    unknown: int = 0  # files in folders whose suffix is of no kind that is read
    chunks: int = 0  # written


def add(
    index: Index,
    paths: Sequence[str | Path],
    *,
    embedder: Embedder | None = None,
    globs: Sequence[str] = (),
    sync: bool = False,
    max_bytes: int = MAX_BYTES,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Report:
    """Index files and folders (recursively). Each batch of files is one commit, so an interrupted run continues when called again.

    embedder: that of the index; UsageError for another, or for none where it has one. globs: only files whose name or path in
    the folder matches one of them. sync: also take out files that the index has under these paths and that are gone.
    """
    check_embedder(index.settings, embedder)
    report = Report()
    wanted = _wanted(paths, sync)
    files = list(dict.fromkeys(_walk(wanted, globs, report)))
    count = words if embedder is None else embedder.count
    limit = BATCH_CHUNKS_TEXT if embedder is None else BATCH_CHUNKS
    with index.writing():
        known = index.files()
        batch: list[tuple[Document, list[Chunk]]] = []
        changed = False

        def commit(read: int) -> None:
            nonlocal changed
            texts = [passage(document, piece) for document, pieces in batch for piece in pieces]
            vectors = None
            if embedder is not None:
                vectors = np.zeros((len(texts), embedder.dimension), np.float32)
                for start in range(0, len(texts), EMBEDDED):
                    progress(read - len(batch) + len(batch) * start // len(texts), len(files))
                    vectors[start : start + EMBEDDED] = embedder.documents(texts[start : start + EMBEDDED])
            index.replace(batch, vectors, known)
            report.chunks += len(texts)
            changed = True
            batch.clear()

        for done, file in enumerate(files):
            progress(done if embedder is None else done - len(batch), len(files))  # embedding is what takes the time
            try:
                data = read_bytes(Path(file), max_bytes)
            except Unreadable as error:
                report.skipped.append((file, str(error)))
                continue
            if known.get(file) == digest_of(data):
                report.unchanged += 1
                continue
            try:
                document = read(Path(file), data)
            except Unreadable as error:
                report.skipped.append((file, str(error)))
                if file in known:  # what it said before, it says no more
                    report.removed.append(file)
                continue
            if document.note:
                report.notes.append((file, document.note))
            batch.append((document, chunk(document, count, index.settings.chunk_tokens)))
            (report.replaced if file in known else report.added).append(file)
            if sum(len(pieces) for _, pieces in batch) >= limit:
                commit(done + 1)
        if batch:
            commit(len(files))
        if sync:
            report.skipped += [(path, "it does not exist, and the index has nothing of it") for path in _missing(wanted, known)]
            report.removed += sorted(_gone(known, wanted, files))
        index.remove(report.removed)
        if changed or report.removed:
            index.finish()
        if snapshot.read(index.location) is None:
            snapshot.write(index.location, index.files(), len(index))
    progress(len(files), len(files))
    return report


def nothing_to_do(
    place: str, paths: Sequence[str | Path], *, globs: Sequence[str] = (), sync: bool = False, max_bytes: int = MAX_BYTES
) -> tuple[Report, int] | None:
    """What `add` would report, and the number of chunks, if all files are in the index as they are; None if it has something to do."""
    if (said := snapshot.read(place)) is None:
        return None
    known, chunks = said
    report = Report()
    wanted = _wanted(paths, sync)
    files = list(dict.fromkeys(_walk(wanted, globs, report)))
    with suppress(Unreadable):
        if all(known.get(file) == digest_of(read_bytes(Path(file), max_bytes)) for file in files):
            report.unchanged = len(files)
            return None if sync and (any(_gone(known, wanted, files)) or any(_missing(wanted, known))) else (report, chunks)
    return None


def passage(document: Document, piece: Chunk) -> str:
    """What is embedded of a chunk: its headings, its table's header, its text."""
    return clean("\n".join(part for part in (piece.heading, piece.context.strip(), piece.plain) if part))


def _wanted(paths: Sequence[str | Path], sync: bool) -> list[str]:
    """The paths, absolute; UsageError for one that does not exist, unless what is gone is to be taken out."""
    wanted = [os.path.abspath(os.path.expanduser(str(path))) for path in paths]
    if (missing := [path for path in wanted if not os.path.lexists(path)]) and not sync:
        raise UsageError(f"{missing[0]} does not exist. Check the path; --sync takes files that are gone out of the index.")
    return wanted


def _walk(paths: Iterable[str], globs: Sequence[str], report: Report) -> Iterator[str]:
    """Files named, and those of a known kind in folders; names that begin with a dot are passed over there."""

    def unopened(error: OSError) -> None:
        report.skipped.append((str(error.filename), f"it cannot be opened ({error.strerror})"))

    for path in paths:
        if not os.path.isdir(path):
            if os.path.lexists(path):
                yield path
            continue
        for folder, folders, names in os.walk(path, onerror=unopened):
            if f"{CHUNKS}.lance" in folders:  # an index is no document, this one least of all
                folders.clear()
                continue
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in sorted(names):
                file = os.path.join(folder, name)
                if name.startswith(".") or (
                    globs and not any(fnmatch(name, glob) or fnmatch(os.path.relpath(file, path), glob) for glob in globs)
                ):
                    continue
                if os.path.splitext(name)[1].lower() in KIND_OF or globs:
                    yield file
                else:
                    report.unknown += 1


def _gone(known: Iterable[str], paths: Sequence[str], found: Sequence[str]) -> Iterator[str]:
    """Files of the index at or under these paths that were not found again and do not exist."""
    here = set(found)
    for file in known:
        if file not in here and any(_inside(file, path) for path in paths) and not _exists(file):
            yield file


def _missing(paths: Sequence[str], known: Iterable[str]) -> Iterator[str]:
    """Paths that do not exist and name nothing of the index: more likely a slip than something that is gone."""
    return (path for path in paths if not os.path.lexists(path) and not any(_inside(file, path) for file in known))


def _inside(file: str, path: str) -> bool:
    return file == path or file.startswith(path.rstrip(os.sep) + os.sep)


def _exists(file: str) -> bool:
    """True too where the folders above it do not let one look (`os.path.exists` says no there)."""
    try:
        os.stat(file)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        pass
    return True
