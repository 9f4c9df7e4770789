"""What a recipe learns from: a loss as a function of a model and a batch, and what an evaluation says of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmkit.model.layers import PLAIN, Ops
from llmkit.model.transformer import Transformer
from llmkit.training.data.packing import IGNORE, Batch
from llmkit.training.loss import cross_entropy, row_losses, supervised, token_losses


@dataclass(kw_only=True)
class Objective:
    """Next-token prediction. ops: what the trained model computes with.

    A loss is a sum, which a step divides by the normalizers of all its batches: supervised tokens here, pairs elsewhere.
    """

    ops: Ops = PLAIN

    def loss_sum(self, model: nn.Module, batch: Batch) -> Tensor:
        return cross_entropy(model, batch, self.ops)

    def normalizer(self, batch: Batch) -> int:
        return batch.num_supervised

    def evaluate(self, model: nn.Module, batch: Batch) -> dict[str, float]:
        """Return sums over a held-out batch by the names of figures; `loss` is what is minimised."""
        return {"loss": float(self.loss_sum(model, batch))}


@dataclass
class Distillation(Objective):
    """`weight T^2 KL(teacher || student) + (1 - weight) CE` per supervised token, both softened by the temperature T (arXiv:1503.02531)."""

    teacher: Transformer
    temperature: float
    weight: float

    def loss_sum(self, model: nn.Module, batch: Batch) -> Tensor:
        assert isinstance(model, Transformer)
        indices, labels = supervised(batch)
        with torch.no_grad():
            known = self.teacher(batch.tokens, batch.positions, packed=batch.packed, logits_indices=indices, hidden=True)
        hidden = model(batch.tokens, batch.positions, packed=batch.packed, logits_indices=indices, hidden=True, ops=self.ops)

        def loss(logits: Tensor, part: slice) -> Tensor:
            with torch.no_grad():
                target = (self.teacher.logits(known[part]).float() / self.temperature).log_softmax(-1)
            soft = (logits / self.temperature).log_softmax(-1)
            divergence = F.kl_div(soft, target, reduction="none", log_target=True).sum(-1) * self.temperature**2
            return self.weight * divergence + (1 - self.weight) * F.cross_entropy(logits, labels[part], reduction="none")

        return row_losses(model, hidden, loss, self.ops).sum()

    def evaluate(self, model: nn.Module, batch: Batch) -> dict[str, float]:
        return {"loss": float(cross_entropy(model, batch, self.ops)), "distillation": float(self.loss_sum(model, batch))}


class Preference(Objective, ABC):
    """Pairs of answers: in every row the even sequences are chosen ones, each followed by its rejected one."""

    def normalizer(self, batch: Batch) -> int:
        return len(_sequence_of_labels(batch).unique()) // 2  # a pair of a heavy source may stand in a batch twice

    def loss_sum(self, model: nn.Module, batch: Batch) -> Tensor:
        return self._compared(model, batch)[0].sum()

    def evaluate(self, model: nn.Module, batch: Batch) -> dict[str, float]:
        losses, margin = self._compared(model, batch)
        return {"loss": float(losses.sum()), "accuracy": float((margin > 0).sum())}

    def _compared(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """The loss of each pair and its margin, `[pairs]`."""
        chosen, rejected, lengths = answers(model, batch, self.ops)
        margin = self.margin(chosen, rejected, lengths, batch)
        return self.losses(margin, chosen, lengths), margin

    @abstractmethod
    def margin(self, chosen: Tensor, rejected: Tensor, lengths: Tensor, batch: Batch) -> Tensor:
        """Return what is above 0 where the chosen answer is preferred, `[pairs]`; the arguments are those of `answers`."""

    @abstractmethod
    def losses(self, margin: Tensor, chosen: Tensor, lengths: Tensor) -> Tensor:
        """Return the loss of each pair, `[pairs]`."""


def answers(model: nn.Module, batch: Batch, ops: Ops) -> tuple[Tensor, Tensor, Tensor]:
    """Return log probabilities of chosen and of rejected answers, float32 `[pairs]`, and their supervised tokens, `[2, pairs]`."""
    losses, _ = token_losses(model, batch, ops)
    present, index = _sequence_of_labels(batch).unique(return_inverse=True)  # sorted: chosen before rejected
    sums = torch.zeros(len(present), device=losses.device).index_add(0, index, -losses)
    counts = torch.bincount(index, minlength=len(present))
    return sums[0::2], sums[1::2], torch.stack((counts[0::2], counts[1::2]))


def _sequence_of_labels(batch: Batch) -> Tensor:
    """The sequence of each supervised token, int64 `[supervised]`, in the order of the batch's sequences."""
    return batch.packed.ids[batch.labels != IGNORE]


@dataclass
class Dpo(Preference):
    """`-log sigmoid(beta margin)`, the margin being how much more the model has come to prefer the chosen answer (arXiv:2305.18290).

    reference: the model before training and what it computes with; of an adapter the same model without it.
    """

    reference: tuple[nn.Module, Ops]
    beta: float
    label_smoothing: float = 0.0

    def margin(self, chosen: Tensor, rejected: Tensor, lengths: Tensor, batch: Batch) -> Tensor:
        model, ops = self.reference
        with torch.no_grad():
            was_chosen, was_rejected, _ = answers(model, batch, ops)
        return (chosen - was_chosen) - (rejected - was_rejected)

    def losses(self, margin: Tensor, chosen: Tensor, lengths: Tensor) -> Tensor:
        smooth = self.label_smoothing
        return -(1 - smooth) * F.logsigmoid(self.beta * margin) - smooth * F.logsigmoid(-self.beta * margin)


@dataclass
class Orpo(Preference):
    """The chosen answer's mean loss per token, and `-beta log sigmoid` of the log odds ratio of the two (arXiv:2403.07691)."""

    beta: float

    def margin(self, chosen: Tensor, rejected: Tensor, lengths: Tensor, batch: Batch) -> Tensor:
        def log_odds(logprob: Tensor) -> Tensor:
            # The mean log probability of a token stays below 0 by a hair: at 0 the odds are infinite.
            return logprob - torch.log1p(-logprob.clamp(max=-1e-6).exp())

        return log_odds(chosen / lengths[0]) - log_odds(rejected / lengths[1])

    def losses(self, margin: Tensor, chosen: Tensor, lengths: Tensor) -> Tensor:
        return -chosen / lengths[0] - self.beta * F.logsigmoid(margin)
