"""The training loop: one for every recipe. What is learned comes in as a loss, what is judged as callables."""

from __future__ import annotations

import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmkit.errors import CheckpointError, LLMKitError
from llmkit.training.corpus import Corpus
from llmkit.training.data import Batch, RowStream
from llmkit.training.loss import cross_entropy
from llmkit.training.optimizer import make_optimizers, schedule
from llmkit.training.recipe import Recipe
from llmkit.training.report import Report

Loss = Callable[[nn.Module, Batch], Tensor]  # summed over the batch's targets
Evaluate = Callable[[nn.Module], dict[str, float]]  # held-out figures, among them eval_loss
Export = Callable[[nn.Module], None]  # writes the model for people
Sample = Callable[[nn.Module], list[str]]  # texts to look at


class TrainingError(LLMKitError):
    """Training cannot go on: the loss or the gradient is no longer a number."""


@dataclass
class Progress:
    """Where a run stands; stored in its checkpoint."""

    step: int = 0  # optimizer steps done
    tokens: int = 0  # targets learned from
    seconds: float = 0.0  # of training, over all sessions


class Trainer:
    """A model, its data and its optimizers on their way through a recipe.

    Everything that decides the next step is in `state`, so a run that was stopped (even killed) goes on from its last
    checkpoint exactly as it would have; bit for bit on a CPU with as many threads, but for `max_minutes`, where the clock sets
    the learning rate.
    """

    def __init__(
        self,
        model: nn.Module,
        stream: RowStream,
        recipe: Recipe,
        report: Report,
        checkpoint: Path,
        *,
        loss: Loss = cross_entropy,
        evaluate: Evaluate | None = None,
        export: Export | None = None,
        sample: Sample | None = None,
    ) -> None:
        self.model, self.stream, self.recipe, self.report, self.checkpoint = model, stream, recipe, report, checkpoint
        self.loss, self.evaluate, self.export, self.sample = loss, evaluate, export, sample
        self.forward: nn.Module = torch.compile(model) if recipe.compile else model  # type: ignore[assignment]
        self.device = next(model.parameters()).device
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizers = make_optimizers(
            model, recipe.optimizer, recipe.learning_rate, recipe.muon_learning_rate, (recipe.beta1, recipe.beta2), recipe.weight_decay
        )
        self.average = [p.detach().clone() for p in self.parameters] if recipe.ema else None
        self.done = Progress()
        self._evaluated = -1  # the step of the last evaluation

    # -- the run ------------------------------------------------------------------------------------------------------

    def train(self) -> Progress:
        """Run to the end of the recipe, evaluating and saving on the way.

        Raises:
            TrainingError: loss or gradient became infinite or NaN; the last checkpoint is untouched.
            KeyboardInterrupt: Ctrl-C or a termination signal; the step was finished and a checkpoint written.
        """
        recipe, done = self.recipe, self.done
        self.model.train()
        saved_at = time.monotonic()
        with self.report, _interruptible() as interrupted:
            while self.share < 1 and not interrupted.is_set():
                if not self._timed_step():
                    break
                if recipe.eval_every and done.step % recipe.eval_every == 0:
                    self._evaluate()
                minutes = (time.monotonic() - saved_at) / 60
                if (recipe.save_every and done.step % recipe.save_every == 0) or (recipe.save_minutes and minutes >= recipe.save_minutes):
                    self.save()
                    saved_at = time.monotonic()
            if interrupted.is_set():
                self.save()
                self.report.say(f"stopped at step {done.step}; go on with --resume")
                raise KeyboardInterrupt
            self._evaluate()
            self.save()
        return done

    @property
    def share(self) -> float:
        """How much of the run has passed, 0..1, by whichever limit comes first."""
        recipe, done = self.recipe, self.done
        shares = [0.0]
        if recipe.max_steps is not None:
            shares.append(done.step / recipe.max_steps)
        if recipe.epochs is not None:
            shares.append(self.stream.progress / recipe.epochs)
        if recipe.max_minutes is not None:
            shares.append(done.seconds / 60 / recipe.max_minutes)
        return min(1.0, max(shares))

    def _timed_step(self) -> bool:
        done, recipe = self.done, self.recipe
        start, tokens = time.monotonic(), done.tokens
        figures = self._step()
        if figures is None:
            return False
        seconds = time.monotonic() - start
        done.seconds += seconds
        share = self.share
        left = done.seconds * (1 - share) / share if share > 0 else None
        speed = (done.tokens - tokens) / seconds
        self.report.progress(share, done.step, figures["loss"], speed, left)
        if done.step % recipe.log_every == 0 or done.step == 1:
            self.report.log(
                {
                    "step": done.step,
                    **figures,
                    "epoch": round(self.stream.progress, 4),
                    "tokens": done.tokens,
                    "seconds": round(done.seconds, 2),
                    "tokens_per_second": round(speed, 1),
                }
            )
        return True

    def _step(self) -> dict[str, float] | None:
        """One optimizer step; None where the data has ended.

        The gradient is that of the sum over all micro-batches divided by all their targets, so accumulation gives what
        one large batch would, however the targets are spread.
        """
        recipe = self.recipe
        batches = [b for _ in range(recipe.grad_accumulation) if (b := self.stream.next_batch(recipe.batch_size)) is not None]
        if not batches:
            return None
        targets = sum(b.target_count for b in batches)
        rate = self._set_learning_rate()
        total = 0.0
        for batch in batches:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=recipe.dtype == "bfloat16"):
                loss = self.loss(self.forward, batch.to(self.device)) / targets
            loss.backward()
            total += loss.item()
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, recipe.max_grad_norm or float("inf")))
        if not (_finite(total) and _finite(norm)):
            self._refuse(total, norm, batches)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.done.step += 1
        self.done.tokens += targets
        if self.average is not None and recipe.ema is not None:
            decay = min(recipe.ema, (1 + self.done.step) / (10 + self.done.step))  # follow closely while the weights move fast
            torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1 - decay)
        return {"loss": total, "learning_rate": rate, "grad_norm": norm}

    def _set_learning_rate(self) -> float:
        recipe = self.recipe
        factor = schedule(recipe.schedule, self.share, self.done.step, recipe.warmup_steps, recipe.min_learning_rate, recipe.decay)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * factor
        return recipe.learning_rate * factor

    def _refuse(self, loss: float, norm: float, batches: list[Batch]) -> None:
        corpus: Corpus = self.stream.corpus
        places = [corpus.places[d] for batch in batches for d in batch.documents]
        shown = ", ".join(places[:5]) + (f" and {len(places) - 5} more" if len(places) > 5 else "")
        raise TrainingError(
            f"at step {self.done.step + 1} the loss is {loss:g} and the gradient norm {norm:g}; the rows held {shown}. "
            "Look at those rows; else lower learning_rate or raise warmup_steps, and go on from the last checkpoint with --resume."
        )

    # -- judging and saving -------------------------------------------------------------------------------------------

    @contextmanager
    def averaged(self) -> Iterator[nn.Module]:
        """The model with its averaged weights, where the recipe keeps an average."""
        if self.average is None:
            yield self.model
            return
        trained = [p.data for p in self.parameters]
        for parameter, mean in zip(self.parameters, self.average, strict=True):
            parameter.data = mean
        try:
            yield self.model
        finally:
            for parameter, data in zip(self.parameters, trained, strict=True):
                parameter.data = data

    def _evaluate(self) -> None:
        if self._evaluated == self.done.step:
            return
        self._evaluated = self.done.step
        start = time.monotonic()
        with self.averaged() as model, torch.no_grad():
            model.eval()
            figures = self.evaluate(model) if self.evaluate is not None else {}
            texts = self.sample(model) if self.sample is not None else []
            model.train()
        self.done.seconds += time.monotonic() - start
        if figures:
            self.report.log({"step": self.done.step, **figures})
            self.report.say(f"step {self.done.step}: " + ", ".join(f"{name} {value:.4f}" for name, value in figures.items()))
        for text in texts:
            self.report.say(f"  {text!r}")
        self.report.draw()

    def save(self) -> None:
        """Write the checkpoint, replacing the last one whole, and the model for people."""
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.checkpoint.with_name(f"{self.checkpoint.name}.{os.getpid()}.tmp")
        try:
            with temporary.open("wb") as file:
                torch.save(self.state(), file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self.checkpoint)
        finally:
            temporary.unlink(missing_ok=True)
        if self.export is not None:
            with self.averaged() as model:
                self.export(model)

    def state(self) -> dict[str, Any]:
        """Everything the next step depends on."""
        return {
            "step": self.done.step,
            "tokens": self.done.tokens,
            "seconds": self.done.seconds,
            "data": self.stream.fingerprint,
            "epoch": self.stream.epoch,
            "row": self.stream.row,
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "average": self.average,
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state_all() if self.device.type == "cuda" else [],
        }

    def resume(self) -> None:
        """Continue from the checkpoint.

        Raises:
            CheckpointError: there is none, it is damaged, or it belongs to another model or optimizer.
        """
        try:
            state = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
            if state["data"] != self.stream.fingerprint:
                raise CheckpointError(
                    f"the data, its weights, max_length or the seed have changed since {self.checkpoint} was written, so its place in them "
                    "means nothing. Restore them, or start a new run from the model saved beside it."
                )
            self.model.load_state_dict(state["model"])
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                # The recipe's settings win over the stored ones, so that a key changed for the rest of a run takes effect.
                settings = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
                optimizer.load_state_dict(saved)
                for group, setting in zip(optimizer.param_groups, settings, strict=True):
                    group.update(setting)
            if self.average is not None:
                for mean, saved in zip(self.average, state["average"], strict=True):
                    mean.copy_(saved)
            self.done = Progress(state["step"], state["tokens"], state["seconds"])
            self.stream.seek(state["epoch"], state["row"])
            torch.set_rng_state(state["random"])
            if self.device.type == "cuda":
                torch.cuda.set_rng_state_all(state["random_cuda"])
        except FileNotFoundError:
            raise CheckpointError(f"there is no checkpoint {self.checkpoint} to resume from. Start without --resume.") from None
        except (RuntimeError, ValueError, KeyError, TypeError, EOFError, OSError, pickle.UnpicklingError) as error:
            reason = str(error).partition("\n")[0]
            raise CheckpointError(
                f"the checkpoint {self.checkpoint} does not fit this recipe or is damaged ({reason}). "
                "Use the recipe it was made with, or start anew."
            ) from None
        self.report.rewind(self.done.step)


def _finite(value: float) -> bool:
    return value - value == 0


@contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """An event set by Ctrl-C or a termination signal, so that a step can end first; a second one interrupts at once."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event  # only the main thread may handle signals
        return

    def handle(number: int, frame: object) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
