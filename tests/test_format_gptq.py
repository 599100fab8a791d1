"""GPTQ: peers' bytes are read as the numbers they mean and written back unchanged; what contradicts itself is refused."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lconvert
from lconvert.errors import InputError, LconvertError, UnsupportedError
from lconvert.formats import gptq, module_rules
from lconvert.formats.int_groups import Spec
from lconvert.formats.scheme import Checkpoint, Held
from lconvert.ir import E4M3, ActSpec, KVSpec, QTensor, Transform, dense, int_grid
from lconvert.kernels.qtensor import dequantize
from tests import int_checkpoints as made

MODULE = "model.layers.0.mlp.up_proj"
BASE = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}


def parse(**changes: Any) -> gptq.Gptq:
    return gptq.parse(Checkpoint("config.json", dict(BASE) | changes, Path("/nowhere")))


def random_module(
    bits: int = 4, group: int = 32, sym: bool = True, shape: tuple[int, int] = (32, 64), lowest: int = 1
) -> Any:
    return made.draw(np.random.default_rng(bits), shape, bits, group, sym, lowest)


def read(
    arrays: Mapping[str, Any], spec: Spec, shape: tuple[int, int] = (32, 64), version: int = 1
) -> QTensor:
    weight = gptq.raised(MODULE, made.parts(arrays), shape, spec, version)
    assert weight.used == arrays.keys()
    assert isinstance(weight.data, QTensor)
    return weight.data


# --- the peers' bytes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("peer", "case"), made.layout_cases("gptq"))
def test_layouts_of_the_peers_packers(peer: str, case: str) -> None:
    """GPTQModel's and AutoRound's layers packed known codes: the same come out, and the same bytes go back."""
    arrays = made.layout(peer, case)
    codes, zeros, weight = arrays.pop("codes"), arrays.pop("zeros"), arrays.pop("weight", None)
    layout, bits, kind, group = case.split("-", 3)
    spec = Spec(int(bits), int(group), kind == "sym")
    version = gptq.VERSIONS[layout]
    q = read(arrays, spec, codes.shape, version)
    middle = 1 << (spec.bits - 1) if spec.sym else 0
    assert (q.codes.load().astype(int) + middle == codes).all()
    assert (q.zero is None) == spec.sym
    if q.zero is not None:
        assert (q.zero.load() == zeros).all()
    if weight is not None:
        assert np.array_equal(dequantize(q), weight)
    written = gptq.Writer(version).store(Held(q))
    for suffix, array in arrays.items():
        assert made.stored_bytes(written[suffix]) == made.array_bytes(array)


@pytest.mark.parametrize("folder", made.peer_folders("gptq"), ids=lambda p: p.name)
def test_peers_checkpoints_mean_what_the_peer_dequantizes(folder: Path) -> None:
    """Planar layouts are refused."""
    if '"gptq_p"' in (folder / "config.json").read_text():
        with pytest.raises(UnsupportedError, match=r"its planar words split every code into bit planes"):
            lconvert.read(folder)
        return
    made.compare_with_oracle(lconvert.read(folder), folder)


@pytest.mark.parametrize("name", ["gqm_gptq", "gqm_gptq_desc", "gqm_gptqv2fmt"])
def test_trained_model_quantized_by_gptqmodel(shared: Path, name: str) -> None:
    """Values near the original's, equal to a definition bit by bit, and every tensor comes back byte for byte."""
    writer = gptq.Writer(2 if "v2" in name else 1)
    compared = 0
    for module, q, tensors in made.trained(shared, name):
        stored = {suffix: tensor.load() for suffix, tensor in tensors.items()}
        fields = stored["qweight"].T.copy().view(np.uint8)
        nibbles = np.stack((fields & 15, fields >> 4), axis=-1).reshape(q.shape)
        packed = stored["qzeros"].view(np.uint8)
        zeros = np.stack((packed & 15, packed >> 4), axis=-1).reshape(len(packed), -1).T + (
            writer.version == 1
        )
        w = made.meaning(nibbles, zeros, stored["scales"].T, stored["g_idx"])
        assert np.array_equal(dequantize(q), w)
        assert writer.problem(Held(q)) is None
        for suffix, tensor in writer.store(Held(q)).items():
            assert made.stored_bytes(tensor) == made.array_bytes(stored[suffix]), (module, suffix)
            compared += 1
        assert (q.g_idx is not None) == (name == "gqm_gptq_desc")
    assert compared == 56


