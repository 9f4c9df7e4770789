"""Sources to documents: files, folders, split folders and data sets of the hub, before any tokenizer. No torch."""

from __future__ import annotations

import csv
import glob
import gzip
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import IO, Any, Literal

from llmkit.errors import UsageError
from llmkit.training.data.formats import Document, parse_row, read_row
from llmkit.training.recipe import Source

TEXT_ENDINGS = (".txt", ".md")
ROW_ENDINGS = (".jsonl", ".jsonl.gz", ".ndjson", ".parquet")
OTHER_ENDINGS = (".json", ".json.gz", ".csv")  # in a folder of the ones above they are notes and tables, not data
ENCODING = "utf-8-sig"  # UTF-8, with or without the mark that Windows puts before it
Split = Literal["train", "valid"]
_SPLITS: dict[str, Split] = {"train": "train", "training": "train", "valid": "valid", "validation": "valid", "val": "valid", "dev": "valid"}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)


def read_documents(source: Source, preference: bool = False, dropped: list[UsageError] | None = None) -> Iterator[Document]:
    """The documents of a source, in the order of its files.

    preference: rows with a chosen and a rejected answer are read as pairs, whatever else they hold.
    dropped: takes the errors of the rows that `bad_rows: drop` leaves out.

    Raises:
        UsageError: nothing is there, or a row is not a document; names file, line and what was expected.
    """
    parts = _parts(source, preference or source.learn == "chosen")
    split_is_given = any(split == "valid" for split, _ in parts)
    for split, read in parts:
        for document in islice(_good(read(), source, dropped), source.limit):
            yield replace(document, split=split) if split_is_given else document


def is_held_out(document: Document, source: Source, held_out: float) -> bool:
    """Whether a document is kept for evaluation: as its data is split already, else as the shares of source and recipe say."""
    if document.split == "valid":
        return True
    share = source.held_out if source.held_out is not None else 0.0 if document.split == "train" else held_out
    return document.is_held_out(share)


def training_texts(sources: Sequence[Source], held_out: float) -> Iterator[str]:
    """All text of the documents that are not held out, for training a tokenizer."""
    for source in sources:
        for document in read_documents(source):
            if not is_held_out(document, source, held_out):
                if document.messages is not None:
                    yield from (str(m.get("content") or "") for m in document.messages)
                else:
                    yield from (part for part in (document.text, document.prompt, document.completion) if part)


Rows = Iterator["Document | UsageError"]  # a row that cannot be read is an error that need not end the reading


def _good(rows: Rows, source: Source, dropped: list[UsageError] | None) -> Iterator[Document]:
    for row in rows:
        if isinstance(row, Document):
            yield row
        elif source.bad_rows == "error":
            raise row
        elif dropped is not None:
            dropped.append(row)


def _parts(source: Source, preference: bool) -> list[tuple[Split | None, Callable[[], Rows]]]:
    """What a source is read from, part after part, with the split that each belongs to."""
    path = Path(os.path.expanduser(source.path))
    folder, file = os.path.isdir(path), os.path.isfile(path)  # os.path, because pathlib raises where a name is too long
    hub = source.format == "hub" or not (folder or file or (path.parent != Path(".") and os.path.isdir(path.parent)))
    hub = hub and _HUB_ID.fullmatch(source.path) is not None and _kind(path) is None
    if source.format == "hub" and not hub:
        raise UsageError(f"{source.path} in data is no id of a data set. An id looks like user/name.")
    if hub or (folder and ((path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file())):
        return _dataset_parts(source, preference, hub)
    for key, given in (("name", source.name), ("streaming", source.streaming or None)):
        if given is not None:
            raise UsageError(f"{key} of {source.path} in data has no effect: it is for data sets of the hub. Drop the key.")
    if folder:
        files = _split_files(path)
        if files and source.split is not None:
            if source.split not in files:
                raise UsageError(f"{path} in data has no split {source.split}, only {', '.join(files)}. Choose one.")
            files = {"train": files[source.split]}
        if files:
            return [(_SPLITS[name], _reader(f, source, preference)) for name, found in files.items() if name in _SPLITS for f in found]
    if source.split is not None:
        raise UsageError(f"split of {path} in data has no effect: it is no folder with train.jsonl and the like. Drop the key.")
    if file:
        return [(None, _reader(path, source, preference))]
    if not folder:
        matched = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if os.path.isfile(name))
        if matched:
            return [(None, _reader(f, source, preference)) for f in matched]
        raise UsageError(f"{path} in data does not exist. Check the path (it is relative to where you run the command).")
    every = sorted(f for f in path.rglob("*") if f.is_file())
    for endings in ((*TEXT_ENDINGS, *ROW_ENDINGS), OTHER_ENDINGS):
        files_ = [f for f in every if f.name.lower().endswith(endings)]
        if files_:
            return [(None, _reader(f, source, preference)) for f in files_]
    raise UsageError(f"the folder {path} in data has no .txt, .md, .jsonl, .json, .csv or .parquet file. Give one that has.")


