"""A checkpoint's tokenizer as llama.cpp keeps it in a GGUF file: text, type and score of every token, and the merges. No torch.

llama.cpp knows byte-level BPE ("gpt2") and sentencepiece ("llama"). How BPE cuts a text into words is not written as a rule but as the
name of one of its built-in ones ("pre"), which is found here by the rule's regular expression.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmkit.errors import TokenizerError
from llmkit.text.codec import TokenizerSettings, read_settings
from llmkit.text.codec_json import byte_level_alphabet
from llmkit.text.codec_tiktoken import LLAMA3, QWEN
from llmkit.text.merges import merges_as_json
from llmkit.text.tokenizer import MERGES, Tokenizer, load_tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # token types, as in llama.h
SPACE = "▁"

DIGITS, GPT2 = "digits", "gpt2"  # pre-tokenizers that stand in tokenizer.json without a regular expression
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SIGNS, _START = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+", r"[^\r\n\p{L}\p{N}]?"
_ENDING = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
TEKKEN = rf"{_START}{_UPPER}*{_LOWER}+|{_START}{_UPPER}+{_LOWER}*|\p{{N}}|{_SIGNS}"
GPT4O = rf"{_START}{_UPPER}*{_LOWER}+{_ENDING}|{_START}{_UPPER}+{_LOWER}*{_ENDING}|\p{{N}}{{1,3}}|{_SIGNS}"
# What cuts a text into words, one after the other -> llama.cpp's name of it (src/llama-vocab.cpp).
PRE_TOKENIZERS: dict[tuple[str, ...], str] = {
    (GPT2,): "gpt-2",
    (DIGITS, GPT2): "smollm",
    (LLAMA3.pattern,): "llama-bpe",
    (QWEN.pattern,): "qwen2",
    (TEKKEN,): "tekken",
    (GPT4O,): "gpt-4o",
}
WHOLE_WORDS_FIRST = {"llama-bpe": "dbrx"}  # the same words, but tokens are always built by merges (ignore_merges is false)
TIKTOKEN = {128_000: "llama-bpe", 151_643: "qwen2"}  # by the number of ranks


@dataclass
class Vocabulary:
    """What a GGUF file says about a tokenizer. `tokens`, `types` and `scores` have one entry for each row of the embedding."""

    model: str  # "gpt2": byte-level BPE, its tokens in GPT-2's alphabet of bytes; "llama": sentencepiece
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float] | None = None
    merges: list[str] | None = None
    special: dict[str, int] = field(default_factory=dict)  # bos, eos, unk, pad
    add_bos: bool = False
    add_eos: bool = False
    add_space_prefix: bool | None = None
    templates: Mapping[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def placeholder(size: int) -> Vocabulary:
    """Tokens without a text, for models that have no tokenizer: llama.cpp then runs on ids alone."""
    types = [UNKNOWN] + [NORMAL] * (size - 1)
    return Vocabulary("llama", "default", [f"[{i}]" for i in range(size)], types, [0.0] * size)


def read_vocabulary(folder: Path, size: int, config: Mapping[str, Any]) -> Vocabulary:
    """The tokenizer in a model folder, padded to `size` tokens; placeholders where there is none.

    config: the config.json, which knows BOS and EOS where the tokenizer's files do not.
    Raises TokenizerError for a damaged tokenizer, and for a kind that llama.cpp has no counterpart of.
    """
    file = _vocabulary_file(folder)
    if file is None:
        found = placeholder(size)
        found.notes.append("The model has no tokenizer; the file gets placeholder tokens and works with token ids only.")
        return found
    settings = read_settings(folder)
    tokenizer = load_tokenizer(file)
    found = _read(file, settings, tokenizer)
    if len(found.tokens) > size:
        found.notes.append(f"The tokenizer has {len(found.tokens)} tokens and the model {size}; those beyond are left out.")
    rest = range(len(found.tokens), size)
    found.tokens = found.tokens[:size] + [f"[PAD{i}]" for i in rest]
    found.types = found.types[:size] + [UNUSED] * len(rest)
    if found.scores is not None:
        found.scores = found.scores[:size] + [-1000.0] * len(rest)

    roles = {"bos": tokenizer.bos_id, "eos": next(iter(tokenizer.eos_ids), None), "pad": tokenizer.pad_id}
    for role in ("bos", "eos"):
        said = config.get(f"{role}_token_id")
        said = said[0] if isinstance(said, list) and said else said
        if roles[role] is None and isinstance(said, int):
            roles[role] = said
    found.special |= {role: i for role, i in roles.items() if i is not None and 0 <= i < size}
    ids, bare = tokenizer.encode("a"), tokenizer.encode("a", bos=False)
    found.add_bos = tokenizer.bos_id is not None and ids[:1] == [tokenizer.bos_id]
    found.add_eos = bool(tokenizer.eos_ids) and ids[-1:] == [tokenizer.eos_ids[0]]
    if found.model == "llama":
        found.add_space_prefix = bool(bare) and bare[0] < size and found.tokens[bare[0]].startswith(SPACE)
    found.templates = settings.templates
    return found


def _vocabulary_file(folder: Path) -> Path | None:
    """As the tokenizer's own choice, but sentencepiece first: only it knows the scores."""
    models = [path for path in sorted(folder.glob("*.model")) if path.name != "tokenizer.model"]
    named = [folder / name for name in ("tokenizer.model", "tokenizer.json")]
    others = [*models, *sorted(folder.glob("*.tiktoken")), folder / MERGES]
    found = [path for path in (*named, *others) if os.path.lexists(path)]
    sentencepiece = [path for path in found if path.suffix == ".model" and _starts_with(path, b"\n")]
    plain = [path for path in found if path.name == "tokenizer.json"]
    return next(iter((*sentencepiece, *plain, *found)), None)


