"""The native backend: a model flattened into a plan, one call of C++ per step. See cpu/plan.h for the other side. No torch.

Rows are bitwise independent: the logits of a row are the same bits whatever else is in the batch, however its prompt was
cut into steps, and for any number of threads.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from llmkit.config import ModelConfig, RopeConfig
from llmkit.errors import DoesNotFit, LLMKitError, UsageError
from llmkit.kernels.format import Weight
from llmkit.kernels.plan import CACHE_KINDS, Description, adapter_terms, plan_problem
from llmkit.rope import inverse_frequencies

if TYPE_CHECKING:
    from llmkit.engine.backend import StepBatch
    from llmkit.kernels.cpu._native import Plan

# What an extension of an older llmkit may lack.
_FUNCTIONS = ("product", "dequantize", "matmul", "learn", "attend", "norm", "norm_back", "rotate", "gate", "gate_back", "lend")

LowRank = tuple[NDArray[np.float32], NDArray[np.float32]]  # A [rank, in], B [out, rank], scaled: y += B (A x)


def chosen_kernels() -> str | None:
    """Return what the environment variable LLMKIT_KERNELS chooses: None is the best instruction set of this processor.

    "reference" is PyTorch; the name of an instruction set (avx512_vnni, avxvnni, avx2, neon_i8mm, neon_dotprod, portable) is that one.
    Asked where a backend or the operations of a model are built, and passed on from there: no kernel call reads the environment.
    """
    return os.environ.get("LLMKIT_KERNELS") or None


def native_problem(config: ModelConfig | None = None) -> str | None:
    """Return why the native kernels cannot run this model here, or None if they can."""
    wanted = chosen_kernels()
    if wanted == "reference":
        return "LLMKIT_KERNELS=reference asks for PyTorch"
    try:
        from llmkit.kernels.cpu import _native
    except ImportError:
        return "the native kernels were not built (no C++ compiler when llmkit was installed)"
    missing = [name for name in _FUNCTIONS if not hasattr(_native, name)]
    if missing:
        return f"the native kernels were built for an older llmkit, without {missing[0]}; install llmkit again"
    names = _native.available()
    if wanted and wanted not in names:
        raise UsageError(f"LLMKIT_KERNELS is {wanted!r}, which this processor does not run. Use one of {', '.join(names)} or reference.")
    return None if config is None else plan_problem(config)


def default_threads() -> int:
    """Return the physical cores that this process may use, within the CPU time that its control group is given."""
    from llmkit.kernels.cpu import _native

    quota = cpu_quota()
    # Whole CPUs: a thread more than the quota pays for is stopped within each period, and the others wait for it at the next barrier.
    return _native.physical_cores() if quota is None else max(1, min(_native.physical_cores(), int(quota)))


def cpu_quota(root: Path = Path("/")) -> float | None:
    """Return how many CPUs' time the control groups of this process are given, the least of nested ones; None: no limit.

    Version 2 says "QUOTA PERIOD" in cpu.max (microseconds; "max": none), version 1 in cpu.cfs_quota_us (-1: none) and
    cpu.cfs_period_us (Linux, Documentation/admin-guide/cgroup-v2.rst and scheduler/sched-bwc.rst). root: where /proc and /sys stand.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # no Linux
        return None
    quotas = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / controllers
        # Within a container the path may be that of the host, which is not there: the container's own group is then the mount itself.
        for group in dict.fromkeys((mount / path.strip("/"), *(mount / path.strip("/")).parents)):
            if not group.is_relative_to(mount):
                break
            if (quota := _quota_of(group, version=1 if controllers else 2)) is not None:
                quotas.append(quota)
    return min(quotas, default=None)


def _quota_of(group: Path, version: int) -> float | None:
    names = ["cpu.max"] if version == 2 else ["cpu.cfs_quota_us", "cpu.cfs_period_us"]
    try:
        quota, period = " ".join((group / name).read_text() for name in names).split()
        return None if quota in ("max", "-1") else int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None


