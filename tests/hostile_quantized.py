"""Quantized folders of every scheme in memory, and seeded ways to damage them: config, tensors, descriptions, header bytes.

Most are peers' own (fixtures/peers); the schemes that no tool writes on a CPU are made here. Every change takes a
random.Random and returns a new `Folder` with a word on what was done.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from lconvert.formats import safetensors
from tests.checkpoints import random_tensors
from tests.hostile_inputs import JUNK, damaged_json, places
from tests.int_checkpoints import FIXTURES, awq_words

PEERS = FIXTURES / "peers"
SIDE_FILES = ("quantize_config.json", "hf_quant_config.json", "quant_config.json")

Stored = Mapping[str, tuple[str, Any]]


@dataclass(frozen=True)
class Folder:
    """A checkpoint: config.json, other JSON files, tensors as (safetensors dtype, array), the header's metadata.

    text: what config.json says instead, where that is no JSON any more. raw: of model.safetensors, likewise.
    """

    config: dict[str, Any]
    tensors: Stored
    metadata: Mapping[str, str] = field(default_factory=dict)
    side: Mapping[str, Any] = field(default_factory=dict)
    text: str | None = None
    raw: bytes | None = None
    name: str = ""

    @property
    def quantization(self) -> dict[str, Any]:
        found: dict[str, Any] = self.config["quantization_config"]
        return found

    def content(self) -> bytes:
        """The bytes of model.safetensors."""
        listed = [(n, d, a.shape) for n, (d, a) in self.tensors.items()]
        head, offsets = safetensors.header_bytes(listed, dict(self.metadata))
        ends = [at + a.nbytes for at, (_, a) in zip(offsets, self.tensors.values(), strict=True)]
        data = bytearray(max(ends, default=len(head)))
        data[: len(head)] = head
        for at, (_, a) in zip(offsets, self.tensors.values(), strict=True):
            data[at : at + a.nbytes] = np.ascontiguousarray(a).tobytes()
        return bytes(data)

    def write(self, folder: Path) -> Path:
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(self.config) if self.text is None else self.text)
        for name, data in self.side.items():
            (folder / name).write_text(json.dumps(data))
        (folder / "model.safetensors").write_bytes(self.content() if self.raw is None else self.raw)
        return folder


# --- sound ones --------------------------------------------------------------------------------------------


def peer(name: str) -> Folder:
    base = PEERS / name
    file = safetensors.read_header(base / "model.safetensors")
    tensors = {}
    for full, info in file.tensors.items():
        read = safetensors.raw if info.dtype.startswith("F8_") else safetensors.tensor
        tensors[full] = (info.dtype, read(file, full).load())
    side = {n: json.loads((base / n).read_text()) for n in SIDE_FILES if (base / n).exists()}
    return Folder(json.loads((base / "config.json").read_text()), tensors, dict(file.metadata), side)


Encode = Callable[[np.random.Generator, int, int], Mapping[str, tuple[str, Any]]]


def made(quantization: Mapping[str, Any], encode: Encode) -> Folder:
    """A tiny Llama whose linear modules, but for the head, hold what `encode` makes of a shape."""
    config = dict(TINY_CONFIG)
    tensors: dict[str, tuple[str, Any]] = {}
    rng = np.random.default_rng(3)
    for name, (dtype, a) in random_tensors(config, "F16").items():
        if name.endswith("_proj.weight"):
            module = name.removesuffix(".weight")
            tensors |= {f"{module}.{s}": v for s, v in encode(rng, *a.shape).items()}
        else:
            tensors[name] = (dtype, a)
    return Folder(config | {"quantization_config": dict(quantization)}, tensors)


TINY_CONFIG: Mapping[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 48, "hidden_size": 64,
    "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "hidden_act": "silu", "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}  # fmt: skip


def _scales(rng: np.random.Generator, *shape: int) -> Any:
    return (rng.random(shape) * 0.01 + 0.001).astype(np.float32)


def _e4m3(rng: np.random.Generator, *shape: int) -> tuple[str, Any]:
    return "F8_E4M3", (rng.integers(0, 0x7F, shape) | rng.integers(0, 2, shape) << 7).astype(np.uint8)


def _exponents(rng: np.random.Generator, *shape: int) -> tuple[str, Any]:
    return "U8", rng.integers(118, 124, shape).astype(np.uint8)


def _gemv(rng: np.random.Generator, n: int, k: int) -> Mapping[str, tuple[str, Any]]:
    words = -(-(k // 32) // 8)
    words = -(-words // 4) * 4
    return {
        "qweight": ("I32", rng.integers(-(2**31), 2**31, (n, k // 8)).astype(np.int32)),
        "qzeros": ("I32", rng.integers(-(2**31), 2**31, (n, words)).astype(np.int32)),
        "scales": ("F16", _scales(rng, n, 8 * words).astype(np.float16)),
    }


def _quark(dtype: str, qscheme: str, **more: Any) -> Mapping[str, Any]:
    spec = {"dtype": dtype, "qscheme": qscheme, "is_dynamic": False, **more}
    return {
        "quant_method": "quark", "export": {"weight_format": "real_quantized", "pack_method": "reorder"}, "exclude": ["lm_head"],
        "global_quant_config": {"weight": spec, "input_tensors": None, "output_tensors": None, "bias": None},
        "layer_quant_config": {}, "algo_config": None,
    }  # fmt: skip


def _awq_matrix(rng: np.random.Generator, rows: int, cols: int) -> tuple[str, Any]:
    return "I32", np.array([awq_words(row) for row in rng.integers(0, 16, (rows, cols))], np.int32)


_INTX = {
    "_type": "IntxUnpackedToInt8Tensor",
    "_data": {
        "block_size": [1, 32], "dtype": {"_type": "torch.dtype", "_data": "float32"},
        "target_dtype": {"_type": "torch.dtype", "_data": "int4"}, "activation_quantization": None,
    },
    "_tensor_data_names": ["qdata", "scale", "zero_point"],
}  # fmt: skip


def _intx() -> Folder:
    found = made(
        {"quant_method": "torchao", "quant_type": {"default": {}}},
        lambda rng, n, k: {
            "_weight_qdata": ("I8", rng.integers(-8, 8, (n, k)).astype(np.int8)),
            "_weight_scale": ("F32", _scales(rng, n, k // 32)),
            "_weight_zero_point": ("I8", rng.integers(-8, 8, (n, k // 32)).astype(np.int8)),
        },
    )
    modules = [n.removesuffix("._weight_qdata") for n in found.tensors if n.endswith("._weight_qdata")]
    return replace(found, metadata={f"{m}.weight": json.dumps(_INTX) for m in modules})


def _with_inputs(rng: np.random.Generator, n: int, k: int) -> Mapping[str, tuple[str, Any]]:
    one = ("F32", np.full((), 0.5, np.float32))
    return {"weight": _e4m3(rng, n, k), "weight_scale": ("F32", np.float32(0.01)), "input_scale": one}


def sources() -> dict[str, Folder]:
    """Every fixture that holds a quantized model, and the schemes that are made here."""
    out = {p.name: peer(p.name) for p in sorted(PEERS.iterdir()) if p.is_dir() and p.name != "base"}
    fp8 = {"quant_method": "fp8", "activation_scheme": "static", "modules_to_not_convert": ["lm_head"]}
    out |= {
        "awq-gemv": made(
            {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemv"}, _gemv
        ),
        "fp8-tensor": made(fp8, _with_inputs),
        "fbgemm": made(
            {
                "quant_method": "fbgemm_fp8",
                "activation_scale_ub": 1200.0,
                "modules_to_not_convert": ["lm_head"],
            },
            lambda rng, n, k: {"weight": _e4m3(rng, n, k), "weight_scale": ("F32", _scales(rng, n, 1))},
        ),
        "quark-int8": made(
            _quark("int8", "per_channel", ch_axis=0, symmetric=True),
            lambda rng, n, k: {
                "weight": ("I8", rng.integers(-127, 128, (n, k)).astype(np.int8)),
                "weight_scale": ("F32", _scales(rng, n)),
                "weight_zero_point": ("I8", np.zeros(n, np.int8)),
            },
        ),
        "quark-fp8-block": made(
            _quark("fp8_e4m3", "per_block", block_size=[32, 32]),
            lambda rng, n, k: {
                "weight": _e4m3(rng, n, k),
                "weight_scale": ("F32", _scales(rng, -(-n // 32), k // 32)),
            },
        ),
        "quark-mxfp4": made(
            _quark("fp4", "per_group", group_size=32, scale_format="e8m0"),
            lambda rng, n, k: {
                "weight": ("U8", rng.integers(0, 256, (n, k // 2)).astype(np.uint8)),
                "weight_scale": _exponents(rng, n, k // 32),
            },
        ),
        "quark-uint4": made(
            _quark("uint4", "per_group", group_size=32, symmetric=False, ch_axis=1),
            lambda rng, n, k: {
                "weight": _awq_matrix(rng, k, n),
                "weight_scale": ("F32", _scales(rng, k // 32, n)),
                "weight_zero_point": _awq_matrix(rng, k // 32, n),
            },
        ),
        "torchao-intx": _intx(),
    }
    return {name: replace(folder, name=name) for name, folder in out.items()}


# --- damage ------------------------------------------------------------------------------------------------

Change = tuple[str, Folder]

#: What nobody expects under a key of a quantization_config.
_HOSTILE: list[Any] = [
    *JUNK, "re:(a+)+$", "re:.*.*.*.*.*.*.*.*x", "re:(.*)*x", "re:[", "re:" + "(" * 3000, "re:(?P<a>.)(?P=b)", "*" * 500 + "x", "re:[[a]",
    "re:a{99999999}", "re:.*{5}{5}", ["re:.*"], ["re:.*.*.*.*x"] * 60, ["*a*a*a*a*"], [["lm_head"]], {"": {}}, {"re:.*": {}},
    {"-:(a|a)*b": {}}, {"+:.*": {"bits": 8}}, {"+:.*": {"bits": -4}}, {"-:.*": {}}, 4, 8, 16, 32, 64, 128, 48, -32, [32, 32],
    [128, 128], [0, 0], [-1, -1], [2**40, 2**40], [1, 32], "4", "32", "group", "channel", "tensor", "block", "token", "float", "int",
    "pack-quantized", "int-quantized", "nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp8-quantized", "gptq_v2", "gemv", "FP8",
    "NVFP4", "MXFP8", "W4A16_AWQ", "INT8", "static", "dynamic", "local", "e8m0", "per_tensor", "per_group", "uint4", "int8", "fp4",
    "nf4", "autobitlinear", "model.layers.0.mlp.up_proj", ["model.layers.0.mlp.up_proj"],
]  # fmt: skip


def config_changed(r: random.Random, f: Folder) -> Change:
    """One or two keys of what is said about the weights, with its side files sometimes alike."""
    config = copy.deepcopy(f.config)
    labels = []
    for _ in range(r.choice([1, 1, 2])):
        found = [p for p in places(config["quantization_config"]) if p]
        if not found:
            break
        *way, last = r.choice(found)
        parent = config["quantization_config"]
        for key in way:
            parent = parent[key]
        kind, old = r.random(), parent[last]
        if kind < 0.15:
            del parent[last]
            labels.append(f"without {last}")
            continue
        new = copy.deepcopy(r.choice(_HOSTILE))
        if kind < 0.3 and type(old) is bool:
            new = not old
        elif kind < 0.4 and type(old) in (int, float):
            new = r.choice([old + 1, old - 1, old * 2, -old, old * 10**12, float(old), str(old)])
        elif kind < 0.45:
            new = [old]
        elif kind > 0.9 and isinstance(parent, dict):
            last = r.choice([*ALL_KEYS])
        elif kind > 0.85 and isinstance(old, list):
            new = [*old, new]
        parent[last] = new
        labels.append(f"{'.'.join(map(str, [*way, last]))} = {repr(new)[:60]}")
    side = dict(f.side) if r.random() < 0.3 else {}
    return "; ".join(labels), replace(f, config=config, side=side)


#: Keys that some scheme knows; one of them may be where it does not belong.
ALL_KEYS = (
    "bits", "group_size", "sym", "desc_act", "lm_head", "dynamic", "checkpoint_format", "format", "pack_dtype", "version",
    "modules_in_block_to_quantize", "zero_point", "modules_to_not_convert", "extra_config", "packing_format", "config_groups",
    "ignore", "kv_cache_scheme", "targets", "weights", "input_activations", "num_bits", "strategy", "block_structure", "actorder",
    "quant_algo", "exclude_modules", "quantized_layers", "kv_cache_quant_algo", "quantization", "weight_block_size",
    "activation_scheme", "ignored_layers", "activation_scale_ub", "fmt", "load_in_4bit", "llm_int8_skip_modules",
    "llm_int8_threshold", "quant_config", "skip_modules", "quant_type", "export", "layer_quant_config", "global_quant_config",
    "exclude", "kv_cache_group", "algo_config", "linear_class", "quantization_mode", "dequantize", "quant_method", "sparsity_config",
)  # fmt: skip


def side_changed(r: random.Random, f: Folder) -> Change:
    """A side file that says something else, or the config's own content in a damaged side file."""
    name = r.choice(SIDE_FILES)
    base = f.side.get(name) or (
        {"quantization": f.quantization} if name.startswith("hf") else dict(f.quantization)
    )
    try:
        data = json.loads(damaged_json(r, base))
    except (ValueError, RecursionError):
        data = {}
    config = dict(f.config)
    if r.random() < 0.4:
        config.pop("quantization_config")
    return f"{name} = {repr(data)[:60]}", replace(f, config=config, side=dict(f.side) | {name: data})


