"""DeepSeek's block FP8, FP8 per tensor and FBGEMM's, against the dequantization of transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lconvert.converters import hf, hf_quantized
from lconvert.errors import InputError, LconvertError, UnsupportedError
from lconvert.formats import fp8, safetensors
from lconvert.formats.fp8 import Writer
from lconvert.formats.scheme import Checkpoint, Held, Part, Weight
from lconvert.ir import E4M3, ActSpec, KVSpec, QTensor, Tensor, Transform, dense, int_grid
from lconvert.kernels.qtensor import dequantize
from lconvert.spec import blocks
from tests.checkpoints import LLAMA, bf16, random_tensors, write_tensors

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

MODULE = "model.layers.0.mlp.up_proj"
WRITER = Writer()
GROUPS = ActSpec(E4M3, "group", True, 128)
BLOCK = {
    "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128],
    "modules_to_not_convert": ["lm_head"],
}  # fmt: skip
TENSOR = {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]}
FBGEMM = {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": ["lm_head"]}
Tensors = dict[str, tuple[str, Any]]


def codes(shape: tuple[int, int], seed: int = 0) -> Any:
    found = np.random.default_rng(seed).integers(0, 256, shape).astype("u1")
    return np.where((found & 0x7F) == 0x7F, 0, found).astype("u1")


def scales(shape: tuple[int, ...], seed: int = 0) -> Any:
    return (np.random.default_rng(seed).random(shape) * 0.01 + 1e-4).astype(np.float32)


def block_tensors(shape: tuple[int, int]) -> Tensors:
    return {
        "weight": ("F8_E4M3", codes(shape)),
        "weight_scale_inv": ("F32", scales(blocks(shape, (128, 128)))),
    }


def read(path: Path, config: Mapping[str, Any], tensors: Tensors, shape: tuple[int, int]) -> Weight | None:
    """The module, all of whose tensors must be used, with every number in it read."""
    write_tensors(path / "x.safetensors", {f"{MODULE}.{n}": t for n, t in tensors.items()})
    file = safetensors.read_header(path / "x.safetensors")
    parts: dict[str, Part] = {
        n.removeprefix(MODULE + "."): hf_quantized.part(file, info) for n, info in file.tensors.items()
    }
    weight = fp8.parse(Checkpoint("config.json", config, path)).weight(MODULE, parts, shape)
    if weight is not None:
        assert weight.used == parts.keys()
        assert isinstance(weight.data, QTensor)
        dequantize(weight.data)
        if weight.activation is not None and weight.activation.scale is not None:
            weight.activation.scale.load()
    return weight


def values(weight: Weight | None) -> Any:
    assert weight is not None and isinstance(weight.data, QTensor)
    return dequantize(weight.data)


def oracle(tensors: Tensors) -> Any:
    """transformers' Fp8Dequantize in fp32."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    weight = torch.from_numpy(tensors["weight"][1].copy()).view(torch.float8_e4m3fn)
    kind, scale = tensors["weight_scale_inv"]
    found = torch.from_numpy(scale.copy())
    if kind == "F8_E8M0":
        found = found.view(torch.float8_e8m0fnu)
    return Fp8Dequantize(None)._dequantize_one(weight, found, torch.float32).numpy()


# --- blocks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(256, 384), (128, 128), (384, 128)])
def test_blocks_equal_transformers_and_come_back(shape: tuple[int, int], tmp_path: Path) -> None:
    """Equal in all bits: fp32 codes times the fp32 scale, one rounding each."""
    tensors = block_tensors(shape)
    weight = read(tmp_path, BLOCK, tensors, shape)
    assert np.array_equal(values(weight), oracle(tensors))
    assert weight is not None and isinstance(weight.data, QTensor)
    assert weight.data.block == (128, 128) and weight.activation == GROUPS
    held = Held(weight.data, weight.activation)
    assert WRITER.problem(held) is None
    stored = WRITER.store(held)
    assert stored.keys() == tensors.keys()
    for name, (dtype, array) in tensors.items():
        out = stored[name]
        assert (out.dtype, out.shape) == (dtype, array.shape)
        assert np.array_equal(out.read(0, array.shape[0]), array)
    assert WRITER.config({MODULE: held, "lm_head": Held(None)}, None) == BLOCK


