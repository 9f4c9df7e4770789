"""tokenizer.json: the vocabulary files of Hugging Face, encoded by the `tokenizers` library."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from tempfile import TemporaryFile
from typing import Any

from llmkit.errors import TokenizerError
from llmkit.text.codec import CharSpan, TokenizerSettings, library_errors

PieceMap = Callable[[str, bool], str]  # (token, whether it is the text's first) -> its text


class JsonCodec:
    """A tokenizer.json. Encoding is the library's; decoding follows the file's decoder, token by token."""

    def __init__(self, data: bytes, settings: TokenizerSettings, where: str) -> None:
        from tokenizers import AddedToken, Tokenizer

        with library_errors(f"{where} is not a usable tokenizer.json", "fetch the file again."), panics_unreported():
            self._native = Tokenizer.from_buffer(data)
        # Files saved in training cut and pad; a prompt must never be cut in silence.
        self._native.no_truncation()
        self._native.no_padding()
        # Whether special tokens in a text are parsed is a switch on the shared object.
        self._lock = threading.Lock()
        # The decoder's pickled state is its JSON; reading the whole file again for it would cost 0.1 s.
        decoder = self._native.decoder
        self._decoder = _Decoder(None if decoder is None else json.loads(decoder.__getstate__()), where)
        self.strip_leading = self._decoder.strip_leading
        self.replace_each_byte = self._decoder.byte_fallback

        for token_id, token in sorted(settings.added.items()):
            if self._native.token_to_id(token.content) is None:
                self._native.add_tokens(
                    [
                        AddedToken(
                            token.content, special=token.special, lstrip=token.lstrip, rstrip=token.rstrip, single_word=token.single_word
                        )
                    ]
                )
                if self._native.token_to_id(token.content) != token_id:
                    raise TokenizerError(
                        f"{where} has no token {token.content!r}, and tokenizer_config.json gives it id {token_id}, "
                        "which is not the next free one; the two files do not belong together: fetch both again."
                    )
        added = self._native.get_added_tokens_decoder()
        named = (self.token_id(content) for content in settings.special)
        self.special_ids = frozenset(i for i, token in added.items() if token.special) | frozenset(i for i in named if i is not None)
        self.vocab_size = max([self._native.get_vocab_size(), *(i + 1 for i in added)])
        self.roles: Mapping[str, int] = {}
        self.prefix, self.suffix = self._added_by_post_processor()
        self._pieces: dict[tuple[int, bool], bytes | None] = {}

    def encode(self, text: str, special: bool) -> list[int]:
        return list(self._encode(text, special).ids)

    def encode_spans(self, text: str) -> tuple[list[int], list[CharSpan]]:
        encoding = self._encode(text, True)
        return list(encoding.ids), list(encoding.offsets)

    def encode_batch(self, texts: Sequence[str], special: bool) -> list[list[int]]:
        return [list(encoding.ids) for encoding in self._encode_batch(texts, special)]

    def encode_spans_batch(self, texts: Sequence[str]) -> list[tuple[list[int], list[CharSpan]]]:
        return [(list(encoding.ids), list(encoding.offsets)) for encoding in self._encode_batch(texts, True)]

    def piece(self, token_id: int, first: bool) -> bytes | None:
        key = (token_id, first)
        if key not in self._pieces:
            token = self._native.id_to_token(token_id) if 0 <= token_id < self.vocab_size else None
            self._pieces[key] = None if token is None else self._decoder.piece(token, first)
        return self._pieces[key]

    def token_id(self, token: str) -> int | None:
        found: int | None = self._native.token_to_id(token)
        return found

    def _encode(self, text: str, special: bool, add: bool = False) -> Any:
        with self._lock:
            self._native.encode_special_tokens = not special
            with library_errors("The tokenizer cannot encode this text", "is tokenizer.json damaged?"):
                return self._native.encode(text, add_special_tokens=add)

    def _encode_batch(self, texts: Sequence[str], special: bool) -> Any:
        with self._lock:
            self._native.encode_special_tokens = not special
            with library_errors("The tokenizer cannot encode this text", "is tokenizer.json damaged?"):
                return self._native.encode_batch(list(texts), add_special_tokens=False)

    def _added_by_post_processor(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The ids that the file's post-processor puts before and after a text, seen on a probe."""
        with panics_unreported():
            encoding = self._encode("a", False, add=True)
        text = [n for n, added in enumerate(encoding.special_tokens_mask) if not added]
        if not text:  # a vocabulary without the probe's letter
            return tuple(encoding.ids), ()
        return tuple(encoding.ids[: text[0]]), tuple(encoding.ids[text[-1] + 1 :])


