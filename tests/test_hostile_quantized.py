"""Quantized checkpoints that are damaged, lie, or want to do harm: one clear error, or exactly the numbers that are stored.

Every scheme is damaged in every way that `hostile_quantized` knows. What is still read is compared with `plain_decoders`, a
second reading of the same bytes, and goes the whole way to a target: no exception but LconvertError, soon, in little
memory, nothing left behind. Below the seeded phase stand the particular lies that were found with it.
"""

from __future__ import annotations

import json
import random
import shutil
import time
import tracemalloc
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lconvert
from lconvert.cli import main
from lconvert.converters import targets
from lconvert.errors import InputError, LconvertError, UnsupportedError
from lconvert.executor import execute
from lconvert.formats import module_rules, safetensors
from lconvert.ir import Model, QTensor
from lconvert.kernels.qtensor import effective
from lconvert.plan import refusals
from tests import hostile_quantized as hostile
from tests.hostile_quantized import Folder
from tests.plain_decoders import decoded

SECONDS = 3.0  # of CPU for one attempt; a sound one takes a twentieth of that
MEMORY = 48 << 20  # bytes at the peak; the models have a tenth of a megabyte
TARGETS = ("gguf", "vllm", "dense")
SOURCES = hostile.sources()
#: Its experts are no linear modules: their layout has tests of its own (test_mxfp4_blocks).
_STACKED = "transformers-gpt-oss-mxfp4"
_UP = "model.layers.0.mlp.up_proj"


@pytest.fixture
def traced() -> Iterator[None]:
    tracemalloc.start()
    yield
    tracemalloc.stop()


def quantized(model: Model) -> dict[str, Any]:
    """The fp32 weight of every quantized module by its name in the folder."""
    entries = [e for e in model.entries.values() if isinstance(e.data, QTensor)]
    return {e.provenance[0].split()[0]: effective(e) for e in entries}


def use(source: Path, out: Path, target: str) -> dict[str, Any]:
    """Read a folder, all its numbers, and make an artifact of it: its quantized weights. LconvertError says why not."""
    model = lconvert.read(source)
    for e in model.entries.values():
        effective(e)
    plan = targets.plan(model, target, "m.gguf", allow_requantize=True)
    if not refusals(plan):
        execute(plan, out if target == "gguf" else out / "m", threads=1)
    return quantized(model)


def observe(folder: Folder, work: Path, target: str) -> tuple[dict[str, Any] | None, LconvertError | None]:
    """The quantized weights or the error. Another exception, a warning, a slow or a large attempt, a leftover fail the test."""
    folder.write(work / "in")
    out = work / "out"
    out.mkdir()
    tracemalloc.reset_peak()
    before, start = tracemalloc.get_traced_memory()[0], time.process_time()
    weights, error = None, None
    with warnings.catch_warnings(action="error"):
        try:
            weights = use(work / "in", out, target)
        except LconvertError as e:
            error = e
    took, peak = time.process_time() - start, tracemalloc.get_traced_memory()[1] - before
    assert took < SECONDS and peak < MEMORY, (took, peak, error)
    if error is not None:
        assert not [p for p in out.rglob("*") if p.is_file()], error
        assert 40 < len(str(error)) < 1500 and str(error).isprintable() and error.exit_code == 2, str(error)
    shutil.rmtree(out)
    shutil.rmtree(work / "in")
    return weights, error


# --- anything ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in SOURCES if n != _STACKED])
def test_sound_ones_mean_what_the_second_reading_says(name: str, tmp_path: Path) -> None:
    found, wanted = quantized(lconvert.read(SOURCES[name].write(tmp_path / "m"))), decoded(SOURCES[name])
    assert found.keys() == wanted.keys() and found
    for module, w in found.items():
        assert np.array_equal(w, wanted[module]), module


