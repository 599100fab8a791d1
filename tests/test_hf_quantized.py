"""Quantized folders that peers wrote, damaged: one clear error that names the tensor, whatever the format, and no artifact.

The same damage is done to every format: a tensor that is missing, cut, turned, of another type, with NaN, infinity or a negative
zero among its scales, or that nobody knows; and to configs, one key at a time.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lconvert
from lconvert.converters import act_order, targets
from lconvert.errors import InputError, LconvertError, UnsupportedError
from lconvert.executor import execute
from lconvert.formats import safetensors
from lconvert.ir import Model, QTensor, Tensor
from lconvert.kernels.qtensor import effective
from lconvert.plan import refusals
from tests.checkpoints import write_llama
from tests.int_checkpoints import FIXTURES

PEERS = FIXTURES / "peers"
_LLAMA = sorted(
    p.name
    for p in PEERS.iterdir()
    if (p / "config.json").exists() and "gpt-oss" not in p.name and p.name != "base"
)
#: One of each layout; the others share its reader.
_LAYOUTS = [
    n for n in _LLAMA
    if n in (
        "autoround-awq-4-g32", "autoround-own-4-g32-asym", "gptqmodel-gptq-3-g32", "gptqmodel-gptq-4-g32-desc",
        "gptqmodel-gptq2-4-g32-asym", "llmcompressor-fp8-block", "llmcompressor-nvfp4", "llmcompressor-mxfp4a16",
        "llmcompressor-w3a16-asym-g32", "llmcompressor-w8a8-static-asym", "llmcompressor-w4afp8-g32",
        "modelopt-fp8-pc-pt", "modelopt-int4-awq", "modelopt-int8-sq", "modelopt-mxfp8", "modelopt-nvfp4a16",
        "modelopt-w4a8-awq", "tao-bnb-int8", "tao-bnb-nf4", "tao-bnb-nf4-double", "tao-hqq-4", "tao-torchao-fp8",
        "tao-torchao-int8", "transformers-bitnet", "transformers-fp8-32", "transformers-fp8-32-ue8m0",
    )
]  # fmt: skip
_MODULE = "model.layers.0.mlp.up_proj"

Stored = dict[str, tuple[str, Any]]


def stored(folder: Path) -> tuple[Stored, Mapping[str, str]]:
    """Every tensor of a folder as (safetensors dtype, array), and the header's metadata; 8-bit floats as their bytes."""
    file = safetensors.read_header(folder / "model.safetensors")
    out: Stored = {}
    for name, info in file.tensors.items():
        read = safetensors.raw if info.dtype.startswith("F8_") else safetensors.tensor
        out[name] = (info.dtype, read(file, name).load())
    return out, file.metadata


def rewritten(
    base: Path, folder: Path, tensors: Stored, metadata: Mapping[str, str], config: Any = None
) -> Path:
    """A copy of `base` with other tensors, and another quantization_config where one is given."""
    shutil.copytree(base, folder)
    head, offsets = safetensors.header_bytes(
        [(n, d, a.shape) for n, (d, a) in tensors.items()], dict(metadata)
    )
    data = bytearray(
        max((at + a.nbytes for at, (_, a) in zip(offsets, tensors.values(), strict=True)), default=len(head))
    )
    data[: len(head)] = head
    for at, (_, a) in zip(offsets, tensors.values(), strict=True):
        data[at : at + a.nbytes] = np.ascontiguousarray(a).tobytes()
    (folder / "model.safetensors").write_bytes(data)
    if config is not None:
        whole = json.loads((folder / "config.json").read_text()) | {"quantization_config": config}
        (folder / "config.json").write_text(json.dumps(whole))
        for side in ("quantize_config.json", "hf_quant_config.json", "quant_config.json"):
            (folder / side).unlink(missing_ok=True)
    return folder


def use(folder: Path) -> Model:
    """Read the folder and every number in it."""
    model = lconvert.read(folder)
    for e in model.entries.values():
        effective(e)
    return model


