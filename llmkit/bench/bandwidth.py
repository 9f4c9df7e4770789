"""How fast this machine reads memory: what decoding cannot exceed."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from statistics import median

import numpy as np

SIZE = 1 << 29  # bytes; far more than the caches hold
RUNS = 5


def reader(device: str, threads: int) -> Callable[[], float]:
    """A function that measures: bytes per second, the median of a few passes over SIZE bytes."""
    once = _numpy(threads) if device.startswith("cpu") else _torch(device)
    once()

    def read() -> float:
        seconds = []
        for _ in range(RUNS):
            start = time.perf_counter()
            once()
            seconds.append(time.perf_counter() - start)
        return SIZE / median(seconds)

    return read


def _numpy(threads: int) -> Callable[[], object]:
    """One OR of all words, each thread its share. numpy lets go of the GIL, and a C loop of vector loads is no faster."""
    parts = np.array_split(np.ones(SIZE // 8, np.int64), threads)
    pool = ThreadPoolExecutor(threads)
    return lambda: list(pool.map(np.bitwise_or.reduce, parts))


def _torch(device: str) -> Callable[[], object]:
    """A matrix-vector product on a GPU."""
    import torch

    matrix = torch.ones(SIZE // (4 * 4096), 4096, device=device)
    vector = torch.ones(4096, device=device)
    return lambda: float(torch.mv(matrix, vector)[0])  # reading a value waits for the device
