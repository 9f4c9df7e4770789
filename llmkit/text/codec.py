"""A tokenizer's folder, as its files describe it, and what every kind of vocabulary offers: text to ids, and one id to bytes.

The three codecs (tokenizer.json, sentencepiece, tiktoken ranks) are modules of their own, imported only for a folder of their kind.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from llmkit.errors import TokenizerError

CharSpan = tuple[int, int]  # [start, end) in characters of the text, not bytes

ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class AddedToken:
    """A string that is one token wherever it stands, whatever the vocabulary's own rules (Hugging Face's field names)."""

    content: str
    special: bool = True  # skipped when decoding, and parsed out of text only where special tokens are asked for
    lstrip: bool = False  # swallows the whitespace to its left
    rstrip: bool = False  # swallows the whitespace to its right
    single_word: bool = False  # not inside of a word


@dataclass(frozen=True)
class TokenizerSettings:
    """tokenizer_config.json, added_tokens.json, special_tokens_map.json and the template files, as one."""

    roles: Mapping[str, str] = field(default_factory=dict)  # bos_token -> "<s>", ...
    added: Mapping[int, AddedToken] = field(default_factory=dict)
    special: frozenset[str] = frozenset()  # special tokens named without an id (additional_special_tokens)
    add_bos_token: bool | None = None  # None: not said
    add_eos_token: bool | None = None
    add_prefix_space: bool = False  # GPT-2: a text begins as if a space stood before it
    tokenizer_class: str | None = None
    legacy: bool = True  # sentencepiece: a space before every piece of text between special tokens, not only the first
    templates: Mapping[str, str] = field(default_factory=dict)  # name -> Jinja source; the usual one is "default"


class Codec(Protocol):
    """A vocabulary of one of the three kinds (tokenizer.json, sentencepiece, tiktoken ranks).

    Decoding is byte by byte so that it can be streamed: the text of some ids is the UTF-8 reading of their
    bytes, less the leading spaces that the tokenizer itself put there.
    """

    vocab_size: int  # every id is below it
    special_ids: frozenset[int]
    roles: Mapping[str, int]  # bos_token, eos_token, ... as the vocabulary itself says; settings override it
    prefix: tuple[int, ...]  # what the vocabulary's own rules put before a text
    suffix: tuple[int, ...]  # and after it
    strip_leading: int  # so many spaces at the beginning of a decoded text are not the text's
    replace_each_byte: bool  # malformed UTF-8: one U+FFFD for each byte (sentencepiece) or for each broken sequence

    def encode(self, text: str, special: bool) -> list[int]:
        """Ids of a text, with nothing added; `special`: special tokens written in the text become their ids."""

    def encode_spans(self, text: str) -> tuple[list[int], list[CharSpan]]:
        """As `encode` with special tokens parsed, and which characters each id stands for."""

    def encode_batch(self, texts: Sequence[str], special: bool) -> list[list[int]]:
        """`encode` of each text."""

    def encode_spans_batch(self, texts: Sequence[str]) -> list[tuple[list[int], list[CharSpan]]]:
        """`encode_spans` of each text."""

    def piece(self, token_id: int, first: bool) -> bytes | None:
        """The bytes an id adds to a text (`first`: as its first token); None for an id that has none."""

    def token_id(self, token: str) -> int | None:
        """The id of a whole token, None if it is not one."""


@contextmanager
def library_errors(cause: str, remedy: str) -> Iterator[None]:
    """Turns whatever a tokenizer library raises into a TokenizerError.

    They are written in Rust and C++: bare Exception is common, and a Rust panic derives from BaseException only and
    has no importable name.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
        raise
    except BaseException as error:
        raise TokenizerError(f"{cause} ({error}); {remedy}") from error