class _Decoder:
    """The `decoder` of a tokenizer.json as a function of one token, for the kinds that language models use."""

    def __init__(self, description: object, where: str) -> None:
        self._where = where
        self._maps: list[PieceMap] = []
        self._byte_level: dict[str, int] | None = None
        self.byte_fallback = False
        self.strip_leading = 0
        self._fused = False
        if description is None:  # the library joins the tokens with spaces
            self._maps.append(lambda token, first: token if first else " " + token)
        else:
            self._add(description)

    def piece(self, token: str, first: bool) -> bytes:
        for change in self._maps:
            token = change(token, first)
        if self._byte_level is not None:
            try:
                return bytes(self._byte_level[character] for character in token)
            except KeyError:  # an added token with characters that stand for no byte
                return token.encode("utf-8")
        if self.byte_fallback and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            try:
                return bytes([int(token[3:5], 16)])
            except ValueError:
                pass  # "<0xZZ>" is a text like any other
        return token.encode("utf-8")

    def _add(self, description: object) -> None:
        if not isinstance(description, dict):
            raise TokenizerError(f"{self._where}: its decoder is {description!r}, not an object; fetch the file again.")
        kind = description.get("type")
        if kind == "Sequence":
            for part in description.get("decoders", ()):
                self._add(part)
        elif kind == "ByteLevel":
            self._byte_level = byte_level_alphabet()
        elif kind == "ByteFallback":
            self.byte_fallback = True
        elif kind == "Fuse":
            self._fused = True
        elif kind == "Replace" and isinstance(description.get("pattern"), dict) and "String" in description["pattern"]:
            old, new = str(description["pattern"]["String"]), str(description["content"])
            self._maps.append(lambda token, first: token.replace(old, new))
        elif kind == "Strip" and self._fused and description.get("content") == " " and not description.get("stop"):
            self.strip_leading += int(description.get("start", 0))
        elif kind == "Metaspace":
            self._add_metaspace(description)
        elif kind == "WordPiece":
            self._add_word_piece(description)
        else:
            raise TokenizerError(
                f"{self._where}: decoder {description!r} is none that llmkit knows (ByteLevel, ByteFallback, Fuse, Replace, "
                "Strip of leading spaces, Metaspace, WordPiece); convert the tokenizer."
            )

    def _add_metaspace(self, description: Mapping[str, Any]) -> None:
        mark = str(description.get("replacement", "▁"))
        keep_first = description.get("prepend_scheme", "always") == "never" or description.get("add_prefix_space") is False
        self._maps.append(lambda token, first: token.replace(mark, "" if first and not keep_first else " "))

    def _add_word_piece(self, description: Mapping[str, Any]) -> None:
        prefix = str(description.get("prefix", "##"))

        def join(token: str, first: bool) -> str:
            if first:
                return token
            return token[len(prefix) :] if token.startswith(prefix) else " " + token

        self._maps.append(join)
        if description.get("cleanup", True):
            self._maps.append(_clean_up)


def _clean_up(token: str, first: bool) -> str:
    """No space before punctuation and English contractions: part of the WordPiece decoder (BERT's detokenizer)."""
    for old in (" .", " ?", " !", " ,"):
        token = token.replace(old, old[1:])
    token = token.replace(" ' ", "'")
    for old in (" n't", " 'm"):
        token = token.replace(old, old[1:])
    token = token.replace(" do not", " don't")
    for old in (" 's", " 've", " 're"):
        token = token.replace(old, old[1:])
    return token


def byte_level_alphabet() -> dict[str, int]:
    """GPT-2's printable character for every byte (openai/gpt-2, encoder.py: bytes_to_unicode), turned around."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in set(printable))
    alphabet.update((chr(0x100 + n), byte) for n, byte in enumerate(others))
    return alphabet


@contextmanager
def panics_unreported() -> Iterator[None]:
    """Keeps a Rust panic's report off the terminal: the library writes it to file descriptor 2 before Python hears of it.

    What anybody else writes there meanwhile comes out at the end, unless this ends with an error.
    """
    try:
        stderr = os.dup(2)
    except OSError:  # closed: nothing can be seen there
        yield
        return
    with TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
        held.seek(0)
        for line in held:
            os.write(2, line)