# --- round trips -----------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    bits=st.sampled_from(gptq.BITS),
    sym=st.booleans(),
    version=st.sampled_from((1, 2)),
    group=st.sampled_from((-1, 16, 32)),
    rows=st.sampled_from((32, 64)),
    order=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
    data=st.data(),
)
def test_round_trip(
    bits: int, sym: bool, version: int, group: int, rows: int, order: bool, seed: int, data: st.DataObject
) -> None:
    """Writer against an independent packer, reader against what was packed, whole and in slabs of rows."""
    rng = np.random.default_rng(seed)
    codes, zeros, scales = made.draw(rng, (rows, 64), bits, group, sym, lowest=2 - version)
    index = rng.permutation(np.arange(64) // (64 // zeros.shape[1])) if order and group != -1 else None
    if index is not None and (index == np.sort(index)).all():
        index = None
    q = made.quantized(codes, zeros, scales, bits, group, sym, index)
    writer = gptq.Writer(version)
    assert writer.problem(Held(q)) is None
    expected = made.gptq(codes, zeros, scales, bits, version, index)
    for suffix, tensor in writer.store(Held(q)).items():
        assert made.stored_bytes(tensor) == made.array_bytes(expected[suffix])
    back = read(expected, Spec(bits, group, sym, index is not None), (rows, 64), version)
    assert (back.grid, back.block, back.shape) == (q.grid, q.block, q.shape)
    assert (back.g_idx is None) == (index is None)
    assert np.array_equal(dequantize(back), made.meaning(codes, zeros, scales, index))
    start = data.draw(st.integers(0, rows))
    stop = data.draw(st.integers(start, rows))
    assert np.array_equal(back.codes.read(start, stop), q.codes.load()[start:stop])
    assert np.array_equal(back.scale.read(start, stop), scales[start:stop])  # type: ignore[union-attr]
    if back.zero is not None:
        assert np.array_equal(back.zero.read(start, stop), zeros[start:stop])


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_scales_keep_their_type(dtype: str) -> None:
    codes, zeros, _ = random_module()
    bits = np.arange(64, dtype=np.uint16).reshape(32, 2) + 0x3F00
    scales = dense(bits, "BF16") if dtype == "BF16" else dense(bits.view(np.float16))
    q = replace(made.quantized(codes, zeros, bits.view(np.float16), 4, 32, True), scale=scales)
    stored = gptq.Writer().store(Held(q))["scales"]
    assert stored.dtype == dtype
    assert stored.read(0, 2).tobytes() == bits.T.tobytes()


def test_a_slab_of_rows_reads_its_columns_only() -> None:
    codes, zeros, scales = random_module(4, 32, False, (256, 64))
    seen: list[tuple[int, int]] = []
    arrays = made.parts(made.gptq(codes, zeros, scales, 4), seen)
    q = gptq.raised(MODULE, arrays, (256, 64), Spec(4, 32, False), 1).data
    assert isinstance(q, QTensor) and q.zero is not None and seen == []
    assert np.array_equal(q.codes.read(40, 72), codes[40:72])
    assert seen == [(40, 72)]
    seen.clear()
    assert np.array_equal(q.zero.read(40, 72), zeros[40:72])
    assert seen == [(4, 12)]  # words of 8 zero points, 32 of them at a time


# --- folders and configs ---------------------------------------------------------------------------------


def encode(bits: int = 4, group: int = 32, version: int = 1, sym: bool = True) -> made.Encode:
    def module(name: str, shape: tuple[int, int], rng: np.random.Generator) -> dict[str, Any] | None:
        if name == "lm_head":
            return None
        codes, zeros, scales = made.draw(rng, shape, bits, group, sym)
        return made.gptq(codes, zeros, scales, bits, version)

    return module


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize(("version", "name"), [(1, None), (1, "gptq"), (2, "gptq_v2")])
def test_a_folder_is_read(tmp_path: Path, version: int, name: str | None, sym: bool) -> None:
    config = BASE | {"sym": sym, "damp_percent": 0.1} | ({"checkpoint_format": name} if name else {})
    seen = {}

    def module(module: str, shape: tuple[int, int], rng: np.random.Generator) -> Any:
        if module == "lm_head":
            return None
        found = made.draw(rng, shape, 4, 32, sym)
        seen[module] = made.meaning(*found)
        return made.gptq(*found, 4, version)

    model = lconvert.read(made.write_folder(tmp_path / "m", module, config, side=config))
    got = {e.provenance[0].split()[0]: e for e in model.entries.values() if isinstance(e.data, QTensor)}
    assert got.keys() == seen.keys() and len(got) == 7
    for key, w in seen.items():
        assert np.array_equal(made.values_of(got[key].data), w)
    assert "inert keys of quantization_config: damp_percent" in model.report
    kind = f"{'gptq' if version == 1 else 'gptq_v2'} 4 bit, group 32{'' if sym else ', asymmetric'}"
    assert f"quantized: {kind}" in model.report


def test_quantize_config_alone_is_enough(tmp_path: Path) -> None:
    folder = made.write_folder(
        tmp_path / "m", encode(), {}, side={k: v for k, v in BASE.items() if k != "quant_method"}
    )
    assert isinstance(lconvert.read(folder).entries["layers.0.mlp.up"].data, QTensor)


def test_side_file_must_agree(tmp_path: Path) -> None:
    folder = made.write_folder(tmp_path / "m", encode(), BASE, side=BASE | {"bits": 8})
    with pytest.raises(
        InputError, match=r"bits is 4 but quantize_config.json says 8; one of the two belongs to another"
    ):
        lconvert.read(folder)


def test_dynamic_rules_change_single_modules(tmp_path: Path) -> None:
    rules = {r"+:.*\.mlp\..*": {"bits": 8, "group_size": -1}, r"-:.*\.(?:q|k)_proj": {}}

    def module(name: str, shape: tuple[int, int], rng: np.random.Generator) -> Any:
        if name == "lm_head" or name.endswith(("q_proj", "k_proj")):
            return None
        bits, group = (8, -1) if ".mlp." in name else (4, 32)
        return made.gptq(*made.draw(rng, shape, bits, group, True), bits)

    entries = lconvert.read(made.write_folder(tmp_path / "m", module, BASE | {"dynamic": rules})).entries
    up, v, q = (entries[f"layers.0.{name}"].data for name in ("mlp.up", "attn.v", "attn.q"))
    assert isinstance(up, QTensor) and (up.grid, up.block) == (int_grid(8, True), (1, -1))
    assert isinstance(v, QTensor) and (v.grid, v.block) == (int_grid(4, True), (1, 32))
    assert not isinstance(q, QTensor)


def test_rules_that_exclude_come_first() -> None:
    scheme = parse(dynamic={"+:.*up": {"bits": 8}, "-:.*up_proj": {}, ".*down": {"sym": False}})
    assert scheme.spec(MODULE) is None
    assert scheme.spec("model.layers.0.mlp.up") == Spec(8, 32, True)
    assert scheme.spec("model.layers.0.mlp.down_proj") == Spec(4, 32, False)
    assert scheme.spec("model.layers.0.mlp.gate_proj") == Spec(4, 32, True)


def test_modules_in_block_and_head() -> None:
    scheme = parse(modules_in_block_to_quantize=[["mlp.up_proj"], ["self_attn.q_proj"]], lm_head=True)
    assert scheme.spec(MODULE) is not None
    assert scheme.spec("model.layers.0.mlp.down_proj") is None
    assert parse(lm_head=True).spec("lm_head") == Spec(4, 32, True)
    assert parse().spec("lm_head") is None


CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"bits": 5}, r"5 bits: GPTQ's layout is known for 2, 3, 4, 8 bits"),
    ({"bits": True}, r"bits of quantization_config is True, expected a whole number"),
    ({"bits": "4"}, r"bits of quantization_config is '4', expected a whole number"),
    ({"group_size": 0}, r"group_size 0 must be positive, or -1"),
    ({"group_size": None}, r"group_size of quantization_config is None"),
    ({"sym": "yes"}, r"sym of quantization_config is 'yes', expected true or false"),
    ({"desc_act": 1}, r"desc_act of quantization_config is 1"),
    ({"checkpoint_format": "gptq_p"}, r"gptq_p cannot be read: its planar words .* save it with format='gptq_v2'"),
    ({"checkpoint_format": "marlin"}, r"marlin cannot be read: its words are shuffled"),
    ({"is_marlin_format": True}, r"is_marlin_format: its words are shuffled"),
    ({"checkpoint_format": "zip"}, r"unknown checkpoint_format 'zip' of gptq; known are gptq, gptq_v2"),
    ({"checkpoint_format": 3}, r"unknown checkpoint_format 3"),
    ({"checkpoint_format": "gptq", "format": "gptq_v2"}, r"checkpoint_format and format differ"),
    ({"method": "qqq"}, r"method 'qqq' under quant_method gptq is unknown"),
    ({"pack_dtype": "int16"}, r"pack_dtype 'int16': only int32 words can be read"),
    ({"adapter": {"rank": 8}}, r"adapter of quantization_config adds a low-rank correction"),
    ({"activation": "w4afp8"}, r"activation of quantization_config quantizes activations"),
    ({"dynamic": [1]}, r"dynamic is \[1\], expected an object of rules"),
    ({"dynamic": {"+:x": 3}}, r"dynamic rule '\+:x' is 3, expected an object of keys"),
    ({"dynamic": {"+:(": {}}}, r"no valid regular expression"),
    ({"dynamic": {"+:(a+)+$": {}}}, r"may take too long to match .* name the modules"),
    ({"modules_in_block_to_quantize": "mlp"}, r"modules_in_block_to_quantize is 'mlp', expected lists of names"),
    ({"modules_in_block_to_quantize": [[3]]}, r"modules_in_block_to_quantize is \[\[3\]\]"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), CONFIGS, ids=lambda x: str(x)[:40])
