"""How fast an adapter is trained on this machine, in how much memory, and how that compares with transformers and PEFT.

As in `bench`, each side runs in a process of its own and the sides take turns, step by step; on a GPU, whose memory may hold but one of
them, they run one after the other. They learn from the same token ids in the same order and begin with the same adapter, so their losses
are compared, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from llmkit.bench.process import Worker
from llmkit.checkpoint.files import load_config
from llmkit.checkpoint.formats.llmkit import is_bitsandbytes
from llmkit.config import ModelConfig
from llmkit.errors import DoesNotFit, UsageError
from llmkit.planning.memory import available_bytes, shown

MICRO_BATCHES = (1, 2, 4, 8, 16, 32)  # that the rival tries
_TOKENS = 1 << 31  # of a step: as many as the kernels count
_SLOWER = 1.2  # than the fastest so far: longer padding will not make the next one faster
LOWEST_VOCABULARY = 8


@dataclass(frozen=True)
class TrainBenchPlan:
    """What is measured: steps of LoRA (r=16, alpha=32, every linear of the blocks) with AdamW; products are in float32 on a CPU, in
    bfloat16 on CUDA.

    device: cpu (the default) or cuda. memory: bytes of the GPU that each side may take; None: all of it.
    rows, length: of a step on random tokens; chats are packed into such rows, too. steps: on random tokens, the first of which is
    not timed; every loss is compared. repeat: timed steps on chats. data: rows as for `llmkit finetune`; without it no chats.
    quantize: measure llmkit a second time with a frozen base in so few bits. checkpointing, rival_checkpointing: ours computes
    activations again on the way back; transformers is measured a second time with gradient checkpointing. Of a folder in bitsandbytes'
    4 bits transformers always has it, as PEFT prepares such a model (QLoRA).
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
    against: str | None = None
    rival_checkpointing: bool = False

    @property
    def on_cuda(self) -> bool:
        return self.device is not None and self.device.startswith("cuda")


@dataclass
class Side:
    """One program under measurement; `prefix` is that of its keys in the result."""

    name: str
    prefix: str
    settings: dict[str, Any]
    worker: Worker | None = None  # None: not loaded
    fits: bool = True  # memory has not run out
    micro_batch: int = 1
    tried: tuple[int, ...] = ()  # micro-batches
    peak_bytes: int = 0
    full: list[dict[str, Any]] = field(default_factory=list)  # the answers, step by step; the first is not timed
    chats: list[dict[str, Any]] = field(default_factory=list)

    @property
    def ready(self) -> dict[str, Any]:
        """What its worker said when it was loaded."""
        assert self.worker is not None
        return self.worker.ready

    def ask(self, **request: Any) -> dict[str, Any]:
        assert self.worker is not None
        return self.worker.ask(**request)

    @contextmanager
    def fitting(self) -> Iterator[None]:
        """Where memory runs out, that is a result: it ends this side, not the benchmark."""
        try:
            yield
        except DoesNotFit:
            self.fits = False

    def result(self) -> dict[str, Any]:
        """Medians over the timed steps."""
        found = {"full_tok_s": _rate(self.full, "slots"), "full_peak_bytes": self.peak_bytes, "flags": self.ready["flags"]}
        if self.chats:
            slots = sum(step["slots"] for step in self.chats[1:]) // (len(self.chats) - 1)
            found |= {"chats_target_tok_s": _rate(self.chats, "targets"), "chats_tok_s": _rate(self.chats, "slots"), "chats_slots": slots}
        return found


def _rate(steps: list[dict[str, Any]], what: str) -> float:
    return median(step[what] / step["seconds"] for step in steps[1:])


