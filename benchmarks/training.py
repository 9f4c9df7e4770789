"""`llmkit bench --train --against transformers`: LoRA next to transformers and PEFT, and on 4 bits bitsandbytes.

Both take the same steps from the same adapter on the same token ids, so that their losses are compared, too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from llmkit.bench.process import Worker
from llmkit.bench.training import Start, TrainBenchPlan, TrainingProgram, check_train_plan, common_settings, measure, summary
from llmkit.checkpoint.files import load_config
from llmkit.checkpoint.source import ModelSource
from llmkit.config import ModelConfig
from llmkit.errors import UsageError
from llmkit.planning.memory import available_bytes

LIBRARIES = ("transformers", "peft", "bitsandbytes")
MICRO_BATCHES = (1, 2, 4, 8, 16, 32)  # of chats that the rival tries
_SLOWER = 1.2  # than the fastest so far: longer padding will not make the next one faster


@dataclass
class TransformersProgram(TrainingProgram):
    """transformers and PEFT."""

    module: str = "benchmarks.training_worker"
    seconds: dict[int, float] = field(default_factory=dict)  # of a step on chats, by the micro-batches that were tried

    def check(self, first: TrainingProgram) -> None:
        """Raise UsageError where the adapters have other factors: their losses would have nothing to do with each other."""
        ours, theirs = first.ready["adapter"], self.ready["adapter"]
        other = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
        if other:
            raise UsageError(
                f"{self.name} puts its adapter onto other linears than llmkit does ({other[0].rpartition('.')[0]}), because it fuses them. "
                "Leave out --against, or take a model of another family."
            )

    def begin_chats(self, chats: int, progress: Callable[[str], None]) -> bool:
        """Find the fastest micro-batch: try sizes, smallest first, until one is clearly slower than the fastest before it or memory
        might end. With checkpointing on top of a plain run, chats are left out.
        """
        if self.prefix != "transformers_":
            return False
        for size in [size for size in MICRO_BATCHES if size < chats] + [chats]:
            progress(f"{chats} chats: {self.name} in micro-batches of {size}")
            self.seconds[size] = self.ask(do="chats", step=0, micro_batch=size)["seconds"]
            # The next size takes at most as much again as this program has ever taken.
            if self.seconds[size] > _SLOWER * min(self.seconds.values()) or self.ask(do="peak")["peak_bytes"] > available_bytes():
                break
        self.micro_batch = min(self.seconds, key=self.seconds.__getitem__)
        return True


def compare_training(
    plan: TrainBenchPlan,
    against: str,
    checkpointing: bool = False,
    progress: Callable[[str], None] = lambda _: None,
    start: Start = Worker,
) -> dict[str, Any]:
    """Measure llmkit and transformers; return what `bench_train` does, and `*_ratio` and `*_loss_difference`.

    A ratio above 1 is in our favour (speed ours / theirs, memory theirs / ours). `*_loss_difference` is the largest between our loss and
    transformers' at the same step. On chats transformers runs at the micro-batch that is fastest.
    checkpointing: measure transformers a second time, with gradient checkpointing. Of a folder in bitsandbytes' 4 bits it always has it,
    as PEFT prepares such a model (QLoRA, arXiv:2305.14314).
    """
    config = load_config(plan.folder)
    check_train_plan(plan, config)
    check_rival(plan, against, checkpointing)
    programs = measure(plan, progress, rival_programs(plan, checkpointing, config), start)
    result = summary(plan, programs)
    return result | {"against": against} | ratios(result, programs)


def check_rival(plan: TrainBenchPlan, against: str, checkpointing: bool) -> None:
    """Raise UsageError for what cannot be compared, before anything is loaded."""
    if against != "transformers":
        raise UsageError(f"{against} is not compared in training. Use --against transformers.")
    source = ModelSource(plan.folder)
    four_bits = source.quantized and source.format.transformers_reads
    if checkpointing and four_bits:
        raise UsageError("--rival-checkpointing has no effect on a folder in nf4: transformers is measured with it anyway. Leave it out.")
    if source.quantized and not four_bits:
        raise UsageError(
            f"{plan.folder} is quantized, and losses are compared with full weights or bitsandbytes' 4 bits. "
            "Give the checkpoint it was made from."
        )


def rival_programs(plan: TrainBenchPlan, checkpointing: bool, config: ModelConfig) -> list[TransformersProgram]:
    """Return transformers, and transformers with gradient checkpointing."""
    settings = {
        **common_settings(plan, config),
        "checkpointing": ModelSource(plan.folder).quantized,
    }
    programs = [TransformersProgram("transformers", "transformers_", settings)]
    if checkpointing:
        settings = {**settings, "checkpointing": True}
        programs.append(TransformersProgram("transformers, checkpointing", "transformers_checkpointing_", settings))
    return programs


def ratios(result: dict[str, Any], programs: Sequence[TrainingProgram]) -> dict[str, Any]:
    """Return the ratios and loss differences of every run of llmkit to every run of transformers, of those that fit."""
    found: dict[str, Any] = {}
    fitting = [program for program in programs if program.fits]
    for rival in (program for program in fitting if isinstance(program, TransformersProgram)):
        end = rival.prefix.removeprefix("transformers").rstrip("_")  # "", "_checkpointing"
        for ours in (program for program in fitting if not isinstance(program, TransformersProgram)):
            mine, theirs = ours.result(), rival.result()
            found[f"{ours.prefix}full_ratio{end}"] = mine["full_tok_s"] / theirs["full_tok_s"]
            found[f"{ours.prefix}full_peak_ratio{end}"] = theirs["full_peak_bytes"] / mine["full_peak_bytes"]
            found[f"{ours.prefix}full_loss_difference{end}"] = _difference(ours.full, rival.full)
            if rival.chats:
                found[f"{ours.prefix}chats_ratio"] = mine["chats_target_tok_s"] / theirs["chats_target_tok_s"]
                found[f"{ours.prefix}chats_loss_difference"] = _difference(ours.chats, rival.chats)
        if rival.chats:
            found["transformers_chats_micro_batch"] = rival.micro_batch
            found["transformers_chats_micro_batches_tried"] = ", ".join(map(str, rival.seconds))
        found |= {key: value for key, value in rival.ready.items() if key.endswith("_version")}
    return found


def _difference(mine: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]]) -> float:
    """Return the largest difference of the loss at the same step."""
    return max(abs(a["loss"] - b["loss"]) for a, b in zip(mine, theirs, strict=True))


def compared_run(result: dict[str, Any]) -> str:
    """Return which run of transformers the table's ratios are to: "", or "_checkpointing" where only that one fits."""
    return "_checkpointing" if result.get("transformers_checkpointing_fits") and not result["transformers_fits"] else ""


def notes(result: dict[str, Any]) -> list[str]:
    """Return what a person is told below the table of a comparison."""
    run, lines = compared_run(result), []
    if f"transformers{run}_flags" in result:
        versions = ", ".join(f"{name} {result[f'{name}_version']}" for name in LIBRARIES if f"{name}_version" in result)
        which = "" if "transformers_checkpointing_fits" not in result else " with checkpointing" if run else " without checkpointing"
        lines.append(f"{versions}: {result[f'transformers{run}_flags']}; ratios are to its run{which}, above 1 in llmkit's favour")
    if f"full_loss_difference{run}" in result:
        lines.append(f"largest difference of the loss over {result['steps']} steps: {result[f'full_loss_difference{run}']:.1e}")
        if "transformers_chats_micro_batch" in result:
            lines.append(
                f"chats: transformers is fastest in micro-batches of {result['transformers_chats_micro_batch']} "
                f"(of {result['transformers_chats_micro_batches_tried']}); "
                f"largest difference of the loss {result['chats_loss_difference']:.1e}"
            )
    return lines