def complaint(folder: Path) -> str:
    """The message of the one error that the folder must raise, and that no artifact is left by a conversion of it."""
    with pytest.raises((InputError, UnsupportedError)) as found:
        use(folder)
    text = str(found.value)
    assert "Error(" not in text and len(text) > 40
    return text


@pytest.mark.parametrize("name", _LLAMA)
def test_sound_ones_are_read_and_rewritten_ones_too(name: str, tmp_path: Path) -> None:
    """The harness itself changes nothing."""
    tensors, metadata = stored(PEERS / name)
    a, b = use(PEERS / name), use(rewritten(PEERS / name, tmp_path / "m", tensors, metadata))
    assert any(isinstance(e.data, QTensor) for e in a.entries.values())
    for role, e in a.entries.items():
        assert np.array_equal(effective(e), effective(b.entries[role])), role


#: Tensors that may be missing: what they say is said elsewhere too, or is for the tool that wrote them alone.
_OPTIONAL = {
    "g_idx", "weight_format", "channel_wise", "compute_dtype", "encoded_state_dict", "offload_meta", "optimize",
    "quant_scale", "quant_zero", "round_zero", "stores_quant_config", "unpack_view_dtype", "view_as_float",
}  # fmt: skip
#: Texts and flags out of a tool's own state, whose type says nothing.
_NOTES = _OPTIONAL - {"g_idx"}
#: ModelOpt leaves these away where a module was folded, or never ran in calibration.
_MAYBE = {("modelopt-int8-sq", "pre_quant_scale")}


def _damage(name: str) -> list[tuple[str, str, Stored]]:
    """(what was done, to which tensor, all tensors)."""
    tensors, _ = stored(PEERS / name)
    out = []
    for full, (dtype, a) in tensors.items():
        suffix = full.removeprefix(_MODULE + ".")
        if not full.startswith(_MODULE + ".") or suffix in _NOTES:
            continue

        def put(label: str, dtype: str, x: Any, full: str = full) -> None:
            out.append((label, full, tensors | {full: (dtype, np.ascontiguousarray(x))}))

        if (suffix not in _OPTIONAL and (name, suffix) not in _MAYBE) or (
            suffix == "g_idx" and "desc" in name
        ):
            out.append(("missing", full, {k: v for k, v in tensors.items() if k != full}))
        put("type", "F64", np.zeros(a.shape, np.float64))
        if a.ndim and a.shape[0] > 1:
            put("cut", dtype, a[:-1])
        if a.ndim == 2 and a.shape[1] > 1:
            put("cut columns", dtype, a[:, :-1])
        if a.ndim == 2 and a.shape[0] != a.shape[1]:
            put("turned", dtype, a.T)
        scale = dtype in ("F32", "F16", "BF16") and ("scale" in suffix or suffix in ("SCB", "weight.absmax"))
        for bad, bits in ((np.nan, 0x7FC0), (np.inf, 0x7F80), (-0.0, 0x8000)) if scale else ():
            x = a.copy().reshape(-1)
            x[-1] = bits if dtype == "BF16" else bad
            put(f"{bad}", dtype, x.reshape(a.shape))
    out.append(
        ("unknown", f"{_MODULE}.mystery", tensors | {f"{_MODULE}.mystery": ("F32", np.ones(3, np.float32))})
    )
    out.append(
        (
            "unknown",
            "model.layers.0.mlp.mystery",
            tensors | {"model.layers.0.mlp.mystery": ("I8", np.ones(3, np.int8))},
        )
    )
    return out


@pytest.mark.parametrize("name", _LAYOUTS)
def test_damaged_tensors_are_named(name: str, tmp_path: Path) -> None:
    _, metadata = stored(PEERS / name)
    for at, (label, full, tensors) in enumerate(_damage(name)):
        folder = rewritten(PEERS / name, tmp_path / str(at), tensors, metadata)
        text = complaint(folder)
        module = full if label == "unknown" else _MODULE
        assert module in text, f"{label} {full}: {text}"
        shutil.rmtree(folder)


