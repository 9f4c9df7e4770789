"""Every method of fine-tuning, run to its end on a tiny model, and what it leaves: adapters that PEFT opens, exact resumption."""

from __future__ import annotations

import json
import math
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import llmkit
from llmkit.checkpoint.load import load_model
from llmkit.errors import CheckpointError, UsageError
from llmkit.lora.adapter import read_adapter
from llmkit.model.layers import PLAIN
from llmkit.text.tokenizer import Tokenizer
from llmkit.training.data.packing import Batch, make_batch, rows_of
from llmkit.training.objective import Dpo, Orpo, answers
from llmkit.training.recipe import Recipe, from_dict, to_dict
from llmkit.training.run import run_recipe
from tests.families.tiny import tiny_folder
from tests.training.conftest import MODEL

ADAPTER = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path, text_file: Path) -> Path:
    """A tiny Llama that has learned a little of the tests' stories."""
    folder = tmp_path_factory.mktemp("base")
    settings = {
        "model": {**MODEL, "max_position_embeddings": 64, "architectures": ["LlamaForCausalLM"]},
        "tokenizer": str(tokenizer_folder),
    }
    run = {
        "data": [{"path": str(text_file)}],
        "output": str(folder),
        "max_length": 64,
        "max_steps": 40,
        "learning_rate": 1e-2,
        "device": "cpu",
    }
    return run_recipe(from_dict({**settings, **run, "eval_every": 0, "save_minutes": 0}))


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    path = tmp_path / "chats.jsonl"
    rows = [{"messages": [{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": f"it is {n} {n}"}]} for n in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"say {n}", "chosen": f"yes, {n}", "rejected": f"no {n}, not that"} for n in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def make(make_recipe: Callable[..., Recipe], base: Path, chats: Path) -> Callable[..., Recipe]:
    def made(**keys: Any) -> Recipe:
        settings = {"model": str(base), "tokenizer": None, "data": [{"path": str(chats)}], "lora": {"r": 4}, "max_length": 32}
        return make_recipe(**{**settings, **keys})

    return made


def same_weights(one: Path, two: Path) -> bool:
    """Bit for bit; the header of a safetensors file has no fixed order."""
    a, b = load_file(one / ADAPTER), load_file(two / ADAPTER)
    return a.keys() == b.keys() and all(torch.equal(tensor, b[name]) for name, tensor in a.items())


def losses(recipe: Recipe, name: str = "loss") -> list[float]:
    lines = (Path(recipe.output) / "metrics.jsonl").read_text().splitlines()
    return [entry[name] for entry in map(json.loads, lines) if name in entry]


@pytest.mark.parametrize(
    "keys",
    [
        {"lora": {"r": 4}},
        {"lora": {"r": 4, "use_rslora": True, "target_modules": ["q_proj", "down_proj"]}},
        {"lora": {"r": 4, "use_dora": True}},
        {"lora": {"r": 4, "dropout": 0.1}, "checkpointing": True},
    ],
)
def test_an_adapter_learns_and_peft_opens_it(make: Callable[..., Recipe], base: Path, keys: dict[str, Any]) -> None:
    recipe = make(max_steps=30, **keys)
    folder = run_recipe(recipe)
    assert folder.name == "adapter"
    found = losses(recipe)
    assert found[-1] < found[0] - 1
    ids = torch.arange(5, 25).unsqueeze(0)
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    with torch.no_grad():
        expected = peft(ids).logits[0]
    llm = llmkit.load(base, adapter=folder, device="cpu", dtype="float32")
    torch.testing.assert_close(torch.from_numpy(llm.logits(ids[0].tolist())), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(torch.from_numpy(llmkit.load(base, device="cpu").logits(ids[0].tolist())), expected, atol=1e-2)


@pytest.mark.parametrize("scheme", ["q4", "q8", "nf4"])
def test_a_quantized_base_learns_as_well(make: Callable[..., Recipe], scheme: str, tmp_path: Path) -> None:
    curves = []
    for forward in (True, False) if scheme != "nf4" else (None,):
        recipe = make(max_steps=25, quantize=scheme, integer_forward=forward, output=str(tmp_path / f"run{forward}"))
        run_recipe(recipe)
        curves.append(losses(recipe))
    dense = make(max_steps=25, output=str(tmp_path / "dense"))
    run_recipe(dense)
    for curve in curves:
        assert curve[-1] == pytest.approx(losses(dense)[-1], abs=0.25)
    if len(curves) == 2:  # integers forwards: the same curve, but for the rounding of activations
        assert max(abs(a - b) for a, b in zip(*curves, strict=True)) < 0.1


def test_checkpointing_changes_nothing(make: Callable[..., Recipe], tmp_path: Path) -> None:
    assert same_weights(*(run_recipe(make(output=str(tmp_path / str(on)), checkpointing=on)) for on in (True, False)))


def test_training_goes_on_from_an_adapter(make: Callable[..., Recipe], tmp_path: Path) -> None:
    first = make(max_steps=20)
    folder = run_recipe(first)
    second = make(max_steps=2, adapter=str(folder), output=str(tmp_path / "second"))
    run_recipe(second)
    assert losses(second)[0] < losses(first)[0] - 1
    with pytest.raises(UsageError, match=r"has the rank 4 on .*, lora\.r is 2"):
        run_recipe(make(adapter=str(folder), lora={"r": 2}, output=str(tmp_path / "third")))


def test_all_weights_and_plain_text(make: Callable[..., Recipe], text_file: Path) -> None:
    """Continued pretraining: no adapter, text of any kind."""
    recipe = make(lora=None, data=[{"path": str(text_file)}], max_steps=20)
    folder = run_recipe(recipe)
    assert folder.name == "model"
    assert losses(recipe)[-1] < losses(recipe)[0] - 1
    load_model(folder)


@pytest.mark.parametrize("keys", [{"loss": "dpo"}, {"loss": "dpo", "lora": None}, {"loss": "orpo"}])
def test_preferences_are_learned(make: Callable[..., Recipe], pairs: Path, keys: dict[str, Any]) -> None:
    recipe = make(data=[{"path": str(pairs)}], max_steps=30, held_out=0.2, **keys)
    run_recipe(recipe)
    assert losses(recipe, "eval_accuracy")[-1] > 0.9
    if keys["loss"] == "dpo":
        assert losses(recipe)[0] == pytest.approx(math.log(2), abs=1e-3)  # nothing has changed yet
    assert losses(recipe)[-1] < losses(recipe)[0]


def test_preference_losses_are_their_formulas(make: Callable[..., Recipe], pairs: Path, base: Path, tokenizer: Tokenizer) -> None:
    """Packed pairs against each answer alone through transformers."""
    from llmkit.training.data.sources import load_corpora

    corpus, _, _ = load_corpora(make(data=[{"path": str(pairs)}]).data, tokenizer, 0.0, 32, preference=True)
    batch: Batch = make_batch(corpus, rows_of(corpus, range(8), 32, group=2))
    theirs = AutoModelForCausalLM.from_pretrained(base)
    logprobs, lengths = [], []
    for document in batch.documents:
        span = slice(corpus.offsets[document], corpus.offsets[document + 1])
        ids, learned = torch.from_numpy(corpus.tokens[span].astype("int64")), torch.from_numpy(corpus.learned[span])
        with torch.no_grad():
            found = theirs(ids.unsqueeze(0)).logits[0].log_softmax(-1)[:-1].gather(1, ids[1:, None]).squeeze(1)
        logprobs.append(float(found[learned[1:]].sum()))
        lengths.append(int(learned[1:].sum()))
    good, bad = torch.tensor(logprobs[0::2]), torch.tensor(logprobs[1::2])
    twice = make_batch(corpus, rows_of(corpus, [0, 1, 0, 1], 32, group=2))
    assert Orpo(0.2).normalizer(twice) == 2  # the same pair twice, as of a source with the weight 2
    model, other = load_model(base), load_model(base)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.01)
    was_good, was_bad, _ = answers(other, batch, PLAIN)
    expected = -torch.nn.functional.logsigmoid(0.3 * ((good - was_good) - (bad - was_bad))).sum()
    torch.testing.assert_close(Dpo((other, PLAIN), 0.3).loss_sum(model, batch), expected, rtol=1e-4, atol=1e-4)

    mean_good, mean_bad = good / torch.tensor(lengths[0::2]), bad / torch.tensor(lengths[1::2])
    odds = torch.logit(mean_good.exp()) - torch.logit(mean_bad.exp())
    expected = (-mean_good - 0.2 * torch.nn.functional.logsigmoid(odds)).sum()
    torch.testing.assert_close(Orpo(0.2).loss_sum(model, batch), expected, rtol=1e-4, atol=1e-4)


def test_a_student_learns_its_teacher(make: Callable[..., Recipe], base: Path, tmp_path: Path) -> None:
    teacher = run_recipe(make(lora=None, max_steps=40, output=str(tmp_path / "teacher")))
    recipe = make(
        lora=None, max_steps=30, loss="distill", distill={"teacher": str(teacher), "temperature": 2.0, "weight": 1.0}, held_out=0.2
    )
    run_recipe(recipe)
    assert losses(recipe, "eval_distillation")[-1] < 0.5 * losses(recipe)[0]
    assert losses(recipe, "eval_loss")[-1] < 4.5  # log(300) is 5.7


def test_a_teacher_with_another_vocabulary_is_refused(make: Callable[..., Recipe], base: Path, tmp_path: Path) -> None:
    """Of the same size, so that nothing else would notice."""
    teacher = shutil.copytree(base, tmp_path / "teacher")
    described = json.loads((teacher / "tokenizer.json").read_text())
    vocab = described["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (teacher / "tokenizer.json").write_text(json.dumps(described))
    with pytest.raises(UsageError, match="same tokenizer"):
        run_recipe(make(loss="distill", distill={"teacher": str(teacher)}))


def test_a_result_is_not_replaced_by_another_run(make: Callable[..., Recipe]) -> None:
    recipe = make(max_steps=1)
    run_recipe(recipe)
    (Path(recipe.output) / "checkpoint.pt").unlink()
    with pytest.raises(UsageError, match="would be replaced"):
        run_recipe(recipe)


def test_the_best_weights_are_kept_and_a_run_that_gains_nothing_ends(make: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = make(max_steps=60, held_out=0.3, learning_rate=0.2, eval_every=2, keep="best", early_stop=3, schedule="constant")
    folder = run_recipe(recipe)
    found = losses(recipe, "eval_loss")
    best = min(range(len(found)), key=found.__getitem__)
    assert len(found) == best + 1 + 3
    assert len(found) < 30
    again = make(max_steps=2 * (best + 1), held_out=0.3, learning_rate=0.2, schedule="constant", output=str(tmp_path / "short"))
    assert same_weights(run_recipe(again), folder)


def test_killed_at_any_moment_it_goes_on_exactly(make: Callable[..., Recipe], tmp_path: Path) -> None:
    keys = {"max_steps": 25, "save_every": 1, "lora": {"r": 4, "dropout": 0.1}}
    whole = run_recipe(make(output=str(tmp_path / "whole"), **keys))
    recipe = make(output=str(tmp_path / "killed"), **keys)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(to_dict(recipe)))
    process = subprocess.Popen(
        [sys.executable, "-m", "llmkit", "finetune", str(tmp_path / "recipe.yaml")],
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
    )
    checkpoint = tmp_path / "killed" / "checkpoint.pt"
    while not checkpoint.exists():
        assert process.poll() is None
        time.sleep(0.02)
    time.sleep(0.1)
    process.kill()
    process.communicate()
    assert same_weights(run_recipe(recipe, resume=True), whole)
    with pytest.raises(CheckpointError, match=r"other weights|does not fit"):
        run_recipe(make(output=str(tmp_path / "killed"), **{**keys, "lora": {"r": 8}}), resume=True)


def test_a_full_disk_names_the_file_and_leaves_the_last_checkpoint(make: Callable[..., Recipe]) -> None:
    recipe = make(max_steps=1, lora={"r": 64})
    run_recipe(recipe)
    checkpoint = Path(recipe.output) / "checkpoint.pt"
    before = checkpoint.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        with pytest.raises(OSError, match=r"checkpoint\.pt"):
            run_recipe(replace(recipe, max_steps=2), resume=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert checkpoint.read_bytes() == before
    assert not list(checkpoint.parent.glob("*.tmp"))


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"lora": {"r": 4, "alpha": 320}}, r"lora\.alpha"),
        ({"quantize": "q4"}, "quantize"),
        ({"model": "other"}, "another model"),
    ],
)
def test_no_run_goes_on_with_weights_that_mean_something_else(
    make: Callable[..., Recipe], base: Path, tmp_path: Path, keys: dict[str, Any], words: str
) -> None:
    run_recipe(make(max_steps=1))
    if "model" in keys:  # of the same shape
        other = shutil.copytree(base, tmp_path / "other")
        save_file({name: 1.5 * t for name, t in load_file(base / "model.safetensors").items()}, other / "model.safetensors")
        keys = {"model": str(other)}
    with pytest.raises(CheckpointError, match=words):
        run_recipe(make(max_steps=2, **keys), resume=True)


def test_what_cannot_be_exported_is_refused_before_training(make: Callable[..., Recipe], base: Path, tmp_path: Path) -> None:
    experts = {"num_local_experts": 4, "vocab_size": 300, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1}
    folder = tiny_folder(tmp_path / "mixtral", "mixtral", **experts)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / name, folder)
    recipe = make(model=str(folder), tokenizer=str(base), lora={"r": 2, "use_dora": True}, max_steps=1)
    with pytest.raises(UsageError, match="DoRA on experts"):
        run_recipe(recipe)
    assert not (Path(recipe.output) / "checkpoint.pt").exists()


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("keys", [{"lora": {"r": 4}}, {"lora": None}], ids=["lora", "full"])
def test_two_processes_learn_what_one_does(make: Callable[..., Recipe], tmp_path: Path, parallel: str, keys: dict[str, Any]) -> None:
    """torchrun with two processes of one row each, against one with two rows; then the checkpoint of two is gone on with by two."""
    one = make(max_steps=6, batch_size=2, output=str(tmp_path / "one"), **keys)
    run_recipe(one)
    two = make(max_steps=6, batch_size=1, output=str(tmp_path / "two"), parallel=parallel, save_every=3, **keys)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(to_dict(two)))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0", "--rdzv-backend", "c10d"]
    command += ["--rdzv-endpoint", "localhost:0", "-m", "llmkit", "finetune", str(tmp_path / "recipe.yaml")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280)
    assert done.returncode == 0, done.stderr
    for a, b in zip(losses(one), losses(two), strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    name = ADAPTER if keys["lora"] else "model.safetensors"
    folder = "adapter" if keys["lora"] else "model"
    whole, shared = (load_file(Path(recipe.output) / folder / name) for recipe in (one, two))
    assert whole.keys() == shared.keys()
    for key, tensor in whole.items():
        torch.testing.assert_close(tensor, shared[key], rtol=1e-3, atol=1e-4)
    more = subprocess.run([*command, "max_steps=8", "--resume"], capture_output=True, text=True, env=environment, timeout=280)
    assert more.returncode == 0, more.stderr
    assert len(losses(two)) == 8


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"lora": None, "quantize": "q4"}, "quantize has no effect without lora"),
        ({"lora": {"drop_out": 0.1}}, r"lora\.drop_out is not a key.*Did you mean lora\.dropout"),
        ({"lora": {"r": 0}}, r"lora\.r is 0"),
        ({"lora": {"target_modules": ["q_prj"]}}, "Did you mean q_proj"),
        ({"dpo": {"beta": 0.2}}, "dpo has no effect with loss=sft"),
        ({"loss": "distill"}, "needs a teacher"),
        ({"loss": "dpo", "lora": {"modules_to_save": ["embed_tokens"]}}, "loss=dpo compares"),
        ({"optimizer": "muon"}, "orthogonal"),
        ({"integer_forward": True}, "needs q4 or q8"),
        ({"parallel": "fsdp"}, "there is one"),
        ({"keep": "best", "eval_every": 2, "held_out": 0.0}, "no document is held out"),
        ({"loss": "dpo"}, "chosen"),
    ],
)
def test_what_cannot_work_is_said(make: Callable[..., Recipe], keys: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        run_recipe(make(**keys))


def test_the_adapter_remembers_its_base(make: Callable[..., Recipe], base: Path) -> None:
    adapter = read_adapter(run_recipe(make(max_steps=1)), load_model(base).config)
    assert adapter.base is not None
    assert adapter.template is not None
    assert adapter.settings.base_model_name_or_path == str(base)


def test_an_adapter_of_another_base_is_refused(make: Callable[..., Recipe], tmp_path: Path) -> None:
    other = run_recipe(make(lora=None, max_steps=2, output=str(tmp_path / "other")))
    adapter = run_recipe(make(max_steps=1))
    with pytest.raises(CheckpointError, match=r"was trained on another model than .*other/model: .* Set model to that one, or put it into"):
        run_recipe(make(model=str(other), adapter=str(adapter), max_steps=1, output=str(tmp_path / "second")))


def test_resume_tells_what_has_changed(make: Callable[..., Recipe], capsys: pytest.CaptureFixture[str]) -> None:
    recipe = make(max_steps=2)
    run_recipe(recipe)
    written = Path(recipe.output) / "recipe.yaml"
    before = written.read_text()
    capsys.readouterr()
    with pytest.raises(CheckpointError, match="have changed since"):
        run_recipe(make(max_steps=2, seed=1), resume=True)
    assert written.read_text() == before  # of the run as it is: how it can be gone on with
    run_recipe(recipe, resume=True)
    assert "changed since the checkpoint" not in capsys.readouterr().err
    run_recipe(make(max_steps=3, weight_decay=0.5, lora={"r": 4, "dropout": 0.5}), resume=True)
    said = capsys.readouterr().err
    line = next(line for line in said.splitlines() if line.startswith("changed since the checkpoint: "))
    assert {"max_steps 2 -> 3", "lora.dropout 0.0 -> 0.5"} <= set(line.partition(": ")[2].split(", "))
