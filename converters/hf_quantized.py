"""Quantized Hugging Face folders: which tensors belong to which module, and the KV cache's scales.

The formats (`formats/scheme.py`) know layouts and no models; this module hands them the tensors of each linear module
and sees to it that every stored tensor is used.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lconvert.errors import InputError, UnsupportedError
from lconvert.formats import safetensors
from lconvert.formats.files import show
from lconvert.formats.json_object import read_object
from lconvert.formats.overflow import finite_weights
from lconvert.formats.scheme import Checkpoint, Part, Scheme, Weight, find, finite_scales
from lconvert.ir import KVSpec, QTensor, Tensor, as_f32, dense

Tensors = dict[str, tuple[safetensors.SafetensorsFile, safetensors.TensorInfo]]

#: Where config.json keeps what a tool did to the weights; compression_config is what llm-compressor's first releases wrote.
CONFIG_KEYS = ("quantization_config", "compression_config")
#: Side files that hold it in older checkpoints: AutoGPTQ's, AutoAWQ's and ModelOpt's, with the method they imply.
_SIDE_FILES = (
    ("quantize_config.json", "gptq"),
    ("quant_config.json", "awq"),
    ("hf_quant_config.json", "modelopt"),
)

#: Scales of the KV cache: compressed-tensors' and ModelOpt's names, and llm-compressor's first ones (vLLM's
#: maybe_remap_kv_scale_name, model_executor/model_loader/weight_utils.py, accepts the same).
_KV = re.compile(
    r".*\.(?:layers|h)\.([0-9]{1,6})\.\w+\.(?:(?:[kv]_proj\.)?(?:([kv])_scale|(kv)_scale)|[kv]_proj\.output_scale)"
)


def scheme(folder: Path, config: Mapping[str, Any], tensors: Tensors) -> Scheme | None:
    """The scheme of a quantized folder, None for a plain one."""
    where, found = str(folder / "config.json"), None
    for key in CONFIG_KEYS:
        if config.get(key):
            if not isinstance(config[key], dict):
                raise InputError(f"{where}: {key} is {show(config[key])}, expected an object")
            if found is not None and found != config[key]:
                raise InputError(
                    f"{where}: {' and '.join(CONFIG_KEYS)} differ; remove the one that does not belong to the weights"
                )
            found = config[key]
    if found is None:
        for name, method in _SIDE_FILES:
            if (folder / name).exists():
                where = str(folder / name)
                found = {"quant_method": method} | read_object(folder / name)
                break
    if found is None:
        return None
    metadata: dict[str, str] = {}
    for file, _ in tensors.values():
        metadata.update(file.metadata)
    return find(Checkpoint(where, found, folder, metadata, frozenset(tensors)))


def part(file: safetensors.SafetensorsFile, info: safetensors.TensorInfo) -> Part:
    """A stored tensor as formats see it; 8-bit floats as their bytes."""
    eight = info.dtype.startswith("F8_")
    data = safetensors.raw(file, info.name) if eight else safetensors.tensor(file, info.name)
    columns = partial(_columns, file, info.name)
    return Part(info.dtype, data, columns, f"{file.path}: tensor {show(info.name)[1:-1]}")


def _columns(file: safetensors.SafetensorsFile, name: str, start: int, stop: int) -> Any:
    return safetensors.columns(file, name)(start, stop)


class Modules:
    """The stored tensors of a quantized folder by module, and a record of what was used.

    own: tensors that are no part of a module's weight although their names begin like it (a router's correction).
    """

    def __init__(
        self, scheme: Scheme, modules: Iterable[str], tensors: Tensors, own: Collection[str] = ()
    ) -> None:
        self.scheme = scheme
        wanted = set(modules)
        depth = max((module.count(".") + 1 for module in wanted), default=0)
        self.parts: dict[str, dict[str, Part]] = {}
        for name, (file, info) in tensors.items():
            if _KV.fullmatch(name) or name in own:
                continue
            words = name.split(".", depth)
            for n in range(len(words) - 1, 0, -1):
                module, suffix = ".".join(words[:n]), ".".join(words[n:])
                if module in wanted:
                    if suffix != "bias":
                        self.parts.setdefault(module, {})[suffix] = part(file, info)
                    break

    def weight(self, module: str, shape: tuple[int, ...], tensors: Tensors) -> Weight | None:
        """The quantized weight of `module`, whose tensors are then taken out of `tensors`; None where it is plain."""
        parts = self.parts.get(module)
        if not parts:
            return None
        found = self.scheme.weight(module, parts, shape)
        if found is None:
            return None
        if (t := found.transform) is not None and t.param is not None:
            found = replace(found, transform=replace(t, param=finite_scales(t.param)))
        if isinstance(found.data, QTensor):
            factor = found.transform.param if found.transform is not None else None
            found = replace(found, data=finite_weights(found.data, factor))
        if (spec := found.activation) is not None and spec.scale is not None:
            _check_input_scale(module, spec.scale)
        left = sorted(parts.keys() - found.used - found.inert)
        if left:
            raise UnsupportedError(
                f"{parts[left[0]].where}: {self.scheme.method} does not say what it is for; lconvert does not guess"
            )
        for suffix in found.used | found.inert:
            tensors.pop(f"{module}.{suffix}", None)
        return found


def _check_input_scale(module: str, scale: Tensor) -> None:
    """A static scale of an input is a positive number; anything else is damage that every token would meet."""
    x = scale.load().astype(np.float64) if scale.dtype == "F64" else as_f32(scale.load(), scale.dtype)
    if not bool((np.isfinite(x) & (x > 0)).all()):
        value = x.reshape(-1)[0]
        raise InputError(
            f"{scale.origin}: the scale {value} of the input of {module} is damaged; download it again"
        )


def kv(scheme: Scheme, layers: int, tensors: Tensors) -> KVSpec | None:
    """The quantization of the KV cache, its scales taken out of `tensors`."""
    scales: dict[tuple[str, int], Tensor] = {}
    listed = [(name, found) for name in tensors if (found := _KV.fullmatch(name))]
    for name, found in listed:
        if int(found[1]) >= layers:
            continue  # the caller names it with the other tensors that nothing uses
        file, info = tensors.pop(name)
        value = part(file, info)
        if scheme.kv is None:
            raise UnsupportedError(
                f"{value.where}: a scale of the KV cache, but {scheme.method} quantizes no KV cache"
            )
        if value.data.size != 1 or value.dtype not in ("F32", "F16", "BF16"):
            raise UnsupportedError(
                f"{value.where}: {value.dtype} of shape {value.shape}; scales of the KV cache must be one number per layer"
            )
        number = float(as_f32(value.data.load(), value.dtype).reshape(-1)[0])
        if not 0 < number < float("inf"):
            raise InputError(f"{value.where}: the scale {number} is damaged; download the file again")
        sides = found[2] or (found[3] and "kv") or ("k" if ".k_proj." in name else "v")
        for side in sides:
            if (side, int(found[1])) in scales:
                raise InputError(
                    f"{value.where}: a second {side}_scale for the cache of this layer; remove one of them"
                )
            scales[side, int(found[1])] = value.data
    if scheme.kv is None:
        return None
    return replace(
        scheme.kv, k=_side(scheme.kv.k, "k", layers, scales), v=_side(scheme.kv.v, "v", layers, scales)
    )


def _side(spec: Any, side: str, layers: int, scales: Mapping[tuple[str, int], Tensor]) -> Any:
    """The static scales of the keys or values of all layers as one vector; without any, they are 1 (or dynamic)."""
    found = [scales.get((side, i)) for i in range(layers)]
    if not scales:
        return spec  # runtimes take 1 where a checkpoint has none
    missing = [i for i, t in enumerate(found) if t is None]
    if missing:
        raise InputError(
            f"layer {missing[0]}: the {side}_scale of its KV cache is missing, but there are others; the checkpoint is "
            "incomplete, download it again"
        )
    kinds = {t.dtype for t in found if t is not None}
    arrays = [
        t.load().reshape(1) if len(kinds) == 1 else as_f32(t.load(), t.dtype).reshape(1) for t in found if t
    ]
    return replace(spec, scale=dense(np.concatenate(arrays), kinds.pop() if len(kinds) == 1 else "F32"))
