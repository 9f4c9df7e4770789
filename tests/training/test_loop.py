"""The loop: accumulation, exact resume, interruption, and losses that are no numbers."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from llmkit.errors import CheckpointError
from llmkit.model.transformer import Transformer
from llmkit.text.tokenizer import Tokenizer
from llmkit.training.data.packing import Batch, RowStream
from llmkit.training.data.sources import load_corpora
from llmkit.training.loop import CheckpointFile, EvaluateBatch, Hooks, Learner, Trainer, TrainingError
from llmkit.training.objective import Objective, cross_entropy
from llmkit.training.recipe import Recipe
from llmkit.training.report import Report

MakeTrainer = Callable[..., Trainer]


class LossOf(Objective):
    """A loss of a test's own."""

    def __init__(self, loss: Callable[[nn.Module, Batch], torch.Tensor]) -> None:
        super().__init__()
        self.loss = loss

    def loss_sum(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        return self.loss(model, batch)


@pytest.fixture
def make_trainer(
    make_model: Callable[..., Transformer], make_recipe: Callable[..., Recipe], tokenizer: Tokenizer, tmp_path: Path
) -> MakeTrainer:
    def make(folder: str = "run", loss: Any = None, hooks: Hooks | None = None, **keys: Any) -> Trainer:
        recipe = make_recipe(**keys)
        output = tmp_path / folder
        output.mkdir(exist_ok=True)
        train, *_ = load_corpora(recipe.data, tokenizer, recipe.held_out)
        stream = RowStream(train, [1.0], recipe.max_length, recipe.seed, recipe.epochs)
        torch.manual_seed(0)
        learner = Learner(make_model(), Objective() if loss is None else LossOf(loss))
        return Trainer(learner, stream, recipe, Report(output), CheckpointFile(output / "checkpoint.pt"), hooks)

    return make


def weights(trainer: Trainer) -> list[torch.Tensor]:
    return [p.detach().clone() for p in trainer.model.parameters()]


def metrics(trainer: Trainer) -> list[dict[str, Any]]:
    return [json.loads(line) for line in trainer.report.metrics.read_text().splitlines()]


def assert_same_run(one: Trainer, two: Trainer) -> None:
    for a, b in zip(weights(one), weights(two), strict=True):
        assert torch.equal(a, b)
    clock = {"seconds", "tokens_per_second", "memory_bytes"}
    assert [{k: v for k, v in e.items() if k not in clock} for e in metrics(one)] == [
        {k: v for k, v in e.items() if k not in clock} for e in metrics(two)
    ]


def test_it_learns_and_leaves_metrics_and_a_picture(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(max_steps=40)
    trainer.train()
    losses = [e["loss"] for e in metrics(trainer)]
    assert losses[0] == pytest.approx(np.log(300), abs=0.2)  # nothing is known at first
    assert losses[-1] < 3
    assert trainer.report.picture.read_bytes().startswith(b"\x89PNG")
    assert metrics(trainer)[-1]["step"] == 40


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_accumulation_equals_the_large_batch(make_trainer: MakeTrainer, optimizer: str) -> None:
    """However the targets are spread over the micro-batches: here most rows are full and the last of the epoch are not."""
    large = make_trainer("large", batch_size=6, grad_accumulation=1, max_steps=5, optimizer=optimizer)
    small = make_trainer("small", batch_size=1, grad_accumulation=6, max_steps=5, optimizer=optimizer)
    large.train()
    small.train()
    for a, b in zip(metrics(large), metrics(small), strict=True):
        assert a["tokens"] == b["tokens"]
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
    one, two = make_trainer("a", batch_size=6), make_trainer("b", batch_size=6)
    for trainer, parts in ((one, 1), (two, 6)):
        batches = [b for _ in range(parts) if (b := trainer.stream.next_batch(6 // parts)) is not None]
        supervised = sum(b.num_supervised for b in batches)
        for batch in batches:
            (cross_entropy(trainer.model, batch) / supervised).backward()
    for p, q in zip(one.model.parameters(), two.model.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-5 * float(p.grad.abs().max()))


@pytest.mark.parametrize("keys", [{"optimizer": "adamw"}, {"optimizer": "muon", "ema": 0.9, "schedule": "wsd", "grad_accumulation": 2}])
def test_resume_is_exact(make_trainer: MakeTrainer, keys: dict[str, Any]) -> None:
    """Stopped after step 13, logged past its checkpoint, and gone on with: as if nothing had been."""
    whole = make_trainer("whole", max_steps=20, **keys)
    whole.train()

    class KilledError(Exception):
        pass

    class KilledAfter:
        """A loss that dies in the middle of step 16: the checkpoint of step 13 is all that is left."""

        def __init__(self, calls: int) -> None:
            self.calls = calls

        def __call__(self, model: nn.Module, batch: Batch) -> torch.Tensor:
            self.calls -= 1
            if self.calls < 0:
                raise KilledError
            return cross_entropy(model, batch)

    first = make_trainer("parts", loss=KilledAfter(15 * keys.get("grad_accumulation", 1)), max_steps=20, save_every=13, **keys)
    with pytest.raises(KilledError):
        first.train()
    assert metrics(first)[-1]["step"] == 15
    second = make_trainer("parts", max_steps=20, **keys)
    second.resume()
    assert second.done.step == 13
    second.train()
    assert_same_run(whole, second)
    if "ema" in keys:
        assert all(torch.equal(a, b) for a, b in zip(whole.average or [], second.average or [], strict=True))
        trained = weights(second)[0]
        with second.averaged() as model:
            assert not torch.equal(next(model.parameters()), trained)
        assert torch.equal(next(second.model.parameters()), trained)


def test_resume_takes_changed_settings_and_refuses_changed_data(make_trainer: MakeTrainer) -> None:
    make_trainer("run", max_steps=4).train()
    other = make_trainer("run", max_steps=8, learning_rate=1e-4)
    other.resume()
    other.train()
    assert metrics(other)[-1]["learning_rate"] < 1e-4
    with pytest.raises(CheckpointError, match="have changed since"):
        make_trainer("run", max_length=32).resume()
    with pytest.raises(CheckpointError, match="does not fit this recipe"):
        make_trainer("run", optimizer="muon").resume()
    with pytest.raises(CheckpointError, match="no checkpoint"):
        make_trainer("elsewhere").resume()


def test_a_damaged_checkpoint_is_a_clear_error(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer("run", max_steps=2)
    trainer.train()
    whole = trainer.checkpoint.path.read_bytes()
    for damaged in (b"", b"nonsense", whole[: len(whole) // 2]):
        trainer.checkpoint.path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="damaged"):
            make_trainer("run").resume()


def test_a_checkpoint_is_replaced_whole(make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer("run", max_steps=2)
    trainer.train()
    before = trainer.checkpoint.path.read_bytes()

    def full(state: object, file: Any) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space"):
        trainer.save()
    assert trainer.checkpoint.path.read_bytes() == before
    assert [path.name for path in trainer.checkpoint.path.parent.glob("checkpoint*")] == ["checkpoint.pt"]


def test_a_loss_that_is_no_number_stops_with_the_rows(make_trainer: MakeTrainer) -> None:
    def loss(model: nn.Module, batch: Batch) -> torch.Tensor:
        return cross_entropy(model, batch) * (float("nan") if trainer.done.step == 3 else 1.0)

    trainer = make_trainer("run", loss=loss)
    before: list[torch.Tensor] = []
    with pytest.raises(TrainingError, match=r"at step 4 the loss is nan.*stories.txt, document \d+.*lower learning_rate"):
        trainer.train()
    assert trainer.done.step == 3
    assert all(torch.isfinite(w).all() for w in weights(trainer) + before)


def test_epochs_end_the_run_and_a_time_budget_does(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer("run", max_steps=None, epochs=2)
    done = trainer.train()
    assert done.tokens == 2 * trainer.stream.corpus.target_count
    timed = make_trainer("timed", max_steps=None, max_minutes=0.03, schedule="linear", min_learning_rate=0.0, warmup_steps=0)
    timed.train()
    rates = [e["learning_rate"] for e in metrics(timed)]
    assert 1.8 <= timed.done.seconds < 10
    assert all(a > b for a, b in itertools.pairwise(rates))
    assert rates[-1] < 0.2 * rates[0]


def test_evaluation_sees_the_average_and_leaves_no_trace(make_trainer: MakeTrainer) -> None:
    seen: list[bool] = []

    def evaluate(evaluate_batch: EvaluateBatch) -> dict[str, float]:
        model = evaluated.model
        seen.append(not model.training and torch.equal(next(model.parameters()), evaluated.average[0]))  # type: ignore[index]
        torch.randn(3)
        return {"eval_loss": 1.0}

    plain, evaluated = make_trainer("plain", ema=0.9), make_trainer("evaluated", hooks=Hooks(evaluate=evaluate), ema=0.9, eval_every=2)
    plain.train()
    evaluated.train()
    assert seen == [True] * 4
    for a, b in zip(weights(plain), weights(evaluated), strict=True):
        assert torch.equal(a, b)


def test_interrupt_finishes_the_step_and_saves(make_trainer: MakeTrainer) -> None:
    whole = make_trainer("whole", max_steps=12)
    whole.train()

    def loss(model: nn.Module, batch: Batch) -> torch.Tensor:
        if first.done.step == 5:
            signal.raise_signal(signal.SIGINT)
        return cross_entropy(model, batch)

    first = make_trainer("parts", loss=loss, max_steps=12)
    with pytest.raises(KeyboardInterrupt):
        first.train()
    assert first.done.step == 6
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    second = make_trainer("parts", max_steps=12)
    second.resume()
    second.train()
    assert_same_run(whole, second)


def test_it_runs_in_another_thread(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer("run", max_steps=2)
    thread = threading.Thread(target=trainer.train)
    thread.start()
    thread.join()
    assert trainer.done.step == 2


def test_killed_at_any_moment_it_goes_on_exactly(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    """`kill -9` while it writes checkpoints at every step; what is there afterwards is whole, and leads to the same weights."""
    import yaml

    from llmkit.training.recipe import to_dict
    from llmkit.training.run import run_recipe

    whole = run_recipe(make_recipe(output=str(tmp_path / "whole"), max_steps=25, save_every=1))
    recipe = make_recipe(output=str(tmp_path / "killed"), max_steps=25, save_every=1)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(to_dict(recipe)))
    process = subprocess.Popen(
        [sys.executable, "-m", "llmkit", "train", str(tmp_path / "recipe.yaml")],
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
    )
    checkpoint = tmp_path / "killed" / "checkpoint.pt"
    while not checkpoint.exists():
        assert process.poll() is None
        time.sleep(0.02)
    time.sleep(0.2)
    process.kill()
    process.communicate()
    killed = run_recipe(recipe, resume=True)
    assert (killed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
