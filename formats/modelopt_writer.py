"""ModelOpt's unified Hugging Face checkpoints as a target: what TensorRT-LLM and vLLM load.

The layouts are those of lconvert.formats.modelopt, the configurations those that ModelOpt 0.47 writes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lconvert import __version__
from lconvert.errors import UnsupportedError
from lconvert.formats.modelopt_config import ALGORITHMS, FLOATS, FP8, INT4, INT8, SERVED, SIDE_FILE, Algorithm
from lconvert.formats.scheme import Held, Stored
from lconvert.ir import E2M1, E4M3, ActSpec, KVSpec, QTensor, Tensor, Transform, as_f32
from lconvert.kernels.packing import pack_nibbles, pack_row_pairs
from lconvert.kernels.qtensor import dequantize

Kind = tuple[int, str]

#: The algorithms that are written, and what config_groups says of them: (bits, type) of input and weight, strategy of the
#: weight. ModelOpt's convert_hf_config.py `_quant_algo_to_group_config`, whose "float" for the integers of W4A8_AWQ is
#: kept and whose silence about FP8_PB_WO, too.
_GROUPS: Mapping[str, tuple[Kind | None, Kind | None, str | None]] = {
    "FP8": ((8, "float"), (8, "float"), None),
    "FP8_PER_CHANNEL_PER_TOKEN": ((8, "float"), (8, "float"), "channel"),
    "FP8_PB_WO": (None, None, None),
    "NVFP4": ((4, "float"), (4, "float"), None),
    "NVFP4_AWQ": ((8, "float"), (4, "float"), None),
    "W4A16_NVFP4": (None, (4, "float"), None),
    "MXFP8": ((8, "float"), (8, "float"), None),
    "W4A16_AWQ": (None, (4, "int"), None),
    "W4A8_AWQ": ((8, "float"), (4, "float"), None),
    "W8A16": (None, (8, "int"), None),
    "W8A8_SQ_PER_CHANNEL": ((8, "int"), (8, "int"), "channel"),
}
#: Algorithms of a whole model whose config.json lists a group.
_LISTED = ("FP8", "NVFP4", "W4A16_NVFP4")
#: Modules that TensorRT-LLM fuses. It reads no pre_quant_scale of theirs, or only the first one's.
_FUSED = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")


@dataclass(frozen=True)
class Writer:
    """ModelOpt's layout as a target. Scales are stored as F32, a `pre_quant_scale` in its own type.

    weight_scale_2: of W4A8_AWQ modules, without it the `fp8_range` of each. TensorRT-LLM asserts that it is the same
    for q, k and v, and for gate and up: a converter takes the largest of theirs.
    """

    weight_scale_2: float | None = None

    @property
    def kv_names(self) -> tuple[str, str]:
        return "{attn}.k_proj.k_scale", "{attn}.v_proj.v_scale"

    def problem(self, held: Held) -> str | None:
        q, t = held.weight, _unfolded(held)
        if q is None:
            return None if t is None else "a plain weight cannot have an unfolded scale of its input"
        extra = [n for n in ("zero", "offset", "g_idx", "mask", "low_rank") if getattr(q, n) is not None]
        if extra or q.outliers or q.divisor:
            named = extra[0] if extra else "outliers" if q.outliers else "a dividing scale"
            return f"ModelOpt's layouts are symmetric and plain, this weight has {named}"
        if t is not None and (t.kind, t.where) != ("scale", "input"):
            return f"ModelOpt has no transform {t.kind} of the {t.where}"
        fitting = [n for n in _GROUPS if _same_weight(ALGORITHMS[n], q)]
        if not fitting:
            return (
                f"no algorithm of ModelOpt has {q.grid.kind} weights of {q.grid.bits} bits in blocks {q.block} with these "
                f"scales; written are {', '.join(_GROUPS)}"
            )
        quantized = [n for n in fitting if _same_activation(ALGORITHMS[n], held.activation)]
        if not quantized:
            return f"{' or '.join(fitting)} would hold the weight, but its input is quantized in another way"
        if not any(ALGORITHMS[n].smooth or t is None for n in quantized):
            return f"{quantized[0]} has no pre_quant_scale, and this weight needs one that is not folded"
        if q.grid == INT4 and q.shape[0] % 2:
            return f"two rows share a byte, {q.shape[0]} rows do not pair up"
        return None

    def algorithm(self, held: Held) -> str:
        """The quant_algo of a quantized module that has no `problem`."""
        q, plain = held.weight, _unfolded(held) is None
        assert q is not None
        fitting = (n for n in _GROUPS if _same_weight(ALGORITHMS[n], q) and (ALGORITHMS[n].smooth or plain))
        return next(n for n in fitting if _same_activation(ALGORITHMS[n], held.activation))

    def store(self, held: Held) -> dict[str, Stored]:
        q = held.weight
        assert q is not None
        name, (rows, cols) = self.algorithm(held), q.shape
        out = {"weight": _packed(q)}
        if isinstance(q.scale, QTensor):
            outer = q.scale.scale
            assert isinstance(outer, Tensor)
            two = q.scale.grid == E4M3
            out["weight_scale"] = Stored("F8_E4M3" if two else "U8", q.scale.shape, q.scale.codes.read)
            if two:
                out["weight_scale_2"] = _stored_f32(outer, ())
        else:
            shape = () if q.block == (-1, -1) else (rows,) if q.block[1] == -1 else q.scale.shape
            if q.block[0] > 1:
                shape = (shape[0], 1, shape[1], 1)
            out["weight_scale"] = _stored_f32(q.scale, shape)
        if name == "W4A8_AWQ":
            given = self.weight_scale_2
            out["weight_scale_2"] = Stored(
                "F32", (), lambda a, b: np.array([given or fp8_range(q)], np.float32)[a:b]
            )
        if held.activation is not None and held.activation.scale is not None:
            out["input_scale"] = _stored_f32(held.activation.scale, ())
        t = _unfolded(held)
        if t is not None and t.param is not None:
            out["pre_quant_scale"] = Stored(t.param.dtype, (cols,), t.param.read)
        return out

    def config(self, modules: Mapping[str, Held], kv: KVSpec | None) -> dict[str, Any]:
        """As convert_hf_config.py `convert_hf_quant_config_format` writes it; plain modules are listed by name.

        Unlike ModelOpt's, it repeats the group size of the AWQ algorithms, so that config.json is complete.
        UnsupportedError for what a loader would silently get wrong.
        """
        layers = {n: self._entry(h) for n, h in modules.items() if h.weight is not None}
        plain = sorted(n for n, h in modules.items() if h.weight is None)
        _refuse_hidden_scales(
            {n: layers[n]["quant_algo"] for n in layers if _unfolded(modules[n]) is not None}
        )
        names = {e["quant_algo"] for e in layers.values()}
        if names == {"NVFP4", "NVFP4_AWQ"}:  # one algorithm: a pre_quant_scale is optional in it
            layers = {n: _entry("NVFP4_AWQ", e["group_size"]) for n, e in layers.items()}
        distinct = [dict(items) for items in dict.fromkeys(tuple(e.items()) for e in layers.values())]
        out: dict[str, Any] = {}
        if len(distinct) == 1:
            _refuse_ambiguous(plain, layers)
            algo, size = distinct[0]["quant_algo"], distinct[0].get("group_size")
            if algo in _LISTED:
                out["config_groups"] = {"group_0": _group(algo, size) | {"targets": ["Linear"]}}
            else:
                out |= {k: v for k, v in distinct[0].items() if ALGORITHMS[algo].smooth and k != "quant_algo"}
            out |= {"ignore": plain, "quant_algo": algo}
        elif distinct:
            out["config_groups"] = {
                f"group_{i}": _group(e["quant_algo"], e.get("group_size"))
                | {"targets": sorted(n for n, other in layers.items() if other == e)}
                for i, e in enumerate(distinct)
            }
            out |= {"quantized_layers": layers, "ignore": [], "quant_algo": "MIXED_PRECISION"}
        else:
            out["ignore"] = plain
        if kv is not None:
            fits = all(_same_spec(side, FP8) for side in (kv.k, kv.v))
            if not fits or kv.residual_window or kv.sinks or kv.pre_rope:
                raise UnsupportedError(
                    "ModelOpt's KV cache is written as FP8 with one static scale per layer only"
                )
            out["kv_cache_scheme"] = {"dynamic": False, "num_bits": 8, "type": "float"}
        return out | {"producer": {"name": "lconvert", "version": __version__}, "quant_method": "modelopt"}

    def side_files(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """hf_quant_config.json (export/quant_utils.py `get_quant_config`), which TensorRT-LLM looks for first."""
        algo = config.get("quant_algo")
        inner: dict[str, Any] = {
            "quant_algo": algo,
            "kv_cache_quant_algo": "FP8" if config.get("kv_cache_scheme") else None,
        }
        if algo == "MIXED_PRECISION":
            inner["quantized_layers"] = config["quantized_layers"]
        else:
            known = ALGORITHMS.get(str(algo))
            size = (
                known.block[1] if known is not None and known.second is not None else config.get("group_size")
            )
            if size is not None:
                inner["group_size"] = size
            inner |= {k: config[k] for k in ("has_zero_point", "pre_quant_scale") if k in config}
            inner["exclude_modules"] = list(config["ignore"])
        return {SIDE_FILE: {"producer": config["producer"], "quantization": inner}}

    def _entry(self, held: Held) -> dict[str, Any]:
        assert held.weight is not None
        return _entry(self.algorithm(held), held.weight.block[1])


def fp8_range(q: QTensor) -> np.float32:
    """The scale at which all values of `q` fit FP8: a `weight_scale_2` of W4A8_AWQ. Reads all of `q`."""
    step = max(1, (1 << 22) // q.shape[1])
    slabs = (dequantize(q, at, min(at + step, q.rows)) for at in range(0, q.rows, step))
    most = max(np.abs(slab).max() for slab in slabs)
    return most / np.float32(448) if most else np.float32(1)


def _entry(name: str, size: int) -> dict[str, Any]:
    """A layer's part of quantized_layers (export/quant_utils.py `process_layer_quant_config`)."""
    algo = ALGORITHMS[name]
    out: dict[str, Any] = {"quant_algo": name}
    if algo.block[0] == 1 and algo.block[1] != -1:
        out["group_size"] = size
        if algo.smooth:
            out |= {"has_zero_point": False, "pre_quant_scale": True}
    return out