def _kind(path: Path) -> str | None:
    """The ending that says how a file is read."""
    return next((e for e in (*ROW_ENDINGS, *TEXT_ENDINGS, *OTHER_ENDINGS) if path.name.lower().endswith(e)), None)


def _split_files(folder: Path) -> dict[str, list[Path]]:
    """The files of a folder by split (train.jsonl, valid.jsonl, train-00000-of-00002.parquet); none where there is no train."""
    for place in (folder, folder / "data"):
        found: dict[str, list[Path]] = {}
        for file in sorted(place.glob("*")):
            name = re.split(r"[-_.]", file.name.lower(), maxsplit=1)[0]
            if (name in _SPLITS or name in ("test", "eval")) and _kind(file) not in (None, *TEXT_ENDINGS):
                found.setdefault(name, []).append(file)
        if any(_SPLITS.get(name) == "train" for name in found):
            return found
    return {}


# -- files -----------------------------------------------------------------------------------------------------------


def _reader(path: Path, source: Source, preference: bool) -> Callable[[], Rows]:
    def read() -> Rows:
        kind = _kind(path)
        if source.format in ("text", "jsonl"):
            kind = {"text": ".txt", "jsonl": ".jsonl"}[source.format]
        with _file_errors(path):
            if kind in (".jsonl", ".jsonl.gz", ".ndjson"):
                with _open(path) as lines:
                    for number, line in enumerate(lines, 1):
                        if line.strip():
                            yield _row(parse_row, line, f"{path}:{number}", preference, source)
            elif kind in (".json", ".json.gz"):
                yield from _json_rows(path, preference, source)
            elif kind == ".csv":
                csv.field_size_limit(2**31 - 1)  # a cell may be a whole book
                with path.open(encoding=ENCODING, newline="") as lines:
                    table = csv.DictReader(lines, strict=True)
                    for record in table:
                        cells = {name: cell for name, cell in record.items() if name is not None}  # None: cells beyond the header
                        yield _row(read_row, cells, f"{path}:{table.line_num}", preference, source)
            elif kind == ".parquet":
                yield from _arrow_rows(_parquet(path), str(path), preference, source)
            else:
                text = path.read_text(ENCODING)
                passages = text.split(source.separator) if source.separator else [text]
                for number, passage in enumerate(passages, 1):
                    if passage.strip():
                        yield Document(f"{path}, document {number}", text=passage.strip())

    return read


def _row(parse: Callable[..., Document], row: Any, place: str, preference: bool, source: Source) -> Document | UsageError:
    try:
        return parse(row, place, preference, source.columns)
    except UsageError as error:
        return error


def _open(path: Path) -> IO[str]:
    return gzip.open(path, "rt", encoding=ENCODING) if path.suffix == ".gz" else path.open(encoding=ENCODING)


@contextmanager
def _file_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text (byte {error.start}). Convert it, or take it out of data.") from None
    except (OSError, EOFError, zlib.error) as error:
        raise UsageError(f"{path} cannot be read ({getattr(error, 'strerror', None) or error}). Check data.") from None
    except csv.Error as error:
        raise UsageError(f"{path} is no CSV table ({error}). Check it, or convert it to JSONL.") from None