@pytest.mark.parametrize("name", SOURCES)
def test_numbers_are_refused_or_read_as_they_are(name: str, tmp_path: Path, traced: None) -> None:
    """Noise, extremes and flipped bits in every tensor of every scheme."""
    r, read = random.Random(name), 0
    for at in range(3):
        label, folder = hostile.values_changed(r, SOURCES[name])
        work = tmp_path / str(at)
        work.mkdir()
        weights, _ = observe(folder, work, r.choice(TARGETS))
        if weights is None or name == _STACKED:
            continue
        read += 1
        wanted = decoded(folder)
        for module, w in weights.items():
            assert np.isfinite(w).all() and np.array_equal(w, wanted[module]), (label, module)


def test_anything_wrong(tmp_path: Path, traced: None) -> None:
    """Damage of every kind to every scheme in turn; numbers that nobody touched stay what they were."""
    r, well, refused = random.Random(20260301), 0, 0
    for at, name in enumerate([*SOURCES] * 3):
        base = SOURCES[name]
        label, folder = hostile.damaged(r, base)
        try:
            folder.content()
        except (LconvertError, UnicodeError):  # no such file can be
            continue
        work = tmp_path / str(at)
        work.mkdir()
        weights, _ = observe(folder, work, r.choice(TARGETS))
        well, refused = well + (weights is not None), refused + (weights is None)
        if weights is None or name == _STACKED:
            continue
        untouched = folder.tensors is base.tensors and folder.raw is None
        for module, w in weights.items():
            assert np.isfinite(w).all(), (name, label, module)
            if untouched and not _other_meaning(base, folder):
                assert np.array_equal(w, decoded(base)[module]), (name, label, module)
    assert well > 30 and refused > 60


def _other_meaning(base: Folder, folder: Folder) -> bool:
    """Whether the config says something else of the same bytes, which both readings believe."""
    if folder.text is not None:
        return True
    keys = (
        "checkpoint_format",
        "format",
        "linear_class",
        "block_size",
        "weight_block_size",
        "packing_format",
    )
    a, b = (json.dumps(f.config.get("quantization_config"), sort_keys=True) for f in (base, folder))
    return a != b and any(k in a + b for k in keys) and folder.metadata == base.metadata


# --- particular lies ---------------------------------------------------------------------------------------

Change = Callable[[dict[str, Any]], Any]


def with_config(name: str, change: Change) -> Folder:
    config = json.loads(json.dumps(SOURCES[name].config))
    change(config["quantization_config"])
    return replace(SOURCES[name], config=config, side={})


def with_tensor(name: str, full: str, change: Callable[[Any], Any]) -> Folder:
    """One tensor changed in place, as the unsigned numbers of its bits."""
    dtype, a = SOURCES[name].tensors[full]
    bits = np.array(a, copy=True).reshape(-1).view(f"u{a.dtype.itemsize}")
    change(bits)
    new = bits.view(a.dtype).reshape(a.shape)
    return replace(SOURCES[name], tensors=dict(SOURCES[name].tensors) | {full: (dtype, new)})


def complaint(folder: Folder, work: Path, kind: type[LconvertError], target: str = "vllm") -> str:
    weights, error = observe(folder, work, target)
    assert weights is None and type(error) is kind, error
    return str(error)


def _set(*path: Any) -> Change:
    *keys, last, value = path

    def change(config: dict[str, Any]) -> None:
        for k in keys:
            config = config[k]
        config[last] = value

    return change


_BOMBS = {
    "(a+)+$": "this expression may take too long",
    "(.|.)" * 23 + "Z": "this expression may take too long",
    ".*.*.*.*.*.*Z": "this expression may take too long",
    "(?:.*|x){40}": "this expression may take too long",
    "[" * 3_000: "this expression may take too long",
    "(" * 3000: "no valid regular expression",
    "a{99999999999}": "no valid regular expression",
}


