"""Checkpoints whose tensors go by several names in the wild: each layout gives the same logits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmkit.checkpoint.load import load_model
from tests.families.tiny import hf_config, hf_model, save

TOKENS = torch.arange(20)[None]
IMAGES = ["vision_tower.encoder.layers.0.mlp.fc1.weight", "multi_modal_projector.mm_input_projection_weight"]


def gemma3_old(name: str) -> str:
    return "language_model." + name


def gemma3_new(name: str) -> str:
    return name if name.startswith("lm_head") else "model.language_model." + name.removeprefix("model.")


@pytest.mark.parametrize(("rename", "outside"), [(gemma3_old, ""), (gemma3_new, "model.")])
@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_gemma3_with_images(rename: Callable[[str], str], outside: str, tied: bool, tmp_path: Path) -> None:
    model = hf_model(hf_config("gemma3", tie_word_embeddings=tied))
    folder = save(model, tmp_path / "gemma3")
    tensors = {rename(name): tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors | {outside + name: torch.ones(3) for name in IMAGES}, folder / "model.safetensors")
    text = json.loads((folder / "config.json").read_text())
    whole = {"model_type": "gemma3", "text_config": text, "vision_config": {}, "tie_word_embeddings": tied}
    (folder / "config.json").write_text(json.dumps(whole))
    torch.testing.assert_close(load_model(folder)(TOKENS), model(TOKENS).logits, rtol=0, atol=1e-4)


@torch.no_grad()
def test_gpt2_without_prefix_and_with_mask_buffers(tmp_path: Path) -> None:
    """The layout of the first GPT-2 checkpoints."""
    model = hf_model(hf_config("gpt2"))
    folder = save(model, tmp_path / "gpt2")
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors | {"h.0.attn.bias": torch.ones(1, 1, 4, 4), "h.0.attn.masked_bias": torch.ones(())}, folder / "model.safetensors")
    torch.testing.assert_close(load_model(folder)(TOKENS), model(TOKENS).logits, rtol=0, atol=1e-4)
