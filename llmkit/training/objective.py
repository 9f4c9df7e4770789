"""What a recipe learns from: `loss` as functions of a model and a batch, and what an evaluation says of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmkit.model.transformer import Transformer
from llmkit.training.data.packing import IGNORE, Batch
from llmkit.training.loss import cross_entropy, row_losses, token_losses


class Objective:
    """Learning the targets. `sum_of`: the loss summed over the units of a batch, which are targets here and pairs elsewhere."""

    name = "loss"

    def sum_of(self, model: nn.Module, batch: Batch) -> Tensor:
        return cross_entropy(model, batch)

    def units(self, batch: Batch) -> int:
        return batch.target_count

    def judged(self, model: nn.Module, batch: Batch) -> dict[str, float]:
        """Sums over the units of a held-out batch, by the names of figures; `loss` is what is minimised."""
        return {"loss": float(self.sum_of(model, batch))}


@dataclass
class Distillation(Objective):
    """`weight T^2 KL(teacher || student) + (1 - weight) CE` per target, both softened by the temperature T (arXiv:1503.02531)."""

    teacher: Transformer
    temperature: float
    weight: float

    def sum_of(self, model: nn.Module, batch: Batch) -> Tensor:
        assert isinstance(model, Transformer)
        labels = batch.labels.flatten()
        rows = (labels != IGNORE).nonzero().squeeze(1)
        wanted = labels[rows]
        with torch.no_grad():
            known = self.teacher(batch.tokens, batch.positions, segments=batch.segments, follows=batch.follows, rows=rows, hidden=True)
        hidden = model(batch.tokens, batch.positions, segments=batch.segments, follows=batch.follows, rows=rows, hidden=True)

        def loss(logits: Tensor, part: slice) -> Tensor:
            with torch.no_grad():
                target = (self.teacher.logits(known[part]).float() / self.temperature).log_softmax(-1)
            soft = (logits / self.temperature).log_softmax(-1)
            divergence = F.kl_div(soft, target, reduction="none", log_target=True).sum(-1) * self.temperature**2
            return self.weight * divergence + (1 - self.weight) * F.cross_entropy(logits, wanted[part], reduction="none")

        return row_losses(model, hidden, loss).sum()

    def judged(self, model: nn.Module, batch: Batch) -> dict[str, float]:
        return {"loss": float(cross_entropy(model, batch)), "distillation": float(self.sum_of(model, batch))}


class Preference(Objective, ABC):
    """Pairs of answers: in every row the even documents are chosen ones, each followed by its rejected one."""

    def units(self, batch: Batch) -> int:
        return len(_document_of_targets(batch).unique()) // 2  # a pair of a heavy source may stand in a batch twice

    def sum_of(self, model: nn.Module, batch: Batch) -> Tensor:
        return self._compared(model, batch)[0].sum()

    def judged(self, model: nn.Module, batch: Batch) -> dict[str, float]:
        losses, margin = self._compared(model, batch)
        return {"loss": float(losses.sum()), "accuracy": float((margin > 0).sum())}

    def _compared(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """The loss of each pair and its margin, `[pairs]`."""
        chosen, rejected, lengths = self.answers(model, batch)
        margin = self.margin(chosen, rejected, lengths, batch, model)
        return self.losses(margin, chosen, lengths), margin

    def answers(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Log probabilities of chosen and rejected answers, float32 `[pairs]`, and their targets `[2, pairs]`."""
        losses, _ = token_losses(model, batch)
        present, index = _document_of_targets(batch).unique(return_inverse=True)  # sorted: chosen before rejected
        sums = torch.zeros(len(present), device=losses.device).index_add(0, index, -losses)
        counts = torch.bincount(index, minlength=len(present))
        return sums[0::2], sums[1::2], torch.stack((counts[0::2], counts[1::2]))

    @abstractmethod
    def margin(self, chosen: Tensor, rejected: Tensor, lengths: Tensor, batch: Batch, model: nn.Module) -> Tensor:
        """What is above 0 where the chosen answer is preferred, `[pairs]`."""

    @abstractmethod
    def losses(self, margin: Tensor, chosen: Tensor, lengths: Tensor) -> Tensor:
        """The loss of each pair, `[pairs]`."""


def _document_of_targets(batch: Batch) -> Tensor:
    """A number for the document of each target, int64 `[targets]`, in the order of the batch's documents."""
    return batch.segments[batch.labels != IGNORE]


@dataclass
class Dpo(Preference):
    """`-log sigmoid(beta margin)`, the margin being how much more the model has come to prefer the chosen answer (arXiv:2305.18290).

    reference: makes the model what it was, while it lasts (an adapter taken off), or gives another model.
    """

    reference: Callable[[nn.Module], AbstractContextManager[nn.Module]]
    beta: float
    label_smoothing: float = 0.0

    def margin(self, chosen: Tensor, rejected: Tensor, lengths: Tensor, batch: Batch, model: nn.Module) -> Tensor:
        with torch.no_grad(), self.reference(model) as before:
            was_chosen, was_rejected, _ = self.answers(before, batch)
        return (chosen - was_chosen) - (rejected - was_rejected)

    def losses(self, margin: Tensor, chosen: Tensor, lengths: Tensor) -> Tensor:
        smooth = self.label_smoothing
        return -(1 - smooth) * F.logsigmoid(self.beta * margin) - smooth * F.logsigmoid(-self.beta * margin)


@dataclass
class Orpo(Preference):
    """The chosen answer's mean loss per token, and `-beta log sigmoid` of the log odds ratio of the two (arXiv:2403.07691)."""

    beta: float

    def margin(self, chosen: Tensor, rejected: Tensor, lengths: Tensor, batch: Batch, model: nn.Module) -> Tensor:
        def log_odds(logprob: Tensor) -> Tensor:
            return logprob - torch.log1p(-logprob.clamp(max=-1e-6).exp())

        return log_odds(chosen / lengths[0]) - log_odds(rejected / lengths[1])

    def losses(self, margin: Tensor, chosen: Tensor, lengths: Tensor) -> Tensor:
        return -chosen / lengths[0] - self.beta * F.logsigmoid(margin)
