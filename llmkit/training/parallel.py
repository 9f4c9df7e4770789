"""The processes of a run: one, or those that torchrun or accelerate launch started. What they do together goes through here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from llmkit.errors import UsageError
from llmkit.model.transformer import Block


class Processes:
    """Who takes part, and what is shared. `kind`: ddp, every process holds the model; fsdp, each holds a part of every block."""

    def __init__(self, on_cpu: bool, kind: Literal["ddp", "fsdp"] = "ddp") -> None:
        # Gradients are found for every trained weight, and buffers (quantized weights) never change: nothing to look for or to send.
        handlers = [DistributedDataParallelKwargs(broadcast_buffers=False)]
        self.accelerator = Accelerator(cpu=on_cpu, kwargs_handlers=handlers)
        self.count, self.rank, self.kind = self.accelerator.num_processes, self.accelerator.process_index, kind
        if kind == "fsdp" and self.count == 1:
            raise UsageError(
                "parallel=fsdp shares a model among processes, and there is one. Start several with torchrun, or drop parallel."
            )

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        """Of this process, where the recipe leaves the choice of a GPU to it."""
        return self.accelerator.device

    def shard(self, objective: nn.Module) -> None:
        """Cut the parameters in place (fsdp), before optimizers are made of them."""
        if self.kind == "fsdp":
            # A block is gathered when it runs and freed behind it; the rest (embedding, head, norms) belongs to the root.
            for module in objective.modules():
                if isinstance(module, Block):
                    fully_shard(module)
            fully_shard(objective)

    def wrap(self, objective: nn.Module) -> nn.Module:
        """Return what is called to compute a loss: it shares the gradients."""
        if self.count == 1 or self.kind == "fsdp":
            return objective
        # The model is on its device already, and accelerate would move it to one of its own choice.
        wrapped: nn.Module = self.accelerator.prepare_model(objective, device_placement=False)
        return wrapped

    @contextmanager
    def sharing(self, wrapped: nn.Module, last: bool) -> Iterator[None]:
        """Enter around forward and backward of a micro-batch: gradients are shared after the last one of a step only.

        Those of the others are added up where they are, which saves a step with k micro-batches k - 1 all-reduces.
        """
        if isinstance(wrapped, DistributedDataParallel) and not last:
            with wrapped.no_sync():
                yield
            return
        if self.kind == "fsdp":
            wrapped.set_requires_gradient_sync(last)  # type: ignore[operator]
        yield

    def sum(self, value: float) -> float:
        """Return the sum over all processes."""
        if self.count == 1:
            return value
        # float64: counts of tokens and sums of losses are exact in it.
        total = self.accelerator.reduce(torch.tensor(value, dtype=torch.float64, device=self.device), "sum")
        return float(total)

    def any(self, flag: bool) -> bool:
        """Return whether one of them says so; all of them learn it."""
        return self.sum(float(flag)) > 0

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Around what the first process makes and the others then find."""
        with self.accelerator.main_process_first():
            yield

    def wait(self) -> None:
        self.accelerator.wait_for_everyone()


def gathered(value: Any) -> Any:
    """Return the same with every sharded tensor whole and on the CPU; all processes call it together, and in the same order."""
    if isinstance(value, DTensor):
        return value.full_tensor().cpu()
    if isinstance(value, Mapping):
        return {key: gathered(entry) for key, entry in value.items()}
    return type(value)(gathered(entry) for entry in value) if isinstance(value, (list, tuple)) else value


def scattered(value: Tensor, like: Tensor) -> Tensor:
    """Return a whole tensor cut as `like` is, if it is."""
    if isinstance(like, DTensor) and value.shape == like.shape:
        return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)
    return value


def scatter_states(saved: dict[str, Any], parameters: Sequence[Tensor]) -> dict[str, Any]:
    """Return an optimizer's whole state with its tensors cut as the parameters are, which are given in the optimizer's order."""
    state = {
        index: {name: scattered(entry, parameters[index]) if isinstance(entry, Tensor) else entry for name, entry in entries.items()}
        for index, entries in saved["state"].items()
    }
    return {**saved, "state": state}
