"""The oracle of graphs that round inputs: what validate holds them to, whose formulas tests compare with compressed-tensors' own."""

from __future__ import annotations

from lconvert.validators.rounded_forward import RoundedForward, fp4, fp8, number, rounded

__all__ = ["RoundedForward", "fp4", "fp8", "number", "rounded"]
