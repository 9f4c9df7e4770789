"""verify finds what is wrong, and only that."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import llmkit
from llmkit.checkpoint.files import load_config
from llmkit.checkpoint.quantize import quantize_folder
from llmkit.engine.backend import StepBatch
from llmkit.errors import UsageError
from llmkit.evaluate.verify import default_length, logits_of, relative, verify
from llmkit.kernels import NativeBackend, native_problem
from llmkit.lora.settings import AdapterSettings
from llmkit.lora.write import AdapterWeights, write_adapter
from llmkit.model.backend import TorchBackend
from llmkit.model.layers import Attention
from tests.families.tiny import tiny_folder
from tests.lora.peft import random_terms
from tests.tiny import write_model


@pytest.fixture(params=["native", "torch"])
def runs_in(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> type:
    """The backend that llmkit.load takes."""
    if request.param == "torch":
        monkeypatch.setenv("LLMKIT_KERNELS", "reference")
        return TorchBackend
    if native_problem() is not None:
        pytest.skip(f"no native kernels: {native_problem()}")
    return NativeBackend


def test_relative() -> None:
    assert relative(np.array([1.0, 2.0]), np.array([1.0, 4.0])) == 0.5
    assert relative(np.array([np.nan]), np.array([1.0])) == np.inf


def test_every_row_of_a_good_model_is_the_same(tiny_model_dir: Path, runs_in: type) -> None:
    checks = verify(tiny_model_dir, length=40, device="cpu")
    assert [check.ok for check in checks] == [True] * 5, checks
    assert [check.limit for check in checks[2:]] == ([1e-4, 0, 0] if runs_in is NativeBackend else [1e-5] * 3)


def test_a_quantized_model_is_not_held_to_what_transformers_cannot_read(tiny_model_dir: Path, tmp_path: Path, runs_in: type) -> None:
    folder = quantize_folder(tiny_model_dir, tmp_path / "q4").folder
    checks = verify(folder, length=40, device="cpu")
    assert [check.ok for check in checks] == [None, None, True, True, True], checks
    assert all("quantized" in check.note for check in checks[:2])


def test_a_wrong_model_differs_from_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Our arithmetic is changed by a little; transformers' is not."""
    monkeypatch.setenv("LLMKIT_KERNELS", "reference")
    folder = write_model(tmp_path / "model")
    right = Attention.forward

    def wrong(self: Attention, *arguments: object, **rest: object) -> torch.Tensor:
        return right(self, *arguments, **rest) * 1.01  # type: ignore[arg-type]

    monkeypatch.setattr(Attention, "forward", wrong)
    checks = {check.name: check for check in verify(folder, length=40, device="cpu")}
    assert checks["logits vs transformers"].ok is False
    assert all(checks[name].ok for name in ("cached vs uncached", "chunked vs whole prefill", "batch vs single"))


def test_a_step_that_rounds_is_found(tiny_model_dir: Path, runs_in: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only single-token steps are spoiled: the rows that never take one stay right."""
    right = runs_in.step  # type: ignore[attr-defined]

    def rounded(self: object, batch: StepBatch, hidden: bool = False) -> np.ndarray:
        logits = right(self, batch, hidden)
        return logits.round(2) if len(batch.tokens) == 1 else logits

    monkeypatch.setattr(runs_in, "step", rounded)
    checks = {check.name: check for check in verify(tiny_model_dir, length=40, device="cpu")}
    assert checks["cached vs uncached"].ok is False
    assert checks["chunked vs whole prefill"].ok is True
    assert checks["logits vs transformers"].ok is True


def test_a_damaged_model_is_a_difference_and_not_an_error(tiny_model_dir: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model_dir, tmp_path / "nan")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = torch.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    checks = verify(folder, length=20, device="cpu")
    assert [check.ok for check in checks] == [False] * 5
    assert {check.note for check in checks} == {"a logit is not finite"}
    json.dumps([check.to_dict() for check in checks], allow_nan=False)


def test_frequencies_that_change_with_the_length(tmp_path: Path) -> None:
    """24 tokens of prompt and 64 new ones pass the original context of 48."""
    checks = verify(tiny_folder(tmp_path / "dynamic", "llama-dynamic"), length=24, device="cpu")
    assert [check.ok for check in checks] == [True] * 5, checks


def test_what_transformers_cannot_load_is_not_checked_and_says_why(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    def refuse(*_: object, **__: object) -> None:
        raise ValueError("no such architecture\nmore")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", refuse)
    checks = verify(tiny_model_dir, length=40, device="cpu")
    assert [check.ok for check in checks] == [None, None, True, True, True]
    assert checks[0].note == "transformers could not load it: no such architecture"


def test_steps_agree_with_the_api(tiny_model_dir: Path) -> None:
    llm = llmkit.load(tiny_model_dir, device="cpu")
    ids = list(range(5, 45))
    (logits,) = logits_of(llm.new_backend(), [ids], [40])
    np.testing.assert_allclose(logits, llm.logits(ids), atol=1e-6)


def test_length(tiny_model_dir: Path, tmp_path: Path) -> None:
    config = llmkit.load(tiny_model_dir, device="cpu").config
    assert default_length(config) == 96
    folder = tmp_path / "short"
    shutil.copytree(tiny_model_dir, folder)
    config_json = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config_json | {"max_position_embeddings": 32}))
    assert default_length(llmkit.load(folder, device="cpu").config) == 16
    with pytest.raises(UsageError, match="length 32 is not between 2 and 31"):
        verify(folder, length=32, device="cpu")


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_an_adapter_is_held_to_peft(tmp_path: Path, runs_in: type) -> None:
    folder = tiny_folder(tmp_path / "model", "phi3")
    config, settings = load_config(folder), AdapterSettings(r=3, lora_alpha=5)
    write_adapter(tmp_path / "adapter", AdapterWeights(random_terms(config, ("q_proj.", "up_proj."), settings)), config, settings)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        checks = verify(folder, length=40, device="cpu", adapter=tmp_path / "adapter")
    assert not [w for w in warned if issubclass(w.category, FutureWarning)]  # of PEFT, about transformers: nobody here can do a thing
    assert [check.ok for check in checks] == [True] * 6, checks
    assert [check.name for check in checks[:2]] == ["logits vs PEFT", "greedy tokens vs PEFT"]
    said = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(said | {"target_modules": ["o_proj"]}))  # which PEFT goes by
    checks = verify(folder, length=40, device="cpu", adapter=tmp_path / "adapter")
    assert [check.ok for check in checks] == [False, False, True, True, True, True], checks
