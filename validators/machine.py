"""The machine a measurement was made on: processor, memory, and what an NVIDIA GPU spends meanwhile.

GPU figures come from NVML through the `pynvml` module (package nvidia-ml-py). Where it or a GPU is missing, the
figures are None. They were tested against a stand-in for NVML, not on a GPU.
"""

from __future__ import annotations

import importlib
import os
import platform
import threading
import time
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from lconvert.executor import cpus

_PERIOD = 0.05  # seconds between samples of power and memory


def describe() -> dict[str, Any]:
    """cpu, cores (that this process may use), memory and free memory (bytes), load (1 minute), gpu or None."""
    return {
        "cpu": _cpu(),
        "cores": cpus(),
        "memory": _meminfo("MemTotal"),
        "memory_available": _meminfo("MemAvailable"),
        "load": os.getloadavg()[0],
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "gpu": _gpu(),
    }


def status_bytes(pid: int | str, key: str) -> int | None:
    """A figure of /proc/PID/status in bytes (VmRSS, VmHWM: the largest VmRSS so far); None where there is none."""
    return _kilobytes(Path(f"/proc/{pid}/status"), key)


def _meminfo(key: str) -> int | None:
    return _kilobytes(Path("/proc/meminfo"), key)


def _kilobytes(path: Path, key: str) -> int | None:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith(f"{key}:")]
    return 1024 * int(found[0]) if found else None


def _cpu() -> str:
    """The processor's name; /proc/cpuinfo has it under "model name" on x86 alone."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _nvml() -> Any | None:
    """The NVML bindings, initialised; None without the module, the driver's library or a GPU."""
    try:
        nvml: Any = importlib.import_module("pynvml")
    except ImportError:
        return None
    try:
        nvml.nvmlInit()
        return nvml if nvml.nvmlDeviceGetCount() else None
    except nvml.NVMLError:
        return None


def _text(value: Any) -> str:
    """Older bindings return bytes."""
    return value.decode() if isinstance(value, bytes) else str(value)


def _gpu() -> dict[str, Any] | None:
    nvml = _nvml()
    if nvml is None:
        return None
    handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
    return {
        "names": [_text(nvml.nvmlDeviceGetName(h)) for h in handles],
        "memory": [int(nvml.nvmlDeviceGetMemoryInfo(h).total) for h in handles],
        "driver": _text(nvml.nvmlSystemGetDriverVersion()),
    }


class GpuMeter:
    """Samples power and memory of every GPU while the `with` block runs.

    energy_j: joules, the integral of power (trapezoids; NVML reports milliwatts) over all GPUs: what the boards
    drew, whoever used them. memory_bytes: the largest memory in use, of all processes. Both None without NVML.
    """

    def __init__(self, period: float = _PERIOD) -> None:
        self._nvml = _nvml()
        self._period = period
        self._samples: list[tuple[float, float, int]] = []
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        if self._nvml is not None:
            self._sample()
            self._thread = threading.Thread(target=self._run, daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is not None:
            self._done.set()
            self._thread.join()
            self._sample()

    def _run(self) -> None:
        while not self._done.wait(self._period):
            self._sample()

    def _sample(self) -> None:
        nvml: Any = self._nvml
        watts, used = 0.0, 0
        try:
            for i in range(nvml.nvmlDeviceGetCount()):
                handle = nvml.nvmlDeviceGetHandleByIndex(i)
                watts += nvml.nvmlDeviceGetPowerUsage(handle) / 1000
                used += int(nvml.nvmlDeviceGetMemoryInfo(handle).used)
        except nvml.NVMLError:  # boards without a power sensor, or a driver that went away
            return
        self._samples.append((time.perf_counter(), watts, used))

    @property
    def energy_j(self) -> float | None:
        pairs = list(pairwise(self._samples))
        return sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in pairs) if pairs else None

    @property
    def memory_bytes(self) -> int | None:
        return max((s[2] for s in self._samples), default=None)
