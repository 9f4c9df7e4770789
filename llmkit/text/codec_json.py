"""tokenizer.json: the vocabulary files of Hugging Face, encoded by the `tokenizers` library."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import cached_property
from tempfile import TemporaryFile
from typing import Any

from llmkit.errors import TokenizerError
from llmkit.text.codec import AddedToken, CharSpan, TokenizerSettings, library_errors

PieceMap = Callable[[str, bool], str]  # (token, whether it is the text's first) -> its text


# Classes of transformers that take tokenizer.json as it is; the others (LlamaTokenizer, GPT2Tokenizer, ...) build the steps that put a
# space before a text from `add_prefix_space` of tokenizer_config.json.
_GENERIC_CLASSES = (None, "PreTrainedTokenizerFast", "TokenizersBackend", "PreTrainedTokenizer")


class JsonCodec:
    """A tokenizer.json. Encoding is the library's; decoding follows the file's decoder, token by token."""

    def __init__(self, data: bytes, settings: TokenizerSettings, where: str) -> None:
        from tokenizers import Tokenizer

        with library_errors(f"{where} is not a usable tokenizer.json", "fetch the file again."), panics_unreported():
            self._native = Tokenizer.from_buffer(data)
            if settings.add_prefix_space is not None and settings.tokenizer_class not in _GENERIC_CLASSES:
                changed = _with_prefix_space(self._native, data, settings.add_prefix_space)
                self._native = self._native if changed is None else Tokenizer.from_str(changed)
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

        # What either file calls special is left out of decoded text, whatever the other says; as in transformers.
        before = {i for i, token in self._native.get_added_tokens_decoder().items() if token.special}
        self._add_tokens(settings, where)
        named = {i for content in settings.special if (i := self.token_id(content)) is not None}
        self.special_ids = frozenset(before | named | {i for i, token in self._native.get_added_tokens_decoder().items() if token.special})
        self.roles: Mapping[str, int] = {}
        self.prefix, self.suffix = self._added_by_post_processor()
        self._pieces: dict[tuple[int, bool], bytes | None] = {}

    @cached_property
    def vocab_size(self) -> int:
        # Not the count: ids may have holes below the largest one. Listing them takes 50 ms for 150,000 tokens, and who only encodes
        # and decodes never asks.
        return max(self._native.get_vocab(with_added_tokens=True).values(), default=-1) + 1

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
            token = self._native.id_to_token(token_id) if 0 <= token_id < 1 << 32 else None  # the library's ids are u32
            self._pieces[key] = None if token is None else self._decoder.piece(token, first)
        return self._pieces[key]

    def token_id(self, token: str) -> int | None:
        found: int | None = self._native.token_to_id(token)
        return found

    def _add_tokens(self, settings: TokenizerSettings, where: str) -> None:
        """Make tokens of what the files beside this one name: `added_tokens` here may be empty, or say other flags.

        One call in transformers' order, because a token that is in no vocabulary takes the next free id.
        """
        import tokenizers

        present = {
            token.content: AddedToken(token.content, None, token.special, token.lstrip, token.rstrip, token.single_word, token.normalized)
            for token in self._native.get_added_tokens_decoder().values()
        }
        wanted = {token.content: replace(token, id=None) for token in settings.added}
        wanted |= {token.content: token for token in settings.named if token.content not in present}
        by_role = frozenset(settings.roles.values())
        llama = (settings.tokenizer_class or "").startswith(("Llama", "CodeLlama"))
        for content, token in present.items():
            # A role makes a token special. And Llama's older files look for `<s>` in the normalized text, where the sign of a space stands
            # before it: within a text it would never be found, and Llama's class in transformers does not look there.
            special = token.special or content in by_role
            wanted.setdefault(content, replace(token, special=special, normalized=token.normalized and not (llama and special)))
        changed = [token for token in wanted.values() if token != present.get(token.content)]
        if changed:
            self._native.add_tokens(
                [tokenizers.AddedToken(**{key: value for key, value in asdict(token).items() if key != "id"}) for token in changed]
            )
        for token in settings.added:
            found = self._native.token_to_id(token.content)
            if found != token.id and token.content not in present:
                raise TokenizerError(
                    f"{where} gives the token {token.content!r} the id {found}, and tokenizer_config.json the id {token.id}; "
                    "the two files do not belong together: fetch both again."
                )

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


def _with_prefix_space(native: Any, data: bytes, wanted: bool) -> str | None:
    """Return the tokenizer.json with or without the space that is put before a text; None where it is as wanted already."""

    def changed(step: Any) -> Any:
        if not isinstance(step, dict):
            return step
        for part in ("normalizers", "pretokenizers", "decoders"):
            if isinstance(step.get(part), list):  # a Sequence
                return {**step, part: [new for new in map(changed, step[part]) if new is not None]}
        if step.get("type") == "ByteLevel" and "add_prefix_space" in step:
            return {**step, "add_prefix_space": wanted}
        if step.get("type") == "Metaspace" and (step.get("prepend_scheme") == "never") == wanted:
            return {**step, "prepend_scheme": "first" if wanted else "never", "add_prefix_space": wanted}
        # Llama's pair of steps: a sign is put before the text in the normalizer, and its space cut off again by the decoder.
        if not wanted and (step.get("type") == "Prepend" or (step.get("type") == "Strip" and step.get("start"))):
            return None
        return step

    # The pickled state of a step is its JSON: the whole file, up to 20 MB, is parsed only where something changes.
    parts = {name: getattr(native, name) for name in ("normalizer", "pre_tokenizer", "decoder")}
    steps = {name: json.loads(part.__getstate__()) for name, part in parts.items() if part is not None}
    new = {name: changed(step) for name, step in steps.items()}
    return None if new == steps else json.dumps({**json.loads(data), **new})


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
