"""vocab.json with merges.txt: byte-level BPE as GPT-2 and Qwen store it, put together as the tokenizer.json it stands for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llmkit.errors import TokenizerError
from llmkit.text.codec import TokenizerSettings, read_object, read_text
from llmkit.text.codec_tiktoken import QWEN

END_OF_TEXT = "<|endoftext|>"


def merges_as_json(file: Path, settings: TokenizerSettings) -> bytes:
    """The tokenizer.json of a merges.txt and the vocab.json beside it.

    How text is cut into words stands in neither; the tokenizer's class says it, or else the model's type.
    Raises TokenizerError for files that are damaged or of a class other than GPT-2's and Qwen's.
    """
    folder = file.parent
    kind = settings.tokenizer_class or str(read_object(folder / "config.json").get("model_type", "gpt2"))
    byte_level = {"type": "ByteLevel", "add_prefix_space": settings.add_prefix_space is True, "trim_offsets": True, "use_regex": True}
    normalizer, pre_tokenizer = None, byte_level
    if kind.lower().startswith("qwen"):
        words = {"type": "Split", "pattern": {"Regex": QWEN.pattern}, "behavior": "Isolated", "invert": False}
        normalizer = {"type": "NFC"}
        pre_tokenizer = {"type": "Sequence", "pretokenizers": [words, byte_level | {"use_regex": False}]}
    elif not kind.lower().startswith("gpt2"):
        raise TokenizerError(
            f"{file} belongs to a {kind}, and only GPT-2's and Qwen's are read from it; save the model with a tokenizer.json."
        )
    vocabulary: dict[str, Any] = read_object(folder / "vocab.json")
    if not vocabulary:
        raise TokenizerError(f"{folder} has merges.txt but no vocab.json to go with it; fetch both again.")
    lines = [line for line in read_text(file).split("\n") if line.strip() and not line.startswith("#version")]
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    special = sorted(settings.special.union([END_OF_TEXT]).intersection(vocabulary))
    description = {
        "added_tokens": [{"id": vocabulary[token], "content": token, "special": True, **plain} for token in special],
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": [line.rstrip("\r").split(" ") for line in lines]},
    }
    return json.dumps(description).encode()
