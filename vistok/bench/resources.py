"""Memory and energy of what runs: resident set and RAPL on a CPU, the allocator and NVML on a GPU."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

PACKAGES = Path("/sys/class/powercap")
"""Where Linux tells the energy of processor packages."""
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_bytes(device: torch.device, work: Callable[[], object]) -> int | None:
    """Bytes that ``work`` needs at its peak beyond what was held before; None where the machine does not tell.

    On a GPU what its allocator handed out; on a CPU the resident set of the process, which also grows by pages that are
    touched for the first time, so ``work`` is run once before it is measured.
    """
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device) - before)
    if not sys.platform.startswith("linux"):
        return None
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)  # what was freed before goes back to the system, to be counted again when used
    try:
        CLEAR.write_text("5")  # the peak begins anew
    except OSError:
        return None
    before = _kilobytes("VmRSS")
    work()
    return 1024 * max(0, _kilobytes("VmHWM") - before)


def joules(device: torch.device) -> float | None:
    """A meter's reading, to be subtracted from a later one: of the GPU, or of all processor packages with whatever else
    runs on them. None where the machine does not tell."""
    if device.type == "cuda":
        return _gpu(device.index or 0)
    try:
        readings = [int(path.read_text()) for path in _meters()]
    except OSError:
        return None
    return sum(readings) / 1e6 if readings else None


@cache
def _meters() -> tuple[Path, ...]:
    return tuple(sorted(PACKAGES.glob("intel-rapl:?/energy_uj")))


def _gpu(index: int) -> float | None:
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1e3
    except Exception:  # no library, no driver, or a card without a meter
        return None


def _kilobytes(name: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1])