class NativeBackend:
    """Runs a model over a paged KV cache in C++; see `llmkit.engine.backend.Backend` for the contract.

    weights: our parameter names; matrices as float32, float16, bfloat16 (its bits in uint16) or `QuantizedMatrix`, used in
    place (mapped files stay mapped); vectors in any of the float formats. threads: `default_threads()` by default.
    kv_bits: 32, 16 (float16) or 8 (int8 with a scale per position and head).
    """

    block_size = 16
    state_bytes = 0  # `native_problem` refuses models with recurrent states

    def __init__(self, config: ModelConfig, weights: Mapping[str, Weight], *, threads: int | None = None, kv_bits: int = 32) -> None:
        from llmkit.kernels.cpu import _native

        if kv_bits not in CACHE_KINDS:
            raise UsageError(f"kv_bits is {kv_bits}; the cache keeps 32, 16 or 8 bits a number.")
        self.config = config
        self.kv_bits = kv_bits
        self._adapters: dict[str, int] = {}
        description = Description(config, weights)
        try:
            self.plan: Plan = _native.Plan(
                chosen_kernels(),
                default_threads() if threads is None else threads,
                description.model(CACHE_KINDS[kv_bits]),
                [description.layer(index) for index in range(config.num_hidden_layers)],
            )
        except ValueError as error:
            raise LLMKitError(f"the native kernels cannot run this model: {error}. Use LLMKIT_KERNELS=reference.") from error

    @property
    def cache_windows(self) -> tuple[int | None, ...]:
        return self.config.cache_windows

    @property
    def path(self) -> str:
        """What computes, in words."""
        return f"native {self.plan.kernels}, {self.threads} thread{'s' * (self.threads > 1)}, {self.kv_bits}-bit cache"

    @property
    def threads(self) -> int:
        return self.plan.threads

    def block_bytes(self, group: int) -> int:
        return self.plan.block_bytes(group)

    def add_adapter(self, name: str, linears: Mapping[str, LowRank]) -> None:
        """Make a low-rank adapter known by name: A and B, float32, by the path of their linear; B with the scale in it."""
        try:
            self._adapters[name] = self.plan.add_adapter(adapter_terms(linears))
        except ValueError as error:
            raise UsageError(f"adapter {name!r} does not fit this model: {error}. Was it trained on another one?") from error

    def step(self, batch: StepBatch, hidden: bool = False) -> NDArray[np.float32]:
        """Store the tokens' keys and values; return float32 logits (or final hidden states) `[R, vocab]`."""
        out = np.empty((len(batch.logits_indices), self.config.hidden_size if hidden else self.config.vocab_size), np.float32)
        try:
            self.plan.step(
                _integers(batch.tokens),
                _integers(batch.positions),
                _integers(batch.sequences),
                [(_integers(table), len(table)) for table in batch.block_tables],
                self._rotary(batch.contexts),
                self._adapter_ids(batch.adapters),
                _integers(batch.logits_indices),
                hidden,
                out,
            )
        except MemoryError as error:
            raise DoesNotFit("the KV cache does not fit in memory. Take a smaller --ctx-size, or --kv-bits 8.") from error
        except RuntimeError as error:
            raise LLMKitError(f"{error}.") from error
        return out

    def _rotary(self, contexts: NDArray[np.int32]) -> list[tuple[NDArray[np.float32], int, NDArray[np.int32]]]:
        """Per kind of rotation: the sets of frequencies (the factor on cos and sin last in each) and which one each sequence uses."""
        out = []
        for rope, dim in self.config.rotaries:
            if rope.by_length:
                lengths, which = np.unique(contexts, return_inverse=True)
            else:
                lengths, which = np.zeros(1, np.int32), np.zeros(len(contexts), np.int32)
            sets = _frequencies(rope, dim, tuple(lengths.tolist()))
            out.append((sets, len(sets), which.astype(np.int32, copy=False)))
        return out

    def _adapter_ids(self, adapters: Iterable[str | None]) -> NDArray[np.int32] | None:
        names = list(adapters)
        unknown = next((name for name in names if name is not None and name not in self._adapters), None)
        if unknown is not None:
            raise UsageError(f"adapter {unknown!r} is not loaded; loaded are {', '.join(self._adapters) or 'none'}.")
        return None if all(name is None for name in names) else np.array([self._adapters.get(name or "", -1) for name in names], np.int32)


@lru_cache(maxsize=64)
def _frequencies(rope: RopeConfig, head_dim: int, lengths: tuple[int, ...]) -> NDArray[np.float32]:
    """float32 `[len(lengths), rotary_dim / 2 + 1]`: for each length the frequencies and the factor on cos and sin."""
    found = [inverse_frequencies(rope, head_dim, length) for length in lengths]
    return np.stack([np.append(frequencies, np.float32(factor)) for frequencies, factor in found])


def _integers(array: NDArray[np.int32]) -> NDArray[np.int32]:
    return np.ascontiguousarray(array, np.int32)