@pytest.mark.parametrize("bomb", _BOMBS, ids=range(len(_BOMBS)))
def test_expressions_that_never_end(bomb: str, tmp_path: Path, traced: None) -> None:
    kind = InputError if "no valid" in _BOMBS[bomb] else UnsupportedError
    for at, (name, change) in enumerate(
        {
            "llmcompressor-nvfp4": _set("ignore", ["lm_head", f"re:{bomb}"]),
            "llmcompressor-mxfp4a16": _set("config_groups", "group_0", "targets", ["Linear", f"re:{bomb}"]),
            "gptqmodel-gptq-4-g32": _set("dynamic", {f"-:{bomb}": {}}),
            "autoround-own-4-g32": _set("extra_config", {bomb: {"bits": 8}}),
            "quark-int8": _set("exclude", [f"re:{bomb}"]),
        }.items()
    ):
        (tmp_path / str(at)).mkdir()
        text = complaint(with_config(name, change), tmp_path / str(at), kind)
        assert _BOMBS[bomb] in text and "config.json" in text, text


def test_many_expressions_cost_what_all_of_them_do(tmp_path: Path, traced: None) -> None:
    """Each is harmless alone."""
    costly = [f"re:.*.*.*.*{i}Z" for i in range(2000)]
    text = complaint(
        with_config("llmcompressor-nvfp4", _set("ignore", ["lm_head", *costly])), tmp_path, UnsupportedError
    )
    assert "expressions before it may take too long to match" in text and "name the modules" in text
    dynamic = {f"-:a{i}": {} for i in range(20_000)}
    text = complaint(
        with_config("gptqmodel-gptq-4-g32", _set("dynamic", dynamic)), tmp_path, UnsupportedError
    )
    assert "may take too long" in text


def test_what_real_configs_hold_is_cheap() -> None:
    real = [
        *(rf"-:model\.layers\.{i}\.mlp\..*_proj" for i in range(100)), r".*\.layers\.\d+\.mlp\.experts\.\d+\..*_proj",
        r"model\.layers\.[0-9]+\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj", ".*mlp.gate$", ".*self_attn.*", ".*vision_tower.*",
    ]  # fmt: skip
    assert len(module_rules.compiled([(text, "here") for text in real])) == len(real)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("modelopt-nvfp4a16", _set("ignore", [f"*{i}*" for i in range(40_000)])),
        ("modelopt-nvfp4a16", _set("ignore", ["*a" * 2000])),
        ("quark-int8", _set("exclude", [f"*{i}*" for i in range(40_000)])),
        ("quark-int8", _set("layer_quant_config", {f"*{i}*": {} for i in range(40_000)})),
    ],
)
def test_too_many_shell_patterns(name: str, change: Change, tmp_path: Path, traced: None) -> None:
    text = complaint(with_config(name, change), tmp_path, UnsupportedError)
    assert "take too long to match; at most 10000 of 1024 letters are read" in text


