"""A tiny language of animals, and everything a tiny run needs."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llmkit.config import ModelConfig
from llmkit.families import read_config
from llmkit.model.transformer import Transformer, init_weights
from llmkit.text.tokenizer import Tokenizer, load_tokenizer
from llmkit.training.data.vocabulary import train_tokenizer
from llmkit.training.recipe import Recipe, TokenizerRecipe, from_dict

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<|user|>{{ m.content }}{% else %}<|assistant|>"
    "{% generation %}{{ m.content }}<|end|>{% endgeneration %}{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|end|>", "<|user|>", "<|assistant|>"]
MODEL = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}


def stories(count: int, seed: int = 0) -> list[str]:
    choose = random.Random(seed).choice
    who, did, what = ["cat", "dog", "hen", "cow"], ["saw", "met", "liked"], ["a ball", "the moon", "an egg", "12 trees"]
    return [" ".join(f"The {choose(who)} {choose(did)} {choose(what)}." for _ in range(1 + (seed + n) % 5)) for n in range(count)]


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "stories.txt"
    path.write_text("\n<|endoftext|>\n".join(stories(120)), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    recipe = TokenizerRecipe(vocab_size=300, special_tokens=tuple(SPECIAL), bos="<|end|>", eos="<|end|>", chat_template=TEMPLATE)
    train_tokenizer(recipe, stories(120), folder, 64)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder: Path) -> Tokenizer:
    return load_tokenizer(tokenizer_folder)


@pytest.fixture
def model_config() -> ModelConfig:
    return read_config({**MODEL, "vocab_size": 300, "max_position_embeddings": 64})


@pytest.fixture
def make_model(model_config: ModelConfig) -> Callable[[], Transformer]:
    def make(seed: int = 0) -> Transformer:
        model = Transformer(model_config)
        init_weights(model, torch.Generator().manual_seed(seed))
        return model

    return make


@pytest.fixture
def make_recipe(text_file: Path, tokenizer_folder: Path, tmp_path: Path) -> Callable[..., Recipe]:
    """A recipe of a tiny run; keyword arguments change its keys."""

    def make(**keys: Any) -> Recipe:
        settings: dict[str, Any] = {
            "model": MODEL,
            "tokenizer": str(tokenizer_folder),
            "data": [{"path": str(text_file)}],
            "output": str(tmp_path / "run"),
            "max_length": 48,
            "batch_size": 2,
            "max_steps": 8,
            "held_out": 0.1,
            "learning_rate": 1e-2,
            "warmup_steps": 2,
            "log_every": 1,
            "eval_every": 0,
            "save_minutes": 0,
            "device": "cpu",
        }
        return from_dict(settings | keys)

    return make