def test_configs_that_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(LconvertError, match=message):
        parse(**changes)


@settings(max_examples=150, deadline=None)
@given(
    made.configs(
        (
            "bits",
            "group_size",
            "sym",
            "desc_act",
            "dynamic",
            "checkpoint_format",
            "format",
            "method",
            "pack_dtype",
            "lm_head",
            "modules_in_block_to_quantize",
            "adapter",
            "is_marlin_format",
        )
    )
)
def test_any_config_is_read_or_refused(changes: dict[str, Any]) -> None:
    """No value of any key leads to another exception than the errors of lconvert."""
    made.read_or_refused(lambda: parse(**changes), made.gptq(*random_module(), 4), (32, 64))


def test_missing_keys_are_named() -> None:
    with pytest.raises(InputError, match=r"lacks bits; the file is incomplete"):
        gptq.parse(Checkpoint("config.json", {"quant_method": "gptq"}, Path("/nowhere")))


def test_rules_may_not_change_the_layout() -> None:
    scheme = parse(dynamic={"+:.*": {"format": "gptq_v2"}})
    with pytest.raises(UnsupportedError, match=r"format 'gptq_v2' for some modules only"):
        scheme.spec(MODULE)


# --- tensors that contradict the config ------------------------------------------------------------------


def damage(change: Callable[[dict[str, Any]], Any], spec: Spec, version: int = 1, bits: int = 4) -> QTensor:
    codes, zeros, scales = random_module(bits, 32, spec.sym)
    arrays = made.gptq(codes, zeros, scales, bits, version)
    change(arrays)
    return read(arrays, spec, (32, 64), version)


