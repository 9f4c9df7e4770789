"""What is saved opens in transformers with identical logits; what cannot be saved leaves nothing behind."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from llmkit.checkpoint import save
from llmkit.checkpoint.files import open_checkpoint, read_json
from llmkit.checkpoint.load import load_model, load_model_with_report
from llmkit.checkpoint.save import save_model
from llmkit.errors import CheckpointError, ConfigError, UsageError
from llmkit.families import MODEL_TYPES, read_config
from llmkit.model.transformer import Transformer
from tests.families import tiny

from . import raw

TOKENS = torch.arange(2, 18).view(1, -1) * 5


def stored(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {name: (tensor.dtype, tensor.shape, bytes(tensor.data)) for name, tensor in open_checkpoint(folder).items()}


def hf_logits(folder: Path) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    with torch.no_grad():
        return model(TOKENS).logits


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_every_family_has_a_tiny_model() -> None:
    assert {tiny.hf_config(name).model_type for name in tiny.VARIANTS} >= MODEL_TYPES.keys() - {"gemma3"}


@pytest.mark.parametrize("variant", tiny.VARIANTS)
def test_round_trip(tmp_path: Path, variant: str) -> None:
    source = tiny.tiny_folder(tmp_path / "source", variant)
    save_model(load_model(source), tmp_path / "saved", source=source)
    assert stored(tmp_path / "saved") == stored(source)
    assert read_json(tmp_path / "saved" / "config.json") == read_json(source / "config.json")
    assert files(tmp_path / "saved") == files(source)
    assert torch.equal(hf_logits(tmp_path / "saved"), hf_logits(source))


@pytest.mark.parametrize("variant", ["mixtral", "qwen3-moe", "qwen3-moe-window"])
def test_stacked_experts_are_read_too(tmp_path: Path, variant: str) -> None:
    """transformers writes one tensor per expert, or, with save_original_format=False, one per layer."""
    model = tiny.hf_model(tiny.hf_config(variant))
    model.save_pretrained(tmp_path / "single")
    model.save_pretrained(tmp_path / "stacked", save_original_format=False)
    assert any(name.endswith("experts.gate_up_proj") for name in stored(tmp_path / "stacked"))
    single, stacked = load_model(tmp_path / "single").state_dict(), load_model(tmp_path / "stacked").state_dict()
    assert single.keys() == stacked.keys()
    assert all(torch.equal(single[name], stacked[name]) for name in single)
    save_model(load_model(tmp_path / "stacked"), tmp_path / "saved")
    assert stored(tmp_path / "saved") == stored(tmp_path / "single")


@pytest.mark.parametrize(
    ("shape", "what"), [([6, 40, 24], "6 experts"), ([5, 39, 24], "39 rows"), ([2**40, 0, 24], "no rows"), ([], "a scalar")]
)
def test_misshapen_stacks(tmp_path: Path, shape: list[int], what: str) -> None:
    tiny.hf_model(tiny.hf_config("mixtral")).save_pretrained(tmp_path, save_original_format=False)
    tensors = stored(tmp_path)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    raw.write(tmp_path / "model.safetensors", {n: (d, list(s), b) for n, (d, s, b) in tensors.items()} | {name: raw.floats(shape, 1.0)})
    with pytest.raises(CheckpointError, match=f"wrong shape: '{name}' .* cannot be cut into"):
        load_model(tmp_path)


def test_gpt2_body_without_prefix(tmp_path: Path) -> None:
    """The published gpt2 has no `transformer.` and carries its causal masks as buffers."""
    source = tiny.tiny_folder(tmp_path / "source", "gpt2")
    tensors = {name.removeprefix("transformer."): (d, list(s), b) for name, (d, s, b) in stored(source).items()}
    tensors["h.0.attn.bias"] = raw.floats([1, 1, 128, 128], 1.0)
    shutil.copytree(source, tmp_path / "bare")
    raw.write(tmp_path / "bare" / "model.safetensors", tensors)
    save_model(load_model(tmp_path / "bare"), tmp_path / "saved")
    assert stored(tmp_path / "saved") == stored(source)


def test_the_text_part_of_an_image_model(tmp_path: Path) -> None:
    """Gemma 3 as published: the text model under `language_model.`, its configuration in text_config, and a vision tower."""
    text = tiny.tiny_folder(tmp_path / "text", "gemma3")
    tensors = {f"language_model.{name}": (d, list(s), b) for name, (d, s, b) in stored(text).items()}
    tensors["vision_tower.vision_model.post_layernorm.weight"] = raw.floats([3], 1.0)
    inner = read_json(text / "config.json")
    (tmp_path / "whole").mkdir()
    outer = {"model_type": "gemma3", "text_config": inner, "vision_config": {}, "dtype": inner.pop("dtype")}
    (tmp_path / "whole" / "config.json").write_text(json.dumps(outer))
    raw.write(tmp_path / "whole" / "model.safetensors", tensors)
    model, report = load_model_with_report(tmp_path / "whole")
    assert report.skipped == ("vision_tower.vision_model.post_layernorm.weight",)
    save_model(model, tmp_path / "saved")
    assert stored(tmp_path / "saved") == stored(text)
    assert torch.equal(hf_logits(tmp_path / "saved"), hf_logits(text))


@pytest.mark.real
@pytest.mark.parametrize("name", ["stories260K-hf", "gpt-nano-sort-hf"])
def test_trained_models(tmp_path: Path, data_dir: Path, name: str) -> None:
    source = data_dir / "models" / name
    save_model(load_model(source), tmp_path / "saved", source=source)
    assert stored(tmp_path / "saved") == stored(source)
    assert read_json(tmp_path / "saved" / "config.json") == read_json(source / "config.json")


def test_conversion_is_written_into_the_config(tmp_path: Path) -> None:
    old = raw.llama_folder(tmp_path / "old", auto_map={"AutoModel": "x.Y"})
    save_model(load_model(old, "bfloat16"), tmp_path / "a")
    save_model(load_model(old), tmp_path / "b", dtype="bfloat16")
    expected = {**raw.LLAMA, "torch_dtype": "bfloat16"}  # the old spelling stays; code is neither run nor passed on
    assert read_json(tmp_path / "a" / "config.json") == expected == read_json(tmp_path / "b" / "config.json")
    assert stored(tmp_path / "a") == stored(tmp_path / "b")
    assert {dtype for dtype, _, _ in stored(tmp_path / "a").values()} == {"BF16"}


def test_sharding(tmp_path: Path) -> None:
    source = tiny.tiny_folder(tmp_path / "source", "gemma2")
    save_model(load_model(source), tmp_path / "saved", max_shard_bytes=20_000)
    shards = sorted(tmp_path.glob("saved/*.safetensors"))
    index = json.loads((tmp_path / "saved" / "model.safetensors.index.json").read_text())
    assert len(shards) > 2
    assert [shard.name for shard in shards] == [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    assert all(shard.stat().st_size < 22_000 for shard in shards)
    assert index["metadata"]["total_size"] == sum(len(data) for _, _, data in stored(source).values())
    assert stored(tmp_path / "saved") == stored(source)
    assert torch.equal(hf_logits(tmp_path / "saved"), hf_logits(source))
    save_model(load_model(source), tmp_path / "one-each", max_shard_bytes=1)
    assert len(list(tmp_path.glob("one-each/*.safetensors"))) == len(stored(source))


def test_side_files_are_copied(tmp_path: Path) -> None:
    source = raw.llama_folder(tmp_path / "source")
    (source / "additional_chat_templates").mkdir()
    wanted = ["generation_config.json", "tokenizer.json", "tokenizer.model", "qwen.tiktoken", "additional_chat_templates/tool_use.jinja"]
    for name in [*wanted, "modeling_x.py", "pytorch_model.bin", "README.md"]:
        (source / name).write_text(name)
    save_model(load_model(source), tmp_path / "saved", source=source)
    copied = {str(path.relative_to(tmp_path / "saved")) for path in (tmp_path / "saved").rglob("*") if path.is_file()}
    assert copied == {*wanted, "config.json", "model.safetensors"}
    assert all((tmp_path / "saved" / name).read_text() == name for name in wanted)
    with pytest.raises(UsageError, match="is not a folder, so there is no tokenizer"):
        save_model(load_model(source), tmp_path / "again", source=tmp_path / "nowhere")


def test_target_folders(tmp_path: Path) -> None:
    model = load_model(raw.llama_folder(tmp_path / "source"))
    (tmp_path / "empty").mkdir()
    save_model(model, tmp_path / "empty")
    save_model(model, tmp_path / "new" / "deep")
    with pytest.raises(UsageError, match="exists and is not empty"):
        save_model(model, tmp_path / "empty")
    (tmp_path / "empty" / "old.txt").touch()
    save_model(model, tmp_path / "empty", overwrite=True)
    assert files(tmp_path / "empty") == ["config.json", "model.safetensors"]
    save_model(model, tmp_path / "source", overwrite=True)  # onto the very files that are mapped
    assert stored(tmp_path / "source") == stored(tmp_path / "empty")

    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "diary.txt").write_text("dear diary")
    with pytest.raises(UsageError, match=r"no config.json\), so it is not overwritten"):
        save_model(model, tmp_path / "home", overwrite=True)
    with pytest.raises(UsageError, match="is a file"):
        save_model(model, tmp_path / "home" / "diary.txt", overwrite=True)
    with pytest.raises(UsageError, match="max_shard_bytes is 0"):
        save_model(model, tmp_path / "x", max_shard_bytes=0)
    assert files(tmp_path) == ["empty", "home", "new", "source"]


def test_a_model_without_config_json(tmp_path: Path) -> None:
    from dataclasses import replace

    model = Transformer(replace(read_config(raw.LLAMA), hf={}))
    with pytest.raises(ConfigError, match=r"was not read from a config.json"):
        save_model(model, tmp_path / "x")
    assert files(tmp_path) == []


class FullDisk:
    """A file that takes `room` bytes and then fails."""

    def __init__(self, error: BaseException, room: int) -> None:
        self.error, self.room = error, room

    def __call__(self, descriptor: int) -> None:
        self.room -= os.fstat(descriptor).st_size
        if self.room < 0:
            raise self.error


@pytest.mark.parametrize("room", [0, 700, 1500])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("existing", [False, True])
def test_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int, error: BaseException, existing: bool) -> None:
    source = raw.llama_folder(tmp_path / "source")
    model = load_model(source)
    if existing:
        raw.llama_folder(tmp_path / "target", raw.llama_tensors(2.0))
    before = stored(tmp_path / "target") if existing else None
    monkeypatch.setattr(save.os, "fsync", FullDisk(error, room))
    expected: Any = CheckpointError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected, match="No space left on device" if expected is CheckpointError else None):
        save_model(model, tmp_path / "target", overwrite=existing, max_shard_bytes=200)
    assert files(tmp_path) == ["source", "target"][: 1 + existing]
    if existing:
        assert stored(tmp_path / "target") == before


def test_a_failed_rename_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(raw.llama_folder(tmp_path / "source"))
    raw.llama_folder(tmp_path / "target", raw.llama_tensors(2.0))
    before, rename = stored(tmp_path / "target"), Path.rename

    def fail(path: Path, target: Path) -> Path:
        if path.name.endswith(".partial"):
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(KeyboardInterrupt):
        save_model(model, tmp_path / "target", overwrite=True)
    assert files(tmp_path) == ["source", "target"]
    assert stored(tmp_path / "target") == before


def test_targets_that_cannot_be_made(tmp_path: Path) -> None:
    model = load_model(raw.llama_folder(tmp_path / "source"))
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for target in ("loop", "loop/x", "x" * 300, "new/" + "x" * 300, "source/config.json/x"):
        with pytest.raises(CheckpointError, match="Cannot save"):
            save_model(model, tmp_path / target)
    assert files(tmp_path) == ["loop", "source"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    import subprocess

    disk = tmp_path / "disk"
    disk.mkdir()
    try:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        done = False
    if not done:
        pytest.skip("mounting needs root")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_disk_that_is_really_full(tmp_path: Path, small_disk: Path) -> None:
    model = load_model(tiny.tiny_folder(tmp_path / "source"))
    with pytest.raises(CheckpointError, match=r"No space left on device. Nothing was written"):
        save_model(model, small_disk / "target")
    with pytest.raises(CheckpointError, match=r"No space left on device"):
        save_model(model, small_disk / "new" / "folders" / "target")
    assert files(small_disk) == []
