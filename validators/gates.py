"""Thresholds from gates.yaml and how they apply to an artifact."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from lconvert.errors import OptionError


@cache
def shipped() -> dict[str, Any]:
    """The gates that come with lconvert."""
    return _read(Path(__file__).with_name("gates.yaml"))


def load(path: Path) -> dict[str, Any]:
    """A gates file over the shipped ones: what it does not say stays. OptionError if it is not one."""
    out = dict(shipped())
    for name, value in _read(path).items():
        try:
            given = _typed(value, shipped()[name])
        except (KeyError, TypeError, ValueError, AttributeError):
            raise OptionError(
                f"{path}: gate {name} is not what the shipped gates.yaml has under this name"
            ) from None
        out[name] = out[name] | given if isinstance(given, dict) else given
    return out


def _read(path: Path) -> dict[str, Any]:
    try:
        gates = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as e:
        raise OptionError(f"{path}: not readable as YAML ({e})") from None
    if not isinstance(gates, dict) or gates.get("schema") != "lconvert.gates/2":
        raise OptionError(f"{path}: not a gates file (schema lconvert.gates/2)")
    return gates


def _typed(given: Any, sample: Any) -> Any:
    """A value in the structure of the shipped one, with every number a float; anything else raises.

    YAML 1.1 takes 1e-9 for a text, so texts of numbers count as numbers.
    """
    if isinstance(sample, dict):
        return {k: _typed(v, sample.get(k, next(iter(sample.values())))) for k, v in given.items()}
    if isinstance(sample, list):
        if not given or any(row.keys() != sample[0].keys() for row in given):
            raise ValueError
        return [_typed(row, sample[0]) for row in given]
    if isinstance(sample, str):
        return given
    number = float(given)
    if isinstance(given, bool) or not number >= 0:
        raise ValueError
    return number


def float_gate(gates: dict[str, Any], activation: str, runtime: str) -> float:
    """Mean KLD allowed when all weights are floats: the runtime's floor, or in llama.cpp that of an activation."""
    own = float(gates["float"].get(runtime, gates["float"]["default"]))
    return float(gates["float_floor"].get(activation, own)) if runtime == "llama.cpp" else own


def fidelity_gate(gates: dict[str, Any], runtime: str, bits: float) -> float:
    """Mean KLD allowed between the artifact in a runtime and its own numbers in fp32."""
    return _bracket(gates["fidelity"].get(runtime, gates["fidelity"]["default"]), bits)


def folder_gate(gates: dict[str, Any], dtype: str, features: Iterable[str], floor: float) -> float:
    """Mean KLD allowed between a quantized folder in its runtime and its own numbers in fp32: what its dtype and every feature (int8_inputs
    ...) may cost together; `floor` where all runs in fp32."""
    table = gates["fidelity_folder"]
    parts = [floor if dtype == "float32" else float(table.get(dtype, table["default"]))]
    for name in features:
        if name == "int_weights":  # multiplied by their scales in the model's dtype
            parts.append(float(table["int_weights_bfloat16"]) if dtype == "bfloat16" else 0.0)
        else:
            parts.append(float(table.get(name, table["default"])))
    return sum(parts)


def cost_gate(gates: dict[str, Any], bits: float) -> float:
    """Mean KLD allowed for an artifact of so many bits per quantized weight."""
    return _bracket(gates["cost"], bits)


def usual(gates: dict[str, Any], bits: float) -> float:
    """Mean KLD that larger models stay below at this width."""
    return _bracket(gates["usual"], bits)


def _bracket(rows: list[dict[str, float]], bits: float) -> float:
    """The row with the least ceiling that is not below `bits`, the first one for more than all."""
    return next(
        (float(r["kld_mean"]) for r in reversed(rows) if bits <= float(r["bits"])), rows[0]["kld_mean"]
    )
