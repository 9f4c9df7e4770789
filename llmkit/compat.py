"""Everything that reaches into other libraries' internals, in one place, with the versions it was checked against.

Nobody else in llmkit does. Each function says what happens where the internal is not there: a slower path, never a wrong result.
Libraries are imported inside the functions: this module is below all others and costs nothing.
"""

from __future__ import annotations

import ctypes
import importlib.util
import logging
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


def openmp_functions() -> tuple[int, int, int] | None:
    """Return the addresses of GOMP_parallel, omp_get_thread_num and omp_get_num_threads in the runtime that PyTorch has loaded.

    None where PyTorch brings another OpenMP (macOS, Windows). Checked against the Linux wheels of torch 2.13, which carry GCC's libgomp.
    """
    import torch

    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        # The library is loaded already; names are looked up in what it depends on, too.
        runtime: Any = ctypes.CDLL(str(library))
        functions = (runtime.GOMP_parallel, runtime.omp_get_thread_num, runtime.omp_get_num_threads)
    except (OSError, AttributeError):
        return None
    parallel, thread, threads = (ctypes.cast(function, ctypes.c_void_p).value or 0 for function in functions)
    return parallel, thread, threads


def default_device() -> str:
    """Return cuda or mps where there is one, else cpu; torch is asked only where there may be one."""
    if not _may_have_gpu() or importlib.util.find_spec("torch") is None:  # the native kernels need no torch
        return "cpu"
    import torch

    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def _may_have_gpu() -> bool:
    """Return whether torch could find a GPU: an Apple processor, an NVIDIA driver (torch loads it by these names), or an AMD one (ROCm)."""
    if sys.platform == "darwin":
        return platform.machine() == "arm64"
    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return Path("/dev/kfd").exists()
    return True


def keep_freed_memory(largest: int = 32 << 20) -> None:
    """Have glibc keep freed memory for the next allocation instead of giving it back to the system.

    Activations of a few megabytes are allocated and freed in every layer; giving their pages back and faulting them in
    again took a fifth of the time of a prefill. Other systems' allocators keep memory by themselves.
    largest: bytes that are kept in one piece. In training the pieces that outlive a layer leave holes between them, and
    fewer pieces mean fewer holes.
    """
    m_trim_threshold, m_mmap_threshold = -1, -3  # malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(m_mmap_threshold, min(largest, 32 << 20))  # the largest that every glibc takes
        mallopt(m_trim_threshold, 512 << 20)


def fused_attention_ops() -> list[Any]:
    """Return the overloads behind `F.scaled_dot_product_attention`, for selective checkpointing to keep the results of.

    The names are PyTorch's own and not promised; one that is gone is left out, and its attention is then computed again in the
    backward pass. Checked against torch 2.13.
    """
    import torch

    names = ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention")
    found = (getattr(torch.ops.aten, f"_scaled_dot_product_{name}", None) for name in names)
    return [packet.default for packet in found if packet is not None]


def bitsandbytes() -> Any:
    """Import bitsandbytes without what it logs about kernels that are not used here. Checked against 0.50."""
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        import bitsandbytes as found
    finally:
        logger.setLevel(level)
    return found


def register_peft_linears(config: Any, wrappers: Mapping[type[nn.Module], type[nn.Module]]) -> None:
    """Tell PEFT what wraps which class of linears, through the registry of its LoraConfig. Checked against peft 0.21."""
    config._register_custom_module(dict(wrappers))