def _starts_with(path: Path, magic: bytes) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(magic)) == magic
    except OSError as error:
        raise TokenizerError(f"{path} cannot be read ({error.strerror}); check the file and its permissions.") from error


def _read(file: Path, settings: TokenizerSettings, tokenizer: Tokenizer) -> Vocabulary:
    data = merges_as_json(file, settings) if file.name == MERGES else file.read_bytes()
    if data.lstrip()[:1] == b"{":
        return _from_json(json.loads(data), settings, str(file))
    if data[:1] == b"\n":
        return _from_sentencepiece(data, settings, folder=file.parent)
    return _from_ranks(data, tokenizer)


# --- tokenizer.json ---------------------------------------------------------------------------------------------------


def _from_json(description: dict[str, Any], settings: TokenizerSettings, where: str) -> Vocabulary:
    model = description["model"]
    kind = model.get("type", "BPE")
    parts = list(_parts(description.get("pre_tokenizer"), "pretokenizers"))
    byte_level = any(part["type"] == "ByteLevel" for part in parts)
    fallback = any(part["type"] == "ByteFallback" for part in _parts(description.get("decoder"), "decoders"))
    if kind != "BPE" or not (byte_level or fallback):
        raise TokenizerError(
            f"{where} holds a {kind} tokenizer without byte-level or byte-fallback merges, and llama.cpp reads no such one; "
            "convert without the tokenizer (--no-tokenizer)."
        )
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    texts = {number: token for token, number in model["vocab"].items()}
    special = {token["id"]: bool(token["special"]) for token in description.get("added_tokens", ())}
    texts |= {token["id"]: token["content"] for token in description.get("added_tokens", ())}
    special |= {token.id: token.special for token in settings.added if token.id is not None}
    texts |= {token.id: token.content for token in settings.added if token.id is not None}
    tokens = [texts.get(number, f"[PAD{number}]") for number in range(max(texts) + 1)]
    types = [
        UNUSED if number not in texts else NORMAL if number not in special else CONTROL if special[number] else USER_DEFINED
        for number in range(len(tokens))
    ]
    if byte_level:
        # A space inside of a merged token would read as the gap between its two halves; GPT-2's alphabet has none.
        joined = [" ".join(half.replace(" ", "Ġ") for half in merge) for merge in merges]
        found = Vocabulary("gpt2", "default", tokens, types, merges=joined)
        found.pre, note = _pre_name(parts, bool(model.get("ignore_merges")))
        found.notes += note
        return found
    # What sentencepiece gave as a score: the later a token was merged, the lower.
    order = {"".join(merge): -float(rank) for rank, merge in reversed(list(enumerate(merges, 1)))}
    scores = [order.get(token, 0.0) for token in tokens]
    for number, token in enumerate(tokens):
        if types[number] == NORMAL and _is_byte(token):
            types[number] = BYTE
        elif types[number] == CONTROL and token == model.get("unk_token"):
            types[number] = UNKNOWN
    found = Vocabulary("llama", "default", tokens, types, scores)
    if model.get("unk_token") in model["vocab"]:
        found.special["unk"] = model["vocab"][model["unk_token"]]
    return found


