"""Tokenizers of every kind: ids as the reference gives them, BOS once, and decoding that can be streamed."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llmkit.errors import TokenizerError
from llmkit.text.tokenizer import Tokenizer, load_tokenizer

from .conftest import KINDS, byte_level_folder, ranks, sentencepiece_folder, sentencepiece_model

EXPECTED = {"gpt-2": "gpt2", "llama-bpe": "llama3", "llama-spm": "llama2", "phi-3": "phi-3-mini", "qwen2": "qwen"}
TEXTS = ["Hello world", " leading", "  two", "a\n\nb\t", "Füße 你好 🦙🦙", "", " ", "the <|im_end|> cat", "\x00\x7f", "e\u0301"]
ids_lists = st.lists(st.integers(-1, 420), max_size=40)


def strings(data_dir: Path, name: str) -> list[tuple[str, list[int]]]:
    stem = data_dir / "tokenizers" / "expected" / f"ggml-vocab-{name}.gguf"
    texts = stem.with_name(stem.name + ".inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    lines = stem.with_name(stem.name + ".out").read_text().split("\n")
    assert len(texts) == len(lines) == 47
    return [(text, [int(number) for number in line.split()]) for text, line in zip(texts, lines, strict=True)]


@pytest.mark.real
@pytest.mark.parametrize(("name", "path"), [*EXPECTED.items(), ("llama-spm", "llama2/tokenizer.model"), ("llama-spm", "gguf-free-copy")])
def test_real_encodings(data_dir: Path, tmp_path: Path, name: str, path: str) -> None:
    source = data_dir / "tokenizers" / path
    if path == "gguf-free-copy":  # the kind is told by the content: a sentencepiece model under another name
        source = tmp_path / "vocabulary.tiktoken"
        source.write_bytes((data_dir / "tokenizers/llama2/tokenizer.model").read_bytes())
        source = tmp_path
    tokenizer = load_tokenizer(source)
    for text, ids in strings(data_dir, name):
        assert tokenizer.encode(text, bos=False) == ids
        assert tokenizer.decode(ids) == text
        spans = tokenizer.encode_spans(text)
        assert spans[0] == ids
        assert all(0 <= a <= b <= len(text) for a, b in spans[1])


@pytest.mark.real
def test_real_decoding_is_the_librarys(data_dir: Path) -> None:
    import random

    from tokenizers import Tokenizer as Native

    for path in ("gpt2", "llama2", "phi-3-mini", "minimind", "tinystories10k"):
        tokenizer = load_tokenizer(data_dir / "tokenizers" / path)
        native = Native.from_file(str(data_dir / "tokenizers" / path / "tokenizer.json"))
        generator = random.Random(0)
        for _ in range(300):
            ids = [generator.randrange(300, tokenizer.vocab_size) for _ in range(20)]
            assert tokenizer.decode(ids, skip_special=False) == native.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("kind", KINDS)
def test_decode_gives_the_text_back(tokenizers: dict[str, Tokenizer], kind: str) -> None:
    for text in TEXTS:
        assert tokenizers[kind].decode(tokenizers[kind].encode(text)) == text


@pytest.mark.parametrize("kind", KINDS)
def test_bos_once(tokenizers: dict[str, Tokenizer], kind: str) -> None:
    tokenizer = tokenizers[kind]
    bos = tokenizer.bos_id
    assert bos is not None
    plain = tokenizer.encode("Hello", bos=False)
    assert bos not in plain
    assert tokenizer.encode("Hello") == tokenizer.encode("Hello", bos=True) == [bos, *plain]
    assert tokenizer.encode("") == [bos]
    written = tokenizer.token(bos) + "Hello"
    for again in (tokenizer.encode(written, special=True), tokenizer.encode(written, special=True, bos=True)):
        assert again.count(bos) == 1
        assert again[0] == bos
    assert tokenizer.encode(written, bos=False).count(bos) == 0  # text from outside cannot forge it


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_are_parsed_only_when_asked(tokenizers: dict[str, Tokenizer], kind: str) -> None:
    tokenizer = tokenizers[kind]
    end = tokenizer.token_id("<|im_end|>")
    assert end is not None
    assert end in tokenizer.special_ids
    assert end in tokenizer.encode("a<|im_end|>b", special=True)
    assert end not in tokenizer.encode("a<|im_end|>b")
    assert tokenizer.decode(tokenizer.encode("a<|im_end|>", special=True)) == "a"
    assert "<|im_end|>" in tokenizer.decode(tokenizer.encode("a<|im_end|>", special=True), skip_special=False)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None)
@given(ids=ids_lists, skip=st.booleans())
def test_stream_equals_decode_and_never_takes_back(tokenizers: dict[str, Tokenizer], kind: str, ids: list[int], skip: bool) -> None:
    tokenizer = tokenizers[kind]
    whole = tokenizer.decode(ids, skip)
    stream = tokenizer.stream(skip)
    said = ""
    for token_id in ids:
        said += stream.push(token_id)
        assert whole.startswith(said)
    assert said + stream.flush() == whole
    said = "".join(map(stream.push, ids)) + stream.flush()  # flush starts it anew
    assert said == whole


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=40))
@example(text="▁")
def test_any_text_round_trips_with_spans(tokenizers: dict[str, Tokenizer], kind: str, text: str) -> None:
    tokenizer = tokenizers[kind]
    # sentencepiece writes a space as this sign, and so reads the sign itself as a space.
    expected = text.replace("▁", " ") if kind.startswith(("sentencepiece", "llama")) else text
    assert tokenizer.decode(tokenizer.encode(text), skip_special=True) == expected
    ids, spans = tokenizer.encode_spans(text)
    assert ids == tokenizer.encode(text, bos=False, special=True)
    assert len(ids) == len(spans)
    assert all(a[0] <= b[0] for a, b in itertools.pairwise(spans))
    assert not text or spans[-1][1] == len(text)


@settings(max_examples=150, deadline=None)
@given(ids=st.lists(st.integers(3, 339), max_size=30))
@example(ids=[0x20 + 3])  # a space as a byte is the text's own, even where it comes first
def test_sentencepiece_decoding_is_the_librarys(tokenizers: dict[str, Tokenizer], ids: list[int]) -> None:
    tokenizer = tokenizers["sentencepiece"]
    assert tokenizer.decode(ids) == tokenizer._codec._model.decode(ids)  # type: ignore[attr-defined]


def test_half_a_character_waits(tokenizers: dict[str, Tokenizer]) -> None:
    stream = tokenizers["tiktoken"].stream()
    assert [stream.push(byte) for byte in "🦙".encode()] == ["", "", "", "🦙"]
    assert [stream.push(0xF0), stream.push(0x9F), stream.push(ord("a"))] == ["", "", "\ufffda"]
    assert (stream.push(0xE2), stream.flush(), stream.flush()) == ("", "\ufffd", "")


def test_space_after_special_tokens(tokenizers: dict[str, Tokenizer]) -> None:
    """`"legacy": false` puts the sentencepiece space before the text's beginning only."""
    old, new = tokenizers["sentencepiece"], tokenizers["sentencepiece_new"]
    text = "<|im_start|>the<|im_end|>  the"
    assert old.decode(old.encode(text, special=True), skip_special=False) == "<s><|im_start|> the<|im_end|> the"
    assert new.decode(new.encode(text, special=True), skip_special=False) == "<s><|im_start|>the<|im_end|>the"  # rstrip took two spaces
    assert new.encode("the") == old.encode("the")


