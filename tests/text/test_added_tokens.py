"""What the files beside a vocabulary say of its tokens: ids as transformers gives them, for all three codecs."""

from __future__ import annotations

import base64
import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from llmkit.text.tokenizer import Tokenizer, load_tokenizer

from .conftest import byte_level_folder, sentencepiece_folder

Files = dict[str, dict[str, Any]]
START, END = "<|im_start|>", "<|im_end|>"


def token(content: str, **flags: bool) -> dict[str, Any]:
    return {"content": content, "lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": True, **flags}


def typed(content: str, **flags: bool) -> dict[str, Any]:
    return {"__type": "AddedToken", **token(content, **flags)}


# Files by name; the vocabulary knows START as 1, END as 2, and 340 is its next free id.
FOLDERS: dict[str, Files] = {
    "roles": {"tokenizer_config": {"eos_token": END, "bos_token": START}},
    "a role in no vocabulary": {"tokenizer_config": {"eos_token": "<new>", "bos_token": START}},
    "roles in the map": {"tokenizer_config": {}, "special_tokens_map": {"eos_token": END, "bos_token": token(START, rstrip=True)}},
    "the map wins": {"tokenizer_config": {"eos_token": END}, "special_tokens_map": {"eos_token": START}},
    "no map beside a decoder": {
        "tokenizer_config": {"added_tokens_decoder": {"1": token(START)}},
        "special_tokens_map": {"eos_token": END, "additional_special_tokens": ["<tool>"]},
    },
    "additional": {"tokenizer_config": {"additional_special_tokens": [END, START, "<new>"]}},
    "additional with flags": {"tokenizer_config": {"additional_special_tokens": [typed(END, lstrip=True), typed("<new>", rstrip=True)]}},
    "extra": {"tokenizer_config": {"extra_special_tokens": [END, START, "<tool>"]}},
    "extra by role": {"tokenizer_config": {"extra_special_tokens": {"image_token": END, "tool_token": "<tool>"}}},
    "extra replaces additional": {"tokenizer_config": {"additional_special_tokens": [START], "extra_special_tokens": [END]}},
    "a model's own roles": {"tokenizer_config": {"image_token": END, "tool_token": "<tool>"}},
    "additional in the map": {"tokenizer_config": {}, "special_tokens_map": {"additional_special_tokens": [END, START, "<new>"]}},
    "decoder": {"tokenizer_config": {"added_tokens_decoder": {"1": token(START, rstrip=True), "2": token(END, lstrip=True)}}},
    "decoder, other flags": {
        "tokenizer_config": {"added_tokens_decoder": {"1": token(START, normalized=True, special=False), "2": token(END, single_word=True)}}
    },
    "decoder, new tokens": {
        "tokenizer_config": {"added_tokens_decoder": {"341": token("<tool>", single_word=True), "340": token("<new>", special=False)}}
    },
    "decoder and a role": {
        "tokenizer_config": {"added_tokens_decoder": {"1": token(START, special=False)}, "eos_token": START, "pad_token": "<new>"}
    },
    "decoder and a list": {
        "tokenizer_config": {"added_tokens_decoder": {"1": token(START, special=False)}, "additional_special_tokens": [START, END]}
    },
    "added_tokens.json": {"tokenizer_config": {"eos_token": "<new>"}, "added_tokens": {END: 2, "<new>": 340}},
    "empty names": {"tokenizer_config": {"eos_token": END, "pad_token": "", "unk_token": None, "additional_special_tokens": [""]}},
}


def texts(markers: tuple[str, ...] = (START, END, "<new>", "<tool>")) -> list[str]:
    shapes = ("a{0}b", "a {0} b", "{0}Hello", "Hello  {0}", "{0} {0}", "x\n {0}\n y", "W{0}ord {0}")
    return [shape.format(marker) for marker in markers for shape in shapes] + [END[1:], "Hello world"]


