"""A tiny random Llama with a tiny trained tokenizer and a chat template, as a model folder: what the API and the commands are tried on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn

from llmkit.config import Param
from llmkit.families import read_config
from llmkit.model.transformer import Transformer, init_weights
from llmkit.quant.apply import install, quantize_matrix
from llmkit.quant.schemes import DEFAULT, choose

TEXT = "Once upon a time there was a dog and a ball. The dog ran to the ball and the sun was warm. " * 3
SPECIAL = ["<|bos|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
BOS, EOS = 0, 1
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def write_tokenizer(folder: Path, template: str | None = TEMPLATE) -> int:
    """tokenizer.json and tokenizer_config.json; returns the vocabulary size."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    # Without the 256 bytes: whatever the random model says is made of the letters above.
    tokenizer.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=80, special_tokens=SPECIAL, show_progress=False))
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<|bos|>", "eos_token": "<|end|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    if template is not None:
        config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return tokenizer.get_vocab_size()


def write_model(folder: Path, *, template: str | None = TEMPLATE, context: int = 4096, **config: object) -> Path:
    """A whole folder: config, weights, tokenizer, generation_config."""
    folder.mkdir(parents=True, exist_ok=True)
    hf = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": write_tokenizer(folder, template),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": context,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "torch_dtype": "float32",
        **config,
    }
    (folder / "config.json").write_text(json.dumps(hf))
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": True, "temperature": 0.7, "top_k": 20, "eos_token_id": EOS}))
    model = Transformer(read_config(hf))
    generator = torch.Generator().manual_seed(0)
    init_weights(model, generator)
    with torch.no_grad():
        for parameter in model.parameters():  # larger than for training, so that the logits differ
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    save_file(dict(model.state_dict()), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def quantize_model(model: nn.Module, params: Mapping[str, Param], scheme: str = DEFAULT) -> None:
    """Quantize the linears and embeddings of a model in memory, one at a time; nf4 leaves embeddings, head and experts as they are."""
    for name, parameter in list(model.named_parameters()):
        choice = choose(scheme, params[name])
        if choice is not None:
            install(model, {name: quantize_matrix(parameter, choice)})
