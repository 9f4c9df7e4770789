"""How fast an adapter is trained on this machine, and in how much memory.

As in `bench`, every program runs in a process of its own and they take turns, step by step; on a GPU, whose memory may hold but one of
them, they run one after the other. They learn from the same token ids in the same order and begin with the same adapter, so that their
losses can be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from llmkit.bench.process import Settings, Worker
from llmkit.checkpoint.files import load_config
from llmkit.checkpoint.source import ModelSource
from llmkit.config import ModelConfig
from llmkit.errors import DoesNotFit, UsageError
from llmkit.planning.memory import shown

_TOKENS = 1 << 31  # of a step: as many as the kernels count
LOWEST_VOCABULARY = 8

Start = Callable[[str, Settings, str], Worker]  # a worker from its name, its settings and the module that it runs


@dataclass(frozen=True)
class TrainBenchPlan:
    """What is measured: steps of LoRA (r=16, alpha=32, every linear of the blocks) with AdamW; products are in float32 on a CPU, in
    bfloat16 on CUDA.

    device: cpu (the default) or cuda. memory: bytes of the GPU that each program may take; None: all of it.
    rows, length: of a step on random tokens; chats are packed into such rows, too. steps: on random tokens, the first of which is
    not timed; every loss is compared. repeat: timed steps on chats. data: rows as for `llmkit finetune`; without it no chats.
    quantize: measure llmkit a second time with a frozen base in so few bits. checkpointing: activations are computed again in the
    backward pass.
    """

    folder: Path
    dtype: str | None = None  # of our frozen weights
    device: str | None = None
    memory: int | None = None
    threads: int | None = None
    rows: int = 4
    length: int = 512
    steps: int = 4
    repeat: int = 3
    data: Path | None = None
    chats: int = 32  # in a step
    quantize: str | None = None
    checkpointing: bool = False

    @property
    def on_cuda(self) -> bool:
        return self.device is not None and self.device.startswith("cuda")


@dataclass
class TrainingProgram:
    """A program under measurement; `prefix` is that of its keys in the result."""

    name: str
    prefix: str
    settings: Settings  # of its worker
    module: str = "llmkit.bench.training_worker"  # that runs it
    worker: Worker | None = None  # None: not loaded
    fits: bool = True  # memory has not run out
    micro_batch: int = 1  # chats in one forward pass, of a program that does not pack them
    peak_bytes: int = 0
    full: list[dict[str, Any]] = field(default_factory=list)  # the answers, step by step; the first is not timed
    chats: list[dict[str, Any]] = field(default_factory=list)

    @property
    def ready(self) -> dict[str, Any]:
        """What its worker reported when it was loaded."""
        assert self.worker is not None
        return self.worker.ready

    def ask(self, **request: Any) -> dict[str, Any]:
        assert self.worker is not None
        return self.worker.ask(**request)

    def check(self, first: TrainingProgram) -> None:
        """Raise UsageError where this program, just loaded, does not train what `first` does."""

    def begin_chats(self, chats: int, progress: Callable[[str], None]) -> bool:
        """Prepare for steps of so many chats; whether it takes part in them at all."""
        return True

    @contextmanager
    def fitting(self) -> Iterator[None]:
        """Where memory runs out, that is a result: it ends this program, not the benchmark."""
        try:
            yield
        except DoesNotFit:
            self.fits = False

    def result(self) -> dict[str, Any]:
        """Return medians over the timed steps."""
        found = {"full_tok_s": _rate(self.full, "slots"), "full_peak_bytes": self.peak_bytes, "flags": self.ready["flags"]}
        if self.chats:
            slots = sum(step["slots"] for step in self.chats[1:]) // (len(self.chats) - 1)
            found |= {"chats_target_tok_s": _rate(self.chats, "targets"), "chats_tok_s": _rate(self.chats, "slots"), "chats_slots": slots}
        return found


def _rate(steps: list[dict[str, Any]], what: str) -> float:
    return median(step[what] / step["seconds"] for step in steps[1:])


def bench_train(plan: TrainBenchPlan, progress: Callable[[str], None] = lambda _: None, start: Start = Worker) -> dict[str, Any]:
    """Measure, and return one flat dictionary.

    `full_*` are rows of random tokens without padding: tokens per second, and the peak memory of these steps. `chats_*` are
    whole conversations: per second the supervised tokens, and all slots that were computed, padding included. `base_share` is the
    memory of the frozen weights, embeddings and head included, as a share of what they take in bfloat16. `fits` says of each program
    whether its memory was enough; where it was not, it has no figures.

    Raises UsageError for what cannot be measured, DoesNotFit where memory was enough for no program.
    """
    return summary(plan, measure(plan, progress, start=start))


def measure(
    plan: TrainBenchPlan, progress: Callable[[str], None], rivals: Sequence[TrainingProgram] = (), start: Start = Worker
) -> list[TrainingProgram]:
    """Run llmkit, and the rivals with it, and return all programs with what they answered."""
    config = load_config(plan.folder)
    check_train_plan(plan, config)
    programs = [*own_programs(plan, config), *rivals]
    for together in [[program] for program in programs] if plan.on_cuda else [programs]:
        with ExitStack() as cleanup:
            for program in together:
                progress(f"loading {program.name}")
                with program.fitting():
                    program.worker = start(program.name, program.settings, program.module)
                    cleanup.callback(program.worker.close)
            loaded = [program for program in together if program.worker is not None]
            for program in loaded[1:]:
                program.check(loaded[0])
            _rows(plan, together, progress)
            if plan.data is not None:
                _chats(plan, together, progress)
    return programs


def _turns(programs: Sequence[TrainingProgram], step: int) -> list[TrainingProgram]:
    """Return those that memory is enough for, in the order of this step."""
    left = [program for program in programs if program.fits]
    return left if step % 2 else left[::-1]


def _rows(plan: TrainBenchPlan, programs: Sequence[TrainingProgram], progress: Callable[[str], None]) -> None:
    """Take steps on random tokens, and ask for the memory that they took."""
    for step in range(plan.steps):
        for program in _turns(programs, step):
            progress(f"rows of {plan.length} tokens: step {step + 1}/{plan.steps} of {program.name}")
            with program.fitting():
                program.full.append(program.ask(do="full", step=step))
    for program in _turns(programs, 1):
        program.peak_bytes = program.ask(do="peak")["peak_bytes"]


def _chats(plan: TrainBenchPlan, programs: Sequence[TrainingProgram], progress: Callable[[str], None]) -> None:
    """Take steps on chats, from new adapters."""
    taking_part = []
    for program in _turns(programs, 1):
        with program.fitting():
            if program.begin_chats(plan.chats, progress):
                program.ask(do="renew")
                taking_part.append(program)
    for step in range(plan.repeat + 1):
        for program in _turns(taking_part, step):
            what = f"step {step}/{plan.repeat}" if step else "warm-up"
            progress(f"{plan.chats} chats: {what} of {program.name}")
            with program.fitting():
                program.chats.append(program.ask(do="chats", step=step, micro_batch=program.micro_batch))


def common_settings(plan: TrainBenchPlan, config: ModelConfig) -> Settings:
    """Return what every program is started with."""
    return {
        "folder": str(plan.folder),
        "device": plan.device or "cpu",
        "memory": plan.memory,
        "threads": plan.threads,
        "rows": plan.rows,
        "length": plan.length,
        "vocab_size": config.vocab_size,
        "data": None if plan.data is None else str(plan.data),
        "chats": plan.chats,
    }


def own_programs(plan: TrainBenchPlan, config: ModelConfig) -> list[TrainingProgram]:
    """Return llmkit, and llmkit with a quantized base."""
    common = {**common_settings(plan, config), "dtype": plan.dtype, "checkpointing": plan.checkpointing}
    programs = [TrainingProgram("llmkit", "", {**common, "quantize": None})]
    if plan.quantize is not None:
        programs.append(TrainingProgram(f"llmkit {plan.quantize}", f"{plan.quantize}_", {**common, "quantize": plan.quantize}))
    return programs


def check_train_plan(plan: TrainBenchPlan, config: ModelConfig) -> None:
    """Raise UsageError for what cannot be measured, before anything is loaded."""
    if plan.device not in (None, "cpu") and not plan.on_cuda:
        raise UsageError(f"training is measured on cpu and on cuda, not on {plan.device}. Leave out --device for the CPU.")
    if plan.memory is not None and not plan.on_cuda:
        raise UsageError("--memory limits a GPU and has no effect on a CPU. Add --device cuda, or leave it out.")
    if plan.data is not None and plan.on_cuda:
        raise UsageError("chats are measured on the CPU alone. Leave out --data, or --device.")
    if plan.steps < 2:
        raise UsageError(f"steps is {plan.steps}, and the first one is not timed. Give --steps 2 or more.")
    if plan.rows * plan.length > _TOKENS:
        raise UsageError(f"{plan.rows} rows of {plan.length} tokens are too many for one step. Give less --rows.")
    if plan.length < 2 or plan.length > config.max_position_embeddings:
        raise UsageError(
            f"rows of {plan.length} tokens cannot be measured: the model has {config.max_position_embeddings} positions, and a row has a "
            "token and a target at least. Change --row-length."
        )
    if config.vocab_size < LOWEST_VOCABULARY:
        raise UsageError(f"a vocabulary of {config.vocab_size} is too small for random tokens. Give a larger model.")
    if plan.quantize is not None and ModelSource(plan.folder).quantized:
        raise UsageError(f"--quantize has no effect: {plan.folder} is quantized already. Leave it out.")


def summary(plan: TrainBenchPlan, programs: Sequence[TrainingProgram]) -> dict[str, Any]:
    """Return the flat result."""
    fitting = [program for program in programs if program.fits]
    if not fitting:
        memory = "memory" if plan.memory is None else shown(plan.memory)
        raise DoesNotFit(
            f"{' and '.join(program.name for program in programs)}: training does not fit in {memory}. "
            "Take a smaller model, or shorter rows."
        )
    report = fitting[0].ready
    result: dict[str, Any] = {"model": str(plan.folder), "device": report["device"], "threads": report["threads"]}
    result |= {"rows": plan.rows, "row_length": plan.length, "steps": plan.steps}
    if plan.memory is not None:
        result["memory_bytes"] = plan.memory
    if plan.data is not None:
        targets = sum(step["targets"] for step in fitting[0].chats[1:]) // plan.repeat
        result |= {"data": str(plan.data), "chats": plan.chats, "repeat": plan.repeat, "chats_targets": targets}
    for program in programs:
        result[f"{program.prefix}fits"] = program.fits
    for program in fitting:
        result |= {program.prefix + key: value for key, value in program.result().items()}
        if "base_bytes" in program.ready:
            base, full = program.ready["base_bytes"], program.ready["bf16_base_bytes"]
            result |= {"bf16_base_bytes": full, f"{program.prefix}base_bytes": base, f"{program.prefix}base_share": base / full}
    return result