@pytest.mark.parametrize(
    ("name", "change", "kind", "message"),
    [
        ("transformers-bitnet", _set("linear_class", ["bitlinear"]), InputError, "linear_class ['bitlinear'] must be one of"),
        ("transformers-bitnet", _set("linear_class", {}), InputError, "linear_class {} must be one of"),
        ("modelopt-fp8-kv", _set("kv_cache_scheme", {"type": "float", "num_bits": [8]}), UnsupportedError, "unknown kv_cache_scheme"),
        ("modelopt-fp8-kv", _set("kv_cache_scheme", {"type": [], "num_bits": {}}), UnsupportedError, "unknown kv_cache_scheme"),
        ("quark-int8", _set("export", "kv_cache_group", 5), InputError, "kv_cache_group is 5, expected a list of names"),
        ("quark-int8", _set("export", "kv_cache_group", "*k_proj"), InputError, "kv_cache_group is '*k_proj', expected a list"),
        ("fbgemm", _set("activation_scale_ub", 10**400), InputError, "activation_scale_ub is 1000"),
        ("fbgemm", _set("activation_scale_ub", 1e39), InputError, "activation_scale_ub is 1e+39, expected a positive number"),
        ("gptqmodel-gptq-4-g32", _set("group_size", 10**4000), InputError, "group_size of quantization_config is 1000"),
        ("autoround-awq-4-g32", _set("bits", -(10**4000)), InputError, "expected a whole number"),
        ("autoround-awq-4-g32", _set("pack_dtype", "y\x1b\n" * 9000), UnsupportedError, "AWQ of 4 bits in y"),
        ("autoround-awq-4-g32", _set("format", "y\x1b\n" * 9000), InputError, "format and checkpoint_format differ: gemm, y"),
        ("llmcompressor-w3a16-asym-g32", _set("config_groups", "group_0", "weights", "num_bits", 10**4000), InputError, "num_bits is 1000"),
        ("llmcompressor-fp8-block", _set("config_groups", "group_0", "weights", "block_structure", [10**4000, 1]), InputError, "two positive numbers"),
        ("transformers-fp8-32", _set("weight_block_size", [10**4000, 32]), InputError, "two positive numbers"),
        ("modelopt-nvfp4a16", _set("group_size", 10**4000), InputError, "must be a positive whole number"),
        ("quark-mxfp4", _set("global_quant_config", "weight", "group_size", ["y" * 90_000]), UnsupportedError, "in groups of ['yyy"),
        ("quark-uint4", _set("global_quant_config", "weight", "group_size", 10**4000), InputError, "group_size 1000"),
        ("quark-int8", _set("global_quant_config", "weight", "dtype", "\x1b" * 90_000), UnsupportedError, "not verified by public code"),
    ],
)  # fmt: skip
def test_configs_of_wrong_types_and_sizes(
    name: str, change: Change, kind: type[LconvertError], message: str, tmp_path: Path, traced: None
) -> None:
    assert message in complaint(with_config(name, change), tmp_path, kind)


def test_two_configs_that_differ(tmp_path: Path, traced: None) -> None:
    base = SOURCES["llmcompressor-nvfp4"]
    same = replace(base, config=base.config | {"compression_config": base.quantization})
    weights, _ = observe(same, tmp_path, "vllm")
    assert weights is not None
    other = replace(base, config=base.config | {"compression_config": base.quantization | {"ignore": []}})
    text = complaint(other, tmp_path, InputError)
    assert "quantization_config and compression_config differ; remove the one" in text


#: A scale whose product with a code no fp32 number is: the bits of a stored scale, by source.
_BEYOND = {
    ("gptqmodel-gptq2-4-g32-asym", "scales"): None,
    ("llmcompressor-w4a16-asym-g32", "weight_scale"): 0x7F7F,
    ("llmcompressor-w8a8-static-asym", "weight_scale"): 0x7F7F,
    ("llmcompressor-fp8-dynamic-kv", "weight_scale"): 0x7F7F,
    ("llmcompressor-nvfp4", "weight_global_scale"): 1,
    ("llmcompressor-mxfp4a16", "weight_scale"): 254,
    ("modelopt-mxfp8", "weight_scale"): 254,
    ("modelopt-int4-awq", "weight_scale"): 0x7F7FFFFF,
    ("modelopt-int4-awq", "pre_quant_scale"): None,
    ("modelopt-nvfp4a16", "weight_scale_2"): 0x7F7FFFFF,
    ("transformers-fp8-32", "weight_scale_inv"): 0x7F7FFFFF,
    ("transformers-bitnet", "weight_scale"): 1,
    ("transformers-bitnet-auto", "weight_scale"): None,
    ("fp8-tensor", "weight_scale"): 0x7F7FFFFF,
    ("fbgemm", "weight_scale"): 0x7F7FFFFF,
    ("tao-bnb-nf4", "weight.absmax"): None,
    ("tao-bnb-nf4-double", "weight.nested_absmax"): None,
    ("tao-torchao-int8", "_weight_scale"): 0x7F7FFFFF,
    ("torchao-intx", "_weight_scale"): 0xFF7FFFFF,
    ("quark-fp8-block", "weight_scale"): 0x7F7FFFFF,
    ("quark-mxfp4", "weight_scale"): 254,
}


