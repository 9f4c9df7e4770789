"""A command opens its model once, and a format that nobody knew runs through everything that reads a model."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import llmkit
from llmkit.checkpoint.files import Checkpoint
from llmkit.checkpoint.formats import FORMATS
from llmkit.checkpoint.formats.dense import Dense
from llmkit.checkpoint.load import load_model
from llmkit.checkpoint.source import ModelSource
from llmkit.errors import CheckpointError
from llmkit.evaluate.verify import verify
from llmkit.planning.check import check_run
from llmkit.planning.model_info import read_facts
from llmkit.quant.schemes import Choice

if TYPE_CHECKING:
    from llmkit.checkpoint.formats import StoredWeight

# Counts in a process of its own, since an audit hook cannot be removed.
COUNTING = """
import json, sys
from collections import Counter
opens = Counter()
def audit(event, args):
    if event == "open" and isinstance(args[0], str) and args[1] is not None and "r" in str(args[1]):
        if args[0].endswith((".json", ".safetensors")):
            opens[args[0]] += 1
sys.addaudithook(audit)
from llmkit.checkpoint.source import ModelSource
names = Counter()
def profile(frame, event, arg):
    if event == "call" and frame.f_code is ModelSource.open.__func__.__code__ and not isinstance(frame.f_locals["model"], ModelSource):
        names[str(frame.f_locals["model"])] += 1
