"""Files to text: plain text, Markdown, source code, HTML, PDF, docx, JSONL, csv.

Offsets of chunks and quotes count the characters of `Document.text`. For text formats that is the file as
`Path.read_text(encoding="utf-8")` gives it; for HTML, PDF, docx and files in another encoding it is the extracted text, which
the index keeps. Extracted headings and tables are written as Markdown, so that one chunker understands all formats.
"""

from __future__ import annotations

import hashlib
import io
import logging
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llmkit.errors import LLMKitError, naming_extras

if TYPE_CHECKING:
    from selectolax.lexbor import LexborNode

KINDS = {
    "text": "txt text rst org tex log",
    "markdown": "md markdown mdx",
    "html": "html htm xhtml",
    "pdf": "pdf",
    "docx": "docx",
    "jsonl": "jsonl ndjson",
    "csv": "csv tsv",
    "code": "py pyi js jsx ts tsx java c h cc cpp hpp inl cu cs go rs rb php swift kt scala lua r jl sh bash ps1 sql css scss "
    "json yaml yml toml ini cfg xml proto tf ipynb",
}
KIND_OF = {f".{suffix}": kind for kind, suffixes in KINDS.items() for suffix in suffixes.split()}
MAX_BYTES = 64 << 20  # of one file; a larger one is hardly a document, and its text would be held in memory several times
MAX_UNPACKED = 4 * MAX_BYTES  # of a docx, pictures included; its XML takes ten times its size once it is parsed, so it has MAX_BYTES
PAGE_BREAK = "\n\n"
_MARKS = (  # how text in a wide encoding begins; UTF-32's holds UTF-16's
    (b"\xff\xfe\0\0", "UTF-32"),
    (b"\0\0\xfe\xff", "UTF-32"),
    (b"\xff\xfe", "UTF-16"),
    (b"\xfe\xff", "UTF-16"),
)
CONTROL = 0.02  # share of control characters from which on bytes are no text


class Unreadable(LLMKitError):
    """A file that cannot be read as a document; it is reported and skipped."""


@dataclass(frozen=True)
class Document:
    """A file as text.

    Attributes:
        path: absolute, with symbolic links left as they are.
        kind: a key of `KINDS`.
        digest: of the file's bytes.
        extracted: whether `text` is not what `read_text()` gives.
        pages: where each page of a PDF begins in `text`; empty for other kinds.
        note: what a person should know about how it was read.
    """

    path: str
    kind: str
    text: str
    digest: str
    extracted: bool = False
    pages: tuple[int, ...] = ()
    note: str | None = None