@pytest.mark.parametrize("own", [True, False], ids=["with added_tokens", "without"])
@pytest.mark.parametrize("name", FOLDERS)
def test_tokens_of_a_tokenizer_json(tmp_path: Path, name: str, own: bool) -> None:
    import transformers

    folder = byte_level_folder(tmp_path)
    description = json.loads((folder / "tokenizer.json").read_text()) | {"truncation": None}
    (folder / "tokenizer.json").write_text(json.dumps(description | ({} if own else {"added_tokens": []})))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **FOLDERS[name]["tokenizer_config"]}
    for stem, content in (FOLDERS[name] | {"tokenizer_config": config}).items():
        (folder / f"{stem}.json").write_text(json.dumps(content))
    ours, theirs = load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    for text in texts():
        for special in (True, False):
            expected = theirs(text, split_special_tokens=not special).input_ids
            assert ours.encode(text, special=special) == expected, (text, special)
            assert ours.decode(expected) == theirs.decode(expected, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def sentencepiece(folder: Path, config: dict[str, Any], special_map: dict[str, Any] | None = None) -> Tokenizer:
    sentencepiece_folder(folder, legacy=False)
    (folder / "tokenizer_config.json").write_text(json.dumps({"legacy": False, **config}))
    if special_map is not None:
        (folder / "special_tokens_map.json").write_text(json.dumps(special_map))
    return load_tokenizer(folder)


@pytest.mark.parametrize(
    ("config", "special_map"),
    [
        ({"eos_token": START}, None),
        ({"additional_special_tokens": [START]}, None),
        ({"extra_special_tokens": [START]}, None),
        ({"extra_special_tokens": {"image_token": START}}, None),
        ({"added_tokens_decoder": {"340": token(START)}}, None),
        ({}, {"additional_special_tokens": [START]}),
        ({}, {"eos_token": token(START)}),
    ],
)
def test_tokens_beside_a_sentencepiece_model(tmp_path: Path, config: dict[str, Any], special_map: dict[str, Any] | None) -> None:
    tokenizer = sentencepiece(tmp_path, config, special_map)
    assert tokenizer.encode(f"{START}Hello", special=True, bos=False) == [340, *tokenizer.encode_continuation("Hello")]  # transformers' ids
    assert 340 in tokenizer.special_ids
    assert 340 not in tokenizer.encode(f"{START}Hello")
    assert tokenizer.vocab_size == 341


def test_flags_beside_a_sentencepiece_model(tmp_path: Path) -> None:
    listed = [typed(START, rstrip=True), typed(END, lstrip=True), typed("<w>", single_word=True)]
    tokenizer = sentencepiece(tmp_path, {"additional_special_tokens": listed})
    assert tokenizer.encode(f"{START}  {END}", special=True, bos=False) == [340, 341]
    assert 342 not in tokenizer.encode("a<w>", special=True)
    assert 342 in tokenizer.encode("a <w>", special=True)


def llama3(folder: Path, config: dict[str, Any]) -> Tokenizer:
    """128,000 ranks, the number by which Llama 3 is known: 256 bytes and pairs and triples of them."""
    pieces = [bytes([byte]) for byte in range(256)] + [bytes([a, b]) for a in range(256) for b in range(256)]
    pieces += [bytes([a, b, 0]) for a in range(1, 256) for b in range(1, 256)][: 128_000 - len(pieces)]
    (folder / "tokenizer.model").write_bytes(b"".join(base64.b64encode(piece) + b" %d\n" % rank for rank, piece in enumerate(pieces)))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return load_tokenizer(folder)


def test_tokens_beside_ranks(tmp_path: Path) -> None:
    renamed = {"128002": token("<tool>", special=False, lstrip=True), "128256": token("<new>", rstrip=True)}
    tokenizer = llama3(tmp_path, {"added_tokens_decoder": renamed, "additional_special_tokens": ["<more>", "<|eot_id|>"]})
    assert tokenizer.encode("  <tool>", bos=False) == [128002]  # parsed in any text: it is not special
    assert tokenizer.encode("<new>  <more><|eot_id|>", special=True, bos=False) == [128256, 128257, 128009]
    assert max(tokenizer.encode("<new>", bos=False)) < 128_000
    ids, spans = tokenizer.encode_spans("a  <tool>b")
    assert spans[ids.index(128002)] == (1, 9)
    assert tokenizer.decode([128256, 97, 128002]) == "a<tool>"


@pytest.mark.parametrize("kind", ["sentencepiece", "tokenizer.json"])
@pytest.mark.parametrize(("wanted", "expected"), [(False, [10994]), (True, [15043]), (None, [15043])])
@pytest.mark.real
def test_add_prefix_space_of_llama(data_dir: Path, tmp_path: Path, kind: str, wanted: bool | None, expected: list[int]) -> None:
    name = "tokenizer.model" if kind == "sentencepiece" else kind
    (tmp_path / name).write_bytes((data_dir / "tokenizers/llama2" / name).read_bytes())
    config = {"tokenizer_class": "LlamaTokenizer"} | ({} if wanted is None else {"add_prefix_space": wanted})
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("Hello", bos=False) == expected
    for text in ("Hello", " Hello", "  two"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("a<s>", special=True, bos=False)[-1] == 1  # its file looks for `<s>` behind the sign of a space


@pytest.mark.parametrize("wanted", [True, False])
def test_add_prefix_space_of_gpt2(tmp_path: Path, wanted: bool) -> None:
    import transformers

    folder = byte_level_folder(tmp_path)
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": wanted}))
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for text in ("the cat", " the cat", "the<|im_end|>the"):
        assert load_tokenizer(folder).encode(text, special=True, bos=False) == theirs(text, add_special_tokens=False).input_ids


@pytest.mark.real
def test_qwen_ranks_compose_text(data_dir: Path) -> None:
    tokenizer = load_tokenizer(data_dir / "tokenizers/qwen")
    for text in ("caf\u00e9 x", "\uac01!", "\u00c5<|im_end|>\u00e9"):
        decomposed = unicodedata.normalize("NFD", text)
        assert tokenizer.encode(decomposed, special=True) == tokenizer.encode(text, special=True)
        ids, spans = tokenizer.encode_spans(decomposed)
        assert ids == tokenizer.encode(decomposed, special=True)
        assert spans[-1][1] == len(decomposed)
    assert [span for _, span in zip(*tokenizer.encode_spans("e\u0301"), strict=True)][-1] == (0, 2)


def test_a_vocabulary_with_holes_keeps_its_text(tmp_path: Path) -> None:
    folder = byte_level_folder(tmp_path)
    description = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = description["model"]["vocab"]
    last = max(vocabulary, key=lambda piece: vocabulary[piece])
    vocabulary[last] = 4000
    (folder / "tokenizer.json").write_text(json.dumps(description))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.vocab_size == 4001
    assert tokenizer.decode([4000]) == load_tokenizer(folder).token(4000) != ""
    text = tokenizer.token(4000) * 2
    assert tokenizer.decode(tokenizer.encode(text)) == text


EMPTY = ["", "\n", "\ufeff", '\ufeff{"eos_token": "<|im_end|>"}', '{"eos_token": "<|im_end|>", "bos_token": ""}']


@pytest.mark.parametrize("content", EMPTY)
def test_empty_and_marked_files_are_read(tmp_path: Path, content: str) -> None:
    folder = byte_level_folder(tmp_path)
    (folder / "tokenizer_config.json").write_text(content)
    assert load_tokenizer(folder).eos_ids == ((2,) if "eos" in content else (0,))