sys.setprofile(profile)
from llmkit.cli.main import run
code = run(sys.argv[1:])
sys.setprofile(None)
print("@" + json.dumps([code, opens, names]), file=sys.stderr)
"""


def counted(*arguments: str) -> tuple[Counter[str], Counter[str]]:
    """How often a command line opened each file, and resolved each name."""
    done = subprocess.run([sys.executable, "-c", COUNTING, *arguments], capture_output=True, text=True, check=True)
    code, opens, names = json.loads(done.stderr.splitlines()[-1].removeprefix("@"))
    assert code == 0, done.stderr
    return Counter(opens), Counter(names)


@pytest.mark.parametrize(
    "command",
    [
        "generate MODEL -p Once -n 2 --temperature 0",
        "chat MODEL -p Once -n 2 --temperature 0",
        "quantize MODEL -o OUT",
        "plan MODEL",
        "generate MODEL -p Once -n 2 --temperature 0 --device cpu --draft-model DRAFT",
        "finetune RECIPE",
    ],
)
def test_a_command_opens_its_model_once(tmp_path: Path, tiny_model_dir: Path, command: str) -> None:
    draft = tmp_path / "draft"
    draft.symlink_to(tiny_model_dir, target_is_directory=True)
    (tmp_path / "data.txt").write_text("Once upon a time there was a dog. " * 20)
    recipe = {"model": str(tiny_model_dir), "data": [{"path": str(tmp_path / "data.txt")}], "lora": {"r": 2}, "max_length": 64}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe | {"output": str(tmp_path / "run"), "max_steps": 1, "device": "cpu"}))
    places = {"MODEL": str(tiny_model_dir), "OUT": str(tmp_path / "out"), "DRAFT": str(draft), "RECIPE": str(tmp_path / "recipe.yaml")}
    opens, names = counted(*(places.get(word, word) for word in command.split()))
    for folder in [tiny_model_dir, draft] if "DRAFT" in command else [tiny_model_dir]:
        assert names[str(folder)] == 1
        assert opens[f"{folder}/config.json"] == 1
        assert opens[f"{folder}/model.safetensors"] == 1
    # Of two vocabularies the files are compared byte by byte; everything else is parsed once.
    assert {path for path, count in opens.items() if path.startswith(str(tiny_model_dir)) and count > 1} <= {
        f"{tiny_model_dir}/tokenizer.json"
    }


def test_shards_are_mapped_once(tmp_path: Path, tiny_model_dir: Path) -> None:
    from llmkit.checkpoint.save import save_model

    save_model(load_model(tiny_model_dir), tmp_path / "shards", source=tiny_model_dir, max_shard_bytes=50_000)
    opens, _ = counted("generate", str(tmp_path / "shards"), "-p", "Once", "-n", "2", "--temperature", "0")
    shards = {path: count for path, count in opens.items() if path.endswith((".safetensors", ".index.json"))}
    assert len(shards) > 2
    assert set(shards.values()) == {1}


def test_an_open_source_is_taken_as_it_is(tiny_model_dir: Path) -> None:
    source = ModelSource.open(tiny_model_dir)
    assert ModelSource.open(source) is source
    assert llmkit.load(source, device="cpu").source is source


# --- a format of its own ------------------------------------------------------------------------------------------------


class Rows8(Dense):
    """Matrices as int8 `NAME` and float32 `NAME.row_scale`, one for each row; dequantized when they are read."""

    quantized = True
    transformers_reads = False

    @cached_property
    def row_scales(self) -> Mapping[str, np.ndarray]:
        tensors = self.source.tensors
        return {
            name.removesuffix(".row_scale"): np.frombuffer(tensors[name].data, np.float32) for name in tensors if name.endswith("_scale")
        }

    def family_tensors(self) -> Checkpoint:
        tensors = {name: tensor for name, tensor in self.source.tensors.items() if not name.endswith(".row_scale")}
        dense = {name: replace(tensor, dtype="F32") if name in self.row_scales else tensor for name, tensor in tensors.items()}
        return Checkpoint(self.source.folder, dense)

    @property
    def storage(self) -> Mapping[str, str | Choice]:
        return dict.fromkeys(self.source.shapes, "F32")

    @property
    def stored_bytes(self) -> int:
        return self.source.tensors.nbytes

    def weight(self, name: str) -> StoredWeight:
        piece = self.pieces[name]
        if piece.tensor.name not in self.row_scales:
            return super().weight(name)
        codes = np.frombuffer(piece.tensor.data, np.int8).reshape(piece.tensor.shape)
        return codes.astype(np.float32) * self.row_scales[piece.tensor.name][:, None]


@pytest.fixture
def rows8(tmp_path: Path, tiny_model_dir: Path) -> Path:
    """The tiny model in that format, and next to it the same numbers in float32."""
    for name in ("rows8", "dense"):
        (tmp_path / name).mkdir()
        for file in tiny_model_dir.iterdir():
            if file.suffix != ".safetensors":
                (tmp_path / name / file.name).write_bytes(file.read_bytes())
    packed, dense = {}, {}
    for name, array in load_file(tiny_model_dir / "model.safetensors").items():
        if array.ndim == 2 and "proj" in name:
            scale = np.abs(array).max(1) / np.float32(127)
            packed[name] = np.round(array / scale[:, None]).astype(np.int8)
            packed[f"{name}.row_scale"] = scale
            dense[name] = packed[name].astype(np.float32) * scale[:, None]
        else:
            packed[name] = dense[name] = array.astype(np.float32)
    save_file(packed, tmp_path / "rows8" / "model.safetensors")
    save_file(dense, tmp_path / "dense" / "model.safetensors")
    config = json.loads((tmp_path / "rows8" / "config.json").read_text())
    (tmp_path / "rows8" / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "rows8"}}))
    return tmp_path / "rows8"


def test_a_new_format_is_one_class(rows8: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is quantized \('rows8'\), which llmkit does not read"):
        llmkit.load(rows8)
    formats = {**FORMATS, "rows8": Rows8}
    source, dense = ModelSource.open(rows8, formats=formats), ModelSource.open(rows8.parent / "dense")

    model, expected = load_model(source, "float32"), load_model(dense, "float32")  # PyTorch
    assert all(torch.equal(parameter, expected.get_parameter(name)) for name, parameter in model.named_parameters())
    llm = llmkit.load(source, device="cpu")  # native kernels
    assert llm.runner.exact
    prompt = "Once upon a time"
    assert np.array_equal(llm.logits(prompt), llmkit.load(dense, device="cpu", dtype="float32").logits(prompt))
    assert llm.generate(prompt, max_tokens=4, temperature=0).usage.completion_tokens == 4
    facts = read_facts(source)
    assert facts.stored_bytes < read_facts(dense).stored_bytes
    check_run(source, {})
    checks = {check.name: check.ok for check in verify(source, length=24, device="cpu")}
    assert False not in checks.values()
    assert checks["cached vs uncached"]
