"""AWQ: peers' bytes are read as the numbers they mean and written back unchanged; what contradicts itself is refused."""

from __future__ import annotations

import json
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
from lconvert.formats import awq, gptq
from lconvert.formats.int_groups import Spec
from lconvert.formats.scheme import Checkpoint, Held
from lconvert.ir import E4M3, ActSpec, KVSpec, QTensor, dense, int_grid
from lconvert.kernels.qtensor import dequantize
from tests import int_checkpoints as made

MODULE = "model.layers.0.mlp.up_proj"
BASE = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}


def parse(**changes: Any) -> awq.Awq:
    config = {k: v for k, v in (BASE | changes).items() if v is not ...}
    return awq.parse(Checkpoint("config.json", config, Path("/nowhere")))


def random_module(group: int = 32, sym: bool = False, shape: tuple[int, int] = (32, 64)) -> Any:
    return made.draw(np.random.default_rng(3), shape, 4, group, sym, lowest=0)


def read(
    arrays: Mapping[str, Any], spec: Spec, shape: tuple[int, int] = (32, 64), version: str = "gemm"
) -> QTensor:
    weight = awq.raised(MODULE, made.parts(arrays), shape, spec, version)
    assert weight.used == arrays.keys()
    assert isinstance(weight.data, QTensor)
    return weight.data


# --- the peers' bytes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("peer", "case"), made.layout_cases("gem"))
def test_layouts_of_the_peers_packers(peer: str, case: str) -> None:
    """GPTQModel's and AutoRound's layers packed known codes: the same come out, and the same bytes go back."""
    arrays = made.layout(peer, case)
    codes, zeros, weight = arrays.pop("codes"), arrays.pop("zeros"), arrays.pop("weight", None)
    version, _, kind, group = case.split("-")
    spec = Spec(4, int(group), kind == "sym")
    q = read(arrays, spec, codes.shape, version)
    assert (q.codes.load().astype(int) + (8 if spec.sym else 0) == codes).all()
    assert (q.zero is None) == spec.sym
    if q.zero is not None:
        assert (q.zero.load() == zeros).all()
    if weight is not None:
        assert np.array_equal(dequantize(q), weight)
    if version == "gemm":
        written = awq.Writer().store(Held(q))
        for suffix, array in arrays.items():
            assert made.stored_bytes(written[suffix]) == made.array_bytes(array)


@pytest.mark.parametrize("folder", made.peer_folders("awq"), ids=lambda p: p.name)
def test_peers_checkpoints_mean_what_the_peer_dequantizes(folder: Path) -> None:
    """gemv_fast is refused; the peer has no dequantization of gemv, whose layout is proven above."""
    version = json.loads((folder / "config.json").read_text())["quantization_config"].get("version")
    if version == "gemv_fast":
        with pytest.raises(UnsupportedError, match=r"its words are interleaved for one kernel"):
            lconvert.read(folder)
        return
    model = lconvert.read(folder)
    if version == "gemm":
        made.compare_with_oracle(model, folder)
    assert any(isinstance(entry.data, QTensor) for entry in model.entries.values())


def test_trained_model_quantized_by_gptqmodel(shared: Path) -> None:
    """Values near the original's, equal to a definition bit by bit, and every tensor comes back byte for byte."""
    compared = 0
    for _, q, stored in made.trained(shared, "gqm_awq"):
        turned = [_outputs(stored[name].load()) for name in ("qweight", "qzeros")]
        scales = (stored["scales"].load().astype(np.uint32) << 16).view(np.float32).T
        assert np.array_equal(dequantize(q), made.meaning(*turned, scales))
        for suffix, tensor in awq.Writer().store(Held(q)).items():
            expected = (stored[suffix].dtype, stored[suffix].shape, stored[suffix].load().tobytes())
            assert made.stored_bytes(tensor) == expected
            compared += 1
    assert compared == 42


