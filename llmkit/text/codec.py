"""A tokenizer's folder, as its files describe it, and what every kind of vocabulary offers: text to ids, and one id to bytes.

The three codecs (tokenizer.json, sentencepiece, tiktoken ranks) are modules of their own, imported only for a folder of their kind.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from llmkit.errors import TokenizerError

CharSpan = tuple[int, int]  # [start, end) in characters of the text, not bytes

ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class AddedToken:
    """A string that is one token wherever it stands, whatever the vocabulary's own rules (Hugging Face's field names)."""

    content: str
    id: int | None = None  # None: the vocabulary's own, else the next free one
    special: bool = True  # skipped when decoding, and parsed out of text only where special tokens are asked for
    lstrip: bool = False  # swallows the whitespace to its left
    rstrip: bool = False  # swallows the whitespace to its right
    single_word: bool = False  # not inside of a word
    normalized: bool = False  # looked for in the normalized text, not in the text as it is written


@dataclass(frozen=True)
class TokenizerSettings:
    """What the files beside a vocabulary say of its tokens, merged as transformers merges them; the same for all three codecs.

    tokenizer_config.json, special_tokens_map.json, added_tokens.json and the template files. A token may be named there and nowhere
    else, and its flags there overrule the vocabulary's.
    """

    roles: Mapping[str, str] = field(default_factory=dict)  # bos_token -> "<s>", ...; a model's own (image_token) too
    added: tuple[AddedToken, ...] = ()  # those with an id, in its order
    named: tuple[AddedToken, ...] = ()  # those without: of roles, then of lists. Who is in no vocabulary gets the next free id
    add_bos_token: bool | None = None  # None: not given
    add_eos_token: bool | None = None
    add_prefix_space: bool | None = None  # a text begins as if a space stood before it; None: as the vocabulary says
    tokenizer_class: str | None = None
    legacy: bool = True  # sentencepiece: a space before every piece of text between special tokens, not only the first
    templates: Mapping[str, str] = field(default_factory=dict)  # name -> Jinja source; the usual one is "default"

    @property
    def special(self) -> frozenset[str]:
        """Every token that is special by its name or by its flag."""
        return frozenset(token.content for token in (*self.added, *self.named) if token.special)


class Codec(Protocol):
    """A vocabulary of one of the three kinds (tokenizer.json, sentencepiece, tiktoken ranks).

    Decoding is byte by byte so that it can be streamed: the text of some ids is the UTF-8 reading of their
    bytes, less the leading spaces that the tokenizer itself put there.
    """

    @property
    def vocab_size(self) -> int:
        """Every id is below it."""

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
    """Turn whatever a tokenizer library raises into a TokenizerError.

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
    """Read the settings of a tokenizer's folder; files that are not there are no error, damaged ones are a TokenizerError."""
    where = str(folder / "tokenizer_config.json")
    config = read_object(folder / "tokenizer_config.json")
    special_map = read_object(folder / "special_tokens_map.json")
    # transformers (tokenization_utils_base.py, `_from_pretrained`): a config with added_tokens_decoder is of a time that writes all into
    # one file, and the two older files are left-overs beside it. Without it the older files are newer than the config, and win.
    listed = config.get("added_tokens_decoder") is not None
    named = config if listed else {**config, **{key: value for key, value in special_map.items() if value}}

    roles: dict[str, AddedToken] = {}
    for key in (*ROLES, *(key for key in named if key.endswith("_token") and key not in ROLES)):
        value = named.get(key)
        # `""` and null name no token; add_bos_token is a switch and no token.
        if value and not (isinstance(value, bool) or (key not in ROLES and not isinstance(value, str | dict))):
            roles[key] = _added_token(value, where)
    lists: list[AddedToken] = []
    # The newer list replaces the older one, as in transformers 5.
    for key in ("extra_special_tokens",) if named.get("extra_special_tokens") else ("additional_special_tokens",):
        extra = named.get(key) or []
        if isinstance(extra, dict):  # role -> token
            roles |= {str(role): _added_token(value, where) for role, value in extra.items() if value}
        elif isinstance(extra, list):
            lists += [_added_token(value, where) for value in extra if value]
        else:
            raise TokenizerError(f"{where}: {key} is {type(extra).__name__}, not a list; is the file damaged?")

    added = _listed_tokens(config, where) if listed else _plain_tokens(folder / "added_tokens.json", {*roles.values(), *lists})
    by_role = {token.content for token in roles.values()}
    # A role makes its token special; a list does not overrule the flag of a token that has an id.
    added = {number: replace(token, special=True) if token.content in by_role else token for number, token in added.items()}
    with_id = {token.content for token in added.values()}
    left_over = {key: _added_token(special_map[key], where).content for key in ROLES if listed and special_map.get(key)}
    return TokenizerSettings(
        roles={**left_over, **{role: token.content for role, token in roles.items()}},
        added=tuple(added[number] for number in sorted(added)),
        named=tuple({token.content: token for token in reversed([*roles.values(), *lists]) if token.content not in with_id}.values())[::-1],
        add_bos_token=_flag(config, "add_bos_token", where),
        add_eos_token=_flag(config, "add_eos_token", where),
        add_prefix_space=_flag(config, "add_prefix_space", where),
        tokenizer_class=kind if isinstance(kind := config.get("tokenizer_class"), str) else None,
        legacy=_flag(config, "legacy", where) is not False,
        templates=_read_templates(folder, config),
    )