def model_changed(r: random.Random, f: Folder) -> Change:
    """A size of the model: what the tensors must then be is another matter."""
    key = r.choice(
        ["hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size", "num_key_value_heads"]
    )
    new = r.choice([1, 2, 3, 7, 16, 33, 96, 160, 2**20, 2**40])
    return f"{key} = {new}", replace(f, config=f.config | {key: new})


def _quantized(r: random.Random, f: Folder) -> str:
    """The name of a tensor, rather one that belongs to a quantized module."""
    names = [n for n in f.tensors if not n.endswith(("norm.weight", "embed_tokens.weight", "lm_head.weight"))]
    return r.choice(names)


def structure_changed(r: random.Random, f: Folder) -> Change:
    """A tensor that is missing, misnamed, of another type, or of another shape."""
    tensors, name = dict(f.tensors), _quantized(r, f)
    dtype, a = tensors[name]
    kind = r.choice(["gone", "name", "dtype", "shape", "shape", "extra", "swap"])
    what = ""
    if kind == "gone":
        del tensors[name]
    elif kind == "name":
        what = r.choice(
            [name + "x", "." + name, name.upper(), name.rpartition(".")[0], name + ".weight", "model." * 3000 + name,
             name + "\x1b[31m\n", "model.layers." + "9" * 5000 + ".self_attn.k_scale", "model.layers.0.self_attn.k_scale",
             name + "." + "y" * 5000, "model.layers.0.mlp.up_proj." + "." * 5000]
        )  # fmt: skip
        tensors.pop(name)
        tensors[what] = (dtype, a)
    elif kind == "dtype":
        what, new = r.choice(
            [("F32", np.float32), ("F16", np.float16), ("F64", np.float64), ("I8", np.int8), ("U8", np.uint8), ("I32", np.int32),
             ("I64", np.int64), ("BOOL", np.bool_), ("BF16", np.uint16), ("F8_E5M2", np.uint8), ("F8_E4M3", np.uint8),
             ("F8_E8M0", np.uint8), ("I16", np.int16), ("U64", np.uint64)]
        )  # fmt: skip
        with np.errstate(all="ignore"):
            tensors[name] = (what, a.astype(new))
    elif kind == "shape":
        shapes: list[Any] = [a.reshape(-1), a.T, a[None], a[..., None], a.reshape(1, 1, 1, 1, -1)]
        if a.ndim:
            shapes += [a[:-1], a[:0], a[..., :-1], a[..., :0], np.concatenate([a, a]), a[:1]]
        if a.size:
            shapes += [a.reshape(-1)[0].reshape(()), a.reshape(-1)[:1]]
        new = r.choice(shapes)
        tensors[name], what = (dtype, new), str(new.shape)
    elif kind == "extra":
        module = name.rpartition(".")[0]
        what = f"{module}." + r.choice(
            ["weight", "weight_scale", "weight_scale_2", "g_idx", "weight_g_idx", "input_scale", "qzeros", "bias", "pre_quant_scale",
             "weight_zero_point", "weight_global_scale", "zero", "mystery", "weight.nested_absmax", "input_zero_point", "SCB"]
        )  # fmt: skip
        tensors[what] = r.choice(
            [("F32", np.ones(1, np.float32)), ("I8", np.ones(a.shape, np.int8)), (dtype, a)]
        )
    else:
        what = _quantized(r, f)
        tensors[name], tensors[what] = tensors[what], tensors[name]
    return f"{kind} {name[:60]} {what[:60]}", replace(f, tensors=tensors)