def digest_of(data: bytes) -> str:
    """What an unchanged file is known by."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def read_bytes(path: Path, max_bytes: int = MAX_BYTES) -> bytes:
    """The bytes of a file that may be a document; Unreadable where it cannot be one."""
    try:
        if not path.is_file():
            raise Unreadable("it is not a regular file")
        size = path.stat().st_size
        if size > max_bytes:
            raise Unreadable(
                f"it has {size >> 20} MB, more than the {max_bytes >> 20} MB of --max-megabytes; split it, or raise that limit"
            )
        return path.read_bytes()
    except OSError as error:
        raise Unreadable(f"it cannot be opened ({error.strerror})") from error


def read(path: Path, data: bytes) -> Document:
    """The document in `data`, the bytes of `path`. Raises Unreadable, with the reason as its message."""
    if encodable(str(path)) != str(path):  # which no store takes
        raise Unreadable("its name is not UTF-8; rename it")
    kind = KIND_OF.get(path.suffix.lower(), "text")
    digest = digest_of(data)
    if kind in _EXTRACTORS:
        text, pages = _EXTRACTORS[kind](data)
        if not text.strip():
            why = "; if it is scanned, run OCR first" if kind == "pdf" else ""
            raise Unreadable(f"it holds no text{why}")
        return Document(str(path), kind, text, digest, extracted=True, pages=pages)
    text, encoding = decode(data)
    if not text.strip():
        raise Unreadable("it is empty")
    note = None if encoding == "UTF-8" else f"is not UTF-8; it was read as {encoding}"
    return Document(str(path), kind, text, digest, extracted=encoding != "UTF-8", note=note)


def decode(data: bytes) -> tuple[str, str]:
    """Text with newlines normalised, and its encoding in words. Raises Unreadable for what is no text."""
    marked = next(((name.lower(), name) for mark, name in _MARKS if data.startswith(mark)), None)
    if marked is None and b"\0" in data:
        raise Unreadable("it is binary, or UTF-16 text without the mark that says so")
    tried = (marked,) if marked else (("utf-8", "UTF-8"), ("cp1252", "Windows-1252"))
    for encoding, name in tried:
        try:
            text = data.decode(encoding)
        except UnicodeDecodeError:
            continue
        strange = sum(text.count(chr(code)) for code in (*range(9), *range(14, 27), *range(28, 32), 127))
        if strange > CONTROL * len(text):
            raise Unreadable("it is binary")
        return _newlines(text), name
    raise Unreadable(f"it begins like {marked[1]} text and is not" if marked else "it is neither UTF-8 nor Windows-1252 text")


def _newlines(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _pdf(data: bytes) -> tuple[str, tuple[int, ...]]:
    with naming_extras("rag"):
        import pypdf
    logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # what it could not repair shows as missing text
    try:
        reader = pypdf.PdfReader(io.BytesIO(data))
        if reader.is_encrypted and not reader.decrypt(""):
            raise Unreadable("it is encrypted; save it without a password")
        texts = [_newlines(page.extract_text()).replace("\0", "").strip() for page in reader.pages]
    except Unreadable:
        raise
    except Exception as error:  # a damaged file raises whatever the parser tripped over
        raise Unreadable(f"it is no PDF that pypdf can read ({type(error).__name__}: {error})") from error
    starts, position = [], 0
    for text in texts:
        starts.append(position)
        position += len(text) + len(PAGE_BREAK)
    return encodable(PAGE_BREAK.join(texts)), tuple(starts)


def _docx(data: bytes) -> tuple[str, tuple[int, ...]]:
    with naming_extras("rag"):
        import docx
        from docx.table import Table
    try:
        parts = zipfile.ZipFile(io.BytesIO(data)).infolist()
        if sum(part.file_size for part in parts if part.filename.endswith((".xml", ".rels"))) > MAX_BYTES or (
            sum(part.file_size for part in parts) > MAX_UNPACKED
        ):
            raise Unreadable("it unpacks to more than a document can have; save its text as another kind")
        blocks = list(docx.Document(io.BytesIO(data)).iter_inner_content())
        texts = []
        for block in blocks:
            if isinstance(block, Table):
                texts.append(_table([[cell.text for cell in row.cells] for row in block.rows]))
                continue
            style = block.style.name if block.style is not None and block.style.name else ""
            level = re.fullmatch(r"Heading (\d)|(Title)", style)
            prefix = "#" * (int(level[1]) if level[1] else 1) + " " if level else "- " if style.startswith("List") else ""
            texts.append(prefix + block.text.strip() if block.text.strip() else "")
    except Unreadable:
        raise
    except Exception as error:  # not a zip, a zip without the parts, broken XML
        raise Unreadable(f"it is no docx file that can be read ({type(error).__name__})") from error
    return encodable("\n\n".join(text for text in texts if text)), ()


def _html(data: bytes) -> tuple[str, tuple[int, ...]]:
    with naming_extras("rag"):
        from selectolax.lexbor import LexborHTMLParser
    declared = re.search(rb"""<meta[^>]+charset=["']?([\w-]+)""", data[:2048], re.IGNORECASE)
    try:
        source = _newlines(data.decode(declared[1].decode("ascii"))) if declared else decode(data)[0]
    except (LookupError, UnicodeDecodeError):
        source = decode(data)[0]
    body = LexborHTMLParser(source).body
    try:
        return ("", ()) if body is None else (encodable(_tidy(_markdown(body))), ())
    except RecursionError as error:
        raise Unreadable("its elements are nested too deeply") from error


_SKIPPED = {"script", "style", "noscript", "template", "svg", "nav", "head", "iframe", "select", "button", "-comment", "_comment"}
_BLOCK_TAGS = "p div section article main header footer aside ul ol dl dt dd table blockquote figure figcaption form body address"
_PARAGRAPHS = frozenset(_BLOCK_TAGS.split())


def _markdown(node: LexborNode) -> str:
    """The text of an element and all in it."""
    parts: list[str] = []
    child = node.child
    while child is not None:
        parts.append(_element(child))
        child = child.next
    return "".join(parts)


def _element(node: LexborNode) -> str:
    tag = node.tag or ""
    if tag == "-text":
        return re.sub(r"\s+", " ", node.text(deep=False) or "")
    if tag in _SKIPPED or tag.startswith(("!", "-")):
        return ""
    if tag == "br":
        return "\n"
    if tag == "pre":
        return "\n\n```\n" + (node.text() or "").strip("\n") + "\n```\n\n"
    if tag == "table":
        rows = [[" ".join((cell.text() or "").split()) for cell in row.css("td, th")] for row in node.css("tr")]
        return "\n\n" + _table(rows) + "\n\n"
    inside = _markdown(node)
    if re.fullmatch(r"h[1-6]", tag):
        return f"\n\n{'#' * int(tag[1])} {' '.join(inside.split())}\n\n" if inside.strip() else ""
    if tag == "li":
        return f"\n- {inside.strip()}\n"
    return f"\n\n{inside.strip()}\n\n" if tag in _PARAGRAPHS else inside


def _table(rows: list[list[str]]) -> str:
    """A Markdown table whose first row is the header."""
    lines = [f"| {' | '.join(' '.join(cell.split()).replace('|', '/') for cell in row)} |" for row in rows if row]
    if lines:
        lines.insert(1, "|" + " --- |" * len(next(row for row in rows if row)))
    return "\n".join(lines)


def _tidy(text: str) -> str:
    return re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]+\n", "\n", text)).strip()


def encodable(text: str) -> str:
    """Without lone surrogates, which no store and no tokenizer takes."""
    return text.encode("utf-8", "replace").decode("utf-8")


_EXTRACTORS: dict[str, Callable[[bytes], tuple[str, tuple[int, ...]]]] = {"pdf": _pdf, "docx": _docx, "html": _html}