def test_special_split_is_linear(tokenizers: dict[str, Tokenizer]) -> None:
    """A long run of one character took minutes where a pattern or a merge loop was quadratic."""
    for kind in KINDS:
        for character in (" ", "a", "^", "\n", "<"):
            text = character * 20_000
            assert tokenizers[kind].decode(tokenizers[kind].encode(text)) == text


def test_truncation_in_the_file_does_not_cut(tokenizers: dict[str, Tokenizer]) -> None:
    assert len(tokenizers["byte_level"].encode("cat " * 100)) > 100


def test_ids_beyond_the_vocabulary_say_nothing(tokenizers: dict[str, Tokenizer]) -> None:
    for tokenizer in tokenizers.values():
        assert tokenizer.token(tokenizer.vocab_size) == tokenizer.token(-1) == ""
        assert tokenizer.decode([10**9, -5]) == ""


def test_lone_surrogates_and_missing_bos(tokenizers: dict[str, Tokenizer], tmp_path: Path) -> None:
    for tokenizer in tokenizers.values():
        with pytest.raises(TokenizerError, match="lone surrogate"):
            tokenizer.encode("a\ud800")
    folder = byte_level_folder(tmp_path)
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>", "add_bos_token": False}))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.encode("Hello") == tokenizer.encode("Hello", bos=False)
    with pytest.raises(TokenizerError, match="no BOS"):
        tokenizer.encode("Hello", bos=True)


