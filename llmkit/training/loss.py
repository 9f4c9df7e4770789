"""Losses. A loss maps a model and a batch to the SUM over its targets, so that the loop can normalise a whole step at once."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from llmkit.training.data import IGNORE, Batch


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    """Next-token cross-entropy in nats, summed over the batch's targets (a scalar).

    Only slots with a target go through the head: on chats that is a small part of it.
    """
    labels = batch.labels.flatten()
    rows = (labels != IGNORE).nonzero().squeeze(1)
    logits = model(batch.tokens, batch.positions, segments=batch.segments, rows=rows)
    return F.cross_entropy(logits.float(), labels[rows], reduction="sum")