@pytest.mark.parametrize("name", ["gptqmodel-gptq-3-g32", "llmcompressor-nvfp4", "modelopt-int8-sq"])
def test_nothing_is_written_of_a_damaged_source(name: str, tmp_path: Path) -> None:
    """Scales are read when the target is written: it is under no name until all of it is there."""
    tensors, metadata = stored(PEERS / name)
    full = next(n for n in tensors if n.startswith(_MODULE) and "scale" in n and tensors[n][1].size > 4)
    dtype, a = tensors[full]
    x = a.copy().reshape(-1)
    x[-1] = 0x7F if dtype == "F8_E4M3" else 0x7FC0 if dtype == "BF16" else np.nan
    folder = rewritten(PEERS / name, tmp_path / "m", tensors | {full: (dtype, x.reshape(a.shape))}, metadata)
    for target in ("ir", "gguf", "compressed-tensors", "dense"):
        out = tmp_path / target
        with pytest.raises(LconvertError):
            plan = targets.plan(lconvert.read(folder), target, "m.gguf")
            assert refusals(plan) == []
            execute(plan, out)
        assert not out.exists() or not list(out.iterdir()), target


# --- configs ---------------------------------------------------------------------------------------------

Change = Callable[[dict[str, Any]], Any]


def _set(*path: Any) -> Change:
    """Sets the value at a path of keys; the last element is the value."""
    *keys, last, value = path

    def change(config: dict[str, Any]) -> None:
        for k in keys:
            config = config[k]
        config[last] = value

    return change


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("gptqmodel-gptq-4-g32", _set("bits", 8), ("config.json and the weights do not belong together",)),
        ("gptqmodel-gptq-4-g32", _set("group_size", 64), ("do not belong together",)),
        ("gptqmodel-gptq-4-g32", _set("group_size", 48), ("do not divide into groups of 48",)),
        ("gptqmodel-gptq-4-g32-asym", _set("sym", True), ("zero point", "sym")),
        ("gptqmodel-gptq-4-g32", _set("checkpoint_format", "gptq_v2"), ("checkpoint_format and format differ",)),
        ("gptqmodel-gptq-4-g32-desc", _set("desc_act", False), ("desc_act",)),
        ("gptqmodel-gptq-4-g32", _set("bits", "four"), ("bits",)),
        ("gptqmodel-gptq-4-g32", _set("quant_method", "gptqq"), ("unknown quant_method", "known are")),
        ("gptqmodel-gptq-4-g32", _set("quant_method", "awq"), ()),
        ("autoround-awq-4-g32", _set("group_size", 16), ("do not belong together",)),
        ("autoround-awq-4-g32", _set("bits", 8), ()),
        ("llmcompressor-w3a16-asym-g32", _set("config_groups", "group_0", "weights", "num_bits", 4), ()),
        ("llmcompressor-w3a16-asym-g32", _set("config_groups", "group_0", "weights", "symmetric", True), ()),
        ("llmcompressor-w3a16-asym-g32", _set("config_groups", "group_0", "weights", "group_size", 16), ()),
        ("llmcompressor-nvfp4", _set("config_groups", "group_0", "weights", "num_bits", 8), ()),
        ("llmcompressor-nvfp4", _set("config_groups", {}), ()),
        ("llmcompressor-nvfp4", _set("config_groups", []), ()),
        ("llmcompressor-fp8-block", _set("config_groups", "group_0", "weights", "block_structure", [64, 64]), ()),
        ("transformers-fp8-32", _set("weight_block_size", [128, 128]), ()),
        ("transformers-fp8-32", _set("weight_block_size", [0, 32]), ()),
        ("transformers-fp8-32", _set("weight_block_size", "32"), ()),
        ("modelopt-nvfp4a16", _set("quant_algo", "FP8"), ()),
        ("modelopt-nvfp4a16", _set("quant_algo", "NVFP5"), ("NVFP5",)),
        ("modelopt-fp8-pc-pt", _set("quant_algo", "FP8"), ()),
        ("tao-bnb-nf4", _set("bnb_4bit_quant_type", "fp4"), ()),
        ("tao-bnb-int8", _set("load_in_8bit", False), ()),
        ("transformers-bitnet", _set("linear_class", "linear"), ()),
    ],
)  # fmt: skip
def test_configs_that_contradict_the_tensors(
    name: str, change: Change, words: tuple[str, ...], tmp_path: Path
) -> None:
    tensors, metadata = stored(PEERS / name)
    config = json.loads((PEERS / name / "config.json").read_text())["quantization_config"]
    change(config)
    text = complaint(rewritten(PEERS / name, tmp_path / "m", tensors, metadata, config))
    assert all(w in text for w in words), text