def _outputs(words: Any) -> Any:
    """(N, rows) nibbles of words (rows, N / 8) in AWQ's order, one output at a time."""
    return np.stack(
        [(words[:, n // 8] >> (4 * made.AWQ_NIBBLE[n % 8])) & 15 for n in range(words.shape[1] * 8)]
    )


# --- round trips -----------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    sym=st.booleans(),
    group=st.sampled_from((-1, 8, 32)),
    rows=st.sampled_from((8, 24, 64)),
    seed=st.integers(0, 2**32 - 1),
    data=st.data(),
)
def test_round_trip(sym: bool, group: int, rows: int, seed: int, data: st.DataObject) -> None:
    """Writer against an independent packer, reader against what was packed, whole and in slabs of rows."""
    codes, zeros, scales = made.draw(np.random.default_rng(seed), (rows, 64), 4, group, sym, lowest=0)
    q = made.quantized(codes, zeros, scales, 4, group, sym)
    assert awq.Writer().problem(Held(q)) is None
    expected = made.awq(codes, zeros, scales)
    for suffix, tensor in awq.Writer().store(Held(q)).items():
        assert made.stored_bytes(tensor) == made.array_bytes(expected[suffix])
    back = read(expected, Spec(4, group, sym), (rows, 64))
    assert (back.grid, back.block, back.shape) == (q.grid, q.block, q.shape)
    assert np.array_equal(dequantize(back), made.meaning(codes, zeros, scales))
    start = data.draw(st.integers(0, rows))
    stop = data.draw(st.integers(start, rows))
    assert np.array_equal(back.codes.read(start, stop), q.codes.load()[start:stop])
    assert np.array_equal(back.scale.read(start, stop), scales[start:stop])  # type: ignore[union-attr]
    if back.zero is not None:
        assert np.array_equal(back.zero.read(start, stop), zeros[start:stop])


@pytest.mark.parametrize(
    ("cols", "group", "words"), [(320, 32, 4), (192, 64, 2), (256, 128, 1), (256, -1, 1)]
)
def test_gemv_pads_its_zero_points(cols: int, group: int, words: int) -> None:
    """AutoAWQ's gemv: rows of nibbles, zero points and scales padded to whole words and their multiples."""
    codes, zeros, scales = random_module(group, False, (16, cols))
    padding = ((0, 0), (0, 8 * words - zeros.shape[1]))
    arrays = {
        "qweight": np.array([made.stream(row, 4) for row in codes], np.int32),
        "qzeros": np.array([made.stream(row, 4) for row in np.pad(zeros, padding)], np.int32),
        "scales": np.pad(scales, padding),
    }
    q = read(arrays, Spec(4, group, False), (16, cols), "gemv")
    assert np.array_equal(dequantize(q), made.meaning(codes, zeros, scales))
    assert np.array_equal(q.codes.read(3, 9), codes[3:9])


def test_a_slab_of_rows_reads_its_words_only() -> None:
    codes, zeros, scales = random_module(shape=(256, 64))
    seen: list[tuple[int, int]] = []
    q = awq.raised(
        MODULE, made.parts(made.awq(codes, zeros, scales), seen), (256, 64), Spec(4, 32, False), "gemm"
    ).data
    assert isinstance(q, QTensor) and seen == []
    assert np.array_equal(q.codes.read(43, 70), codes[43:70])
    assert seen == [(5, 9)]


# --- folders and configs ---------------------------------------------------------------------------------


def encode(sym: bool = False, plain: tuple[str, ...] = ("lm_head",)) -> made.Encode:
    def module(name: str, shape: tuple[int, int], rng: np.random.Generator) -> dict[str, Any] | None:
        return None if name.endswith(plain) else made.awq(*made.draw(rng, shape, 4, 32, sym, lowest=0))

    return module


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize(
    "names",
    [
        {"bits": 4, "group_size": 32, "version": "GEMM"},
        {"w_bit": 4, "q_group_size": 32, "modules_to_not_convert": None},
        {"bits": 4, "group_size": 32, "version": "gemm", "format": "gemm", "checkpoint_format": "gemm", "desc_act": False},
    ],
    ids=["transformers", "autoawq", "gptqmodel"],
)  # fmt: skip
def test_a_folder_is_read(tmp_path: Path, names: dict[str, Any], sym: bool) -> None:
    config = {"quant_method": "awq", "zero_point": not sym} | names
    model = lconvert.read(made.write_folder(tmp_path / "m", encode(sym), config))
    found = [e.data for e in model.entries.values() if isinstance(e.data, QTensor)]
    assert len(found) == 7 and {(q.grid, q.zero is None) for q in found} == {(int_grid(4, sym), sym)}
    assert f"quantized: awq gemm 4 bit, group 32{'' if sym else ', asymmetric'}" in model.report


def test_side_file_must_agree(tmp_path: Path) -> None:
    side = {"w_bit": 4, "q_group_size": 128, "version": "gemm"}
    with pytest.raises(InputError, match=r"group_size is 32 but quantize_config.json says 128"):
        lconvert.read(made.write_folder(tmp_path / "m", encode(), BASE, side=side))


def test_modules_that_are_not_converted(tmp_path: Path) -> None:
    config = BASE | {"modules_to_not_convert": ["self_attn", "lm_head"]}
    plain = ("q_proj", "k_proj", "v_proj", "o_proj", "lm_head")
    entries = lconvert.read(made.write_folder(tmp_path / "m", encode(plain=plain), config)).entries
    assert isinstance(entries["layers.0.mlp.up"].data, QTensor)
    assert not isinstance(entries["layers.0.attn.q"].data, QTensor)
    with pytest.raises(
        InputError, match=r"self_attn.\w_proj: is stored quantized, but quantization_config excludes it"
    ):
        lconvert.read(made.write_folder(tmp_path / "n", encode(), config))


def test_rules_of_gptqmodel() -> None:
    arrays = made.parts(made.awq(*random_module()))
    with pytest.raises(InputError, match=r"quantization_config excludes it"):
        parse(dynamic={"-:.*up_proj": {}}).weight(MODULE, arrays, (32, 64))
    with pytest.raises(
        UnsupportedError, match=r"AWQ has one layout for all modules; its loaders ignore this rule"
    ):
        parse(dynamic={"+:.*up_proj": {"bits": 8}}).weight(MODULE, arrays, (32, 64))
    assert parse(dynamic={"-:.*down_proj": {}}).weight(MODULE, arrays, (32, 64)) is not None


CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"bits": 8}, r"AWQ of 8 bits in int32 words; only 4 bits in int32 can be read"),
    ({"bits": ...}, r"quantization_config lacks bits"),
    ({"bits": 4.0}, r"bits of quantization_config is 4.0, expected a whole number"),
    ({"pack_dtype": "int16"}, r"AWQ of 4 bits in int16 words"),
    ({"group_size": -2}, r"group_size -2 must be positive"),
    ({"zero_point": 1}, r"zero_point of quantization_config is 1, expected true or false"),
    ({"version": "gemv_fast"}, r"'gemv_fast' cannot be read: its words are interleaved for one kernel; save the model as gemm"),
    ({"version": "marlin"}, r"'marlin' cannot be read: its words are shuffled"),
    ({"version": "other"}, r"'other' cannot be read: known are gemm and gemv"),
    ({"version": 5}, r"AWQ version '5' cannot be read"),
    ({"version": "gemm", "format": "gemv"}, r"version, format and checkpoint_format differ: gemm, gemv"),
    ({"modules_to_not_convert": "lm_head"}, r"modules_to_not_convert is 'lm_head', expected a list of names"),
    ({"modules_to_not_convert": [""]}, r"modules_to_not_convert is \[''\]"),
    ({"dynamic": {"(a*)*": {}}}, r"may take too long to match"),
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
            "zero_point",
            "version",
            "format",
            "modules_to_not_convert",
            "dynamic",
            "lm_head",
            "pack_dtype",
        )
    )
)
def test_any_config_is_read_or_refused(changes: dict[str, Any]) -> None:
    """No value of any key leads to another exception than the errors of lconvert."""
    made.read_or_refused(lambda: parse(**changes), made.awq(*random_module()), (32, 64))


