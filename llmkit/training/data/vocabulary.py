"""Training a tokenizer: byte-level BPE (arXiv:1508.07909, over bytes as in GPT-2), written as a Hugging Face folder."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from llmkit.training.recipe import TokenizerRecipe


def train_tokenizer(recipe: TokenizerRecipe, texts: Iterable[str], folder: Path, max_length: int) -> None:
    """Train on `texts` and write tokenizer.json and tokenizer_config.json to `folder`.

    Every byte is in the alphabet, so any text is encoded without loss; digits stand alone; special tokens come first.
    The same texts in the same order give the same file. `max_length` is stored as `model_max_length`.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocab_size,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in recipe.special_tokens],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if recipe.bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{recipe.bos} $A", pair=f"{recipe.bos} $A $B", special_tokens=[(recipe.bos, tokenizer.token_to_id(recipe.bos))]
        )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": recipe.bos,
        "eos_token": recipe.eos,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
        "chat_template": recipe.chat_template,
    }
    text = json.dumps({name: value for name, value in config.items() if value is not None}, indent=2, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")