def test_exponents_as_scales_equal_transformers(tmp_path: Path) -> None:
    """scale_fmt ue8m0: one byte per block, 2^(byte - 127)."""
    tensors = block_tensors((256, 384))
    tensors["weight_scale_inv"] = ("F8_E8M0", np.arange(112, 118, dtype="u1").reshape(2, 3))
    weight = read(tmp_path, BLOCK | {"scale_fmt": "ue8m0"}, tensors, (256, 384))
    assert np.array_equal(values(weight), oracle(tensors))
    assert weight is not None and isinstance(weight.data, QTensor)
    assert "widen the exponents to F32" in str(WRITER.problem(Held(weight.data, weight.activation)))
    scheme = fp8.parse(Checkpoint("config.json", BLOCK | {"scale_fmt": "ue8m0"}, tmp_path))
    assert "powers of two" in scheme.report[0]
    tensors["weight_scale_inv"][1][1, 2] = 255
    with pytest.raises(InputError, match="a scale in row 1 is NaN"):
        read(tmp_path, BLOCK, tensors, (256, 384))


def test_blocks_are_cut_at_the_edges(tmp_path: Path) -> None:
    """ceil(N / 128) x ceil(K / 128) scales, as DeepSeek's weight_dequant reads them: the oracle gets whole blocks."""
    shape, whole = (200, 300), (256, 384)
    tensors = block_tensors(shape)
    padded = {
        "weight": ("F8_E4M3", np.pad(tensors["weight"][1], ((0, 56), (0, 84)))),
        "weight_scale_inv": tensors["weight_scale_inv"],
    }
    assert padded["weight"][1].shape == whole
    weight = read(tmp_path, BLOCK, tensors, shape)
    assert np.array_equal(values(weight), oracle(padded)[:200, :300])
    assert weight is not None and isinstance(weight.data, QTensor)
    assert np.array_equal(dequantize(weight.data, 90, 170), values(weight)[90:170])


def test_transformers_reads_the_folder_that_is_written(tmp_path: Path) -> None:
    """A Llama with block FP8 weights and a plain o_proj, loaded by transformers, which dequantizes it on the CPU."""
    import transformers

    config = {**LLAMA, "num_key_value_heads": 8}
    tensors = random_tensors(config)
    held: dict[str, Held] = {}
    for name, (_, array) in list(tensors.items()):
        module = name.removesuffix(".weight")
        if "_proj" in name and "layers.0.self_attn.o_proj" not in name:
            del tensors[name]
            shape = array.shape
            q = QTensor(
                shape,
                dense(codes(shape, len(held))),
                E4M3,
                (128, 128),
                dense(scales(blocks(shape, (128, 128)))),
            )
            held[module] = Held(q, GROUPS)
            stored = WRITER.store(held[module])
            tensors |= {f"{module}.{s}": (t.dtype, t.read(0, t.shape[0])) for s, t in stored.items()}
        elif array.ndim == 2 and "embed" not in name:
            held[module] = Held(None)
    write_tensors(tmp_path / "model.safetensors", tensors)
    said = {**config, "quantization_config": WRITER.config(held, None)}
    (tmp_path / "config.json").write_text(json.dumps(said))
    quantization = transformers.FineGrainedFP8Config(
        modules_to_not_convert=said["quantization_config"]["modules_to_not_convert"], dequantize=True
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, quantization_config=quantization
    )
    for module, h in held.items():
        found = model.get_submodule(module).weight.detach().float().numpy()
        if h.weight is None:
            plain = tensors[f"{module}.weight"][1]
            assert np.array_equal(bf16(found.copy()), plain)
        else:
            assert np.array_equal(found, dequantize(h.weight)), module
    read_back = hf.read(tmp_path)
    up = read_back.entries["layers.1.mlp.up"]
    assert up.activation == GROUPS and isinstance(up.data, QTensor)
    assert any("fp8, block 128x128" in line for line in read_back.report)


# --- one scale per tensor, one per row ---------------------------------------------------------------------