@pytest.mark.parametrize("value", [[], "int4", 4, True])
def test_a_config_that_is_no_object(value: Any, tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": value}))
    if value == []:
        assert use(folder).kv is None, "an empty one is none"
        return
    assert "expected an object" in complaint(folder)


def test_a_plain_folder_under_a_quantization_config(tmp_path: Path) -> None:
    """Every format says that its tensors are missing, or that nothing is quantized; none invents numbers."""
    plain = use(write_llama(tmp_path / "plain"))
    for name in _LLAMA:
        config = json.loads((PEERS / name / "config.json").read_text())["quantization_config"]
        folder = write_llama(tmp_path / name)
        whole = json.loads((folder / "config.json").read_text()) | {"quantization_config": config}
        (folder / "config.json").write_text(json.dumps(whole))
        try:
            model = use(folder)
        except (InputError, UnsupportedError) as e:
            assert "model." in str(e) or "config.json" in str(e), name
            continue
        for role, e in model.entries.items():
            assert isinstance(e.data, Tensor) and np.array_equal(
                effective(e), effective(plain.entries[role])
            ), name


def test_side_files_are_read_where_the_config_is_silent(tmp_path: Path) -> None:
    """AutoGPTQ's quantize_config.json; a config.json that says nothing else would be a plain model of unknown tensors."""
    base = PEERS / "gptqmodel-gptq-4-g32"
    tensors, metadata = stored(base)
    folder = rewritten(base, tmp_path / "m", tensors, metadata)
    config = json.loads((folder / "config.json").read_text())
    side = config.pop("quantization_config")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "quantize_config.json").write_text(
        json.dumps({k: v for k, v in side.items() if k != "quant_method"})
    )
    a, b = use(base), use(folder)
    assert all(np.array_equal(effective(e), effective(b.entries[r])) for r, e in a.entries.items())
    (folder / "quantize_config.json").unlink()
    with pytest.raises(InputError, match="is missing"):
        lconvert.read(folder)
    (folder / "quantize_config.json").write_text("{")
    with pytest.raises(InputError, match="quantize_config"):
        lconvert.read(folder)


# --- the KV cache ----------------------------------------------------------------------------------------


def _with_cache(tmp_path: Path, extra: Stored, *, drop: str = "") -> Path:
    base = PEERS / "llmcompressor-fp8-dynamic-kv"
    tensors, metadata = stored(base)
    kept = {n: t for n, t in tensors.items() if not (drop and n.endswith(drop))}
    return rewritten(base, tmp_path / "m", kept | extra, metadata)


def _number(x: float, dtype: str = "F32") -> tuple[str, Any]:
    return dtype, np.array([x], np.float32 if dtype == "F32" else np.float64)


