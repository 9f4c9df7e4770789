"""How much memory there is, and how much a process has used. No torch, but for what a GPU has."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from llmkit.errors import UsageError

if TYPE_CHECKING:
    from llmkit.checkpoint.source import ModelSource

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
_CGROUPS = (  # limit and use of a container: version 2, version 1
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat", "inactive_file"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        "/sys/fs/cgroup/memory/memory.stat",
        "total_inactive_file",
    ),
)


def parse_size(text: str) -> int:
    """Bytes of "8GB", "512 MiB", "6.5g" or a number; GB is 10^9, GiB 2^30. UsageError for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", text.upper())
    size = float(found[1]) * _UNITS[found[2]] if found is not None and found[2] in _UNITS else 0
    if not 1 <= size < 1 << 63:
        raise UsageError(f"{text!r:.40} is no amount of memory. Write it as 8GB, 512MB or 7.5GiB.")
    return int(size)


def shown(nbytes: float) -> str:
    """1.23 GB, 45 MB."""
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 0.995e9 else f"{nbytes / 1e6:.0f} MB" if nbytes >= 0.95e6 else f"{nbytes / 1e3:.0f} kB"


def available_bytes(device: str = "cpu") -> int:
    """Memory that this process may still take on a device: what the system calls available, within the container's limit.

    UsageError for a GPU that is not there.
    """
    if device.startswith("cuda"):
        check_gpu(device, "Take another device; llmkit plan --memory 8GB plans for one that is elsewhere.")
        import torch

        free, _ = torch.cuda.mem_get_info(torch.device(device))
        return int(free)
    meminfo = Path("/proc/meminfo")
    if meminfo.exists() and (found := re.search(r"MemAvailable:\s*(\d+) kB", meminfo.read_text())):
        free = int(found[1]) * 1024
    else:
        import psutil

        free = psutil.virtual_memory().available
    return min([free, *(left for paths in _CGROUPS if (left := _left_in(*paths)) is not None)])


def clearly_fits(source: ModelSource, positions: int) -> bool:
    """Whether a model fits into the memory of this CPU by so wide a margin that nothing has to be counted: most small ones do.

    False where somebody says how much memory there is (LLMKIT_MEMORY).
    """
    config = source.config
    # Weights of 4 bits may become float32. A position has keys and values of float32 in each layer, together at most 4 times as wide as
    # the hidden state in every family (Gemma's heads are the widest).
    need = 8 * source.format.stored_bytes + 16 * config.hidden_size * config.num_hidden_layers * positions + 2**30
    return not os.environ.get("LLMKIT_MEMORY") and need < available_bytes()


def _left_in(limit: str, used: str, stat: str, reclaimable: str) -> int | None:
    """What a control group may still take; the files it has read count as free. None: it has no limit."""
    try:
        most, now = Path(limit).read_text().strip(), int(Path(used).read_text())
        files = re.search(rf"^{reclaimable} (\d+)$", Path(stat).read_text(), re.MULTILINE)
    except (OSError, ValueError):
        return None
    if not most.isdecimal() or int(most) >= 1 << 60:
        return None
    return max(0, int(most) - now + (int(files[1]) if files else 0))


def check_gpu(device: str, remedy: str) -> None:
    """UsageError, with the remedy, where torch cannot use a CUDA device; any other device passes."""
    if not device.startswith("cuda"):
        return
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        raise UsageError(f"this machine has no CUDA GPU that torch can use. {remedy}")
    index = device.removeprefix("cuda").removeprefix(":") or "0"
    if not index.isdecimal() or int(index) >= count:
        raise UsageError(
            f"there is no device {device!r:.40}: this machine has cuda:0{f' to cuda:{count - 1}' if count > 1 else ''}. {remedy}"
        )


def gpu_bytes(device: str) -> int:
    """All memory of a GPU, used or not."""
    import torch

    return int(torch.cuda.get_device_properties(torch.device(device)).total_memory)


def check_limit(device: str, size: int) -> None:
    """UsageError where a GPU has no more memory than that anyway."""
    if size > gpu_bytes(device):
        raise UsageError(
            f"{device} has {shown(gpu_bytes(device))}, so a limit of {shown(size)} has no effect. Give less --memory, or leave it out."
        )


def limit_gpu(device: str, size: int) -> None:
    """Lets PyTorch take so many bytes of a GPU in this process."""
    import torch

    index = torch.device(device).index or 0  # this function of torch takes no device without one
    torch.cuda.set_per_process_memory_fraction(size / gpu_bytes(device), index)


def peak_bytes() -> int:
    """The largest resident memory of this process so far, mapped file pages included."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux, where getrusage would count what the parent had when it started this process
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
    if os.name == "nt":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)  # type: ignore[attr-defined]
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def measured_peak(device: str = "cpu") -> int:
    """The most memory this process has used: resident on a CPU, reserved by torch on CUDA."""
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.max_memory_reserved(torch.device(device)))
    return peak_bytes()
