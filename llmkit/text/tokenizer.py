"""Text to token ids and back, for every kind of vocabulary a checkpoint comes with."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from llmkit.errors import TokenizerError
from llmkit.text.codec import CharSpan, Codec, TokenizerSettings, read_settings

if TYPE_CHECKING:
    from llmkit.text.chat import ChatTemplate
    from llmkit.text.stream import StreamDecoder

MERGES = "merges.txt"
# Tokens that end a text in checkpoints whose files name no role (GPT-2's tokenizer_config.json has only a length).
_USUAL_EOS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")
_USUAL_BOS = ("<|begin_of_text|>", "<s>", "<bos>", "<|endoftext|>")


class Tokenizer:
    """A checkpoint's tokenizer: `encode`, `decode`, `stream`, and the chat template if there is one.

    Attributes:
        vocab_size: every id is below it (the model's own vocabulary may be padded beyond it).
        bos_id, pad_id: ids, or None where the tokenizer has no such token.
        eos_ids: ids that end a text, at most one from these files; generation_config.json may know more.
        special_ids: ids that `decode` leaves out by default.
        special_tokens: role (`bos_token`, `eos_token`, ...) to text, as chat templates see them.
    """

    def __init__(self, codec: Codec, settings: TokenizerSettings | None = None) -> None:
        settings = settings or TokenizerSettings()
        self._codec = codec
        self.special_ids = codec.special_ids
        ids = dict(codec.roles)
        for role, content in settings.roles.items():
            found = codec.token_id(content)
            if found is not None:
                ids[role] = found
        if not ids and not settings.roles:
            for role, usual in (("bos_token", _USUAL_BOS), ("eos_token", _USUAL_EOS)):
                present = [i for i in map(codec.token_id, usual) if i is not None and i in codec.special_ids]
                if present:
                    ids[role] = present[0]
        self.bos_id: int | None = ids.get("bos_token")
        self.eos_ids: tuple[int, ...] = (ids["eos_token"],) if "eos_token" in ids else ()
        self.pad_id: int | None = ids.get("pad_token")
        self._prefix, self._suffix = list(codec.prefix), list(codec.suffix)
        if settings.add_bos_token is not None:
            self._prefix = [self.bos_id] if settings.add_bos_token and self.bos_id is not None else []
        if settings.add_eos_token is not None:
            self._suffix = list(self.eos_ids) if settings.add_eos_token else []
        self.special_tokens = {**{role: self.token(i) for role, i in ids.items()}, **settings.roles}
        self._templates = settings.templates

    @property
    def vocab_size(self) -> int:
        return self._codec.vocab_size

    @cached_property
    def chat_template(self) -> ChatTemplate | None:
        """The template of the tokenizer's files; None where there is none. Plain text in and out never imports it."""
        from llmkit.text.chat import ChatTemplate

        return ChatTemplate(self._templates, self.special_tokens) if self._templates else None

    def __repr__(self) -> str:
        kind = type(self._codec).__name__.removesuffix("Codec").lower()
        return f"Tokenizer({kind}, vocab_size={self.vocab_size}, bos_id={self.bos_id}, eos_ids={self.eos_ids})"

    def encode(self, text: str, *, bos: bool | None = None, special: bool = False) -> list[int]:
        """Token ids of a text.

        bos: None adds what the tokenizer itself adds (its post-processor, `add_bos_token`, `add_eos_token`); True adds
            BOS, False adds nothing. BOS is never doubled: a text that already begins with it gets no second one.
        special: whether special tokens written in the text (`<|im_end|>`) become their ids. False for text from
            outside, which then cannot forge the structure of a prompt; True for a rendered chat template.
        Raises TokenizerError for `bos=True` without a BOS token and for text that is not Unicode (lone surrogates).
        """
        return self._surrounded(self._codec.encode(_checked(text), special), bos)

    def encode_batch(self, texts: Sequence[str], *, special: bool = False) -> list[list[int]]:
        """`encode` of each text; with a tokenizer.json on all cores."""
        return [self._surrounded(ids, None) for ids in self._codec.encode_batch([_checked(text) for text in texts], special)]

    def encode_continuation(self, text: str, *, special: bool = False) -> list[int]:
        """Ids of a text that goes on another: without BOS, and without the space that some vocabularies put before a text."""
        anchor = self._codec.encode("\n", special)  # takes the space in its place
        ids = self._codec.encode("\n" + _checked(text), special)
        return ids[len(anchor) :] if ids[: len(anchor)] == anchor else self._codec.encode(text, special)

    def encode_spans(self, text: str) -> tuple[list[int], list[CharSpan]]:
        """As `encode(text, bos=False, special=True)`, and the characters `[start, end)` each id stands for."""
        return self._codec.encode_spans(_checked(text))

    def encode_spans_batch(self, texts: Sequence[str]) -> list[tuple[list[int], list[CharSpan]]]:
        """`encode_spans` of each text; with a tokenizer.json on all cores."""
        return self._codec.encode_spans_batch([_checked(text) for text in texts])

    def _surrounded(self, ids: list[int], bos: bool | None) -> list[int]:
        """With what `bos` puts before and after the ids."""
        if bos is None:
            prefix, suffix = self._prefix, self._suffix
        elif bos and self.bos_id is None:
            raise TokenizerError("This tokenizer has no BOS token; call encode without bos=True.")
        else:
            prefix, suffix = ([self.bos_id] if bos and self.bos_id is not None else []), []
        if prefix and ids[: len(prefix)] == prefix:
            prefix = []
        return prefix + ids + suffix

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of some ids; bytes that are no UTF-8 become U+FFFD, ids without a token nothing."""
        stream = self.stream(skip_special)
        return "".join([stream.push(token_id) for token_id in ids]) + stream.flush()

    def stream(self, skip_special: bool = True) -> StreamDecoder:
        """A decoder for ids that come one at a time."""
        from llmkit.text.stream import StreamDecoder  # encoding takes no decoder

        return StreamDecoder(self._codec, self.special_ids if skip_special else frozenset())

    def token(self, token_id: int) -> str:
        """One token's text as it stands inside of a text (leading space kept); empty for an id without a token."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """One token's bytes, which need not be whole characters; empty for an id without a token."""
        return self._codec.piece(token_id, False) or b""

    def token_id(self, token: str) -> int | None:
        """The id of a token given by its name in the vocabulary (`<|im_end|>`), None if there is none."""
        return self._codec.token_id(token)


def load_tokenizer(path: Path | str) -> Tokenizer:
    """The tokenizer of a checkpoint folder, or of one vocabulary file.

    In a folder tokenizer.json is read first, then tokenizer.model, then the only `*.model` or `*.tiktoken` file, then
    merges.txt with vocab.json; what kind a file is its content says. Raises TokenizerError where there is none, or where
    any file read is damaged: a damaged file is never passed over for another one.
    """
    path = Path(path)
    file = path if path.is_file() else _vocabulary_file(path)
    settings = read_settings(file.parent)
    try:
        if file.name == MERGES:
            from llmkit.text.merges import merges_as_json

            data = merges_as_json(file, settings)
        else:
            data = file.read_bytes()
    except OSError as error:
        raise TokenizerError(f"{file} cannot be read ({error.strerror}); check the file and its permissions.") from error
    return Tokenizer(_codec(data, settings, file), settings)


def _vocabulary_file(folder: Path) -> Path:
    for name in ("tokenizer.json", "tokenizer.model"):
        if os.path.lexists(folder / name):  # a broken link, too, is a damaged file and not passed over
            return folder / name
    others = sorted([*folder.glob("*.model"), *folder.glob("*.tiktoken")])
    if not others and (folder / MERGES).is_file():
        return folder / MERGES
    if len(others) > 1:
        names = ", ".join(file.name for file in others)
        raise TokenizerError(f"{folder} holds several vocabularies ({names}); name the file instead of the folder.")
    if not others:
        raise TokenizerError(
            f"{folder} holds no tokenizer (tokenizer.json, tokenizer.model, *.tiktoken or merges.txt); put the file there, "
            "or pass token ids instead of text."
        )
    return others[0]


def _codec(data: bytes, settings: TokenizerSettings, file: Path) -> Codec:
    # Each kind is imported where it is met: a folder has one of them, and each brings a library of its own.
    if data.lstrip()[:1] == b"{":
        from llmkit.text.codec_json import JsonCodec

        return JsonCodec(data, settings, str(file))
    if re.match(rb"[A-Za-z0-9+/]+={0,2} \d+\s", data):
        from llmkit.text.codec_tiktoken import TiktokenCodec

        return TiktokenCodec(data, settings, str(file))
    if data[:1] == b"\n":  # a ModelProto begins with its pieces: field 1, length-delimited
        from llmkit.text.codec_sentencepiece import SentencePieceCodec

        return SentencePieceCodec(data, settings, str(file))
    if data.startswith(b"version https://git-lfs"):
        raise TokenizerError(f"{file} is only a Git LFS pointer; fetch the file itself with `git lfs pull`.")
    raise TokenizerError(
        f"{file} is no tokenizer: it begins with {data[:16]!r}, which is neither tokenizer.json, sentencepiece nor tiktoken ranks; "
        "fetch the file again."
    )


def _checked(text: str) -> str:
    if not isinstance(text, str):
        raise TokenizerError(f"Only text can be encoded, not {type(text).__name__}; pass a str.")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"The text holds a lone surrogate ({text[error.start]!r} at {error.start}), which is no character; "
            "decode its source with errors='replace'."
        ) from error
    return text
