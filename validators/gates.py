"""Thresholds from gates.yaml and how they apply to an artifact."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import yaml

from lconvert.errors import OptionError


@cache
def shipped() -> dict[str, Any]:
    """The gates that come with lconvert."""
    return load(Path(__file__).with_name("gates.yaml"))


def load(path: Path) -> dict[str, Any]:
    """A gates file; OptionError if it is not one."""
    try:
        gates = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as e:
        raise OptionError(f"{path}: not readable as YAML ({e})") from None
    if not isinstance(gates, dict) or gates.get("schema") != "lconvert.gates/1":
        raise OptionError(f"{path}: not a gates file (schema lconvert.gates/1)")
    return gates


def float_gate(gates: dict[str, Any], activation: str) -> float:
    """Mean KLD allowed when all weights are floats: the common gate, or the floor of an activation."""
    return float(gates["float_floor"].get(activation, gates["float"]["kld_mean"]))


def cost_gate(gates: dict[str, Any], bits: float) -> float:
    """Mean KLD allowed for an artifact of so many bits per quantized weight."""
    for row in reversed(gates["cost"]):
        if bits <= float(row["bits"]):
            return float(row["kld_mean"])
    return float(gates["cost"][0]["kld_mean"])