def _difference(mine: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> float:
    return max(abs(a["loss"] - b["loss"]) for a, b in zip(mine, theirs, strict=True))


def bench_train(plan: TrainBenchPlan, progress: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Measure, and return one flat dictionary: our figures, those of the other sides under their prefixes, and `*_ratio`.

    `full_*` are rows of random tokens without padding: tokens per second, and the peak memory of these steps. `chats_*` are
    whole conversations: per second the targets, and all slots that were computed, padding included; transformers runs at the
    micro-batch that is fastest. A ratio above 1 is in our favour (speed ours / theirs, memory theirs / ours).
    `*_loss_difference` is the largest between our loss and transformers' at the same step. `base_share` is the memory of the
    frozen weights, embeddings and head included, as a share of what they take in bfloat16. `fits` says of each side whether its memory
    was enough; where it was not, it has no figures.

    Raises UsageError for what cannot be measured, DoesNotFit where memory was enough for no side.
    """
    config = load_config(plan.folder)
    check_train_plan(plan, config)
    sides = [Side(*about) for about in side_settings(plan, config)]
    for together in [[side] for side in sides] if plan.on_cuda else [sides]:
        with ExitStack() as cleanup:
            for side in together:
                progress(f"loading {side.name}")
                with side.fitting():
                    side.worker = Worker(side.name, side.settings, "llmkit.bench.training_worker")
                    cleanup.callback(side.worker.close)
            _check_adapters([side for side in sides if side.worker is not None])
            _rows(plan, together, progress)
            if plan.data is not None:
                _chats(plan, [side for side in together if side.prefix != "transformers_checkpointing_"], progress)
    return summary(plan, sides)


def _turns(sides: list[Side], step: int) -> list[Side]:
    """Those that memory is enough for, in the order of this step."""
    left = [side for side in sides if side.fits]
    return left if step % 2 else left[::-1]


def _rows(plan: TrainBenchPlan, sides: list[Side], progress: Callable[[str], None]) -> None:
    """Steps on random tokens, and the memory that they took."""
    for step in range(plan.steps):
        for side in _turns(sides, step):
            progress(f"rows of {plan.length} tokens: step {step + 1}/{plan.steps} of {side.name}")
            with side.fitting():
                side.full.append(side.ask(do="full", step=step))
    for side in _turns(sides, 1):
        side.peak_bytes = side.ask(do="peak")["peak_bytes"]


def _chats(plan: TrainBenchPlan, sides: list[Side], progress: Callable[[str], None]) -> None:
    """Steps on chats, all sides beginning anew, the rival at the micro-batch that is fastest on the first of them."""
    for side in _turns(sides, 1):
        with side.fitting():
            if side.prefix == "transformers_":
                seconds = _micro_batches(side, plan.chats, progress)
                side.micro_batch, side.tried = min(seconds, key=seconds.__getitem__), tuple(seconds)
            side.ask(do="renew")
    for step in range(plan.repeat + 1):
        for side in _turns(sides, step):
            progress(
                f"{plan.chats} chats: step {step}/{plan.repeat} of {side.name}" if step else f"{plan.chats} chats: warm-up of {side.name}"
            )
            with side.fitting():
                side.chats.append(side.ask(do="chats", step=step, micro_batch=side.micro_batch))


def _micro_batches(side: Side, chats: int, progress: Callable[[str], None]) -> dict[int, float]:
    """Seconds of a step by micro-batch, smallest first, until one is clearly slower than the fastest before it or memory might end."""
    seconds: dict[int, float] = {}
    for size in [size for size in MICRO_BATCHES if size < chats] + [chats]:
        progress(f"{chats} chats: {side.name} in micro-batches of {size}")
        seconds[size] = side.ask(do="chats", step=0, micro_batch=size)["seconds"]
        # The next size takes at most as much again as this side has ever taken.
        if seconds[size] > _SLOWER * min(seconds.values()) or side.ask(do="peak")["peak_bytes"] > available_bytes():
            break
    return seconds


def side_settings(plan: TrainBenchPlan, config: ModelConfig) -> list[tuple[str, str, dict[str, Any]]]:
    """Name, prefix and settings of every side; ours is the first."""
    common = {
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
    ours = {**common, "side": "llmkit", "dtype": plan.dtype, "quantize": None, "checkpointing": plan.checkpointing}
    sides = [("llmkit", "", ours)]
    if plan.quantize is not None:
        sides.append((f"llmkit {plan.quantize}", f"{plan.quantize}_", {**ours, "quantize": plan.quantize}))
    if plan.against is not None:
        rival = {**common, "side": "transformers", "checkpointing": is_bitsandbytes(config)}
        sides.append(("transformers", "transformers_", rival))
        if plan.rival_checkpointing:
            sides.append(("transformers, checkpointing", "transformers_checkpointing_", {**rival, "checkpointing": True}))
    return sides


def check_train_plan(plan: TrainBenchPlan, config: ModelConfig) -> None:
    """UsageError for what cannot be measured, before anything is loaded."""
    if plan.device not in (None, "cpu") and not plan.on_cuda:
        raise UsageError(f"training is measured on cpu and on cuda, not on {plan.device}. Leave out --device for the CPU.")
    if plan.memory is not None and not plan.on_cuda:
        raise UsageError("--memory limits a GPU and has no effect on a CPU. Add --device cuda, or leave it out.")
    if plan.data is not None and plan.on_cuda:
        raise UsageError("chats are measured on the CPU alone. Leave out --data, or --device.")
    if plan.against not in (None, "transformers"):
        raise UsageError(f"{plan.against} is not compared in training. Use --against transformers.")
    if plan.rival_checkpointing and plan.against is None:
        raise UsageError("--rival-checkpointing has no effect without --against transformers. Add that, or leave it out.")
    if plan.rival_checkpointing and is_bitsandbytes(config):
        raise UsageError("--rival-checkpointing has no effect on a folder in nf4: transformers is measured with it anyway. Leave it out.")
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
    quantized = bool(config.hf.get("quantization_config"))
    if quantized and plan.against is not None and not is_bitsandbytes(config):
        raise UsageError(
            f"{plan.folder} is quantized, and losses are compared with full weights or bitsandbytes' 4 bits. "
            "Give the checkpoint it was made from."
        )
    if quantized and plan.quantize is not None:
        raise UsageError(f"--quantize has no effect: {plan.folder} is quantized already. Leave it out.")


def _check_adapters(sides: list[Side]) -> None:
    """The sides train the same factors, or their losses would have nothing to do with each other."""
    for side in sides[1:]:
        ours, theirs = sides[0].ready["adapter"], side.ready["adapter"]
        other = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
        if other:
            raise UsageError(
                f"{side.name} puts its adapter onto other linears than llmkit does ({other[0].rpartition('.')[0]}), because it fuses them. "
                "Leave out --against, or take a model of another family."
            )


def summary(plan: TrainBenchPlan, sides: list[Side]) -> dict[str, Any]:
    """The flat result."""
    fitting = [side for side in sides if side.fits]
    if not fitting:
        room = "memory" if plan.memory is None else shown(plan.memory)
        raise DoesNotFit(
            f"{' and '.join(side.name for side in sides)}: training does not fit in {room}. Take a smaller model, or shorter rows."
        )
    facts = fitting[0].ready
    result: dict[str, Any] = {"model": str(plan.folder), "device": facts["device"], "threads": facts["threads"], "against": plan.against}
    result |= {"rows": plan.rows, "row_length": plan.length, "steps": plan.steps}
    if plan.memory is not None:
        result["memory_bytes"] = plan.memory
    if plan.data is not None:
        targets = sum(step["targets"] for step in fitting[0].chats[1:]) // plan.repeat
        result |= {"data": str(plan.data), "chats": plan.chats, "repeat": plan.repeat, "chats_targets": targets}
    ours = [side for side in fitting if "base_bytes" in side.ready]
    rivals = [side for side in fitting if side not in ours]
    for side in sides:
        result |= {f"{side.prefix}fits": side.fits}
    for side in fitting:
        result |= {side.prefix + key: value for key, value in side.result().items()}
    for side in ours:
        base, full = side.ready["base_bytes"], side.ready["bf16_base_bytes"]
        result |= {"bf16_base_bytes": full, f"{side.prefix}base_bytes": base, f"{side.prefix}base_share": base / full}
    for rival in rivals:
        end = rival.prefix.removeprefix("transformers").rstrip("_")  # "", "_checkpointing"
        for side in ours:
            mine, theirs = side.result(), rival.result()
            result[f"{side.prefix}full_ratio{end}"] = mine["full_tok_s"] / theirs["full_tok_s"]
            result[f"{side.prefix}full_peak_ratio{end}"] = theirs["full_peak_bytes"] / mine["full_peak_bytes"]
            result[f"{side.prefix}full_loss_difference{end}"] = _difference(side.full, rival.full)
            if rival.chats:
                result[f"{side.prefix}chats_ratio"] = mine["chats_target_tok_s"] / theirs["chats_target_tok_s"]
                result[f"{side.prefix}chats_loss_difference"] = _difference(side.chats, rival.chats)
        if rival.chats:
            result["transformers_chats_micro_batch"] = rival.micro_batch
            result["transformers_chats_micro_batches_tried"] = ", ".join(map(str, rival.tried))
        result |= {key: value for key, value in rival.ready.items() if key.endswith("_version")}
    return result