def _group(name: str, size: int | None) -> dict[str, Any]:
    given, weights, strategy = _GROUPS[name]
    if weights is None:
        return {"quant_algo": name}

    def args(bits: int, type_: str) -> dict[str, Any]:
        width = {} if size is None else {"group_size": size}
        return {"dynamic": False, "num_bits": bits, "type": type_} | width

    out = {} if given is None else {"input_activations": args(*given)}
    return out | {"weights": args(*weights) | ({} if strategy is None else {"strategy": strategy})}


def _refuse_hidden_scales(scaled: Mapping[str, str]) -> None:
    """`scaled`: the algorithms of the modules whose inputs have unfolded scales."""
    for name, algo in scaled.items():
        if algo in SERVED["tensorrt-llm"] and name.rpartition(".")[2] in _FUSED:
            raise UnsupportedError(
                f"{name}: has an unfolded scale of its input, which TensorRT-LLM does not read in modules that it fuses; "
                "fold it into the norm in front of it"
            )


def _unfolded(held: Held) -> Transform | None:
    return None if held.transform is None or held.transform.folded else held.transform


def _refuse_ambiguous(plain: list[str], layers: Mapping[str, Any]) -> None:
    """vLLM excludes every module whose name contains a listed one (`is_layer_excluded`)."""
    for p in plain:
        for name in layers:
            if p in name:
                raise UnsupportedError(
                    f"{p} is not quantized and its name is contained in {name}, which is: vLLM would take both for plain; "
                    "quantize both or neither"
                )


