"""`llmkit plan` as a person calls it, and the commands that ask it before they load anything."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from llmkit.checkpoint.source import ModelSource
from llmkit.cli.main import run
from llmkit.planning.model_info import read_facts
from tests.planning.test_plan import LLAMA_1B, SMOLLM, zeros_folder
from tests.tiny import TEXT, write_model

Said = Callable[..., tuple[int, str, str]]


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Said:
    """A command in this process: (exit code, standard output, standard error)."""
    for name in [name for name in os.environ if name.startswith("LLMKIT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("LLMKIT_DEVICE", "cpu")

    def call(*arguments: object, memory: str | None = None) -> tuple[int, str, str]:
        if memory is not None:
            monkeypatch.setenv("LLMKIT_MEMORY", memory)
        code = run([*map(str, arguments)])
        out = capsys.readouterr()
        return code, out.out, out.err

    return call


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shape of Llama 3.2 1B; no byte of its weights is on the disk."""
    return zeros_folder(tmp_path_factory.mktemp("large") / "1b", LLAMA_1B)


def write_recipe(folder: Path, **keys: object) -> Path:
    (folder / "data.txt").write_text(TEXT)
    recipe = {"data": [{"path": str(folder / "data.txt")}], "output": str(folder / "run"), "max_steps": 1000, "device": "cpu", **keys}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "recipe.yaml"


def test_one_flat_object(said: Said, large: Path) -> None:
    code, out, err = said("plan", large, "--memory", "8GB", "-c", "8192", "--json")
    assert (code, err) == (0, "")
    result = json.loads(out)
    assert not any(isinstance(value, dict | list) for value in result.values())
    assert (result["model"], result["device"], result["parameters"]) == (str(large), "cpu", 1_235_814_400)
    assert result["weights_bytes"] == 2_471_628_800
    assert result["KV_cache_bytes"] == 8192 * 16 * 2 * 8 * 64 * 2
    terms = [value for name, value in result.items() if name.endswith("_bytes") and not name.startswith(("total", "available"))]
    assert result["total_bytes"] == sum(terms)
    assert (result["available_bytes"], result["fits"]) == (8_000_000_000, True)
    assert json.loads(said("plan", large, "--json")[1])["available_bytes"] > 10**8


def test_what_does_not_fit_and_what_would(said: Said, large: Path) -> None:
    code, out, err = said("plan", large, "--memory", "2GB")
    assert (code, err) == (4, "")
    for line in ("weights", "2.47 GB", "KV cache", "in all", "It does not fit. With llmkit quantize", "--scheme q8 it takes about 1.5"):
        assert line in out
    code, out, _ = said("plan", large, "--memory", "3GB", "-c", "32768", "--json")
    result = json.loads(out)
    assert code == 4
    assert result["remedy_bytes"] <= 3_000_000_000
    assert result["remedy"] == f"llmkit quantize {large} -o FOLDER --scheme q8"
    assert said("plan", large, "--memory", "4GB", "-c", "32768")[0] == 0
    out = said("plan", large, "--memory", "1.5GB", "-c", "32768")[1]
    assert "--scheme q4, then --kv-bits 8, it takes about" in out
    many = json.loads(said("plan", large, "--memory", "9GB", "--sequences", "4", "--kv-bits", "8", "--dtype", "float32", "--json")[1])
    assert many["weights_bytes"] == 4 * 1_235_814_400
    assert many["sequences"] == 4


def test_a_recipe(said: Said, large: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, model=str(large), batch_size=8, max_length=512, checkpointing=False)
    result = json.loads(said("plan", large, recipe, "batch_size=4", "--memory", "64GB", "--json")[1])
    assert (result["tokens_per_step"], result["tokens"], result["tokens_from"]) == (2048, 2_048_000, "1,000 steps of 2,048")
    assert result["optimizer_bytes"] == 8 * result["parameters"] == 8 * result["trained_parameters"]
    assert "expected_loss" not in result  # it is not trained from scratch
    assert result["training_flops"] > 6 * 1.2e9 * result["tokens"]
    assert not result["checkpointing"]
    by_need = json.loads(said("plan", large, recipe, "batch_size=32", "checkpointing=null", "--memory", "40GB", "--json")[1])
    assert (by_need["checkpointing"], by_need["fits"]) == (True, True)
    needed = json.loads(said("plan", large, recipe, "--memory", "64GB", "--json")[1])["total_bytes"]
    assert needed > result["total_bytes"]
    code, out, err = said("plan", large, recipe, "--memory", needed - 1)
    assert (code, err) == (4, "")
    assert "It does not fit. With " in out
    assert "estimate of training" in out
    remedy = json.loads(said("plan", large, recipe, "--memory", needed - 1, "--json")[1])["remedy"].split()
    assert remedy == ["batch_size=4", "grad_accumulation=2"]
    assert said("plan", large, recipe, *remedy, "--memory", needed - 1)[0] == 0  # what is proposed is taken as it stands


