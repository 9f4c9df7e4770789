"""The training loop: one for every recipe. What is learned comes in as an objective, what is evaluated as callables."""

from __future__ import annotations

import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llmkit.errors import CheckpointError, LLMKitError
from llmkit.training.data.packing import Batch, RowStream
from llmkit.training.data.sources import Corpus
from llmkit.training.objective import Objective
from llmkit.training.optimizer import make_optimizers, schedule
from llmkit.training.parallel import Processes, gathered, scatter_states, scattered
from llmkit.training.recipe import Recipe
from llmkit.training.report import Report

EvaluateBatch = Callable[[Batch], dict[str, float]]  # the objective's sums over a held-out batch


@dataclass(frozen=True)
class Hooks:
    """What a run does beside learning. Each is given the model with its averaged weights, where the recipe keeps an average.

    evaluate: the figures of held-out data, among them eval_loss. export: write the model for people. sample: texts to look at.
    """

    evaluate: Callable[[EvaluateBatch], dict[str, float]] | None = None
    export: Callable[[nn.Module], None] | None = None
    sample: Callable[[nn.Module], list[str]] | None = None


class TrainingError(LLMKitError):
    """Training cannot go on: the loss or the gradient is no longer a number."""


@dataclass
class RunState:
    """Where a run stands; stored in its checkpoint."""

    step: int = 0  # optimizer steps done
    tokens: int = 0  # supervised ones learned from
    seconds: float = 0.0  # of training, over all sessions
    best_loss: float | None = None  # held out
    best_step: int = 0
    waited: int = 0  # evaluations since


class Learner(nn.Module):
    """Model and objective as one module: all that needs the weights happens inside its forward, where wrappers can see to them."""

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, batch: Batch, evaluate: bool = False) -> Any:
        """Return the sum of the loss, or the sums of everything that an evaluation shows."""
        return (self.objective.evaluate if evaluate else self.objective.loss_sum)(self.model, batch)