SYM, ASYM = Spec(4, 32, True), Spec(4, 32, False)
TENSORS: list[tuple[Callable[[dict[str, Any]], Any], Spec, str | None]] = [
    (lambda a: None, Spec(4, 16, False), r"qzeros: has shape \(2, 4\), but the configuration implies \(4, 4\)"),
    (lambda a: None, Spec(4, 24, False), r"64 input features do not divide into groups of 24"),
    (lambda a: a.pop("qzeros"), SYM, r"up_proj: the tensor qzeros is missing"),
    (lambda a: a.update(qweight=a["qweight"][:32]), ASYM, r"qweight: has shape \(32, 4\), .* implies \(64, 4\)"),
    (lambda a: a.update(qweight=a["qweight"].view(np.uint32)), ASYM, r"qweight: is stored as U32, expected I32"),
    (lambda a: a["scales"].__setitem__((1, 3), np.inf), ASYM, r"scales: the scale inf in row 3 is damaged"),
    (lambda a: a["qzeros"].fill(-0x77777778), SYM, None),
    (
        lambda a: a["qzeros"].__setitem__((1, 2), 0x88888848 - (1 << 32)),  # nibble 1 is output 2 of eight
        SYM,
        r"qzeros: row 18, group 1 has zero point 4, symmetric ones have 8; set zero_point to true",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("change", "spec", "message"), TENSORS, ids=[str(t[2])[:40] for t in TENSORS])
def test_tensors_that_contradict_the_config(change: Any, spec: Spec, message: str | None) -> None:
    arrays = made.awq(*random_module(sym=spec.sym))
    change(arrays)
    if message is None:
        assert np.isfinite(dequantize(read(arrays, spec))).all()
        return
    with pytest.raises(InputError, match=message):
        dequantize(read(arrays, spec))


def test_shapes_that_awq_has_not() -> None:
    arrays = made.parts(made.awq(*random_module()))
    with pytest.raises(InputError, match=r"AWQ words hold 8 codes, which 30 x 64 does not divide into"):
        awq.raised(MODULE, arrays, (30, 64), ASYM, "gemm")
    with pytest.raises(
        UnsupportedError, match=r"gemv is defined for groups of 32, 64 and 128 or more inputs, not 16"
    ):
        awq.raised(MODULE, arrays, (32, 64), Spec(4, 16, False), "gemv")


# --- writing ---------------------------------------------------------------------------------------------


def good(sym: bool = False, group: int = 32, **changes: Any) -> QTensor:
    return replace(made.quantized(*random_module(group, sym), 4, group, sym), **changes)


PROBLEMS: list[tuple[Held, str]] = [
    (Held(good(), ActSpec(int_grid(8, True), "token", True)), "AWQ quantizes weights only"),
    (Held(good(grid=int_grid(8, False))), "AWQ holds integers of 4 bits, not a 8-bit int grid"),
    (Held(good(g_idx=dense(np.zeros(64, np.int32)))), "AWQ has no g_idx, its groups are neighbouring inputs"),
    (Held(good(scale=dense(np.ones((32, 2), np.float32)))), "scales in F16 or BF16, these are F32"),
    (
        Held(good(zero=dense(np.full((32, 2), 16, np.uint8)))),
        "zero points of 0 to 15, the largest here is 16",
    ),
    (
        Held(made.quantized(*random_module(shape=(12, 64)), 4, 32, False)),
        "8 rows each, 12 rows do not divide evenly",
    ),
]


@pytest.mark.parametrize(("held", "message"), PROBLEMS, ids=[p[1][:40] for p in PROBLEMS])
def test_what_awq_cannot_hold(held: Held, message: str) -> None:
    assert message in (awq.Writer().problem(held) or "")


def test_the_config_written_is_read_again() -> None:
    modules = {MODULE: Held(good()), "model.layers.0.mlp.down_proj": Held(good(True)), "lm_head": Held(None)}
    config = awq.Writer().config(modules, None)
    assert config == {
        "quant_method": "awq", "version": "gemm", "bits": 4, "group_size": 32, "zero_point": True, "lm_head": False,
        "modules_to_not_convert": ["lm_head"],
    }  # fmt: skip
    scheme = awq.parse(Checkpoint("config.json", json.loads(json.dumps(config)), Path("/nowhere")))
    assert (scheme.spec, scheme.skipped) == (Spec(4, 32, False), ("lm_head",))
    symmetric = awq.Writer().config({MODULE: Held(good(True))}, None)
    assert symmetric["zero_point"] is False and symmetric["modules_to_not_convert"] is None
    assert awq.Writer().config({"lm_head": Held(good())}, None)["lm_head"] is True
    assert awq.Writer().side_files(config) == {}


def test_models_that_one_config_cannot_describe() -> None:
    with pytest.raises(
        UnsupportedError,
        match=r"one group size for all modules, this model has group 32 \(a\), one group per row \(b\)",
    ):
        awq.Writer().config({"a": Held(good()), "b": Held(good(group=-1))}, None)
    with pytest.raises(UnsupportedError, match=r"would skip mlp.gate_proj along with the plain mlp.gate"):
        awq.Writer().config({"mlp.gate": Held(None), "mlp.gate_proj": Held(good())}, None)
    with pytest.raises(UnsupportedError, match=r"this model has no quantized module"):
        awq.Writer().config({"a": Held(None)}, None)
    act = ActSpec(E4M3, "tensor", False)
    with pytest.raises(UnsupportedError, match=r"AWQ has no words for a quantized KV cache"):
        awq.Writer().config({"a": Held(good())}, KVSpec(act, act))


def test_gptq_and_awq_hold_the_same_numbers() -> None:
    """The same grid through both layouts: what is carried from one to the other is exact."""
    q = good()
    through = read({n: s.read(0, s.shape[0]) for n, s in awq.Writer().store(Held(q)).items()}, ASYM)
    stored = gptq.Writer(2).store(Held(through))
    arrays = made.parts({n: s.read(0, s.shape[0]) for n, s in stored.items()})
    back = gptq.raised(MODULE, arrays, (32, 64), ASYM, 2).data
    assert isinstance(back, QTensor) and back.zero is not None and q.zero is not None
    assert (back.codes.load() == q.codes.load()).all() and (back.zero.load() == q.zero.load()).all()