@pytest.mark.parametrize(
    ("extra", "drop", "words"),
    [
        ({}, "k_scale", ("k_scale", "missing", "download")),
        ({}, "v_scale", ("v_scale", "missing", "download")),
        ({"model.layers.0.self_attn.k_scale": _number(float("nan"))}, "k_scale", ("layers.0.self_attn.k_scale", "damaged")),
        ({"model.layers.0.self_attn.k_scale": _number(0.0)}, "k_scale", ("layers.0.self_attn.k_scale", "damaged")),
        ({"model.layers.0.self_attn.v_scale": _number(-1.0)}, "v_scale", ("layers.0.self_attn.v_scale", "damaged")),
        ({"model.layers.0.self_attn.k_scale": ("F32", np.ones(4, np.float32))}, "k_scale", ("one number per layer",)),
        ({"model.layers.0.self_attn.k_scale": _number(1.0, "F64")}, "k_scale", ("F64", "one number per layer")),
        ({"model.layers.7.self_attn.k_scale": _number(1.0)}, "", ("unknown tensor model.layers.7.self_attn.k_scale",)),
        ({"model.layers.0.self_attn.k_proj.k_scale": _number(1.0)}, "", ("second k_scale",)),
        ({"model.layers.0.self_attn.kv_scale": _number(1.0)}, "", ("a second",)),
        ({"model.layers.0.self_attn.q_proj.output_scale": _number(1.0)}, "", ("q_proj.output_scale",)),
        ({"model.layers.0.self_attn.output_scale": _number(1.0)}, "", ("unknown tensor model.layers.0.self_attn.output_scale",)),
    ],
)  # fmt: skip
def test_scales_of_the_cache(extra: Stored, drop: str, words: tuple[str, ...], tmp_path: Path) -> None:
    text = complaint(_with_cache(tmp_path, extra, drop=drop))
    assert all(w in text for w in words), text


@pytest.mark.parametrize("form", ["{}.k_scale {}.v_scale", "{}.k_proj.k_scale {}.v_proj.v_scale",
                                  "{}.k_proj.output_scale {}.v_proj.output_scale"])  # fmt: skip
def test_names_that_vllm_accepts_for_them(form: str, tmp_path: Path) -> None:
    base = PEERS / "llmcompressor-fp8-dynamic-kv"
    tensors, metadata = stored(base)
    kept = {n: t for n, t in tensors.items() if not n.endswith(("k_scale", "v_scale"))}
    names = form.format("model.layers.0.self_attn", "model.layers.0.self_attn").split()
    kept |= {names[0]: _number(0.25), names[1]: _number(0.5)}
    kv = use(rewritten(base, tmp_path / "m", kept, metadata)).kv
    assert kv is not None and kv.k.scale is not None and kv.v.scale is not None
    assert (kv.k.scale.load().tolist(), kv.v.scale.load().tolist()) == ([0.25], [0.5])


def test_a_cache_scale_where_nothing_quantizes_the_cache(tmp_path: Path) -> None:
    base = PEERS / "gptqmodel-gptq-4-g32"
    tensors, metadata = stored(base)
    extra: Stored = {"model.layers.0.self_attn.k_scale": _number(1.0)}
    text = complaint(rewritten(base, tmp_path / "m", tensors | extra, metadata))
    assert "model.layers.0.self_attn.k_scale" in text and "quantizes no KV cache" in text


# --- modules and models ----------------------------------------------------------------------------------


def test_a_module_outside_the_model_is_unknown(tmp_path: Path) -> None:
    """A second layer's codes in a model of one layer."""
    base = PEERS / "gptqmodel-gptq-4-g32"
    tensors, metadata = stored(base)
    name = "model.layers.1.mlp.up_proj.qweight"
    text = complaint(
        rewritten(base, tmp_path / "m", tensors | {name: tensors[_MODULE + ".qweight"]}, metadata)
    )
    assert f"unknown tensor {name}" in text


def test_both_a_plain_and_a_quantized_weight(tmp_path: Path) -> None:
    base = PEERS / "gptqmodel-gptq-4-g32"
    tensors, metadata = stored(base)
    for suffix in ("weight", "qweight.weight"):
        extra: Stored = {f"{_MODULE}.{suffix}": ("F32", np.zeros((160, 128), np.float32))}
        text = complaint(rewritten(base, tmp_path / suffix, tensors | extra, metadata))
        assert _MODULE in text