class Trainer:
    """A model, its data and its optimizers on their way through a recipe.

    Everything that decides the next step is in `state`, so a run that was stopped (even killed) goes on from its last
    checkpoint exactly as it would have; bit for bit on a CPU with as many threads, but for `max_minutes`, where the clock sets
    the learning rate.
    """

    def __init__(
        self,
        learner: Learner,
        stream: RowStream,
        recipe: Recipe,
        report: Report,
        checkpoint: CheckpointFile,
        hooks: Hooks | None = None,
        processes: Processes | None = None,
    ) -> None:
        self.model, self.objective = learner.model, learner.objective
        self.stream, self.recipe, self.report, self.checkpoint, self.hooks = stream, recipe, report, checkpoint, hooks or Hooks()
        self.device = next(self.model.parameters()).device
        self.processes = processes or Processes(self.device.type == "cpu")
        if recipe.compile:
            self.model.compile()  # in place: the module, its names and its parameters stay, so that checkpoints do
        self.dtype = product_dtype(recipe.dtype, self.device)
        # FSDP replaces the parameters, so the optimizers below must be made of those that are there afterwards.
        self.processes.shard(learner)
        self.learner = self.processes.wrap(learner)
        self.trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.parameters = list(self.trained.values())
        self.optimizers = make_optimizers(
            self.model, recipe.optimizer, recipe.learning_rate, recipe.muon_learning_rate, (recipe.beta1, recipe.beta2), recipe.weight_decay
        )
        # The exponential moving average of the trained weights, in the order of `parameters`.
        self.average = [p.detach().clone() for p in self.parameters] if recipe.ema else None
        self.done = RunState()
        self._evaluated = -1  # the step of the last evaluation

    # -- the run ------------------------------------------------------------------------------------------------------

    def train(self) -> RunState:
        """Run to the end of the recipe, evaluating and saving on the way.

        Raises:
            TrainingError: loss or gradient became infinite or NaN; the last checkpoint is untouched.
            KeyboardInterrupt: Ctrl-C or a termination signal; the step was finished and a checkpoint written.
        """
        recipe, done = self.recipe, self.done
        self.model.train()
        saved_at = time.monotonic()
        with self.report, _interruptible() as interrupted:
            stopped = False
            while self.share < 1:
                # All processes stop after the same step, whichever of them got the signal: a step needs all of them.
                stopped = self.processes.any(interrupted.is_set())
                if stopped or not self._timed_step():
                    break
                if recipe.eval_every and done.step % recipe.eval_every == 0:
                    self._evaluate()
                    if recipe.early_stop is not None and done.waited >= recipe.early_stop:
                        self.report.say(f"the held-out loss has not fallen since step {done.best_step}: the run ends here (early_stop)")
                        break
                # Clocks differ between processes, and writing a checkpoint is done together: one that is due is due for all.
                minutes = (time.monotonic() - saved_at) / 60
                due = (recipe.save_every and done.step % recipe.save_every == 0) or (recipe.save_minutes and minutes >= recipe.save_minutes)
                if self.processes.any(bool(due)):
                    self.save()
                    saved_at = time.monotonic()
            if stopped or self.processes.any(interrupted.is_set()):
                self.save()
                self.report.say(f"stopped at step {done.step}; go on with --resume")
                raise KeyboardInterrupt
            self._evaluate()
            self.save()
            self.report.draw()
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
        seconds = time.monotonic() - start  # the loss was read in the step, so a GPU has finished it
        done.seconds += seconds
        share = self.share
        left = done.seconds * (1 - share) / share if share > 0 else None
        speed = (done.tokens - tokens) / seconds
        self.report.progress(share, done.step, figures["loss"], speed, left, self._memory())
        if done.step % recipe.log_every == 0 or done.step == 1:
            self.report.log(
                {
                    "step": done.step,
                    **figures,
                    "epoch": round(self.stream.progress, 4),
                    "tokens": done.tokens,
                    "seconds": round(done.seconds, 2),
                    "tokens_per_second": round(speed, 1),
                    "memory_bytes": self._memory(),
                }
            )
        return True

    def _memory(self) -> int:
        """Bytes in use: of the GPU, else of this process."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        import psutil

        return int(psutil.Process().memory_info().rss)

    def _step(self) -> dict[str, float] | None:
        """One optimizer step; None where the data has ended.

        The gradient is that of the sum over all micro-batches divided by all their supervised tokens, so accumulation gives what
        one large batch would, however those are spread.
        """
        recipe, processes = self.recipe, self.processes
        # Micro-batches, each a list with one batch for each process. Every process plans them all: the normalizer below is that of the
        # whole step, and is known without asking the others.
        micro_batches = []
        for _ in range(recipe.grad_accumulation):
            each = [b for _ in range(processes.count) if (b := self.stream.next_batch(recipe.batch_size)) is not None]
            micro_batches += [each] if each else []
        if not micro_batches:
            return None
        batches = [batch for each in micro_batches for batch in each]
        supervised, normalizer = sum(b.num_supervised for b in batches), sum(self.objective.normalizer(b) for b in batches)
        rate = self._set_learning_rate()
        # What is drawn in a step (dropout) follows from the seed, the step and the process: nothing to store for a resumed run.
        torch.manual_seed((recipe.seed * 1_000_003 + self.done.step) * 1_009 + processes.rank)
        total = 0.0
        for index, each in enumerate(micro_batches):
            # At the very end there may be fewer batches than processes. The others wait for the gradients of every process, so one
            # without a batch computes another's and adds nothing.
            idle = processes.rank >= len(each)
            batch = each[0 if idle else processes.rank]
            with processes.sharing(self.learner, index == len(micro_batches) - 1):
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype is not None):
                    loss = self.learner(batch.to(self.device)) / normalizer
                loss = loss * 0.0 if idle else loss
                (loss * processes.count).backward()  # DDP and FSDP average gradients over the processes; the sum is wanted
            total += loss.item()
        total = processes.sum(total)
        # Without a limit this still computes the norm, which is reported and tells a run that has broken.
        norm = float(gathered(torch.nn.utils.clip_grad_norm_(self.parameters, recipe.max_grad_norm or float("inf"))))
        if not (_finite(total) and _finite(norm)):
            self._refuse(total, norm, batches)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.done.step += 1
        self.done.tokens += supervised
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
        again = "go on from the last checkpoint with --resume" if self.checkpoint.path.exists() else "start again"
        raise TrainingError(
            f"at step {self.done.step + 1} the loss is {loss:g} and the gradient norm {norm:g}; the rows held {shown}. "
            f"Look at those rows; else lower learning_rate or raise warmup_steps, and {again}."
        )

    # -- evaluating and saving ----------------------------------------------------------------------------------------

    @contextmanager
    def averaged(self) -> Iterator[nn.Module]:
        """The model with its averaged weights, where the recipe keeps an average."""
        if self.average is None:
            yield self.model
            return
        # Storages are exchanged, nothing is copied; optimizers and wrappers hold the parameters, which stay the same objects.
        trained = [p.data for p in self.parameters]
        for parameter, mean in zip(self.parameters, self.average, strict=True):
            parameter.data = mean
        try:
            yield self.model
        finally:
            for parameter, data in zip(self.parameters, trained, strict=True):
                parameter.data = data

    def _evaluate(self) -> None:
        if self._evaluated == self.done.step:  # at the end of a run whose last step was evaluated already
            return
        self._evaluated = self.done.step
        start = time.monotonic()
        with self.averaged() as model, torch.no_grad():
            model.eval()
            figures = {} if self.hooks.evaluate is None else self.hooks.evaluate(self._evaluate_batch)
            model.train()
        self._compare(figures)
        # Of a folder that is written for them, not of the model in training: they show what a person would get.
        with self.averaged() as model:
            texts = [] if self.hooks.sample is None else self.hooks.sample(model)
        self.done.seconds += time.monotonic() - start  # max_minutes is what a person waits, evaluations included
        if figures:
            self.report.log({"step": self.done.step, **figures})
            self.report.say(f"step {self.done.step}: " + ", ".join(f"{name} {value:.4f}" for name, value in figures.items()))
        for text in texts:
            self.report.say(f"  {text}")
        self.report.draw(last=False)

    def _evaluate_batch(self, batch: Batch) -> dict[str, float]:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype is not None):
            figures: dict[str, float] = self.learner(batch.to(self.device), evaluate=True)
        return figures

    def _compare(self, figures: dict[str, float]) -> None:
        """Note whether these are the best weights so far, and exports them where those are to be kept."""
        done, loss = self.done, figures.get("eval_loss")
        if loss is None:
            return
        if done.best_loss is not None and loss >= done.best_loss:
            done.waited += 1
            return
        done.best_loss, done.best_step, done.waited = loss, done.step, 0
        if self.recipe.keep == "best":
            self._export()

    def _export(self) -> None:
        if self.hooks.export is not None:
            with self.averaged() as model:
                self.hooks.export(model)

    def save(self) -> None:
        """Write the checkpoint, replacing the last one whole, and the model for people."""
        state = self.state()
        if self.processes.is_main:
            self.checkpoint.write(state)
        if self.recipe.keep == "last" or self.done.best_loss is None:
            self._export()
        self.processes.wait()

    def state(self) -> dict[str, Any]:
        """Everything the next step depends on: of the weights those that are trained."""
        state = {
            **asdict(self.done),
            "origin": dict(self.checkpoint.origin),
            "data": self.stream.fingerprint,
            "epoch": self.stream.epoch,
            "row": self.stream.row,
            "model": {name: parameter.detach() for name, parameter in self.trained.items()},
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "average": self.average,
        }
        whole: dict[str, Any] = gathered(state) if self.processes.kind == "fsdp" else state
        return whole

    def resume(self) -> None:
        """Continue from the checkpoint.

        Raises:
            CheckpointError: there is none, it is damaged, or it belongs to another model or optimizer.
        """
        with self.checkpoint.explained():
            self._restore(self.checkpoint.read(self.stream.fingerprint, self.trained.keys()))
        self.report.rewind(self.done.step)

    @torch.no_grad()
    def _restore(self, state: dict[str, Any]) -> None:
        for name, parameter in self.trained.items():
            parameter.copy_(scattered(state["model"][name], parameter))
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            # The recipe's settings win over the stored ones, so that a key changed for the rest of a run takes effect. Moments are matched
            # to parameters by position: `read` has seen that the names are the same, and their order is the model's.
            settings = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
            optimizer.load_state_dict(scatter_states(saved, [p for group in optimizer.param_groups for p in group["params"]]))
            for group, setting in zip(optimizer.param_groups, settings, strict=True):
                group.update(setting)
        if self.average is not None:
            for mean, saved in zip(self.average, state["average"], strict=True):
                mean.copy_(scattered(saved, mean))
        self.done = RunState(**{field.name: state[field.name] for field in fields(RunState)})
        self.stream.seek(state["epoch"], state["row"])


@dataclass(frozen=True)
class CheckpointFile:
    """Where a run's state is kept. origin: settings by name that decide what the trained weights mean; a state with others is refused."""

    path: Path
    origin: Mapping[str, Any] = field(default_factory=dict)

    def write(self, state: dict[str, Any]) -> None:
        """Replace the file whole: a run that is killed meanwhile goes on from the last one."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f"{self.path.name}.{os.getpid()}.tmp")
        try:
            with temporary.open("wb") as file:
                torch.save(state, file)
                # The bytes must be on the disk before the rename is: a machine that loses power keeps the old file or has the new one.
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self.path)
        except OSError as error:  # a full disk: a failing write does not name its file
            raise OSError(error.errno, error.strerror or str(error), str(self.path)) from None
        finally:
            temporary.unlink(missing_ok=True)

    def read(self, data: str, trained: Collection[str]) -> dict[str, Any]:
        """Return the state. data: the fingerprint of the rows. trained: the names of the weights that are trained.

        Raises CheckpointError where these or `origin` are others than the state was written with.
        """
        # weights_only: a checkpoint may come from elsewhere, and a full unpickler would run what it says. On the CPU first: beside the
        # model and the optimizers that are on the GPU already there may be no memory for another copy.
        state: dict[str, Any] = torch.load(self.path, map_location="cpu", weights_only=True)
        if state["data"] != data:
            raise CheckpointError(
                f"the data, its weights, max_length or the seed have changed since {self.path} was written, so its place in them "
                "means nothing. Restore them, or start a new run from the model saved beside it."
            )
        changed = [name for name, value in self.origin.items() if state["origin"].get(name) != value]
        if changed:
            raise CheckpointError(
                f"the checkpoint {self.path} was made with another {' and another '.join(changed)}, "
                "without which its weights mean something else. Restore the recipe, or start a new run."
            )
        if state["model"].keys() != set(trained):
            raise CheckpointError(
                f"the checkpoint {self.path} is of other weights than this recipe trains. Use the recipe it was made with."
            )
        return state

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Turn what a missing or a damaged file makes torch raise into CheckpointError."""
        try:
            yield
        except FileNotFoundError:
            raise CheckpointError(f"there is no checkpoint {self.path} to resume from. Start without --resume.") from None
        except (RuntimeError, ValueError, LookupError, TypeError, EOFError, OSError, pickle.UnpicklingError) as error:
            reason = str(error).partition("\n")[0]
            raise CheckpointError(
                f"the checkpoint {self.path} does not fit this recipe or is damaged ({reason}). "
                "Use the recipe it was made with, or start again."
            ) from None


def product_dtype(wanted: str, device: torch.device) -> torch.dtype | None:
    """Return what products are computed in on a device by a recipe's `dtype` (auto, float32, bfloat16); None: float32, without autocast."""
    can = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return torch.bfloat16 if wanted == "bfloat16" or (wanted == "auto" and can) else None


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
        if event.is_set():  # the second one: whoever asks twice does not want to wait for the step
            raise KeyboardInterrupt
        event.set()

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
