"""Losses. A loss maps a model and a batch to the SUM over its units, so that the loop can normalise a whole step at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llmkit.model import native
from llmkit.model.transformer import Transformer
from llmkit.training.data import IGNORE, Batch

# Logits computed at a time: 64 MiB of float32, a few hundred rows of a large vocabulary.
_LOGITS = 1 << 24
# Numbers of a 16-bit head that are widened at a time.
_WIDENED = 1 << 22

RowLoss = Callable[[Tensor, slice], Tensor]  # float32 logits `[rows, vocab]` of a slice of the rows -> a loss for each row


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    """Next-token cross-entropy in nats, summed over the batch's targets (a scalar)."""
    return token_losses(model, batch)[0].sum()


def token_losses(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Cross-entropy in nats of every target, float32 `[targets]`, and the targets' places in the flattened batch, int64.

    Only slots with a target go through the head: on chats that is a small part of them.
    """
    assert isinstance(model, Transformer)
    labels = batch.labels.flatten()
    rows = (labels != IGNORE).nonzero().squeeze(1)
    hidden = model(batch.tokens, batch.positions, segments=batch.segments, rows=rows, hidden=True)
    wanted = labels[rows]
    if not _trains_head(model) and model.config.final_logit_softcapping is None and torch.is_grad_enabled():
        weight = model.head.dequantize()
        losses: Tensor = _FrozenCrossEntropy.apply(hidden, weight, wanted, 1 / model.config.logits_scaling)  # type: ignore[no-untyped-call]
        return losses, rows
    return row_losses(model, hidden, lambda logits, part: F.cross_entropy(logits, wanted[part], reduction="none")), rows


def row_losses(model: nn.Module, hidden: Tensor, loss: RowLoss) -> Tensor:
    """A loss for each row of final hidden states `[rows, hidden]`, float32 `[rows]`; the logits of all rows are never in memory at once.

    With a frozen head (LoRA) the gradient of each row's loss by its hidden state is computed beside the loss, so nothing
    is computed twice and the head gets none; else a part's logits are made again on the way back.
    """
    assert isinstance(model, Transformer)
    logits = model.logits
    rows = max(1, _LOGITS // model.config.vocab_size)
    parts = [slice(start, start + rows) for start in range(0, len(hidden), rows)]
    if not torch.is_grad_enabled() or (len(parts) <= 1 and _trains_head(model)):
        return torch.cat([loss(logits(hidden[part]).float(), part) for part in parts]) if parts else hidden.new_zeros(0).float()
    if _trains_head(model):
        return torch.cat([checkpoint(lambda h, p: loss(logits(h).float(), p), hidden[part], part, use_reentrant=False) for part in parts])
    out: Tensor = _FrozenHead.apply(hidden, logits, loss, parts)  # type: ignore[no-untyped-call]
    return out


class _FrozenCrossEntropy(torch.autograd.Function):
    """`row_losses` of cross-entropy for a matrix that is not trained, with one buffer for the logits of all parts."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, scale: float) -> Tensor:
        count, vocab = len(hidden), len(weight)
        rows = max(1, min(count, _LOGITS // vocab))
        losses = torch.empty(count, dtype=torch.float32, device=hidden.device)
        gradients = torch.empty_like(hidden)
        project, back = _head_products(hidden, weight, rows)
        for start in range(0, count, rows):
            part = slice(start, start + rows)
            wanted = labels[part].unsqueeze(1)
            logits = project(hidden[part] * scale)
            target = logits.gather(1, wanted).float()
            wide = logits.float()  # the logits themselves on a CPU
            largest = wide.amax(1, keepdim=True)
            wide.sub_(largest).exp_()
            total = wide.sum(1, keepdim=True)
            losses[part] = (total.log() + largest - target).squeeze(1)
            logits = wide.to(hidden.dtype)
            found = back(logits) / total.to(hidden.dtype)
            gradients[part] = (found - weight[wanted.squeeze(1)].to(hidden.dtype)) * scale
            del logits, wide  # before those of the next part
        ctx.save_for_backward(gradients)
        return losses

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (gradients,) = ctx.saved_tensors
        return gradients * grads[0].unsqueeze(1).to(gradients.dtype), None, None, None


def _head_products(hidden: Tensor, weight: Tensor, rows: int) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """`h -> h W^T` for at most so many rows of hidden states, and `logits -> logits W`; W is never widened as a whole."""
    if native.usable(hidden):
        head = [native.factor(weight)]
        return lambda h: native.project(h, head)[0], lambda logits: native.project_back([logits], head)
    vocab, dtype = len(weight), hidden.dtype
    columns = max(1, _WIDENED // weight.shape[1]) if weight.dtype != dtype else vocab
    tiles = [slice(start, start + columns) for start in range(0, vocab, columns)]
    buffer = torch.empty(rows, vocab, dtype=dtype, device=hidden.device)

    def project(h: Tensor) -> Tensor:
        logits = buffer[: len(h)]
        for tile in tiles:
            torch.mm(h, weight[tile].to(dtype).T, out=logits[:, tile])
        return logits

    def back(logits: Tensor) -> Tensor:
        found = torch.zeros(len(logits), weight.shape[1], dtype=dtype, device=logits.device)
        for tile in tiles:
            found.addmm_(logits[:, tile], weight[tile].to(dtype))
        return found

    return project, back


class _FrozenHead(torch.autograd.Function):
    """Row i of the loss depends on row i of the hidden states alone: one gradient for each row, scaled by what comes back."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, logits: Callable[[Tensor], Tensor], loss: RowLoss, parts: list[slice]) -> Tensor:
        losses: list[Tensor] = []
        gradients: list[Tensor] = []
        for part in parts:
            with torch.enable_grad():
                leaf = hidden[part].detach().requires_grad_()
                found = loss(logits(leaf).float(), part)
                gradients += torch.autograd.grad(found.sum(), leaf)
            losses.append(found.detach())
        ctx.save_for_backward(torch.cat(gradients) if gradients else torch.zeros_like(hidden))
        return torch.cat(losses) if losses else hidden.new_zeros(0, dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (gradients,) = ctx.saved_tensors
        return gradients * grads[0].unsqueeze(1).to(gradients.dtype), None, None, None


def _trains_head(model: Transformer) -> bool:
    return any(parameter.requires_grad for parameter in model.head.parameters())
