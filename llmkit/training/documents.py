"""Files to documents: what one line of JSONL or one passage of a text file says, before any tokenizer. No torch.

A document is a tuple of parts, each text either a target (learned) or context (seen, not learned), or a chat.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmkit.errors import UsageError
from llmkit.training.recipe import Source

TEXT_ENDINGS = (".txt", ".md")
ENCODING = "utf-8-sig"  # UTF-8, with or without the mark that Windows puts before it


@dataclass(frozen=True)
class Document:
    """One document. Exactly one of `text`, `prompt` with `completion`, or `messages` is set."""

    place: str  # file:line, for messages to people
    text: str | None = None
    prompt: str | None = None
    completion: str | None = None
    messages: tuple[Mapping[str, Any], ...] | None = None
    tools: tuple[Mapping[str, Any], ...] | None = None

    @property
    def target(self) -> str:
        """The text that is learned: everything, the completion, or what the assistant says."""
        if self.text is not None:
            return self.text
        if self.messages is not None:
            return "\n".join(str(m.get("content") or "") for m in self.messages if m["role"] == "assistant")
        return self.completion or ""

    def is_held_out(self, share: float) -> bool:
        """Whether the document belongs to the held-out `share`.

        The choice is a hash of the target text (letter case and white space aside), so it does not depend on order,
        seed or other documents, and a story stays on one side in all the forms it appears in.
        """
        digest = hashlib.blake2b(" ".join(self.target.lower().split()).encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") < share * 2**64


def read_documents(source: Source) -> Iterator[Document]:
    """The documents of a source, in the order of its files.

    Raises:
        UsageError: nothing is there, or a line is not a document; names file, line and what was expected.
    """
    for path in _files(source):
        try:
            if source.format == "jsonl" or (source.format == "auto" and path.suffix == ".jsonl"):
                with path.open(encoding=ENCODING) as lines:
                    for number, line in enumerate(lines, 1):
                        if line.strip():
                            yield parse_row(line, f"{path}:{number}")
            else:
                text = path.read_text(ENCODING)
                passages = text.split(source.separator) if source.separator else [text]
                for number, passage in enumerate(passages, 1):
                    if passage.strip():
                        yield Document(f"{path}, document {number}", text=passage.strip())
        except UnicodeDecodeError as error:
            raise UsageError(f"{path} is not UTF-8 text (byte {error.start}). Convert it, or take it out of data.") from None
        except OSError as error:
            raise UsageError(f"{path} cannot be read ({error.strerror}). Check data.") from None


def parse_row(line: str, place: str) -> Document:
    """One JSONL row as a document; UsageError says what is wrong with it."""
    try:
        row = json.loads(line)
        json.dumps(row, ensure_ascii=False).encode()  # a lone surrogate (\ud800) is no text
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{place} is not JSON ({error}). Each line must be one JSON object.") from None
    if not isinstance(row, dict):
        raise UsageError(f"{place} is a JSON {type(row).__name__}, not an object. Each line must be one JSON object.")
    if isinstance(row.get("text"), str):
        return Document(place, text=row["text"])
    if isinstance(row.get("prompt"), str) and isinstance(row.get("completion"), str):
        return Document(place, prompt=row["prompt"], completion=row["completion"])
    messages = row.get("messages")
    if isinstance(messages, list) and messages and all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in messages):
        tools = row.get("tools")
        return Document(place, messages=tuple(messages), tools=tuple(tools) if isinstance(tools, list) else None)
    raise UsageError(
        f"{place} has the keys {', '.join(row) or '(none)':.200}, which make no document. "
        'A row is {"text": "..."}, {"prompt": "...", "completion": "..."} or {"messages": [{"role": "...", "content": "..."}]}.'
    )


def training_texts(sources: Sequence[Source], held_out: float) -> Iterator[str]:
    """All text of the documents that are not held out, for training a tokenizer."""
    for source in sources:
        share = held_out if source.held_out is None else source.held_out
        for document in read_documents(source):
            if not document.is_held_out(share):
                if document.messages is not None:
                    yield from (str(m.get("content") or "") for m in document.messages)
                else:
                    yield from (part for part in (document.text, document.prompt, document.completion) if part)


def _files(source: Source) -> list[Path]:
    path = Path(source.path)
    if os.path.isdir(path):  # os.path, because pathlib raises where a name is too long
        files = sorted(f for f in path.rglob("*") if f.suffix in (*TEXT_ENDINGS, ".jsonl") and f.is_file())
        if files:
            return files
        raise UsageError(f"the folder {path} in data has no .txt, .md or .jsonl file. Give a folder that has, or a file.")
    if not os.path.isfile(path):
        raise UsageError(f"{path} in data does not exist. Check the path (it is relative to where you run the command).")
    return [path]