@pytest.mark.parametrize(("scale", "activation"), [("weight_scale", "input_scale"), ("weight_scale_inv", "activation_scale")])  # fmt: skip
@pytest.mark.parametrize("shape", [(), (1,)])
def test_one_scale_per_tensor(scale: str, activation: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    """AutoFP8's names and transformers': both multiply, and the oracle of the latter is transformers'."""
    value = np.full(shape, 0.0123, np.float32)
    tensors: Tensors = {"weight": ("F8_E4M3", codes((64, 96))), scale: ("F32", value)}
    tensors[activation] = ("F32", np.full(shape, 0.5, np.float32))
    weight = read(tmp_path, TENSOR, tensors, (64, 96))
    expected = oracle({"weight": tensors["weight"], "weight_scale_inv": ("F32", value.reshape(1, 1))})
    assert np.array_equal(values(weight), expected)
    assert weight is not None and weight.activation is not None and weight.activation.scale is not None
    assert (weight.activation.per, weight.activation.dynamic) == ("tensor", False)
    assert weight.activation.scale.load().tolist() == [0.5]
    del tensors[activation]
    weight = read(tmp_path, TENSOR | {"activation_scheme": "dynamic"}, tensors, (64, 96))
    assert weight is not None and weight.activation == ActSpec(E4M3, "tensor", True)


def test_fbgemm_keeps_the_bound_of_activations(tmp_path: Path) -> None:
    """W is codes times the scale of their row; the bound of activations comes back exactly, and no writer drops it."""
    tensors: Tensors = {"weight": ("F8_E4M3", codes((64, 96))), "weight_scale": ("F32", scales((64, 1)))}
    weight = read(tmp_path, FBGEMM, tensors, (64, 96))
    plain = torch.from_numpy(tensors["weight"][1]).view(torch.float8_e4m3fn).float()
    assert np.array_equal(values(weight), (plain * torch.from_numpy(tensors["weight_scale"][1])).numpy())
    assert weight is not None and weight.activation is not None and weight.activation.scale is not None
    a = weight.activation
    assert (a.grid, a.per, a.dynamic) == (E4M3, "token", True)
    assert a.scale is not None and np.float32(a.scale.load()[0] * 448) == np.float32(1200)
    from lconvert.formats.compressed_tensors import Writer as Other

    assert isinstance(weight.data, QTensor)
    assert "activation_scale_ub" in str(Other().problem(Held(weight.data, a)))
    tensors["input_scale_ub"] = ("F32", np.array([1200.0], np.float32))
    assert read(tmp_path, FBGEMM, tensors, (64, 96)) is not None
    tensors["input_scale_ub"] = ("F32", np.array([100.0], np.float32))
    with pytest.raises(InputError, match=r"is 100\.0, activation_scale_ub in config\.json is 1200\.0"):
        read(tmp_path, FBGEMM, tensors, (64, 96))


def test_plain_modules(tmp_path: Path) -> None:
    """Modules that no list names are told by the type of their weight: DeepSeek lists none of its plain ones."""
    plain: Tensors = {"weight": ("BF16", np.zeros((4, 8), "u2"))}
    assert read(tmp_path, BLOCK, plain, (4, 8)) is None
    assert read(tmp_path, BLOCK | {"modules_to_not_convert": ["mlp.up_proj"]}, plain, (4, 8)) is None
    for listed in (MODULE, "model.layers.0", "up_proj"):
        with pytest.raises(
            InputError, match=rf"stored as F8_E4M3, but config\.json lists '{listed}' as not quantized"
        ):
            read(
                tmp_path, BLOCK | {"modules_to_not_convert": [listed]}, block_tensors((128, 128)), (128, 128)
            )
    for other in ("up", "model.layers.0.mlp.up", "model.layers.01", "proj"):
        config = BLOCK | {"modules_to_not_convert": [other]}
        assert read(tmp_path, config, block_tensors((128, 128)), (128, 128)) is not None


# --- bad input ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "error", "words"),
    [
        (BLOCK | {"surprise": 1}, InputError, "unknown key 'surprise'"),
        (BLOCK | {"activation_scale_ub": 1}, InputError, "unknown key 'activation_scale_ub'"),
        (BLOCK | {"fmt": "e5m2"}, UnsupportedError, "fmt is 'e5m2'"),
        (BLOCK | {"expert_dtype": "fp4"}, UnsupportedError, "expert_dtype is 'fp4'"),
        (BLOCK | {"modules_to_convert": ["wte"]}, UnsupportedError, "modules_to_convert"),
        (BLOCK | {"activation_scheme": "static"}, UnsupportedError, "static activations with blocks"),
        (BLOCK | {"activation_scheme": "none"}, InputError, "activation_scheme is 'none'"),
        (BLOCK | {"weight_block_size": [128]}, InputError, "expected two positive numbers"),
        (BLOCK | {"weight_block_size": [128, 0]}, InputError, "expected two positive numbers"),
        (BLOCK | {"weight_block_size": [128, 128.0]}, InputError, "expected two positive numbers"),
        (BLOCK | {"modules_to_not_convert": "lm_head"}, InputError, "expected a list of names"),
        (BLOCK | {"kv_cache_scheme": {"num_bits": 8}}, UnsupportedError, "only 'static' can be read"),
        (FBGEMM | {"activation_scale_ub": 0}, InputError, "expected a positive number"),
        (FBGEMM | {"activation_scale_ub": float("inf")}, InputError, "expected a positive number"),
        (FBGEMM | {"activation_scale_ub": True}, InputError, "expected a positive number"),
        ({"quant_method": "fbgemm_fp8"}, InputError, "activation_scale_ub is None"),
    ],
)
def test_configs_that_cannot_be_read(config: Any, error: type[LconvertError], words: str) -> None:
    with pytest.raises(error, match=words) as e:
        fp8.parse(Checkpoint("config.json", config, Path()))
    assert str(e.value).startswith("config.json")