SYM, ASYM = Spec(4, 32, True), Spec(4, 32, False)
TENSORS: list[tuple[Callable[[dict[str, Any]], Any], Spec, str]] = [
    (lambda a: None, Spec(8, 32, True), r"qweight: has shape \(8, 32\), but the configuration implies \(16, 32\)"),
    (lambda a: None, Spec(4, 16, True), r"qzeros: has shape \(2, 4\), but the configuration implies \(4, 4\)"),
    (lambda a: None, Spec(4, 48, True), r"64 input features do not divide into groups of 48"),
    (lambda a: a.pop("scales"), SYM, r"up_proj: the tensor scales is missing; the checkpoint is incomplete"),
    (lambda a: a.pop("qweight"), SYM, r"the tensor qweight is missing"),
    (lambda a: a.update(qweight=a["qweight"].astype(np.int64)), SYM, r"qweight: is stored as I64, expected I32"),
    (lambda a: a.update(scales=a["scales"].astype(np.float64)), SYM, r"scales: is stored as F64, expected F16 or BF16 or F32"),
    (lambda a: a["scales"].__setitem__((1, 3), np.nan), SYM, r"scales: the scale nan in row 3 is damaged"),
    (lambda a: a["scales"].__setitem__((0, 31), -0.0), ASYM, r"scales: the scale -0.0 in row 31 is damaged"),
    (lambda a: a["g_idx"].__setitem__(5, 2), SYM, r"g_idx: input 5 belongs to group 2, but there are 2"),
    (lambda a: a["g_idx"].__setitem__(9, -1), SYM, r"g_idx: input 9 belongs to group -1"),
    (lambda a: a.update(g_idx=a["g_idx"][:60]), SYM, r"g_idx: has shape \(60,\), but the configuration implies \(64,\)"),
    (lambda a: a.update(g_idx=a["g_idx"][::-1].copy()), SYM, r"g_idx: orders its columns although desc_act is false"),
    (lambda a: a.pop("g_idx"), Spec(4, 32, True, True), r"desc_act is true but g_idx is missing"),
    (
        lambda a: a["qzeros"].__setitem__((1, 2), 0x77773777),
        SYM,
        r"qzeros: row 19, group 1 has zero point 4, symmetric ones have 8; set sym to false",
    ),
    (
        lambda a: a["qzeros"].fill(-0x77777778),
        SYM,
        r"zero point 9, symmetric ones have 8; they are those of checkpoint_format gptq_v2: correct",
    ),
    (
        lambda a: a["qzeros"].__setitem__((0, 1), 0x0F000000),
        ASYM,
        r"row 14, group 0 is stored as 15: v1 .* a 0 that wrapped, .* as 16 or carry .* Save the model again .* gptq_v2",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("change", "spec", "message"), TENSORS, ids=[t[2][:40] for t in TENSORS])
def test_tensors_that_contradict_the_config(change: Any, spec: Spec, message: str) -> None:
    with pytest.raises(InputError, match=message):
        dequantize(damage(change, spec))


@pytest.mark.parametrize("bits", gptq.BITS)
def test_wrapped_zero_points_are_refused_in_v1_and_plain_in_v2(bits: int) -> None:
    codes, zeros, scales = random_module(bits, 32, False)
    zeros[7, 1] = 0
    arrays = made.gptq(codes, zeros, scales, bits, version=1)
    with pytest.raises(
        InputError, match=rf"row 7, group 1 is stored as {(1 << bits) - 1}: .* a 0 that wrapped"
    ):
        dequantize(read(arrays, Spec(bits, 32, False)))
    fine = read(made.gptq(codes, zeros, scales, bits, version=2), Spec(bits, 32, False), version=2)
    assert np.array_equal(dequantize(fine), made.meaning(codes, zeros, scales))


def test_a_quantized_module_that_the_config_excludes(tmp_path: Path) -> None:
    folder = made.write_folder(tmp_path / "m", encode(), BASE | {"dynamic": {"-:.*up_proj": {}}})
    with pytest.raises(
        InputError, match=r"mlp.up_proj: is stored quantized, but quantization_config excludes it"
    ):
        lconvert.read(folder)


def test_rows_that_do_not_fill_words() -> None:
    codes, zeros, scales = random_module(3, 32, True)
    arrays = made.gptq(codes, zeros, scales, 3)
    with pytest.raises(InputError, match=r"30 x 64 codes of 3 bits do not fill whole 32-bit words"):
        gptq.raised(MODULE, made.parts(arrays), (30, 64), Spec(3, 32, True), 1)


def test_a_stray_tensor_is_an_error(tmp_path: Path) -> None:
    def module(name: str, shape: tuple[int, int], rng: np.random.Generator) -> Any:
        found = encode()(name, shape, rng)
        return found and found | {"perm": np.zeros(4, np.int32)}

    with pytest.raises(UnsupportedError, match=r"perm: gptq 4 bit, group 32 does not say what it is for"):
        lconvert.read(made.write_folder(tmp_path / "m", module, BASE))


# --- writing ---------------------------------------------------------------------------------------------


def good(**changes: Any) -> QTensor:
    codes, zeros, scales = random_module()
    return replace(made.quantized(codes, zeros, scales, 4, 32, True), **changes)


def asymmetric(zero: int) -> QTensor:
    codes, zeros, scales = random_module(sym=False)
    zeros[3, 1] = zero
    return made.quantized(codes, zeros, scales, 4, 32, False)


INT8 = ActSpec(int_grid(8, True), "token", True)
PROBLEMS: list[tuple[Held, str]] = [
    (Held(good(), INT8), "GPTQ quantizes weights only"),
    (Held(good(), None, Transform("scale", "input", dense(np.ones(64, np.float32)), False)), "no place for an unfolded scale"),
    (Held(good(grid=int_grid(5, True))), "GPTQ holds integers of 2, 3, 4, 8 bits, not a 5-bit int grid"),
    (Held(good(grid=E4M3)), "not a 8-bit float grid"),
    (Held(good(block=(32, 32))), "groups along the inputs of each row, not blocks of (32, 32)"),
    (Held(good(block=(1, 48))), "64 inputs do not divide into groups of 48"),
    (Held(good(scale=dense(np.ones((32, 2), np.float32)))), "scales in F16 or BF16, these are F32"),
    (Held(good(scale=dense(np.ones((32, 1), np.float16)))), "not one per row and group, (32, 2)"),
    (Held(good(offset=dense(np.ones((32, 2), np.float16)))), "codes, scales and zero points only"),
    (Held(good(zero=dense(np.ones((32, 2), np.uint8)))), "symmetric codes have no zero points"),
    (Held(good(grid=int_grid(4, False))), "asymmetric codes need zero points"),
    (Held(replace(asymmetric(3), zero=dense(np.ones((32, 2), np.float16)))), "zero points as whole numbers"),
    (Held(asymmetric(16)), "zero points of 0 to 15, the largest here is 16"),
    (Held(asymmetric(0)), "GPTQ v1 cannot hold a zero point of 0 (it stores zero - 1); gptq_v2 can"),
]  # fmt: skip


@pytest.mark.parametrize(("held", "message"), PROBLEMS, ids=[p[1][:40] for p in PROBLEMS])
def test_what_gptq_cannot_hold(held: Held, message: str) -> None:
    assert message in (gptq.Writer().problem(held) or "")


def test_what_gptq_holds() -> None:
    assert gptq.Writer().problem(Held(None)) is None
    assert gptq.Writer().problem(Held(good())) is None
    assert gptq.Writer(2).problem(Held(asymmetric(0))) is None
    odd = made.quantized(*made.draw(np.random.default_rng(0), (12, 64), 4, 32, True), 4, 32, True)
    assert gptq.Writer().problem(Held(odd)) == "12 x 64 codes of 4 bits do not fill whole 32-bit words"


def spread() -> dict[str, Held]:
    """Three structures, two plain modules and a plain head."""

    def q(bits: int, group: int, sym: bool) -> Held:
        return Held(made.quantized(*random_module(bits, group, sym), bits, group, sym))

    layer = {f"self_attn.{x}_proj": q(8, 32, True) for x in "qkv"}
    layer |= {"self_attn.o_proj": q(4, 32, True), "mlp.down_proj": q(4, -1, False)}
    layer |= {"mlp.gate_proj": Held(None), "mlp.up_proj": Held(None)}
    modules = {f"model.layers.{i}.{name}": held for i in (0, 1) for name, held in layer.items()}
    return (
        modules
        | {f"model.layers.{i}.self_attn.o_proj": q(4, 32, True) for i in range(2, 12)}
        | {"lm_head": Held(None)}
    )


def test_the_config_written_says_what_each_module_is() -> None:
    modules = spread()
    writer = gptq.Writer(2)
    config = writer.config(modules, None)
    assert {k: v for k, v in config.items() if k != "dynamic"} == {
        "quant_method": "gptq", "checkpoint_format": "gptq_v2", "bits": 4, "group_size": 32, "sym": True, "desc_act": False,
        "lm_head": False, "pack_dtype": "int32",
    }  # fmt: skip
    scheme = gptq.parse(Checkpoint("config.json", json.loads(json.dumps(config)), Path("/nowhere")))
    for name, held in modules.items():
        q = held.weight
        assert scheme.spec(name) == (None if q is None else Spec(q.grid.bits, q.block[1], q.zero is None)), (
            name
        )
    # vLLM asks by the names of its fused modules (gptq_utils.py get_dynamic_override)
    assert scheme.spec("model.layers.1.self_attn.qkv_proj") == Spec(8, 32, True)
    assert scheme.spec("model.layers.1.mlp.gate_up_proj") is None
    assert scheme.spec("model.layers.11.self_attn.o_proj") == Spec(4, 32, True)
    assert writer.side_files(config) == {"quantize_config.json": config}


def test_config_of_act_order_and_of_a_quantized_head() -> None:
    codes, zeros, scales = random_module()
    ordered = made.quantized(codes, zeros, scales, 4, 32, True, np.arange(64) % 2)
    config = gptq.Writer().config({MODULE: Held(ordered), "lm_head": Held(good())}, None)
    assert config["desc_act"] is True and config["lm_head"] is True and "dynamic" not in config
    assert config["checkpoint_format"] == "gptq"


def test_nothing_quantized_or_a_cache_is_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"no linear module is quantized"):
        gptq.Writer().config({MODULE: Held(None)}, None)
    act = ActSpec(E4M3, "tensor", False)
    with pytest.raises(
        UnsupportedError, match=r"GPTQ has no words for a quantized KV cache; write compressed-tensors"
    ):
        gptq.Writer().config({MODULE: Held(good())}, KVSpec(act, act))