def _listed_tokens(config: Mapping[str, Any], where: str) -> dict[int, AddedToken]:
    """Return the tokens of `added_tokens_decoder`: id -> an object with content and flags."""
    decoder = config["added_tokens_decoder"]
    if not isinstance(decoder, dict):
        raise TokenizerError(f"{where}: added_tokens_decoder is {type(decoder).__name__}, not an object; is the file damaged?")
    added = {}
    for number, token in decoder.items():
        if not isinstance(token, dict):
            raise TokenizerError(f"{where}: added token {number!r} is {token!r}, not an object; is the file damaged?")
        if token.get("content") != "":
            added[_token_id(number, Path(where))] = _added_token({"special": False, **token}, where, _token_id(number, Path(where)))
    return added


def _plain_tokens(path: Path, named: set[AddedToken]) -> dict[int, AddedToken]:
    """Return the tokens of added_tokens.json: content -> id, without flags; special is what another file names so."""
    special = {token.content for token in named}
    added = {}
    for content, number in read_object(path).items():
        if content:
            is_special = content in special
            added[_token_id(number, path)] = AddedToken(content, _token_id(number, path), is_special, normalized=not is_special)
    return added


def _read_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Return the named chat templates; a file of its own wins over tokenizer_config.json, as in transformers."""
    where = folder / "tokenizer_config.json"
    given = config.get("chat_template")
    if given is None:
        where = folder / "chat_template.json"  # how processors (Gemma 3) once stored it
        given = read_object(where).get("chat_template")
    templates: dict[str, str] = {}
    if isinstance(given, str):
        templates["default"] = given
    elif isinstance(given, list):
        for entry in given:
            if not (isinstance(entry, dict) and isinstance(entry.get("name"), str) and isinstance(entry.get("template"), str)):
                raise TokenizerError(f"{where}: an entry of chat_template has no name and template; is the file damaged?")
            templates[entry["name"]] = entry["template"]
    elif given is not None:
        raise TokenizerError(f"{where}: chat_template is {type(given).__name__}, not text or a list; is the file damaged?")
    if os.path.lexists(folder / "chat_template.jinja"):
        templates["default"] = read_text(folder / "chat_template.jinja")
    for path in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        templates[path.stem] = read_text(path)
    return templates


def read_text(path: Path) -> str:
    """Return a UTF-8 file's text, its line ends as they are, less a byte order mark; TokenizerError where it cannot be read."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise TokenizerError(f"{path} cannot be read ({error.strerror}); check the file and its permissions.") from error
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{path} is not UTF-8 text (byte {error.start}); fetch the file again.") from error


def read_object(path: Path) -> dict[str, Any]:
    """Return a file's JSON object, empty where there is no file or nothing in it; TokenizerError where it is damaged."""
    text = read_text(path) if os.path.lexists(path) else ""
    if not text.strip():
        return {}
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False).encode()  # a lone surrogate (\ud800) is no text to any vocabulary
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{path} is not valid JSON ({error}); fetch the file again.") from error
    if not isinstance(value, dict):
        raise TokenizerError(f"{path} holds {type(value).__name__}, not a JSON object; fetch the file again.")
    return value


def _added_token(token: object, where: str, number: int | None = None) -> AddedToken:
    """Return a token that is written as its text or as an object with `content` and flags; a token that is named is special."""
    flags = token if isinstance(token, dict) else {}
    content = flags.get("content") if isinstance(token, dict) else token
    if not isinstance(content, str) or not content:
        raise TokenizerError(f"{where}: {token!r} is not a token; is the file damaged?")
    special = bool(flags.get("special", True)) or number is None
    lstrip, rstrip, single_word = (bool(flags.get(name)) for name in ("lstrip", "rstrip", "single_word"))
    return AddedToken(content, number, special, lstrip, rstrip, single_word, bool(flags.get("normalized", not special)))


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
