"""Optimizers and the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

# Quintic Newton-Schulz coefficients of Muon: the steepest slope at zero, at the price of singular values near, not at, 1.
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalize(matrices: Tensor, steps: int = 5, eps: float = 1e-7) -> Tensor:
    """The nearest (semi-)orthogonal matrices, roughly: U V^T of each `[..., rows, columns]`, singular values in 0.7..1.2."""
    a, b, c = _NEWTON_SCHULZ
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(Optimizer):
    """Momentum orthogonalised by Newton-Schulz, for hidden matrices (Jordan 2024, kellerjordan.github.io/posts/muon).

    Updates are scaled by 0.2 sqrt(max(rows, columns)), so learning rate and weight decay mean what they mean to AdamW
    (arXiv:2502.16982). Unlike torch.optim.Muon it works in the gradient's dtype (bfloat16 products are nine times slower
    than float32 on a CPU without bf16 units) and treats all matrices of one shape in one batched product.
    """

    def __init__(self, params: Iterable[Any], lr: float = 1e-3, momentum: float = 0.95, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in by_shape.items():
                gradients = [p.grad for p in parameters if p.grad is not None]
                for p in parameters:
                    if not self.state[p]:
                        self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                buffers = [self.state[p]["momentum_buffer"] for p in parameters]
                torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
                nesterov = torch._foreach_lerp(gradients, buffers, group["momentum"])
                updates = orthogonalize(torch.stack(list(nesterov))).unbind()
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(parameters, list(updates), alpha=-group["lr"] * 0.2 * math.sqrt(max(shape)))


def make_optimizers(
    model: nn.Module,
    kind: Literal["adamw", "muon"],
    learning_rate: float,
    muon_learning_rate: float | None = None,
    betas: tuple[float, float] = (0.9, 0.95),
    weight_decay: float = 0.1,
) -> list[Optimizer]:
    """Optimizers for the trainable parameters; each group's `peak_lr` is what the schedule multiplies.

    Matrices decay; norms, biases and embeddings (with a tied or untied head) do not, and never go to Muon.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = [p for name, p in trainable if p.ndim == 2 and id(p) not in embeddings and not name.startswith("lm_head")]
    hidden = {id(p) for p in matrices}
    others = [p for _, p in trainable if id(p) not in hidden]
    groups: list[dict[str, Any]] = [{"params": others, "lr": learning_rate, "weight_decay": 0.0}]
    optimizers: list[Optimizer] = []
    if kind == "adamw":
        groups.append({"params": matrices, "lr": learning_rate, "weight_decay": weight_decay})
    elif matrices:
        optimizers.append(Muon(matrices, lr=muon_learning_rate or learning_rate, weight_decay=weight_decay))
    groups = [group for group in groups if group["params"]]
    if groups:
        optimizers.append(AdamW(groups, lr=learning_rate, betas=betas, fused=True))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def schedule(kind: str, progress: float, step: int, warmup_steps: int, final: float, decay: float = 0.2) -> float:
    """The share of the peak learning rate.

    progress: share of the run that has passed, 0..1. step: optimizer steps done. final: the share at the end.
    cosine falls from 1 to `final` (arXiv:1608.03983), linear likewise; wsd stays at 1 and falls linearly over the last
    `decay` of the run (arXiv:2404.06395); constant stays. The first `warmup_steps` steps rise linearly on top of that.
    """
    progress = min(max(progress, 0.0), 1.0)
    if kind == "cosine":
        share = final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))
    elif kind == "linear":
        share = final + (1 - final) * (1 - progress)
    elif kind == "wsd":
        share = 1.0 if progress <= 1 - decay else final + (1 - final) * (1 - progress) / decay
    else:
        share = 1.0
    return share * min(1.0, (step + 1) / (warmup_steps + 1))