_FLOAT_BITS = {
    "F32": (np.uint32, [0x7FC00000, 0x7F800000, 0xFF800000, 0x80000000, 0, 1, 0x80000001, 0x7F7FFFFF, 0xFF7FFFFF, 0xBF800000]),
    "F16": (np.uint16, [0x7E00, 0x7C00, 0xFC00, 0x8000, 0, 1, 0x8001, 0x7BFF, 0xFBFF, 0xBC00]),
    "BF16": (np.uint16, [0x7FC0, 0x7F80, 0xFF80, 0x8000, 0, 1, 0x8001, 0x7F7F, 0xFF7F, 0xBF80]),
}  # fmt: skip


def values_changed(r: random.Random, f: Folder) -> Change:
    """Some elements of a tensor: numbers that are none, extremes, noise."""
    tensors, name = dict(f.tensors), _quantized(r, f)
    dtype, a = tensors[name]
    new = np.array(a, copy=True).reshape(-1)
    if not new.size:
        return "nothing", f
    kind = r.choice(["one", "one", "all", "noise", "bit", "shuffle"])
    at: Any = slice(None) if kind == "all" else r.randrange(new.size)
    value: Any = None
    if kind in ("one", "all") and dtype in _FLOAT_BITS:
        unsigned, bits = _FLOAT_BITS[dtype]
        value = r.choice(bits)
        new.view(unsigned)[at] = value
    elif kind in ("one", "all"):
        info: Any = np.iinfo(new.dtype) if new.dtype != np.bool_ else np.iinfo(np.uint8)
        value = r.choice(
            [info.min, info.max, 0, 1, *(v for v in (-1, 2, 7, 8, 15, 127, 128, 254) if info.min <= v)]
        )
        new[at] = min(value, info.max)
    elif kind == "noise":
        new.view(np.uint8)[:] = np.frombuffer(r.randbytes(new.nbytes), np.uint8)
    elif kind == "bit":
        flat = new.view(np.uint8)
        for _ in range(r.choice([1, 8])):
            flat[r.randrange(flat.size)] ^= 1 << r.randrange(8)
    else:
        new = new[np.random.default_rng(r.randrange(1 << 30)).permutation(new.size)]
    tensors[name] = (dtype, new.reshape(a.shape))
    return f"{kind} of {name} {value}", replace(f, tensors=tensors)