def _same_spec(a: ActSpec | None, b: ActSpec | None) -> bool:
    if a is None or b is None:
        return a is b
    same = (a.grid, a.per, a.dynamic, a.group) == (b.grid, b.per, b.dynamic, b.group)
    return same and a.zero is None and b.zero is None


def _same_activation(algo: Algorithm, given: ActSpec | None) -> bool:
    stored = algo.input_scale in ("required", "optional")
    return _same_spec(algo.activation, given) and (given is None or (given.scale is not None) == stored)


def _same_weight(algo: Algorithm, q: QTensor) -> bool:
    if q.grid != algo.grid or len(q.shape) != 2:
        return False
    if algo.block == (1, 0):
        if q.block[0] != 1 or q.block[1] <= 0:
            return False
    elif q.block != algo.block:
        return False
    s = q.scale
    if algo.second is None or isinstance(s, Tensor):
        return algo.second is None and isinstance(s, Tensor) and s.dtype in FLOATS
    if (s.grid, s.block, s.divisor, s.zero) != (algo.second, (-1, -1), False, None):
        return False
    outer = s.scale
    if not isinstance(outer, Tensor) or outer.dtype not in FLOATS:
        return False
    return s.grid == E4M3 or bool((as_f32(outer.load(), outer.dtype) == 1).all())


def _packed(q: QTensor) -> Stored:
    rows, cols = q.shape
    read = q.codes.read
    if q.grid == E4M3:
        return Stored("F8_E4M3", (rows, cols), read)
    if q.grid == INT8:
        return Stored("I8", (rows, cols), read)
    if q.grid == E2M1:
        return Stored("U8", (rows, cols // 2), lambda a, b: pack_nibbles(read(a, b)))
    return Stored("U8", (rows // 2, cols), lambda a, b: pack_row_pairs(read(2 * a, 2 * b)))


def _stored_f32(t: Tensor, shape: tuple[int, ...]) -> Stored:
    return Stored("F32", shape, lambda a, b: as_f32(t.read(a, b), t.dtype).reshape(b - a, *shape[1:]))