def read_settings(folder: Path) -> TokenizerSettings:
    """The settings of a tokenizer's folder; files that are not there are no error, damaged ones are a TokenizerError."""
    config = read_object(folder / "tokenizer_config.json")
    special_map = read_object(folder / "special_tokens_map.json")
    plain_added = read_object(folder / "added_tokens.json")
    # Where both name a token, tokenizer_config.json is the newer file and wins, as in transformers.
    named = {**special_map, **config}
    where = str(folder / "tokenizer_config.json")

    roles = {role: _content(named[role], where) for role in ROLES if named.get(role) is not None}
    special = set(roles.values())
    for key in ("additional_special_tokens", "extra_special_tokens"):
        extra = named.get(key) or []
        values = list(extra.values()) if isinstance(extra, dict) else extra
        if not isinstance(values, list):
            raise TokenizerError(f"{where}: {key} is {type(extra).__name__}, not a list; is the file damaged?")
        special.update(_content(value, where) for value in values)

    added: dict[int, AddedToken] = {}
    for content, number in plain_added.items():
        added[_token_id(number, folder / "added_tokens.json")] = AddedToken(content, special=content in special)
    decoder = config.get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict):
        raise TokenizerError(f"{where}: added_tokens_decoder is {type(decoder).__name__}, not an object; is the file damaged?")
    for number, token in decoder.items():
        if not isinstance(token, dict):
            raise TokenizerError(f"{where}: added token {number!r} is {token!r}, not an object; is the file damaged?")
        content = _content(token, where)
        added[_token_id(number, folder / "tokenizer_config.json")] = AddedToken(
            content,
            special=bool(token.get("special", False)) or content in special,
            lstrip=bool(token.get("lstrip", False)),
            rstrip=bool(token.get("rstrip", False)),
            single_word=bool(token.get("single_word", False)),
        )
    return TokenizerSettings(
        roles=roles,
        added=added,
        special=frozenset(special),
        add_bos_token=_flag(config, "add_bos_token", where),
        add_eos_token=_flag(config, "add_eos_token", where),
        add_prefix_space=_flag(config, "add_prefix_space", where) is True,
        tokenizer_class=kind if isinstance(kind := config.get("tokenizer_class"), str) else None,
        legacy=_flag(config, "legacy", where) is not False,
        templates=_read_templates(folder, config),
    )


def _read_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Named chat templates; a file of its own wins over tokenizer_config.json, as in transformers."""
    where = folder / "tokenizer_config.json"
    said = config.get("chat_template")
    if said is None:
        where = folder / "chat_template.json"  # how processors (Gemma 3) once stored it
        said = read_object(where).get("chat_template")
    templates: dict[str, str] = {}
    if isinstance(said, str):
        templates["default"] = said
    elif isinstance(said, list):
        for entry in said:
            if not (isinstance(entry, dict) and isinstance(entry.get("name"), str) and isinstance(entry.get("template"), str)):
                raise TokenizerError(f"{where}: an entry of chat_template has no name and template; is the file damaged?")
            templates[entry["name"]] = entry["template"]
    elif said is not None:
        raise TokenizerError(f"{where}: chat_template is {type(said).__name__}, not text or a list; is the file damaged?")
    if os.path.lexists(folder / "chat_template.jinja"):
        templates["default"] = read_text(folder / "chat_template.jinja")
    for path in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        templates[path.stem] = read_text(path)
    return templates


def read_text(path: Path) -> str:
    """A UTF-8 file, its line ends as they are; TokenizerError where it cannot be read."""
    try:
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise TokenizerError(f"{path} cannot be read ({error.strerror}); check the file and its permissions.") from error
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{path} is not UTF-8 text (byte {error.start}); fetch the file again.") from error


def read_object(path: Path) -> dict[str, Any]:
    """A file's JSON object, empty where there is no file; TokenizerError where it is damaged."""
    if not os.path.lexists(path):
        return {}
    try:
        value = json.loads(read_text(path))
        json.dumps(value, ensure_ascii=False).encode()  # a lone surrogate (\ud800) is no text to any vocabulary
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{path} is not valid JSON ({error}); fetch the file again.") from error
    if not isinstance(value, dict):
        raise TokenizerError(f"{path} holds {type(value).__name__}, not a JSON object; fetch the file again.")
    return value


def _content(token: object, where: str) -> str:
    """A token is written as its text or as an object with `content`."""
    content = token.get("content") if isinstance(token, dict) else token
    if not isinstance(content, str) or not content:
        raise TokenizerError(f"{where}: {token!r} is not a token; is the file damaged?")
    return content


def _token_id(number: object, path: Path) -> int:
    try:
        value = int(number)  # type: ignore[call-overload]
    except (TypeError, ValueError):
        value = -1
    if not 0 <= value < 2**31:
        raise TokenizerError(f"{path}: {number!r} is not a token id; is the file damaged?")
    return int(value)


def _flag(config: Mapping[str, Any], key: str, where: str) -> bool | None:
    value = config.get(key)
    if value is not None and not isinstance(value, bool):
        raise TokenizerError(f"{where}: {key} is {value!r}, not true or false; is the file damaged?")
    return value
