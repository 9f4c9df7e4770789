"""Small tokenizers of every kind, made on the spot: the tests need no data folder."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from llmkit.text.codec import TokenizerSettings
from llmkit.text.codec_tiktoken import RanksFamily, TiktokenCodec, _pattern
from llmkit.text.tokenizer import Tokenizer, load_tokenizer

CORPUS = [
    "the cat sat on the mat, and the dog's ball rolled away.",
    "Hello world! Hello again, 12 345.",
    "Füße über naïve café — 你好 🦙",
] * 20
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
KINDS = ("byte_level", "llama_json", "sentencepiece", "sentencepiece_new", "tiktoken")


def byte_level_folder(folder: Path) -> Path:
    """A GPT-2-like tokenizer.json with ChatML tokens; its post-processor puts `<|endoftext|>` first."""
    from tokenizers import Tokenizer as Native
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    native = Native(models.BPE())
    native.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    native.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    native.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet))
    native.post_processor = processors.TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    native.enable_truncation(8)  # as files saved in training have it; must not cut prompts
    native.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<|endoftext|>", "eos_token": {"content": "<|im_end|>", "lstrip": False}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def sentencepiece_model() -> bytes:
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=model, vocab_size=340, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, character_coverage=0.98, minloglevel=2,
    )  # fmt: skip
    return model.getvalue()


def sentencepiece_folder(folder: Path, legacy: bool) -> Path:
    (folder / "tokenizer.model").write_bytes(sentencepiece_model())
    added = {"340": {"content": "<|im_start|>", "special": True}, "341": {"content": "<|im_end|>", "special": True, "rstrip": True}}
    config = {"legacy": legacy, "add_bos_token": True, "bos_token": "<s>", "eos_token": "</s>", "added_tokens_decoder": added}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def llama_json_folder(folder: Path) -> Path:
    """The same vocabulary as a tokenizer.json in Llama 2's layout, pieces joined by the sentencepiece merges."""
    import sentencepiece
    from tokenizers import AddedToken, decoders, models, normalizers, processors
    from tokenizers import Tokenizer as Native

    model = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model())
    vocabulary = {model.id_to_piece(i): i for i in range(model.get_piece_size())}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in sorted(vocabulary, key=lambda p: vocabulary[p])
        for cut in range(1, len(piece))
        if not piece.startswith("<") and piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
    native = Native(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    native.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    native.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    native.add_special_tokens([AddedToken(t, normalized=False) for t in ("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")])
    native.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    native.save(str(folder / "tokenizer.json"))
    (folder / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}))
    return folder


def ranks() -> bytes:
    """256 bytes and a few merges in tiktoken's format."""
    pieces = [bytes([byte]) for byte in range(256)] + [b"th", b"the", b" the", b"ll", b"He", b"Hell", b"Hello", b" w", b"\xc3\xbc"]
    return b"".join(base64.b64encode(piece) + b" %d\n" % rank for rank, piece in enumerate(pieces))


def tiktoken_tokenizer() -> Tokenizer:
    special = ("<s>", "</s>", "<|im_start|>", "<|im_end|>")
    family = RanksFamily("tiny", _pattern(r"\p{N}{1,3}"), special, {"bos_token": "<s>", "eos_token": "</s>"}, add_bos=True)
    return Tokenizer(TiktokenCodec(ranks(), TokenizerSettings(), "ranks", family))


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    """One tokenizer of each kind."""
    folder: Callable[[str], Path] = lambda name: tmp_path_factory.mktemp(name)  # noqa: E731
    return {
        "byte_level": load_tokenizer(byte_level_folder(folder("byte_level"))),
        "llama_json": load_tokenizer(llama_json_folder(folder("llama_json"))),
        "sentencepiece": load_tokenizer(sentencepiece_folder(folder("sentencepiece"), legacy=True)),
        "sentencepiece_new": load_tokenizer(sentencepiece_folder(folder("sentencepiece_new"), legacy=False)),
        "tiktoken": tiktoken_tokenizer(),
    }