def _json_rows(path: Path, preference: bool, source: Source) -> Rows:
    """A JSON array of rows, an object that holds one, one row, or one row a line."""
    with _open(path) as file:
        text = file.read()
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        lines = text.splitlines()
        if str(error).startswith("Extra data") and len(lines) > 1:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _row(parse_row, line, f"{path}:{number}", preference, source)
            return
        raise UsageError(f"{path} is not JSON ({error}). Correct it; one row a line belongs into a .jsonl file.") from None
    if isinstance(value, dict):
        first = _row(read_row, value, str(path), preference, source)
        if isinstance(first, Document):
            yield first
            return
        lists = [part for part in value.values() if isinstance(part, list) and part and isinstance(part[0], dict)]
        if len(lists) != 1:
            raise first
        value = lists[0]
    if not isinstance(value, list):
        raise UsageError(f"{path} is a JSON {type(value).__name__}, not an array of rows. Give an array of objects.")
    for number, row in enumerate(value, 1):
        place = f"{path}, row {number}"
        try:  # as `parse_row` does for a line: no lone surrogates, no NaN
            json.dumps(row, ensure_ascii=False, allow_nan=False).encode()
        except (ValueError, RecursionError) as error:
            yield UsageError(f"{place} is not JSON ({error}). Correct the row.")
        else:
            yield _row(read_row, row, place, preference, source)


def _parquet(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(1000):
            yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise UsageError(f"{path} is no Parquet file ({error}). Fetch it again.") from None


def _arrow_rows(records: Iterator[dict[str, Any]], where: str, preference: bool, source: Source) -> Rows:
    for number, record in enumerate(records, 1):
        yield _row(read_row, _without_nulls(record), f"{where}, row {number}", preference, source)


def _without_nulls(value: Any) -> Any:
    """Arrow gives every struct the keys of all of them; what a row did not have is null."""
    if isinstance(value, dict):
        return {key: _without_nulls(part) for key, part in value.items() if part is not None}
    return [_without_nulls(part) for part in value] if isinstance(value, list) else value


# -- data sets -------------------------------------------------------------------------------------------------------


def _dataset_parts(source: Source, preference: bool, hub: bool) -> list[tuple[Split | None, Callable[[], Rows]]]:
    """The splits of a data set: of the hub, or of a folder that `save_to_disk` wrote."""
    import datasets

    with _dataset_errors(source, hub):
        if hub:
            data = datasets.load_dataset(source.path, source.name, split=source.split, streaming=source.streaming)
        else:
            data = datasets.load_from_disk(source.path)
            if source.split is not None and isinstance(data, dict):
                data = data[source.split]

    def reader(part: Any) -> Callable[[], Rows]:
        def records() -> Iterator[dict[str, Any]]:
            with _dataset_errors(source, hub):
                for record in part:
                    yield {key: value for key, value in record.items() if value is not None}

        return lambda: _arrow_rows(records(), source.path, preference, source)

    if not isinstance(data, dict):
        return [(None, reader(data))]
    found: list[tuple[Split | None, Callable[[], Rows]]] = [(_SPLITS[name], reader(part)) for name, part in data.items() if name in _SPLITS]
    if not any(split == "train" for split, _ in found):
        raise UsageError(f"{source.path} in data has the splits {', '.join(data)}, none of which is train. Choose one with split.")
    return found


@contextmanager
def _dataset_errors(source: Source, hub: bool) -> Iterator[None]:
    """Whatever the library raises, as one line: it has no common exception for what is missing, offline or private."""
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        said = " ".join(str(error).split()) or type(error).__name__
        if not hub:
            raise UsageError(f"the data set in {source.path} cannot be read ({said:.200}). Save it again.") from None
        offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON")
        remedy = "Unset HF_HUB_OFFLINE to fetch it" if offline else "Check the id, name and split, and the connection"
        raise UsageError(
            f"{source.path} in data is no file or folder, and as a data set of the hub it cannot be loaded ({said:.400}). {remedy}."
        ) from None