def test_a_recipe_from_scratch_and_its_cost(said: Said, tmp_path: Path) -> None:
    from_scratch = {name: value for name, value in SMOLLM.items() if name != "vocab_size"}
    recipe = write_recipe(tmp_path, model=from_scratch, tokenizer={"vocab_size": 49152}, max_length=1024)
    arguments = ["plan", recipe, "--tokens", "1e10", "--flops", "1e15", "--watts", "700", "--price", "3", "--memory", "64GB"]
    code, out, err = said(*arguments, "--json")
    assert (code, err) == (0, "")
    result = json.loads(out)
    assert result["hours"] == pytest.approx(result["training_flops"] / 4e14 / 3600)
    assert result["energy_kwh"] == pytest.approx(0.7 * result["hours"])
    assert result["cost"] == pytest.approx(3 * result["hours"])
    assert 2.5 < result["expected_loss"] < 4
    assert "2404.10102" in result["expected_loss_from"]
    out = said(*arguments)[1]
    for line in ("expected loss", "arXiv:2203.15556", "arXiv:2404.10102", "3 for an hour", "40% of 1e+15 operations/s"):
        assert line in out
    minutes = json.loads(said("plan", recipe, "max_steps=null", "max_minutes=30", "--memory", "64GB", "--json")[1])
    assert minutes["hours"] == pytest.approx(0.5)
    assert minutes["tokens_from"] == "30 minutes at that speed"


def test_errors(said: Said, model: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, model=str(model))
    for arguments, code, message in (
        ([], 2, "Missing argument 'MODEL'"),
        ([model, "--memory", "much"], 2, "'much' is no amount of memory. Write it as 8GB"),
        ([tmp_path / "nothing"], 1, "does not exist"),
        (["org/nothing"], 1, "org/nothing is no folder here and not in the hub cache, and nothing is downloaded to look at it"),
        ([model, "batch_size=2"], 2, "'batch_size=2' changes a key, but of no recipe"),
        ([model, tmp_path / "no.yaml"], 2, "cannot be read"),
        ([model, recipe, "bacth_size=2"], 2, "Did you mean batch_size?"),
        ([model, recipe, "-c", "100"], 2, "--ctx-size has no effect on training"),
        ([model, "--price", "2"], 2, "--price has no effect without a recipe or --tokens"),
        ([tmp_path / "recipe.yaml", "model=not/here"], 1, "not in the hub cache"),
    ):
        found, out, err = said("plan", *arguments)
        assert (found, out) == (code, ""), err
        assert err.startswith("error: ")
        assert message in err
        assert err.count("\n") == 1


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_a_model_that_does_not_fit_is_not_loaded(said: Said, large: Path, command: str) -> None:
    code, out, err = said(command, large, "-p", "Hello", memory="1GB")
    assert (code, out) == (4, "")
    assert f"{large} needs about 2.66 GB (weights 2.47 GB, " in err
    assert "and 1.00 GB are free. With llmkit quantize" in err
    assert "--scheme q4 it takes about" in err
    assert err.count("\n") == 1


def test_a_context_that_does_not_fit(said: Said, large: Path) -> None:
    code, _, err = said("generate", large, "-p", "x", "-c", "131072", memory="5GB")
    assert code == 4
    assert "With --kv-bits 8 it takes about" in err
    code, _, err = said("generate", large, "-p", "x", "--draft-model", large, memory="4GB")
    assert code == 4
    assert "draft model 2.61 GB" in err


def test_quantizing_that_does_not_fit(said: Said, large: Path, tmp_path: Path) -> None:
    code, out, err = said("quantize", large, "-o", tmp_path / "out", memory="300MB")
    assert (code, out) == (4, "")
    assert err.startswith(f"error: quantizing {large} needs about")
    assert os.listdir(tmp_path) == []


def test_training_that_does_not_fit(said: Said, large: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, model=str(large), max_length=512)
    code, out, err = said("train", recipe, memory="8GB")
    assert (code, out) == (4, "")
    assert err.startswith(f"error: training {large} needs about")
    assert not (tmp_path / "run").exists()


def test_what_is_said_of_the_memory_must_be_an_amount(said: Said, model: Path) -> None:
    code, _, err = said("generate", model, "-p", "Once", memory="lots")
    assert code == 2
    assert "'lots' is no amount of memory" in err


def test_what_fits_is_run(said: Said, model: Path) -> None:
    code, out, err = said("generate", model, "-p", "Once", "-n", "3", "--ignore-eos", memory="1GB")
    assert (code, err) == (0, "")
    assert out
    assert read_facts(ModelSource.open(model)).stored_bytes < 10**6


def test_a_gpu_that_is_elsewhere(said: Said, model: Path, tmp_path: Path) -> None:
    """What it needs there can be told here; how fast it is cannot."""
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    recipe = write_recipe(tmp_path, model=str(model))
    code, out, err = said("plan", recipe, "--device", "cuda", "--memory", "8GB")
    assert (code, err) == (0, "")
    assert "It fits." in out
    assert "time and cost are not estimated, as there is no cuda here to be measured; --flops says how fast it is" in out
    code, out, err = said("plan", recipe, "--device", "cuda", "--memory", "8GB", "--flops", "1e14")
    assert (code, err) == (0, "")
    assert "40% of 1e+14 operations/s" in out
    for command in (("plan", recipe, "--device", "cuda"), ("finetune", recipe, "device=cuda"), ("plan", model, "--device", "cuda")):
        code, out, err = said(*command)
        assert (code, out) == (2, "")
        assert err.startswith("error: this machine has no CUDA GPU that torch can use. Take another device; llmkit plan")
    code, out, err = said("chat", model, "-p", "A", "--device", "cuda")
    assert (code, out) == (2, "")
    assert err.startswith("error: device 'cuda' cannot be used: ")
    code, _, err = said("finetune", recipe, "device=cuda", memory="8GB")
    assert code == 2
    assert err.startswith("error: device 'cuda' cannot be used: ")
    assert not (tmp_path / "run").exists()