@settings(max_examples=100, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=4), v, max_size=3),
        max_leaves=5,
    ),
    st.sampled_from([*sorted((BLOCK | FBGEMM).keys() - {"quant_method"}), "scale_fmt", "kv_cache_scheme", "ignored_layers"]),
    st.sampled_from([BLOCK, TENSOR, FBGEMM]),
)  # fmt: skip
def test_any_value_of_any_key_is_read_or_refused(value: Any, key: str, config: dict[str, Any]) -> None:
    try:
        fp8.parse(Checkpoint("config.json", config | {key: value}, Path()))
    except LconvertError as e:
        assert "config.json" in str(e)


def changed(tensors: Tensors, suffix: str, change: Any) -> Tensors:
    """The tensors with one of them changed, or without it where the change is None."""
    out = dict(tensors)
    kind, array = out.pop(suffix)
    return out if change is None else out | {suffix: change(kind, array.copy())}


def at(index: Any, value: float) -> Any:
    def change(kind: str, array: Any) -> tuple[str, Any]:
        array[index] = value
        return kind, array

    return change


@pytest.mark.parametrize(
    ("config", "suffix", "change", "words"),
    [
        (BLOCK, "weight_scale_inv", None, "the tensor weight_scale_inv is missing"),
        (TENSOR, "weight_scale", None, "the tensor weight_scale is missing"),
        (TENSOR, "input_scale", None, "the tensor input_scale is missing"),
        (FBGEMM, "weight_scale", None, "the tensor weight_scale is missing"),
        (BLOCK, "weight", at((3, 5), 0x7F), "row 3 holds a NaN"),
        (BLOCK, "weight", lambda k, a: ("F8_E5M2", a), "is stored as F8_E5M2, expected F8_E4M3"),
        (BLOCK, "weight", lambda k, a: (k, a[:128]), r"has shape \(128, 384\)"),
        (BLOCK, "weight", lambda k, a: ("U8", a), "its weight is no 8-bit float"),
        (BLOCK, "weight_scale_inv", at((1, 2), np.nan), "the scale nan in row 1 is damaged"),
        (BLOCK, "weight_scale_inv", at((1, 2), -0.0), "the scale -0.0 in row 1 is damaged"),
        (BLOCK, "weight_scale_inv", lambda k, a: (k, a.T.copy()), r"implies \(2, 3\)"),
        (BLOCK, "weight_scale_inv", lambda k, a: ("I32", a), "is stored as I32"),
        (TENSOR, "weight_scale", at(0, 0.0), "must be positive"),
        (TENSOR, "weight_scale", at(0, -1.0), "must be positive"),
        (TENSOR, "input_scale", at(0, np.inf), "the scale inf is damaged"),
        (TENSOR, "input_scale", lambda k, a: (k, np.ones(2, "f4")), r"has shape \(2,\)"),
        (FBGEMM, "weight_scale", lambda k, a: (k, a[:, 0]), r"implies \(256, 1\)"),
    ],
)
def test_damaged_tensors_are_named(config: Any, suffix: str, change: Any, words: str, tmp_path: Path) -> None:
    shape = (256, 384)
    sound: Tensors = {"weight": ("F8_E4M3", codes(shape))}
    if config is BLOCK:
        sound = block_tensors(shape)
    elif config is TENSOR:
        sound |= {n: ("F32", np.full(1, 0.02, np.float32)) for n in ("weight_scale", "input_scale")}
    else:
        sound["weight_scale"] = ("F32", scales((256, 1)))
    assert read(tmp_path, config, sound, shape) is not None
    with pytest.raises(InputError, match=words) as e:
        read(tmp_path, config, changed(sound, suffix, change), shape)
    assert MODULE in str(e.value)


