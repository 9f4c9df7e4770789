"""What a run shows and leaves: a progress bar or plain lines, metrics.jsonl and loss.png."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from llmkit.errors import UsageError

PLAIN_SECONDS = 30.0  # between lines where there is no terminal
PICTURE_SECONDS = 20.0  # between two drawings of loss.png in a run


class Tracker(Protocol):
    """Where figures go beside metrics.jsonl."""

    def log(self, figures: dict[str, Any], step: int) -> None: ...

    def close(self) -> None: ...


class _TensorBoard:
    def __init__(self, output: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer: Any = SummaryWriter(str(output / "tensorboard"))

    def log(self, figures: dict[str, Any], step: int) -> None:
        for name, value in figures.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class _Wandb:
    def __init__(self, output: Path) -> None:
        import wandb

        self.run: Any = wandb.init(dir=str(output), name=output.name)

    def log(self, figures: dict[str, Any], step: int) -> None:
        self.run.log(figures, step=step)

    def close(self) -> None:
        self.run.finish()


def make_trackers(names: Sequence[str], output: Path) -> list[Tracker]:
    """UsageError where one is not installed."""
    kinds: dict[str, Callable[[Path], Tracker]] = {"tensorboard": _TensorBoard, "wandb": _Wandb}
    found = []
    for name in names:
        try:
            found.append(kinds[name](output))
        except ImportError as error:
            raise UsageError(f"trackers names {name}, which is not installed. Install it (pip install {name}), or leave it out.") from error
    return found


class Report:
    """Progress for people and metrics for programs. Use as a context manager around the run.

    On a terminal a bar with loss, tokens/s and time left; elsewhere a plain line now and then.
    """

    def __init__(self, output: Path, console: Console | None = None, trackers: Sequence[Tracker] = (), silent: bool = False) -> None:
        """trackers: get the figures, too. silent: one of several processes that is not the one to speak and write."""
        self.trackers, self.silent = trackers, silent
        self.metrics = output / "metrics.jsonl"
        self.picture = output / "loss.png"
        self.console = console or Console(stderr=True)
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._last_line = 0.0
        self._drawn_at = 0.0

    def __enter__(self) -> Report:
        if self.console.is_terminal and not self.silent:
            columns = (
                TextColumn("step {task.fields[step]}"),
                BarColumn(),
                TextColumn("{task.percentage:>5.1f}%"),
                TextColumn("{task.fields[text]}"),
            )
            self._bar = Progress(*columns, console=self.console)
            self._task = self._bar.add_task("", total=1.0, step=0, text="")
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()
        for tracker in self.trackers:
            tracker.close()

    def progress(self, share: float, step: int, loss: float, tokens_per_second: float, seconds_left: float | None, memory: int) -> None:
        """Called at every step; cheap. tokens_per_second: of targets. memory: bytes."""
        left = "" if seconds_left is None else f", {duration(seconds_left)} left"
        text = f"loss {loss:.4f}, {tokens_per_second:,.0f} tokens/s, {memory / 1e9:.1f} GB{left}"
        if self._bar is not None:
            self._bar.update(self._task, completed=share, step=step, text=text)
        elif time.monotonic() - self._last_line >= PLAIN_SECONDS:
            self._last_line = time.monotonic()
            self.say(f"step {step} ({share:.1%}): {text}")

    def say(self, text: str) -> None:
        """A line of its own."""
        if self.silent:
            return
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def log(self, entry: dict[str, Any]) -> None:
        """One line of metrics.jsonl."""
        if self.silent:
            return
        for tracker in self.trackers:
            tracker.log({name: value for name, value in entry.items() if name != "step"}, entry["step"])
        with self.metrics.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(entry) + "\n")

    def rewind(self, step: int) -> None:
        """Forget what was logged after `step`: a resumed run writes it again. A half-written last line goes too."""
        if self.metrics.is_file() and not self.silent:
            kept = [line for line in _entries(self.metrics) if line["step"] <= step]
            self.metrics.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")

    def draw(self, last: bool = True) -> None:
        """Draw loss.png from metrics.jsonl: training and held-out loss above, learning rate below. Not last: only now and then."""
        if not last and time.monotonic() - self._drawn_at < PICTURE_SECONDS:
            return
        self._drawn_at = time.monotonic()
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        entries = _entries(self.metrics) if self.metrics.is_file() else []
        if self.silent:
            return
        train = [e for e in entries if "loss" in e]
        held = [e for e in entries if "eval_loss" in e]
        if not train:
            return
        figure = Figure(figsize=(8, 5.5), layout="constrained")
        FigureCanvasAgg(figure)
        loss, rate = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        loss.plot([e["step"] for e in train], [e["loss"] for e in train], lw=0.8, alpha=0.7, label="training")
        if held:
            loss.plot(
                [e["step"] for e in held], [e["eval_loss"] for e in held], "o-", ms=3, label=f"held out ({held[-1]['eval_loss']:.3f})"
            )
        loss.set_ylabel("loss (nats per token)")
        loss.legend()
        loss.grid(alpha=0.3)
        rate.plot([e["step"] for e in train], [e["learning_rate"] for e in train], lw=0.8)
        rate.set_ylabel("learning rate")
        rate.set_xlabel("optimizer step")
        rate.grid(alpha=0.3)
        temporary = self.picture.with_suffix(".tmp.png")
        figure.savefig(temporary, dpi=110)
        temporary.replace(self.picture)


def duration(seconds: float) -> str:
    """Seconds as people say them: 42s, 3m10s, 2h05m."""
    whole = int(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02}m"


def _entries(path: Path) -> list[dict[str, Any]]:
    entries = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entries.append(json.loads(line))
        except ValueError:
            continue  # cut off by a kill in the middle of a write
    return entries