@pytest.mark.parametrize(("name", "suffix"), [k for k, bits in _BEYOND.items() if bits is not None])
def test_weights_beyond_fp32(name: str, suffix: str, tmp_path: Path, traced: None) -> None:
    """Every scale is a number, every code is one; their product is not. No target may get an infinity."""

    def change(bits: Any) -> None:
        bits[:] = _BEYOND[name, suffix]

    folder = with_tensor(name, f"{_UP}.{suffix}", change)
    for target in TARGETS:
        text = complaint(folder, tmp_path, InputError, target)
        assert _UP in text and "is too large for fp32, so that its scale must be damaged" in text


def test_large_scales_of_small_codes_are_numbers(tmp_path: Path, traced: None) -> None:
    """Only a weight that overflows is refused, not a scale that could have made one."""
    base = SOURCES["llmcompressor-mxfp4a16"]
    tensors = dict(base.tensors)
    packed, scales = tensors[f"{_UP}.weight_packed"][1], tensors[f"{_UP}.weight_scale"][1]
    tensors[f"{_UP}.weight_packed"] = ("U8", np.full_like(packed, 0x21))  # 0.5 and 1
    tensors[f"{_UP}.weight_scale"] = ("U8", np.full_like(scales, 254))
    folder = replace(base, tensors=tensors)
    weights, _ = observe(folder, tmp_path, "vllm")
    assert weights is not None
    assert set(np.unique(weights[_UP])) == {2.0**126, 2.0**127}


@pytest.mark.parametrize("bits", [0x7FC0, 0x7F80, 0xFF80])
@pytest.mark.parametrize("target", TARGETS)
def test_plain_tensors_beside_quantized_ones(target: str, bits: int, tmp_path: Path, traced: None) -> None:
    """A dense copy of NaN is refused as every rounding of it is, in F32 too."""
    base = SOURCES["llmcompressor-mixed-int4-fp8"]
    name = "model.layers.0.self_attn.o_proj.weight"
    assert base.tensors[name][0] == "BF16"

    def change(x: Any) -> None:
        x[-1] = bits

    text = complaint(with_tensor(base.name, name, change), tmp_path, InputError, target)
    assert "is not finite" in text and "column" in text


def _renamed(name: str, old: str, new: str) -> Folder:
    return replace(
        SOURCES[name], tensors={new if n == old else n: t for n, t in SOURCES[name].tensors.items()}
    )


@pytest.mark.parametrize(
    ("new", "message"),
    [
        (
            "model.layers." + "9" * 5000 + ".self_attn.k_scale",
            "unknown tensor|is missing|mean nothing|belong together",
        ),
        ("model.layers.\u0661.self_attn.k_scale", "unknown tensor|is missing|mean nothing|belong together"),
        (
            f"{_UP}." + "y" * 50_000,
            "is missing|does not say|belong together|mean nothing|no place|not packed",
        ),
        (f"{_UP}.\x1b[31m\n", "is missing|does not say|belong together|mean nothing|no place|not packed"),
        ("." * 300_000, "unknown tensor|is missing|mean nothing|belong together"),
        (_UP + "." * 300_000, "is missing|does not say|belong together|mean nothing|no place|not packed"),
    ],
    ids=["digits", "arabic", "long", "escape", "dots", "dots below"],
)
def test_names_of_tensors(new: str, message: str, tmp_path: Path, traced: None) -> None:
    """However long, deep or unprintable: one short line, and no time spent on it."""
    for at, name in enumerate(
        ("gptqmodel-gptq-3-g32", "tao-hqq-4", "tao-bnb-nf4", "tao-torchao-int8", "quark-int8", "fbgemm")
    ):
        main_ = next(n for n in SOURCES[name].tensors if n.startswith(_UP) and "scale" not in n)
        work = tmp_path / str(at)
        work.mkdir()
        _, error = observe(_renamed(name, main_, new), work, "dense")
        assert isinstance(error, InputError | UnsupportedError)
        with pytest.raises(type(error), match=message):
            raise error


