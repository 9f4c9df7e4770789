"""Adapters made and read by PEFT on tiny transformers models: the oracle of the tests here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from transformers import PreTrainedModel

from llmkit.checkpoint.arrays import parameter_shapes
from llmkit.config import ModelConfig
from llmkit.lora.settings import AdapterSettings
from tests.families.tiny import hf_config, hf_model, save

IDS = np.random.default_rng(0).integers(2, 90, 20).tolist()
PARITY = 1e-5  # relative to the largest logit

# One variant of each family and of each layout.
FAMILIES = [
    *("llama", "llama-biases-tied", "mistral", "mixtral", "qwen2", "qwen3", "qwen3-moe", "gemma2", "gemma3", "phi3", "gpt2"),
    *("smollm3", "olmo2", "granite"),
]


def base_model(variant: str) -> PreTrainedModel:
    return hf_model(hf_config(variant))


def logits(model: torch.nn.Module) -> np.ndarray:
    with torch.no_grad():
        found: np.ndarray = model(torch.tensor([IDS])).logits[0].numpy()
    return found


def difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def trained_by_peft(folder: Path, variant: str, **settings: Any) -> np.ndarray:
    """A base and an adapter that PEFT injected, moved away from zero and saved; the logits of both as PEFT reads them again."""
    save(base_model(variant), folder / "base")
    model = peft.get_peft_model(base_model(variant), peft.LoraConfig(**{"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 6, **settings}))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model.save_pretrained(folder / "adapter")
    return read_by_peft(folder / "adapter", variant)


def read_by_peft(folder: Path, variant: str) -> np.ndarray:
    return logits(peft.PeftModel.from_pretrained(base_model(variant), folder).eval())


def random_terms(
    config: ModelConfig, paths: Sequence[str], settings: AdapterSettings, seed: int = 1
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """A and B for every linear whose path ends in one of these, or has it in it."""
    generator, shapes = torch.Generator().manual_seed(seed), parameter_shapes(config)
    shapes.setdefault("lm_head.weight", shapes["model.embed_tokens.weight"])
    out = {}
    for name, shape in shapes.items():
        path = name.removesuffix(".weight")
        if len(shape) == 2 and path != name and any(part in f"{path}." for part in paths):
            rank = settings.rank(path)
            out[path] = tuple(torch.randn(size, generator=generator) * 0.2 for size in ((rank, shape[1]), (shape[0], rank)))
    return out


def random_weights(config: ModelConfig, names: Sequence[str]) -> dict[str, torch.Tensor]:
    shapes, generator = parameter_shapes(config), torch.Generator().manual_seed(2)
    return {name: torch.randn(shapes[name], generator=generator) * 0.2 for name in names}


def random_lengths(terms: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """DoRA magnitudes."""
    generator = torch.Generator().manual_seed(3)
    return {path: torch.rand(len(b), generator=generator) + 0.5 for path, (_, b) in terms.items()}