def test_peers_are_carried_as_their_kind_allows() -> None:
    """What a folder of a peer meets at the target of its own format: exactly what it is."""
    own = {
        "gptqmodel-gptq-4-g32": "gptq", "gptqmodel-gptq-4-g32-desc": "gptq", "gptqmodel-gptq2-4-g32-asym": "gptq_v2",
        "autoround-awq-4-g32": "awq", "llmcompressor-w3a16-asym-g32": "compressed-tensors",
        "llmcompressor-nvfp4": "compressed-tensors", "llmcompressor-fp8-block": "compressed-tensors",
        "llmcompressor-mixed-int4-fp8": "compressed-tensors", "transformers-fp8-32": "fp8",
        "transformers-fp8-32-ue8m0": "fp8", "modelopt-int4-awq": "modelopt", "modelopt-int8-sq": "modelopt",
        "modelopt-mxfp8": "modelopt", "modelopt-nvfp4a16": "modelopt", "tao-bnb-nf4": "bitsandbytes",
    }  # fmt: skip
    for name, target in own.items():
        model = lconvert.read(PEERS / name)
        plan = targets.plan(model, target, "m")
        quantized = {r for r, e in model.entries.items() if isinstance(e.data, QTensor)}
        kinds = {str(i.verdict.kind) for i in plan.items() if quantized & set(i.sources)}
        assert kinds == {"exact"}, (name, target, kinds, refusals(plan))


_TARGETS = (
    "compressed-tensors",
    "vllm",
    "gptq",
    "gptq_v2",
    "awq",
    "fp8",
    "modelopt",
    "tensorrt-llm",
    "bitsandbytes",
    "gguf",
)


#: Scales of inputs are folded over several tensors: test_fold compares the function.
_UNSCALED = [n for n in _LLAMA if "pre_quant_scale" not in " ".join(stored(PEERS / n)[0])]


@pytest.mark.parametrize("name", _UNSCALED)
def test_peers_at_every_target_are_what_the_plan_promises(name: str, tmp_path: Path) -> None:
    """Read back equal, but for what the plan says it rounds, and for the rows, columns and norms that moved together."""
    model = lconvert.read(PEERS / name)
    for target in _TARGETS:
        file = "m.gguf" if target == "gguf" else target
        try:
            plan = targets.plan(model, target, file)
        except UnsupportedError as e:
            assert "KV cache" in str(e), (target, e)
            continue
        if found := refusals(plan):
            assert "--allow-requantize" in found[0] or "in one matrix" in found[0] or "experts" in found[0], (
                found
            )
            continue
        execute(plan, tmp_path if target == "gguf" else tmp_path / target)
        back = lconvert.read(tmp_path / file)
        changed = {s for i in plan.items() for s in i.sources if i.verdict.kind not in ("exact", "widened")}
        want = model if target.startswith("gptq") else act_order.absorb(model)[0]
        for role, e in want.entries.items():
            if role not in changed:
                assert np.array_equal(effective(e), effective(back.entries[role])), (target, role)
            elif isinstance(e.data, QTensor):
                np.testing.assert_allclose(
                    effective(back.entries[role]), effective(e), rtol=2.0**-8, err_msg=target
                )


def test_scales_that_are_exponents_are_widened_to_numbers(tmp_path: Path) -> None:
    """ue8m0 scales of 2-D blocks (DeepSeek-V3.1): F32 holds every power of two."""
    model = lconvert.read(PEERS / "transformers-fp8-32-ue8m0")
    plan = targets.plan(model, "fp8", "m")
    assert refusals(plan) == []
    execute(plan, tmp_path / "m")
    back = lconvert.read(tmp_path / "m")
    for role, e in model.entries.items():
        if isinstance(e.data, QTensor):
            assert np.array_equal(effective(e), effective(back.entries[role])), role