# --- expressions out of files ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        r".*\.(?:1[0-5])\..*",
        r"^model\.layers\.(0|1|2|3|10|11)\.(self_attn|mlp)\.(q|k|v)_proj$",
        r".*layers\.\d+\.mlp\.down_proj",
        "|".join(f"model\\.layers\\.{i}\\.mlp\\.up_proj" for i in range(1000)),
    ],
    ids=["peers", "alternatives", "digits", "names"],
)
def test_plain_expressions_are_taken(text: str) -> None:
    assert module_rules.compiled([(text, "here")])[0].pattern == text


@pytest.mark.parametrize(
    "text", ["(a+)+$", "(?:a|a)*b", "(a|b|ab){2,}c", ".*" * 8 + "x", "(a|a)" * 30, "(?:x?){50}", "[a"]
)
def test_expressions_that_never_end_are_refused(text: str) -> None:
    with pytest.raises(UnsupportedError, match=r"here: this expression may take too long"):
        module_rules.compiled([(text, "here")])


@settings(max_examples=200, deadline=None)
@given(st.text("ab.*+?|()[]{}\\^2,:", max_size=24), st.text("ab", max_size=24))
def test_no_accepted_expression_takes_long(text: str, name: str) -> None:
    """Either refused, or matched within a second against the worst kind of name: one that fails at its end."""
    try:
        (found,) = module_rules.compiled([(text, "here")])
    except LconvertError:
        return
    start = time.perf_counter()
    found.match(name + "c")
    assert time.perf_counter() - start < 1


def test_long_expressions_are_judged_quickly() -> None:
    start = time.perf_counter()
    with pytest.raises(UnsupportedError, match=r"may take too long"):
        module_rules.compiled([("[" * 200_000, "here")])
    assert time.perf_counter() - start < 5