def test_add_eos_token(tmp_path: Path) -> None:
    folder = sentencepiece_folder(tmp_path, legacy=True)
    config = json.loads((folder / "tokenizer_config.json").read_text()) | {"add_bos_token": False, "add_eos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.encode("Hello") == [*tokenizer.encode("Hello", bos=False), tokenizer.eos_ids[0]]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("tokenizer.json", b"{", "not a usable tokenizer.json"),
        ("tokenizer.json", b'{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}}', "not a usable tokenizer.json"),
        ("tokenizer.json", b"", "is no tokenizer"),
        ("tokenizer.json", b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        ("tokenizer_config.json", b"[1]", "not a JSON object"),
        ("tokenizer_config.json", b"{" * 100_000, "not valid JSON"),
        ("tokenizer_config.json", b'{"eos_token": 3}', "is not a token"),
        ("tokenizer_config.json", rb'{"eos_token": "\ud800"}', "not valid JSON"),
        ("added_tokens.json", rb'{"\ud800": 400}', "not valid JSON"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"x": {"content": "y"}}}', "not a token id"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"9999": {"content": "<new>"}}}', "do not belong together"),
        ("tokenizer_config.json", b'{"chat_template": [{"name": "default"}]}', "no name and template"),
        ("special_tokens_map.json", b"\xff", "not UTF-8"),
        ("added_tokens.json", b'{"<a>": "b"}', "not a token id"),
        ("chat_template.jinja", b"\xff", "not UTF-8"),
    ],
)
def test_damaged_files_are_errors(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    folder = byte_level_folder(sentencepiece_folder(tmp_path, legacy=True))  # tokenizer.model could stand in
    (folder / name).write_bytes(content)
    with pytest.raises(TokenizerError, match=said):
        load_tokenizer(folder)


def test_a_panic_of_the_library_is_one_clean_error(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = byte_level_folder(tmp_path)
    damaged = (folder / "tokenizer.json").read_text().replace('"special_tokens": {', '"special_tokens": {}, "was": {')
    (folder / "tokenizer.json").write_text(damaged)
    with pytest.raises(TokenizerError, match="damaged"):
        load_tokenizer(folder)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_broken_links_are_damaged_files(tmp_path: Path, name: str) -> None:
    folder = byte_level_folder(sentencepiece_folder(tmp_path, legacy=True))
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(folder / "gone")
    with pytest.raises(TokenizerError, match=f"{name} cannot be read"):
        load_tokenizer(folder)


def split_into_merges(folder: Path) -> None:
    """The vocabulary of a tokenizer.json as vocab.json and merges.txt, without any other file."""
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    for file in folder.iterdir():
        file.unlink()
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in model["merges"]))


