"""Hidden states between layers: every window's (length, hidden), in memory or in a file, fp32 or bf16.

A file is read and written piece by piece and not mapped: mapped pages count as the process's memory.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from lconvert.errors import OutputError
from lconvert.forward import packages

BYTES = {"f32": 4, "bf16": 2}


class Activations:
    """count windows of (length, hidden). `file`: where they lie on disk; None: in memory."""

    def __init__(
        self, count: int, length: int, hidden: int, kept: Literal["f32", "bf16"], file: Path | None = None
    ) -> None:
        torch, _ = packages()
        self.shape, self._file = (count, length, hidden), file
        self._dtype = torch.float32 if kept == "f32" else torch.bfloat16
        self._row = length * hidden * BYTES[kept]
        if file is None:
            self._held = torch.empty(self.shape, dtype=self._dtype)
            return
        try:
            with open(file, "wb") as f:
                f.truncate(count * self._row)
        except OSError as e:
            raise OutputError(
                f"{file}: hidden states cannot be kept here ({e.strerror}); choose another folder"
            ) from None

    def get(self, start: int, stop: int) -> Any:
        """Windows start..stop in fp32 (stop - start, length, hidden), on the CPU."""
        torch, _ = packages()
        if self._file is None:
            return self._held[start:stop].float()
        raw = bytearray((stop - start) * self._row)
        with open(self._file, "rb") as f:
            f.seek(start * self._row)
            f.readinto(raw)
        flat = torch.frombuffer(raw, dtype=self._dtype)
        return flat.reshape(stop - start, *self.shape[1:]).float()

    def put(self, start: int, x: Any) -> None:
        """Windows from `start` on become `x` (n, length, hidden)."""
        torch, _ = packages()
        x = x.detach().to("cpu", self._dtype).contiguous()
        if self._file is None:
            self._held[start : start + len(x)] = x
            return
        try:
            with open(self._file, "r+b") as f:
                f.seek(start * self._row)
                f.write(memoryview(x.view(torch.uint8).numpy()).cast("B"))
        except OSError as e:
            raise OutputError(
                f"{self._file}: hidden states cannot be kept here ({e.strerror}); choose another folder"
            ) from None
