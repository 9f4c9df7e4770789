"""sentencepiece `.model` files (Llama 2, Mistral, Gemma), with the tokens that Hugging Face's files add around them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmkit.errors import TokenizerError
from llmkit.text.codec import AddedToken, CharSpan, TokenizerSettings, library_errors
from llmkit.text.splitter import OneByOne, Splitter, tokens_by_id

SPACE = "▁"
# Appended to a serialized ModelProto this sets normalizer_spec.add_dummy_prefix: protobuf merges a message field that
# occurs twice (field 3 of ModelProto, in it field 3), and the library has no setting for it.
_PREFIX, _NO_PREFIX = b"\x1a\x02\x18\x01", b"\x1a\x02\x18\x00"


class SentencePieceCodec(OneByOne):
    """A sentencepiece model: byte fallback, and the space put before a text by the trainer's add_dummy_prefix."""

    replace_each_byte = True
    strip_leading = 0  # the space the model puts before a text is a part of the first piece, and left out there

    def __init__(self, data: bytes, settings: TokenizerSettings, where: str) -> None:
        self._model = _processor(data, where)
        size = self._model.get_piece_size()
        if not size:
            raise TokenizerError(f"{where} is a sentencepiece model without pieces; fetch the file again.")
        with library_errors(f"{where} has a piece that is not UTF-8", "fetch the file again."):
            self._pieces: list[str] = self._model.id_to_piece(list(range(size)))
        self._legacy = settings.legacy
        # Gemma's tokenizer knows no such setting, and its files say `false` of a model that adds none anyway.
        wanted = None if (settings.tokenizer_class or "").startswith("Gemma") else settings.add_prefix_space
        probe = self._model.encode_as_pieces("a")
        self._adds_space = bool(probe) and probe[0].startswith(SPACE)
        if wanted is not None and wanted != self._adds_space:
            self._model, self._adds_space = _processor(data + (_PREFIX if wanted else _NO_PREFIX), where), wanted
        # Text after a special token gets no space where the configuration says `"legacy": false`.
        self._unprefixed = _processor(data + _NO_PREFIX, where) if self._adds_space and not self._legacy else self._model

        self._added: dict[int, AddedToken] = {
            i: AddedToken(self._pieces[i]) for i in range(size) if self._model.is_control(i) or self._model.is_unknown(i)
        }
        for token_id, token in tokens_by_id(settings, self._own_id, size).items():
            if token_id < size and self._pieces[token_id] != token.content:
                raise TokenizerError(
                    f"{where}: id {token_id} is {self._pieces[token_id]!r}, but tokenizer_config.json calls it "
                    f"{token.content!r}; the two files do not belong together: fetch both again."
                )
            self._added[token_id] = token
        self._ids = {token.content: token_id for token_id, token in self._added.items()}
        self._all = Splitter(self._added.values())
        self._plain = Splitter(token for token in self._added.values() if not token.special)

        named = {self.token_id(content) for content in settings.special}
        self.special_ids = frozenset(i for i, token in self._added.items() if token.special) | frozenset(i for i in named if i is not None)
        self.vocab_size = max([size, *(i + 1 for i in self._added)])
        own = {"bos_token": self._model.bos_id(), "eos_token": self._model.eos_id(), "pad_token": self._model.pad_id()}
        self.roles: Mapping[str, int] = {role: i for role, i in own.items() if i >= 0}
        # Llama's tokenizer adds BOS and no EOS unless tokenizer_config.json says otherwise.
        self.prefix: tuple[int, ...] = (own["bos_token"],) if own["bos_token"] >= 0 else ()
        self.suffix: tuple[int, ...] = ()

    def encode(self, text: str, special: bool) -> list[int]:
        ids: list[int] = []
        for piece, (start, _), is_token in (self._all if special else self._plain).split(text):
            if is_token:
                ids.append(self._ids[piece])
            else:
                ids += self._model_at(start).encode_as_ids(piece)
        return ids

    def encode_spans(self, text: str) -> tuple[list[int], list[CharSpan]]:
        ids: list[int] = []
        spans: list[CharSpan] = []
        for piece, (start, end), is_token in self._all.split(text):
            if is_token:
                ids.append(self._ids[piece])
                spans.append((start, end))
            else:
                found = self._model_at(start).encode_as_offset_mapping(piece)
                ids += found["ids"]
                spans += [(start + begin, start + stop) for begin, stop in found["offsets"]]
        return ids, spans

    def piece(self, token_id: int, first: bool) -> bytes | None:
        if token_id in self._added:
            return self._added[token_id].content.encode("utf-8")
        if not 0 <= token_id < len(self._pieces):
            return None
        piece = self._pieces[token_id]
        if self._model.is_byte(token_id):  # "<0xE2>"
            return bytes([int(piece[3:5], 16)])
        if first and self._adds_space:
            piece = piece.removeprefix(SPACE)
        return piece.replace(SPACE, " ").encode("utf-8")

    def token_id(self, token: str) -> int | None:
        return self._ids[token] if token in self._ids else self._own_id(token)

    def _own_id(self, token: str) -> int | None:
        found: int = self._model.piece_to_id(token)
        # What is no piece is given the unknown piece's id, which may be asked for by its own name, too.
        return None if self._model.is_unknown(found) and token != self._pieces[found] else found

    def _model_at(self, start: int) -> Any:
        return self._model if start == 0 or self._legacy else self._unprefixed


def _processor(data: bytes, where: str) -> Any:
    from sentencepiece import SentencePieceProcessor

    with library_errors(f"{where} is not a usable sentencepiece model", "fetch the file again."):
        return SentencePieceProcessor(model_proto=data)