def test_thousands_of_tensors_below_one_module(tmp_path: Path, traced: None) -> None:
    extra = {f"{_UP}.mystery{i}": ("U8", np.zeros(1, np.uint8)) for i in range(400)}
    for at, name in enumerate(
        ("tao-bnb-nf4", "tao-torchao-int8", "modelopt-nvfp4a16", "quark-int8", "tao-hqq-4")
    ):
        base = SOURCES[name]
        kept = {n: t for n, t in base.tensors.items() if not n.startswith(_UP)}
        work = tmp_path / str(at)
        work.mkdir()
        text = complaint(replace(base, tensors=kept | extra), work, InputError)
        assert _UP in text, text


# --- descriptions inside of tensors and headers -----------------------------------------------------------


def _state(text: str) -> Folder:
    base = SOURCES["tao-bnb-nf4"]
    name = f"{_UP}.weight.quant_state.bitsandbytes__nf4"
    data = np.frombuffer(text.encode(), np.uint8)
    return replace(base, tensors=dict(base.tensors) | {name: ("U8", data)})


def _description(text: str) -> Folder:
    base = SOURCES["tao-torchao-int8"]
    return replace(base, metadata=dict(base.metadata) | {f"{_UP}.weight": text})


_DEEP = '{"_type": ' + "[" * 2000 + "]" * 2000 + "}"


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        (_state("{" * 4000), "no sound JSON"),
        (_state("[" * 2000 + "]" * 2000), "no sound JSON"),
        (_state('{"blocksize": 1' + "0" * 4090 + "}"), "no sound JSON|are too many for a quant_state"),
        (_state('{"blocksize": 64, "dtype": "bfloat16", "quant_type": "nf4", "shape": [128, 160]}'), "shape is [128, 160], expected [160, 128]"),
        (_state('{"blocksize": 63, "dtype": "bfloat16", "quant_type": "nf4", "shape": [160, 128]}'), "blocksize is 63, expected one of"),
        (_state('{"blocksize": true, "dtype": "bfloat16", "quant_type": "nf4", "shape": [160, 128]}'), "blocksize is True"),
        (_state(""), "no sound JSON"),
        (_description(_DEEP), "no sound JSON|expected an object with a _type"),
        (_description('{"_type": "Int8Tensor' + "y" * 7000 + '"}'), "layout belongs to a kernel"),
        (_description('{"_type": "os.system", "_data": {}}'), "is of the type 'os.system', whose layout belongs to a kernel"),
        (_description('{"_type": "Int8Tensor", "_data": {"block_size": [1, 128]}}'), "names the tensors None"),
        (_description('{"_type": "Tensor\\u001b"}'), "is of the type 'Tensor\\x1b', whose layout"),
        (_description('{"_type": "Tensor"}'), "is of a Tensor, but"),
        (_description("{}"), "expected an object with a _type"),
    ],
)  # fmt: skip
def test_damaged_descriptions(folder: Folder, message: str, tmp_path: Path, traced: None) -> None:
    _, error = observe(folder, tmp_path, "dense")
    assert error is not None and _UP in str(error)
    assert any(m in str(error) for m in message.split("|")), error


# --- containers --------------------------------------------------------------------------------------------


