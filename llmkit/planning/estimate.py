"""What a training run costs beside memory: operations, time, energy, money, the loss that scaling laws expect. Estimates all. No torch."""

from __future__ import annotations

import time
from dataclasses import dataclass

from llmkit.planning.model_info import Facts

# L(N, D) = E + A / N^alpha + B / D^beta: N parameters, D tokens, nats per token of the laws' own data and tokenizers.
HOFFMANN = (1.69, 406.4, 410.7, 0.34, 0.28)  # Hoffmann et al. 2022 (arXiv:2203.15556), approach 3
BESIROGLU = (1.8172, 482.01, 2085.43, 0.3478, 0.3658)  # its replication, Besiroglu et al. 2024 (arXiv:2404.10102)
SOURCES = "Hoffmann et al. 2022, arXiv:2203.15556; constants of the replication, Besiroglu et al. 2024, arXiv:2404.10102"

UTILISATION = 0.4  # of a GPU's stated operations that training reaches (arXiv:2204.02311 reports 0.2 to 0.57)
MEASURED_UTILISATION = 0.7  # of a large matrix product's speed, measured here
GPU_WATTS = 500.0
CPU_WATTS = 12.0  # for each thread
PRICE_KWH = 0.30  # of electricity, in the currency of --price


@dataclass(frozen=True)
class Hardware:
    """What computes."""

    flops: float  # operations a second that training reaches
    watts: float
    price: float | None  # of an hour; None: only the electricity is paid
    how: str


def flops_per_token(facts: Facts, length: int, *, lora: bool, factors: int = 0, checkpointing: bool = False) -> float:
    """Operations that a token costs in training.

    6 N where all N weights learn: 2 N forwards, 2 N for the gradients of inputs, 2 N for those of weights (Kaplan et al. 2020,
    arXiv:2001.08361); 4 N where they are frozen, and 6 for each number of an adapter. Attention: 12 for each layer, width and visible key.
    Checkpointing computes the forward pass again.
    """
    weights = facts.active_parameters
    attention = sum(layer.mixer.token_flops(length) for layer in facts.config.layers)  # forwards
    forward = 2 * weights + attention
    total = forward + (2 if lora else 4) * weights + 2 * attention + 6 * factors
    return total + (forward if checkpointing else 0)


def expected_loss(parameters: float, tokens: float, law: tuple[float, float, float, float, float] = BESIROGLU) -> float:
    """Nats per token after training from scratch on so many tokens."""
    floor, a, b, alpha, beta = law
    return floor + a / parameters**alpha + b / tokens**beta


def best_tokens(parameters: float, law: tuple[float, float, float, float, float] = BESIROGLU) -> float:
    """The tokens with which a model of this size is the best for its operations: where d/dN = d/dD under 6 N D constant."""
    _, a, b, alpha, beta = law
    return (beta * b / (alpha * a) * parameters**alpha) ** (1 / beta)


def measured_flops(device: str) -> float:
    """Operations a second of a large matrix product, in float32 on a CPU and bfloat16 on a GPU."""
    if device.startswith("cpu"):
        import numpy as np

        size = 1024
        a = np.ones((size, size), np.float32)
        times = []
        for _ in range(4):
            start = time.perf_counter()
            a @ a
            times.append(time.perf_counter() - start)
        return 2 * size**3 / min(times)
    import torch

    size = 8192
    matrix = torch.ones(size, size, dtype=torch.bfloat16, device=device)
    times = []
    for _ in range(4):
        start = time.perf_counter()
        float((matrix @ matrix)[0, 0])  # reading a value waits for the device
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)