@pytest.mark.parametrize(
    ("config", "model_type"),
    [
        ({}, "gpt2"),
        ({"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True}, "llama"),
        ({"tokenizer_class": "Qwen2Tokenizer", "additional_special_tokens": ["<|im_end|>"]}, "qwen2"),
        ({}, "qwen2"),
    ],
)
def test_vocab_and_merges_are_read_as_transformers_reads_them(tmp_path: Path, config: dict[str, object], model_type: str) -> None:
    import transformers

    split_into_merges(byte_level_folder(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    if config:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours, theirs = load_tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in ("Hello world's ball, 12 345!", "  the cat\n\n", "naïve cafe\u0301 — 你好 🦙", "the dog<|endoftext|> <|im_end|>x", ""):
        ids = theirs(text).input_ids
        assert ours.encode(text, special=True) == ids
        assert ours.decode(ids, skip_special=False) == theirs.decode(ids, clean_up_tokenization_spaces=False)
    assert ours.eos_ids == (theirs.eos_token_id,)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("vocab.json", None, "no vocab.json"),
        ("vocab.json", "{", "not valid JSON"),
        ("vocab.json", '{"a": "b"}', "not a usable"),
        ("merges.txt", "#version: 0.2\na", "not a usable"),
        ("merges.txt", "zz yy", "not a usable"),
        ("tokenizer_config.json", '{"tokenizer_class": "CLIPTokenizer"}', "belongs to a CLIPTokenizer"),
    ],
)
def test_damaged_vocab_and_merges(tmp_path: Path, name: str, content: str | None, said: str) -> None:
    split_into_merges(byte_level_folder(tmp_path))
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_text(content)
    with pytest.raises(TokenizerError, match=said):
        load_tokenizer(tmp_path)


def test_damaged_ranks_and_models(tmp_path: Path, tokenizers: dict[str, Tokenizer]) -> None:
    file = tmp_path / "tokenizer.model"
    for content, said in [
        (ranks(), "265 ranks, the number of no family"),
        (ranks().replace(b"AQ== 1\n", b"AQ== x\n"), "line 2"),
        (ranks()[7:], "no rank for byte 0"),
        (ranks() + b"YWJj 3\n", "gives a rank twice"),
        (b"\n\x05junk", "not a usable sentencepiece model"),
        (sentencepiece_model().replace("▁the".encode(), b"\xff\x96\x81the"), "not UTF-8"),
    ]:
        file.write_bytes(content)
        with pytest.raises(TokenizerError, match=said):
            load_tokenizer(tmp_path)


def test_missing_and_several(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)
    for name in ("a.model", "b.model"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(TokenizerError, match=r"several vocabularies \(a.model, b.model\)"):
        load_tokenizer(tmp_path)


@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_damaged_vocabularies_only_raise_our_errors(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    whole = data.draw(st.sampled_from(sorted(_vocabularies(tmp_path_factory))))
    content = bytearray(_vocabularies(tmp_path_factory)[whole])
    for at in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=6)):
        content[at] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(content)))
    (folder / "tokenizer.model").write_bytes(content[: cut if data.draw(st.booleans()) else len(content)])
    try:
        tokenizer = load_tokenizer(folder)
        tokenizer.decode(tokenizer.encode("Hello 你好 <s> 12", special=True))
    except TokenizerError:
        pass


_FUZZED: dict[str, bytes] = {}


def _vocabularies(factory: pytest.TempPathFactory) -> dict[str, bytes]:
    if not _FUZZED:
        _FUZZED["json"] = (byte_level_folder(factory.mktemp("json")) / "tokenizer.json").read_bytes()
        _FUZZED["sentencepiece"] = (sentencepiece_folder(factory.mktemp("spm"), True) / "tokenizer.model").read_bytes()
        _FUZZED["ranks"] = ranks()
    return _FUZZED


json_leaves = st.none() | st.booleans() | st.integers() | st.text(max_size=8)
json_values = st.recursive(
    json_leaves, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=5), v, max_size=3), max_leaves=8
)
KEYS = ["bos_token", "eos_token", "added_tokens_decoder", "chat_template", "add_bos_token", "additional_special_tokens", "legacy"]


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
@settings(max_examples=80, deadline=None)
@given(config=st.dictionaries(st.sampled_from(KEYS), json_values, max_size=4))
def test_odd_configurations_only_raise_our_errors(tmp_path_factory: pytest.TempPathFactory, kind: str, config: dict[str, object]) -> None:
    folder = tmp_path_factory.mktemp("config")
    (folder / "tokenizer.model").write_bytes(_vocabularies(tmp_path_factory)["json" if kind == "byte_level" else "sentencepiece"])
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    try:
        tokenizer = load_tokenizer(folder)
        tokenizer.decode(tokenizer.encode("Hello <s>", special=True))
    except TokenizerError:
        pass


def test_import_is_light() -> None:
    heavy = ["torch", "transformers", "tokenizers", "sentencepiece", "tiktoken", "jinja2", "numpy"]
    code = f"import sys, llmkit.text.tokenizer, llmkit.text.turns; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