def _shards(base: Folder, folder: Path, weight_map: Mapping[str, Any] | None = None) -> Path:
    """The folder in two shards."""
    base.write(folder)
    names = [*base.tensors]
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, held in halves.items():
        (folder / file).write_bytes(replace(base, tensors={n: base.tensors[n] for n in held}).content())
    (folder / "model.safetensors").unlink()
    listed = {n: file for file, held in halves.items() for n in held}
    index = {"metadata": {}, "weight_map": listed if weight_map is None else listed | dict(weight_map)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"x": "../a.safetensors"}, "names a file outside the folder"),
        ({"x": "/etc/passwd"}, "names a file outside the folder"),
        ({"x": "sub/a.safetensors"}, "names a file outside the folder"),
        ({"x": ".."}, "names a file outside the folder"),
        ({"x": "c.safetensors"}, "shard 'c.safetensors' is missing"),
        ({"x": "a.safetensors"}, "the index lists 'x' but no shard holds it"),
        ({"x": "config.json"}, "config.json: "),
        ({"x": 3}, "names 3 instead of a file"),
        ({"x": "a\0.safetensors"}, "is missing"),
    ],
)
def test_indexes_that_lie(weight_map: Mapping[str, Any], message: str, tmp_path: Path) -> None:
    folder = _shards(SOURCES["llmcompressor-nvfp4"], tmp_path / "m", weight_map)
    with pytest.raises(InputError) as found:
        lconvert.read(folder)
    assert message in str(found.value)


def test_tensors_of_one_module_may_be_in_two_shards_and_in_one_only(tmp_path: Path) -> None:
    base = SOURCES["llmcompressor-nvfp4"]
    folder = _shards(base, tmp_path / "m")
    for module, w in quantized(lconvert.read(folder)).items():
        assert np.array_equal(w, decoded(base)[module])
    (folder / "b.safetensors").write_bytes(base.content())
    with pytest.raises(InputError, match=r"b\.safetensors: tensor '.*' is also in a\.safetensors"):
        lconvert.read(folder)


def test_links_to_what_is_no_file(tmp_path: Path) -> None:
    folder = SOURCES["gptqmodel-gptq-4-g32"].write(tmp_path / "m")
    for name in ("quantize_config.json", "model.safetensors"):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to("/dev/zero")
        with pytest.raises(InputError, match=rf"{name}: this is not a regular file"):
            lconvert.read(folder)


def test_a_header_that_names_a_scale_twice_or_too_far(tmp_path: Path) -> None:
    base = SOURCES["fbgemm"]
    raw = base.content()
    n = int.from_bytes(raw[:8], "little")
    name = f"{_UP}.weight_scale".encode()
    head = raw[8 : 8 + n]
    twice = head.replace(f"{_UP}.weight".encode() + b'"', name + b'"', 1)
    far = head.replace(b'"data_offsets":[0,', b'"data_offsets":[1,', 1)
    for changed, message in (
        (twice, "is listed twice in the header"),
        (far, "data_offsets span|unaccounted bytes"),
    ):
        content = len(changed).to_bytes(8, "little") + changed + raw[8 + n :]
        folder = replace(base, raw=content).write(tmp_path / str(len(message)))
        with pytest.raises(InputError, match=message):
            lconvert.read(folder)


def test_the_command_line_says_it_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = with_config("transformers-bitnet", _set("linear_class", [["\x1b[31m\n"]])).write(tmp_path / "m")
    monkeypatch.setattr("sys.argv", ["lconvert", "hf-to-gguf", str(folder), "-o", str(tmp_path / "m.gguf")])
    with pytest.raises(SystemExit) as done:
        main()
    err = capsys.readouterr().err
    assert done.value.code == 2 and err.count("\n") == 1 and "linear_class" in err and "\x1b" not in err
    assert not (tmp_path / "m.gguf").exists()


def test_headers_are_what_they_were() -> None:
    """The harness writes the very tensors that it read."""
    for name in ("llmcompressor-nvfp4", "tao-hqq-4"):
        path = hostile.PEERS / name / "model.safetensors"
        assert SOURCES[name].tensors.keys() == safetensors.read_header(path).tensors.keys()