def test_two_scales_contradict_each_other(tmp_path: Path) -> None:
    tensors = block_tensors((128, 128)) | {"weight_scale": ("F32", np.ones((1, 1), np.float32))}
    with pytest.raises(InputError, match="has both weight_scale_inv and weight_scale"):
        read(tmp_path, BLOCK, tensors, (128, 128))


def test_scales_of_the_kv_cache_make_it_quantized() -> None:
    expected = KVSpec(ActSpec(E4M3, "tensor", False), ActSpec(E4M3, "tensor", False))
    named = frozenset({"model.layers.0.self_attn.k_scale"})
    assert fp8.parse(Checkpoint("c", TENSOR, Path(), {}, named)).kv == expected
    assert fp8.parse(Checkpoint("c", TENSOR | {"kv_cache_scheme": "static"}, Path())).kv == expected
    assert fp8.parse(Checkpoint("c", TENSOR, Path())).kv is None


# --- what cannot be written --------------------------------------------------------------------------------

SOUND = QTensor((128, 256), dense(codes((128, 256))), E4M3, (128, 128), dense(scales((1, 2))))


@pytest.mark.parametrize(
    ("held", "words"),
    [
        (Held(SOUND), "always quantizes activations per token in groups of 128"),
        (Held(SOUND, replace(GROUPS, group=64)), "in groups of 128"),
        (Held(SOUND, replace(GROUPS, dynamic=False)), "in groups of 128"),
        (Held(SOUND, replace(GROUPS, scale=dense(np.ones(1, "f4")))), "in groups of 128"),
        (Held(replace(SOUND, block=(1, -1), scale=dense(scales((128, 1)))), GROUPS), "are no squares"),
        (Held(replace(SOUND, grid=int_grid(8, False)), GROUPS), "E4M3 numbers"),
        (Held(replace(SOUND, zero=SOUND.scale), GROUPS), "E4M3 numbers"),  # type: ignore[arg-type]
        (Held(replace(SOUND, g_idx=dense(np.zeros(256, "i4"))), GROUPS), "column orders"),
        (Held(replace(SOUND, scale=SOUND), GROUPS), "widen the exponents"),
        (
            Held(SOUND, GROUPS, Transform("scale", "input", dense(np.ones(256, "f4")), False)),
            "pre_quant_scale",
        ),
    ],
)
def test_problems_are_told(held: Held, words: str) -> None:
    assert words in str(WRITER.problem(held))


def test_what_a_config_cannot_say() -> None:
    other = replace(SOUND, block=(64, 128), scale=dense(scales((2, 2))))
    with pytest.raises(UnsupportedError, match="have one block size, found"):
        WRITER.config({"a": Held(SOUND, GROUPS), "b": Held(other, GROUPS)}, None)
    with pytest.raises(UnsupportedError, match="no quantized module"):
        WRITER.config({"a": Held(None)}, None)
    static = ActSpec(E4M3, "tensor", False, scale=dense(np.ones(2, "f4")))
    with pytest.raises(UnsupportedError, match="write compressed-tensors instead"):
        WRITER.config({"a": Held(SOUND, GROUPS)}, KVSpec(static, static))
    assert (
        WRITER.side_files({}) == {} and WRITER.store(Held(None)) == {} and WRITER.problem(Held(None)) is None
    )
    assert isinstance(SOUND.scale, Tensor)
