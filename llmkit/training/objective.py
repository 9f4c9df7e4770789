"""What a recipe learns from: losses, objectives made of them, and what an evaluation says.

A loss maps a model and a batch to the SUM over its supervised tokens (or pairs), so that the loop can divide a whole step at once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llmkit.model.layers import PLAIN, Ops, autocast_dtype
from llmkit.model.transformer import Transformer
from llmkit.training.data.packing import IGNORE, Batch

# Logits computed at a time: 64 MiB of float32, a few hundred rows of a large vocabulary.
_LOGITS = 1 << 24
# The same for some columns of all rows: on a CPU they stay in its cache. No more numbers of a 16-bit head are upcast at a time.
_TILE = {"cpu": 1 << 22}
_SMALLEST = 1 << 10  # columns

RowLoss = Callable[[Tensor, slice], Tensor]  # float32 logits `[rows, vocab]` of a slice of the rows -> a loss for each row


def cross_entropy(model: nn.Module, batch: Batch, ops: Ops = PLAIN) -> Tensor:
    """Return next-token cross-entropy in nats, summed over the batch's supervised tokens (a scalar)."""
    return token_losses(model, batch, ops)[0].sum()


def token_losses(model: nn.Module, batch: Batch, ops: Ops = PLAIN) -> tuple[Tensor, Tensor]:
    """Return cross-entropy in nats of every supervised token, float32 `[supervised]`, and their rows in the flattened batch, int64.

    Only rows with a label go through the head: on chats that is a small part of them.
    """
    assert isinstance(model, Transformer)
    indices, labels = supervised(batch)
    hidden = model(batch.tokens, batch.positions, packed=batch.packed, logits_indices=indices, hidden=True, ops=ops)
    hidden = hidden.to(autocast_dtype(hidden))  # a norm may have given float32
    # Soft caps (Gemma 2) change each logit on its own; the gradient below is that of a plain product.
    if not _trains_head(model) and model.config.final_logit_softcapping is None and torch.is_grad_enabled():
        weight, scale = model.head.dequantize(), 1 / model.config.logits_scaling
        losses: Tensor = _FrozenCrossEntropy.apply(hidden, weight, labels, scale, ops)  # type: ignore[no-untyped-call]
        return losses, indices
    return row_losses(model, hidden, lambda logits, part: F.cross_entropy(logits, labels[part], reduction="none"), ops), indices


def supervised(batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the rows of the flattened batch that have a label, and these labels: int64 `[supervised]` each."""
    labels = batch.labels.flatten()
    indices = (labels != IGNORE).nonzero().squeeze(1)
    return indices, labels[indices]


def row_losses(model: nn.Module, hidden: Tensor, loss: RowLoss, ops: Ops = PLAIN) -> Tensor:
    """Return a loss for each row of final hidden states `[rows, hidden]`, float32 `[rows]`.

    The logits of all rows are never in memory at once. With a frozen head (LoRA) the gradient of each row's loss by its hidden state is
    computed with the loss, so nothing is computed twice and the head gets none; else a part's logits are made again in the backward pass.
    """
    assert isinstance(model, Transformer)

    def logits(hidden: Tensor) -> Tensor:
        return model.logits(hidden, ops).float()

    rows = max(1, _LOGITS // model.config.vocab_size)
    parts = [slice(start, start + rows) for start in range(0, len(hidden), rows)]
    if not torch.is_grad_enabled() or (len(parts) <= 1 and _trains_head(model)):
        return torch.cat([loss(logits(hidden[part]), part) for part in parts]) if parts else hidden.new_zeros(0).float()
    if _trains_head(model):
        return torch.cat([checkpoint(lambda h, p: loss(logits(h), p), hidden[part], part, use_reentrant=False) for part in parts])
    out: Tensor = _FrozenHead.apply(hidden, logits, loss, parts)  # type: ignore[no-untyped-call]
    return out


class _FrozenCrossEntropy(torch.autograd.Function):
    """Cross-entropy of `hidden W^T scale` for a W that is not trained, in one pass over W (arXiv:1805.02867, as in FlashAttention).

    Its gradient, `(softmax(logits) W - W[labels]) scale`, is attention to the rows of W: some of them at a time, with the sums for the
    largest logit so far.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, scale: float, ops: Ops) -> Tensor:
        count, (vocab, size) = len(hidden), weight.shape
        scaled = hidden * scale if scale != 1 else hidden
        columns = max(_SMALLEST, _TILE.get(hidden.device.type, _LOGITS) // max(count, size))
        largest = torch.full((count, 1), -torch.inf, device=hidden.device)
        total, target = torch.zeros_like(largest), torch.zeros_like(largest)
        expected = torch.zeros(count, size, device=hidden.device)  # row of W, times total
        for start in range(0, vocab, columns):
            matmul, matmul_back = ops.frozen_head(hidden, weight[start : start + columns])
            logits = matmul(scaled).float()  # [count, columns]
            place = labels.unsqueeze(1) - start  # [count, 1]: the column of each label, where it is among these
            at = place.clamp(0, logits.shape[1] - 1)
            target = torch.where(place == at, logits.gather(1, at), target)
            before, largest = largest, torch.maximum(largest, logits.amax(1, keepdim=True))
            # In place: `logits` is a tile of 16 MiB, and a second one would leave the cache. It becomes exp(logit - largest), and what was
            # summed relative to the largest logit so far is shrunk to the new one (online softmax).
            logits.sub_(largest).exp_()
            shrink = (before - largest).exp_()  # [count, 1]; 0 at first, where `before` is -inf
            total.mul_(shrink).add_(logits.sum(1, keepdim=True))
            expected.mul_(shrink).add_(matmul_back(logits.to(hidden.dtype)))
            del logits  # before those of the next columns
        losses = total.log() + (largest - target)  # of the same rounded products: never below 0
        wanted = weight[labels].to(hidden.dtype).float()  # as `matmul_back` takes it: what is certain has no gradient
        ctx.save_for_backward(expected.div_(total).sub_(wanted).mul_(scale).to(hidden.dtype))
        return losses.squeeze(1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradients,) = ctx.saved_tensors
        return gradients * grads[0].unsqueeze(1).to(gradients.dtype), None, None, None, None


class _FrozenHead(torch.autograd.Function):
    """Row i of the loss depends on row i of the hidden states alone: one gradient for each row, scaled by what comes back."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, logits: Callable[[Tensor], Tensor], loss: RowLoss, parts: list[slice]) -> Tensor:
        losses: list[Tensor] = []
        gradients: list[Tensor] = []
        for part in parts:
            with torch.enable_grad():
                leaf = hidden[part].detach().requires_grad_()
                found = loss(logits(leaf), part)
                gradients += torch.autograd.grad(found.sum(), leaf)
            losses.append(found.detach())
        ctx.save_for_backward(torch.cat(gradients) if gradients else torch.zeros_like(hidden))
        return torch.cat(losses) if losses else hidden.new_zeros(0, dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (gradients,) = ctx.saved_tensors
        return gradients * grads[0].unsqueeze(1).to(gradients.dtype), None, None, None


def _trains_head(model: Transformer) -> bool:
    """Whether the head's weight takes a gradient: always where it is the embedding and that is trained."""
    return any(parameter.requires_grad for parameter in model.head.parameters())


# --- objectives ----------------------------------------------------------------------------------------------------


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
            # The last hidden states alone: the teacher's logits are made part by part below, like the student's.
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
    # A prefix that both answers share stands in the batch once and has no labels, so every supervised token is of one answer.
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