def described(r: random.Random, f: Folder) -> Change:
    """The JSON inside of tensors (bitsandbytes) or of the header (torchao), else the metadata."""
    states = [n for n in f.tensors if "quant_state" in n]
    if states:
        name = r.choice(states)
        text = damaged_json(r, json.loads(f.tensors[name][1].tobytes())).encode("utf-8", "surrogatepass")[
            :20000
        ]
        tensors = dict(f.tensors) | {name: ("U8", np.frombuffer(text, np.uint8))}
        return f"{name} {text[:60]!r}", replace(f, tensors=tensors)
    metadata = dict(f.metadata)
    key = r.choice([*metadata, "model.layers.0.mlp.up_proj.weight"])
    old = metadata.get(key, "{}")
    text_ = (
        damaged_json(r, json.loads(old))
        if old[:1] == "{"
        else r.choice(["", "x", "[" * 5000, '{"_type": "Int8Tensor"}'])
    )
    metadata[key] = text_.encode("utf-8", "replace").decode()
    if r.random() < 0.2:
        del metadata[key]
    return f"metadata {key} {text_[:60]!r}", replace(f, metadata=metadata)


def bytes_flipped(r: random.Random, f: Folder) -> Change:
    """Bits of the header, a cut, or a key of config.json twice."""
    kind = r.choice(["header", "header", "cut", "config", "config"])
    if kind == "config":
        text = bytearray(json.dumps(f.config).encode())
        for _ in range(r.choice([1, 1, 3])):
            text[r.randrange(len(text))] ^= 1 << r.randrange(7)
        return "bits of config.json", replace(f, text=text.decode("latin-1"))
    raw = bytearray(f.content())
    n = int.from_bytes(raw[:8], "little")
    if kind == "cut":
        return "cut", replace(f, raw=bytes(raw[: r.randrange(len(raw))]))
    for _ in range(r.choice([1, 1, 3])):
        raw[r.randrange(8 + n)] ^= 1 << r.randrange(8)
    return "bits of the header", replace(f, raw=bytes(raw))


CHANGES: tuple[tuple[Callable[[random.Random, Folder], Change], int], ...] = (
    (config_changed, 8), (side_changed, 1), (model_changed, 1), (structure_changed, 5), (values_changed, 6), (described, 2),
    (bytes_flipped, 2),
)  # fmt: skip


def damaged(r: random.Random, f: Folder) -> Change:
    """One kind of damage out of all."""
    change = r.choices([c for c, _ in CHANGES], [w for _, w in CHANGES])[0]
    return change(r, f)
