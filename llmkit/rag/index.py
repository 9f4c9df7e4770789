"""The store: one LanceDB table of chunks with their terms and vectors, and one with the frequencies of terms.

Every change of the chunks is one commit of LanceDB: a process that dies leaves the version before or the version after it, and
readers go on with the version that they opened. What it was made with (embedder, chunk size) stands in the table's schema.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from llmkit.errors import LLMKitError, naming_extras, out_of_memory
from llmkit.rag.chunk import CHUNK_TOKENS, Chunk, spaced_json
from llmkit.rag.read import Document
from llmkit.rag.terms import MAX_TERM, term_list

if TYPE_CHECKING:
    import pyarrow as pa
    from lancedb.db import DBConnection
    from lancedb.table import Table

CHUNKS, VOCABULARY = "chunks", "vocabulary"
FORMAT = 1
# The analysis is ours (`rag.terms`): LanceDB splits at spaces and changes nothing.
ANALYSIS = {
    "base_tokenizer": "whitespace",
    "stem": False,
    "remove_stop_words": False,
    "lower_case": False,
    "ascii_folding": False,
    "max_token_length": MAX_TERM,
}
VECTOR_INDEX_ROWS = 20_000  # fewer vectors are compared one by one, which is exact and as fast
COUNT_AGAIN = 0.05  # of the chunks changed: the frequencies of terms are counted again
CELL = 1000  # vectors of a cell of the vector index
SAMPLE = 256  # chunks whose vectors stand for all
TERMS_IN_MEMORY = 500_000  # frequencies that a reader keeps, some 60 MB; more are looked up on disk, for 4 ms more each time
KEEP = timedelta(hours=1)  # versions that a reader may still have open


class BrokenIndex(LLMKitError):
    """An index that is missing, damaged, busy or of another kind."""


@dataclass(frozen=True)
class Settings:
    """What an index was made with. `embedder` is empty for full text only."""

    embedder: str = ""  # the folder or hub id to load
    fingerprint: str = ""  # of its files: another model of the same name is refused
    dimension: int = 0
    chunk_tokens: int = CHUNK_TOKENS
    format: int = FORMAT


@dataclass(frozen=True)
class Row:
    """A chunk as it is stored; `text` is exactly `[start, end)` of its document."""

    id: str
    file: str
    start: int
    end: int
    line: int
    page: int
    kind: str
    heading: str
    context: str
    key: str
    digest: str
    text: str
    terms: tuple[str, ...]

    @property
    def plain(self) -> str:
        """The text as it is to be read, with the same offsets."""
        return spaced_json(self.text) if self.kind == "jsonl" else self.text


COLUMNS = ["id", "file", "start", "end", "line", "page", "kind", "heading", "context", "key", "digest", "text", "terms"]


class Index:
    """An open index. Readers need no lock; `writing()` is held by the one process that changes it."""

    def __init__(self, location: str, connection: DBConnection, table: Table, settings: Settings) -> None:
        self.location = location
        self.settings = settings
        self._connection = connection
        self.table = table
        self._statistics: tuple[int, float] | None = None
        self._frequencies: dict[str, int] | None = None
        self._sample: NDArray[np.float32] | None = None

    # --- opening --------------------------------------------------------------------------------------------------

    @classmethod
    def create(cls, location: str | Path, settings: Settings | None = None) -> Index:
        """The index at a folder (or an address that LanceDB opens, such as s3://bucket/name), made anew if there is none."""
        place = str(location)
        with suppress(IndexMissing):
            return cls.open(place)
        settings = settings or Settings()
        try:
            connection = _connect(place)
            table = connection.create_table(CHUNKS, schema=_schema(settings), exist_ok=True)
        except (OSError, RuntimeError, ValueError) as error:
            raise BrokenIndex(f"no index can be made at {place} ({_reason(error)}). Choose another folder.") from error
        index = cls(place, connection, table, settings)
        with index.writing():  # makes the search index
            pass
        return index

    @classmethod
    def open(cls, location: str | Path) -> Index:
        """Raises IndexMissing where there is none, BrokenIndex where it cannot be read."""
        place = str(location)
        if "://" not in place:
            if os.path.exists(place) and not os.path.isdir(place):
                raise BrokenIndex(f"{place} is a file, not an index. Give the folder of an index.")
            if not os.path.isdir(os.path.join(place, f"{CHUNKS}.lance")):
                raise IndexMissing(f"there is no index at {place}. Make one with: llmkit rag add FILES --index {place}")
            if not _committed(place):  # the process that made it died before the first commit
                raise IndexMissing(f"the index {place} cannot be opened (nothing was ever written to it). Add the files again.")
        try:
            connection = _connect(place)
            table = connection.open_table(CHUNKS)
            said = (table.schema.metadata or {}).get(b"llmkit")
            if said is None:
                raise BrokenIndex(f"{place} is a LanceDB database of something else. Give another folder.")
            settings = Settings(**json.loads(said))
        except (OSError, RuntimeError, ValueError, TypeError) as error:
            raise BrokenIndex(f"the index {place} cannot be opened ({_reason(error)}). {_remedy(error)}") from error
        if settings.format != FORMAT:
            raise BrokenIndex(f"the index {place} has format {settings.format}, this llmkit reads {FORMAT}. Add the files to a new index.")
        return cls(place, connection, table, settings)

    def __len__(self) -> int:
        with self.reading():
            return int(self.table.count_rows())

    def __repr__(self) -> str:
        return f"<Index {self.location}: {len(self)} chunks, {self.settings.embedder or 'full text only'}>"

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Turns what LanceDB raises for damaged files into one sentence."""
        try:
            yield
        except (OSError, RuntimeError, ValueError) as error:
            if out_of_memory(error):
                raise
            raise BrokenIndex(f"the index {self.location} cannot be read ({_reason(error)}). {_remedy(error)}") from error

    # --- changing -------------------------------------------------------------------------------------------------

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Held while the index is changed; a second writer gets an error. A process that dies lets go of it."""
        if "://" in self.location:  # LanceDB's own commit conflicts guard a remote store
            with _told(self.location):
                yield
            return
        from filelock import FileLock, Timeout

        lock = FileLock(os.path.join(self.location, ".lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise BrokenIndex(f"another process is writing to {self.location}. Try again when it has ended.") from error
        try:
            with _told(self.location):
                self.table.checkout_latest()
                self._statistics = self._frequencies = self._sample = None
                if not self.table.list_indices():  # a process that died after it had made the table
                    self._index_terms()
                yield
        finally:
            lock.release()

    def files(self) -> dict[str, str]:
        """The digest of every file in the index."""
        with self.reading():
            found = self.table.search().select(["file", "digest"]).where("n = 0").to_arrow()
        return dict(zip(found["file"].to_pylist(), found["digest"].to_pylist(), strict=True))

    def replace(
        self, documents: Sequence[tuple[Document, Sequence[Chunk]]], vectors: NDArray[np.float32] | None, known: Iterable[str]
    ) -> None:
        """Put the chunks of these documents in place of whatever their files had, in one commit.

        vectors: float32 `[chunks, dimension]` of all chunks in order, None without an embedder. known: files the index has already.
        """
        rows = self._rows(documents, vectors)
        files = [document.path for document, _ in documents]
        replaced = [file for file in files if file in set(known)]
        if replaced:
            merge = self.table.merge_insert("id").when_matched_update_all().when_not_matched_insert_all()
            merge.when_not_matched_by_source_delete(any_of("file", replaced)).execute(rows)
        elif rows.num_rows:
            self.table.add(rows)

    def remove(self, files: Sequence[str]) -> None:
        """Take files out, in one commit."""
        if files:
            self.table.delete(any_of("file", files))

    def finish(self) -> None:
        """After changes: bring the search indices up to date. Searches before that are right, but slower."""
        self.table.optimize(cleanup_older_than=KEEP)
        rows = len(self)
        if (
            self.settings.dimension
            and rows >= VECTOR_INDEX_ROWS
            and not any("vector" in index.columns for index in self.table.list_indices())
        ):
            from lancedb.index import IvfFlat

            # Exact vectors in cells, of which a search looks into 20; built in seconds.
            cells = IvfFlat(distance_type="dot", num_partitions=max(rows // CELL, 32), max_iterations=10, sample_rate=64)
            self.table.create_index("vector", config=cells)
        if abs(rows - self._counted()) > COUNT_AGAIN * rows:
            self._count_terms(rows)

    def _index_terms(self) -> None:
        from lancedb.index import FTS

        self.table.create_index("terms", config=FTS(**ANALYSIS), replace=True)

    def _rows(self, documents: Sequence[tuple[Document, Sequence[Chunk]]], vectors: NDArray[np.float32] | None) -> pa.Table:
        import pyarrow as pa

        rows: list[dict[str, Any]] = []
        for document, chunks in documents:
            stem = Path(document.path).stem
            for number, piece in enumerate(chunks):
                rows.append(
                    {
                        "id": f"{document.path}#{number}",
                        "n": number,
                        "file": document.path,
                        "kind": document.kind,
                        "digest": document.digest,
                        "text": document.text[piece.start : piece.end],
                        "terms": " ".join(term_list("\n".join((stem, piece.heading, piece.context, piece.plain)))),
                        "source": document.text if document.extracted and number == 0 else None,
                        **{name: getattr(piece, name) for name in ("start", "end", "line", "page", "heading", "context", "key", "fields")},
                    }
                )
        schema = _schema(self.settings)
        columns = [pa.array([row[name] for row in rows], schema.field(name).type) for name in schema.names if name != "vector"]
        if self.settings.dimension:
            if vectors is None or vectors.shape != (len(rows), self.settings.dimension):
                raise ValueError(f"vectors must be [{len(rows)}, {self.settings.dimension}]")
            flat = pa.array(vectors.astype(np.float16).ravel())
            columns.append(pa.FixedSizeListArray.from_arrays(flat, self.settings.dimension))
        return pa.Table.from_arrays(columns, schema=schema)

    # --- reading --------------------------------------------------------------------------------------------------

    def take(self, row_ids: Sequence[int]) -> tuple[list[Row], NDArray[np.float32] | None]:
        """The chunks of these (different) LanceDB row ids, in their order, and their vectors `[rows, dimension]` if they have any."""
        if not row_ids:
            return [], None
        columns = [*COLUMNS, "vector"] if self.settings.dimension else COLUMNS
        with self.reading():
            table = self.table.take_row_ids(list(row_ids)).with_row_id().select(columns).to_arrow()
        place = {row_id: i for i, row_id in enumerate(table["_rowid"].to_pylist())}
        order = [place[row_id] for row_id in row_ids]
        vectors = None
        if self.settings.dimension:
            vectors = _matrix(table["vector"], self.settings.dimension)[order]
        rows = table.select(COLUMNS).to_pylist()
        return [as_row(rows[i]) for i in order], vectors

    def neighbours(self, file: str, first: int, last: int) -> list[Row]:
        """Chunks of a file from one number in it to another, in order."""
        with self.reading():
            found = self.table.search().where(f"{any_of('file', [file])} AND n >= {first} AND n <= {last}")
            rows = found.select([*COLUMNS, "n"]).limit(last - first + 1).to_arrow().to_pylist()
        return [as_row(row) for row in sorted(rows, key=lambda row: int(row["n"]))]

    def background(self, vector: NDArray[np.float32]) -> float:
        """The mean cosine of a vector with chunks at hand: how similar what is unrelated looks."""
        if self._sample is None:
            with self.reading():
                table = self.table.search().select(["vector"]).limit(SAMPLE).to_arrow()
            self._sample = _matrix(table["vector"], self.settings.dimension)
        return float((self._sample @ vector).mean()) if len(self._sample) else 0.0

    def source(self, file: str) -> str | None:
        """The extracted text of a document, None for a file that is text itself."""
        with self.reading():
            found = self.table.search().where(any_of("id", [f"{file}#0"])).select(["source"]).limit(1).to_arrow()
        return found["source"][0].as_py() if len(found) else None

    def frequencies(self, terms: Iterable[str]) -> dict[str, int]:
        """In how many chunks each term stands; unknown terms are left out. Counts are those of the last `finish` that counted."""
        wanted = sorted(set(terms))
        if self._frequencies is None:
            table = self._vocabulary()
            if table is None or not wanted:
                return {}
            with self.reading():
                if table.count_rows() > TERMS_IN_MEMORY:
                    return _counts(table.search().where(any_of("term", wanted)).limit(len(wanted)).to_arrow())
                self._frequencies = _counts(table.to_arrow())
        return {term: self._frequencies[term] for term in wanted if term in self._frequencies}

    def statistics(self) -> tuple[int, float]:
        """The number of chunks and their mean length in terms, when they were last counted."""
        if self._statistics is None:
            counts = self.frequencies(["", " "])
            rows = max(counts.get("", 0), 1)
            self._statistics = rows, max(counts.get(" ", 0) / rows, 1.0)
        return self._statistics

    def _vocabulary(self) -> Table | None:
        try:
            return self._connection.open_table(VOCABULARY)
        except (ValueError, RuntimeError):  # nothing was counted yet
            return None

    def _counted(self) -> int:
        return self.frequencies([""]).get("", 0)

    def _count_terms(self, rows: int) -> None:
        """Count in how many chunks each term stands; "" holds the number of chunks, " " the sum of their lengths."""
        import pyarrow as pa
        import pyarrow.compute as pc

        chunks: dict[str, int] = {}
        length = 0
        for batch in self.table.search().select(["terms"]).to_batches(batch_size=4096):
            lists = pc.split_pattern(batch["terms"], " ")
            words, parents = pc.list_flatten(lists), pc.list_parent_indices(lists)
            length += len(words)
            once = pa.table({"row": parents, "term": words}).group_by(["row", "term"]).aggregate([])
            for pair in pc.value_counts(once["term"]).to_pylist():
                chunks[pair["values"]] = chunks.get(pair["values"], 0) + pair["counts"]
        chunks.pop("", None)
        chunks |= {"": rows, " ": length}
        table = pa.table({"term": list(chunks), "chunks": pa.array(list(chunks.values()), pa.int64())})
        self._statistics = self._frequencies = None
        stored = self._vocabulary()
        if stored is None:
            stored = self._connection.create_table(VOCABULARY, table)
        else:
            stored.add(table, mode="overwrite")
        if len(chunks) > 10_000:
            from lancedb.index import BTree

            stored.create_index("term", config=BTree())


class IndexMissing(BrokenIndex):
    """There is no index at the place named."""


def as_row(row: Mapping[str, Any]) -> Row:
    """A stored row, by the columns of `COLUMNS`."""
    return Row(**{name: row[name] for name in COLUMNS if name != "terms"}, terms=tuple(row["terms"].split()))


def _counts(table: pa.Table) -> dict[str, int]:
    return dict(zip(table["term"].to_pylist(), table["chunks"].to_pylist(), strict=True))


def _matrix(column: pa.ChunkedArray, dimension: int) -> NDArray[np.float32]:
    """A column of vectors as float32 `[rows, dimension]`."""
    flat = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return np.asarray(flat, np.float32).reshape(-1, dimension)


def any_of(column: str, values: Iterable[str]) -> str:
    """The SQL filter for a column that has one of these values."""
    return f"{column} IN ({', '.join(quoted(value) for value in values)})"


def quoted(value: str) -> str:
    """A string in SQL."""
    return "'" + value.replace("'", "''") + "'"


def _schema(settings: Settings) -> pa.Schema:
    import pyarrow as pa

    texts = ("id", "file", "kind", "heading", "context", "key", "digest", "text", "terms")
    fields = [pa.field(name, pa.string()) for name in texts]
    fields += [pa.field(name, pa.int64()) for name in ("n", "start", "end", "line", "page")]
    fields += [pa.field("fields", pa.list_(pa.string())), pa.field("source", pa.large_string())]
    if settings.dimension:
        fields.append(pa.field("vector", pa.list_(pa.float16(), settings.dimension)))
    return pa.schema(fields, metadata={b"llmkit": json.dumps(asdict(settings)).encode()})


def _committed(place: str) -> bool:
    """Whether the table of chunks has a version."""
    versions = Path(place) / f"{CHUNKS}.lance" / "_versions"
    return versions.is_dir() and any(name.endswith(".manifest") for name in os.listdir(versions))


def _connect(place: str) -> DBConnection:
    with naming_extras("rag"):
        import lancedb
    return lancedb.connect(place)


@contextmanager
def _told(place: str) -> Iterator[None]:
    """Turns what LanceDB raises into one sentence."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        if out_of_memory(error):
            raise
        full = any(words in str(error) for words in ("No space left", "os error 28", "File too large", "os error 27", "os error 122"))
        if full:
            why = "the disk is full. What it held is still there. Free some space and add again; it continues."
        else:
            why = f"{_reason(error)}. Add again; it continues. If it fails again, remove that folder and add the files to a new one."
        raise BrokenIndex(f"the index {place} could not be written: {why}") from error


def _remedy(error: BaseException) -> str:
    if "ermission denied" in str(error):
        return "Give yourself the right to read and write it."
    return "Remove that folder and add the files again."


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__