def _parts(description: Any, key: str) -> Iterable[dict[str, Any]]:
    """The members of a (nested) Sequence."""
    if isinstance(description, dict):
        if description.get("type") == "Sequence":
            for part in description.get(key, ()):
                yield from _parts(part, key)
        else:
            yield description


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _pre_name(parts: Iterable[Mapping[str, Any]], ignore_merges: bool) -> tuple[str, list[str]]:
    """llama.cpp's name of a pre-tokenizer, and a warning where it has none."""
    rules = []
    for part in parts:
        if part["type"] == "ByteLevel":
            rules += [GPT2] if part.get("use_regex", True) else []
        elif part["type"] == "Digits" and part.get("individual_digits"):
            rules.append(DIGITS)
        elif part["type"] == "Split" and isinstance(part.get("pattern"), dict):
            rules.append(str(next(iter(part["pattern"].values()), "")))
        else:
            rules.append(str(part["type"]))
    name = PRE_TOKENIZERS.get(tuple(rules))
    if name is None:
        shown = " then ".join(rules) or "none"
        return "default", [
            f"llama.cpp has no pre-tokenizer that cuts words by {shown:.120}; the file says 'default', so it may read text "
            "in other tokens than llmkit."
        ]
    return (name if ignore_merges else WHOLE_WORDS_FIRST.get(name, name)), []


# --- sentencepiece ----------------------------------------------------------------------------------------------------


def _from_sentencepiece(data: bytes, settings: TokenizerSettings, folder: Path) -> Vocabulary:
    from sentencepiece import SentencePieceProcessor

    pieces = SentencePieceProcessor(model_proto=data)
    tokens, types, scores = [], [], []
    for number in range(pieces.get_piece_size()):
        tokens.append(pieces.id_to_piece(number))
        scores.append(float(pieces.get_score(number)))
        known = ((pieces.is_unknown, UNKNOWN), (pieces.is_control, CONTROL), (pieces.is_unused, UNUSED), (pieces.is_byte, BYTE))
        types.append(next((kind for test, kind in known if test(number)), NORMAL))
    added = {token.id: (token.content, token.special) for token in settings.added if token.id is not None}
    if (folder / "tokenizer.json").is_file():
        description = json.loads((folder / "tokenizer.json").read_bytes())
        added |= {token["id"]: (token["content"], bool(token["special"])) for token in description.get("added_tokens", ())}
    for number, (content, special) in sorted(added.items()):
        while len(tokens) <= number:
            tokens.append(f"[PAD{len(tokens)}]")
            types.append(UNUSED)
            scores.append(-1000.0)
        if types[number] in (NORMAL, UNUSED):
            tokens[number], scores[number] = content, -1000.0
            types[number] = CONTROL if special else USER_DEFINED
    found = Vocabulary("llama", "default", tokens, types, scores)
    if pieces.unk_id() >= 0:
        found.special["unk"] = pieces.unk_id()
    return found


# --- tiktoken ranks ---------------------------------------------------------------------------------------------------


def _from_ranks(data: bytes, tokenizer: Tokenizer) -> Vocabulary:
    count = len(data.split(b"\n")) - data.endswith(b"\n")
    letters = {byte: letter for letter, byte in byte_level_alphabet().items()}
    ranks = {tokenizer.token_bytes(number): number for number in range(count)}

    def written(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    merges = []
    for token, rank in ranks.items():
        halves = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        known = [(ranks[left], ranks[right]) for left, right in halves if left in ranks and right in ranks]
        merges += [(rank, *pair) for pair in sorted(known)]
    names = [written(tokenizer.token_bytes(number)) for number in range(count)]
    types = [NORMAL] * count
    for number in range(count, tokenizer.vocab_size):
        content = tokenizer.token_bytes(number).decode("utf-8", "replace")
        names.append(content or f"[PAD{number}]")
        types.append((CONTROL if number in tokenizer.special_ids else USER_DEFINED) if content else UNUSED)
    joined = [f"{names[left]} {names[right]}" for _, left, right in sorted(merges)]
    return Vocabulary("gpt2", TIKTOKEN.get(count, "default"), names, types, merges=joined)
