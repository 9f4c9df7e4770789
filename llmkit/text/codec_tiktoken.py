"""Byte-pair ranks in tiktoken's format (Llama 3 `tokenizer.model`, `qwen.tiktoken`), encoded by the `tiktoken` library.

Such a file holds only the merges: `base64 rank`, one a line. How text is cut into words and which special tokens
there are belongs to the family, which is known by the number of ranks.
"""

from __future__ import annotations

import base64
import binascii
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from llmkit.errors import TokenizerError
from llmkit.text.codec import AddedToken, CharSpan, TokenizerSettings, library_errors
from llmkit.text.splitter import OneByOne, Splitter, tokens_by_id


@dataclass(frozen=True)
class RanksFamily:
    """What a family's code has beside its ranks file. Special tokens take the ids from the number of ranks on."""

    name: str
    pattern: str
    special: tuple[str, ...]
    roles: Mapping[str, str]
    add_bos: bool
    nfc: bool = False  # text is composed (Unicode NFC) before it is encoded


def _pattern(digits: str) -> str:
    """Contractions; words with one leading sign; numbers; signs; line ends; other whitespace (Qwen and Llama 3 share it)."""
    return r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


# meta-llama/llama-models, models/llama3/tokenizer.py, in the naming of 3.1: 256 special tokens.
LLAMA3 = RanksFamily(
    name="llama3",
    pattern=_pattern(r"\p{N}{1,3}"),
    special=(
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|reserved_special_token_0|>",
        "<|reserved_special_token_1|>",
        "<|finetune_right_pad_id|>",
        "<|reserved_special_token_2|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eom_id|>",
        "<|eot_id|>",
        "<|python_tag|>",
        *(f"<|reserved_special_token_{n}|>" for n in range(3, 248)),
    ),
    roles={"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "pad_token": "<|finetune_right_pad_id|>"},
    add_bos=True,
)
# QwenLM/Qwen, tokenization_qwen.py.
QWEN = RanksFamily(
    name="qwen",
    pattern=_pattern(r"\p{N}"),
    special=("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{n}|>" for n in range(205))),
    roles={"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
    add_bos=False,
    nfc=True,
)
FAMILY_BY_RANKS = {128_000: LLAMA3, 151_643: QWEN}


class TiktokenCodec(OneByOne):
    """Byte-level BPE over ranks; never downloads anything, all it needs is in the file and the family."""

    strip_leading = 0
    replace_each_byte = False

    def __init__(self, data: bytes, settings: TokenizerSettings, where: str, family: RanksFamily | None = None) -> None:
        import tiktoken

        ranks = _parse(data, where)
        family = family or FAMILY_BY_RANKS.get(len(ranks))
        if family is None:
            known = ", ".join(f"{count} ({one.name})" for count, one in FAMILY_BY_RANKS.items())
            raise TokenizerError(
                f"{where} holds {len(ranks)} ranks, the number of no family llmkit knows: {known}; "
                "the file may be cut short: fetch it again, or use the model's tokenizer.json."
            )
        own = {content: len(ranks) + n for n, content in enumerate(family.special)}
        added = {number: AddedToken(content, number) for content, number in own.items()}
        for number, token in tokens_by_id(settings, own.get, max(added, default=len(ranks) - 1) + 1).items():
            if number < len(ranks):
                raise TokenizerError(
                    f"{where} has {len(ranks)} ranks, but tokenizer_config.json puts {token.content!r} at id {number} among them; "
                    "the two files do not belong together: fetch both again."
                )
            added[number] = token  # the config may rename a token that the family only reserves
        self._ids = {token.content: number for number, token in added.items()}
        # The library would parse special tokens itself, but knows no lstrip, rstrip or single_word.
        self._all = Splitter(added.values())
        self._plain = Splitter(token for token in added.values() if not token.special)
        self._nfc = family.nfc
        self._encoding = tiktoken.Encoding(name=family.name, pat_str=family.pattern, mergeable_ranks=ranks, special_tokens={})
        self._bytes = {rank: piece for piece, rank in ranks.items()}
        self._bytes.update((number, token.content.encode("utf-8")) for number, token in added.items())
        self.special_ids = frozenset(number for number, token in added.items() if token.special)
        self.vocab_size = max(self._bytes) + 1
        self.roles: Mapping[str, int] = {role: self._ids[c] for role, c in family.roles.items() if c in self._ids}
        self.prefix: tuple[int, ...] = (self.roles["bos_token"],) if family.add_bos and "bos_token" in self.roles else ()
        self.suffix: tuple[int, ...] = ()

    def encode(self, text: str, special: bool) -> list[int]:
        ids: list[int] = []
        for piece, _, is_token in (self._all if special else self._plain).split(text):
            ids += [self._ids[piece]] if is_token else self._text_ids(unicodedata.normalize("NFC", piece) if self._nfc else piece)
        return ids

    def encode_spans(self, text: str) -> tuple[list[int], list[CharSpan]]:
        ids: list[int] = []
        spans: list[CharSpan] = []
        for piece, (start, end), is_token in self._all.split(text):
            if is_token:
                ids.append(self._ids[piece])
                spans.append((start, end))
                continue
            piece, places = composed(piece) if self._nfc else (piece, None)
            found = self._text_ids(piece)
            ids += found
            for first, last in self._spans(found):
                if places is not None:  # back to the characters before composition
                    first, last = places[first][0], places[last - 1][1] if last > first else places[first][0]
                spans.append((start + first, start + last))
        return ids, spans

    def _text_ids(self, text: str) -> list[int]:
        with library_errors("The tokenizer cannot encode this text", "split it."):
            # Nothing is allowed and nothing disallowed: text that looks like a special token is text, not an error.
            return list(self._encoding.encode(text, allowed_special=set(), disallowed_special=()))

    def _spans(self, ids: list[int]) -> Iterator[CharSpan]:
        """Yield which characters of their text the ids stand for."""
        end = 0  # characters begun so far
        for token_id in ids:
            piece = self._bytes[token_id]
            begun = sum(byte & 0xC0 != 0x80 for byte in piece)  # bytes that begin a character
            inside = piece[0] & 0xC0 == 0x80  # the token goes on with a character that another one began
            yield end - inside, end + begun
            end += begun

    def piece(self, token_id: int, first: bool) -> bytes | None:
        return self._bytes.get(token_id)

    def token_id(self, token: str) -> int | None:
        if token in self._ids:
            return self._ids[token]
        try:
            return int(self._encoding.encode_single_token(token))
        except KeyError:
            return None


def composed(text: str) -> tuple[str, list[CharSpan] | None]:
    """Return a text in NFC, and for each of its characters which of the given text it stands for; None: it is composed already."""
    if unicodedata.is_normalized("NFC", text):
        return text, None
    pieces: list[str] = []
    places: list[CharSpan] = []
    start = 0
    for end in range(1, len(text) + 1):
        # A cluster ends where what follows neither combines with it (Hangul vowels do without a combining class) nor is a mark.
        if end < len(text):
            cluster, following = text[start:end], text[end]
            whole = unicodedata.normalize("NFC", cluster + following)
            if unicodedata.combining(following) or whole != unicodedata.normalize("NFC", cluster) + unicodedata.normalize("NFC", following):
                continue
        pieces.append(unicodedata.normalize("NFC", text[start:end]))
        places += [(start, end)] * len(pieces[-1])
        start = end
    return "".join(pieces), places


def _parse(data: bytes, where: str) -> dict[bytes, int]:
    """`base64 rank` lines to ranks; every byte must be there and every rank once, or encoding would fail much later."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            encoded, rank = line.split()
            ranks[base64.b64decode(encoded, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise TokenizerError(f"{where}: line {number} is not `base64 rank` ({error}); fetch the file again.") from error
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing or sorted(ranks.values()) != list(range(len(ranks))):
        cause = f"has no rank for byte {missing[0]}" if missing else "gives a rank twice or leaves one out"
        raise TokenizerError(f"{where} {cause}; the file is damaged: fetch it again.")
    return ranks
